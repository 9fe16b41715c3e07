//! The spaces of a snapshot: blocks of RAM, and disks.

use bytes::{Buf, BufMut};

use crate::stored::Malformed;

/// Most spaces: more than QEMU has blocks and a VM has disks.
const MAX_SPACES: usize = 2048;

/// What a space is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SpaceKind {
    /// A RAM block, named as QEMU does.
    Ram,
    /// A disk, named as the VM's spec does.
    Disk,
}

/// Something that has pages, numbered from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Space {
    /// What it is.
    pub kind: SpaceKind,
    /// Its name: 1 to 255 bytes of UTF-8, once among those of its kind.
    pub name: String,
    /// How many pages it has; the last of a disk is filled up with zeros.
    pub pages: u32,
}

/// Not the spaces of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSpaces {
    /// Too many.
    #[error("there are more than {MAX_SPACES} spaces")]
    Many,
    /// A name that is empty or too long.
    #[error("the name of a space has 1 to 255 bytes")]
    Name,
    /// Two of one kind and name.
    #[error("two spaces have the same name")]
    Twice,
}

fn check(spaces: &[Space]) -> Result<(), InvalidSpaces> {
    if spaces.len() > MAX_SPACES {
        return Err(InvalidSpaces::Many);
    }
    let mut names: Vec<(SpaceKind, &str)> = spaces.iter().map(|space| (space.kind, &*space.name)).collect();
    if names.iter().any(|(_, name)| !(1..=usize::from(u8::MAX)).contains(&name.len())) {
        return Err(InvalidSpaces::Name);
    }
    names.sort_unstable();
    if names.windows(2).any(|pair| pair.first() == pair.last()) {
        return Err(InvalidSpaces::Twice);
    }
    Ok(())
}

impl Space {
    /// The bytes of a list of spaces.
    ///
    /// # Errors
    /// [`InvalidSpaces`]
    pub fn encode_all(spaces: &[Self]) -> Result<Vec<u8>, InvalidSpaces> {
        check(spaces)?;
        let mut out = Vec::new();
        for space in spaces {
            out.put_u8(match space.kind {
                SpaceKind::Ram => 0,
                SpaceKind::Disk => 1,
            });
            out.put_u8(u8::try_from(space.name.len()).map_err(|_| InvalidSpaces::Name)?);
            out.put_slice(space.name.as_bytes());
            out.put_u32(space.pages);
        }
        Ok(out)
    }

    /// The list of these bytes.
    ///
    /// # Errors
    /// [`Malformed::Spaces`]
    pub fn decode_all(bytes: &[u8]) -> Result<Vec<Self>, Malformed> {
        decode(bytes).ok_or(Malformed::Spaces)
    }
}

fn decode(mut bytes: &[u8]) -> Option<Vec<Space>> {
    let mut spaces = Vec::new();
    while !bytes.is_empty() {
        let kind = match bytes.try_get_u8().ok()? {
            0 => SpaceKind::Ram,
            1 => SpaceKind::Disk,
            _ => return None,
        };
        let length = usize::from(bytes.try_get_u8().ok()?);
        let (name, rest) = bytes.split_at_checked(length)?;
        bytes = rest;
        let name = std::str::from_utf8(name).ok()?.to_owned();
        spaces.push(Space { kind, name, pages: bytes.try_get_u32().ok()? });
        if spaces.len() > MAX_SPACES {
            return None;
        }
    }
    check(&spaces).is_ok().then_some(spaces)
}
