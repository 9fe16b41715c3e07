//! Small disks that can be filled: file systems of their own that `lab down` unmounts.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};

use crate::command;

/// The file that fills a disk.
const FILLER: &str = "filler";

/// Moves a directory, which nobody uses at the moment, to a small file system of its own.
///
/// # Errors
/// The step that failed.
pub fn make_small(directory: &Path) -> Result<()> {
    let aside = directory.with_extension("aside");
    let mode = fs::metadata(directory).with_context(|| directory.display().to_string())?.permissions();
    fs::rename(directory, &aside)?;
    fs::create_dir(directory)?;
    command::run("mount", &["-t", "tmpfs", "-o", "size=96m", "tmpfs", command::text(directory)?])?;
    fs::set_permissions(directory, mode)?;
    command::run("cp", &["-a", &format!("{}/.", command::text(&aside)?), command::text(directory)?])?;
    Ok(fs::remove_dir_all(&aside)?)
}

/// Writes into a directory until nothing more goes onto its disk.
///
/// # Errors
/// When there can be no file at all.
pub fn fill(directory: &Path) -> Result<()> {
    let path = directory.join(FILLER);
    let mut file = File::create(&path).with_context(|| path.display().to_string())?;
    for size in [1 << 20, 4096, 1] {
        while file.write_all(&vec![7; size]).is_ok() {}
    }
    Ok(())
}

/// Gives a disk the space back that [`fill`] took; does nothing to one that was not filled.
///
/// # Errors
/// When the file cannot be removed.
pub fn unfill(directory: &Path) -> Result<()> {
    match fs::remove_file(directory.join(FILLER)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).context("remove what filled a disk"),
        _ => Ok(()),
    }
}
