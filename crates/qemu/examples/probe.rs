//! What a guest that has taken over its QEMU would try, one attempt after the other, each undone at once. Runs in a cage in QEMU's place, and
//! once more without a cage, where every attempt must succeed: a check that cannot fail proves nothing.
//!
//! Usage: `probe victim` (waits, with a secret in its memory), `probe attack TARGETS` (JSON; prints a line per attempt), `probe flood COUNT`, or
//! `probe relay ATTEMPT PORT` (confined as `carry` is; succeeds, fails or is killed).

use std::ffi::CString;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use std::{fs, process, ptr};

use serde_json::{Value, json};

/// What lies in the victim's memory.
const SECRET: [u8; 16] = *b"a guest's memory";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["victim"] => victim(),
        ["flood", count] => flood(count.parse().expect("a number")),
        ["relay", attempt, port] => relay(attempt, port.parse().expect("a port")),
        ["attack", targets] => attack(&serde_json::from_str(targets).expect("targets")),
        _ => process::exit(2),
    }
}

/// Says where its secret is and waits for the end of its input.
fn victim() {
    let secret = Box::new(SECRET);
    println!("{}", ptr::from_ref(secret.as_ref()).addr());
    let _ = io::stdin().read(&mut [0]);
    drop(secret);
}

/// Says much, hostile and with a number, never waiting: what finds no room is lost. Then a last word.
fn flood(count: u32) {
    let mut out = io::stderr();
    for line in 0..count {
        let _ = writeln!(out, "{line:08} \u{1b}[2J and so on, as a guest likes it, up to a hundred characters in all, and a bit");
    }
    std::thread::sleep(Duration::from_secs(3));
    let _ = writeln!(out, "the last word");
}

/// Does one thing that a relay may or may not do.
fn relay(attempt: &str, port: u16) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let (near, far) = UnixStream::pair().expect("a pair");
    let confined = godwit_qemu::cage::relay::confine(Some(port)).expect("confined");
    let dial = |port: u16| TcpStream::connect(("127.0.0.1", port)).map(drop);
    let result = match attempt {
        "nothing" => Ok(()),
        "dial" => dial(port),
        "relay" => runtime.block_on(relay_bytes(port, near, far)),
        "dial elsewhere" => dial(port ^ 1),
        "listen" => std::net::TcpListener::bind("127.0.0.1:0").map(drop),
        "open" => fs::File::open("/etc/hostname").map(drop),
        "execute" => process::Command::new("/bin/true").status().map(drop),
        "udp" => std::net::UdpSocket::bind("127.0.0.1:0").map(drop),
        "unix socket" => UnixStream::connect("/run/x").map(drop),
        "mount" => call(libc::SYS_mount, [0; 4]),
        "trace" => call(libc::SYS_ptrace, [0; 4]),
        "executable memory" => call(libc::SYS_mmap, [0, 4_096, 7, 0x22, -1]),
        other => panic!("{other}"),
    };
    println!("{confined:?} {attempt}: {result:?}");
    process::exit(i32::from(result.is_err()));
}

/// What `carry` does all day: bytes from a unix socket to a peer and back, with timers.
async fn relay_bytes(port: u16, near: UnixStream, far: UnixStream) -> io::Result<()> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    near.set_nonblocking(true)?;
    far.set_nonblocking(true)?;
    let (mut near, far) = (tokio::net::UnixStream::from_std(near)?, tokio::net::UnixStream::from_std(far)?);
    let peer = tokio::time::timeout(
        Duration::from_secs(10),
        tokio::net::TcpStream::connect(("127.0.0.1".parse::<std::net::IpAddr>().expect("an address"), port)),
    );
    let mut peer = peer.await??;
    peer.set_nodelay(true)?;
    let (mut reader, mut writer) = far.into_split();
    near.write_all(&[7; 100_000]).await?;
    let mut buffer = vec![0; 50_000];
    for _ in 0..2 {
        reader.read_exact(&mut buffer).await?;
        peer.write_all(&buffer).await?;
        peer.read_exact(&mut buffer).await?;
        writer.write_all(&buffer).await?;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    near.read_exact(&mut buffer).await?;
    writer.shutdown().await
}

