//! What all parts of the agent share: the host's journal, storage, network, identity, and the way out to the controller.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use godwit_link::v1::agent_message::Body;
use godwit_link::v1::link_client::LinkClient;
use godwit_link::v1::{self, AgentMessage};
use godwit_model::{Bytes, ErrorCode, HostFacts, HostLoad, HugePages, Name, Refusal, Retry, UnixMillis, VmId};
use godwit_qemu::cage::{KeptLog, Launcher};
use godwit_qemu::cgroup::{self, CgroupLimits, VmCgroup};
use godwit_vault::Shelf;
use tokio::sync::{Notify, mpsc};
use tonic::transport::Channel;

use crate::AgentOptions;
use crate::budget::Budget;
use crate::facts::{self, FactError, Said};
use crate::guest::Guests;
use crate::identity::Identity;
use crate::journal::{EndedMove, Journal, JournalError};
use crate::network::HostNetwork;
use crate::nodes::MemoryNode;
use crate::peers::Peers;
use crate::storage::{ImageCache, Pools};
use crate::turns::Turns;
use crate::vm::Uids;

/// Shared by everything in one agent.
pub(crate) struct Host {
    pub(crate) options: AgentOptions,
    pub(crate) identity: Identity,
    pub(crate) journal: Journal,
    pub(crate) pools: Arc<Pools>,
    pub(crate) images: ImageCache,
    /// What is kept of the memory of VMs that left; none if nothing is to be kept, or can be.
    pub(crate) stays: Option<Shelf>,
    pub(crate) network: HostNetwork,
    pub(crate) facts: HostFacts,
    pub(crate) launcher: Launcher,
    pub(crate) controller: Controller,
    pub(crate) memory: Ledger,
    /// Storage has been asked and has not answered.
    pub(crate) asking: Arc<AtomicBool>,
    pub(crate) uids: Uids,
    pub(crate) guests: Guests,
    pub(crate) reports: Mutex<BTreeMap<VmId, v1::VmReport>>,
    pub(crate) peers: Peers,
    pub(crate) budget: Budget,
    /// Which of the VMs that leave may stand still.
    pub(crate) turns: Turns,
    /// A VM's QEMU has ended, and its taps with it.
    pub(crate) interfaces_ended: Notify,
}

impl Host {
    /// Where carry listens.
    pub(crate) fn migration_address(&self) -> IpAddr {
        self.options.migration_address.unwrap_or(self.identity.migration_address)
    }

    /// What another host's agent has said, if it is to be believed.
    pub(crate) fn open_fact(&self, text: &str) -> Result<Said, FactError> {
        facts::open(&self.identity.material(), &self.peers, text, unix_now())
    }

    /// The directory of a VM's sockets: short, since socket paths are limited.
    pub(crate) fn vm_dir(&self, vm: VmId) -> PathBuf {
        self.options.run_dir.join(short(vm))
    }

    /// The socket of a VM's carry for this lane: not in the VM's own directory, whose owner could replace it.
    pub(crate) fn carry_socket(&self, vm: VmId, lane: u16) -> PathBuf {
        let name = if lane == 0 { short(vm).to_string() } else { format!("{}.{lane}", short(vm)) };
        self.options.run_dir.join("carry").join(name)
    }

    /// The uid of every carry of this host.
    pub(crate) const fn carry_uid(&self) -> u32 {
        self.options.uid_base
    }

    /// The uid of every vault worker: the same on all hosts, since they share vaults; the kernel's user for those who are nobody, who owns nothing else.
    pub(crate) const fn vault_uid(&self) -> u32 {
        NOBODY
    }

