//! Brings a QEMU into being: memory promised, images fetched, disks checked and opened, taps made, its TPM started, then the cage. Whatever fails, nothing is
//! left; and no vCPU runs before the journal knows the process.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use godwit_link::v1::FetchImageRequest;
use godwit_migration::Outcome;
use godwit_model::{Accelerator, ErrorCode, Grant, ImageRef, Numa, Refusal, ResolvedSpec, RestoreFigures, Retry, RunState, VmId};
use godwit_qemu::cage::{self, CagePlan, DeviceNode, Limit, Network, PassedFds, Profile};
use godwit_qemu::command::{DiskFds, qemu_arguments};
use godwit_qemu::qmp::views::RunStatus;
use godwit_qemu::{Qmp, Resources, Sockets, Start};

use super::actor::{Actor, qemu_failed};
use super::change::{open_disk, open_flash};
use super::disks::into::open_arriving;
use super::playing::EndReason;
use crate::host::{SharedHost, host_failed, private_dir};
use crate::journal::{Holding, VmRecord};
use crate::nodes::{self, NODES};
use crate::seed;
use crate::snapshot::FromSnapshot;
use crate::storage::CachedImage;

/// Time for a new QEMU to answer its monitor.
const GREETING: Duration = Duration::from_secs(60);

impl Actor {
    /// Starts the VM on a fresh generation.
    pub(super) async fn start(
        &mut self,
        grant: Grant,
        spec: ResolvedSpec,
        from: Option<&FromSnapshot>,
    ) -> Result<Option<RestoreFigures>, Refusal> {
        if self.record.as_ref().is_none_or(|record| record.generation != grant.generation) {
            self.above_floor(grant.generation)?;
        }
        if let Some(record) = &self.record {
            if record.generation > grant.generation || (record.generation == grant.generation && record.holding != Holding::Owner) {
                let (held, granted) = (record.generation, grant.generation);
                return Err(Refusal::new(
                    ErrorCode::GenerationStale,
                    format!("this host knows generation {held}, granted was {granted}"),
                ));
            }
            if from.is_some() && self.process.is_none() && record.generation == grant.generation && record.whole {
                return Ok(Some(RestoreFigures::default()));
            }
            if self.process.is_some() {
                if record.generation != grant.generation {
                    return Err(Refusal::new(ErrorCode::VmRunning, "the VM already runs on this host on an older generation"));
                }
                // QEMU may answer nothing before it is served.
                if let Some(from) = from
                    && let Err(refusal) = self.serve_fills_again(from).await
                {
                    tracing::warn!(message = refusal.message, "the VM's disks are not served by this agent");
                }
                if from.is_none() || self.has_loaded().await {
                    return self.go_on(from).await;
                }
                // An agent that is no more was at it.
                if let Some(record) = &mut self.record {
                    record.end_wanted = true;
                }
                self.end_process().await;
                self.forsake_tpm().await;
            }
            self.between_hosts()?;
        }
        // It has come here, and has ended since. That its source has not heard so is no reason to wait: it will be told when it asks.
        if self.moving.is_some() && self.end_destination(Outcome::Moved).await.is_some() {
            return Err(Refusal::new(ErrorCode::HostFailed, "the end of the move to here could not be kept").retry(Retry::Safe));
        }
        if let Some(from) = from {
            return self.start_from(&grant, spec, from).await.map(Some);
        }
        self.begin(VmRecord::new(spec, grant.generation, 0, Holding::Owner), Start::Fresh).await?;
        if let Err(refusal) = self.run_on().await {
            self.end_process().await;
            return Err(refusal);
        }
        Ok(None)
    }

    /// It has begun already, out of this snapshot if one is named; what an agent that is no more knew of that is known again.
    async fn go_on(&mut self, from: Option<&FromSnapshot>) -> Result<Option<RestoreFigures>, Refusal> {
        let Some(from) = from else { return self.run_on().await.map(|()| None) };
        self.see_to_memory_again(from).await;
        let fills = self.record.as_ref().is_some_and(|record| !record.filling.is_empty());
        match self.run_on().await {
            // Said of a VM that runs, it would begin from the snapshot anew the next time.
            Err(refusal) if fills => tracing::warn!(message = refusal.message, "it is not known whether the VM runs"),
            done => done?,
        }
        Ok(Some(RestoreFigures::default()))
    }

    /// Lets a QEMU of ours run, unless it does already, or its guest has powered off.
    pub(super) async fn run_on(&mut self) -> Result<(), Refusal> {
        self.refresh().await;
        if self.state != RunState::Running && !has_shut_down(self.monitor()?).await {
            self.monitor()?.cont().await.map_err(qemu_failed)?;
            self.state = RunState::Running;
        }
        Ok(())
    }

