//! Hosts for tests: network namespaces without names, joined by a switch. They end with the test, however it ends.

use std::fs::File;
use std::future::Future;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::pin::Pin;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use godwit_model::{MacAddress, Name, NetworkId, ResolvedNic, VmId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use super::super::{FleetNetwork, FleetNetworks, HostNetwork, Kind};

type Job = Box<dyn FnOnce(HostNetwork) -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// A namespace, which lives as long as this.
pub(super) struct Namespace(File);

impl Namespace {
    pub(super) fn new() -> Self {
        let made = std::thread::spawn(|| {
            enter_new_namespace();
            File::open("/proc/thread-self/ns/net").expect("namespace of this thread")
        });
        let namespace = Self(made.join().expect("a namespace"));
        namespace.run("ip", &["link", "set", "lo", "up"]);
        // The firewall of the host shall neither drop nor trim what tests send.
        for filter in ["iptables", "ip6tables", "arptables"] {
            let _ = namespace.inside(|| std::fs::write(format!("/proc/sys/net/bridge/bridge-nf-call-{filter}"), "0"));
        }
        namespace
    }

    /// A path under which other programs find it.
    pub(super) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Runs a program in it and returns what it prints.
    pub(super) fn run(&self, program: &str, arguments: &[&str]) -> String {
        self.inside(|| {
            let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().expect("run");
            assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8_lossy(&output.stdout).into_owned()
        })
    }

    /// Does something in it.
    pub(super) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let running = scope.spawn(|| {
                move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network)).expect("enter");
                work()
            });
            running.join().expect("work")
        })
    }
}

#[expect(unsafe_code, reason = "unshare may take away what other threads rely on")]
fn enter_new_namespace() {
    // SAFETY: only the network namespace of this fresh thread changes.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.expect("tests of the network need root");
}

/// A host with an open network, worked on by a thread in its namespace.
pub(super) struct Host {
    pub(super) namespace: Namespace,
    pub(super) address: IpAddr,
    jobs: UnboundedSender<Job>,
}

impl Host {
    fn start(namespace: Namespace, address: IpAddr) -> Self {
        let (jobs, mut queue) = unbounded_channel::<Job>();
        let entered = namespace.0.try_clone().expect("descriptor");
        std::thread::spawn(move || {
            move_into_link_name_space(entered.as_fd(), Some(LinkNameSpaceType::Network)).expect("enter");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            runtime.block_on(async {
                let network = HostNetwork::open(address).await.expect("open");
                while let Some(job) = queue.recv().await {
                    job(network.clone()).await;
                }
            });
        });
        Self { namespace, address, jobs }
    }

    /// Does `work` in the host's namespace.
    pub(super) fn call<T: Send + 'static, F: Future<Output = T>>(&self, work: impl FnOnce(HostNetwork) -> F + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        let job: Job = Box::new(move |network| {
            Box::pin(async move {
                let _ = done.send(work(network).await);
            })
        });
        self.jobs.send(job).expect("the host works");
        result.recv().expect("the work ends")
    }

    pub(super) fn apply(&self, fleet: &FleetNetworks) {
        let fleet = fleet.clone();
        self.call(|network| async move { network.apply(&fleet).await }).expect("apply");
    }

    /// A tap on network `lan`.
    pub(super) fn tap(&self, mac: MacAddress) -> Guest {
        self.join(&nic(mac, &[]))
    }

    /// A tap for this interface of a new VM.
    pub(super) fn join(&self, nic: &ResolvedNic) -> Guest {
        self.join_as(VmId::new(uuid::Uuid::new_v4()), nic)
    }

    /// A tap for this interface.
    pub(super) fn join_as(&self, vm: VmId, nic: &ResolvedNic) -> Guest {
        let nic = nic.clone();
        let tap = self.call(move |network| async move { network.create_tap(&nic, vm, 0).await }).expect("tap");
        Guest(File::from(tap))
    }

    /// What the host offers and has dropped, looked at now.
    pub(super) fn look(&self) -> godwit_model::HostNetworks {
        self.call(|network| async move {
            network.tend().await;
            network.offer()
        })
    }

    /// A new agent on the same host.
    pub(super) fn restart_agent(self) -> Self {
        Self::start(self.namespace, self.address)
    }
}

