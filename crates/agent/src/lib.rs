//! The agent: owns the QEMU processes, disks, bridges and moves of its host, and acts safely alone while the controller is away.
//!
//! Restarting it, or killing it at any line, never touches a running VM or a move: QEMU and carry outlive it, and a new agent goes on from the
//! journal and from what it sees. It must never decide who owns a VM by itself: [`godwit_migration`] does, from journalled grants and
//! releases. Start with [`vm`](self) actors in `vm.rs`, then `session.rs`.

mod background;
mod budget;
pub mod carry;
pub mod check;
mod console;
mod dial;
mod exports;
mod facts;
mod firmware;
mod grants;
mod guest;
mod host;
mod identity;
mod inventory;
mod journal;
mod network;
mod nodes;
mod peers;
mod power_off;
mod seed;
mod session;
pub mod snapshot;
mod storage;
mod tls;
mod turns;
mod vaults;
mod vm;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use godwit_model::{Bytes, HostCondition, Name};
use godwit_qemu::Launcher;
use godwit_vault::{Limits, Shelf};
use tokio::sync::{Notify, watch};

pub use identity::{JoinError, JoinOptions, join};

use guest::Guests;
use host::{Controller, Host, Ledger, of_storage, private_dir};
use identity::Identity;
use journal::Journal;
use network::{FleetNetworks, HostNetwork};
use session::Sessions;
use storage::{ImageCache, PoolConfig, Pools};
use vm::{Registry, Uids};

/// What the memory of VMs that left does not take of the file system.
const STAYS_RESERVE: Bytes = Bytes::mib(2_048);

/// What `godwit agent` is given.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// Identity, journal, images and logs.
    pub state_dir: PathBuf,
    /// Sockets; a short path.
    pub run_dir: PathBuf,
    /// QEMU's binary.
    pub qemu: PathBuf,
    /// Pools by name: directory, and whether other hosts see the same.
    pub pools: Vec<(Name, PathBuf, bool)>,
    /// Memory for VMs; by default all but 1 GiB or an eighth, whichever is more.
    pub memory: Option<Bytes>,
    /// Parent of the VMs' cgroups, relative to the cgroup v2 mount.
    pub cgroup: String,
    /// First of the 1,001 uids that carry and VMs get.
    pub uid_base: u32,
    /// Tunnel endpoints outside the cluster that take part in its networks, such as a gateway's.
    pub vteps: Vec<IpAddr>,
    /// The address at which carry listens, if not the one that the host joined with.
    pub migration_address: Option<IpAddr>,
    /// Disk for the memory of VMs that left, so that they come home quickly; zero keeps nothing.
    pub stays: Bytes,
    /// How often it is measured what a VM writes; never by `None`.
    pub sample_writes: Option<Duration>,
    /// Whether this host may set `vm.unprivileged_userfaultfd=1`, which QEMU 7.2 needs for post-copy and RAM snapshots.
    pub unprivileged_userfaultfd: bool,
}

impl AgentOptions {
    fn pool_configs(&self) -> Vec<PoolConfig> {
        let config =
            |(name, path, shared): &(Name, PathBuf, bool)| PoolConfig { name: name.clone(), path: path.clone(), shared: *shared };
        self.pools.iter().map(config).collect()
    }
}