    /// Makes `record` the VM's and starts its QEMU, stopped. On failure the record before stands and nothing is left.
    pub(super) async fn begin(&mut self, mut record: VmRecord, start: Start) -> Result<(), Refusal> {
        let before = self.record.take();
        self.end_reason = EndReason::default();
        self.remembered = None;
        self.forget_filling();
        record.uid = self.host.uids.take(self.vm)?;
        let memory = record.spec.memory_with_dimms();
        let begun = async {
            self.host.memory.reserve(self.vm, memory)?;
            record.node = self.put_on_a_node(&record.spec)?;
            self.record = Some(record);
            self.save()?;
            self.launch(start).await
        }
        .await;
        if let Err(refusal) = begun {
            self.end_process().await;
            self.forsake_tpm().await;
            self.host.remove_cgroup(self.vm);
            match before {
                Some(before) => {
                    self.record = Some(before);
                    self.save_or_log();
                    self.host.memory.release(self.vm);
                }
                None => self.drop_record(),
            }
            return Err(refusal);
        }
        Ok(())
    }

    /// The memory node of a VM that wants to be on one, where there are several.
    fn put_on_a_node(&self, spec: &ResolvedSpec) -> Result<Option<u32>, Refusal> {
        if spec.platform.numa != Numa::OneNode || self.host.facts.numa_nodes <= 1 {
            return Ok(None);
        }
        let nodes = nodes::read(Path::new(NODES));
        self.host.memory.put_on_a_node(self.vm, spec.platform.hugepages, &nodes).map(Some)
    }

    async fn launch(&mut self, start: Start) -> Result<(), Refusal> {
        let Some(record) = self.record.clone() else { return Ok(()) };
        let (spec, uid, host) = (&record.spec, record.uid, Arc::clone(&self.host));
        let mut fds = PassedFds::new();
        let mut boot_file = async |image: &Option<ImageRef>| -> Result<Option<i32>, Refusal> {
            match image {
                Some(image) => Ok(Some(fds.pass(fetch_image(&host, image).await?.file))),
                None => Ok(None),
            }
        };
        let kernel = boot_file(&spec.kernel).await?;
        let initrd = boot_file(&spec.initrd).await?;
        let mut disks = Vec::new();
        let arriving = match &record.holding {
            Holding::Destination(incoming) => incoming.disks.clone(),
            _ => vec![],
        };
        for disk in &spec.disks {
            let (read_only, read_write) = match open_arriving(&host, spec, &arriving, &disk.volume).await? {
                Some(opened) => opened,
                None => open_disk(&host, disk, start).await?,
            };
            disks.push(DiskFds { read_only: fds.pass(read_only), read_write: fds.pass(read_write) });
        }
        let flash = open_flash(&host, spec, start, &arriving, &mut fds).await?;
        let mut media = Vec::new();
        for cdrom in &spec.cdroms {
            media.push(match &cdrom.medium {
                Some(image) => Some(fds.pass(fetch_image(&host, image).await?.file)),
                None => None,
            });
        }
        let mut taps = Vec::new();
        for (slot, nic) in spec.nic_slots() {
            let tap = host.network.create_tap(nic, self.vm, slot).await;
            taps.push(fds.pass(tap.map_err(Refusal::from)?));
        }
        let seed = spec.cloud_init.as_ref().map(|cloud_init| seed::descriptor(&seed::image(spec.vm, &spec.name, cloud_init)));
        let seed =
            seed.transpose().map_err(|error| host_failed("the VM's seed could not be made", &error))?.map(|seed| fds.pass(seed));
        let node = record.node.and_then(|id| nodes::read(Path::new(NODES)).into_iter().find(|node| node.id == id));
        let cgroup = host.make_cgroup(self.vm, spec.memory_with_dimms(), node.as_ref());
        let tpm = self.start_tpm(&record, start, cgroup.clone()).await?.map(|control| fds.pass(control));
        let runtime_dir = host.vm_dir(self.vm);
        let failed = |error: std::io::Error| host_failed("the VM's runtime directory cannot be used", &error);
        let _ = std::fs::remove_dir_all(&runtime_dir);
        // The VM's own user may pass through but change nothing here: what the agent connects to must be what the agent made.
        private_dir(&runtime_dir, None).map_err(failed)?;
        std::os::unix::fs::chown(&runtime_dir, None, Some(uid)).map_err(failed)?;
        std::fs::set_permissions(&runtime_dir, std::os::unix::fs::PermissionsExt::from_mode(0o710)).map_err(failed)?;
        private_dir(&Sockets::own_dir(&runtime_dir), Some(uid)).map_err(failed)?;
        let channels = Sockets::in_dir(&runtime_dir).listen(&mut fds).map_err(failed)?;
        let resources = Resources {
            runtime_dir: runtime_dir.clone(),
            channels,
            kernel,
            initrd,
            flash,
            disks,
            media,
            taps,
            seed,
            tpm,
            node: record.node,
            start,
        };
        let arguments =
            qemu_arguments(spec, &resources).map_err(|error| Refusal::new(ErrorCode::SpecInvalid, error.to_string()))?;
        let mut nodes = vec![DeviceNode::userfaultfd()];
        if spec.accelerator == Accelerator::Kvm {
            nodes.push(DeviceNode::kvm());
        }
        let plan = CagePlan {
            uid,
            gid: uid,
            binary: host.options.qemu.clone(),
            arguments,
            working_dir: runtime_dir.clone(),
            read_only: vec![],
            writable: vec![runtime_dir],
            network: Network::Empty,
            nodes,
            cgroup,
            limits: Limit::DEFAULT.to_vec(),
            cpus: node.as_ref().map(|node| node.cpus.clone()).unwrap_or_default(),
            keep: vec![],
            profile: Profile::Qemu,
            profile_name: None,
            log: None,
        };
        let log =
            host.log(&host.log_name(&spec.name, self.vm)).map_err(|error| host_failed("the VM's log cannot be opened", &error))?;
        let process =
            cage::spawn(&host.launcher, plan, fds, log).await.map_err(|error| host_failed("QEMU could not be started", &error))?;
        if let Some(record) = &mut self.record {
            record.process = Some(process.identity().clone());
            record.end_wanted = false;
        }
        self.process = Some(Arc::new(process));
        self.guest_shut_down = false;
        self.state = RunState::Paused;
        // The journal knows the process before any vCPU can run: a QEMU that no record names was never continued.
        self.save()?;
        self.greet().await?;
        self.set_up(start).await
    }

