//! A cluster on lab hosts with the guests of one test, and all that is asked of it.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes as Chunk;
use godwit_api::client::{Client, ClientError};
use godwit_api::v1::{Snapshot, SnapshotCreate, SnapshotRollback, Task, TaskState, VmCreate, VmExec, VmMigrate, VmStart, VmStop};
use godwit_guest::Status;
use godwit_lab::{HostOverride, Lab, LabSpec, LabStatus, LinkRate};
use godwit_model::{ImportFormat, MigrationPolicy, MigrationProgress, Name, Refusal, RestoreFigures, TaskId};
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::artefacts::{CloudImage, GuestImages, cloud_image, godwit_binary, guest_agent_layer, guest_images};
use crate::consoles::Consoles;
use crate::guest::{Guest, GuestSpec};
use crate::outside::{Echo, Outside, Witness};
use crate::processes::ProcessRole;
use crate::{checks, labs, logs, processes};

/// How long an answer of the controller is waited for while it may be away.
const AWAY: Duration = Duration::from_secs(90);
/// How long a guest may take from its start to its first answer.
const BOOT: Duration = Duration::from_secs(90);
/// How long a snapshot or a rollback may take.
const SNAPSHOT: Duration = Duration::from_secs(120);
/// Tasks tell of themselves in events; asking is simpler, and this is how often.
pub(crate) const ASK: Duration = Duration::from_millis(50);

/// What a cluster shall be like.
#[derive(Debug, Clone)]
pub struct ClusterSpec {
    lab: LabSpec,
}

/// A running cluster. Take it down with [`Cluster::finish`]; dropped without it counts as a failed test: it says what it knows and goes.
pub struct Cluster {
    lab: Lab,
    runtime: Runtime,
    client: Client,
    outside: Outside,
    witness: Option<Witness>,
    consoles: Consoles,
    guests: BTreeMap<String, Guest>,
    images: Option<(Name, Name)>,
    expected: Vec<String>,
    reboots: BTreeMap<String, u64>,
    finished: bool,
    pub(crate) moves: BTreeMap<String, TaskId>,
}

impl ClusterSpec {
    /// A cluster of this many hosts, with links of 1 Gbit/s.
    ///
    /// # Errors
    /// When there is no binary to test.
    pub fn new(hosts: u16) -> Result<Self> {
        Ok(Self { lab: LabSpec { hosts, ..LabSpec::new(labs::free_name(), godwit_binary()?) } })
    }

    /// Another rate for all hosts' links.
    ///
    /// # Panics
    /// When it is no rate.
    #[must_use]
    pub fn link(mut self, rate: &str) -> Self {
        self.lab.link_rate = rate.parse::<LinkRate>().expect("a rate");
        self
    }

    /// Another program to start the daemons with.
    #[must_use]
    pub fn godwit(mut self, program: &Path) -> Self {
        self.lab.godwit = program.to_owned();
        self
    }

    /// Another QEMU on one host.
    #[must_use]
    pub fn qemu(mut self, host: &str, qemu: &Path) -> Self {
        self.host(host).qemu = Some(qemu.to_owned());
        self
    }

    /// More arguments for the agent of one host.
    #[must_use]
    pub fn agent(mut self, host: &str, arguments: &[&str]) -> Self {
        self.host(host).agent_args.extend(arguments.iter().map(ToString::to_string));
        self
    }

    /// More arguments for the controller.
    #[must_use]
    pub fn serve(mut self, arguments: &[&str]) -> Self {
        self.lab.serve_args.extend(arguments.iter().map(ToString::to_string));
        self
    }

    fn host(&mut self, host: &str) -> &mut HostOverride {
        self.lab.overrides.entry(host.to_owned()).or_default()
    }

    /// The name of the lab that it will be.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.lab.name
    }

    /// Builds it.
    ///
    /// # Errors
    /// The step that failed; nothing is left then.
    pub fn up(self) -> Result<Cluster> {
        labs::remove_abandoned();
        // Somebody else may have installed a provider before; any will do.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        runtime.spawn(labs::clean_up_when_told_to_end(self.lab.name.clone()));
        let lab = Lab::up(self.lab).map_err(with_causes)?;
        let connected = || -> Result<_> {
            let client = Client::new(lab.api()?.endpoint().context("read what the client needs")?)?;
            let outside = Outside::new(lab.outside_namespace());
            let witness = outside.witness()?;
            Ok((client, outside, witness))
        };
        match connected() {
            Ok((client, outside, witness)) => Ok(Cluster {
                consoles: Consoles::of(lab.name()),
                lab,
                runtime,
                client,
                outside,
                witness: Some(witness),
                guests: BTreeMap::new(),
                images: None,
                expected: Vec::new(),
                reboots: BTreeMap::new(),
                finished: false,
                moves: BTreeMap::new(),
            }),
            Err(error) => {
                Lab::remove(lab.name())?;
                Err(error)
            }
        }
    }
}