    /// A cgroup for a VM, with its limits as far as this host can set them; none where there is no hierarchy. The host's conditions say so.
    pub(crate) fn make_cgroup(&self, vm: VmId, memory: Bytes, node: Option<&MemoryNode>) -> Option<PathBuf> {
        let parent = cgroup::hierarchy().ok()?.join(&self.options.cgroup);
        match VmCgroup::create(&parent, &short(vm), CgroupLimits::for_ram(memory)) {
            Ok((group, _)) => {
                // The process is kept on the node's processors in any case.
                if let Some(Err(unapplied)) = node.map(|node| group.bind(&parent, &node.cpus, node.id)) {
                    tracing::info!(limit = unapplied.limit, reason = unapplied.reason, "the VM's cgroup is not bound to its node");
                }
                Some(group.path().to_owned())
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "the VM gets no cgroup");
                None
            }
        }
    }

    /// Sets the memory that a VM's processes may use, where it has a cgroup with that limit.
    pub(crate) fn limit_memory(&self, vm: VmId, memory: Bytes) -> Result<(), Refusal> {
        let (Ok(root), Some(most)) = (cgroup::hierarchy(), CgroupLimits::for_ram(memory).memory_max) else { return Ok(()) };
        let group = VmCgroup::at(&root.join(&self.options.cgroup), &short(vm));
        group.limit_memory(most).map_err(|error| host_failed("the VM's limit of memory could not be set", &error))
    }

    /// Removes what [`Host::make_cgroup`] made; the VM's processes are gone.
    pub(crate) fn remove_cgroup(&self, vm: VmId) {
        let Ok(root) = cgroup::hierarchy() else { return };
        let group = VmCgroup::at(&root.join(&self.options.cgroup), &short(vm));
        if let Err(error) = group.remove(Duration::from_secs(1)) {
            tracing::warn!(error = &error as &dyn std::error::Error, "the VM's cgroup stays");
        }
    }

    /// A log of a child, which a keeper bounds: what has grown large moves to `.old`, and what was there is gone.
    pub(crate) fn log(&self, name: &str) -> std::io::Result<KeptLog> {
        const LIMIT: Bytes = Bytes::mib(4);
        let dir = self.options.state_dir.join("log");
        std::fs::create_dir_all(&dir)?;
        let path = dir.join(format!("{name}.log"));
        let open = |path: &Path| std::fs::OpenOptions::new().create(true).read(true).append(true).open(path);
        Ok(KeptLog { current: open(&path)?.into(), older: open(&path.with_extension("old"))?.into(), limit: LIMIT })
    }

    /// Load for a heartbeat. Storage that hangs is left out rather than waited for.
    pub(crate) async fn load(&self) -> HostLoad {
        let vms = u32::try_from(self.memory.holders()).unwrap_or(u32::MAX);
        // One question at a time: storage that hangs must not collect threads.
        let pools_free = if self.asking.swap(true, Ordering::AcqRel) {
            vec![]
        } else {
            let (pools, asking) = (Arc::clone(&self.pools), Arc::clone(&self.asking));
            let answer = move || {
                let free = pools.free();
                asking.store(false, Ordering::Release);
                free
            };
            of_storage(answer).await.unwrap_or_default()
        };
        HostLoad { memory_free: self.memory.free(), vms, pools_free, networks: self.network.offer() }
    }

    /// Keeps how a move ended here, and tells the controller until it has stored it.
    pub(crate) fn end_move(&self, ended: &EndedMove) -> Result<(), JournalError> {
        self.journal.write_ended(ended)?;
        self.controller.send(Body::Ended(ended_message(ended)));
        Ok(())
    }

    /// The name of a VM's log: teams may use the same name.
    pub(crate) fn log_name(&self, name: &Name, vm: VmId) -> String {
        format!("vm-{name}-{}", short(vm))
    }

    /// Tells every report again.
    pub(crate) fn report_all(&self) {
        for report in self.reports.lock().unwrap_or_else(PoisonError::into_inner).values() {
            self.controller.send(Body::Vm(report.clone()));
        }
        self.guests.tell_all(&self.controller);
    }

    /// What is reported of a VM; told at once, and again at every hello.
    pub(crate) fn report(&self, vm: VmId, report: Option<v1::VmReport>) {
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        match report {
            Some(report) => {
                if reports.get(&vm) != Some(&report) {
                    reports.insert(vm, report.clone());
                    self.controller.send(Body::Vm(report));
                }
            }
            None => drop(reports.remove(&vm)),
        }
    }
}

