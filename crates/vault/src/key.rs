//! Keys: what they are for, and that none is ever shown.

use std::fmt;
use std::io;

use rustix::rand::{GetRandomFlags, getrandom};
use zeroize::Zeroizing;

/// Bytes of a key.
pub(crate) const KEY: usize = 32;

macro_rules! keys {
    ($($(#[doc = $doc:literal])* $name:ident)*) => {$(
        $(#[doc = $doc])*
        ///
        /// It is overwritten when dropped, and never shown.
        #[derive(Clone)]
        pub struct $name(Zeroizing<[u8; KEY]>);

        impl $name {
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

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "(withheld)"))
            }
        }
    )*};
}

keys! {
    /// The key under which all stays of one VM are sealed, and nothing else. With it gone, they are.
    StayKey
    /// The key of one pack. It is in the snapshots that refer to the pack, and nowhere else: with the last of them gone, the pack is.
    PackKey
    /// The key of one snapshot. With it gone, the snapshot is, and what no other snapshot has.
    SnapshotKey
    /// What the digests of a team's pages are made with: who does not have it learns nothing from a digest, and cannot make one.
    TeamKey
}

/// Fills all of `bytes` from the kernel.
pub(crate) fn fill(bytes: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        filled += getrandom(rest, GetRandomFlags::empty())?;
    }
    Ok(())
}