    async fn greet(&mut self) -> Result<(), Refusal> {
        let Some(process) = self.process.clone() else { return Ok(()) };
        let path = self.host.vm_dir(self.vm).join("qmp");
        let qmp = tokio::select! {
            qmp = Qmp::connect(&path, GREETING) => qmp,
            exit = process.exited() => {
                return Err(Refusal::new(ErrorCode::QemuFailed, format!("QEMU ended at once ({exit:?})"))
                    .hint("its reason is at the end of the VM's log on the host")
                    .retry(Retry::Safe));
            }
        };
        let qmp = qmp.map_err(|error| host_failed("QEMU does not answer", &error))?;
        self.notices = Some(qmp.listen());
        self.attend(&qmp);
        self.qmp = Some(qmp);
        Ok(())
    }
}

/// Whether the guest has powered off and its QEMU is still there.
pub(super) async fn has_shut_down(qmp: &Qmp) -> bool {
    qmp.query_status().await.is_ok_and(|status| status.status == RunStatus::Shutdown)
}

/// An image from the host's cache, fetched from the controller if need be.
pub(crate) async fn fetch_image(host: &SharedHost, image: &ImageRef) -> Result<CachedImage, Refusal> {
    let (host, id) = (Arc::clone(host), image.id.to_string());
    let cache = Arc::clone(&host);
    let fetch = move || {
        async_stream(async move {
            let mut client = host.controller.client().map_err(std::io::Error::other)?;
            let chunks = client.fetch_image(FetchImageRequest { image: id }).await.map_err(std::io::Error::other)?.into_inner();
            Ok(chunks.map(|chunk| chunk.map(|chunk| chunk.data.into()).map_err(std::io::Error::other)))
        })
    };
    cache.images.get(image, fetch).await
}

/// A stream that begins with a future.
fn async_stream<S>(
    begin: impl Future<Output = std::io::Result<S>> + Send + 'static,
) -> futures::stream::BoxStream<'static, std::io::Result<bytes::Bytes>>
where
    S: futures::Stream<Item = std::io::Result<bytes::Bytes>> + Send + 'static,
{
    futures::stream::once(begin)
        .flat_map(|begun| match begun {
            Ok(stream) => stream.boxed(),
            Err(error) => futures::stream::once(std::future::ready(Err(error))).boxed(),
        })
        .boxed()
}

/// Which VM has which uid here. A uid is used again only when its VM is forgotten.
#[derive(Debug)]
pub(crate) struct Uids {
    first: u32,
    taken: Mutex<BTreeMap<VmId, u32>>,
}

/// VMs of one host.
const MAX_VMS: u32 = 1_000;

impl Uids {
    /// `base` itself is for carry.
    pub(crate) fn new(base: u32, taken: BTreeMap<VmId, u32>) -> Self {
        Self { first: base + 1, taken: Mutex::new(taken) }
    }

    fn take(&self, vm: VmId) -> Result<u32, Refusal> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(uid) = taken.get(&vm) {
            return Ok(*uid);
        }
        let free = (self.first..self.first + MAX_VMS).find(|uid| !taken.values().any(|other| other == uid));
        let uid = free.ok_or_else(|| Refusal::new(ErrorCode::HostFailed, format!("a host runs at most {MAX_VMS} VMs")))?;
        taken.insert(vm, uid);
        Ok(uid)
    }

    /// The VM is forgotten.
    pub(crate) fn give_back(&self, vm: VmId) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(&vm);
    }
}
