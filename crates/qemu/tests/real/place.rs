//! A place for VMs on this machine: directories, descriptors, the cage, and everything gone at the end.

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use godwit_model::spec::{ResolvedDisk, ResolvedNic, SPEC_SCHEMA};
use godwit_model::{
    Accelerator, Bytes, CacheMode, DiskFormat, Firmware, ImageId, ImageRef, Name, Numa, Platform, PowerOff, ResolvedSpec, VmId,
};
use godwit_qemu::cage::{DeviceNode, Limit, Network, Profile};
use godwit_qemu::command::{DiskFds, FlashFds, default_cpu, qemu_arguments};
use godwit_qemu::qmp::views::{Known, MigrationStatus, RunStatus};
use godwit_qemu::tpm::TpmStart;
use godwit_qemu::{CagePlan, Launcher, Notice, Notices, PassedFds, QemuProcess, Qmp, Resources, Sockets, Start};
use uuid::Uuid;

/// Generous, since the machine may be busy; nothing waits this long when all is well.
pub(crate) const LIMIT: Duration = Duration::from_secs(90);

/// QEMU's binaries here: the one on PATH first.
pub(crate) fn qemus() -> Vec<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/local/bin:/usr/bin";
    let installed = path.split(':').map(|dir| Path::new(dir).join("qemu-system-x86_64")).find(|file| file.exists());
    let installed = installed.expect("QEMU is installed: run scripts/setup");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/qemu-other");
    let other = Command::new(script).output().expect("scripts/qemu-other runs");
    let other = other.status.success().then(|| PathBuf::from(String::from_utf8_lossy(&other.stdout).trim()));
    if other.is_none() {
        eprintln!("no other version of QEMU in reach: tests of mixed versions see one version");
    }
    std::iter::once(installed).chain(other).collect()
}

/// Every pair of source and destination.
pub(crate) fn pairs() -> Vec<(PathBuf, PathBuf)> {
    let all = qemus();
    all.iter().flat_map(|source| all.iter().map(move |destination| (source.clone(), destination.clone()))).collect()
}

/// The subcommands of `examples/cage.rs`, which cargo builds beside the tests.
pub(crate) fn launcher() -> Launcher {
    let test = std::env::current_exe().expect("this test");
    let target = test.ancestors().nth(2).expect("target/PROFILE/deps/TEST");
    let program = target.join("examples/cage");
    assert!(program.exists(), "{program:?} is not built: `cargo build -p godwit-qemu --examples`, or run all tests of the package");
    Launcher::godwit(program)
}

/// The guest's initramfs with QEMU's own guest agent in it.
pub(crate) fn initramfs_with_agent(place: &Place) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/guest-agent-layer");
    let made = Command::new(&script).output().expect("scripts/guest-agent-layer runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let layer = fs::read(String::from_utf8_lossy(&made.stdout).trim()).expect("a layer");
    let path = place.path().join("initramfs");
    fs::write(&path, [fs::read(guest_file("initramfs.cpio.gz")).expect("an initramfs"), layer].concat()).expect("written");
    path
}

/// A file of the guest image.
fn guest_file(name: &str) -> PathBuf {
    let cache = std::env::var_os("GODWIT_CACHE").map_or_else(|| PathBuf::from("/var/cache/godwit"), PathBuf::from);
    let path = cache.join(name);
    assert!(path.exists(), "{path:?} is missing: run scripts/guest-image");
    path
}

/// A directory that VMs of other uids can pass through.
pub(crate) struct Place {
    dir: tempfile::TempDir,
}

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A number that no other test of this run uses.
fn unique() -> u32 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("gwq").tempdir_in("/tmp").expect("a directory");
        fs::set_permissions(dir.path(), Permissions::from_mode(0o711)).expect("passable");
        Self { dir }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A sparse file for a disk.
    pub(crate) fn raw_disk(&self, name: &str, size: Bytes) -> PathBuf {
        let path = self.dir.path().join(name);
        File::create(&path).and_then(|file| file.set_len(size.get())).expect("a disk");
        path
    }

    pub(crate) fn qcow2_disk(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("64M").status().expect("qemu-img");
        assert!(made.success());
        path
    }
}

/// Boots the test guest's kernel with one of everything.
pub(crate) fn spec(machine: &str, disks: &[DiskFormat]) -> ResolvedSpec {
    let image = || ImageRef { id: ImageId::new(Uuid::new_v4()), digest: String::new(), size: Bytes::MIB };
    let disk =
        |(index, format): (usize, &DiskFormat)| ResolvedDisk::new(format!("shared/disk{index}").parse().expect("volume"), *format);
    ResolvedSpec {
        schema: SPEC_SCHEMA,
        vm: VmId::new(Uuid::new_v4()),
        name: Name::new("test").expect("name"),
        accelerator: Accelerator::Tcg,
        machine: machine.into(),
        cpu: default_cpu(Accelerator::Tcg).into(),
        vcpus: 2,
        memory: Bytes::mib(256),
        growth: None,
        kernel: Some(image()),
        initrd: Some(image()),
        // Memory that changes slowly, so that the guest is as good as idle but alive.
        cmdline: "console=ttyS0 quiet panic=-1".into(),
        disks: disks.iter().enumerate().map(disk).collect(),
        nics: vec![ResolvedNic::new(Name::new("default").expect("name"), "52:54:00:aa:bb:01".parse().expect("mac"))],
        cdroms: vec![],
        platform: Platform::default(),
        cloud_init: None,
        power_off: PowerOff::default(),
    }
}