/// Why an agent did not begin. VMs run on.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The host has not joined.
    #[error("{0}")]
    Identity(String),
    /// A directory of its own cannot be used.
    #[error("cannot use {path:?}")]
    Dir {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Another agent runs with the same state.
    #[error("another agent already runs with {0:?}")]
    Running(PathBuf),
    /// What is in the way, with what to do.
    #[error("{what}")]
    Begin {
        /// What was done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

fn begin<E: std::error::Error + Send + Sync + 'static>(what: &'static str) -> impl FnOnce(E) -> AgentError {
    move |source| AgentError::Begin { what, source: Box::new(source) }
}

/// Runs the agent until it is told to end. By SIGTERM or SIGINT: VMs run on. By SIGPWR, since the host goes down: all guests are powered off first.
///
/// # Errors
/// [`AgentError`] if it could not begin.
pub async fn run(options: AgentOptions) -> Result<(), AgentError> {
    let dir = |path: &PathBuf| {
        let path = path.clone();
        move |source| AgentError::Dir { path, source }
    };
    private_dir(&options.state_dir, None).map_err(dir(&options.state_dir))?;
    let _lock = lock(&options.state_dir)?;
    let identity = Identity::load(&options.state_dir).map_err(|error| AgentError::Identity(error.to_string()))?;
    let run_dir = options.run_dir.clone();
    // VMs and carry must reach their own directories in it, nobody may list it.
    std::fs::create_dir_all(&run_dir).map_err(dir(&run_dir))?;
    private_dir(&run_dir.join("carry"), None).map_err(dir(&run_dir))?;
    let only_pass = std::os::unix::fs::PermissionsExt::from_mode(0o711);
    std::fs::set_permissions(&run_dir, only_pass).map_err(dir(&run_dir))?;

    let journal = Journal::open(options.state_dir.join("journal")).map_err(begin("the journal cannot be opened"))?;
    let records = journal.vms().map_err(begin("the journal cannot be read"))?;
    let uids: BTreeMap<_, _> = records.iter().map(|(vm, record)| (*vm, record.uid)).collect();
    let profiles = check::load_profiles(&options).await;
    let without_profiles = check::of_profiles(profiles.as_ref().err()).condition();
    let launcher = Launcher::godwit("/proc/self/exe".into()).with_profiles(profiles.ok());
    let pools = Pools::open(options.pool_configs()).map_err(begin("a pool cannot be used"))?;
    let pools = Arc::new(pools.with_cage(&launcher));
    let images = ImageCache::open(options.state_dir.join("images")).map_err(begin("the image cache cannot be used"))?;
    let stays = open_shelf(&options);
    let network = HostNetwork::open(identity.address).await.map_err(begin("the network cannot be used"))?;
    inventory::end_orphans(&records, options.uid_base);
    let nic = |vm, slot| {
        let spec = &records.get(&vm)?.spec;
        spec.nic_slots().find(|(place, _)| *place == slot).map(|(_, nic)| nic.clone())
    };
    network.adopt(nic).await.map_err(begin("the network cannot be used"))?;
    let mut conditions = network.conditions().await;
    conditions.extend(without_profiles);
    let asked = Arc::clone(&pools);
    let (pool_facts, pool_conditions) = of_storage(move || (asked.facts(), asked.conditions())).await.unwrap_or_else(|| {
        let condition = HostCondition {
            name: "pools".into(),
            message: "a pool's storage does not answer; no pool is offered".into(),
            fix: "bring the storage back and restart the agent; VMs are not touched by that".into(),
        };
        (vec![], vec![condition])
    });
    conditions.extend(pool_conditions);
    let facts = inventory::take(&options, &launcher, pool_facts, conditions).await.map_err(begin("QEMU cannot be used"))?;

    let memory = Ledger::new(facts.memory);
    let uids = Uids::new(options.uid_base, uids);
    let host = Arc::new(Host {
        options,
        identity,
        journal,
        pools,
        images,
        stays,
        network,
        facts,
        launcher,
        controller: Controller::default(),
        memory,
        asking: Arc::default(),
        uids,
        guests: Guests::default(),
        reports: Mutex::default(),
        peers: peers::Peers::default(),
        budget: budget::Budget::default(),
        turns: turns::Turns::default(),
        interfaces_ended: Notify::new(),
    });
    let vms = Registry::begin(Arc::clone(&host), records.into_values());
    let (fleet, changes) = watch::channel(FleetNetworks::default());
    let sessions = tokio::spawn(Sessions::new(Arc::clone(&host), Arc::clone(&vms), fleet).run());
    let networks = tokio::spawn(keep_networks(Arc::clone(&host), changes));
    let filters = tokio::spawn(keep_filters(Arc::clone(&host)));
    tracing::info!("the agent runs");
    let ended = ended().await;
    sessions.abort();
    if let Ok(End::WithTheHost) = ended {
        tracing::info!("the host goes down");
        // What happens from now on is said when the host is back: the controller would start again what ends.
        let _ = sessions.await;
        host.controller.set(None);
        power_off::power_off(&host, &vms).await;
    }
    networks.abort();
    filters.abort();
    ended.map(drop).map_err(begin("signals cannot be heard"))
}

/// Makes the networks what the controller says, and tries again while that fails.
async fn keep_networks(host: Arc<Host>, mut changes: watch::Receiver<FleetNetworks>) {
    const AGAIN: Duration = Duration::from_secs(5);
    while changes.changed().await.is_ok() {
        loop {
            let fleet = changes.borrow_and_update().clone();
            match host.network.apply(&fleet).await {
                Ok(()) => break,
                Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "the networks are not what they should be"),
            }
            if tokio::time::timeout(AGAIN, changes.changed()).await.is_ok_and(|changed| changed.is_err()) {
                return;
            }
        }
    }
}

/// Looks after what guests may send, and at what was dropped of it.
async fn keep_filters(host: Arc<Host>) {
    const EVERY: Duration = Duration::from_secs(5);
    loop {
        // Taps go when QEMU goes: whether there is anything to remove is seen, not told.
        let _ = tokio::time::timeout(EVERY, host.interfaces_ended.notified()).await;
        host.network.tend().await;
    }
}

/// Where memory of VMs that left is kept. Whatever is in the way costs bytes when they come home, and nothing else.
fn open_shelf(options: &AgentOptions) -> Option<Shelf> {
    if options.stays == Bytes(0) {
        return None;
    }
    let limits = Limits { stays: options.stays, reserve: STAYS_RESERVE };
    Shelf::open(&options.state_dir.join("stays"), limits)
        .inspect_err(|error| tracing::warn!(error = error as &dyn std::error::Error, "no memory is kept of VMs that leave"))
        .ok()
}

fn lock(state_dir: &std::path::Path) -> Result<std::fs::File, AgentError> {
    let path = state_dir.join("lock");
    let file = std::fs::File::create(&path).map_err(|source| AgentError::Dir { path: path.clone(), source })?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(_) => Err(AgentError::Running(path)),
    }
}

/// Why the agent ends.
enum End {
    Alone,
    WithTheHost,
}

async fn ended() -> std::io::Result<End> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut power = signal(SignalKind::from_raw(libc::SIGPWR))?;
    Ok(tokio::select! {
        _ = terminate.recv() => End::Alone,
        _ = interrupt.recv() => End::Alone,
        _ = power.recv() => End::WithTheHost,
    })
}
