//! What is tested with: the binary, the guests' kernel, initramfs and disk, and the other version of QEMU.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// What a test guest boots.
#[derive(Debug, Clone)]
pub struct GuestImages {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

/// The binary under test: `GODWIT_BIN`, or the one beside this program (or above it, where tests lie in `deps`).
///
/// # Errors
/// When there is none.
pub fn godwit_binary() -> Result<PathBuf> {
    if let Some(path) = env::var_os("GODWIT_BIN") {
        return std::path::absolute(&path).with_context(|| format!("GODWIT_BIN={}", path.display()));
    }
    let own = env::current_exe().context("find this program")?;
    let found = own.ancestors().skip(1).take(2).map(|dir| dir.join("godwit")).find(|path| path.is_file());
    found.with_context(|| format!("no `godwit` beside {}: build it (`cargo build -p godwit`) or set GODWIT_BIN", own.display()))
}

/// The guest's images: from `GODWIT_GUEST_KERNEL` and `GODWIT_GUEST_INITRD`, or made by `scripts/guest-image`.
///
/// # Errors
/// When they can be neither found nor made.
pub fn guest_images() -> Result<GuestImages> {
    if let (Some(kernel), Some(initrd)) = (env::var_os("GODWIT_GUEST_KERNEL"), env::var_os("GODWIT_GUEST_INITRD")) {
        return Ok(GuestImages { kernel: kernel.into(), initrd: initrd.into() });
    }
    let [kernel, initrd] = made("guest-image")?;
    Ok(GuestImages { kernel, initrd })
}

/// A Debian with its own cloud-init.
#[derive(Debug, Clone)]
pub struct CloudImage {
    /// The disk that holds its root file system.
    pub disk: PathBuf,
    /// To be appended to the guest's initramfs: `rdinit=/boot-disk` boots the disk.
    pub boot: PathBuf,
}

/// A Debian with its own cloud-init: from `GODWIT_CLOUD_IMAGE` and `GODWIT_CLOUD_BOOT`, or made by `scripts/cloud-image`.
///
/// # Errors
/// When it can be neither found nor made.
pub fn cloud_image() -> Result<CloudImage> {
    if let (Some(disk), Some(boot)) = (env::var_os("GODWIT_CLOUD_IMAGE"), env::var_os("GODWIT_CLOUD_BOOT")) {
        return Ok(CloudImage { disk: disk.into(), boot: boot.into() });
    }
    let [disk, boot] = made("cloud-image")?;
    Ok(CloudImage { disk, boot })
}

/// QEMU's own guest agent, to be appended to the guest's initramfs: `GODWIT_GUEST_AGENT`, or made by `scripts/guest-agent-layer`.
///
/// # Errors
/// When it can be neither found nor made.
pub fn guest_agent_layer() -> Result<PathBuf> {
    given_or_made("GODWIT_GUEST_AGENT", "guest-agent-layer")
}

/// Schemathesis: `GODWIT_SCHEMATHESIS`, or installed by `scripts/schemathesis`.
///
/// # Errors
/// When it can be neither found nor installed.
pub fn schemathesis() -> Result<PathBuf> {
    given_or_made("GODWIT_SCHEMATHESIS", "schemathesis")
}

/// The file that a variable names, or whose path a script of ours prints.
fn given_or_made(variable: &str, script: &str) -> Result<PathBuf> {
    if let Some(path) = env::var_os(variable) {
        return Ok(path.into());
    }
    made(script).map(|[path]| path)
}

/// The files whose paths a script of ours prints, one a line.
fn made<const COUNT: usize>(script: &str) -> Result<[PathBuf; COUNT]> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts").join(script);
    let output = Command::new("bash").arg(&script).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("run {}", script.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let paths = <[PathBuf; COUNT]>::try_from(text.lines().map(PathBuf::from).collect::<Vec<_>>());
    match paths {
        Ok(paths) if output.status.success() && paths.iter().all(|path| path.exists()) => Ok(paths),
        _ => bail!("{}: {}, printed {text:?}", script.display(), output.status),
    }
}

/// The QEMU of another major version than the one on PATH, where there is one: `GODWIT_QEMU_OTHER`.
#[must_use]
pub fn other_qemu() -> Option<PathBuf> {
    env::var_os("GODWIT_QEMU_OTHER").map(PathBuf::from)
}