/// Asks storage something, for a moment: a network file system whose server is away answers never. `None` then.
pub(crate) async fn of_storage<T: Send + 'static>(question: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    const LIMIT: Duration = Duration::from_secs(2);
    let asked = tokio::task::spawn_blocking(question);
    tokio::time::timeout(LIMIT, asked).await.ok()?.ok()
}

/// The first 12 hexadecimal digits of a VM's id: enough to be unique on a host, short enough for a socket's path.
fn short(vm: VmId) -> String {
    vm.uuid().simple().to_string().chars().take(12).collect()
}

pub(crate) fn ended_message(ended: &EndedMove) -> v1::MigrationEnded {
    v1::MigrationEnded {
        task: ended.task.to_string(),
        vm: ended.vm.to_string(),
        generation: ended.generation.0,
        source: ended.source,
        moved: ended.reason.is_none(),
        reason: ended.reason.as_ref().map(Into::into),
        figures: godwit_link::encode(&ended.figures),
    }
}

/// Milliseconds since 1970: for what is shown and for expiry, never for durations.
pub(crate) fn unix_now() -> UnixMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMillis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// The way to the controller, while there is one.
#[derive(Default)]
pub(crate) struct Controller {
    session: Mutex<Option<(mpsc::UnboundedSender<AgentMessage>, LinkClient<Channel>)>>,
}

impl Controller {
    /// A session has begun or ended.
    pub(crate) fn set(&self, session: Option<(mpsc::UnboundedSender<AgentMessage>, LinkClient<Channel>)>) {
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = session;
    }

    /// Says `body` if there is a session. What must arrive is said again at the next hello.
    pub(crate) fn send(&self, body: Body) {
        if let Some((sender, _)) = &*self.session.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = sender.send(AgentMessage { body: Some(body) });
        }
    }

    /// A client for calls beside the session.
    pub(crate) fn client(&self) -> Result<LinkClient<Channel>, Refusal> {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        session
            .as_ref()
            .map(|(_, client)| client.clone())
            .ok_or_else(|| Refusal::new(ErrorCode::HostDown, "the host has lost its controller").retry(Retry::Safe))
    }
}

/// Memory promised to VMs: those here and those expected here.
#[derive(Debug)]
pub(crate) struct Ledger {
    total: Bytes,
    held: Mutex<BTreeMap<VmId, Promise>>,
}

/// What one VM was promised.
#[derive(Clone, Copy, Debug, Default)]
struct Promise {
    memory: Bytes,
    /// The memory node that it is on.
    node: Option<u32>,
}

/// The kernel's user for those who are nobody.
pub(crate) const NOBODY: u32 = 65_534;

/// What QEMU itself needs beside the guest's RAM.
const OVERHEAD: Bytes = Bytes::mib(64);

