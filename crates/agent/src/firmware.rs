//! UEFI firmware of this host: OVMF as Debian installs it. Its code is part of a VM's memory and moves with it; only its size must be
//! equal everywhere, which it is for the build with 4 MiB of flash.

use std::path::{Path, PathBuf};

use godwit_model::{Bytes, ErrorCode, Refusal};

const DIRECTORY: &str = "/usr/share/OVMF";
/// Size of the code of every build with 4 MiB of flash.
const CODE: u64 = 0x37_c000;
/// Size of its variables.
pub(crate) const VARIABLES: Bytes = Bytes(0x8_4000);

/// Firmware and the variables that it begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Flash {
    /// Its code.
    pub(crate) code: PathBuf,
    /// Variables of a machine that never ran; with Secure Boot, keys are enrolled in them.
    pub(crate) template: PathBuf,
}

impl Flash {
    /// The firmware of this host, if it is installed and of the one size.
    pub(crate) fn find(secure_boot: bool) -> Option<Self> {
        Self::find_in(Path::new(DIRECTORY), secure_boot)
    }

    fn find_in(directory: &Path, secure_boot: bool) -> Option<Self> {
        let (code, template) =
            if secure_boot { ("OVMF_CODE_4M.secboot.fd", "OVMF_VARS_4M.ms.fd") } else { ("OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd") };
        let found = Self { code: directory.join(code), template: directory.join(template) };
        let is = |path: &Path, size: u64| std::fs::metadata(path).is_ok_and(|facts| facts.is_file() && facts.len() == size);
        (is(&found.code, CODE) && is(&found.template, VARIABLES.get())).then_some(found)
    }

    /// As [`Flash::find`].
    ///
    /// # Errors
    /// `host_incompatible`, with what to install.
    pub(crate) fn require(secure_boot: bool) -> Result<Self, Refusal> {
        Self::find(secure_boot).ok_or_else(|| {
            let what = if secure_boot { "UEFI firmware with Secure Boot" } else { "UEFI firmware" };
            Refusal::new(ErrorCode::HostIncompatible, format!("this host has no {what} of 4 MiB in {DIRECTORY}"))
                .hint("install the package ovmf and restart the agent")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firmware_of_another_size_is_none() {
        let dir = tempfile::tempdir().expect("dir");
        assert_eq!(Flash::find_in(dir.path(), false), None);
        let make =
            |name: &str, size: u64| std::fs::File::create(dir.path().join(name)).and_then(|file| file.set_len(size)).expect("file");
        make("OVMF_CODE_4M.fd", 2 << 20);
        make("OVMF_VARS_4M.fd", VARIABLES.get());
        assert_eq!(Flash::find_in(dir.path(), false), None);
        make("OVMF_CODE_4M.fd", CODE);
        assert_eq!(Flash::find_in(dir.path(), false).map(|flash| flash.code), Some(dir.path().join("OVMF_CODE_4M.fd")));
        assert_eq!(Flash::find_in(dir.path(), true), None);
    }
}
