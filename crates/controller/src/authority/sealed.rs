//! Keys at rest: AES-256-GCM under a key that is derived from a secret, which lies in a file of its own outside the data directory.
//!
//! The secret is 256 random bits, so deriving needs no slow function: HKDF with a salt of its own gives each sealed text another key.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::{hkdf, rand};
use serde::{Deserialize, Serialize};

const SECRET: usize = 32;
const SALT: usize = 32;
/// Longer files are no secret.
const MAX_FILE: u64 = 4_096;

/// Why a key cannot be sealed or opened.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The secret's file.
    #[error("cannot use the authority's secret {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not there, but something was sealed with it.
    #[error(
        "the authority's secret {path} is not there: put it back from where it is kept; with it lost, take the root's key and run \
         `godwit cluster ca rotate-intermediate --root-key FILE`"
    )]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// Others can read it.
    #[error("others can read the authority's secret {path}, or it belongs to another user: `chmod 600` it, or make a new one")]
    Exposed {
        /// Which.
        path: PathBuf,
    },
    /// It is no secret.
    #[error("{path} is not a secret of 64 hexadecimal digits")]
    Malformed {
        /// Which.
        path: PathBuf,
    },
    /// What was sealed does not open.
    #[error("{what} was sealed with another secret, or is damaged")]
    Closed {
        /// What.
        what: &'static str,
    },
    /// The library refused.
    #[error("the random source or the cipher failed")]
    Cipher,
}

/// The secret. It never leaves this process and is never shown.
pub(super) struct Secret([u8; SECRET]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(withheld)")
    }
}

/// A sealed text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sealed {
    salt: String,
    nonce: String,
    text: String,
}

impl Secret {
    /// Reads the secret. A regular file must be its owner's alone; a pipe, as of a descriptor or a credential, is what it is.
    pub(super) fn load(path: &Path) -> Result<Self, SealError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => SealError::Missing { path: path.to_owned() },
            _ => SealError::File { path: path.to_owned(), source },
        };
        let file = fs::File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let ours = metadata.uid() == 0 || metadata.uid() == rustix::process::geteuid().as_raw();
        if metadata.is_file() && (metadata.mode() & 0o077 != 0 || !ours) {
            return Err(SealError::Exposed { path: path.to_owned() });
        }
        let mut text = String::new();
        let malformed = || SealError::Malformed { path: path.to_owned() };
        file.take(MAX_FILE).read_to_string(&mut text).map_err(|_| malformed())?;
        unhex(text.trim()).map(Self).ok_or_else(malformed)
    }

    /// Makes a secret that is not there yet.
    pub(super) fn create(path: &Path) -> Result<Self, SealError> {
        let failed = |source| SealError::File { path: path.to_owned(), source };
        let mut secret = [0; SECRET];
        rand::fill(&mut secret).map_err(|_| SealError::Cipher)?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
        let written = file.write_all(format!("{}\n", hex(&secret)).as_bytes()).and_then(|()| file.sync_all());
        written.map_err(failed)?;
        fs::File::open(path.parent().unwrap_or_else(|| Path::new("."))).and_then(|dir| dir.sync_all()).map_err(failed)?;
        Ok(Self(secret))
    }

    fn cipher(&self, salt: &[u8]) -> Result<LessSafeKey, SealError> {
        let mut key = [0; 32];
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(&self.0);
        let derived = prk.expand(&[b"godwit authority key at rest v1"], hkdf::HKDF_SHA256).map_err(|_| SealError::Cipher)?;
        derived.fill(&mut key).map_err(|_| SealError::Cipher)?;
        UnboundKey::new(&AES_256_GCM, &key).map(LessSafeKey::new).map_err(|_| SealError::Cipher)
    }

    /// The key of what hosts keep of a VM's memory. It can be derived again as long as `salt` is known, and by nobody without the secret.
    pub(super) fn memory_key(&self, vm: uuid::Uuid, salt: &str) -> Result<[u8; 32], SealError> {
        self.derive(salt, &[b"godwit memory left behind v1", vm.as_bytes()])
    }

    /// The key of a snapshot, as [`Secret::memory_key`] is of memory.
    pub(super) fn snapshot_key(&self, snapshot: uuid::Uuid, salt: &str) -> Result<[u8; 32], SealError> {
        self.derive(salt, &[b"godwit snapshot v1", snapshot.as_bytes()])
    }

    /// The key of the digests in a team's vaults.
    pub(super) fn team_vault_key(&self, team: &str, salt: &str) -> Result<[u8; 32], SealError> {
        self.derive(salt, &[b"godwit vault of a team v1", team.as_bytes()])
    }

    fn derive(&self, salt: &str, info: &[&[u8]]) -> Result<[u8; 32], SealError> {
        let mut key = [0; 32];
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, salt.as_bytes()).extract(&self.0);
        let derived = prk.expand(info, hkdf::HKDF_SHA256).map_err(|_| SealError::Cipher)?;
        derived.fill(&mut key).map_err(|_| SealError::Cipher)?;
        Ok(key)
    }

    /// Seals `text`. `what` is bound to it: one thing cannot be put in the place of another.
    pub(super) fn seal(&self, what: &'static str, text: &str) -> Result<Sealed, SealError> {
        let (mut salt, mut nonce) = ([0; SALT], [0; NONCE_LEN]);
        rand::fill(&mut salt).and_then(|()| rand::fill(&mut nonce)).map_err(|_| SealError::Cipher)?;
        let mut sealed = text.as_bytes().to_vec();
        self.cipher(&salt)?
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(what.as_bytes()), &mut sealed)
            .map_err(|_| SealError::Cipher)?;
        Ok(Sealed { salt: hex(&salt), nonce: hex(&nonce), text: hex(&sealed) })
    }

    /// Opens what was sealed as `what`.
    pub(super) fn open(&self, what: &'static str, sealed: &Sealed) -> Result<String, SealError> {
        let closed = || SealError::Closed { what };
        let salt: [u8; SALT] = unhex(&sealed.salt).ok_or_else(closed)?;
        let nonce: [u8; NONCE_LEN] = unhex(&sealed.nonce).ok_or_else(closed)?;
        let mut text = unhex_any(&sealed.text).ok_or_else(closed)?;
        let opened = self
            .cipher(&salt)?
            .open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(what.as_bytes()), &mut text)
            .map_err(|_| closed())?;
        String::from_utf8(opened.to_vec()).map_err(|_| closed())
    }
}