impl Ledger {
    pub(crate) fn new(total: Bytes) -> Self {
        Self { total, held: Mutex::new(BTreeMap::new()) }
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, BTreeMap<VmId, Promise>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn holders(&self) -> usize {
        self.locked().len()
    }

    /// Memory that further VMs may use.
    pub(crate) fn free(&self) -> Bytes {
        let held: u64 = self.locked().values().map(|promise| promise.memory.get()).sum();
        Bytes(self.total.get().saturating_sub(held))
    }

    /// Promises `memory` to `vm`, in place of what it was promised before.
    pub(crate) fn reserve(&self, vm: VmId, memory: Bytes) -> Result<(), Refusal> {
        let wanted = Bytes(memory.get().saturating_add(OVERHEAD.get()));
        let mut held = self.locked();
        let others: u64 = held.iter().filter(|(holder, _)| **holder != vm).map(|(_, promise)| promise.memory.get()).sum();
        let free = Bytes(self.total.get().saturating_sub(others));
        if wanted > free {
            let missing = Bytes(wanted.get() - free.get());
            return Err(Refusal::new(
                ErrorCode::NotEnoughMemory,
                format!("the VM needs {wanted} with QEMU's own share, the host has {free} for VMs: {missing} are missing"),
            )
            .hint("choose another host, or stop or move a VM away from this one")
            .retry(Retry::Safe));
        }
        held.entry(vm).or_default().memory = wanted;
        Ok(())
    }

    /// Puts `vm`, which was promised its memory, on the one of `nodes` with most room for it.
    pub(crate) fn put_on_a_node(&self, vm: VmId, pages: Option<HugePages>, nodes: &[MemoryNode]) -> Result<u32, Refusal> {
        let mut held = self.locked();
        let wanted = held.get(&vm).map(|promise| promise.memory).unwrap_or_default();
        let room = |node: &MemoryNode| {
            let others = held.iter().filter(|(holder, promise)| **holder != vm && promise.node == Some(node.id));
            (node.room(pages, Bytes(others.map(|(_, promise)| promise.memory.get()).sum())), node.id)
        };
        let best = nodes.iter().map(room).max_by_key(|(room, id)| (*room, std::cmp::Reverse(*id)));
        let (most, node) = best.unwrap_or_default();
        // Huge pages hold the guest's memory and nothing of QEMU's own.
        let needed = if pages.is_some() { Bytes(wanted.get().saturating_sub(OVERHEAD.get())) } else { wanted };
        if best.is_none() || needed > most {
            return Err(no_node(needed, most));
        }
        held.entry(vm).or_default().node = Some(node);
        Ok(node)
    }

    /// Whether `node` has room for `more`, which is among what a VM there is promised already and has not got yet.
    pub(crate) fn check_node(&self, node: u32, more: Bytes, pages: Option<HugePages>, nodes: &[MemoryNode]) -> Result<(), Refusal> {
        let held = self.locked();
        let promised: u64 = held.values().filter(|promise| promise.node == Some(node)).map(|promise| promise.memory.get()).sum();
        // What comes is among what was promised.
        let before = Bytes(promised.saturating_sub(more.get()));
        let room = nodes.iter().find(|other| other.id == node).map(|node| node.room(pages, before)).unwrap_or_default();
        if more > room { Err(no_node(more, room)) } else { Ok(()) }
    }

    /// Writes down where a VM of before is.
    pub(crate) fn is_on_node(&self, vm: VmId, node: Option<u32>) {
        if let Some(promise) = self.locked().get_mut(&vm) {
            promise.node = node;
        }
    }

    /// The VM is gone from here.
    pub(crate) fn release(&self, vm: VmId) {
        self.locked().remove(&vm);
    }
}

fn no_node(needed: Bytes, most: Bytes) -> Refusal {
    let message = format!("the VM needs {needed} on one memory node; the most that one has free for it is {most}");
    let refusal = Refusal::new(ErrorCode::NotEnoughMemory, message).retry(Retry::Safe);
    refusal.hint("stop or move a VM with `numa: one_node` away from this host, choose another host, or leave `numa` out")
}

/// An error with its causes, which `Display` leaves out.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(deeper) = cause {
        message.push_str(&format!(": {deeper}"));
        cause = deeper.source();
    }
    message
}

/// A failure of the host itself, with its cause.
pub(crate) fn host_failed(what: &str, error: &dyn std::error::Error) -> Refusal {
    Refusal::new(ErrorCode::HostFailed, format!("{what}: {}", with_causes(error))).hint("look at the host's log").retry(Retry::Safe)
}

/// Makes a directory that only root and, if given, one uid can use.
pub(crate) fn private_dir(path: &Path, owner: Option<u32>) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    if let Some(uid) = owner {
        std::os::unix::fs::chown(path, Some(uid), Some(uid))?;
    }
    Ok(())
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("name", &self.identity.name).finish_non_exhaustive()
    }
}

