//! Contexts: the controllers that a user works with, as files `NAME.toml`, and which of them is the current one.
//!
//! Below `${XDG_CONFIG_HOME:-~/.config}/godwit`: `contexts/NAME.toml`, and `current` with a name in it. A context names the file with the
//! token; the token itself is never in it.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use godwit_api::client::Endpoint;
use godwit_model::{InvalidName, Name};
use serde::{Deserialize, Serialize};

use crate::arguments::ConnectionArgs;

/// A controller and the right to use it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Context {
    /// `https://host:port`.
    pub(crate) url: String,
    /// File with the API token.
    pub(crate) token_file: PathBuf,
    /// Certificate of the cluster's authority, PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ca_file: Option<PathBuf>,
}

/// Why there is no usable context.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContextError {
    /// Nothing says which controller.
    #[error("no controller is named, and there is no current context")]
    None,
    /// There is no such context.
    #[error("there is no context {name}")]
    Unknown {
        /// Its name.
        name: Name,
    },
    /// There is one of that name.
    #[error("there is a context {name} already")]
    Exists {
        /// Its name.
        name: Name,
    },
    /// The name is none.
    #[error("a context cannot have that name")]
    Name(#[from] InvalidName),
    /// There is no home directory to look in.
    #[error("neither XDG_CONFIG_HOME nor HOME says where contexts are")]
    NoHome,
    /// A URL without a token.
    #[error("a URL was given, but no file with a token")]
    NoToken,
    /// The token's file holds no token.
    #[error("{path} holds no token")]
    EmptyToken {
        /// The file.
        path: PathBuf,
    },
    /// A URL that is none, or that would send the token in clear text.
    #[error("{url} cannot be used")]
    Url {
        /// The URL.
        url: String,
    },
    /// A file cannot be used.
    #[error("cannot {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A context's file is not one.
    #[error("{path} is not a context")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<toml::de::Error>,
    },
}

impl ContextError {
    /// What to do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::None => {
                "try a lab (`godwit lab up`), choose a context (`godwit context list`, `godwit context use NAME`), \
                 or say --url, --token-file and --ca-file"
            }
            Self::Unknown { .. } => "`godwit context list` shows those there are",
            Self::Exists { .. } => "delete it first: `godwit context delete`",
            Self::NoHome => "set HOME, or say --url, --token-file and --ca-file",
            Self::NoToken => "say --token-file too, or set GODWIT_TOKEN_FILE",
            Self::EmptyToken { .. } => "write the token into it, as `godwit token create` printed it",
            Self::Url { .. } => "write https://HOST:PORT; http:// is for loopback addresses only, because it would show the token",
            Self::Damaged { .. } => "it has url, token_file and ca_file; make it anew with `godwit context create`",
            Self::Name(_) | Self::File { .. } => return None,
        };
        Some(hint.to_owned())
    }

    fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }
}

/// A user's contexts.
#[derive(Debug)]
pub(crate) struct Contexts {
    dir: PathBuf,
}

impl Contexts {
    /// Those of the user whose environment this is.
    pub(crate) fn of_user() -> Result<Self, ContextError> {
        Self::of_environment(|name| std::env::var_os(name))
    }

    fn of_environment(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, ContextError> {
        let absolute = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let config = absolute("XDG_CONFIG_HOME").or_else(|| absolute("HOME").map(|home| home.join(".config")));
        Ok(Self { dir: config.ok_or(ContextError::NoHome)?.join("godwit") })
    }

    fn path(&self, name: &Name) -> PathBuf {
        self.dir.join("contexts").join(format!("{name}.toml"))
    }

    /// Their names, in order.
    pub(crate) fn names(&self) -> Result<Vec<Name>, ContextError> {
        let dir = self.dir.join("contexts");
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(ContextError::file("read", &dir)(error)),
        };
        let name = |entry: fs::DirEntry| Name::new(entry.file_name().to_str()?.strip_suffix(".toml")?).ok();
        let mut names: Vec<Name> = entries.filter_map(|entry| name(entry.ok()?)).collect();
        names.sort();
        Ok(names)
    }

