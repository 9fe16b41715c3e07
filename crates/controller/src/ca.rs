//! `godwit cluster ca`: what is done with the authority's files while no controller works on them.

use std::path::Path;

use crate::authority::{AuthorityFiles, AuthorityView};
use crate::clock;
use crate::server::{ServeError, lock};

/// Where the authority's files are.
#[derive(Clone, Copy, Debug)]
pub struct AuthorityPlace<'a> {
    /// The controller's data directory.
    pub data_dir: &'a Path,
    /// The file of the secret that the keys are sealed with; beside the data directory by default.
    pub secret: Option<&'a Path>,
}

impl AuthorityPlace<'_> {
    fn files(&self) -> Result<AuthorityFiles, ServeError> {
        Ok(AuthorityFiles::new(self.data_dir, self.secret)?)
    }

    /// What there is. Opens nothing, and needs no controller to stand still.
    ///
    /// # Errors
    /// [`ServeError::Authority`].
    pub fn show(&self) -> Result<AuthorityView, ServeError> {
        Ok(self.files()?.show()?)
    }

    /// Takes the root's key away: writes it to `out` and removes it here.
    ///
    /// # Errors
    /// [`ServeError::Locked`] while a controller runs, [`ServeError::Authority`].
    pub fn export_root(&self, out: &Path) -> Result<(), ServeError> {
        let files = self.files()?;
        let _lock = lock(self.data_dir)?;
        Ok(files.export_root(out)?)
    }

    /// Signs a new intermediate, with the root's key in `root_key` or the one that is here.
    ///
    /// # Errors
    /// [`ServeError::Locked`] while a controller runs, [`ServeError::Authority`].
    pub fn rotate_intermediate(&self, root_key: Option<&Path>) -> Result<AuthorityView, ServeError> {
        let files = self.files()?;
        let _lock = lock(self.data_dir)?;
        files.rotate_intermediate(root_key, clock::now())?;
        Ok(files.show()?)
    }
}