impl Cluster {
    /// The lab below.
    #[must_use]
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The client of the API, as administrator.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The outside client.
    #[must_use]
    pub fn outside(&self) -> &Outside {
        &self.outside
    }

    /// The witness.
    ///
    /// # Panics
    /// After [`Cluster::finish`].
    #[must_use]
    pub fn witness(&self) -> &Witness {
        self.witness.as_ref().expect("until the end")
    }

    /// Lets the witness also hear what guests send inside their hosts, so that a runner on a host whose link is cut is heard, too.
    ///
    /// # Errors
    /// When there is no socket.
    pub fn listen_in_hosts(&mut self) -> Result<()> {
        let hosts = self.lab.hosts()?;
        let namespaces = hosts.iter().map(|host| Ok(self.lab.namespace(host)?)).collect::<Result<Vec<_>>>()?;
        let witness = self.witness.as_mut().context("until the end")?;
        namespaces.iter().try_for_each(|namespace| witness.listen_in(namespace))
    }

    /// The guests that were created.
    pub fn guests(&self) -> impl Iterator<Item = &Guest> {
        self.guests.values()
    }

    /// A guest by its name.
    ///
    /// # Errors
    /// When there is none.
    pub fn guest(&self, name: &str) -> Result<&Guest> {
        self.guests.get(name).with_context(|| format!("no guest {name}"))
    }

    /// The lab as it is now.
    ///
    /// # Errors
    /// When its record cannot be read.
    pub fn lab_status(&self) -> Result<LabStatus> {
        Ok(self.lab.status()?)
    }

    /// From now on these words in a line of a log are no failure.
    pub fn expect_log(&mut self, words: &str) {
        self.expected.push(words.to_owned());
    }

    /// Runs something asynchronous to its end.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Asks the controller once; says why not.
    ///
    /// # Errors
    /// The controller's refusal, also where it cannot be reached.
    pub fn ask<T>(&self, future: impl Future<Output = Result<T, ClientError>>) -> Result<T, Refusal> {
        self.runtime.block_on(future).map_err(|error| error.refusal())
    }

    /// As [`Cluster::ask`], but a controller that stands still is as good as none.
    pub(crate) fn ask_briefly<T>(&self, future: impl Future<Output = Result<T, ClientError>>) -> Option<T> {
        self.runtime.block_on(async { tokio::time::timeout(Duration::from_secs(3), future).await }).ok()?.ok()
    }

    /// The migration of a VM that was begun and whose end was not yet looked at.
    #[must_use]
    pub fn moves_of(&self, vm: &str) -> Option<TaskId> {
        self.moves.get(vm).copied()
    }

