//! AppArmor, a wall of its own behind the cage's: where the kernel enforces it, what runs in a cage has a profile of ours.
//!
//! The agent loads the profiles ([`load`]) and tells its [`Launcher`](super::Launcher); the cage asks the kernel for the profile of what it is
//! about to execute. A profile that cannot be entered ends the start. Names carry a digest of the text: an agent that is updated, or another one on
//! the same machine, never changes the profile of what runs.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use godwit_model::hostile;
use serde::{Deserialize, Serialize};

use super::{root, tool};

/// The profiles.
const TEXT: &str = include_str!("profiles.apparmor");
/// Whether the kernel enforces profiles.
const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
/// Where the kernel takes them.
const KERNEL: &str = "/sys/kernel/security/apparmor";
/// Where the process writes what it wants at its next exec; the second is for kernels with one security module.
const AT_EXEC: [&str; 2] = ["/proc/self/attr/apparmor/exec", "/proc/self/attr/exec"];
/// Time for compiling and loading them, on a slow machine.
const LIMIT: Duration = Duration::from_secs(60);

/// What a caged program is, and so which profile it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// A VM's QEMU.
    Qemu,
    /// A VM's swtpm.
    Tpm,
    /// `qemu-img` and the like.
    Tool,
    /// `carry`.
    Carry,
    /// `vault-worker`.
    Vault,
}

impl Profile {
    const ALL: [Self; 5] = [Self::Qemu, Self::Tpm, Self::Tool, Self::Carry, Self::Vault];

    /// Its name in the text.
    const fn name(self) -> &'static str {
        match self {
            Self::Qemu => "godwit-qemu",
            Self::Tpm => "godwit-tpm",
            Self::Tool => "godwit-tool",
            Self::Carry => "godwit-carry",
            Self::Vault => "godwit-vault",
        }
    }
}

/// What the profiles speak of on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// QEMU's binary.
    pub qemu: PathBuf,
    /// The agent's directory of sockets.
    pub run_dir: PathBuf,
    /// Where volumes and images are; not empty.
    pub volumes: Vec<PathBuf>,
}

/// Profiles that the kernel has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    digest: String,
}

impl Loaded {
    /// What the kernel calls a profile.
    #[must_use]
    pub fn name_of(&self, profile: Profile) -> String {
        format!("{}-{}", profile.name(), self.digest)
    }
}

