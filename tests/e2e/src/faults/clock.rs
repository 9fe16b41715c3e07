//! Wall clocks that can be put forward and back: libfaketime stands between a daemon and the clock, and reads from a file how far it is off. The
//! clock that only counts is left alone, and so are the processes that a daemon starts: a cage passes nothing of the environment on.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::TempDir;

/// The clocks of the daemons of one lab, each right at first.
#[derive(Debug)]
pub(super) struct Clocks {
    dir: TempDir,
    program: PathBuf,
}

/// The daemon that is no host's.
pub(super) const CONTROLLER: &str = "controller";

impl Clocks {
    /// Clocks for the daemons that are started by [`Self::program`], which is `godwit` in all else. `home` is where the lab keeps its hosts.
    pub(super) fn new(godwit: &Path, home: &Path, hosts: &[&str]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("godwit-clocks-").tempdir()?;
        let library = library()?;
        let (clocks, godwit, home) = (dir.path().display(), godwit.display(), home.display());
        // Whose clock it is, is in the arguments: an agent has its state below the directory of its host.
        let text = format!(
            "#!/bin/sh\nclock={CONTROLLER}\nfor word; do case $word in {home}/*/state) clock=${{word%/state}}; clock=${{clock##*/}} ;; esac; done\n\
             export LD_PRELOAD={library} FAKETIME_TIMESTAMP_FILE={clocks}/$clock FAKETIME_NO_CACHE=1 FAKETIME_DONT_FAKE_MONOTONIC=1\n\
             exec '{godwit}' \"$@\"\n",
            library = library.display()
        );
        let program = dir.path().join("godwit");
        fs::write(&program, text)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        let clocks = Self { dir, program };
        for name in hosts.iter().chain([&CONTROLLER]) {
            clocks.set(name, 0)?;
        }
        Ok(clocks)
    }

    /// What to start daemons with.
    pub(super) fn program(&self) -> &Path {
        &self.program
    }

    /// Puts a daemon's clock off by so many seconds.
    pub(super) fn set(&self, daemon: &str, seconds: i64) -> Result<()> {
        let file = self.dir.path().join(daemon);
        let beside = file.with_extension("new");
        fs::write(&beside, format!("{seconds:+}\n"))?;
        // In one step: a clock that is read meanwhile is the old one or the new one.
        fs::rename(&beside, &file).with_context(|| file.display().to_string())
    }

    /// Puts every clock right.
    pub(super) fn right(&self, hosts: &[&str]) -> Result<()> {
        hosts.iter().chain([&CONTROLLER]).try_for_each(|name| self.set(name, 0))
    }
}

fn library() -> Result<PathBuf> {
    let folders = fs::read_dir("/usr/lib").context("/usr/lib")?;
    let mut libraries = folders.flatten().map(|folder| folder.path().join("faketime/libfaketimeMT.so.1"));
    libraries.find(|library| library.exists()).context("no libfaketime, which `scripts/setup` installs")
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;

    #[test]
    fn a_program_has_the_clock_of_its_host() -> Result<()> {
        let clocks = Clocks::new(Path::new("/bin/sh"), Path::new("/var/lib/lab"), &["h1", "h2"])?;
        let seconds = |argument: &str| -> Result<i64> {
            let date = Command::new(clocks.program()).args(["-c", "date +%s", "sh", argument]).output()?;
            Ok(String::from_utf8(date.stdout)?.trim().parse()?)
        };
        let off = |argument: &str, by: i64| -> Result<()> {
            let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())?;
            let seconds = seconds(argument)?;
            anyhow::ensure!((seconds - now - by).abs() < 60, "{argument}: {seconds} at {now}");
            Ok(())
        };
        clocks.set("h1", -7_200)?;
        clocks.set(CONTROLLER, 86_400)?;
        off("/var/lib/lab/h1/state", -7_200)?;
        off("/var/lib/lab/h2/state", 0)?;
        off("serve", 86_400)?;
        clocks.right(&["h1", "h2"])?;
        off("/var/lib/lab/h1/state", 0)
    }
}