/// OVMF, with variables in a file of this place that every VM of it shares.
fn flash(place: &Place, spec: &ResolvedSpec, fds: &mut PassedFds) -> Option<FlashFds> {
    let Firmware::Uefi { secure_boot, .. } = spec.platform.firmware else { return None };
    let (code, template) = if secure_boot { ("CODE_4M.secboot", "VARS_4M.ms") } else { ("CODE_4M", "VARS_4M") };
    let file = |name: &str| format!("/usr/share/OVMF/OVMF_{name}.fd");
    let variables = place.path().join("variables");
    if !variables.exists() {
        fs::copy(file(template), &variables).expect("OVMF is installed: run scripts/setup");
    }
    let code = fds.pass(File::open(file(code)).expect("OVMF is installed: run scripts/setup"));
    Some(FlashFds { code, variables: DiskFds::open(&variables, CacheMode::Direct, fds).expect("variables") })
}

/// A VM's TPM.
pub(crate) struct Tpm {
    pub(crate) process: QemuProcess,
    pub(crate) state: PathBuf,
    pub(crate) log: PathBuf,
}

/// Starts the TPM of a VM that has one, with a state that nobody has used, and passes QEMU its socket.
async fn tpm(dir: &Path, uid: u32, spec: &ResolvedSpec, fds: &mut PassedFds) -> Option<(Tpm, i32)> {
    spec.platform.tpm.as_ref()?;
    let state = dir.join("tpm");
    File::create_new(&state).expect("state");
    fs::set_permissions(&state, Permissions::from_mode(0o600)).expect("closed");
    chown(&state, Some(uid), Some(uid)).expect("given");
    let (tpm, control) = start_tpm(&state, uid).await;
    Some((tpm, fds.pass(control)))
}

/// Starts a TPM on the file of `uid` at `state`.
pub(crate) async fn start_tpm(state: &Path, uid: u32) -> (Tpm, OwnedFd) {
    let program = godwit_qemu::tpm::find(&launcher(), uid).await.expect("swtpm is installed: run scripts/setup");
    let log = state.with_extension("log");
    let said = OwnedFd::from(File::create(&log).expect("log"));
    let opened = OpenOptions::new().read(true).write(true).open(state).expect("state");
    let start = TpmStart { program: &program, uid, cgroup: None, state: opened.into(), log: said.into() };
    let (process, control) = godwit_qemu::tpm::start(&launcher(), start).await.expect("swtpm was executed");
    (Tpm { process, state: state.to_owned(), log }, control)
}

/// A VM of a test; killed when dropped.
pub(crate) struct Vm {
    pub(crate) process: QemuProcess,
    pub(crate) tpm: Option<Tpm>,
    pub(crate) qmp: Qmp,
    pub(crate) sockets: Sockets,
    pub(crate) uid: u32,
    log: PathBuf,
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.process.kill();
        if let Some(tpm) = &self.tpm {
            tpm.process.kill();
        }
        if std::thread::panicking() {
            eprintln!("log of QEMU:\n{}", self.log());
            let of_tpm = self.tpm.as_ref().and_then(|tpm| fs::read_to_string(&tpm.log).ok());
            eprintln!("log of swtpm:\n{}", of_tpm.unwrap_or_default());
        }
    }
}

/// Starts `binary` with `spec`; its disks are the files `disks`.
pub(crate) async fn launch(place: &Place, binary: &Path, spec: &ResolvedSpec, disks: &[PathBuf], start: Start) -> Vm {
    launch_with(place, binary, spec, disks, start, &guest_file("initramfs.cpio.gz")).await
}

