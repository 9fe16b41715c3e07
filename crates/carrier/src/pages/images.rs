//! Images that VMs are made from: what a guest has read of its disk is in its memory, and in the image, at both hosts.
//!
//! The destination says which images it can read ([`crate::Frame::Images`]). They are numbered from [`FIRST_IMAGE`] on, as if they were blocks of memory
//! of which pages can be copied, and to which nobody writes.

use super::{Page, Place};

/// The first number of an image among blocks.
pub const FIRST_IMAGE: u16 = 0x8000;

/// The number, among blocks, of the pages of other VMs that the destination has said it holds ([`crate::Frame::Common`]).
pub const COMMON: u16 = 0xFFFF;

/// At the source: finds contents in images that the destination can read, too.
pub trait Images: Send {
    /// Where this very content is, compared byte by byte; `None` also where that cannot be found out.
    fn find(&mut self, content: &Page) -> Option<Place>;
}
