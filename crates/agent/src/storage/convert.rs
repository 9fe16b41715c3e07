//! Filling new volumes: sparse, empty qcow2, or a copy of an image by `qemu-img`.
//!
//! `qemu-img` never gets a name that a user chose and no option but constants. It has the image as its standard input and the new file as its
//! standard output, both only as places to open anew, and copies an image as a user without rights: its readers of formats are large.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::process::Stdio;

use godwit_model::{DiskFormat, ErrorCode, Refusal, Retry};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::process::{Gid, Uid};
use tokio::process::Command;

use super::volume::Draft;
use super::{blocking, refusal};

/// The kernel's user for those who are nobody.
const NOBODY: u32 = 65_534;
/// How much of what `qemu-img` says is kept.
const MAX_COMPLAINT: usize = 400;

/// Makes the content of a draft.
pub(super) async fn fill(draft: Draft) -> Result<Draft, Refusal> {
    let draft = blocking(move || {
        if draft.format == DiskFormat::Raw {
            let result = draft.partial.file.set_len(draft.size.get());
            result.map_err(|error| refusal::system(&format!("create volume {}", draft.volume), &error))?;
        }
        Ok(draft)
    })
    .await?;
    if draft.format == DiskFormat::Qcow2 {
        let size = draft.size.get().to_string();
        let arguments = ["create", "-q", "-f", "qcow2", "/proc/self/fd/1", &size];
        run(&draft, &arguments, None, false).await?;
    }
    if let Some((image, format)) = &draft.image {
        let arguments = ["convert", "-q", "-n", "--target-is-zero", "-f", format.driver(), "-O", draft.format.driver()];
        let files = ["/proc/self/fd/0", "/proc/self/fd/1"];
        // The rights to a file are those of its owner when it is opened anew.
        let give = |uid: Uid, gid: Gid| {
            let result = rustix::fs::fchown(&draft.partial.file, Some(uid), Some(gid));
            result.map_err(|error| refusal::system(&format!("create volume {}", draft.volume), &error.into()))
        };
        let drop_rights = rustix::process::geteuid().is_root();
        if drop_rights {
            give(Uid::from_raw(NOBODY), Gid::from_raw(NOBODY))?;
        }
        run(&draft, &[arguments.as_slice(), &files].concat(), Some(image), drop_rights).await?;
        if drop_rights {
            give(Uid::ROOT, Gid::ROOT)?;
        }
    }
    Ok(draft)
}

async fn run(draft: &Draft, arguments: &[&str], image: Option<&File>, drop_rights: bool) -> Result<(), Refusal> {
    let doing = format!("create volume {}", draft.volume);
    let system = |error: std::io::Error| refusal::system(&doing, &error);
    let mut command = Command::new("qemu-img");
    command.args(arguments).current_dir("/").env_clear().env("LC_ALL", "C").kill_on_drop(true);
    command.env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into()));
    command.stdin(image.map(place_of).transpose().map_err(system)?.map_or_else(Stdio::null, Stdio::from));
    command.stdout(Stdio::from(place_of(&draft.partial.file).map_err(system)?)).stderr(Stdio::piped());
    if drop_rights {
        command.uid(NOBODY).gid(NOBODY);
    }
    let child = command.spawn().map_err(|error| {
        Refusal::new(ErrorCode::HostFailed, format!("could not {doing}: qemu-img did not start: {error}"))
            .hint("install qemu-utils on the host")
            .retry(Retry::Safe)
    })?;
    let output = child.wait_with_output().await.map_err(system)?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let complaint: String = complaint.trim().chars().filter(|c| !c.is_control()).take(MAX_COMPLAINT).collect();
    if complaint.contains("No space left") {
        return Err(refusal::no_space(&doing, &complaint));
    }
    let facts = format!("could not {doing}: qemu-img ended with {}: {complaint}", output.status);
    Err(match image {
        Some(_) => refusal::image(&format!("was not copied: {facts}")),
        None => Refusal::new(ErrorCode::HostFailed, facts).hint("look at the host's QEMU installation and file system"),
    })
}

/// A descriptor that can neither be read nor written, only opened anew: what `qemu-img` prints by mistake does not get into a disk.
fn place_of(file: &File) -> std::io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
    Ok(rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}
