//! Programs in guests: output and exit code as if they had run here.

use std::process::Command;

use godwit_model::{ErrorCode, ExecOutcome, Octets, Refusal};
use serde_json::{Value, json};

use crate::fake::{Ended, Fake, Script, vm};

fn outcome(exit_code: Option<i32>, signal: Option<i32>) -> ExecOutcome {
    let (stdout, stderr) = (Octets(b"a\x1b[1mb\n".to_vec()), Octets(b"oh\n".to_vec()));
    ExecOutcome { exit_code, signal, stdout, stderr, stdout_truncated: false, stderr_truncated: false }
}

fn fake(exec: Result<ExecOutcome, Refusal>) -> Fake {
    Fake::start(Script { exec: Some(exec), ..Script::default() })
}

#[test]
fn it_ends_as_the_program_ended_and_passes_its_output_on() {
    for (exit_code, signal, expected) in [(Some(0), None, 0), (Some(3), None, 3), (None, Some(15), 143)] {
        let fake = fake(Ok(outcome(exit_code, signal)));
        let ended = fake.run(&["vm", "exec", "web1", "--timeout", "5s", "--", "ls", "-l", "--all"]);
        assert_eq!((ended.code, ended.stdout.as_str(), ended.stderr.as_str()), (Some(expected), "a\u{1b}[1mb\n", "oh\n"));
        let sent: Value = serde_json::from_slice(&fake.seen("POST", "/vms/web1/exec")[0].body).expect("JSON");
        assert_eq!(sent, json!({"program": "ls", "args": ["-l", "--all"], "stdin": null, "timeout": 5_000}));
    }
}

#[test]
fn as_data_it_is_the_apis() {
    let fake = fake(Ok(outcome(Some(4), None)));
    let ended = fake.run(&["vm", "exec", "web1", "-o", "json", "--", "true"]);
    assert_eq!(ended.code, Some(4));
    assert_eq!(serde_json::from_str::<ExecOutcome>(&ended.stdout).expect("JSON"), outcome(Some(4), None));
}

#[test]
fn what_is_cut_off_is_said() {
    let fake = fake(Ok(ExecOutcome { stdout_truncated: true, ..outcome(Some(0), None) }));
    let ended = fake.run(&["vm", "exec", "web1", "--", "yes"]);
    assert!(ended.stderr.contains("wrote more to its standard output"), "{}", ended.stderr);
}

#[test]
fn a_program_that_did_not_run_or_end_has_a_code_of_ours() {
    for (code, expected) in
        [(ErrorCode::GuestSilent, 1), (ErrorCode::GuestRefused, 4), (ErrorCode::ExecUnfinished, 6), (ErrorCode::VmBusy, 8)]
    {
        let fake = fake(Err(Refusal::new(code, "the reason").hint("the fix")));
        let ended = fake.run(&["vm", "exec", "web1", "--", "true"]);
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(expected), ""), "{code}");
        assert!(ended.stderr.contains("the reason") && ended.stderr.contains("hint: the fix"), "{}", ended.stderr);
    }
}

#[test]
fn its_input_is_a_file_or_standard_input_and_bounded() {
    let fake = fake(Ok(outcome(Some(0), None)));
    let file = fake.home.path().join("input");
    std::fs::write(&file, b"from a file").expect("written");
    let ended = fake.run(&["vm", "exec", "web1", "--stdin", file.to_str().expect("text"), "--", "cat"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let ended = fake.run_with_input(&["vm", "exec", "web1", "--stdin", "-", "--", "cat"], b"typed");
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let sent: Vec<Value> =
        fake.seen("POST", "/vms/web1/exec").iter().map(|seen| serde_json::from_slice(&seen.body).expect("JSON")).collect();
    let sent: Vec<_> = sent.iter().map(|sent| sent["stdin"].as_str().expect("base64")).collect();
    assert_eq!(sent, ["ZnJvbSBhIGZpbGU=", "dHlwZWQ="]);
    let endless: &mut Command = &mut fake.command(&["vm", "exec", "web1", "--stdin", "/dev/zero", "--", "cat"]);
    let ended = Ended::of(endless.output().expect("ran"));
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(fake.run(&["vm", "exec", "web1"]).code == Some(2), "a program is needed");
    assert_eq!(fake.seen("POST", "/vms/web1/exec").len(), 2);
}

#[test]
fn what_the_guest_says_of_itself_is_shown_without_its_control_characters() {
    let mut told = vm("web1");
    told.status.guest = serde_json::from_value(json!({
        "agent": "10.0\u{1b}[2J", "host_name": "inside", "os": "Debian", "seen": 0,
        "interfaces": [
            {"name": "lo", "mac": null, "addresses": ["127.0.0.1/8"]},
            {"name": "eth0\u{202e}", "mac": null, "addresses": ["10.0.0.5/24", "fe80::1/64", "fd00::5/64"]},
        ]
    }))
    .expect("facts");
    let fake = Fake::start(Script { vms: vec![told], ..Script::default() });
    let shown = fake.run(&["vm", "show", "web1"]).stdout;
    assert!(shown.contains("10.0.0.5/24, fd00::5/64 on eth0\\u{202e}") && !shown.contains("127.0.0.1"), "{shown}");
    assert!(shown.contains("inside") && shown.contains("10.0\\u{1b}[2J, seen 1970-01-01"), "{shown}");
}
