//! Filling new volumes: sparse, empty qcow2, or a copy of an image by `qemu-img`.
//!
//! `qemu-img` never gets a name that a user chose and no option but constants. It runs in a cage as a user without rights: its readers of formats
//! are large. It has the image and the new file, both only as places to open anew, and nothing else.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::time::Duration;

use godwit_model::{Bytes, DiskFormat, ErrorCode, Refusal, Retry, hostile};
use godwit_qemu::cage::tool::{self, Tool, ToolError};
use godwit_qemu::{Launcher, PassedFds};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::process::{Gid, Uid};
use tokio::process::Command;

use super::volume::Draft;
use super::{blocking, refusal};
use crate::host::NOBODY;

/// How much of what `qemu-img` says is kept.
const MAX_COMPLAINT: usize = 400;
/// Time for filling one volume. A copy of some TiB takes long.
const TIME: Duration = Duration::from_secs(12 * 3_600);

/// Makes the content of a draft. `cage` is how `qemu-img` is confined; without it, it is only a user without rights.
pub(super) async fn fill(draft: Draft, cage: Option<&Launcher>) -> Result<Draft, Refusal> {
    let draft = blocking(move || {
        if draft.format == DiskFormat::Raw {
            let result = draft.room.file().set_len(draft.size.get());
            result.map_err(|error| refusal::system(&format!("create volume {}", draft.volume), &error))?;
        }
        Ok(draft)
    })
    .await?;
    let doing = format!("create volume {}", draft.volume);
    let file = draft.room.file();
    lend(file, &doing)?;
    if draft.format == DiskFormat::Qcow2 {
        create(file, draft.size, cage, &doing).await?;
    }
    if let Some((image, format)) = &draft.image {
        copy((image, *format), (file, draft.format), cage, &doing).await?;
    }
    take_back(file, &doing)?;
    Ok(draft)
}

/// Makes a file of ours, which `qemu-img` may read, a disk of `size` in another one; both are empty or whole then.
///
/// # Errors
/// `not_enough_space`, `host_failed`; `image_invalid` for what `qemu-img` does not read.
pub(super) async fn convert(
    from: (&File, DiskFormat),
    to: (&File, DiskFormat),
    size: Bytes,
    cage: Option<&Launcher>,
    doing: &str,
) -> Result<(), Refusal> {
    lend(from.0, doing)?;
    lend(to.0, doing)?;
    if to.1 == DiskFormat::Qcow2 {
        create(to.0, size, cage, doing).await?;
    } else {
        to.0.set_len(size.get()).map_err(|error| refusal::system(doing, &error))?;
    }
    copy(from, to, cage, doing).await?;
    take_back(to.0, doing)?;
    take_back(from.0, doing)
}

async fn create(to: &File, size: Bytes, cage: Option<&Launcher>, doing: &str) -> Result<(), Refusal> {
    let arguments = |_: &str, to: &str| ["create", "-q", "-f", "qcow2", to, &size.get().to_string()].map(str::to_owned).to_vec();
    run((to, None), cage, doing, arguments).await
}

async fn copy(
    (from, read): (&File, DiskFormat),
    (to, written): (&File, DiskFormat),
    cage: Option<&Launcher>,
    doing: &str,
) -> Result<(), Refusal> {
    let (read, written) = (read.driver(), written.driver());
    run((to, Some(from)), cage, doing, |from, to| {
        ["convert", "-q", "-n", "--target-is-zero", "-f", read, "-O", written, from, to].map(str::to_owned).to_vec()
    })
    .await
}

/// The rights to a file are those of its owner when it is opened anew.
fn give(file: &File, uid: Uid, gid: Gid, doing: &str) -> Result<(), Refusal> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    // A file server that takes root for nobody refuses, and has made the file nobody's already.
    let is_nobodys = || rustix::fs::fstat(file).is_ok_and(|data| data.st_uid == NOBODY);
    match rustix::fs::fchown(file, Some(uid), Some(gid)) {
        Err(rustix::io::Errno::PERM) if is_nobodys() => Ok(()),
        result => result.map_err(|error| refusal::system(doing, &error.into())),
    }
}

fn lend(file: &File, doing: &str) -> Result<(), Refusal> {
    give(file, Uid::from_raw(NOBODY), Gid::from_raw(NOBODY), doing)
}

fn take_back(file: &File, doing: &str) -> Result<(), Refusal> {
    give(file, Uid::ROOT, Gid::ROOT, doing)
}

/// Runs `qemu-img` with the arguments for the places of image and volume.
async fn run(
    (volume, image): (&File, Option<&File>),
    cage: Option<&Launcher>,
    doing: &str,
    arguments: impl Fn(&str, &str) -> Vec<String>,
) -> Result<(), Refusal> {
    let system = |error: std::io::Error| refusal::system(doing, &error);
    let volume_place = place_of(volume).map_err(system)?;
    let image_place = image.map(place_of).transpose().map_err(system)?;
    let not_started = |error: String| {
        Refusal::new(ErrorCode::HostFailed, format!("could not {doing}: qemu-img did not start: {error}"))
            .hint("install qemu-utils on the host")
            .retry(Retry::Safe)
    };
    let Some(program) = tool::find("qemu-img") else { return Err(not_started("it is not in PATH".to_owned())) };
    let (status, complaint) = match cage {
        Some(launcher) => {
            let mut fds = PassedFds::new();
            let volume = format!("/proc/self/fd/{}", fds.pass(volume_place));
            let image = image_place.map(|image| format!("/proc/self/fd/{}", fds.pass(image)));
            let arguments = arguments(image.as_deref().unwrap_or_default(), &volume);
            let tool = Tool { program, arguments, uid: NOBODY, gid: NOBODY, memory: tool::QEMU_IMG_SPACE, time: TIME };
            match tool::run(launcher, &tool, fds).await {
                Ok(()) => return Ok(()),
                Err(ToolError::Failed { status, said, .. }) => (status, said),
                Err(ToolError::Start { source, .. }) => return Err(not_started(source.to_string())),
                Err(other) => return Err(Refusal::new(ErrorCode::HostFailed, format!("could not {doing}: {other}"))),
            }
        }
        None => {
            let mut command = Command::new(program);
            command.args(arguments("/proc/self/fd/0", "/proc/self/fd/1")).current_dir("/").env_clear().kill_on_drop(true);
            command
                .stdin(image_place.map_or_else(Stdio::null, Stdio::from))
                .stdout(Stdio::from(volume_place))
                .stderr(Stdio::piped());
            if rustix::process::geteuid().is_root() {
                command.uid(NOBODY).gid(NOBODY);
            }
            let child = command.spawn().map_err(|error| not_started(error.to_string()))?;
            let output = child.wait_with_output().await.map_err(system)?;
            if output.status.success() {
                return Ok(());
            }
            (output.status, String::from_utf8_lossy(&output.stderr).trim().to_owned())
        }
    };
    let complaint = hostile::bounded(&complaint, MAX_COMPLAINT);
    if complaint.contains("No space left") {
        return Err(refusal::no_space(doing, &complaint));
    }
    let facts = format!("could not {doing}: qemu-img ended with {status}: {complaint}");
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
