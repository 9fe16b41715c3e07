//! The key of one VM's stays.

use std::fmt;
use std::io;

use rustix::rand::{GetRandomFlags, getrandom};
use zeroize::Zeroizing;

/// Bytes of a key.
pub(super) const KEY: usize = 32;

/// The key under which all stays of one VM are sealed, and nothing else. With it gone, they are.
///
/// It is overwritten when dropped, and never shown.
#[derive(Clone)]
pub struct StayKey(Zeroizing<[u8; KEY]>);

impl StayKey {
    /// A key that was drawn before.
    #[must_use]
    pub fn new(bytes: [u8; KEY]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Draws a key.
    ///
    /// # Errors
    /// The kernel has no random bytes.
    pub fn draw() -> io::Result<Self> {
        let mut key = Self::new([0; KEY]);
        fill(&mut key.0[..])?;
        Ok(key)
    }

    /// The bytes, to be kept where secrets are.
    #[must_use]
    pub fn expose(&self) -> &[u8; KEY] {
        &self.0
    }
}

impl fmt::Debug for StayKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StayKey(withheld)")
    }
}

/// Fills all of `bytes` from the kernel.
pub(super) fn fill(bytes: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        filled += getrandom(rest, GetRandomFlags::empty())?;
    }
    Ok(())
}
