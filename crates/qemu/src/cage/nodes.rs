//! Device nodes of the VM's own: made on a tmpfs that nobody else sees and bound over the host's nodes.

use std::ffi::CString;
use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Uid, chmod, chownat, mknodat, stat};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount};
use rustix::thread::UnshareFlags;

use super::{CagePlan, DeviceNode};

/// Why a node could not be made.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
pub(super) struct NodeError {
    step: &'static str,
    source: io::Error,
}

fn at(step: &'static str) -> impl FnOnce(rustix::io::Errno) -> NodeError {
    move |errno| NodeError { step, source: errno.into() }
}

/// Moves this process into a mount namespace from which nothing leaks back.
#[expect(unsafe_code, reason = "unshare is unsafe for what it could do to descriptors shared between threads")]
pub(super) fn leave_host_mounts() -> Result<(), NodeError> {
    // SAFETY: only the mount namespace is unshared; no descriptor table, and the process has a single thread.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(at("unshare the mount namespace"))?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).map_err(at("make the mounts private"))
}

/// Makes the plan's nodes. The tmpfs is mounted over the working directory only for the moment: the bound nodes keep it alive.
pub(super) fn make(plan: &CagePlan) -> Result<(), NodeError> {
    let scaffold = plan.working_dir.as_path();
    let options = CString::new("mode=0700,size=64k,nr_inodes=16").expect("no zero byte in a literal");
    let flags = MountFlags::NOEXEC | MountFlags::NOSUID;
    mount("godwit-nodes", scaffold, "tmpfs", flags, Some(options.as_c_str())).map_err(at("mount a tmpfs for the nodes"))?;
    let made = plan.nodes.iter().enumerate().try_for_each(|(index, node)| match make_one(plan, scaffold, index, node) {
        Err(error) if !node.required => {
            eprintln!("cage: no {} for this VM: {error}", node.path.display());
            Ok(())
        }
        other => other,
    });
    unmount(scaffold, UnmountFlags::DETACH).map_err(at("leave the tmpfs"))?;
    made
}

fn make_one(plan: &CagePlan, scaffold: &Path, index: usize, node: &DeviceNode) -> Result<(), NodeError> {
    let host = stat(&node.path).map_err(at("look at the host's node"))?;
    if FileType::from_raw_mode(host.st_mode) != FileType::CharacterDevice {
        return Err(NodeError { step: "look at the host's node", source: io::Error::other("it is no character device") });
    }
    let own = scaffold.join(index.to_string());
    let mode = Mode::RUSR | Mode::WUSR;
    mknodat(CWD, &own, FileType::CharacterDevice, mode, host.st_rdev).map_err(at("make a node"))?;
    chmod(&own, mode).map_err(at("set its mode"))?;
    let (uid, gid) = (Uid::from_raw(plan.uid), Gid::from_raw(plan.gid));
    chownat(CWD, &own, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(at("give it to the VM"))?;
    mount_bind(&own, &node.path).map_err(at("bind it over the host's node"))
}
