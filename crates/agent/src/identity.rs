//! Who this host is: its name, address, certificate and key, kept in the state directory; and how it gets them with a join token.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use godwit_link::certificate::host_dns_name;
use godwit_link::status::refusal_of;
use godwit_link::v1::link_client::LinkClient;
use godwit_link::v1::{JoinRequest, RenewRequest};
use godwit_link::{InvalidJoinToken, JoinToken};
use godwit_model::{ErrorCode, Name, Refusal, Retry};
use serde::{Deserialize, Serialize};

use crate::dial::{self, DialError};
use crate::host::unix_now;
use crate::tls::{Material, TlsError, joining_config};

/// What `godwit host join` is given.
#[derive(Debug)]
pub struct JoinOptions {
    /// `host:port` of the controller's link listener.
    pub controller: String,
    /// The name this host gets.
    pub name: Name,
    /// The address at which its peers reach it.
    pub address: IpAddr,
    /// The address at which moves reach it, if it is another.
    pub migration_address: Option<IpAddr>,
    /// Where the agent keeps its state.
    pub state_dir: PathBuf,
    /// The token's text. Secret.
    pub token: String,
    /// Whether this host has joined before: it gets a new key and certificate, and keeps its journal and its VMs.
    pub rejoin: bool,
}

/// Why a host did not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The text is not a token.
    #[error(transparent)]
    Token(#[from] InvalidJoinToken),
    /// This host has joined before.
    #[error("this state directory already belongs to host {0}")]
    Joined(Name),
    /// An agent runs with the state.
    #[error("the agent of this host runs")]
    Running,
    /// The controller could not be reached, or is not the one the token is for.
    #[error("cannot reach the controller: {0}")]
    Dial(#[source] DialError),
    /// The controller said no.
    #[error("{0}")]
    Refused(Refusal),
    /// A key could not be made.
    #[error("cannot make a key")]
    Key(#[source] rcgen::Error),
    /// The identity could not be kept.
    #[error("cannot write {path:?}")]
    Write {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl JoinError {
    /// The refusal to show.
    #[must_use]
    pub fn refusal(&self) -> Refusal {
        match self {
            Self::Refused(refusal) => refusal.clone(),
            Self::Token(_) => {
                Refusal::new(ErrorCode::TokenInvalid, self.to_string()).hint("make a new one with `godwit host token`")
            }
            Self::Joined(_) => Refusal::new(ErrorCode::NameTaken, self.to_string())
                .hint("start `godwit agent` with it; `--rejoin` renews its certificate under the same name; or choose another --state-dir"),
            Self::Running => Refusal::new(ErrorCode::InUse, self.to_string())
                .hint("stop it first; its VMs run on")
                .retry(Retry::Safe),
            Self::Dial(error) if error.is_unreachable() => Refusal::new(ErrorCode::HostDown, self.to_string())
                .hint("check address and port, and that `godwit serve` runs there")
                .retry(Retry::Safe),
            Self::Dial(_) => Refusal::new(ErrorCode::CertificateRefused, self.to_string())
                .hint("check address and port; a token is good only for the cluster that made it")
                .retry(Retry::Safe),
            Self::Key(_) | Self::Write { .. } => Refusal::new(ErrorCode::HostFailed, self.to_string()).retry(Retry::Safe),
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct HostFile {
    name: Name,
    address: IpAddr,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    migration_address: Option<IpAddr>,
    controller: String,
}

/// A host that has joined.
pub(crate) struct Identity {
    pub(crate) name: Name,
    pub(crate) address: IpAddr,
    /// Where carry listens.
    pub(crate) migration_address: IpAddr,
    pub(crate) controller: String,
    /// The host's certificate, as it is now: it is renewed while the agent runs.
    material: Mutex<Material>,
    dir: PathBuf,
}

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IdentityError {
    #[error("this host has not joined: {path:?} cannot be read")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path:?} is damaged")]
    Damaged { path: PathBuf, source: serde_json::Error },
}

impl Identity {
    pub(crate) fn load(state_dir: &Path) -> Result<Self, IdentityError> {
        let dir = state_dir.join("identity");
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read_to_string(&path).map_err(|source| IdentityError::Read { path, source })
        };
        let path = dir.join("host.json");
        let host: HostFile = serde_json::from_str(&read("host.json")?).map_err(|source| IdentityError::Damaged { path, source })?;
        let pair = read("pair.pem")?;
        let material = Material { certificate: pair.clone(), key: pair, authority: read("ca.pem")? };
        Ok(Self {
            name: host.name,
            address: host.address,
            migration_address: host.migration_address.unwrap_or(host.address),
            controller: host.controller,
            material: Mutex::new(material),
            dir,
        })
    }

    /// The certificate, key and authority of this moment.
    pub(crate) fn material(&self) -> Material {
        self.material.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How long until the certificate should be renewed; at once when that cannot be told.
    pub(crate) fn renewal_due(&self) -> Duration {
        let due = || {
            let chain = self.material().chain().ok()?;
            let leaf = chain.first()?;
            let (begins, ends) = validity(leaf)?;
            let seed = blake3::hash(leaf);
            let moment = decide_renewal(begins, ends, *seed.as_bytes().first_chunk()?);
            let now = i64::try_from(unix_now().get() / 1_000).ok()?;
            Some(Duration::from_secs(u64::try_from(moment - now).unwrap_or(0)))
        };
        due().unwrap_or_default()
    }

    /// From when to when the certificate is good, in seconds since 1970.
    pub(crate) fn validity(&self) -> Option<(i64, i64)> {
        validity(self.material().chain().ok()?.first()?)
    }

    /// Gets a new certificate for a new key over a connection that the old one opened, and keeps it.
    pub(crate) async fn renew(&self, client: &mut LinkClient<tonic::transport::Channel>) -> Result<(), RenewError> {
        let (key, signing_request) = signing_request(&self.name)?;
        let reply = client.renew(RenewRequest { signing_request }).await?.into_inner();
        let material = Material { certificate: reply.certificate, key, authority: self.material().authority };
        // One that this host could not show would lock it out.
        material.client_config()?;
        write_pair(&self.dir, &material.certificate, &material.key)?;
        *self.material.lock().unwrap_or_else(PoisonError::into_inner) = material;
        Ok(())
    }
}

/// Why a certificate was not renewed; the old one stays.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RenewError {
    #[error("cannot make a key")]
    Key(#[from] rcgen::Error),
    #[error("the controller refused: {0}")]
    Refused(#[from] tonic::Status),
    #[error("the controller gave a certificate that cannot be used")]
    Unusable(#[from] TlsError),
    #[error("cannot keep it")]
    Write(#[from] io::Error),
}

fn validity(certificate: &[u8]) -> Option<(i64, i64)> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some((certificate.validity().not_before.timestamp(), certificate.validity().not_after.timestamp()))
}

/// When a certificate is renewed: when half of its life is over, and up to a tenth of its life later, by `seed`, so that hosts that joined
/// together do not come together.
fn decide_renewal(begins: i64, ends: i64, seed: [u8; 4]) -> i64 {
    let life = ends.saturating_sub(begins).max(0);
    let share = i64::from(u32::from_le_bytes(seed) % 1_000);
    begins.saturating_add(life / 2).saturating_add(life / 10 / 1_000 * share)
}

/// Joins the cluster, or joins it again: the secret is said only to a controller whose authority has the token's fingerprint.
///
/// # Errors
/// [`JoinError`]; nothing of it is left in the state directory then, and an identity of before is as it was.
pub async fn join(options: JoinOptions) -> Result<Name, JoinError> {
    let token: JoinToken = options.token.parse()?;
    let dir = options.state_dir.join("identity");
    let known = Identity::load(&options.state_dir).ok().map(|identity| identity.name);
    if let Some(name) = known.filter(|name| !options.rejoin || *name != options.name) {
        return Err(JoinError::Joined(name));
    }
    // An agent that runs would go on with the old key.
    let _lock = if options.rejoin { Some(lock_state(&options.state_dir)?) } else { None };
    let (key, signing_request) = signing_request(&options.name).map_err(JoinError::Key)?;
    let channel = dial::dial(&options.controller, joining_config(token.authority.clone())).await.map_err(JoinError::Dial)?;
    let request = JoinRequest {
        token: options.token.trim().to_owned(),
        host: options.name.to_string(),
        address: options.address.to_string(),
        signing_request,
    };
    let reply =
        LinkClient::new(channel).join(request).await.map_err(|status| JoinError::Refused(refusal_of(&status)))?.into_inner();
    let material = Material { certificate: reply.certificate.clone(), key: key.clone(), authority: reply.authority.clone() };
    if !material.is_of(&token.authority) || material.client_config().is_err() {
        let refusal = Refusal::new(ErrorCode::CertificateRefused, "the controller gave a certificate that cannot be used");
        return Err(JoinError::Refused(refusal.hint("agent and controller must be of compatible versions")));
    }

    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| JoinError::Write { path, source }
    };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(failed(&dir))?;
    let host = HostFile {
        name: options.name.clone(),
        address: options.address,
        migration_address: options.migration_address,
        controller: options.controller,
    };
    let host = serde_json::to_string_pretty(&host).map_err(|error| failed(&dir)(error.into()))?;
    // host.json goes last: with it the host has joined.
    write_pair(&dir, &reply.certificate, &key).map_err(failed(&dir))?;
    for (name, text) in [("ca.pem", &reply.authority), ("host.json", &host)] {
        let path = dir.join(name);
        write_secret(&path, text).map_err(failed(&path))?;
    }
    Ok(options.name)
}

fn lock_state(state_dir: &Path) -> Result<fs::File, JoinError> {
    let failed = |source| JoinError::Write { path: state_dir.to_owned(), source };
    crate::host::private_dir(state_dir, None).map_err(failed)?;
    match crate::lock(state_dir) {
        Ok(lock) => Ok(lock),
        Err(crate::AgentError::Dir { path, source }) => Err(JoinError::Write { path, source }),
        Err(_) => Err(JoinError::Running),
    }
}

fn signing_request(name: &Name) -> Result<(String, String), rcgen::Error> {
    let key = rcgen::KeyPair::generate()?;
    let request = rcgen::CertificateParams::new(vec![host_dns_name(name)])?.serialize_request(&key)?;
    Ok((key.serialize_pem(), request.pem()?))
}

/// Certificate and key in one file: they change together or not at all.
fn write_pair(dir: &Path, certificate: &str, key: &str) -> io::Result<()> {
    write_secret(&dir.join("pair.pem"), &format!("{certificate}\n{key}"))
}

fn write_secret(path: &Path, text: &str) -> io::Result<()> {
    let beside = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(beside, path)?;
    // The controller forgets the old key once the new one is used: the new one must be here to stay.
    fs::File::open(path.parent().unwrap_or_else(|| Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests;
