//! Files that take over a volume's name from another. Which of the two has it is told by its inode, so that each step can be done again from
//! wherever it was left:
//!
//! ```text
//!               volumes/NAME     partial/UUID     partial/UUID.before
//!  begun        the old          the new
//!  succeeded    the new                           the old
//!  settled      the new
//!  withdrawn    the old
//! ```

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::{PARTIAL, Place, VOLUMES, path_of};
use crate::storage::driver::{Hold, Item, Successor};
use crate::storage::locks;

fn path(successor: &Successor) -> String {
    format!("{PARTIAL}/{}", successor.id)
}

/// What had the volume's name before.
fn before(successor: &Successor) -> String {
    format!("{}.before", path(successor))
}

impl Place {
    pub(super) fn begin_successor(&self) -> io::Result<(Successor, File)> {
        let partial = self.partial()?;
        locks::hold(&partial.file, Hold::Taken)?;
        self.sync(PARTIAL)?;
        let (name, file) = partial.keep()?;
        let id = name.parse().map_err(io::Error::other)?;
        Ok((Successor { id, mark: file.metadata()?.ino() }, file))
    }

    pub(super) fn succeed(&self, item: &Item, successor: &Successor) -> io::Result<()> {
        let (volume, own, before) = (path_of(item), path(successor), before(successor));
        if self.inode(&volume)? == Some(successor.mark) {
            return Ok(());
        }
        if self.inode(&own)? != Some(successor.mark) {
            return Err(io::Error::new(io::ErrorKind::NotFound, "what is to take the volume's name is not there any more"));
        }
        match rustix::fs::linkat(&self.root, &volume, &self.root, &before, AtFlags::empty()) {
            // Done before; or there is nothing to keep.
            Ok(()) | Err(Errno::EXIST | Errno::NOENT) => {}
            // A file system without hard links: for a moment nothing has the name.
            Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS) => self.rename(&volume, &before)?,
            Err(error) => return Err(error.into()),
        }
        self.rename(&own, &volume)
    }

    pub(super) fn withdraw(&self, item: &Item, successor: &Successor) -> io::Result<()> {
        let (volume, before) = (path_of(item), before(successor));
        let taken = self.inode(&volume)?.is_none_or(|inode| inode == successor.mark);
        // Without one to give back, what came stays: nothing has run on it, so it is what was there.
        if taken && self.inode(&before)?.is_some() {
            self.rename(&before, &volume)?;
        }
        self.sync(VOLUMES)?;
        self.unlink(&path(successor))?;
        self.unlink(&before)
    }

    pub(super) fn settle(&self, item: &Item, successor: &Successor) -> io::Result<()> {
        self.succeed(item, successor)?;
        self.sync(VOLUMES)?;
        self.unlink(&before(successor))
    }

    /// The file at `path`, if there is one.
    fn inode(&self, path: &str) -> io::Result<Option<u64>> {
        match rustix::fs::statat(&self.root, path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(facts) => Ok(Some(facts.st_ino)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.root, from, &self.root, to)?)
    }

    /// What is not there is removed already.
    fn unlink(&self, path: &str) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.root, path, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
