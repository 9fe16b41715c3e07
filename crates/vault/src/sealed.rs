//! Heads, and records that are sealed: AES-256-GCM under a key that is this file's alone.
//!
//! The file's key is derived from another (a VM's, a pack's, a snapshot's) and the head, in which are 32 random bytes: no two files have the same. Only
//! therefore may the nonces of a file simply count. Kind and number of a record are its nonce, and with the head they are what the tag speaks of, so that no record
//! passes for one of another place, kind or file.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use bytes::{Buf, BufMut};
use zeroize::Zeroizing;

use crate::key::{self, KEY};

const MAGIC: usize = 8;
pub(crate) const SALT: usize = 32;
/// Bytes of a head.
pub(crate) const HEAD: usize = MAGIC + 2 + SALT;
/// Bytes of a tag.
pub(crate) const TAG: usize = 16;
/// Bytes of a record before what is sealed.
pub(crate) const RECORD_HEAD: usize = 5;
/// What a record has beyond its content.
pub(crate) const OVERHEAD: usize = RECORD_HEAD + TAG;

/// A kind of file: how it begins, which version is written and read, and what its keys are derived for.
#[derive(Debug)]
pub(crate) struct Form {
    pub(crate) magic: [u8; MAGIC],
    pub(crate) version: u16,
    pub(crate) context: &'static str,
}

/// Why a file's beginning is not that of its form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeadError {
    /// Something else is in the file.
    Foreign,
    /// It is cut.
    Short,
    Version(u16),
}

/// What a record is; each form numbers its own.
pub(crate) trait Kind: Copy {
    fn number(self) -> u8;
}

/// The first bytes of a file.
#[derive(Clone, Copy)]
pub(crate) struct Head([u8; HEAD]);

impl Head {
    /// With a salt that was never used.
    pub(crate) fn draw(form: &Form) -> std::io::Result<Self> {
        let mut salt = [0; SALT];
        key::fill(&mut salt)?;
        Ok(Self::new(form, salt))
    }

    pub(crate) fn new(form: &Form, salt: [u8; SALT]) -> Self {
        let mut head = [0; HEAD];
        let mut rest = &mut head[..];
        rest.put_slice(&form.magic);
        rest.put_u16(form.version);
        rest.put_slice(&salt);
        Self(head)
    }

    /// The head at the beginning of `bytes`, which are shorter only if the file is.
    pub(crate) fn read(form: &Form, bytes: &[u8]) -> Result<Self, HeadError> {
        if !form.magic.starts_with(bytes.get(..MAGIC).unwrap_or(bytes)) {
            return Err(HeadError::Foreign);
        }
        let head = *bytes.first_chunk::<HEAD>().ok_or(HeadError::Short)?;
        match (&head[MAGIC..]).get_u16() {
            version if version == form.version => Ok(Self(head)),
            other => Err(HeadError::Version(other)),
        }
    }

    pub(crate) const fn bytes(&self) -> &[u8; HEAD] {
        &self.0
    }
}

/// Seals and opens the records of one file.
pub(crate) struct Sealer {
    cipher: LessSafeKey,
    head: Head,
}

impl Sealer {
    pub(crate) fn new(form: &Form, key: &[u8; KEY], head: Head) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(form.context);
        hasher.update(key).update(&head.0);
        let derived: Zeroizing<[u8; KEY]> = Zeroizing::new(*hasher.finalize().as_bytes());
        let cipher = UnboundKey::new(&AES_256_GCM, &derived[..]).expect("a key of AES-256 has 32 bytes");
        Self { cipher: LessSafeKey::new(cipher), head }
    }

    /// Seals a record in place: `record` has room for its head, then the content, then room for the tag.
    pub(crate) fn seal(&self, kind: impl Kind, number: u64, record: &mut [u8]) {
        let (head, sealed) = record.split_first_chunk_mut::<RECORD_HEAD>().expect("a record has a head");
        let (content, room) = sealed.split_last_chunk_mut::<TAG>().expect("a record has a tag");
        let length = u32::try_from(content.len() + TAG).expect("a record is far below 4 GiB");
        let mut rest = &mut head[..];
        let kind = kind.number();
        rest.put_u8(kind);
        rest.put_u32(length);
        let tag = self.cipher.seal_in_place_separate_tag(nonce(kind, number), self.bound(kind, number, length), content);
        room.copy_from_slice(tag.expect("a record is far below the cipher's limit").as_ref());
    }

    /// The content of a record, if it is what was sealed as this.
    pub(crate) fn open<'a>(&self, kind: impl Kind, number: u64, sealed: &'a mut [u8]) -> Option<&'a [u8]> {
        let kind = kind.number();
        let bound = self.bound(kind, number, u32::try_from(sealed.len()).ok()?);
        self.cipher.open_in_place(nonce(kind, number), bound, sealed).ok().map(|content| &*content)
    }

    fn bound(&self, kind: u8, number: u64, length: u32) -> Aad<[u8; BOUND]> {
        let mut bound = [0; BOUND];
        let mut rest = &mut bound[..];
        rest.put_slice(&self.head.0);
        rest.put_u8(kind);
        rest.put_u64(number);
        rest.put_u32(length);
        Aad::from(bound)
    }
}

/// Bytes of what a tag speaks of beside the content: head, kind, number, length.
const BOUND: usize = HEAD + 1 + 8 + 4;

fn nonce(kind: u8, number: u64) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    let mut rest = &mut nonce[..];
    rest.put_u32(u32::from(kind));
    rest.put_u64(number);
    Nonce::assume_unique_for_key(nonce)
}

/// Kind and length of a record.
pub(crate) fn read_record_head(mut bytes: &[u8]) -> Option<(u8, usize)> {
    Some((bytes.try_get_u8().ok()?, bytes.try_get_u32().ok()? as usize))
}
