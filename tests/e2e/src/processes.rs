//! What runs on a lab host for its VMs, as the kernel tells it: QEMU by its user id and command line, a TPM by the same user id, carry by the
//! socket it listens on.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use godwit_lab::{HostStatus, Signal, in_namespace};
use godwit_model::VmId;
use rustix::process::{Pid, kill_process};

/// User ids of one host: the first is carry's, the others are VMs'.
pub(crate) const UIDS: u32 = 0x400;

/// A process under one of a host's user ids.
#[derive(Debug, Clone)]
pub struct HostProcess {
    /// Its pid, in the root namespace.
    pub pid: u32,
    /// What it is.
    pub role: ProcessRole,
}

/// What a process is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessRole {
    /// The QEMU of a VM.
    Qemu(VmId),
    /// The TPM of a VM, told by the user that it shares with the VM's QEMU.
    Tpm(VmId),
    /// The carry of a VM's move; the first digits of the VM's id, which name its socket.
    Carry(String),
    /// Something else, such as a probe of the agent.
    Other(String),
}

impl HostProcess {
    /// Sends it a signal.
    ///
    /// # Errors
    /// When it is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw).context("a pid")?;
        kill_process(pid, signal).with_context(|| format!("send {signal:?} to {self:?}"))
    }
}

/// Whether a name of sockets and directories, the first digits of a VM's id, is that of `vm`.
pub(crate) fn names(name: &str, vm: VmId) -> bool {
    name.len() >= 8 && vm.uuid().simple().to_string().starts_with(name)
}

/// Everything that runs under a host's user ids now.
pub(crate) fn of_host(host: &HostStatus) -> Result<Vec<HostProcess>> {
    let sockets = carry_sockets(&host.namespace)?;
    let (mut commands, mut qemus) = (Vec::new(), BTreeMap::new());
    for entry in fs::read_dir("/proc").context("read /proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // A process that ends meanwhile is no process of the host.
        let Some(uid) = real_uid(&entry.path()) else { continue };
        if !(host.uid_base..host.uid_base + UIDS).contains(&uid) {
            continue;
        }
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).trim_end_matches('\0').replace('\0', " ");
        if command.is_empty() {
            // Ended, and not yet waited for.
            continue;
        }
        qemus.extend(vm_of(&command).map(|vm| (uid, vm)));
        commands.push((pid, uid, command));
    }
    let role = |pid: u32, uid: u32, command: String| {
        if let Some(vm) = vm_of(&command) {
            ProcessRole::Qemu(vm)
        } else if let Some(vm) = qemus.get(&uid).filter(|_| is_tpm(&command)) {
            ProcessRole::Tpm(*vm)
        } else if let Some(vm) = listens_on(&Path::new("/proc").join(pid.to_string()), &sockets) {
            ProcessRole::Carry(vm)
        } else {
            ProcessRole::Other(command)
        }
    };
    Ok(commands.into_iter().map(|(pid, uid, command)| HostProcess { pid, role: role(pid, uid, command) }).collect())
}

fn is_tpm(command: &str) -> bool {
    command.split(' ').next().is_some_and(|program| program.ends_with("/swtpm"))
}

/// Taps of VMs in a host's namespace.
pub(crate) fn taps(host: &HostStatus) -> Result<Vec<String>> {
    let read = || fs::read_to_string("/proc/thread-self/net/dev");
    let text = in_namespace(&host.namespace, read)?.context("read the interfaces")?;
    let names = text.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim());
    Ok(names.filter(|name| name.starts_with("gwt")).map(ToOwned::to_owned).collect())
}

/// The id behind `-uuid`.
fn vm_of(command: &str) -> Option<VmId> {
    let mut words = command.split(' ');
    words.find(|word| *word == "-uuid")?;
    words.next()?.parse().ok()
}

/// Inodes of listening sockets named `…/carry/NAME`, with that name. The socket is bound by the agent, so it shows in the host's namespace.
fn carry_sockets(namespace: &str) -> Result<Vec<(u64, String)>> {
    let read = || fs::read_to_string("/proc/thread-self/net/unix");
    let text = in_namespace(namespace, read)?.context("read the unix sockets")?;
    Ok(text.lines().filter_map(carry_socket).collect())
}

/// `Num RefCount Protocol Flags Type St Inode Path`.
fn carry_socket(line: &str) -> Option<(u64, String)> {
    let mut fields = line.split_whitespace();
    let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
    let inode = fields.nth(2)?.parse().ok()?;
    let (dir, name) = fields.next()?.rsplit_once('/')?;
    const LISTENS: u32 = 1 << 16;
    (flags & LISTENS != 0 && dir.ends_with("/carry")).then(|| (inode, name.to_owned()))
}

fn listens_on(process: &Path, sockets: &[(u64, String)]) -> Option<String> {
    let descriptors = fs::read_dir(process.join("fd")).ok()?;
    descriptors.flatten().find_map(|descriptor| {
        let target = fs::read_link(descriptor.path()).ok()?;
        let inode = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok()?;
        sockets.iter().find(|(known, _)| *known == inode).map(|(_, name)| name.clone())
    })
}

/// The owner of /proc/PID is root for a process that may not be dumped, so the real uid is read first.
fn real_uid(process: &Path) -> Option<u32> {
    let status = fs::read_to_string(process.join("status")).ok();
    let line = status.as_ref().and_then(|text| text.lines().find_map(|line| line.strip_prefix("Uid:")));
    match line.and_then(|line| line.split_whitespace().next()?.parse().ok()) {
        Some(uid) => Some(uid),
        None => fs::metadata(process).ok().map(|metadata| metadata.uid()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_sockets_of_carry_are_told_from_others() {
        let line = "ffff9a: 00000002 00000000 00010000 0001 01 4711 /run/godwit-lab/x/h1/carry/0123abcd";
        assert_eq!(carry_socket(line), Some((4711, "0123abcd".to_owned())));
        assert_eq!(carry_socket(&line.replace("00010000", "00000000")), None, "a connection");
        assert_eq!(carry_socket(&line.replace("/carry/", "/other/")), None);
        assert_eq!(carry_socket("Num       RefCount Protocol Flags    Type St Inode Path"), None);
        assert_eq!(carry_socket("ffff9a: 00000002 00000000 00010000 0001 01 4711"), None, "no name");
    }

    #[test]
    fn a_vm_is_known_by_its_id_on_the_command_line() {
        let id = "01234567-89ab-4cde-8f01-23456789abcd";
        assert_eq!(vm_of(&format!("qemu-system-x86_64 -name x -uuid {id} -S")).map(|vm| vm.to_string()).as_deref(), Some(id));
        assert_eq!(vm_of("godwit carry --config-fd 7"), None);
        assert_eq!(vm_of("qemu -uuid"), None);
    }
}