/// The network of most tests.
pub(super) fn lan() -> FleetNetwork {
    network(7, Kind::Overlay { vni: 7 })
}

/// A network whose name and id follow from a number.
pub(super) fn network(number: u128, kind: Kind) -> FleetNetwork {
    let name = if number == 7 { "lan".to_owned() } else { format!("net{number}") };
    FleetNetwork { id: NetworkId::new(uuid::Uuid::from_u128(number)), name: Name::new(name).expect("name"), mtu: 1_500, kind }
}

/// An interface on `lan` with these IP addresses.
pub(super) fn nic(mac: MacAddress, addresses: &[&str]) -> ResolvedNic {
    on(&lan(), mac, addresses)
}

/// An interface on a network.
pub(super) fn on(network: &FleetNetwork, mac: MacAddress, addresses: &[&str]) -> ResolvedNic {
    let addresses = addresses.iter().map(|address| address.parse().expect("address")).collect();
    ResolvedNic { network_id: Some(network.id), addresses, ..ResolvedNic::new(network.name.clone(), mac) }
}

/// So many hosts behind one switch.
pub(super) fn hosts<const N: usize>(mtu: u32) -> (Namespace, [Host; N]) {
    let switch = Namespace::new();
    switch.run("ip", &["link", "add", "br0", "mtu", &mtu.to_string(), "type", "bridge"]);
    switch.run("ip", &["link", "set", "br0", "up"]);
    let hosts = std::array::from_fn(|index| {
        let host = Namespace::new();
        let (port, mtu, address) = (format!("p{index}"), mtu.to_string(), Ipv4Addr::new(10, 77, 0, index as u8 + 1));
        let peer = ["peer", "name", "eth0", "mtu", &mtu, "netns", &host.path()];
        switch.run("ip", &[["link", "add", &port, "mtu", &mtu, "type", "veth"].as_slice(), &peer].concat());
        switch.run("ip", &["link", "set", &port, "master", "br0", "up"]);
        host.run("ip", &["link", "set", "eth0", "up"]);
        host.run("ip", &["addr", "add", &format!("{address}/24"), "dev", "eth0"]);
        Host::start(host, address.into())
    });
    (switch, hosts)
}

/// The VM's end of a tap.
pub(super) struct Guest(File);

impl Guest {
    /// Sends a frame of a protocol that nothing else speaks, with one byte of content.
    pub(super) fn send(&self, from: MacAddress, to: [u8; 6], content: u8) {
        let head: [&[u8]; 3] = [&to, &from.0, &[0x88, 0xb5]];
        self.send_frame(&[head.concat(), vec![content; 64]].concat());
    }

    /// Sends any frame.
    pub(super) fn send_frame(&self, frame: &[u8]) {
        let frame = [&[0; 10], frame].concat();
        assert_eq!((&self.0).write(&frame).expect("send"), frame.len());
    }

    /// Whether such a frame with this sender and content arrives within `patience`.
    pub(super) fn hears(&self, from: MacAddress, content: u8, patience: Duration) -> bool {
        self.hears_frame(patience, |frame| frame[6..12] == from.0 && frame[12..14] == [0x88, 0xb5] && frame[14] == content)
    }

    /// Whether a frame for which `is_it` holds arrives within `patience`.
    pub(super) fn hears_frame(&self, patience: Duration, is_it: impl Fn(&[u8]) -> bool) -> bool {
        let until = Instant::now() + patience;
        let mut buffer = [0; 2_048];
        loop {
            let left = Timespec::try_from(until.saturating_duration_since(Instant::now())).expect("short");
            if poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&left)).expect("poll") == 0 {
                return false;
            }
            let length = rustix::io::read(&self.0, &mut buffer).expect("read");
            let frame = buffer.get(10..length).expect("a virtio header");
            if is_it(frame) {
                return true;
            }
        }
    }

    pub(super) fn descriptor(self) -> OwnedFd {
        self.0.into()
    }
}

/// Repeats `attempt` until it succeeds; the test has failed if it does not within 20 s.
pub(super) fn until(what: &str, mut attempt: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !attempt() {
        assert!(Instant::now() < end, "{what}: not within 20 s");
    }
}
