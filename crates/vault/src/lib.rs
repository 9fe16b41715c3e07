//! What is kept on disk of VMs' memory and disks. No runtime, no network; files are the caller's, the [`Shelf`]'s or the [`Vault`]'s.
//!
//! For moves: *stays*, encrypted from the first byte, the RAM of a VM that left a host, so that a VM which comes home finds its pages there; and indexes of
//! images, which are on the host in the clear ([`ImageIndex`]). Both are hints: whoever uses one compares what it holds with what the VM has now. They
//! can be old, torn or gone, and cost bytes then, never correctness. The format of stays is specified in `docs/spec/stay.md`; start with [`StayWriter`]
//! and [`StayReader`].
//!
//! For snapshots: the [`Vault`] of a team, each content once, encrypted too. It is no hint: what it gives out is what was written, or an error. The format is specified in
//! `docs/spec/vault.md`; start with [`Vault`], [`SnapshotWriter`] and [`SnapshotReader`]. Examples of both documents are read by the tests.

mod contents;
mod image_index;
mod key;
mod pack;
mod records;
mod sealed;
mod shelf;
mod snapshot;
mod stay;
mod stored;
mod vault;

pub use contents::{Contents, ContentsError};
pub use image_index::{ImageIndex, ImageIndexError};
pub use key::{PackKey, SnapshotKey, StayKey, TeamKey};
pub use pack::{PackId, PackReader, PackWriter, Packed, Page, PageDigest, Unsealed};
pub use shelf::{Draft, Limits, Shelf, ShelfError, Usage};
pub use snapshot::{
    Earlier, InvalidSpaces, Kept, Keys, Known, Leaf, Located, Parts, SnapshotReader, SnapshotWriter, Space, SpaceKind, Totals,
};
pub use stay::{
    Block, Chunk, Identity, InvalidIdentity, MalformedStay, Sink, StayError, StayReader, StayWriter, Unpacker, VERSION,
};
pub use stored::{FileError, Malformed, Stored};
pub use vault::{Draft as SnapshotDraft, PrunePlan, Rewrite, Vault, VaultError, VaultUsage};
