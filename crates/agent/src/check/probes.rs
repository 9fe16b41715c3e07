//! What must be tried to be known: pools and their locks, networks in a namespace of their own, nftables, and what the controller says.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use godwit_link::v1::ClockRequest;
use godwit_link::v1::link_client::LinkClient;
use godwit_model::{MacAddress, Name, NetworkId, NicModel, ResolvedNic, VmId};

use super::{Finding, Level};
use crate::AgentOptions;
use crate::dial;
use crate::host::{of_storage, unix_now};
use crate::identity::Identity;
use crate::network::{FleetNetwork, FleetNetworks, HostNetwork, Kind};
use crate::storage::suite::{Seen, Tried};
use crate::storage::{Pools, locks_hold, try_pool};

/// Time for a program or a peer to answer.
const LIMIT: Duration = Duration::from_secs(10);
/// How far this host's clock may be from the controller's.
const MAX_SKEW: Duration = Duration::from_secs(5);
/// A pool with less than this share free is nearly full.
const LOW_SHARE: u64 = 20;
/// No network of a cluster has it.
const PROBE_VNI: u32 = 0x00ff_fffe;
const PROBE_MTU: u32 = 1_450;

/// Most of what a host does takes root.
pub(super) fn root() -> Finding {
    if rustix::process::geteuid().is_root() {
        return Finding::ok("root", "run as root");
    }
    Finding::fail(
        "root",
        "not run as root: what follows may be wrong for that reason alone",
        "run it as root, as the agent will be",
    )
}

/// Pools: there, with space, and with locks that hold.
pub(super) async fn pools(options: &AgentOptions) -> Vec<Finding> {
    let pools = match Pools::open(options.pool_configs()) {
        Ok(pools) => pools,
        Err(error) => return vec![Finding::fail("pools", error.to_string(), "declare each pool once, with an absolute path")],
    };
    let declared = options.pools.clone();
    let look = move || {
        let mut findings: Vec<Finding> =
            pools.conditions().into_iter().map(|condition| Finding::of(condition, Level::Fail)).collect();
        let free = pools.free();
        for facts in pools.facts() {
            let free = free.iter().find(|(name, _)| *name == facts.name).map_or(0, |(_, free)| free.get());
            let message = format!("pool {}: {} of {} free", facts.name, godwit_model::Bytes(free), facts.capacity);
            findings.push(if free < facts.capacity.get() / LOW_SHARE {
                Finding::warn("pool_space", message, "make space, or move volumes to another pool")
            } else {
                Finding::ok("pool_space", message)
            });
            let path = declared.iter().find(|(name, ..)| *name == facts.name).map(|(_, path, _)| path.as_path());
            findings.extend(path.map(|path| locks(&facts.name, path, facts.shared)));
        }
        findings
    };
    if options.pools.is_empty() {
        return vec![Finding::ok("pools", "no pool was named; VMs with disks need one (--pool NAME=DIR)")];
    }
    of_storage(look).await.unwrap_or_else(|| {
        vec![Finding::fail(
            "pools",
            "a pool's storage does not answer",
            "bring the storage back: look at its server and at `dmesg`",
        )]
    })
}

/// What volumes need of their storage, tried on each pool.
pub(super) async fn try_pools(options: &AgentOptions) -> Vec<Finding> {
    const NAME: &str = "pool_tried";
    const FIX: &str = "keep no VMs on this storage as it is: mount it otherwise, or use another file system";
    let mut findings = vec![];
    for config in options.pool_configs() {
        let pool = config.name.clone();
        let finding = |tried: Tried| {
            let about = format!("pool {pool}, {}", tried.what);
            match tried.outcome {
                Ok(Seen::Right) => Finding::ok(NAME, format!("{about}: as it must be")),
                Ok(Seen::Restricted(how)) => Finding::warn(NAME, format!("{about}: {how}"), "nothing, if that is acceptable"),
                Err(wrong) => Finding::fail(NAME, format!("{about}: {wrong}"), FIX),
            }
        };
        match tokio::task::spawn_blocking(move || try_pool(&config)).await {
            Ok(tried) => findings.extend(tried.into_iter().map(finding)),
            Err(error) => findings.push(Finding::fail(NAME, format!("pool {pool}: {error}"), FIX)),
        }
    }
    findings
}

