//! QEMU's own guest agent in a real guest: programs, addresses, the clock, and file systems that stand still.

use std::process::Command;
use std::time::Duration;

use godwit_model::guest::{EXEC_TIMEOUT, MAX_OUTPUT};
use godwit_model::{Bytes, DiskFormat, ExecOutcome, ExecRequest, Millis, Octets, UnixMillis};
use godwit_qemu::qga::{Exec, Thawed};
use godwit_qemu::{GuestAgent, QgaError, Start};

use crate::place::{LIMIT, Place, Vm, initramfs_with_agent, launch_with, qemus, spec};

pub(crate) fn shell(script: &str) -> ExecRequest {
    let args = vec!["sh".into(), "-c".into(), script.into()];
    ExecRequest { program: "/bin/busybox".into(), args, stdin: None, timeout: EXEC_TIMEOUT }
}

pub(crate) async fn run(agent: &GuestAgent, request: &ExecRequest) -> ExecOutcome {
    let pid = agent.exec(request, LIMIT).await.expect("started");
    let ending = async {
        loop {
            match agent.exec_status(pid, LIMIT).await.expect("an answer") {
                Exec::Ended(outcome) => return outcome,
                Exec::Running => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    tokio::time::timeout(LIMIT, ending).await.expect("it ends")
}

async fn boot(place: &Place) -> (Vm, GuestAgent) {
    let initrd = initramfs_with_agent(place);
    let disk = place.raw_disk("a", Bytes::mib(32));
    let made = Command::new("/usr/sbin/mkfs.ext4").args(["-q", "-F"]).arg(&disk).status().expect("mkfs.ext4");
    assert!(made.success());
    let mut spec = spec("pc-q35-7.2", &[DiskFormat::Raw]);
    spec.cmdline.push_str(" guest.ip=10.0.0.5/24 guest.touch_total=16M guest.working_set=1M guest.dirty=0 guest.check=1M");
    let vm = launch_with(place, &qemus()[0], &spec, &[disk], Start::Fresh, &initrd).await;
    assert!(!vm.qmp.query_channel_open("guest-agent").await.expect("asked"), "open before the guest runs");
    vm.boot().await;
    let agent = GuestAgent::at(vm.sockets.guest_agent.clone());
    let opening = async { while !vm.qmp.query_channel_open("guest-agent").await.expect("asked") {} };
    tokio::time::timeout(LIMIT, opening).await.expect("the agent opens its channel");
    (vm, agent)
}

#[tokio::test]
async fn a_real_agent_tells_runs_and_sets_the_clock() {
    let place = Place::new();
    let (vm, agent) = boot(&place).await;
    agent.ping(LIMIT).await.expect("it answers");
    let info = agent.info().await.expect("facts");
    assert!(info.commands.iter().any(|command| command == "guest-exec"), "{info:?}");
    let facts = agent.look(UnixMillis(1)).await.expect("facts");
    let addresses: Vec<String> =
        facts.interfaces.iter().flat_map(|interface| &interface.addresses).map(ToString::to_string).collect();
    assert!(addresses.contains(&"10.0.0.5/24".to_owned()), "{facts:?}");
    let mac = facts.interfaces.iter().find(|interface| interface.name == "eth0").expect("eth0").mac;
    assert_eq!(mac.map(|mac| mac.to_string()).as_deref(), Some("52:54:00:aa:bb:01"));
    assert!(facts.host_name.is_some(), "{facts:?}");

    let outcome = run(&agent, &shell("echo out; echo err >&2; exit 3")).await;
    assert_eq!((outcome.exit_code, outcome.signal), (Some(3), None));
    assert_eq!((outcome.stdout.0.as_slice(), outcome.stderr.0.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    let outcome = run(&agent, &ExecRequest { stdin: Some(Octets(vec![0, 255, b'x'])), ..shell("cat") }).await;
    assert_eq!((outcome.exit_code, outcome.stdout.0.as_slice()), (Some(0), &[0, 255, b'x'][..]));
    let outcome = run(&agent, &shell("kill -9 $$")).await;
    assert_eq!((outcome.exit_code, outcome.signal), (None, Some(9)));
    let outcome = run(&agent, &shell("yes 0123456789 | head -c 3000000; exit 1")).await;
    assert_eq!((outcome.stdout.0.len(), outcome.stdout_truncated, outcome.exit_code), (MAX_OUTPUT, true, Some(1)));
    assert!(outcome.stdout.0.starts_with(b"0123456789\n0123456789\n"));
    let missing = ExecRequest { program: "/bin/nothing".into(), timeout: Millis(1), ..shell("") };
    let error = agent.exec(&missing, LIMIT).await.expect_err("there is none");
    assert!(error.is_refusal(), "{error:?}");
    let error = agent.exec_status(4_000_000, LIMIT).await.expect_err("never started");
    assert!(error.is_refusal(), "{error:?}");

    // A day ahead, and the guest's own programs agree.
    let now = agent.time().await.expect("the time");
    let day = 86_400_000_000_000;
    agent.set_time(Some(now + day)).await.expect("set");
    let ahead = agent.time().await.expect("the time") - now;
    assert!((day..day + 60_000_000_000).contains(&ahead), "{ahead}");
    let seen = run(&agent, &shell("date +%s")).await;
    let seen: i64 = String::from_utf8_lossy(&seen.stdout.0).trim().parse().expect("seconds");
    assert!(seen - now / 1_000_000_000 >= 86_400);

    // Stopped, it is silent, and what it was asked meanwhile does not disturb what is asked later.
    vm.qmp.stop(LIMIT).await.expect("stopped");
    for _ in 0..3 {
        assert!(matches!(agent.ping(Duration::from_millis(300)).await, Err(QgaError::TimedOut { .. })));
    }
    vm.qmp.cont().await.expect("runs on");
    agent.ping(LIMIT).await.expect("it answers again");
    assert_eq!(run(&agent, &shell("exit 5")).await.exit_code, Some(5));
}

#[tokio::test]
async fn file_systems_of_a_real_guest_stand_still_no_longer_than_they_may() {
    let place = Place::new();
    let (_vm, agent) = boot(&place).await;
    let mounted = run(&agent, &shell("mkdir /mnt && mount -t ext4 /dev/vda /mnt && echo a > /mnt/a")).await;
    assert_eq!(mounted.exit_code, Some(0), "{}", String::from_utf8_lossy(&mounted.stderr.0));

    let frozen = agent.freeze(LIMIT, Duration::from_secs(30)).await.expect("frozen");
    assert_eq!(frozen.file_systems, 1);
    assert!(agent.is_frozen().await.expect("asked"));
    let error = agent.exec(&shell("true"), LIMIT).await.expect_err("an agent that froze runs nothing");
    assert!(error.is_refusal(), "{error:?}");
    assert_eq!(frozen.thaw().await, Thawed::ByRequest);
    assert!(!agent.is_frozen().await.expect("asked"));

    let frozen = agent.freeze(LIMIT, Duration::from_secs(2)).await.expect("frozen");
    let writes = Duration::from_secs(30);
    let thawing = async { while agent.is_frozen().await.expect("asked") {} };
    tokio::time::timeout(writes, thawing).await.expect("thawed without being told to");
    assert_eq!(frozen.thaw().await, Thawed::TimeWasOver);
    assert_eq!(run(&agent, &shell("echo b > /mnt/b && sync && cat /mnt/a /mnt/b")).await.stdout.0, b"a\nb\n");

    // A client that died with the guest frozen: its successor thaws it.
    std::mem::forget(agent.freeze(LIMIT, Duration::from_secs(60)).await.expect("frozen"));
    agent.close().await;
    let successor = GuestAgent::at(_vm.sockets.guest_agent.clone());
    assert!(successor.thaw_orphan().await.expect("thawed"));
    assert!(!successor.is_frozen().await.expect("asked"));
}
