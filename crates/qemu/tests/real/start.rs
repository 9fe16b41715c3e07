//! Starting, watching and ending a QEMU in its cage.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::time::Duration;

use godwit_model::{Accelerator, Bytes, DiskFormat};
use godwit_qemu::accel::{ProbeCommand, probe};
use godwit_qemu::cage::{Network, Profile, SpawnError};
use godwit_qemu::capabilities::{Interview, InterviewError, Support, interview};
use godwit_qemu::command::default_cpu;
use godwit_qemu::qmp::ConnectError;
use godwit_qemu::qmp::views::RunStatus;
use godwit_qemu::{CagePlan, Notice, PassedFds, QemuProcess, Qmp, Start};

use crate::place::{LIMIT, Place, launch, launcher, qemus, spec};

/// Field of `/proc/PID/status`.
pub(crate) fn status_field(pid: u32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = text.lines().find_map(|line| line.strip_prefix(field)).expect("field");
    line.trim_start_matches(':').split_whitespace().collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn the_command_line_is_accepted_and_the_guest_boots_on_every_version() {
    for binary in qemus() {
        let place = Place::new();
        let disks = [place.raw_disk("a", Bytes::mib(16)), place.qcow2_disk("b")];
        let vm = launch(&place, &binary, &spec("pc-q35-7.2", &[DiskFormat::Raw, DiskFormat::Qcow2]), &disks, Start::Fresh).await;
        assert_eq!(vm.run_status().await, RunStatus::Prelaunch);
        vm.boot().await;
        assert_eq!(vm.run_status().await, RunStatus::Running);
        let log = vm.log();
        assert!(log.is_empty(), "{}: QEMU complained: {log}", binary.display());
        vm.qmp.quit().await.expect("quit");
        vm.process.exited().await;
        assert!(!vm.process.is_alive());
    }
}

#[tokio::test]
async fn qemu_runs_under_its_own_uid_without_privileges_and_with_its_own_descriptors_only() {
    let place = Place::new();
    let binary = &qemus()[0];
    let vm = launch(&place, binary, &spec("pc-q35-7.2", &[]), &[], Start::Fresh).await;
    let pid = vm.process.identity().pid;
    let uid = vm.uid.to_string();
    assert_eq!(status_field(pid, "Uid"), [uid.as_str(); 4].join(" "));
    assert_eq!(status_field(pid, "Gid"), [uid.as_str(); 4].join(" "));
    assert_eq!(status_field(pid, "Groups"), "");
    assert_eq!(status_field(pid, "NoNewPrivs"), "1");
    assert_eq!(status_field(pid, "Seccomp"), "2");
    assert_eq!(status_field(pid, "CapEff"), "0000000000000000");
    assert_eq!(status_field(pid, "CapPrm"), "0000000000000000");
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("limits");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).expect("core");
    assert_eq!(core.split_whitespace().nth(4), Some("0"));
    // A session of its own: the agent's terminal or death is nothing to it.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    let session = stat.rsplit_once(')').expect("name").1.split_whitespace().nth(3).expect("session");
    assert_eq!(session, pid.to_string());
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).expect("fds") {
        let target = fs::read_link(entry.expect("fd").path()).unwrap_or_default();
        let target = target.to_string_lossy();
        assert!(!target.contains("godwit-cage-plan"), "the plan stayed open");
    }
    // The node is there for this uid alone; the host's own is as it was.
    let node = fs::metadata(format!("/proc/{pid}/root/dev/userfaultfd")).expect("node");
    assert!(node.file_type().is_char_device());
    assert_eq!((node.uid(), node.mode() & 0o777), (vm.uid, 0o600));
    assert_ne!(fs::metadata("/dev/userfaultfd").expect("the host's").uid(), vm.uid);
}

#[tokio::test]
async fn a_qemu_is_adopted_with_its_monitor_after_the_first_session_is_gone() {
    let place = Place::new();
    let vm = launch(&place, &qemus()[0], &spec("pc-q35-7.2", &[]), &[], Start::Fresh).await;
    vm.qmp.cont().await.expect("cont");
    let adopted = QemuProcess::adopt(vm.process.identity()).expect("adopted");
    // QEMU serves one client at a time: while the first is there, a second is not greeted.
    let early = Qmp::connect(&vm.sockets.qmp, Duration::from_millis(100)).await;
    assert!(matches!(early, Err(ConnectError::NoGreeting(_))), "{early:?}");
    let mut notices = vm.qmp.listen();
    vm.qmp.close();
    assert!(matches!(notices.next().await, Notice::Ended(_)));
    let second = Qmp::connect(&vm.sockets.qmp, LIMIT).await.expect("greeted anew");
    assert_eq!(second.query_status().await.expect("status").status, RunStatus::Running);
    assert!(adopted.is_alive() && vm.process.is_alive());
}

