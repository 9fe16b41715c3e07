//! The cage itself: a probe runs in QEMU's place and tries what a guest that broke out would try; and what a caged program says, costs and leaves.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use godwit_model::Bytes;
use godwit_qemu::cage::tool::{self, Tool, ToolError};
use godwit_qemu::cage::{KeptLog, Limit, Network, Profile};
use godwit_qemu::process::Exit;
use godwit_qemu::{CagePlan, PassedFds, QemuProcess};
use serde_json::Value;

use crate::place::{LIMIT, Place, launcher};

const UID: u32 = 409_900;

fn plan(binary: &Path, arguments: &[&str], dir: &Path) -> CagePlan {
    CagePlan {
        uid: UID,
        gid: UID,
        binary: binary.to_owned(),
        arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
        working_dir: dir.to_owned(),
        read_only: vec![],
        writable: vec![dir.to_owned()],
        network: Network::Empty,
        nodes: vec![],
        cgroup: None,
        limits: Limit::DEFAULT.to_vec(),
        cpus: vec![],
        keep: vec![],
        profile: Profile::Qemu,
        profile_name: None,
        log: None,
    }
}

fn probe() -> PathBuf {
    let program = launcher().program.with_file_name("probe");
    assert!(program.exists(), "{program:?} is not built: `cargo build -p godwit-qemu --examples`");
    program
}

fn own_dir(place: &Place, name: &str, uid: u32) -> PathBuf {
    let dir = place.path().join(name);
    fs::create_dir(&dir).expect("a directory");
    chown(&dir, Some(uid), Some(uid)).expect("given");
    fs::set_permissions(&dir, Permissions::from_mode(0o700)).expect("closed");
    dir
}

/// What there is to attack on the host; gone when dropped. Open to everybody as far as modes go: what protects it must not be they alone.
struct Host {
    targets: Value,
    victim: Child,
    shared_memory: i32,
    _sockets: (UnixListener, UnixListener, TcpListener),
}

impl Host {
    fn new(place: &Place, own: &Path) -> Self {
        let victim = Command::new(probe()).arg("victim").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut victim = victim.expect("a victim");
        let mut address = String::new();
        BufReader::new(victim.stdout.take().expect("an output")).read_line(&mut address).expect("an address");
        let other = own_dir(place, "other", 0);
        fs::set_permissions(&other, Permissions::from_mode(0o777)).expect("open");
        let state = own_dir(place, "state", 0);
        fs::set_permissions(&state, Permissions::from_mode(0o777)).expect("open");
        fs::write(state.join("journal"), "generations").expect("written");
        fs::write(other.join("disk"), "data").expect("written");
        fs::set_permissions(other.join("disk"), Permissions::from_mode(0o666)).expect("open");
        let monitor = UnixListener::bind(other.join("qmp")).expect("a socket");
        fs::set_permissions(other.join("qmp"), Permissions::from_mode(0o777)).expect("open");
        let name = format!("godwit-probe-{}", std::process::id());
        let hidden = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).expect("a name")).expect("a socket");
        let controller = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let key = 0x6f00_0000 | i32::try_from(std::process::id() & 0xff_ffff).expect("24 bits");
        let targets = serde_json::json!({
            "victim": victim.id(),
            "address": address.trim().parse::<u64>().expect("a number"),
            "disk": other.join("disk"),
            "monitor": other.join("qmp"),
            "abstract": name,
            "controller": controller.local_addr().expect("bound").to_string(),
            "state": state,
            "run": place.path(),
            "own": own,
            "shared_memory": key,
        });
        Self { targets, victim, shared_memory: shared_memory(key), _sockets: (monitor, hidden, controller) }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.victim.kill();
        let _ = self.victim.wait();
        remove_shared_memory(self.shared_memory);
    }
}

#[expect(unsafe_code, reason = "System V memory has no safe call")]
fn shared_memory(key: i32) -> i32 {
    // SAFETY: the call takes numbers only.
    let id = unsafe { libc::shmget(key, 4_096, libc::IPC_CREAT | libc::IPC_EXCL | 0o666) };
    assert!(id >= 0, "{}", std::io::Error::last_os_error());
    id
}

#[expect(unsafe_code, reason = "System V memory has no safe call")]
fn remove_shared_memory(id: i32) {
    // SAFETY: for this command the structure may be absent.
    unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
}

/// Attempts with their errors; `None` is a success.
fn attempts(log: &str) -> BTreeMap<String, Option<i64>> {
    let parse = |line| {
        let answer: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        (answer["attempt"].as_str().expect("a name").to_owned(), answer["errno"].as_i64())
    };
    log.lines().map(parse).collect()
}