    /// Asks until the controller can be reached.
    fn ask_patiently<T, F: Future<Output = Result<T, ClientError>>>(&self, ask: impl Fn() -> F) -> Result<T> {
        let deadline = Instant::now() + AWAY;
        loop {
            match self.runtime.block_on(async { tokio::time::timeout(Duration::from_secs(5), ask()).await }) {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(ClientError::Unreachable { .. })) | Err(_) if Instant::now() < deadline => thread::sleep(ASK),
                Ok(Err(error)) => return Err(with_causes(error)),
                Err(_) => bail!("the controller does not answer within {AWAY:?}"),
            }
        }
    }

    /// Imports the test guest's kernel and initramfs, once.
    ///
    /// # Errors
    /// What went wrong.
    pub fn import_guest(&mut self) -> Result<(Name, Name)> {
        if let Some(images) = &self.images {
            return Ok(images.clone());
        }
        let GuestImages { kernel, initrd } = guest_images()?;
        let names = (Name::new("guest-kernel")?, Name::new("guest-initrd")?);
        self.import(&names.0, ImportFormat::Kernel, fs::read(&kernel).with_context(|| kernel.display().to_string())?)?;
        self.import(&names.1, ImportFormat::Initrd, fs::read(&initrd).with_context(|| initrd.display().to_string())?)?;
        self.images = Some(names.clone());
        Ok(names)
    }

    /// As [`Cluster::import_guest`], with QEMU's own guest agent in the initramfs: for all guests that are created from now on.
    ///
    /// # Errors
    /// What went wrong.
    pub fn import_guest_with_agent(&mut self) -> Result<()> {
        let GuestImages { kernel, initrd } = guest_images()?;
        let layer = guest_agent_layer()?;
        let read = |path: &Path| fs::read(path).with_context(|| path.display().to_string());
        let names = (Name::new("guest-kernel")?, Name::new("guest-initrd-agent")?);
        self.import(&names.0, ImportFormat::Kernel, read(&kernel)?)?;
        self.import(&names.1, ImportFormat::Initrd, [read(&initrd)?, read(&layer)?].concat())?;
        self.images = Some(names);
        Ok(())
    }

    /// Imports our Debian: a kernel and an initramfs, which all guests have that are created from now on, and a disk image, which is the
    /// first disk of those that boot it.
    ///
    /// # Errors
    /// What went wrong.
    pub fn import_debian(&mut self) -> Result<[Name; 3]> {
        let CloudImage { disk, .. } = cloud_image()?;
        self.import_debian_from(&disk)
    }

    /// The same with this disk image, which holds what ours does.
    ///
    /// # Errors
    /// What went wrong.
    pub fn import_debian_from(&mut self, disk: &Path) -> Result<[Name; 3]> {
        let (GuestImages { kernel, initrd }, CloudImage { boot, .. }) = (guest_images()?, cloud_image()?);
        let read = |path: &Path| fs::read(path).with_context(|| path.display().to_string());
        let names = ["debian-kernel", "debian-initrd", "debian"].map(name);
        let [kernel_name, initrd_name, image] = &names;
        self.import(kernel_name, ImportFormat::Kernel, read(&kernel)?)?;
        self.import(initrd_name, ImportFormat::Initrd, [read(&initrd)?, read(&boot)?].concat())?;
        self.import(image, ImportFormat::Qcow2, read(disk)?)?;
        self.images = Some((kernel_name.clone(), initrd_name.clone()));
        Ok(names)
    }

    /// Imports an image.
    ///
    /// # Errors
    /// The controller's refusal.
    pub fn import(&self, name: &Name, kind: ImportFormat, content: Vec<u8>) -> Result<(), Refusal> {
        let mut content = Chunk::from(content);
        let chunks = std::iter::from_fn(move || {
            let length = content.len().min(1 << 20);
            (length > 0).then(|| Ok(content.split_to(length)))
        });
        self.ask(self.client.import_image(name, kind, futures::stream::iter(chunks.collect::<Vec<_>>()))).map(|_| ())
    }

    /// Creates a guest; it is not started.
    ///
    /// # Errors
    /// What went wrong.
    pub fn create(&mut self, spec: &GuestSpec) -> Result<Guest> {
        let (kernel, initrd) = self.import_guest()?;
        let number = u8::try_from(self.guests.len()).context("few guests")?;
        let address = Ipv4Addr::new(10, 99, 0, 10 + number);
        let request = VmCreate { name: Name::new(&spec.name)?, spec: spec.vm_spec(address, &kernel, &initrd), golden: None };
        let vm = self.ask(self.client.create_vm(&request))?;
        let guest = Guest { name: vm.name, id: vm.id, address, nics: request.spec.nics.len() };
        self.consoles.follow(guest.id);
        self.guests.insert(spec.name.clone(), guest.clone());
        Ok(guest)
    }

    /// Asks for a start.
    ///
    /// # Errors
    /// The controller's refusal.
    pub fn begin_start(&self, vm: &str, host: &str) -> Result<TaskId, Refusal> {
        let request = VmStart { host: Some(name(host)) };
        Ok(self.ask(self.client.start_vm(&name(vm), &request))?.id)
    }

    /// Creates a guest, starts it on a host and waits until it answers.
    ///
    /// # Errors
    /// What went wrong.
    pub fn boot(&mut self, spec: &GuestSpec, host: &str) -> Result<Guest> {
        self.boot_all(&[(spec.clone(), host)])?;
        Ok(self.guest(&spec.name)?.clone())
    }

    /// As [`Cluster::boot`], several at once.
    ///
    /// # Errors
    /// What went wrong.
    pub fn boot_all(&mut self, specs: &[(GuestSpec, &str)]) -> Result<()> {
        let mut tasks = Vec::new();
        for (spec, host) in specs {
            self.create(spec)?;
            tasks.push(self.begin_start(&spec.name, host).with_context(|| format!("start {} on {host}", spec.name))?);
        }
        for task in tasks {
            self.done(task, BOOT)?;
        }
        for (spec, _) in specs {
            self.status_within(&spec.name, BOOT)?;
        }
        Ok(())
    }

    /// What a guest says of itself.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub fn status(&self, vm: &str) -> Result<Status> {
        self.status_within(vm, Duration::from_secs(20))
    }

    fn status_within(&self, vm: &str, patience: Duration) -> Result<Status> {
        self.outside.status(self.guest(vm)?.address, patience).with_context(|| {
            let known = self.ask_briefly(self.client.vm_by(vm)).map(|vm| vm.status.state);
            format!("guest {vm}, which the controller takes for {known:?}")
        })
    }

    /// Where a VM runs, as the controller knows it.
    ///
    /// # Errors
    /// When it runs nowhere.
    pub fn host_of(&self, vm: &str) -> Result<String> {
        let known = self.ask_patiently(|| self.client.vm_by(vm))?;
        known.status.host.map(|host| host.to_string()).with_context(|| format!("{vm} is on no host"))
    }

    /// Asks for a migration.
    ///
    /// # Errors
    /// The controller's refusal.
    pub fn begin_move(&mut self, vm: &str, to: &str, policy: MigrationPolicy) -> Result<TaskId, Refusal> {
        let request = VmMigrate { host: name(to), policy: policy.into(), dry_run: false, reason: None };
        let task = self.ask(self.client.migrate_vm(&name(vm), &request))?.id;
        self.moves.insert(vm.to_owned(), task);
        Ok(task)
    }

    /// Moves a VM, whatever it takes.
    ///
    /// # Errors
    /// When it does not get there.
    pub fn migrate(&mut self, vm: &str, to: &str) -> Result<Task> {
        let task = self.begin_move(vm, to, MigrationPolicy::default()).with_context(|| format!("migrate {vm} to {to}"))?;
        let done = self.done(task, Duration::from_secs(180))?;
        self.moves.remove(vm);
        let host = self.host_of(vm)?;
        ensure!(host == to, "{vm} was moved to {to} but is on {host}");
        Ok(done)
    }

    /// Asks for a snapshot.
    ///
    /// # Errors
    /// The controller's refusal.
    pub fn begin_snapshot(&self, vm: &str, snapshot: &str) -> Result<TaskId, Refusal> {
        let wanted = SnapshotCreate {
            vm: name(vm),
            name: Some(name(snapshot)),
            memory: true,
            quiesce: None,
            pool: None,
            golden: false,
            reason: None,
        };
        Ok(self.ask(self.client.create_snapshot(&wanted))?.id)
    }

    /// Takes a snapshot of a VM that runs, with its memory.
    ///
    /// # Errors
    /// When it is not taken as asked.
    pub fn take(&self, vm: &str, snapshot: &str) -> Result<Snapshot> {
        let task = self.begin_snapshot(vm, snapshot).with_context(|| format!("take a snapshot of {vm}"))?;
        self.done(task, SNAPSHOT)?;
        let taken = self.ask(self.client.snapshot(&name(snapshot)))?;
        let figures = taken.figures.as_ref().context("a snapshot without figures")?;
        eprintln!("{snapshot}: {figures:?}");
        ensure!(figures.warnings.is_empty(), "{:?}", figures.warnings);
        Ok(taken)
    }

    /// Asks for a rollback, to a host if one is named. What the VM is now is not kept.
    ///
    /// # Errors
    /// The controller's refusal.
    pub fn begin_rollback(&self, snapshot: &str, host: Option<&str>) -> Result<TaskId, Refusal> {
        let wanted = SnapshotRollback { host: host.map(name), discard_present: true, reason: None };
        Ok(self.ask(self.client.rollback_snapshot(&name(snapshot), &wanted))?.id)
    }

    /// Makes a VM what it was in a snapshot, and waits until it answers.
    ///
    /// # Errors
    /// When it is not.
    pub fn roll_back(&mut self, vm: &str, snapshot: &str, host: Option<&str>) -> Result<RestoreFigures> {
        self.roll_back_timed(vm, snapshot, host, None).map(|(figures, _)| figures)
    }

    /// The same; and, seen by `echo`, the time from the first byte of its devices to its first answer.
    ///
    /// # Errors
    /// When it is not.
    pub fn roll_back_timed(
        &mut self,
        vm: &str,
        snapshot: &str,
        host: Option<&str>,
        echo: Option<&Echo>,
    ) -> Result<(RestoreFigures, Duration)> {
        let task = self.begin_rollback(snapshot, host).with_context(|| format!("roll back to {snapshot}"))?;
        let done = self.done(task, SNAPSHOT)?;
        self.turned_back(vm)?;
        let figures = done.restore.context("a rollback without figures")?;
        eprintln!("{vm} as in {snapshot}: {figures:?}");
        let first_reply = match echo {
            Some(echo) => {
                let since = SystemTime::UNIX_EPOCH + Duration::from_millis(figures.ran_at.0.saturating_sub(figures.memory_ms));
                let began = Instant::now().checked_sub(since.elapsed().context("a clock that goes back")?).context("a moment")?;
                let answered = echo.first_after(began, BOOT).context("it has not answered")?;
                answered.saturating_duration_since(began)
            }
            None => Duration::ZERO,
        };
        Ok((figures, first_reply))
    }

    /// A VM runs as it was before: what was heard of it until now says nothing any more.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn turned_back(&mut self, vm: &str) -> Result<()> {
        self.reboots.remove(vm);
        self.witness().forget(vm);
        self.status_within(vm, BOOT).map(drop)
    }

    /// Has a VM powered off by its guest, and starts it on a host: a machine that was switched off, and is on again.
    ///
    /// # Errors
    /// When it does not stop, or does not come up.
    pub fn stop_and_start(&mut self, vm: &str, host: &str) -> Result<()> {
        let (from, id) = (self.host_of(vm)?, self.guest(vm)?.id);
        let task = self.ask(self.client.stop_vm(&name(vm), &VmStop::default())).with_context(|| format!("stop {vm}"))?.id;
        self.done(task, BOOT).with_context(|| {
            let answers = self.status_within(vm, Duration::from_secs(5)).is_ok();
            format!("{vm}, asked to power off, {}", if answers { "works on" } else { "answers no more" })
        })?;
        let of_vm = |role: &ProcessRole| matches!(role, ProcessRole::Qemu(of) | ProcessRole::Tpm(of) if *of == id);
        let left: Vec<_> = self.processes(&from)?.into_iter().filter(|process| of_vm(&process.role)).collect();
        ensure!(left.is_empty(), "left of {vm} that has stopped: {left:?}");
        self.start_again(vm, host)
    }

    /// Starts a VM that has run before and ended.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_again(&mut self, vm: &str, host: &str) -> Result<()> {
        *self.reboots.entry(vm.to_owned()).or_default() += 1;
        let task = self.begin_start(vm, host).with_context(|| format!("start {vm} on {host}"))?;
        self.done(task, BOOT)?;
        self.status_within(vm, BOOT)?;
        // It may answer before the first record of its new boot is heard.
        let deadline = Instant::now() + BOOT;
        while self.witness().log().vm(vm).is_none_or(|heard| heard.reboots < self.reboots(vm)) {
            ensure!(Instant::now() < deadline, "{vm} answers, and the witness does not hear that it was booted");
            thread::sleep(ASK);
        }
        Ok(())
    }

    /// How often a guest was booted again on purpose.
    pub(crate) fn reboots(&self, vm: &str) -> u64 {
        self.reboots.get(vm).copied().unwrap_or_default()
    }

    /// Starts a VM of this image, and ends it at once: its host has the image from then on.
    ///
    /// # Errors
    /// When it does not start, or does not end.
    pub fn visit(&mut self, spec: &GuestSpec, host: &str) -> Result<()> {
        self.create(spec)?;
        let started = self.begin_start(&spec.name, host)?;
        self.done(started, BOOT)?;
        let ended = self.ask(self.client.kill_vm(&name(&spec.name))).with_context(|| format!("kill {}", spec.name))?.id;
        self.done(ended, BOOT).map(drop)
    }

    /// Has the command line's own test move a VM of its own between two hosts; its report.
    ///
    /// # Errors
    /// When it does not report.
    pub fn selftest(&self, hosts: [&str; 2]) -> Result<Value> {
        let (api, images) = (self.lab.api()?, guest_images()?);
        let mut command = Command::new(godwit_binary()?);
        command.args(["selftest", "-o", "json", "--url", &api.url]);
        command.arg("--token-file").arg(&api.token_file).arg("--ca-file").arg(&api.ca_file);
        command.arg("--kernel").arg(&images.kernel).arg("--initrd").arg(&images.initrd);
        command.args(hosts.into_iter().flat_map(|host| ["--host", host]));
        let output = command.stdin(Stdio::null()).output().context("run the selftest")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        serde_json::from_slice(&output.stdout).with_context(|| format!("the selftest does not report: {said}"))
    }

    /// A task as it is now.
    ///
    /// # Errors
    /// When the controller stays away.
    pub fn task(&self, task: TaskId) -> Result<Task> {
        self.ask_patiently(|| self.client.task(task))
    }

    /// A task that has ended, well or badly.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn ended(&self, task: TaskId, patience: Duration) -> Result<Task> {
        let deadline = Instant::now() + patience;
        loop {
            let now = self.task(task)?;
            if now.state.ended() {
                return Ok(now);
            }
            ensure!(
                Instant::now() < deadline,
                "task {} of {} is at `{}` after {patience:?}: {:?}",
                now.kind,
                now.subject,
                now.step,
                now
            );
            thread::sleep(ASK);
        }
    }

    /// A task that has ended well.
    ///
    /// # Errors
    /// Its own reason when it has not.
    pub fn done(&self, task: TaskId, patience: Duration) -> Result<Task> {
        let ended = self.ended(task, patience)?;
        match ended.state {
            TaskState::Done => Ok(ended),
            _ => Err(anyhow!("{} of {} ended {:?}: {:?}; {:?}", ended.kind, ended.subject, ended.state, ended.error, ended.trail)),
        }
    }

    /// Waits until a migration is as far as `far` wants it.
    ///
    /// # Errors
    /// When it ends before.
    pub fn wait_progress(&self, task: TaskId, far: impl Fn(&MigrationProgress) -> bool) -> Result<MigrationProgress> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let now = self.task(task)?;
            if let Some(progress) = now.progress.as_ref().filter(|progress| far(progress)) {
                return Ok(progress.clone());
            }
            ensure!(!now.state.ended(), "{} of {} has ended too early: {:?} {:?}", now.kind, now.subject, now.state, now.error);
            ensure!(Instant::now() < deadline, "{} of {} does not get on: {:?}", now.kind, now.subject, now);
            thread::sleep(ASK);
        }
    }

    /// Waits until the controller knows a host as connected, or not.
    ///
    /// # Errors
    /// When it stays the other way.
    pub fn wait_connected(&self, host: &str, connected: bool) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.ask_patiently(|| self.client.host_by(host))?.connected != connected {
            ensure!(Instant::now() < deadline, "host {host} does not become {}connected", if connected { "" } else { "dis" });
            thread::sleep(ASK);
        }
        Ok(())
    }

    /// What runs on a host for its VMs.
    ///
    /// # Errors
    /// When the host is unknown.
    pub fn processes(&self, host: &str) -> Result<Vec<processes::HostProcess>> {
        let status = self.lab_status()?;
        let host = status.hosts.iter().find(|known| known.name == host).with_context(|| format!("no host {host}"))?;
        processes::of_host(host)
    }

    /// The process of a VM's QEMU on a host.
    ///
    /// # Errors
    /// When there is none.
    pub fn qemu(&self, vm: &str, host: &str) -> Result<u32> {
        let id = self.guest(vm)?.id;
        let processes = self.processes(host)?;
        let qemu = processes.iter().find(|process| process.role == ProcessRole::Qemu(id));
        qemu.map(|qemu| qemu.pid).with_context(|| format!("no QEMU of {vm} on {host}"))
    }

    /// Has the agent in a guest run a script of busybox; what that says.
    ///
    /// # Errors
    /// When the script fails.
    pub fn shell(&self, vm: &str, script: &str) -> Result<String> {
        let args = ["sh", "-c", script].map(ToOwned::to_owned).to_vec();
        let request = VmExec { program: "/bin/busybox".into(), args, stdin: None, timeout: None };
        let outcome = self.ask(self.client.exec_vm(&Name::new(vm)?, &request))?;
        ensure!(outcome.exit_code == Some(0), "{script}: {outcome:?}");
        Ok(String::from_utf8_lossy(&outcome.stdout.0).into_owned())
    }

    /// Checks what must hold at any moment, and, where no task runs, that nothing is left behind.
    ///
    /// # Errors
    /// What does not hold.
    pub fn check(&self) -> Result<()> {
        let holds = checks::no_second_runner(self)
            .and_then(|()| checks::guests_are_whole(self))
            .and_then(|()| checks::nothing_is_left(self));
        // Ahead of the logs, of which a reader may get only the beginning.
        holds.inspect_err(|error| eprintln!("this does not hold: {error:#}"))
    }

    /// The end of a test that went well: the last checks, the logs, and everything is taken down without a trace.
    ///
    /// # Errors
    /// What does not hold.
    pub fn finish(self) -> Result<()> {
        self.check()?;
        let status = self.lab_status()?;
        let logs = logs::all(&status);
        let complaints: Vec<_> = logs.iter().flat_map(|log| logs::complaints(log, &self.expected)).collect();
        for complaint in &complaints {
            eprintln!("{}: {}", complaint.log.display(), complaint.line);
        }
        ensure!(complaints.is_empty(), "{} unexpected line(s) in the logs, the first: {}", complaints.len(), complaints[0].line);
        self.take_down()
    }

    /// Takes everything down and looks whether that is so.
    ///
    /// # Errors
    /// What is left.
    pub fn take_down(mut self) -> Result<()> {
        self.finished = true;
        self.witness = None;
        Lab::remove(self.lab.name()).map_err(with_causes)?;
        let traces = checks::traces(self.lab.name());
        ensure!(traces.is_empty(), "left of the lab: {traces:?}");
        Ok(())
    }

    /// Every log of the lab's daemons and of its QEMUs.
    ///
    /// # Errors
    /// When the lab's record cannot be read.
    pub fn logs(&self) -> Result<Vec<PathBuf>> {
        let status = self.lab_status()?;
        let qemus = status.hosts.iter().flat_map(|host| logs::of_qemus(&status, &host.name));
        Ok(logs::all(&status).into_iter().chain(qemus).collect())
    }

    /// What the guests of all VMs said on their consoles last, by the VM's directory.
    pub(crate) fn consoles(&self) -> BTreeMap<String, String> {
        self.consoles.said()
    }

    /// For people who look at a failed test.
    fn tell(&self) {
        if let Some(witness) = &self.witness {
            for (vm, silent) in witness.silent() {
                eprintln!("== {vm} was last heard {} ms ago", silent.as_millis());
            }
        }
        for (vm, said) in self.consoles.in_short() {
            eprintln!("== console of {vm}\n{said}");
        }
        let Ok(status) = self.lab.status() else { return };
        let qemus = status.hosts.iter().flat_map(|host| logs::of_qemus(&status, &host.name));
        for log in logs::all(&status).into_iter().chain(qemus) {
            let end = logs::tail(&log, 40);
            if !end.is_empty() {
                eprintln!("== {}\n{end}", log.display());
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        self.tell();
        if std::env::var_os("GODWIT_E2E_KEEP").is_some() {
            eprintln!("kept: `godwit lab down {}` removes it", self.lab.name());
            return;
        }
        // The test has failed already: what cannot be removed is said, not thrown.
        if let Err(error) = Lab::remove(self.lab.name()) {
            eprintln!("lab {} is not gone: {error}", self.lab.name());
        }
    }
}

/// A name that a test writes as a literal.
///
/// # Panics
/// When it is none.
pub(crate) fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

/// Calls by names that are literals.
trait ByText {
    fn vm_by(&self, vm: &str) -> impl Future<Output = Result<godwit_api::v1::Vm, ClientError>>;
    fn host_by(&self, host: &str) -> impl Future<Output = Result<godwit_api::v1::Host, ClientError>>;
}

impl ByText for Client {
    async fn vm_by(&self, vm: &str) -> Result<godwit_api::v1::Vm, ClientError> {
        self.vm(&name(vm)).await
    }

    async fn host_by(&self, host: &str) -> Result<godwit_api::v1::Host, ClientError> {
        self.host(&name(host)).await
    }
}

/// Errors of crates with their causes, which `Display` leaves out.
fn with_causes(error: impl std::error::Error + Send + Sync + 'static) -> anyhow::Error {
    let text = format!("{error:?}");
    anyhow::Error::new(error).context(text)
}
