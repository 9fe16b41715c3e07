//! Labs come, live through crashes, and go without a trace.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use godwit_lab::{Lab, LabError, LabSpec, LinkChange, Signal, in_namespace};

use crate::support::{FakeController, Scoped, answers, spec};

/// Everything that shows a lab's name: namespaces, directories, control groups, command lines.
fn traces(name: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut add = |path: &Path| {
        if path.symlink_metadata().is_ok() {
            found.push(path.display().to_string());
        }
    };
    for root in ["/run/godwit-lab", "/var/lib/godwit-lab"] {
        add(&Path::new(root).join(name));
        add(&Path::new(root).join(format!("{name}.lock")));
    }
    for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        add(&hierarchy.path().join(format!("godwit-lab-{name}")));
    }
    add(&Path::new("/sys/fs/cgroup").join(format!("godwit-lab-{name}")));
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(&format!("gw-{name}-")) {
            found.push(entry.path().display().to_string());
        }
    }
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).contains(&format!("/{name}/")) {
            found.push(String::from_utf8_lossy(&line).replace('\0', " "));
        }
    }
    found
}

fn is_running(pid: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|status| !status.contains("State:\tZ"))
}

/// The process that the stand-in's agent left behind, with a user id and a namespace of its own.
fn qemu_of(lab: &Lab, host: &str) -> String {
    let file = lab.status().expect("status").dir.join(host).join("state/qemu.pid");
    fs::read_to_string(file).expect("the agent has written it")
}

#[test]
fn a_whole_lab_comes_up_and_goes_without_a_trace() {
    let spec = LabSpec { agent_args: vec!["--memory".into(), "2GiB".into()], ..spec(3) };
    let scoped = Scoped::full(spec);
    let lab = &scoped.0;
    let name = lab.name().to_owned();
    let status = lab.status().expect("status");
    assert!(status.complete && status.controller.pid.is_some());
    assert_eq!(status.hosts.len(), 3);
    for host in &status.hosts {
        assert!(host.namespace_exists && host.agent.pid.is_some(), "{host:?}");
        let arguments = fs::read_to_string(status.dir.join(&host.name).join("state/agent.args")).expect("written");
        let expected = format!("--uid-base\n{}\n--vtep\n10.77.0.200\n--memory\n2GiB", host.uid_base);
        assert!(arguments.ends_with(&expected), "{arguments}");
        assert!(!status.dir.join(&host.name).join("join.token").exists());
    }
    // The API is in this namespace, the controller is not.
    assert!(answers(&status.api));
    let reached = || std::net::TcpStream::connect("10.77.0.254:7444").is_ok();
    assert!(in_namespace(&lab.namespace("h3").expect("h3"), reached).expect("entered"));
    assert!(Lab::list().contains(&name));
    assert!(matches!(Lab::up_network(LabSpec { name: name.clone(), ..self::spec(1) }), Err(LabError::Exists { .. })));

    let qemu = qemu_of(lab, "h2");
    let removed = Lab::open(&name).expect("opened").down().expect("gone");
    assert_eq!(removed.namespaces, 5);
    assert_eq!(traces(&name), [""; 0]);
    assert!(!is_running(&qemu));
    assert!(matches!(Lab::open(&name), Err(LabError::Unknown { .. })));
    assert_eq!(Lab::remove(&name).expect("nothing to do").processes, 0);
}

#[test]
fn daemons_can_crash_stand_still_and_be_started_again() {
    let scoped = Scoped::full(spec(1));
    let lab = &scoped.0;
    let api = lab.api().expect("the API's address");
    let (controller, agent) = (lab.controller(), lab.agent("h1").expect("h1"));
    assert!(matches!(controller.spawn(), Err(LabError::Running { .. })));
    controller.crash().expect("it dies");
    assert_eq!(controller.pid().expect("read"), None);
    assert!(!answers(&api));
    assert!(matches!(controller.signal(Signal::TERM), Err(LabError::NotRunning { .. })));
    let pid = controller.spawn().expect("it starts again");
    assert_eq!(controller.pid().expect("read"), Some(pid));
    // The same address as before.
    assert_eq!(lab.api().expect("the API's address"), api);
    assert!(answers(&api));

    let qemu = qemu_of(lab, "h1");
    agent.signal(Signal::STOP).expect("stopped");
    assert!(agent.pid().expect("read").is_some());
    assert!(matches!(agent.wait_exit(Duration::ZERO), Err(LabError::StillRunning { .. })));
    agent.crash().expect("it dies");
    assert!(is_running(&qemu), "what an agent started outlives it");
    agent.spawn().expect("it starts again");
    assert!(fs::read_to_string(agent.log().expect("a log")).expect("read").contains("is ready"));
}