#[tokio::test]
async fn a_probe_in_the_cage_reaches_nothing_and_without_the_cage_everything() {
    let place = Place::new();
    let own = own_dir(&place, "own", UID);
    let host = Host::new(&place, &own);
    let targets = host.targets.to_string();

    let log = place.path().join("log");
    let output = OwnedFd::from(File::create(&log).expect("log"));
    let plan = plan(&probe(), &["attack", &targets], &own);
    let caged = godwit_qemu::cage::spawn(&launcher(), plan, PassedFds::new(), output).await.expect("executed");
    let exit = tokio::time::timeout(LIMIT, caged.exited()).await.expect("ends");
    let said = fs::read_to_string(&log).expect("log");
    assert!(matches!(exit, Exit::Status(status) if status.success()), "{exit:?}: {said}");
    let refused = attempts(&said);

    let free = Command::new(probe()).args(["attack", &targets]).output().expect("the probe runs");
    assert!(free.status.success(), "{}", String::from_utf8_lossy(&free.stderr));
    let allowed = attempts(&String::from_utf8_lossy(&free.stdout));

    assert_eq!(refused.len(), allowed.len());
    assert!(refused.len() >= 28, "attempts are missing");
    let mut wrong = Vec::new();
    for (name, errno) in &refused {
        let free = allowed.get(name).expect("the same attempts");
        println!("{name}: {} in the cage, {} without", shown(*errno), shown(*free));
        if errno.is_none() {
            wrong.push(format!("{name}: succeeds in the cage"));
        }
        if free.is_some() {
            wrong.push(format!("{name}: fails without the cage too ({}), so that it proves nothing", shown(*free)));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn shown(errno: Option<i64>) -> String {
    errno
        .and_then(|errno| i32::try_from(errno).ok())
        .map_or_else(|| "done".into(), |errno| std::io::Error::from_raw_os_error(errno).to_string())
}

/// Starts the probe with a kept log.
async fn spawn_kept(place: &Place, arguments: &[&str], limit: Bytes) -> QemuProcess {
    let own = own_dir(place, "own", UID);
    let open = |name| File::options().create(true).read(true).append(true).open(place.path().join(name)).expect("a log").into();
    let log = KeptLog { current: open("log"), older: open("old"), limit };
    godwit_qemu::cage::spawn(&launcher(), plan(&probe(), arguments, &own), PassedFds::new(), log).await.expect("executed")
}

#[tokio::test]
async fn a_flood_of_log_fills_two_files_and_neither_stalls_nor_ends_the_program() {
    let place = Place::new();
    let limit = Bytes(64 << 10);
    let process = spawn_kept(&place, &["flood", "100000"], limit).await;
    let exit = tokio::time::timeout(LIMIT, process.exited()).await.expect("the flood is never waited for");
    assert!(matches!(exit, Exit::Status(status) if status.success()), "{exit:?}");
    let text = |name| fs::read_to_string(place.path().join(name)).expect("text");
    // The keeper ends after the program, when the pipe is empty.
    let waiting = async {
        while !text("log").contains("the last word") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LIMIT, waiting).await.expect("the last word is kept");
    for name in ["log", "old"] {
        let size = fs::metadata(place.path().join(name)).expect("log").len();
        assert!(size <= limit.get(), "{name} has {size} bytes");
        assert!(!text(name).contains('\u{1b}'), "{name} acts on a terminal");
    }
    assert!(text("old").contains("\\u{1b}[2J"));
}

/// Processes of the host whose name is the cage's and that hold the log.
fn keepers(log: &Path) -> Vec<u32> {
    let pids = fs::read_dir("/proc").expect("/proc").flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let holds = |pid: &u32| {
        let own = *pid == std::process::id();
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        !own && fds.into_iter().any(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == log))
    };
    pids.filter(holds).collect()
}

#[tokio::test]
async fn the_program_lives_on_when_its_keeper_is_killed() {
    let place = Place::new();
    let process = spawn_kept(&place, &["flood", "20000"], Bytes(64 << 10)).await;
    for keeper in keepers(&place.path().join("log")) {
        let raw = i32::try_from(keeper).ok().and_then(rustix::process::Pid::from_raw).expect("a pid");
        let _ = rustix::process::kill_process(raw, rustix::process::Signal::KILL);
    }
    let exit = tokio::time::timeout(LIMIT, process.exited()).await.expect("ends");
    assert!(matches!(exit, Exit::Status(status) if status.success()), "{exit:?}");
}

#[tokio::test]
async fn the_keeper_has_no_rights_and_ends_with_the_program() {
    let place = Place::new();
    let process = spawn_kept(&place, &["flood", "1"], Bytes(64 << 10)).await;
    let log = place.path().join("log");
    let [keeper] = keepers(&log)[..] else { panic!("one keeper: {:?}", keepers(&log)) };
    let status = fs::read_to_string(format!("/proc/{keeper}/status")).expect("status");
    for line in ["CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{line}: {status}");
    }
    let open = fs::read_dir(format!("/proc/{keeper}/fd")).expect("fds").count();
    assert_eq!(open, 3, "the keeper holds what is not its own");
    process.kill();
    process.exited().await;
    let ending = async {
        while fs::metadata(format!("/proc/{keeper}")).is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LIMIT, ending).await.expect("ends and is waited for");
}

#[tokio::test]
async fn the_root_of_a_caged_program_is_closed_and_small() {
    let place = Place::new();
    let own = own_dir(&place, "own", UID);
    let output = OwnedFd::from(File::create(place.path().join("log")).expect("log"));
    let plan = plan(&probe(), &["flood", "0"], &own);
    let process = godwit_qemu::cage::spawn(&launcher(), plan, PassedFds::new(), output).await.expect("executed");
    let pid = process.identity().pid;
    let namespaces = |pid: &str| {
        ["mnt", "pid", "ipc", "uts", "net"].map(|kind| fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("a namespace"))
    };
    for (own, hosts) in namespaces(&pid.to_string()).iter().zip(namespaces("self")) {
        assert_ne!(*own, hosts);
    }
    for line in fs::read_to_string(format!("/proc/{pid}/mountinfo")).expect("mounts").lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let (place, options): (_, Vec<&str>) = (fields[4], fields[5].split(',').collect());
        let has = |option| options.contains(&option);
        assert!(has("nosuid"), "{line}");
        assert!(has("ro") || place == "/proc" || Path::new(place) == own, "{line}");
        assert!(has("nodev") || place == "/dev", "{line}");
        assert!(
            has("noexec")
                || place.starts_with("/usr")
                || place.starts_with("/lib")
                || place == "/etc/ld.so.cache"
                || Path::new(place) == probe(),
            "{line}"
        );
    }
    let devices = fs::read_dir(format!("/proc/{pid}/root/dev")).expect("/dev");
    let mut devices: Vec<_> = devices.flatten().map(|entry| entry.file_name().into_string().expect("text")).collect();
    devices.sort();
    assert_eq!(devices, ["null", "urandom", "zero"]);
    process.kill();
    process.exited().await;
}