    /// One of them.
    pub(crate) fn read(&self, name: &Name) -> Result<Context, ContextError> {
        let path = self.path(name);
        match fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text).map_err(|source| ContextError::Damaged { path, source: Box::new(source) }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(ContextError::Unknown { name: name.clone() }),
            Err(error) => Err(ContextError::file("read", &path)(error)),
        }
    }

    /// Adds or replaces one.
    pub(crate) fn write(&self, name: &Name, context: &Context) -> Result<(), ContextError> {
        let path = self.path(name);
        let text = toml::to_string(context).map_err(|error| ContextError::file("write", &path)(io::Error::other(error)))?;
        self.replace(&path, &text)
    }

    /// Removes one, and whether there was one.
    pub(crate) fn remove(&self, name: &Name) -> Result<bool, ContextError> {
        let path = self.path(name);
        let there = match fs::remove_file(&path) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(ContextError::file("remove", &path)(error)),
        };
        if self.named_current()?.as_ref() == Some(name) {
            let current = self.dir.join("current");
            fs::remove_file(&current).map_err(ContextError::file("remove", &current))?;
        }
        Ok(there)
    }

    /// The name of the current one, if it exists.
    pub(crate) fn current(&self) -> Result<Option<Name>, ContextError> {
        Ok(self.named_current()?.filter(|name| self.path(name).exists()))
    }

    fn named_current(&self) -> Result<Option<Name>, ContextError> {
        let path = self.dir.join("current");
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Name::new(text.trim()).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ContextError::file("read", &path)(error)),
        }
    }

    /// Makes one the current one.
    pub(crate) fn set_current(&self, name: &Name) -> Result<(), ContextError> {
        self.read(name)?;
        self.replace(&self.dir.join("current"), &format!("{name}\n"))
    }

    /// Replaces a file as a whole; only its owner can read it.
    fn replace(&self, path: &Path, text: &str) -> Result<(), ContextError> {
        let dir = self.dir.join("contexts");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(ContextError::file("create", &dir))?;
        let new = path.with_extension(format!("new-{}", std::process::id()));
        let write = || {
            let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(text.as_bytes())?;
            fs::rename(&new, path)
        };
        write().map_err(ContextError::file("write", path))
    }
}

/// Decides which controller is meant: flags, then environment, then the current context; a URL before a context's name.
fn resolve(
    flags: &ConnectionArgs,
    variable: impl Fn(&str) -> Option<OsString>,
    contexts: impl Fn() -> Result<Contexts, ContextError>,
) -> Result<Context, ContextError> {
    let variable = |name| variable(name).filter(|value| !value.is_empty());
    let named = |name: &str| contexts()?.read(&Name::new(name)?);
    let direct = |url: String| -> Result<Context, ContextError> {
        let token_file = flags.token_file.clone().or_else(|| variable("GODWIT_TOKEN_FILE").map(PathBuf::from));
        let ca_file = flags.ca_file.clone().or_else(|| variable("GODWIT_CA_FILE").map(PathBuf::from));
        Ok(Context { url, token_file: token_file.ok_or(ContextError::NoToken)?, ca_file })
    };
    let mut context = if let Some(url) = &flags.url {
        direct(url.clone())?
    } else if let Some(name) = &flags.context {
        named(name)?
    } else if let Some(url) = variable("GODWIT_URL") {
        direct(url.to_string_lossy().into_owned())?
    } else if let Some(name) = variable("GODWIT_CONTEXT") {
        named(&name.to_string_lossy())?
    } else {
        let contexts = contexts()?;
        contexts.read(&contexts.current()?.ok_or(ContextError::None)?)?
    };
    context.token_file = flags.token_file.clone().unwrap_or(context.token_file);
    context.ca_file = flags.ca_file.clone().or(context.ca_file);
    Ok(context)
}

/// The endpoint that flags, environment and contexts name.
pub(crate) fn endpoint(flags: &ConnectionArgs) -> Result<Endpoint, ContextError> {
    resolve(flags, |name| std::env::var_os(name), Contexts::of_user)?.endpoint()
}

impl Context {
    /// Reads the files that the context names.
    pub(crate) fn endpoint(&self) -> Result<Endpoint, ContextError> {
        let url = check_url(&self.url)?;
        let read = |path: &PathBuf| fs::read_to_string(path).map_err(ContextError::file("read", path));
        let token = read(&self.token_file)?.trim().to_owned();
        if token.is_empty() {
            return Err(ContextError::EmptyToken { path: self.token_file.clone() });
        }
        Ok(Endpoint { url, token, authority: self.ca_file.as_ref().map(read).transpose()? })
    }
}

