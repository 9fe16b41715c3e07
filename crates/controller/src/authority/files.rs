//! What the authority keeps on disk, and what can be done with it while the controller stands still: look, take the root's key away, and
//! sign a new intermediate.
//!
//! ```text
//!   DIR.key              the secret; outside of DIR, so that a copy of DIR opens nothing
//!   DIR/ca.pem           the root's certificate: what users and hosts trust
//!   DIR/root.sealed      the root's key, until `export-root` takes it away
//!   DIR/intermediate.sealed   the intermediate: its certificate, and its key sealed; both are replaced together
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use godwit_model::UnixMillis;
use rcgen::{Issuer, KeyPair, PublicKeyData};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::sealed::{Sealed, Secret};
use super::{AuthorityError, fingerprint, intermediate_params, key_hash, key_of, root_params, validity_of, write_durably};
use crate::clock;

const SCHEMA: u32 = 1;
const ROOT_KEY: &str = "the root's key";
const INTERMEDIATE_KEY: &str = "the intermediate's key";

#[derive(Serialize, Deserialize)]
struct RootFile {
    schema: u32,
    key: Sealed,
}

#[derive(Serialize, Deserialize)]
struct IntermediateFile {
    schema: u32,
    certificate: String,
    key: Sealed,
}

/// The files of an authority.
#[derive(Clone, Debug)]
pub(crate) struct AuthorityFiles {
    dir: PathBuf,
    secret: PathBuf,
}

/// What `godwit cluster ca show` tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AuthorityView {
    /// SHA-256 of the root's certificate: what join tokens carry.
    pub fingerprint: String,
    /// When the root's certificate ends.
    pub root_ends: UnixMillis,
    /// Whether the root's key lies on this machine, sealed.
    pub root_key_here: bool,
    /// SHA-256 of the intermediate's certificate; none if there is no intermediate yet.
    pub intermediate: Option<String>,
    /// When the intermediate's certificate ends.
    pub intermediate_ends: Option<UnixMillis>,
}

/// The root's and the intermediate's certificate, and the key that signs.
pub(super) struct Loaded {
    pub(super) root: CertificateDer<'static>,
    pub(super) root_pem: String,
    pub(super) intermediate: CertificateDer<'static>,
    pub(super) intermediate_pem: String,
    pub(super) key: KeyPair,
    pub(super) secret: Secret,
}