type Attempt = (&'static str, fn(&Value) -> io::Result<()>);

const ATTEMPTS: &[Attempt] = &[
    ("read another VM's disk", |targets| read(text(targets, "disk"))),
    ("write another VM's disk", |targets| fs::File::options().write(true).open(text(targets, "disk")).map(drop)),
    ("read another VM's RAM through /proc/PID/mem", |targets| {
        let memory = fs::File::open(format!("/proc/{}/mem", number(targets, "victim")))?;
        let mut found = [0; SECRET.len()];
        memory.read_exact_at(&mut found, number(targets, "address").unsigned_abs())?;
        is_secret(&found)
    }),
    ("read another VM's RAM by process_vm_readv", process_vm_readv),
    ("attach to another VM by ptrace", |targets| {
        call(libc::SYS_ptrace, [libc::c_long::from(libc::PTRACE_SEIZE), number(targets, "victim"), 0, 0])
    }),
    ("take another VM's descriptors", |targets| {
        let pidfd = value(libc::SYS_pidfd_open, [number(targets, "victim"), 0, 0, 0])?;
        call(libc::SYS_pidfd_getfd, [pidfd, 0, 0, 0])
    }),
    ("signal another VM", |targets| call(libc::SYS_kill, [number(targets, "victim"), 0, 0, 0])),
    ("connect to another VM's monitor", |targets| UnixStream::connect(text(targets, "monitor")).map(drop)),
    ("connect to an abstract socket of the host", |targets| {
        let address = std::os::unix::net::SocketAddr::from_abstract_name(text(targets, "abstract"))?;
        UnixStream::connect_addr(&address).map(drop)
    }),
    ("reach the controller over the network", |targets| {
        let address: SocketAddr = text(targets, "controller").parse().expect("an address");
        TcpStream::connect_timeout(&address, Duration::from_secs(5)).map(drop)
    }),
    ("open a raw socket", |_| call(libc::SYS_socket, [17, 3, 0x0300, 0])),
    ("list the agent's state directory", |targets| fs::read_dir(text(targets, "state")).map(drop)),
    ("read the agent's journal", |targets| read(&format!("{}/journal", text(targets, "state")))),
    ("see that there is another VM", |targets| fs::metadata(text(targets, "disk")).map(drop)),
    ("read the host's passwords", |_| read("/etc/shadow")),
    ("read the host's passwords through another process' root", |targets| {
        // Of the first process if the host lets anybody, and of one that it lets every root.
        read("/proc/1/root/etc/shadow").or_else(|_| read(&format!("/proc/{}/root/etc/shadow", number(targets, "victim"))))
    }),
    ("see the host's processes", |targets| fs::read_dir(format!("/proc/{}", number(targets, "victim"))).map(drop)),
    ("look at the host's kernel", |_| read("/proc/kallsyms")),
    ("look at the host's devices", |_| fs::read_dir("/sys/class").map(drop)),
    ("look at the host's control groups", |_| fs::read_dir("/sys/fs/cgroup").map(drop)),
    ("reach System V memory of the host", |targets| call(libc::SYS_shmget, [number(targets, "shared_memory"), 0, 0, 0])),
    ("make a device node of the host's memory", |targets| {
        let path = CString::new(format!("{}/probe-node", text(targets, "own"))).expect("a path");
        let device = 0x0101; // mem
        call(libc::SYS_mknod, [path.as_ptr().addr().cast_signed() as libc::c_long, 0o020_600, device, 0])?;
        fs::remove_file(path.to_str().expect("text"))
    }),
    ("mount", |targets| {
        let (kind, place) = (c"tmpfs", CString::new(text(targets, "own")).expect("a path"));
        call(libc::SYS_mount, [address(kind), address(&place), address(kind), 0])?;
        call(libc::SYS_umount2, [address(&place), 0, 0, 0])
    }),
    ("open a file by its handle", open_by_handle),
    ("use a key ring", |_| {
        let (kind, name) = (c"user", c"godwit-probe");
        let key = value(libc::SYS_add_key, [address(kind), address(name), address(name), 1, -2])?;
        call(libc::SYS_keyctl, [3, key, 0, 0]) // revoke
    }),
    ("set up io_uring", |_| {
        let parameters = [0_u64; 32];
        call(libc::SYS_io_uring_setup, [1, parameters.as_ptr().addr().cast_signed() as libc::c_long, 0, 0])
    }),
    ("become root", |_| call(libc::SYS_setuid, [0, 0, 0, 0])),
    // Last: who succeeds is nobody from then on.
    ("make a user namespace", |_| call(libc::SYS_unshare, [libc::c_long::from(libc::CLONE_NEWUSER), 0, 0, 0])),
];

/// Tries everything; the victim lives through all of it.
fn attack(targets: &Value) {
    let mut out = io::stdout();
    for (name, attempt) in ATTEMPTS {
        let answer = match attempt(targets) {
            Ok(()) => json!({ "attempt": name, "errno": null }),
            Err(error) => json!({ "attempt": name, "errno": error.raw_os_error().unwrap_or(-1), "error": error.to_string() }),
        };
        writeln!(out, "{answer}").expect("an output");
    }
}

fn text<'a>(targets: &'a Value, key: &str) -> &'a str {
    targets[key].as_str().unwrap_or_else(|| panic!("no {key}"))
}

