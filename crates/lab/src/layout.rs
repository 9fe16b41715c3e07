//! The names, addresses and paths of a lab: all of them follow from its name and the number of a host.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

/// Where the run directories, sockets and locks of labs are: short, because unix socket paths end at 107 bytes.
pub const RUN_ROOT: &str = "/run/godwit-lab";
/// Where records, state and disks of labs are: never a small tmpfs.
pub const STATE_ROOT: &str = "/var/lib/godwit-lab";

/// Most hosts of one lab: the range of user ids of a lab ends there.
pub const MAX_HOSTS: u16 = 60;
/// The MTU of the underlay: large enough for a guest's 1500 bytes inside VXLAN.
pub const UNDERLAY_MTU: u32 = 1600;
/// The controller's address in the underlay.
pub const CONTROLLER_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 254);
/// The outside client's address in the underlay.
pub const OUTSIDE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 200);
/// The outside client's address in the network of the guests.
pub const OUTSIDE_GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
/// Port on which the controller waits for agents.
pub const LINK_PORT: u16 = 7444;
/// VXLAN id of the default network.
pub const DEFAULT_NETWORK_ID: u32 = 1;
/// UDP port of VXLAN.
pub const VXLAN_PORT: u16 = 4789;

/// The name of the port and link of the outside client.
pub const OUTSIDE: &str = "out";

/// First user id of all labs. From here to 0x7FFE_0000 nothing is assigned by systemd, Debian or container tools.
const UID_FIRST: u32 = 0x7000_0000;
/// User ids of one lab.
const UIDS_PER_LAB: u32 = 0x1_0000;
/// User ids of one host.
const UIDS_PER_HOST: u32 = 0x400;
/// How many ranges of user ids there are.
pub(crate) const UID_SLOTS: u32 = 0xFFE;

/// The name of host `number`, counted from 1.
#[must_use]
pub fn host_name(number: u16) -> String {
    format!("h{number}")
}

/// The number of the host called `name`, if that is the name of a host at all.
#[must_use]
pub fn host_number(name: &str) -> Option<u16> {
    let number: u16 = name.strip_prefix('h')?.parse().ok()?;
    (host_name(number) == name && (1..=MAX_HOSTS).contains(&number)).then_some(number)
}

/// The underlay address of host `number`, counted from 1.
#[must_use]
pub fn host_address(number: u16) -> Ipv4Addr {
    // MAX_HOSTS keeps the number below the outside client's.
    Ipv4Addr::new(10, 77, 0, number.min(199) as u8)
}

/// The name of a namespace of a lab; `place` is a host, `sw` or `out`.
#[must_use]
pub fn namespace(lab: &str, place: &str) -> String {
    format!("gw-{lab}-{place}")
}

/// The switch's port towards `place`, at most 15 characters.
pub(crate) fn switch_port(place: &str) -> String {
    format!("p-{place}")
}

/// First user id of a lab's range and the first beyond it.
pub(crate) fn lab_uids(slot: u32) -> std::ops::Range<u32> {
    let first = UID_FIRST + (slot % UID_SLOTS) * UIDS_PER_LAB;
    first..first + UIDS_PER_LAB
}

/// First user id that the agent of host `number` may give to its virtual machines.
pub(crate) fn host_uid_base(slot: u32, number: u16) -> u32 {
    lab_uids(slot).start + u32::from(number) * UIDS_PER_HOST
}

/// The parent of all control groups of a lab, below the mount of the hierarchy.
pub(crate) fn cgroup(lab: &str) -> String {
    format!("godwit-lab-{lab}")
}

/// The directories of one lab.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    name: String,
    data: PathBuf,
}

impl Paths {
    /// Paths of the lab `name`; `data` is where its large files are, when not at the usual place.
    pub(crate) fn new(name: &str, data: Option<&Path>) -> Self {
        let data = data.map_or_else(|| Path::new(STATE_ROOT).join(name), Path::to_path_buf);
        Self { name: name.to_owned(), data }
    }

    /// Holds the record, and the large files unless they were put elsewhere.
    pub(crate) fn home(&self) -> PathBuf {
        Path::new(STATE_ROOT).join(&self.name)
    }

    pub(crate) fn record(&self) -> PathBuf {
        self.home().join("lab.json")
    }

    pub(crate) fn lock(&self) -> PathBuf {
        Path::new(RUN_ROOT).join(format!("{}.lock", self.name))
    }

    pub(crate) fn run(&self) -> PathBuf {
        Path::new(RUN_ROOT).join(&self.name)
    }

    pub(crate) fn data(&self) -> &Path {
        &self.data
    }

    pub(crate) fn controller_data(&self) -> PathBuf {
        self.data.join("ctl")
    }

    pub(crate) fn controller_log(&self) -> PathBuf {
        self.data.join("controller.log")
    }

    pub(crate) fn pool(&self) -> PathBuf {
        self.data.join("pool")
    }

    pub(crate) fn host(&self, host: &str) -> PathBuf {
        self.data.join(host)
    }

    /// Of the pool `local`, which is the host's alone.
    pub(crate) fn host_pool(&self, host: &str) -> PathBuf {
        self.host(host).join("pool")
    }

    pub(crate) fn host_run(&self, host: &str) -> PathBuf {
        self.run().join(host)
    }

    pub(crate) fn host_state(&self, host: &str) -> PathBuf {
        self.host(host).join("state")
    }

    pub(crate) fn agent_log(&self, host: &str) -> PathBuf {
        self.host(host).join("agent.log")
    }

    pub(crate) fn relay_log(&self, place: &str) -> PathBuf {
        self.data.join(format!("relay-{place}.log"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_name_is_taken_only_as_it_would_be_written() {
        for (name, number) in [("h1", Some(1)), ("h60", Some(60)), ("h61", None), ("h0", None), ("h01", None), ("x1", None)] {
            assert_eq!(host_number(name), number, "{name}");
        }
    }

    #[test]
    fn uid_ranges_of_labs_and_hosts_do_not_overlap_and_end_below_the_foreign_range() {
        assert_eq!(lab_uids(0).end, lab_uids(1).start);
        assert!(lab_uids(UID_SLOTS - 1).end <= 0x7FFE_0000);
        assert!(host_uid_base(7, MAX_HOSTS) + UIDS_PER_HOST <= lab_uids(7).end);
        assert_eq!(host_uid_base(7, 2) - host_uid_base(7, 1), UIDS_PER_HOST);
    }

    #[test]
    fn interface_names_fit_the_kernel() {
        assert!(switch_port(&host_name(MAX_HOSTS)).len() <= 15);
        assert!(switch_port(OUTSIDE).len() <= 15);
    }
}
