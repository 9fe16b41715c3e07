//! Whose memory a stay holds, and how that is cut into blocks.

use bytes::{Buf, BufMut};
use godwit_model::{Generation, VmId};
use godwit_stream::MAX_BLOCKS;
use uuid::Uuid;

/// Longest encoded identity.
pub(super) const MAX_IDENTITY: usize = 16 + 8 + 2 + MAX_BLOCKS * (1 + 255 + 4);

/// Whose memory it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The VM.
    pub vm: VmId,
    /// The generation on which it last ran here.
    pub generation: Generation,
    /// Its RAM blocks, at most [`MAX_BLOCKS`]; a page's `block` is the place in this list.
    pub blocks: Vec<Block>,
}

/// A RAM block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// As QEMU calls it: 1 to 255 bytes.
    pub id: String,
    /// How many pages it has.
    pub pages: u32,
}

/// Not an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidIdentity {
    /// More blocks than a VM has.
    #[error("there are more than {MAX_BLOCKS} RAM blocks")]
    Blocks,
    /// A name that is empty, too long, or no text.
    #[error("a RAM block's name has 1 to 255 bytes of UTF-8")]
    Name,
    /// Two blocks of one name.
    #[error("two RAM blocks have the same name")]
    Twice,
    /// It ends in the middle, or has something left over.
    #[error("the identity has a wrong length")]
    Length,
}

impl Identity {
    /// The bytes of it, as they are sealed.
    ///
    /// # Errors
    /// [`InvalidIdentity`]
    pub fn encode(&self) -> Result<Vec<u8>, InvalidIdentity> {
        self.check()?;
        let mut out = Vec::new();
        out.put_slice(self.vm.uuid().as_bytes());
        out.put_u64(self.generation.0);
        out.put_u16(u16::try_from(self.blocks.len()).map_err(|_| InvalidIdentity::Blocks)?);
        for block in &self.blocks {
            out.put_u8(u8::try_from(block.id.len()).map_err(|_| InvalidIdentity::Name)?);
            out.put_slice(block.id.as_bytes());
            out.put_u32(block.pages);
        }
        Ok(out)
    }

    /// What these bytes say.
    ///
    /// # Errors
    /// [`InvalidIdentity`]
    pub fn decode(mut bytes: &[u8]) -> Result<Self, InvalidIdentity> {
        let (vm, rest) = bytes.split_first_chunk::<16>().ok_or(InvalidIdentity::Length)?;
        bytes = rest;
        let generation = bytes.try_get_u64().map_err(|_| InvalidIdentity::Length)?;
        let count = usize::from(bytes.try_get_u16().map_err(|_| InvalidIdentity::Length)?);
        if count > MAX_BLOCKS {
            return Err(InvalidIdentity::Blocks);
        }
        let mut blocks = Vec::new();
        for _ in 0..count {
            let length = usize::from(bytes.try_get_u8().map_err(|_| InvalidIdentity::Length)?);
            let (id, rest) = bytes.split_at_checked(length).ok_or(InvalidIdentity::Length)?;
            bytes = rest;
            let id = std::str::from_utf8(id).map_err(|_| InvalidIdentity::Name)?.to_owned();
            blocks.push(Block { id, pages: bytes.try_get_u32().map_err(|_| InvalidIdentity::Length)? });
        }
        if !bytes.is_empty() {
            return Err(InvalidIdentity::Length);
        }
        let identity = Self { vm: VmId::new(Uuid::from_bytes(*vm)), generation: Generation(generation), blocks };
        identity.check()?;
        Ok(identity)
    }

    fn check(&self) -> Result<(), InvalidIdentity> {
        if self.blocks.len() > MAX_BLOCKS {
            return Err(InvalidIdentity::Blocks);
        }
        let mut names: Vec<&str> = self.blocks.iter().map(|block| &*block.id).collect();
        if names.iter().any(|name| !(1..=usize::from(u8::MAX)).contains(&name.len())) {
            return Err(InvalidIdentity::Name);
        }
        names.sort_unstable();
        if names.windows(2).any(|pair| pair.first() == pair.last()) {
            return Err(InvalidIdentity::Twice);
        }
        Ok(())
    }
}