fn number(targets: &Value, key: &str) -> i64 {
    targets[key].as_i64().unwrap_or_else(|| panic!("no {key}"))
}

fn address(text: &std::ffi::CStr) -> libc::c_long {
    text.as_ptr().addr().cast_signed() as libc::c_long
}

fn read(path: &str) -> io::Result<()> {
    fs::File::open(path)?.read(&mut [0; 16]).map(drop)
}

fn is_secret(found: &[u8]) -> io::Result<()> {
    if found == SECRET { Ok(()) } else { Err(io::Error::other("something else is there")) }
}

fn process_vm_readv(targets: &Value) -> io::Result<()> {
    let mut found = [0_u8; SECRET.len()];
    let local = libc::iovec { iov_base: found.as_mut_ptr().cast(), iov_len: found.len() };
    let remote = libc::iovec { iov_base: ptr::without_provenance_mut(number(targets, "address") as usize), iov_len: found.len() };
    let pid = libc::pid_t::try_from(number(targets, "victim")).expect("a pid");
    #[expect(unsafe_code, reason = "the attempt is this very call")]
    // SAFETY: the local buffer is ours and as long as said; the remote one is another process'.
    let count = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    if count < 0 { Err(io::Error::last_os_error()) } else { is_secret(&found) }
}

/// The way out of containers that share a file system with their host.
fn open_by_handle(_: &Value) -> io::Result<()> {
    #[repr(C)]
    struct Handle {
        head: [u32; 2],
        bytes: [u8; 128],
    }
    let (mut handle, mut mount) = (Handle { head: [128, 0], bytes: [0; 128] }, 0_i32);
    let place = libc::c_long::from(libc::AT_FDCWD);
    let handle_address = ptr::from_mut(&mut handle).addr().cast_signed() as libc::c_long;
    let mount_address = ptr::from_mut(&mut mount).addr().cast_signed() as libc::c_long;
    call(libc::SYS_name_to_handle_at, [place, address(c"/usr"), handle_address, mount_address])?;
    call(libc::SYS_open_by_handle_at, [place, handle_address, 0, 0])
}

fn call<const N: usize>(number: libc::c_long, arguments: [libc::c_long; N]) -> io::Result<()> {
    value(number, arguments).map(drop)
}

/// Makes a system call.
#[expect(unsafe_code, reason = "the attempts are system calls")]
fn value<const N: usize>(number: libc::c_long, arguments: [libc::c_long; N]) -> io::Result<libc::c_long> {
    let argument = |index: usize| arguments.get(index).copied().unwrap_or_default();
    // SAFETY: whatever is passed by address outlives the call and is as large as the call takes it to be.
    let result = unsafe { libc::syscall(number, argument(0), argument(1), argument(2), argument(3), argument(4)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