/// As [`launch`], with another initramfs.
pub(crate) async fn launch_with(
    place: &Place,
    binary: &Path,
    spec: &ResolvedSpec,
    disks: &[PathBuf],
    start: Start,
    initrd: &Path,
) -> Vm {
    let number = unique();
    let uid = 410_000 + number;
    let dir = place.path().join(format!("vm{number}"));
    fs::create_dir(&dir).expect("a directory");
    fs::set_permissions(&dir, Permissions::from_mode(0o700)).expect("closed");
    chown(&dir, Some(uid), Some(uid)).expect("given");
    let own = Sockets::own_dir(&dir);
    fs::create_dir(&own).expect("a directory");
    chown(&own, Some(uid), Some(uid)).expect("given");
    let sockets = Sockets::in_dir(&dir);
    let mut fds = PassedFds::new();
    let channels = sockets.listen(&mut fds).expect("sockets");
    let kernel = spec.kernel.is_some().then(|| fds.pass(File::open(guest_file("vmlinuz")).expect("kernel")));
    let initrd = spec.initrd.is_some().then(|| fds.pass(File::open(initrd).expect("initrd")));
    let disks = disks.iter().map(|path| DiskFds::open(path, CacheMode::Direct, &mut fds).expect("disk")).collect();
    let taps = spec.nics.iter().map(|_| fds.pass(tap())).collect();
    let media = spec.cdroms.iter().enumerate().map(|(drive, cdrom)| {
        cdrom.medium.is_some().then(|| fds.pass(File::open(place.path().join(format!("medium{drive}"))).expect("medium")))
    });
    let media = media.collect();
    let flash = flash(place, spec, &mut fds);
    let (tpm, control) = tpm(&dir, uid, spec, &mut fds).await.unzip();
    let (runtime_dir, seed) = (dir.clone(), None);
    // Every host has a node 0 with a processor 0.
    let node = (spec.platform.numa == Numa::OneNode).then_some(0);
    let resources = Resources { runtime_dir, channels, kernel, initrd, flash, disks, media, taps, seed, tpm: control, node, start };
    let plan = CagePlan {
        uid,
        gid: uid,
        binary: binary.to_owned(),
        arguments: qemu_arguments(spec, &resources).expect("arguments"),
        working_dir: dir.clone(),
        read_only: vec![],
        writable: vec![dir.clone()],
        network: Network::Empty,
        nodes: vec![DeviceNode::userfaultfd()],
        cgroup: None,
        limits: Limit::DEFAULT.to_vec(),
        cpus: node.map(|_| 0).into_iter().collect(),
        keep: vec![],
        profile: Profile::Qemu,
        profile_name: None,
        log: None,
    };
    let log = dir.join("log");
    let log_file = OwnedFd::from(File::create(&log).expect("log"));
    let process = godwit_qemu::cage::spawn(&launcher(), plan, fds, log_file).await.expect("QEMU was executed");
    let qmp = match Qmp::connect(&sockets.qmp, LIMIT).await {
        Ok(qmp) => qmp,
        Err(error) => panic!("{error:?}: {}", fs::read_to_string(&log).unwrap_or_default()),
    };
    Vm { process, tpm, qmp, sockets, uid, log }
}

impl Vm {
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) async fn run_status(&self) -> RunStatus {
        self.qmp.query_status().await.expect("status").status
    }

    pub(crate) async fn migration_status(&self) -> MigrationStatus {
        self.qmp.query_migrate().await.expect("migration").status()
    }

    /// Continues it and waits until its kernel has started user space.
    pub(crate) async fn boot(&self) {
        let console = tokio::net::UnixStream::connect(&self.sockets.console).await.expect("console");
        self.qmp.cont().await.expect("cont");
        let (mut seen, mut piece) = (String::new(), vec![0; 4096]);
        let reading = async {
            loop {
                console.readable().await.expect("console");
                match console.try_read(&mut piece) {
                    Ok(0) => panic!("the console closed: {seen}"),
                    Ok(length) => seen.push_str(&String::from_utf8_lossy(&piece[..length])),
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
                    Err(error) => panic!("{error}"),
                }
                // The guest program's first JSON line.
                if seen.contains("{\"") {
                    return;
                }
            }
        };
        tokio::time::timeout(LIMIT, reading).await.expect("the guest boots");
    }
}

/// Waits for a status of the migration.
pub(crate) async fn wait_migration(notices: &mut Notices, wanted: &MigrationStatus) {
    wait_event(notices, &Known::Migration(wanted.clone())).await;
}

/// Asks until the run state is one of `wanted`: QEMU changes it shortly after the event about the migration.
pub(crate) async fn wait_run_status(vm: &Vm, wanted: &[RunStatus]) {
    let asking = async { while !wanted.contains(&vm.run_status().await) {} };
    if tokio::time::timeout(LIMIT, asking).await.is_err() {
        panic!("never became one of {wanted:?}, is {}", vm.run_status().await);
    }
}

/// Waits for an event.
pub(crate) async fn wait_event(notices: &mut Notices, wanted: &Known) {
    let waiting = async {
        loop {
            match notices.next().await {
                Notice::Event(event) if event.known() == *wanted => return,
                Notice::Event(_) => {}
                other => panic!("waited for {wanted:?}: {other:?}"),
            }
        }
    };
    tokio::time::timeout(LIMIT, waiting).await.unwrap_or_else(|_| panic!("never heard of {wanted:?}"));
}

/// A tap of its own that is gone with its descriptor.
pub(crate) fn tap() -> OwnedFd {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").expect("/dev/net/tun");
    tap_of(&file);
    file.into()
}

#[expect(unsafe_code, reason = "there is no safe call for TUNSETIFF")]
fn tap_of(file: &File) {
    use std::os::fd::AsRawFd;
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const IFF_TAP_NO_PI_VNET_HDR: u16 = 0x0002 | 0x1000 | 0x4000;
    // struct ifreq: a name of 16 bytes, all zero for one that the kernel chooses, then the flags.
    let mut request = [0_u8; 40];
    request[16..18].copy_from_slice(&IFF_TAP_NO_PI_VNET_HDR.to_ne_bytes());
    // SAFETY: the request is as large as struct ifreq and outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}
