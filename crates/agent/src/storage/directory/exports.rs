//! Directories of files that people take away, and those that they bring.
//!
//! ```text
//!  exports/TEAM/NAME          an export, whole
//!  exports/TEAM/.UUID.draft   one that is being made: its maker holds partial/UUID
//! ```
//! An export that takes another's name changes places with it, which is removed then. Root alone gets in: the files are in the clear.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use godwit_model::Name;
use rustix::fs::{AtFlags, Dir, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::{PARTIAL, Partial, Place};
use crate::storage::driver::{ExportRoom, OpenError};
use crate::storage::locks;

const EXPORTS: &str = "exports";
const IMPORTS: &str = "imports";
const DRAFT: &str = ".draft";

/// An export that is being made.
struct Draft {
    /// Held as long as this is.
    held: Partial,
    team: String,
    name: String,
    published: bool,
}

impl Place {
    pub(super) fn begin_export(&self, team: &Name, name: &Name) -> io::Result<Box<dyn ExportRoom>> {
        let team = format!("{EXPORTS}/{team}");
        self.make(EXPORTS)?;
        self.make(&team)?;
        self.remove_drafts(&team);
        let draft = Draft { held: self.partial()?, team, name: name.to_string(), published: false };
        rustix::fs::mkdirat(&self.root, draft.path(), Mode::RWXU)?;
        Ok(Box::new(draft))
    }

    pub(super) fn open_brought(&self, team: &Name, name: &Name, file: &str) -> Result<File, OpenError> {
        let brought = format!("{IMPORTS}/{team}/{name}");
        let is_there = self.open_beneath(&brought, OFlags::RDONLY | OFlags::DIRECTORY).is_ok();
        let directory = if is_there { brought } else { format!("{EXPORTS}/{team}/{name}") };
        self.open_file(&format!("{directory}/{file}"), OFlags::RDONLY)
    }

    pub(super) fn remove_abandoned_exports(&self) {
        let Ok(directory) = self.open_beneath(EXPORTS, OFlags::RDONLY | OFlags::DIRECTORY) else { return };
        let Ok(teams) = Dir::read_from(&directory) else { return };
        for team in teams.filter_map(Result::ok) {
            if let Some(team) = team.file_name().to_str().ok().and_then(|team| Name::new(team).ok()) {
                self.remove_drafts(&format!("{EXPORTS}/{team}"));
            }
        }
    }

    /// Removes drafts whose makers are gone.
    fn remove_drafts(&self, team: &str) {
        let Ok(directory) = self.open_beneath(team, OFlags::RDONLY | OFlags::DIRECTORY) else { return };
        let Ok(entries) = Dir::read_from(&directory) else { return };
        for entry in entries.filter_map(Result::ok) {
            let Ok(name) = entry.file_name().to_str() else { continue };
            let Some(id) = name.strip_prefix('.').and_then(|name| name.strip_suffix(DRAFT)) else { continue };
            let is_held = match self.open_beneath(&format!("{PARTIAL}/{id}"), OFlags::RDWR) {
                Ok(file) => !locks::try_make(&file).unwrap_or(false),
                Err(Errno::NOENT) => false,
                Err(_) => true,
            };
            if !is_held && let Err(error) = self.remove_directory(&format!("{team}/{name}")) {
                tracing::warn!(team, name, %error, "what is left of an export cannot be removed");
            }
        }
    }

    /// Removes a directory of files; one that is not there is removed already.
    fn remove_directory(&self, path: &str) -> io::Result<()> {
        let directory = match self.open_beneath(path, OFlags::RDONLY | OFlags::DIRECTORY) {
            Err(Errno::NOENT) => return Ok(()),
            directory => directory?,
        };
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                rustix::fs::unlinkat(&directory, entry.file_name(), AtFlags::empty())?;
            }
        }
        Ok(rustix::fs::unlinkat(&self.root, path, AtFlags::REMOVEDIR)?)
    }
}

impl Draft {
    fn path(&self) -> String {
        format!("{}/.{}{DRAFT}", self.team, self.held.name)
    }
}

impl ExportRoom for Draft {
    fn create(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let path = format!("{}/{name}", self.path());
        Ok(rustix::fs::openat(&self.held.place.root, path, flags, Mode::RUSR | Mode::WUSR)?.into())
    }

    fn publish(mut self: Box<Self>) -> io::Result<PathBuf> {
        let place = self.held.place.again()?;
        let (draft, path) = (self.path(), format!("{}/{}", self.team, self.name));
        place.sync(&draft)?;
        match rustix::fs::renameat_with(&place.root, &draft, &place.root, &path, RenameFlags::EXCHANGE) {
            // Nothing has the name.
            Err(Errno::NOENT) => rustix::fs::renameat(&place.root, &draft, &place.root, &path)?,
            // A file server that cannot do that at once: for a moment nothing has it.
            Err(Errno::INVAL | Errno::NOSYS) => {
                let old = format!("{draft}.old");
                match rustix::fs::renameat(&place.root, &path, &place.root, &old) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    Err(error) => return Err(error.into()),
                }
                if let Err(error) = rustix::fs::renameat(&place.root, &draft, &place.root, &path) {
                    let _ = rustix::fs::renameat(&place.root, &old, &place.root, &path);
                    return Err(error.into());
                }
                place.sync(&self.team)?;
                place.remove_directory(&old)?;
            }
            exchanged => exchanged?,
        }
        self.published = true;
        place.sync(&self.team)?;
        // What had the name, if anything had.
        if let Err(error) = place.remove_directory(&draft) {
            tracing::warn!(draft, %error, "the export of before cannot be removed");
        }
        Ok(place.path.join(path))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.published
            && let Err(error) = self.held.place.remove_directory(&self.path())
        {
            tracing::warn!(%error, "what is left of an export cannot be removed");
        }
    }
}