/// Why there are no profiles.
#[derive(Debug, thiserror::Error)]
pub enum NoProfiles {
    /// The kernel does without AppArmor.
    #[error("the kernel does not enforce AppArmor")]
    NotEnforced,
    /// The kernel enforces it, and takes no profile here.
    #[error("the kernel enforces AppArmor, but {KERNEL} is not there")]
    NoDoor,
    /// There is no parser.
    #[error("the kernel enforces AppArmor, but apparmor_parser is not in PATH")]
    NoParser,
    /// A path that no profile can speak of.
    #[error("{} has signs that mean something in a profile", .0.display())]
    Place(PathBuf),
    /// The parser was not run.
    #[error("apparmor_parser cannot be run")]
    Run(#[source] io::Error),
    /// It took too long.
    #[error("apparmor_parser takes longer than {0:?}")]
    TimedOut(Duration),
    /// It, or the kernel, refused; its own words, made harmless.
    #[error("apparmor_parser refuses the profiles: {0}")]
    Refused(String),
}

/// Loads the profiles. They stay until the machine goes down.
///
/// # Errors
/// See [`NoProfiles`].
pub async fn load(places: &Places) -> Result<Loaded, NoProfiles> {
    if !std::fs::read_to_string(ENABLED).is_ok_and(|text| text.trim() == "Y") {
        return Err(NoProfiles::NotEnforced);
    }
    if !Path::new(KERNEL).is_dir() {
        return Err(NoProfiles::NoDoor);
    }
    let parser = tool::find("apparmor_parser").ok_or(NoProfiles::NoParser)?;
    let (loaded, text) = text(places)?;
    let running = tokio::task::spawn_blocking(move || parse(&parser, &["--replace"], &text));
    match tokio::time::timeout(LIMIT, running).await {
        Ok(Ok(result)) => result.map(|()| loaded),
        Ok(Err(panicked)) => Err(NoProfiles::Run(io::Error::other(panicked))),
        Err(_) => Err(NoProfiles::TimedOut(LIMIT)),
    }
}

/// Runs the parser on a text, past all caches.
fn parse(parser: &Path, arguments: &[&str], text: &str) -> Result<(), NoProfiles> {
    let mut command = Command::new(parser);
    command.args(["--quiet", "--skip-cache"]).args(arguments).env_clear().env("LC_ALL", "C");
    let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let mut child = child.map_err(NoProfiles::Run)?;
    if let Some(mut input) = child.stdin.take() {
        // One that ends before it has read all says why in its status.
        let _ = input.write_all(text.as_bytes());
    }
    let ended = child.wait_with_output().map_err(NoProfiles::Run)?;
    let said = String::from_utf8_lossy(&ended.stderr);
    if ended.status.success() { Ok(()) } else { Err(NoProfiles::Refused(hostile::bounded(&said, hostile::SENTENCE))) }
}

/// The profiles with the host's places, under names of their own.
fn text(places: &Places) -> Result<(Loaded, String), NoProfiles> {
    let volumes = places.volumes.iter().map(|path| quoted(path)).collect::<Result<Vec<_>, _>>()?;
    // Links are followed: the kernel knows files by where they are.
    let qemu = std::fs::canonicalize(&places.qemu).unwrap_or_else(|_| places.qemu.clone());
    let places = format!(
        "@{{GODWIT_QEMU}}={}\n@{{GODWIT_RUN}}={}\n@{{GODWIT_VOLUMES}}={}\n",
        quoted(&root::program_place(&qemu))?,
        quoted(&places.run_dir)?,
        volumes.join(" "),
    );
    // It need not be the same in another build: that one loads its own.
    let mut hasher = DefaultHasher::new();
    (&places, TEXT).hash(&mut hasher);
    let loaded = Loaded { digest: format!("{:016x}", hasher.finish()) };
    let named = |text: String, profile: &Profile| text.replace(profile.name(), &loaded.name_of(*profile));
    let profiles = Profile::ALL.iter().fold(TEXT.to_owned(), named);
    let text = places + &profiles;
    Ok((loaded, text))
}

/// A path as a value in a profile.
fn quoted(path: &Path) -> Result<String, NoProfiles> {
    let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+:, ~=".contains(&byte);
    match path.to_str().filter(|text| text.starts_with('/') && text.bytes().all(plain)) {
        Some(text) => Ok(format!("\"{}\"", text.trim_end_matches('/'))),
        None => Err(NoProfiles::Place(path)),
    }
}

/// Asks the kernel for a profile from this process' next exec on.
pub(super) fn enter(profile: &str) -> io::Result<()> {
    let wanted = format!("exec {profile}");
    let [first, second] = AT_EXEC.map(|path| move |wanted: &str| std::fs::write(path, wanted));
    match first(&wanted) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => second(&wanted),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Places {
        Places {
            qemu: "/opt/none/bin/qemu-system-x86_64".into(),
            run_dir: "/run/none".into(),
            volumes: vec!["/none/pool one".into(), "/none/images".into()],
        }
    }

    #[test]
    fn the_profiles_speak_of_this_hosts_places_under_names_of_their_own() {
        let (loaded, text) = text(&places()).expect("a text");
        assert!(text.starts_with("@{GODWIT_QEMU}=\"/opt/none/bin/qemu-system-x86_64\"\n@{GODWIT_RUN}=\"/run/none\"\n"), "{text}");
        assert!(text.contains("@{GODWIT_VOLUMES}=\"/none/pool one\" \"/none/images\"\n"), "{text}");
        for profile in Profile::ALL {
            let name = loaded.name_of(profile);
            assert!(text.contains(&format!("profile {name} flags")) && text.contains(&format!("signal peer={name},")), "{text}");
            assert!(!text.contains(&format!("{} flags", profile.name())), "{text}");
        }
        let (other, _) = super::text(&Places { run_dir: "/run/other".into(), ..places() }).expect("a text");
        assert_ne!(loaded.name_of(Profile::Qemu), other.name_of(Profile::Qemu), "another agent's profiles are others");
    }

    #[test]
    fn a_path_that_would_be_read_as_a_rule_is_refused() {
        for path in ["/a/*", "/a\"b", "/a\nb", "/{a,b}", "/a[b]", "/a^", "/@x", "relative", "/a\\b"] {
            let refused = text(&Places { volumes: vec![path.into()], ..places() });
            assert!(matches!(refused, Err(NoProfiles::Place(_))), "{path}: {refused:?}");
        }
    }

    #[test]
    fn what_is_no_profile_of_this_kernel_ends_the_start() {
        // Without AppArmor there is nothing to write to; with it, nobody has loaded this one.
        let error = enter("godwit-none").expect_err("no such profile");
        assert!(!error.to_string().is_empty());
    }
}
