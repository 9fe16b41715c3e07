//! What begins a daemon, as far as it can be told without a cluster.

use std::io::Write;
use std::process::Stdio;

use crate::fake::{Ended, bare};

fn run(arguments: &[&str]) -> Ended {
    let home = tempfile::tempdir().expect("a directory");
    Ended::of(bare(home.path(), arguments).output().expect("ran"))
}

#[test]
fn what_only_godwit_starts_says_so() {
    for arguments in [&["cage"][..], &["cage", "--plan-fd", "1"], &["carry"], &["carry", "--config-fd", "x"]] {
        let ended = run(arguments);
        assert_eq!(ended.code, Some(2), "{arguments:?}");
        assert!(ended.stderr.contains("is started by the agent"), "{}", ended.stderr);
    }
    assert_eq!(run(&["lab-relay"]).code, Some(1));
    let probed = run(&["kvm-probe"]);
    let report: serde_json::Value = serde_json::from_str(&probed.stdout).expect("JSON");
    assert!(report["reason"].is_string(), "{report}");
}

#[test]
fn an_agent_that_has_not_joined_says_how_to() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (state, runtime) = (path("state"), path("run"));
    let ended = run(&["agent", "--state-dir", &state, "--run-dir", &runtime, "--qemu", "/bin/true"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("has not joined") && ended.stderr.contains("godwit host join"), "{}", ended.stderr);
    let unknown = run(&["agent", "--state-dir", &state, "--run-dir", &runtime, "--shared-pool", "nfs"]);
    assert_eq!(unknown.code, Some(2), "{}", unknown.stderr);
}

#[test]
fn a_join_token_comes_from_standard_input_or_a_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let state = dir.path().join("state").display().to_string();
    let arguments =
        ["host", "join", "--controller", "127.0.0.1:1", "--name", "h1", "--address", "192.0.2.1", "--state-dir", &state];
    let mut child = bare(dir.path(), &arguments).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started");
    child.stdin.take().expect("piped").write_all(b"gwj.broken\n").expect("written");
    let ended = Ended::of(child.wait_with_output().expect("ran"));
    assert_eq!(ended.code, Some(4));
    assert!(ended.stderr.contains("[token_invalid]") && ended.stderr.contains("godwit host token"), "{}", ended.stderr);
    assert!(!ended.stderr.contains("broken"), "the token was shown: {}", ended.stderr);
    let missing = run(&[&arguments[..], &["--token-file", "/nonexistent"]].concat());
    assert_eq!(missing.code, Some(2), "{}", missing.stderr);
    assert_eq!(run(&[&arguments[..], &["--token", "gwj"]].concat()).code, Some(2), "a token was taken as an argument");
}

#[test]
fn a_machine_that_cannot_be_a_host_is_told_why_and_how_to_mend_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (state, pool) = (path("state"), format!("fast={}", path("pool")));
    let arguments = ["host", "check", "--state-dir", &state, "--qemu", "/nonexistent/qemu", "--pool", &pool];
    let ended = run(&[&arguments[..], &["-o", "json"]].concat());
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    let findings: Vec<serde_json::Value> = serde_json::from_str(&ended.stdout).expect("a list");
    let finding = |name: &str| {
        findings.iter().find(|finding| finding["name"] == name).unwrap_or_else(|| panic!("no finding {name} in {}", ended.stdout))
    };
    assert_eq!(finding("qemu")["level"], "fail");
    assert_eq!(finding("pool_locks")["level"], "ok");
    for name in ["accelerator", "clock", "entropy", "seccomp", "landlock", "namespaces", "hugepages", "cgroup_limits", "nftables"] {
        finding(name);
    }
    for finding in &findings {
        assert_eq!(finding["level"] == "ok", finding["fix"].is_null(), "{finding}");
    }
    assert!(!std::path::Path::new(&state).exists(), "it made the agent's state");
    let table = run(&arguments);
    assert!(table.stdout.starts_with("FINDING") && table.stderr.contains("fix qemu: install QEMU"), "{}", table.stderr);
}

#[test]
fn an_authority_that_is_not_there_is_not_made_by_looking() {
    let dir = tempfile::tempdir().expect("a directory");
    let data = dir.path().display().to_string();
    for verb in [&["show"][..], &["rotate-intermediate"], &["export-root", "--out", "/nonexistent/x", "--yes"]] {
        let ended = run(&[&["cluster", "ca"][..], verb, &["--data-dir", &data]].concat());
        assert_eq!(ended.code, Some(1), "{verb:?}: {}", ended.stdout);
    }
    let refused = run(&["cluster", "ca", "export-root", "--out", "/nonexistent/x", "--data-dir", &data]);
    assert_eq!(refused.code, Some(4), "nobody was asked: {}", refused.stderr);
    let left: Vec<_> = std::fs::read_dir(dir.path()).expect("there").map(|entry| entry.expect("entry").file_name()).collect();
    assert!(left.iter().all(|name| name == "lock"), "{left:?}");
}

#[test]
fn a_lab_that_is_not_there_is_not_found() {
    let ended = run(&["lab", "status", "surely-not-there"]);
    assert_eq!(ended.code, Some(3));
    assert!(ended.stderr.contains("godwit lab up"), "{}", ended.stderr);
    assert_eq!(run(&["lab", "link", "h1"]).code, Some(2));
    assert_eq!(run(&["lab", "link", "h1", "--up", "--down"]).code, Some(2));
    assert_eq!(run(&["lab", "up", "../x"]).code, Some(2));
}