#[tokio::test]
async fn a_tool_gets_its_descriptors_and_limits_and_no_file_of_the_host() {
    let place = Place::new();
    let disk = place.raw_disk("disk", Bytes(0));
    chown(&disk, Some(UID), Some(UID)).expect("given");
    let run = async |arguments: &[&str], memory, time| {
        let mut fds = PassedFds::new();
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let fd = fds.pass(rustix::fs::open(&disk, flags, rustix::fs::Mode::empty()).expect("a place"));
        let fill = |argument: &&str| argument.replace("DISK", &format!("/proc/self/fd/{fd}"));
        let (program, arguments) = arguments.split_first().expect("a program");
        let program = tool::find(program).expect("installed");
        let tool = Tool { program, arguments: arguments.iter().map(fill).collect(), uid: UID, gid: UID, memory, time };
        tool::run(&launcher(), &tool, fds).await
    };
    run(&["qemu-img", "create", "-q", "-f", "qcow2", "DISK", "64M"], Bytes::GIB, LIMIT).await.expect("qemu-img works in the cage");
    assert!(fs::read(&disk).expect("the disk").starts_with(b"QFI\xfb"));
    let path = disk.to_str().expect("text");
    let by_name = run(&["qemu-img", "info", path], Bytes::GIB, LIMIT).await;
    assert!(matches!(&by_name, Err(ToolError::Failed { said, .. }) if said.contains("No such file")), "{by_name:?}");
    let slow = run(&["sleep", "600"], Bytes::GIB, Duration::from_millis(500)).await;
    assert!(matches!(slow, Err(ToolError::TimedOut { .. })), "{slow:?}");
    let large = run(&["head", "-c", "200M", "/dev/zero"], Bytes::mib(1), LIMIT).await;
    assert!(large.is_err(), "a MiB is not enough for anything");
    let hostile = run(&["sh", "-c", "printf '\\033]0;owned\\007'; exit 3"], Bytes::GIB, LIMIT).await;
    assert!(matches!(&hostile, Err(ToolError::Failed { said, .. }) if said == "\\u{1b}]0;owned\\u{7}"), "{hostile:?}");
}

#[test]
fn a_relay_dials_its_peer_and_is_ended_for_anything_else() {
    use std::os::unix::process::ExitStatusExt;
    let peer = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let port = peer.local_addr().expect("bound").port();
    let outcome = |attempt: &str| {
        let output = Command::new(probe()).args(["relay", attempt, &port.to_string()]).output().expect("the probe runs");
        println!("{attempt}: {} {}", output.status, String::from_utf8_lossy(&output.stdout).trim());
        (output.status.code(), output.status.signal(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (code, _, said) = outcome("nothing");
    assert_eq!(code, Some(0));
    let echo = peer.try_clone().expect("a listener");
    std::thread::spawn(move || {
        for stream in echo.incoming().flatten() {
            let _ = std::io::copy(&mut &stream, &mut &stream);
        }
    });
    for allowed in ["dial", "relay"] {
        assert_eq!(outcome(allowed).0, Some(0), "{allowed}");
    }
    if said.starts_with("Fully") {
        assert_eq!(outcome("dial elsewhere").0, Some(1), "landlock holds it to one port");
    }
    for attempt in ["listen", "open", "execute", "udp", "unix socket", "mount", "trace", "executable memory"] {
        assert_eq!(outcome(attempt).1, Some(libc::SIGSYS), "{attempt}");
    }
}
