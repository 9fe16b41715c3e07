//! The root that a caged program sees: the system's libraries, its own binary, what the plan shows it, a few devices, and nothing else.

use std::ffi::CString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dev, FileType, Gid, Mode, Uid, chmod, chownat, mknodat, stat};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change, move_mount, open_tree,
    unmount,
};

use super::{CagePlan, DeviceNode};

/// What programs are made of on every system that we run on. What is a link here is the same link there.
const SYSTEM: &[&str] = &["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache"];

/// Devices that hold nothing of anybody.
const PLAIN_DEVICES: &[&str] = &["/dev/null", "/dev/zero", "/dev/urandom"];

/// Where the new root is put together: a directory that every host has. All that is shown was taken hold of before it is covered.
const SCAFFOLD: &str = "/dev";

/// Why there is no root.
#[derive(Debug, thiserror::Error)]
#[error("{step} {}: {source}", path.display())]
pub(super) struct RootError {
    step: &'static str,
    path: PathBuf,
    source: io::Error,
}

fn at<E: Into<io::Error>>(step: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(E) -> RootError {
    move |error| RootError { step, path: path.into(), source: error.into() }
}

/// Something of the host, held by a descriptor.
enum Shown {
    Tree { place: PathBuf, tree: OwnedFd, directory: bool },
    Link { place: PathBuf, target: PathBuf },
}

/// Makes the root and moves this process into it. The process is alone in its mount namespace; `binary` is the file that will be executed, if
/// it has a place.
pub(super) fn enter(plan: &CagePlan, binary: Option<&Path>) -> Result<(), RootError> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(at("make the mounts private below", "/"))?;
    let mut shown = Vec::new();
    for path in SYSTEM {
        shown.extend(system_part(Path::new(path))?);
    }
    let of_plan = plan.read_only.iter().cloned();
    for path in binary.map(program_place).into_iter().filter(|path| !is_in_system(path)).chain(of_plan) {
        shown.push(take(&path, READ_ONLY)?);
    }
    for path in &plan.writable {
        shown.push(take(path, WRITABLE)?);
    }
    let plain =
        PLAIN_DEVICES.iter().map(|path| Ok((PathBuf::from(path), device(Path::new(path))?))).collect::<Result<Vec<_>, _>>()?;
    let own: Vec<_> = plan.nodes.iter().map(|node| (node, device(&node.path))).collect();

    let new_root = Path::new(SCAFFOLD);
    tmpfs(new_root, MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, c"mode=0755,size=256k,nr_inodes=512")?;
    rustix::process::chdir(new_root).map_err(at("enter", new_root))?;
    for part in shown {
        put(part)?;
    }
    make_dir(Path::new("proc"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", "proc", "proc", flags, Some(c"subset=pid")).map_err(at("mount", "/proc"))?;
    make_devices(plan, &plain, own)?;
    make_dir(&inside(&plan.working_dir))?;
    set_attributes(CWD, ".", READ_ONLY & !libc::MOUNT_ATTR_NOEXEC, false).map_err(at("close", "/"))?;

    rustix::process::pivot_root(".", ".").map_err(at("change the root to", new_root))?;
    unmount(".", UnmountFlags::DETACH).map_err(at("leave the host's root", "/"))?;
    rustix::process::chdir("/").map_err(at("enter", "/"))
}

const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
const WRITABLE: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;

/// A part of the system, if this one has it.
fn system_part(path: &Path) -> Result<Option<Shown>, RootError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_symlink() => {
            let target = fs::read_link(path).map_err(at("read the link", path))?;
            Ok(Some(Shown::Link { place: path.to_owned(), target }))
        }
        Ok(_) => take(path, READ_ONLY).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at("look at", path)(error)),
    }
}

fn is_in_system(path: &Path) -> bool {
    SYSTEM.iter().any(|part| path.starts_with(part))
}

/// What has to be seen for `binary` (without links in its path) to run: the file alone; or the directory of a QEMU that was installed
/// outside the system's directories together with its firmware.
pub(super) fn program_place(binary: &Path) -> PathBuf {
    let prefix = binary.parent().filter(|dir| dir.ends_with("bin")).and_then(Path::parent);
    let has_firmware = |prefix: &Path| ["share/qemu", "root/usr/share/qemu"].iter().any(|share| prefix.join(share).is_dir());
    prefix.filter(|prefix| has_firmware(prefix)).unwrap_or(binary).to_owned()
}

/// Takes hold of what is at `path` of the host, with what is mounted below.
fn take(path: &Path, attributes: u64) -> Result<Shown, RootError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, path, flags).map_err(at("find", path))?;
    set_attributes(&tree, "", attributes, true).map_err(at("limit", path))?;
    let directory = rustix::fs::fstat(&tree).map(|data| FileType::from_raw_mode(data.st_mode) == FileType::Directory);
    Ok(Shown::Tree { place: path.to_owned(), tree, directory: directory.map_err(at("look at", path))? })
}

