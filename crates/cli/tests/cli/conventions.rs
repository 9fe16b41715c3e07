//! What holds for every command: exit codes, streams, hostile text, contexts, secrets.

use std::io::Read;
use std::process::Stdio;

use godwit_model::ErrorCode;

use crate::fake::{Ended, Fake, SECRET, Script, bare, vm};

#[test]
fn every_code_ends_with_its_documented_exit_code_and_shows_nothing_hostile() {
    let fake = Fake::start(Script::default());
    let page = include_str!("../../../../docs/errors.md");
    for code in ErrorCode::ALL {
        let row = page.lines().find(|line| line.starts_with(&format!("| `{code}` |"))).expect("documented");
        let documented: i32 =
            row.trim_end_matches('|').rsplit('|').next().and_then(|cell| cell.trim().parse().ok()).expect("a number");
        let ended = fake.run(&["vm", "show", code.as_str()]);
        assert_eq!(ended.code, Some(documented), "{code}");
        assert_eq!(ended.stdout, "");
        // Credentials are looked for here, whatever the controller advises.
        let hint = if *code == ErrorCode::Unauthenticated { "the token comes from" } else { "do this\\u{202e}\n" };
        let expected = format!("error: \\u{{1b}}[31m{code}\\u{{9b}} [{code}]\nhint: {hint}");
        assert!(ended.stderr.starts_with(&expected) && ended.stderr.lines().count() == 2, "{}", ended.stderr);
    }
}

#[test]
fn usage_is_refused_with_two_and_help_is_not() {
    let home = tempfile::tempdir().expect("a directory");
    let run = |arguments: &[&str]| Ended::of(bare(home.path(), arguments).output().expect("ran"));
    for bad in [
        &["vm", "migrate", "web1"][..],
        &["vm", "show", "../etc"],
        &["vm", "show", "a\nb"],
        &["vm", "create", "x", "--memory", "lots"],
        &["task", "wait", "x", "--timeout", "3"],
        &["frobnicate"],
        &[],
    ] {
        assert_eq!(run(bad).code, Some(2), "{bad:?}");
    }
    let help = run(&["--help"]);
    assert_eq!(help.code, Some(0));
    for group in ["Virtual machines:\n  vm ", "What happens:\n  task ", "Exit codes: 0 done"] {
        assert!(help.stdout.contains(group), "{}", help.stdout);
    }
    assert!(run(&["vm", "create", "--help"]).stdout.contains("Examples:"));
    assert!(run(&["completions", "bash"]).stdout.contains("_godwit"));
}

#[test]
fn without_a_controller_the_error_says_what_to_do() {
    let home = tempfile::tempdir().expect("a directory");
    let run = |arguments: &[&str]| Ended::of(bare(home.path(), arguments).output().expect("ran"));
    let none = run(&["vm", "list"]);
    assert_eq!(none.code, Some(2));
    assert!(none.stderr.contains("no controller is named") && none.stderr.contains("`godwit lab up`"), "{}", none.stderr);
    assert_eq!(run(&["vm", "list", "--context", "gone"]).code, Some(3));
    std::fs::write(home.path().join("token"), SECRET).expect("written");
    let token = home.path().join("token").display().to_string();
    let clear = run(&["vm", "list", "--url", "http://192.0.2.1:1", "--token-file", &token]);
    assert_eq!(clear.code, Some(2));
    assert!(clear.stderr.contains("loopback"), "{}", clear.stderr);
    // Nothing listens on port 1.
    let away = run(&["vm", "list", "--url", "http://127.0.0.1:1", "--token-file", &token]);
    assert_eq!(away.code, Some(1));
    assert!(away.stderr.contains("cannot be reached") && away.stderr.contains("godwit serve"), "{}", away.stderr);
    for ended in [none, clear, away] {
        assert!(!ended.stderr.contains("cafe"), "the secret was shown: {}", ended.stderr);
    }
}

#[test]
fn contexts_lead_to_their_controller() {
    let fake = Fake::start(Script { vms: vec![vm("web1")], ..Script::default() });
    let token = fake.home.path().join("token").display().to_string();
    let run = |arguments: &[&str]| Ended::of(bare(fake.home.path(), arguments).output().expect("ran"));
    let created = run(&["context", "create", "here", "--url", &fake.url, "--token-file", &token]);
    assert_eq!(created.code, Some(0), "{}", created.stderr);
    assert_eq!(run(&["context", "create", "here", "--url", &fake.url, "--token-file", &token]).code, Some(8));
    assert!(run(&["vm", "list"]).stdout.contains("web1"));
    assert!(run(&["vm", "--context", "here", "list"]).stdout.contains("web1"));
    let listed: serde_json::Value = serde_json::from_str(&run(&["context", "list", "-o", "json"]).stdout).expect("JSON");
    assert_eq!((&listed[0]["name"], &listed[0]["current"]), (&"here".into(), &true.into()));
    assert!(!std::fs::read_to_string(fake.home.path().join(".config/godwit/contexts/here.toml")).expect("a file").contains("cafe"));
    assert_eq!(run(&["context", "delete", "here"]).code, Some(0));
    assert_eq!(run(&["vm", "list"]).code, Some(2));
}

#[test]
fn the_token_is_sent_and_is_no_argument() {
    let fake = Fake::start(Script { vms: vec![vm("web1")], ..Script::default() });
    let mut child = fake.command(&["vm", "list", "--watch"]).stdout(Stdio::piped()).spawn().expect("started");
    let mut first = [0; 1];
    child.stdout.as_mut().expect("piped").read_exact(&mut first).expect("a line");
    let arguments = std::fs::read(format!("/proc/{}/cmdline", child.id())).expect("running");
    let environment = std::fs::read(format!("/proc/{}/environ", child.id())).expect("running");
    child.kill().expect("killed");
    child.wait().expect("ended");
    for place in [arguments, environment] {
        assert!(!String::from_utf8_lossy(&place).contains("cafe"));
    }
    assert!(fake.script().seen.iter().all(|seen| seen.authorization == format!("Bearer {SECRET}")));
}

#[test]
fn a_reader_that_leaves_ends_nothing_badly() {
    let fake = Fake::start(Script { vms: vec![vm("web1")], ..Script::default() });
    for arguments in [&["vm", "list"][..], &["vm", "list", "-o", "json"], &["completions", "zsh"]] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let ended = Ended::of(
            fake.command(arguments)
                .stdout(writer)
                .stderr(Stdio::piped())
                .spawn()
                .expect("started")
                .wait_with_output()
                .expect("ran"),
        );
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{arguments:?}");
    }
    // Nobody reads the error either.
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let status = fake.command(&["vm", "show", "not_found"]).stderr(writer).status().expect("ran");
    assert_eq!(status.code(), Some(3));
}