/// 256 random bits, in hexadecimal digits.
pub(super) fn draw_salt() -> Result<String, SealError> {
    let mut salt = [0; SALT];
    rand::fill(&mut salt).map_err(|_| SealError::Cipher)?;
    Ok(hex(&salt))
}

/// Hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex_any(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect()
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    unhex_any(text)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_sealed_opens_with_its_secret_as_what_it_is_and_not_otherwise() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("secret");
        let secret = Secret::create(&path).expect("made");
        let sealed = secret.seal("a", "the key").expect("sealed");
        assert!(!serde_json::to_string(&sealed).expect("JSON").contains(&hex(b"the key")));
        assert_eq!(Secret::load(&path).expect("read").open("a", &sealed).expect("opened"), "the key");
        assert!(matches!(secret.open("b", &sealed), Err(SealError::Closed { .. })), "as another thing");
        let mut damaged = sealed.clone();
        damaged.text.replace_range(..1, if sealed.text.starts_with('0') { "1" } else { "0" });
        assert!(matches!(secret.open("a", &damaged), Err(SealError::Closed { .. })), "damaged");
        assert!(matches!(secret.open("a", &Sealed { nonce: "zz".into(), ..sealed.clone() }), Err(SealError::Closed { .. })));
        let other = Secret::create(&dir.path().join("other")).expect("made");
        assert!(matches!(other.open("a", &sealed), Err(SealError::Closed { .. })), "with another secret");
        assert_ne!(secret.seal("a", "the key").expect("sealed"), sealed, "the same key and nonce twice");
    }

    #[test]
    fn a_key_of_memory_is_of_one_vm_and_of_one_salt() {
        let dir = tempfile::tempdir().expect("dir");
        let secret = Secret::create(&dir.path().join("secret")).expect("made");
        let other = Secret::create(&dir.path().join("other")).expect("made");
        let (vm, salt) = (uuid::Uuid::from_u128(1), draw_salt().expect("a salt"));
        let key = secret.memory_key(vm, &salt).expect("a key");
        assert_eq!(secret.memory_key(vm, &salt).expect("a key"), key, "it can be derived again");
        let others = [
            secret.memory_key(uuid::Uuid::from_u128(2), &salt),
            secret.memory_key(vm, &draw_salt().expect("a salt")),
            other.memory_key(vm, &salt),
        ];
        assert!(others.into_iter().all(|other| other.expect("a key") != key));
    }

    #[test]
    fn keys_of_snapshots_and_vaults_are_their_own() {
        let dir = tempfile::tempdir().expect("dir");
        let secret = Secret::create(&dir.path().join("secret")).expect("made");
        let (one, salt, other) = (uuid::Uuid::from_u128(1), draw_salt().expect("a salt"), draw_salt().expect("a salt"));
        let keys = [
            secret.snapshot_key(one, &salt),
            secret.snapshot_key(uuid::Uuid::from_u128(2), &salt),
            secret.snapshot_key(one, &other),
            secret.memory_key(one, &salt),
            secret.team_vault_key("red", &salt),
            secret.team_vault_key("blue", &salt),
            secret.team_vault_key("red", &other),
        ]
        .map(|key| key.expect("a key"));
        let different: std::collections::BTreeSet<_> = keys.iter().collect();
        assert_eq!(different.len(), keys.len());
        assert_eq!(secret.snapshot_key(one, &salt).expect("a key"), keys[0], "it can be derived again");
    }

    #[test]
    fn a_secret_that_others_can_read_or_that_is_none_is_refused() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("secret");
        assert!(matches!(Secret::load(&path), Err(SealError::Missing { .. })));
        Secret::create(&path).expect("made");
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        assert!(matches!(Secret::create(&path), Err(SealError::File { .. })), "a secret was written over");
        fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).expect("mode");
        assert!(matches!(Secret::load(&path), Err(SealError::Exposed { .. })));
        fs::set_permissions(&path, PermissionsExt::from_mode(0o400)).expect("mode");
        Secret::load(&path).expect("read-only is as good");
        for bad in ["", "abcd", &"g".repeat(64), &"a".repeat(66)] {
            let path = dir.path().join("bad");
            let _ = fs::remove_file(&path);
            OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .expect("file")
                .write_all(bad.as_bytes())
                .expect("written");
            assert!(matches!(Secret::load(&path), Err(SealError::Malformed { .. })), "{bad:?}");
        }
    }
}
