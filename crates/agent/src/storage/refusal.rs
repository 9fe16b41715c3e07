//! Refusals about volumes: what is wrong and what to do.

use std::io;

use godwit_model::{ErrorCode, Refusal, Retry, VolumeRef};

/// Something that the operating system refused while `doing` was done.
pub(super) fn system(doing: &str, error: &io::Error) -> Refusal {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => no_space(doing, "the file system is full"),
        _ => Refusal::new(ErrorCode::HostFailed, format!("could not {doing}: {error}"))
            .hint("look at the host's file system and kernel log, then try again")
            .retry(Retry::Safe),
    }
}

/// No room.
pub(super) fn no_space(doing: &str, facts: &str) -> Refusal {
    Refusal::new(ErrorCode::NotEnoughSpace, format!("could not {doing}: {facts}"))
        .hint("free space in the pool, or use another pool")
        .retry(Retry::Safe)
}

/// The volume is not there.
pub(super) fn missing(volume: &VolumeRef) -> Refusal {
    Refusal::new(ErrorCode::VolumeMissing, format!("volume {volume} does not exist"))
        .hint("give the disk a size or an image to create it from, or put the volume back")
}

/// The volume is shorter than it must be.
pub(super) fn truncated(volume: &VolumeRef, facts: &str) -> Refusal {
    Refusal::new(ErrorCode::VolumeTruncated, format!("volume {volume} is truncated: {facts}"))
        .hint("restore the volume from a backup; do not start the VM with it, its file system would be damaged further")
}

/// The volume is not what the spec declares.
pub(super) fn format(volume: &VolumeRef, facts: &str, hint: &str) -> Refusal {
    Refusal::new(ErrorCode::VolumeFormat, format!("volume {volume} {facts}")).hint(hint)
}

/// The image cannot be copied.
pub(super) fn image(facts: &str) -> Refusal {
    Refusal::new(ErrorCode::ImageInvalid, format!("the disk's image {facts}"))
        .hint("import the image anew: a whole file of its declared kind, without backing or data file (qemu-img convert makes one)")
}