/// Puts it at its place in the new root, which is the working directory.
fn put(part: Shown) -> Result<(), RootError> {
    match part {
        Shown::Link { place, target } => symlink(&target, inside(&place)).map_err(at("link", place)),
        Shown::Tree { place, tree, directory } => {
            let inner = inside(&place);
            if directory {
                make_dir(&inner)?;
            } else {
                make_dir(inner.parent().unwrap_or(Path::new("")))?;
                fs::File::create(&inner).map_err(at("make a place for", &place))?;
            }
            move_mount(&tree, "", CWD, &inner, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(at("show", place))
        }
    }
}

/// The place of an absolute path in the new root.
fn inside(path: &Path) -> PathBuf {
    path.strip_prefix("/").unwrap_or(path).to_owned()
}

fn make_dir(path: &Path) -> Result<(), RootError> {
    if path.as_os_str().is_empty() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(at("make the directory", path))
}

fn tmpfs(at_path: &Path, flags: MountFlags, options: &std::ffi::CStr) -> Result<(), RootError> {
    mount("godwit-cage", at_path, "tmpfs", flags, Some(options)).map_err(at("mount a tmpfs on", at_path))
}

/// Which device the host has at `path`.
fn device(path: &Path) -> Result<Dev, RootError> {
    let host = stat(path).map_err(at("look at", path))?;
    if FileType::from_raw_mode(host.st_mode) != FileType::CharacterDevice {
        return Err(at("look at", path)(io::Error::other("it is no character device")));
    }
    Ok(host.st_rdev)
}

fn make_devices(
    plan: &CagePlan,
    plain: &[(PathBuf, Dev)],
    own: Vec<(&DeviceNode, Result<Dev, RootError>)>,
) -> Result<(), RootError> {
    let dev = Path::new("dev");
    make_dir(dev)?;
    tmpfs(dev, MountFlags::NOSUID | MountFlags::NOEXEC, c"mode=0755,size=64k,nr_inodes=64")?;
    for (path, number) in plain {
        make_device(path, *number, Mode::from_raw_mode(0o666), None)?;
    }
    for (node, number) in own {
        let owner = Some((Uid::from_raw(plan.uid), Gid::from_raw(plan.gid)));
        match number.and_then(|number| make_device(&node.path, number, Mode::RUSR | Mode::WUSR, owner)) {
            Err(error) if !node.required => eprintln!("cage: no {} for this VM: {error}", node.path.display()),
            other => other?,
        }
    }
    set_attributes(CWD, "dev", libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC, false)
        .map_err(at("close", "/dev"))
}

fn make_device(path: &Path, number: Dev, mode: Mode, owner: Option<(Uid, Gid)>) -> Result<(), RootError> {
    let own = inside(path);
    make_dir(own.parent().unwrap_or(Path::new("")))?;
    mknodat(CWD, &own, FileType::CharacterDevice, mode, number).map_err(at("make", path))?;
    chmod(&own, mode).map_err(at("set the mode of", path))?;
    match owner {
        Some((uid, gid)) => chownat(CWD, &own, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(at("give away", path)),
        None => Ok(()),
    }
}

/// Adds attributes to the mount at `path` below `dir`, or at `dir` itself if `path` is empty; `all` includes what is mounted below it.
#[expect(unsafe_code, reason = "rustix has no mount_setattr")]
fn set_attributes(dir: impl std::os::fd::AsFd, path: &str, attributes: u64, all: bool) -> io::Result<()> {
    let dir: BorrowedFd<'_> = dir.as_fd();
    let path = CString::new(path).map_err(io::Error::other)?;
    let flags = libc::AT_EMPTY_PATH | if all { libc::AT_RECURSIVE } else { 0 };
    let wanted = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the path is a C string, and the structure is of the size that is passed; both outlive the call, which keeps neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            dir.as_raw_fd(),
            path.as_ptr(),
            flags,
            std::ptr::from_ref(&wanted),
            std::mem::size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_with_its_firmware_is_seen_whole_and_any_other_program_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let place = |binary: &str| program_place(&dir.path().join(binary)).strip_prefix(dir.path()).expect("inside").to_owned();
        fs::create_dir_all(dir.path().join("opt/share/qemu")).expect("directories");
        fs::create_dir_all(dir.path().join("unpacked/root/usr/share/qemu")).expect("directories");
        fs::create_dir_all(dir.path().join("home/share")).expect("directories");
        assert_eq!(place("opt/bin/qemu"), Path::new("opt"));
        assert_eq!(place("unpacked/bin/qemu"), Path::new("unpacked"));
        assert_eq!(place("home/bin/qemu"), Path::new("home/bin/qemu"), "a home is not shown for a program in its bin");
        assert_eq!(place("opt/qemu"), Path::new("opt/qemu"));
    }

    #[test]
    fn the_systems_own_parts_are_not_shown_twice() {
        assert!(is_in_system(Path::new("/usr/bin/qemu-system-x86_64")) && is_in_system(Path::new("/lib64/ld-linux-x86-64.so.2")));
        assert!(!is_in_system(Path::new("/usr2/x")) && !is_in_system(Path::new("/opt/x")));
    }
}