/// The URL without a final slash, if a token may be sent there.
pub(crate) fn check_url(url: &str) -> Result<String, ContextError> {
    let refused = || ContextError::Url { url: url.to_owned() };
    let plain = url.trim_end_matches('/');
    let clean = |rest: &str| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_graphic() && !b"/?#@\\".contains(&byte));
    if let Some(rest) = plain.strip_prefix("https://") {
        return if clean(rest) { Ok(plain.to_owned()) } else { Err(refused()) };
    }
    let rest = plain.strip_prefix("http://").filter(|rest| clean(rest)).ok_or_else(refused)?;
    let bracketed = rest.strip_prefix('[').and_then(|rest| rest.split(']').next());
    let host = bracketed.unwrap_or_else(|| rest.rsplit_once(':').map_or(rest, |(host, _)| host));
    let loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    if loopback { Ok(plain.to_owned()) } else { Err(refused()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contexts() -> (tempfile::TempDir, Contexts) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().to_owned();
        let contexts = Contexts::of_environment(|name| (name == "HOME").then(|| path.clone().into())).expect("HOME is set");
        (dir, contexts)
    }

    fn context(url: &str) -> Context {
        Context { url: url.to_owned(), token_file: "/t".into(), ca_file: Some("/c".into()) }
    }

    #[test]
    fn a_context_survives_its_file_and_the_current_one_goes_with_it() {
        let (_dir, contexts) = contexts();
        let (a, b) = (Name::new("a").expect("name"), Name::new("b").expect("name"));
        assert_eq!((contexts.names().expect("names"), contexts.current().expect("current")), (vec![], None));
        contexts.write(&a, &context("https://a:1")).expect("written");
        contexts.write(&b, &context("https://b:1")).expect("written");
        assert_eq!(contexts.read(&a).expect("read"), context("https://a:1"));
        contexts.set_current(&a).expect("current");
        assert_eq!(contexts.current().expect("current"), Some(a.clone()));
        assert_eq!(contexts.names().expect("names"), [a.clone(), b]);
        assert!(contexts.remove(&a).expect("removed"));
        assert!(!contexts.remove(&a).expect("is gone already"));
        assert_eq!(contexts.current().expect("current"), None);
        assert!(matches!(contexts.set_current(&a), Err(ContextError::Unknown { .. })));
    }

    #[test]
    fn flags_go_before_the_environment_and_that_before_the_current_context() {
        let (_dir, store) = contexts();
        for name in ["flag", "env", "current"] {
            store.write(&Name::new(name).expect("name"), &context(&format!("https://{name}"))).expect("written");
        }
        store.set_current(&Name::new("current").expect("name")).expect("current");
        let ask = |flags: ConnectionArgs, env: &[(&str, &str)]| {
            let variable = |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value));
            resolve(&flags, variable, || Ok(Contexts { dir: store.dir.clone() })).map(|context| (context.url, context.token_file))
        };
        let answer = |url: &str, token: &str| (url.to_owned(), PathBuf::from(token));
        let none = ConnectionArgs::default;
        let url = || ConnectionArgs { url: Some("https://u".into()), ..none() };
        let named = || ConnectionArgs { context: Some("flag".into()), ..none() };
        let env_url = [("GODWIT_URL", "https://e"), ("GODWIT_TOKEN_FILE", "/e"), ("GODWIT_CONTEXT", "env")];
        assert_eq!(ask(none(), &[]).expect("current"), answer("https://current", "/t"));
        assert_eq!(ask(none(), &[("GODWIT_CONTEXT", "env")]).expect("env"), answer("https://env", "/t"));
        assert_eq!(ask(none(), &env_url).expect("env"), answer("https://e", "/e"));
        assert_eq!(ask(named(), &env_url).expect("flag"), answer("https://flag", "/t"));
        assert_eq!(ask(url(), &env_url).expect("flag"), answer("https://u", "/e"));
        assert!(matches!(ask(url(), &[]), Err(ContextError::NoToken)));
        let token = ConnectionArgs { token_file: Some("/other".into()), ..named() };
        assert_eq!(ask(token, &[]).expect("flag"), answer("https://flag", "/other"));
        let missing = ConnectionArgs { context: Some("gone".into()), ..none() };
        assert!(matches!(ask(missing, &[]), Err(ContextError::Unknown { .. })));
        let outside = ConnectionArgs { context: Some("../x".into()), ..none() };
        assert!(matches!(ask(outside, &[]), Err(ContextError::Name(_))));
    }

    #[test]
    fn a_token_is_not_sent_in_clear_text_over_a_network() {
        for good in
            ["https://h:1", "https://10.0.0.1", "http://127.0.0.1:80", "http://[::1]:80", "http://localhost", "http://127.9.9.9"]
        {
            assert_eq!(check_url(good).expect(good), good);
        }
        assert_eq!(check_url("https://h:1/").expect("a final slash is harmless"), "https://h:1");
        for bad in [
            "",
            "h:1",
            "http://h:1",
            "http://10.0.0.1",
            "http://127.0.0.1@evil",
            "http://localhost.evil:1",
            "https://",
            "https://h/p",
            "ftp://h",
        ] {
            assert!(check_url(bad).is_err(), "{bad:?}");
        }
    }
}