/// Shared everywhere.
pub(crate) type SharedHost = Arc<Host>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nodes::tests::tree;

    #[test]
    fn memory_is_promised_once_and_a_refusal_says_how_much_is_missing() {
        let ledger = Ledger::new(Bytes::mib(1_000));
        let (a, b) = (VmId::new(uuid::Uuid::from_u128(1)), VmId::new(uuid::Uuid::from_u128(2)));
        ledger.reserve(a, Bytes::mib(436)).expect("fits");
        ledger.reserve(a, Bytes::mib(436)).expect("the same promise again");
        assert_eq!(ledger.free(), Bytes::mib(500));
        let refusal = ledger.reserve(b, Bytes::mib(512)).expect_err("does not fit");
        assert_eq!(refusal.code, ErrorCode::NotEnoughMemory);
        assert!(refusal.message.contains("76 MiB are missing"), "{}", refusal.message);
        assert_eq!(ledger.reserve(a, Bytes::mib(937)).expect_err("too large").code, ErrorCode::NotEnoughMemory);
        assert_eq!(ledger.free(), Bytes::mib(500), "what was promised before stands");
        ledger.reserve(a, Bytes::mib(636)).expect("grows");
        assert_eq!(ledger.free(), Bytes::mib(300));
        ledger.reserve(a, Bytes::mib(436)).expect("put back");
        ledger.release(a);
        ledger.reserve(b, Bytes::mib(512)).expect("fits now");
    }

    #[test]
    fn vms_are_put_on_the_node_with_most_room_and_what_was_promised_counts_before_it_is_used() {
        let tree = tree(&[(0, "0-1", 4_096, 4_000, 0), (1, "2-3", 4_096, 3_000, 512)]);
        let nodes = crate::nodes::read(tree.path());
        let ledger = Ledger::new(Bytes::mib(16_384));
        let vm = |number| VmId::new(uuid::Uuid::from_u128(number));
        let put = |number, mib, pages| {
            ledger.reserve(vm(number), Bytes::mib(mib)).expect("promised");
            ledger.put_on_a_node(vm(number), pages, &nodes)
        };
        assert_eq!(put(1, 2_048, None), Ok(0));
        assert_eq!(put(1, 2_048, None), Ok(0), "again is the same");
        assert_eq!(put(2, 2_048, None), Ok(1), "nobody has used any of node 0 yet");
        assert_eq!(put(3, 1_024, Some(HugePages::Mib2)), Ok(1), "all of the huge pages");
        let refusal = put(4, 2_048, None).expect_err("no node has it");
        assert_eq!((refusal.code, refusal.hint.is_some()), (ErrorCode::NotEnoughMemory, true));
        ledger.release(vm(4));
        assert_eq!(put(5, 1_025, Some(HugePages::Mib2)).expect_err("too few pages").code, ErrorCode::NotEnoughMemory);
        ledger.release(vm(5));
        assert!(put(6, 64, Some(HugePages::Gib1)).is_err() && ledger.put_on_a_node(vm(1), None, &[]).is_err());
        ledger.release(vm(6));
        // What grows stays where it is.
        ledger.reserve(vm(1), Bytes::mib(3_072)).expect("promised");
        assert_eq!(ledger.check_node(0, Bytes::mib(1_024), None, &nodes), Ok(()));
        ledger.reserve(vm(1), Bytes::mib(5_120)).expect("promised");
        assert!(ledger.check_node(0, Bytes::mib(3_072), None, &nodes).is_err(), "there is more on the other node only");
        // As after a new start of the agent.
        let again = Ledger::new(Bytes::mib(16_384));
        again.reserve(vm(1), Bytes::mib(3_072)).expect("promised");
        again.is_on_node(vm(1), Some(0));
        again.reserve(vm(2), Bytes::mib(2_048)).expect("promised");
        assert_eq!(again.put_on_a_node(vm(2), None, &nodes), Ok(1));
    }
}