/// Whether locks on the pool's file system hold, here and as far as a mount can promise, between hosts.
fn locks(pool: &Name, path: &Path, shared: bool) -> Finding {
    const NAME: &str = "pool_locks";
    const FIX: &str = "mount it with working locks: NFS 4, or NFS 3 without nolock and local_lock";
    match locks_hold(path) {
        Ok(true) => {}
        Ok(false) => return Finding::fail(NAME, format!("pool {pool}: a lock did not keep another one out"), FIX),
        Err(error) => return Finding::fail(NAME, format!("pool {pool}: locks cannot be had: {error}"), FIX),
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    match mount_of(&mounts, &path) {
        Some((kind, options)) if shared && is_local_lock(&options) => {
            Finding::fail(NAME, format!("pool {pool}: its {kind} is mounted so that locks hold on this host only"), FIX)
        }
        Some((kind, _)) if shared => Finding::ok(NAME, format!("pool {pool}: locks hold on this host; {kind} passes them on")),
        _ => Finding::ok(NAME, format!("pool {pool}: locks hold")),
    }
}

/// Kind and options of the mount that holds `path`.
fn mount_of(mountinfo: &str, path: &Path) -> Option<(String, String)> {
    let mounts = mountinfo.lines().filter_map(|line| {
        let (mount, source) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?.replace("\\040", " ");
        let mut source = source.split(' ');
        Some((point, source.next()?.to_owned(), source.nth(1)?.to_owned()))
    });
    let holds = mounts.filter(|(point, ..)| path.starts_with(point));
    // Of mounts at the same place the last is on top.
    holds.max_by_key(|(point, ..)| point.len()).map(|(_, kind, options)| (kind, options))
}

fn is_local_lock(options: &str) -> bool {
    options.split(',').any(|option| option == "nolock" || option.strip_prefix("local_lock=").is_some_and(|which| which != "none"))
}

/// Makes a network and a tap in a namespace that is gone afterwards, and looks at what of this host limits networks.
pub(super) async fn networks() -> Vec<Finding> {
    const FIX: &str = "load the modules bridge, vxlan and tun; the agent needs CAP_NET_ADMIN";
    let tried = tokio::task::spawn_blocking(|| std::thread::spawn(try_network).join());
    let tried = match tried.await {
        Ok(Ok(result)) => result,
        _ => Err("the attempt ended unexpectedly".to_owned()),
    };
    let mut findings = vec![match tried {
        Ok(()) => Finding::ok("network", "bridges, VXLAN and taps can be made"),
        Err(error) => Finding::fail("network", format!("a network with a tap cannot be made: {error}"), FIX),
    }];
    if let Ok(network) = HostNetwork::open(Ipv4Addr::LOCALHOST.into()).await {
        let found = network.conditions().await;
        let filtered = found.iter().any(|condition| condition.name == "bridge_netfilter");
        findings.extend(found.into_iter().map(|condition| Finding::of(condition, Level::Warn)));
        if !filtered {
            findings.push(Finding::ok("bridge_netfilter", "the host's firewall leaves frames between guests alone"));
        }
    }
    findings
}

#[expect(unsafe_code, reason = "unshare may take away what other threads rely on")]
fn try_network() -> Result<(), String> {
    // SAFETY: only this thread, which ends with this function, changes its network namespace; descriptors stay shared.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.map_err(|error| error.to_string())?;
    let told = |error: &dyn std::error::Error| {
        let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
        format!("{error}{cause}")
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
    runtime.block_on(async {
        let network = HostNetwork::open(IpAddr::from(Ipv4Addr::LOCALHOST)).await.map_err(|error| told(&error))?;
        let name = Name::new("check").map_err(|error| error.to_string())?;
        let id = NetworkId::new(uuid::Uuid::nil());
        let probe = FleetNetwork { id, name: name.clone(), mtu: PROBE_MTU, kind: Kind::Overlay { vni: PROBE_VNI } };
        network.apply(&FleetNetworks { networks: vec![probe], ..FleetNetworks::default() }).await.map_err(|error| told(&error))?;
        let nic = ResolvedNic {
            network: name,
            mac: MacAddress([0x52, 0x54, 0, 0, 0, 1]),
            model: NicModel::Virtio,
            addresses: Vec::new(),
            link_up: true,
            slot: Some(0),
            network_id: Some(id),
            mtu: None,
        };
        network.create_tap(&nic, VmId::new(uuid::Uuid::nil()), 0).await.map(|_| ()).map_err(|error| told(&error))
    })
}

/// Rules against what guests may not send are nftables' rules.
pub(super) async fn nftables() -> Finding {
    const NAME: &str = "nftables";
    const FIX: &str = "install nftables (Debian: nftables), on a kernel with nf_tables";
    let ran = tokio::process::Command::new("nft")
        .args(["list", "tables"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .status();
    match tokio::time::timeout(LIMIT, ran).await {
        Ok(Ok(status)) if status.success() => Finding::ok(NAME, "nftables answers"),
        Ok(Ok(_)) => Finding::warn(NAME, "nft is there, but the kernel does not answer it", FIX),
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => Finding::warn(NAME, "there is no nft in PATH", FIX),
        Ok(Err(error)) => Finding::warn(NAME, format!("nft cannot be run: {error}"), FIX),
        Err(_) => Finding::warn(NAME, "nft does not answer", FIX),
    }
}

/// Whether it has joined, how its certificate stands, and how far its clock is from the controller's.
pub(super) async fn identity(identity: Option<Identity>) -> Vec<Finding> {
    let Some(identity) = identity else {
        return vec![Finding::ok(
            "joined",
            "this host has not joined yet: its clock is compared with the controller's once it has",
        )];
    };
    let mut findings =
        vec![Finding::ok("joined", format!("this is host {} of the cluster of {}", identity.name, identity.controller))];
    let now = i64::try_from(unix_now().get() / 1_000).unwrap_or(i64::MAX);
    findings.push(of_certificate(identity.validity(), now));
    findings.push(match tokio::time::timeout(LIMIT, offset(&identity)).await {
        Ok(Ok(offset)) => of_skew(offset),
        Ok(Err(reason)) => unreachable_controller(&reason),
        Err(_) => unreachable_controller("it does not answer"),
    });
    findings
}

fn unreachable_controller(reason: &str) -> Finding {
    Finding::warn(
        "controller",
        format!("the controller cannot be asked for its clock: {reason}"),
        "check that `godwit serve` runs and that its link's port can be reached; VMs run on meanwhile",
    )
}

/// How the certificate stands: its agent renews it when a little more than half of its life is over.
fn of_certificate(validity: Option<(i64, i64)>, now: i64) -> Finding {
    const NAME: &str = "certificate";
    let Some((begins, ends)) = validity else {
        return Finding::fail(NAME, "the host's certificate cannot be read", "join again: `godwit host join --rejoin`");
    };
    let days = |seconds: i64| seconds / (24 * 3_600);
    if now > ends {
        return Finding::fail(
            NAME,
            format!("the host's certificate ended {} days ago", days(now - ends)),
            "start its agent where it reaches the controller; if that refuses, join again: `godwit host token NAME --rejoin`, then \
             `godwit host join --rejoin`",
        );
    }
    if now < begins {
        return Finding::fail(
            NAME,
            "the host's certificate is not good yet: the clock is behind",
            "set the clock, and keep it by NTP",
        );
    }
    let message = format!("the host's certificate ends in {} days", days(ends - now));
    if ends - now < (ends - begins) / 4 {
        return Finding::warn(NAME, message, "look into the agent's log, which says why it is not renewed");
    }
    Finding::ok(NAME, message)
}

/// The controller's clock less this host's, as far as the way there lets it be known.
async fn offset(identity: &Identity) -> Result<Duration, String> {
    let config = identity.material().client_config().map_err(|error| error.to_string())?;
    let channel = dial::dial(&identity.controller, config).await.map_err(|error| error.to_string())?;
    let mut client = LinkClient::new(channel);
    let (asked, before) = (Instant::now(), unix_now());
    let answer = client.clock(ClockRequest {}).await.map_err(|status| status.message().to_owned())?.into_inner();
    let middle = Duration::from_millis(before.get()) + asked.elapsed() / 2;
    Ok(middle.abs_diff(Duration::from_millis(answer.unix_ms)))
}

fn of_skew(skew: Duration) -> Finding {
    const NAME: &str = "clock_skew";
    let message = format!("this host's clock and the controller's differ by {} ms", skew.as_millis());
    if skew <= MAX_SKEW {
        return Finding::ok(NAME, message);
    }
    Finding::fail(
        NAME,
        format!("{message}: grants seem older or younger here than they are"),
        "let both keep time by NTP (`systemctl enable --now systemd-timesyncd`, or chrony)",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_and_clocks_are_judged_by_their_distance() {
        const DAY: i64 = 24 * 3_600;
        let level = |now| of_certificate(Some((0, 30 * DAY)), now).level;
        let table = [
            (-1, Level::Fail),
            (0, Level::Ok),
            (20 * DAY, Level::Ok),
            (23 * DAY, Level::Warn),
            (30 * DAY, Level::Warn),
            (30 * DAY + 1, Level::Fail),
        ];
        for (now, expected) in table {
            assert_eq!(level(now), expected, "at {now}");
        }
        assert_eq!(of_certificate(None, 0).level, Level::Fail);
        assert_eq!(of_skew(MAX_SKEW).level, Level::Ok);
        assert_eq!(of_skew(MAX_SKEW + Duration::from_millis(1)).level, Level::Fail);
    }

    #[test]
    fn a_mount_without_locks_between_hosts_is_recognised() {
        let mounts = "21 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n\
                      40 21 0:50 / /mnt/vms rw,relatime shared:9 - nfs4 srv:/vms rw,vers=4.2,local_lock=none\n\
                      41 21 0:51 / /mnt/old rw - nfs srv:/old rw,vers=3,nolock,local_lock=all\n\
                      42 21 0:52 / /mnt/a\\040b rw - nfs srv:/b rw,vers=3,local_lock=posix\n";
        let mount = |path: &str| mount_of(mounts, Path::new(path)).expect("a mount");
        assert_eq!(mount("/mnt/vms/x").0, "nfs4");
        assert_eq!(mount("/mnt/vmsx").0, "ext4");
        for (path, local) in [("/mnt/vms", false), ("/mnt/old/pool", true), ("/mnt/a b", true), ("/srv", false)] {
            assert_eq!(is_local_lock(&mount(path).1), local, "{path}");
        }
    }

    #[test]
    fn locks_are_tried_on_the_file_system_itself() {
        let dir = tempfile::tempdir().expect("dir");
        let pool = Name::new("fast").expect("name");
        assert_eq!(locks(&pool, dir.path(), true).level, Level::Ok);
        assert_eq!(std::fs::read_dir(dir.path()).expect("there").count(), 0, "something was left");
        assert_eq!(locks(&pool, &dir.path().join("gone"), true).level, Level::Fail);
    }

    #[tokio::test]
    async fn a_network_is_made_where_nobody_sees_it() {
        let interfaces = || {
            let mut names: Vec<_> =
                std::fs::read_dir("/sys/class/net").expect("sysfs").map(|entry| entry.expect("entry").file_name()).collect();
            names.sort();
            names
        };
        let before = interfaces();
        let findings = networks().await;
        assert_eq!(interfaces(), before, "it was made on the host");
        let network = findings.iter().find(|finding| finding.name == "network").expect("looked at");
        assert_eq!(network.level, Level::Ok, "{network:?}");
    }
}