impl AuthorityFiles {
    /// Those in a controller's data directory, which exists. The secret is `secret`, or beside the directory under its name with `.key`.
    ///
    /// # Errors
    /// A directory without a name that could be had.
    pub(crate) fn new(dir: &Path, secret: Option<&Path>) -> Result<Self, AuthorityError> {
        let failed = |source| AuthorityError::File { path: dir.to_owned(), source };
        let dir = fs::canonicalize(dir).map_err(failed)?;
        let secret = match (secret, dir.file_name()) {
            (Some(secret), _) => secret.to_owned(),
            (None, Some(name)) => {
                let mut name = name.to_owned();
                name.push(".key");
                dir.with_file_name(name)
            }
            (None, None) => return Err(failed(io::ErrorKind::InvalidInput.into())),
        };
        Ok(Self { dir, secret })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn read(&self, name: &str) -> Result<Option<String>, AuthorityError> {
        let path = self.path(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(AuthorityError::File { path, source }),
        }
    }

    fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, AuthorityError> {
        let damaged = |source| AuthorityError::Damaged { path: self.path(name), source };
        self.read(name)?.map(|text| serde_json::from_str(&text).map_err(damaged)).transpose()
    }

    fn write(&self, name: &str, text: &str, mode: u32) -> Result<(), AuthorityError> {
        let path = self.path(name);
        write_durably(&path, text.as_bytes(), mode).map_err(|source| AuthorityError::File { path, source })
    }

    fn write_json(&self, name: &str, value: &impl Serialize) -> Result<(), AuthorityError> {
        let text = serde_json::to_string_pretty(value).expect("plain fields serialise");
        self.write(name, &text, 0o600)
    }

    /// The secret; made if nothing was ever sealed here.
    fn secret(&self) -> Result<Secret, AuthorityError> {
        let sealed = ["root.sealed", "intermediate.sealed"].iter().any(|name| self.path(name).exists());
        match Secret::load(&self.secret) {
            Err(super::SealError::Missing { .. }) if !sealed => {
                let secret = Secret::create(&self.secret)?;
                tracing::info!(path = %self.secret.display(), "the authority's secret was made; keep a copy away from copies of the data");
                Ok(secret)
            }
            result => Ok(result?),
        }
    }

    fn certificate(&self, pem: &str, name: &str) -> Result<CertificateDer<'static>, AuthorityError> {
        CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| AuthorityError::Mismatch { path: self.path(name) })
    }

    /// The root's certificate.
    fn root(&self) -> Result<Option<(CertificateDer<'static>, String)>, AuthorityError> {
        let Some(pem) = self.read("ca.pem")? else { return Ok(None) };
        Ok(Some((self.certificate(&pem, "ca.pem")?, pem)))
    }

    /// The root's key, if it is here.
    fn root_key(&self, secret: &Secret) -> Result<Option<KeyPair>, AuthorityError> {
        let Some(file) = self.read_json::<RootFile>("root.sealed")? else { return Ok(None) };
        Ok(Some(KeyPair::from_pem(&secret.open(ROOT_KEY, &file.key)?)?))
    }

    fn belongs(&self, certificate: &CertificateDer<'_>, key: &KeyPair, name: &str) -> Result<(), AuthorityError> {
        let same = key_of(certificate) == Some(key_hash(&key.subject_public_key_info()));
        if same { Ok(()) } else { Err(AuthorityError::Mismatch { path: self.path(name) }) }
    }

    fn keep_root(&self, secret: &Secret, key: &KeyPair) -> Result<(), AuthorityError> {
        let key = secret.seal(ROOT_KEY, &key.serialize_pem())?;
        self.write_json("root.sealed", &RootFile { schema: SCHEMA, key })
    }

    /// An authority of before there was an intermediate: its key becomes the root's, sealed. Its certificate is made anew, since the old one
    /// may not sign an intermediate; hosts and users who have the old one go on trusting, since name and key stay.
    fn take_over_old(&self, secret: &Secret, now: UnixMillis) -> Result<(), AuthorityError> {
        let Some(pem) = self.read("ca.key")? else { return Ok(()) };
        let key = KeyPair::from_pem(&pem)?;
        if let Some((certificate, _)) = self.root()? {
            self.belongs(&certificate, &key, "ca.pem")?;
        }
        self.keep_root(secret, &key)?;
        self.write("ca.pem", &root_params(now).self_signed(&key)?.pem(), 0o644)?;
        let path = self.path("ca.key");
        fs::remove_file(&path).map_err(|source| AuthorityError::File { path, source })?;
        tracing::warn!(
            "the authority's key lay here in clear text and is sealed now; copies of it may exist. Its fingerprint is new: make \
             join tokens anew that were not used yet"
        );
        Ok(())
    }

    /// Loads the authority, or makes it at the first start. A root whose key is here renews an intermediate that is past its half.
    pub(super) fn load(&self, now: UnixMillis) -> Result<Loaded, AuthorityError> {
        let secret = self.secret()?;
        self.take_over_old(&secret, now)?;
        let mut root_key = self.root_key(&secret)?;
        if root_key.is_none() && self.root()?.is_none() {
            let key = KeyPair::generate()?;
            self.keep_root(&secret, &key)?;
            root_key = Some(key);
        }
        let (root, root_pem) = match (self.root()?, &root_key) {
            (Some((certificate, pem)), Some(key)) => {
                self.belongs(&certificate, key, "ca.pem")?;
                (certificate, pem)
            }
            (Some(found), None) => found,
            (None, Some(key)) => {
                let pem = root_params(now).self_signed(key)?.pem();
                self.write("ca.pem", &pem, 0o644)?;
                (self.certificate(&pem, "ca.pem")?, pem)
            }
            (None, None) => return Err(AuthorityError::Mismatch { path: self.path("ca.pem") }),
        };
        let mut file = self.read_json::<IntermediateFile>("intermediate.sealed")?;
        if let (Some(found), true) = (&file, root_key.is_some()) {
            let certificate = self.certificate(&found.certificate, "intermediate.sealed")?;
            let old = validity_of(&certificate).is_none_or(|(begins, ends)| now.0 >= begins.0 / 2 + ends.0 / 2);
            if old {
                tracing::info!("the intermediate is past half of its life: the root signs a new one");
                file = None;
            }
        }
        let file = match (file, root_key) {
            (Some(file), _) => file,
            (None, Some(key)) => self.sign_intermediate(&secret, &root, key, now)?,
            (None, None) => return Err(AuthorityError::NoIntermediate),
        };
        let intermediate = self.certificate(&file.certificate, "intermediate.sealed")?;
        let key = KeyPair::from_pem(&secret.open(INTERMEDIATE_KEY, &file.key)?)?;
        self.belongs(&intermediate, &key, "intermediate.sealed")?;
        Ok(Loaded { root, root_pem, intermediate, intermediate_pem: file.certificate, key, secret })
    }

    fn sign_intermediate(
        &self,
        secret: &Secret,
        root: &CertificateDer<'static>,
        root_key: KeyPair,
        now: UnixMillis,
    ) -> Result<IntermediateFile, AuthorityError> {
        let issuer = Issuer::from_ca_cert_der(root, root_key)?;
        let key = KeyPair::generate()?;
        let ends = validity_of(root).map_or(now, |(_, ends)| ends);
        let certificate = intermediate_params(&key, ends, now).signed_by(&key, &issuer)?;
        let key = secret.seal(INTERMEDIATE_KEY, &key.serialize_pem())?;
        let file = IntermediateFile { schema: SCHEMA, certificate: certificate.pem(), key };
        self.write_json("intermediate.sealed", &file)?;
        Ok(file)
    }

    /// What there is, without opening anything.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub(crate) fn show(&self) -> Result<AuthorityView, AuthorityError> {
        let (root, _) = self.root()?.ok_or(AuthorityError::NoAuthority { dir: self.dir.clone() })?;
        let file = self.read_json::<IntermediateFile>("intermediate.sealed")?;
        let intermediate = file.map(|file| self.certificate(&file.certificate, "intermediate.sealed")).transpose()?;
        let ends = |certificate: &CertificateDer<'_>| validity_of(certificate).map(|(_, ends)| ends);
        Ok(AuthorityView {
            fingerprint: fingerprint(&root),
            root_ends: ends(&root).unwrap_or_default(),
            root_key_here: self.path("root.sealed").exists() || self.path("ca.key").exists(),
            intermediate: intermediate.as_ref().map(fingerprint),
            intermediate_ends: intermediate.as_ref().and_then(ends),
        })
    }

    /// Writes the root's certificate and key to `out`, which must not exist and lie outside the data directory, reads them back, and only
    /// then removes the key here. The caller holds the data directory's lock.
    pub(crate) fn export_root(&self, out: &Path) -> Result<(), AuthorityError> {
        let failed = |source| AuthorityError::File { path: out.to_owned(), source };
        let beside = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
        if fs::canonicalize(beside).map_err(failed)?.starts_with(&self.dir) {
            return Err(AuthorityError::Inside { path: out.to_owned() });
        }
        if out.exists() {
            return Err(failed(io::ErrorKind::AlreadyExists.into()));
        }
        self.root()?.ok_or(AuthorityError::NoAuthority { dir: self.dir.clone() })?;
        let secret = self.secret()?;
        self.take_over_old(&secret, clock::now())?;
        let (root, pem) = self.root()?.ok_or(AuthorityError::NoAuthority { dir: self.dir.clone() })?;
        let key = self.root_key(&secret)?.ok_or(AuthorityError::RootAway)?;
        self.belongs(&root, &key, "ca.pem")?;
        if self.read_json::<IntermediateFile>("intermediate.sealed")?.is_none() {
            return Err(AuthorityError::NoIntermediate);
        }
        write_durably(out, format!("{pem}{}", key.serialize_pem()).as_bytes(), 0o600).map_err(failed)?;
        let written = KeyPair::from_pem(&private_key(&fs::read_to_string(out).map_err(failed)?))?;
        self.belongs(&root, &written, "ca.pem")?;
        let path = self.path("root.sealed");
        fs::remove_file(&path).map_err(|source| AuthorityError::File { path, source })
    }

    /// Signs a new intermediate with the root's key: the one in `root_key`, or the one that is here. Certificates of the old intermediate are
    /// good until they end. The caller holds the data directory's lock.
    pub(crate) fn rotate_intermediate(&self, root_key: Option<&Path>, now: UnixMillis) -> Result<(), AuthorityError> {
        let (root, _) = self.root()?.ok_or(AuthorityError::NoAuthority { dir: self.dir.clone() })?;
        let brought = match root_key {
            Some(path) => {
                let text = fs::read_to_string(path).map_err(|source| AuthorityError::File { path: path.to_owned(), source })?;
                Some(KeyPair::from_pem(&private_key(&text))?)
            }
            None => None,
        };
        // With the root's key at hand even a lost secret is no loss, unless the root's own copy here needs it.
        let secret = match Secret::load(&self.secret) {
            Err(super::SealError::Missing { .. }) if brought.is_some() && !self.path("root.sealed").exists() => {
                Secret::create(&self.secret)?
            }
            result => result?,
        };
        let key = match brought {
            Some(key) => key,
            None => self.root_key(&secret)?.ok_or(AuthorityError::RootAway)?,
        };
        self.belongs(&root, &key, "ca.pem")?;
        self.sign_intermediate(&secret, &root, key, now).map(|_| ())
    }
}

/// The private key in a file that may hold a certificate as well.
fn private_key(text: &str) -> String {
    const BEGIN: &str = "-----BEGIN PRIVATE KEY-----";
    text.find(BEGIN).and_then(|at| text.get(at..)).unwrap_or(text).to_owned()
}