#[test]
fn down_finds_what_a_crashed_lab_left_even_without_its_agents_and_record() {
    let scoped = Scoped::full(spec(2));
    let lab = &scoped.0;
    let name = lab.name().to_owned();
    let delay = LinkChange { delay: Some(Duration::from_millis(1)), ..LinkChange::default() };
    lab.set_link("h1", delay).expect("a relay starts");
    let status = lab.status().expect("status");
    let qemus = [qemu_of(lab, "h1"), qemu_of(lab, "h2")];
    // One agent is gone, the other stands still; its QEMU is in a control group.
    lab.agent("h1").expect("h1").crash().expect("it dies");
    lab.agent("h2").expect("h2").signal(Signal::STOP).expect("stopped");
    let group = Path::new("/sys/fs/cgroup/unified").join(format!("godwit-lab-{name}/h2/vm"));
    if Path::new("/sys/fs/cgroup/unified/cgroup.procs").exists() {
        fs::create_dir_all(&group).expect("a control group");
        fs::write(group.join("cgroup.procs"), &qemus[1]).expect("moved");
    }
    // Something is mounted in a directory of the lab; what lies behind it must survive.
    let (precious, mount_point) = (tempfile::tempdir().expect("a directory"), status.dir.join("h1/a b"));
    fs::write(precious.path().join("file"), "x").expect("written");
    fs::create_dir_all(&mount_point).expect("made");
    let mounted = Command::new("mount").arg("--bind").args([precious.path(), &mount_point]).status().expect("mount");
    assert!(mounted.success());

    let removed = Lab::remove(&name).expect("gone");
    // Controller, stopped agent, relay, two QEMUs.
    assert!(removed.processes >= 5, "{removed:?}");
    assert_eq!(traces(&name), [""; 0]);
    assert!(qemus.iter().all(|pid| !is_running(pid)));
    assert!(precious.path().join("file").is_file());
}

#[test]
fn down_works_from_every_half_of_a_lab() {
    let half = |break_it: &dyn Fn(&Lab)| {
        let scoped = Scoped::full(spec(1));
        let name = scoped.0.name().to_owned();
        break_it(&scoped.0);
        Lab::remove(&name).expect("gone");
        assert_eq!(traces(&name), [""; 0]);
    };
    let netns = |name: &str| assert!(Command::new("ip").args(["netns", "del", name]).status().expect("ip").success());
    half(&|lab| netns(&lab.switch_namespace()));
    half(&|lab| netns(&lab.outside_namespace()));
    half(&|lab| fs::remove_dir_all(Path::new("/run/godwit-lab").join(lab.name())).expect("removed"));
    half(&|lab| {
        // What `ip netns add` leaves when it is killed halfway.
        netns(&lab.namespace("h1").expect("h1"));
        fs::write(Path::new("/run/netns").join(lab.namespace("h1").expect("h1")), "").expect("written");
    });
    half(&|lab| {
        // A record that was not yet written: nothing but names to go by; QEMU cannot be known by its user id then.
        let (dir, agent) = (lab.status().expect("status").dir, lab.agent("h1").expect("h1"));
        assert!(agent.pid().expect("read").is_some());
        fs::remove_file(dir.join("lab.json")).expect("removed");
    });
    half(&|lab| {
        let dir = lab.status().expect("status").dir;
        fs::write(dir.join("lab.json"), "{\"spec\":").expect("written");
        assert!(matches!(Lab::open(lab.name()), Err(LabError::Record { .. })));
    });
}

#[test]
fn a_lab_that_fails_to_come_up_says_why_and_is_gone() {
    let bad = LabSpec { godwit: "/bin/false".into(), ..spec(1) };
    let name = bad.name.clone();
    let error = Lab::up_with(bad, &mut FakeController).expect_err("it cannot come up");
    assert!(matches!(&error, LabError::DaemonFailed { daemon, .. } if daemon.contains("controller")), "{error}");
    assert_eq!(traces(&name), [""; 0]);
}

#[test]
fn two_labs_at_once_do_not_touch_each_other() {
    let (first, second) = (Scoped::full(spec(2)), Scoped::full(spec(1)));
    let (one, two) = (first.0.status().expect("status"), second.0.status().expect("status"));
    assert_ne!(one.api.url, two.api.url);
    assert_ne!(one.hosts[0].uid_base, two.hosts[0].uid_base);
    let cut = LinkChange { state: Some(godwit_lab::LinkState::Down), ..LinkChange::default() };
    first.0.set_link("h1", cut).expect("cut");
    let echo = crate::support::Echo::host_to_switch(&second.0, "h1");
    assert!(echo.goes(Duration::from_secs(5)));
    let name = first.0.name().to_owned();
    drop(first);
    assert_eq!(traces(&name), [""; 0]);
    let now = second.0.status().expect("status");
    assert_eq!(now.controller.pid, two.controller.pid);
    assert_eq!(now.hosts[0].agent.pid, two.hosts[0].agent.pid);
    assert!(answers(&now.api) && echo.goes(Duration::from_secs(5)));
}

#[test]
fn state_can_lie_elsewhere_and_what_is_not_the_labs_stays() {
    let (state, pool) = (tempfile::tempdir().expect("made"), tempfile::tempdir().expect("made"));
    fs::write(pool.path().join("disk"), "x").expect("written");
    let elsewhere = |dir: &Path| LabSpec { dir: Some(dir.to_path_buf()), shared_pool: Some(pool.path().to_path_buf()), ..spec(1) };
    let inside = state.path().join("lab");
    let scoped = Scoped::full(elsewhere(&inside));
    assert!(inside.join("ctl/admin.token").is_file());
    assert_eq!(scoped.0.shared_pool().expect("read"), pool.path());
    fs::write(inside.join("notes"), "x").expect("written");
    drop(scoped);
    let left: Vec<_> = fs::read_dir(&inside).expect("read").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left, ["notes"]);
    assert!(pool.path().join("disk").is_file());
    // A directory in use is not taken over, for `down` would remove from it.
    assert!(matches!(Lab::up_network(elsewhere(&inside)), Err(LabError::DirectoryUsed { .. })));
}