#[tokio::test]
async fn every_version_says_what_it_can_do_and_leaves_nothing() {
    for binary in qemus() {
        let place = Place::new();
        let settings = Interview {
            binary: binary.clone(),
            accelerator: Accelerator::Tcg,
            uid: 409_999,
            gid: 409_999,
            working_dir: place.path().to_owned(),
            limit: LIMIT,
        };
        let found = interview(&launcher(), &settings).await.expect("capabilities");
        for command in ["migrate", "migrate-continue", "add-fd", "getfd", "announce-self", "query-cpu-definitions"] {
            assert!(found.commands.contains(command), "{command}");
        }
        for capability in ["return-path", "events", "pause-before-switchover", "postcopy-ram"] {
            assert!(found.has_migration(capability), "{capability}");
        }
        let q35 = found.resolve_machine("q35").expect("q35 is an alias");
        assert_eq!(found.q35_newest_first().first(), Some(&q35));
        assert_eq!(found.resolve_machine("pc-q35-7.2"), Some("pc-q35-7.2"));
        assert!(found.cpus.contains(default_cpu(Accelerator::Tcg)));
        assert!(!found.cpus.contains("Haswell-v4"), "TCG cannot do all of it");
        for (feature, has) in [("sse4-2", true), ("avx2", true), ("avx512f", false), ("check", false)] {
            assert_eq!(found.cpu_features.contains(feature), has, "{feature}: {:?}", found.cpu_features);
        }
        for support in [&found.postcopy, &found.background_snapshot] {
            assert!(!matches!(support, Support::No { reason, fix } if reason.is_empty() || fix.is_empty()));
        }
        eprintln!("{}: post-copy {:?}, background-snapshot {:?}", found.version, found.postcopy, found.background_snapshot);
        assert_eq!(fs::read_dir(place.path()).expect("a directory").count(), 0);
        let of_uid = |pid: &str| fs::metadata(format!("/proc/{pid}")).is_ok_and(|data| data.uid() == 409_999);
        let left = fs::read_dir("/proc")
            .expect("/proc")
            .filter(|entry| entry.as_ref().is_ok_and(|entry| entry.file_name().to_str().is_some_and(of_uid)));
        assert_eq!(left.count(), 0, "a process is left");
    }
}

#[tokio::test]
async fn a_qemu_that_cannot_be_asked_is_an_error_with_its_words() {
    let place = Place::new();
    let settings = |binary: &str, limit| Interview {
        binary: binary.into(),
        accelerator: Accelerator::Tcg,
        uid: 409_998,
        gid: 409_998,
        working_dir: place.path().to_owned(),
        limit,
    };
    let missing = interview(&launcher(), &settings("/nonexistent/qemu", LIMIT)).await;
    assert!(
        matches!(&missing, Err(InterviewError::Spawn(SpawnError::Cage(reason))) if reason.contains("/nonexistent/qemu")),
        "{missing:?}"
    );
    let other = interview(&launcher(), &settings("/bin/ls", LIMIT)).await;
    assert!(matches!(&other, Err(InterviewError::Connect { log, .. }) if log.contains("ls:")), "{other:?}");
    let silent = place.path().join("silent");
    fs::write(&silent, "#!/bin/sh\nexec sleep 600\n").expect("written");
    fs::set_permissions(&silent, fs::Permissions::from_mode(0o755)).expect("executable");
    let silent = interview(&launcher(), &settings(silent.to_str().expect("text"), Duration::from_secs(1))).await;
    assert!(matches!(&silent, Err(InterviewError::TimedOut(_) | InterviewError::Connect { .. })), "{silent:?}");
}

#[tokio::test]
async fn the_cage_refuses_to_run_qemu_as_root_and_says_so() {
    let place = Place::new();
    let plan = CagePlan {
        uid: 0,
        gid: 0,
        binary: "/bin/true".into(),
        arguments: vec![],
        working_dir: place.path().to_owned(),
        read_only: vec![],
        writable: vec![],
        network: Network::Empty,
        nodes: vec![],
        cgroup: None,
        limits: vec![],
        cpus: vec![],
        keep: vec![],
        profile: Profile::Qemu,
        profile_name: None,
        log: None,
    };
    let log = OwnedFd::from(fs::File::create(place.path().join("log")).expect("log"));
    let error = godwit_qemu::cage::spawn(&launcher(), plan, PassedFds::new(), log).await.expect_err("refused");
    assert!(matches!(&error, SpawnError::Cage(reason) if reason.contains("root")), "{error:?}");
}

#[tokio::test]
async fn this_host_has_an_accelerator_and_a_reason_for_it() {
    let report = probe(&ProbeCommand::godwit(launcher().program)).await;
    eprintln!("{report:?}");
    assert!(!report.reason.is_empty());
}
