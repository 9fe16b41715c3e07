//! Long work: waiting, following over broken streams, leaving it alone, cancelling.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use godwit_api::v1::{Task, TaskNote, TaskState};
use godwit_model::{
    Bytes, BytesPerSec, ErrorCode, Estimate, MigrationFigures, MigrationForecast, MigrationNeeds, MigrationPhase,
    MigrationProgress, Millis, Refusal, UnixMillis,
};

use crate::fake::{Fake, Script, event, task};

fn moving(phase: MigrationPhase, permille: u16, revision: u64) -> Task {
    let progress = MigrationProgress {
        phase,
        permille,
        wire_bytes: Bytes::mib(u64::from(permille)),
        ram_bytes: Bytes::mib(1),
        remaining: Bytes(0),
        rate: BytesPerSec(118 << 20),
        dirty_rate: None,
        rounds: 1,
        predicted_blackout: None,
        time_left: None,
        rung: None,
    };
    Task { progress: Some(progress), ..task("vm.migrate", TaskState::Running, revision) }
}

fn moved(revision: u64) -> Task {
    let figures = MigrationFigures {
        total: Millis(7_200),
        blackout: Millis(84),
        predicted_blackout: Some(Millis(110)),
        wire_bytes: Bytes::mib(412),
        ram_bytes: Bytes::GIB,
        rounds: 3,
        disk_bytes: Bytes(0),
        disk_time: Millis(0),
        left: Bytes(0),
        forecast: None,
    };
    Task { figures: Some(figures), ..task("vm.migrate", TaskState::Done, revision) }
}

fn ended(state: TaskState, code: ErrorCode) -> Task {
    Task { error: Some(Refusal::new(code, "it broke").hint("mend it")), ..task("vm.migrate", state, 9) }
}

const SUMMARY: &str = "web1 moved h1 → h2 in 7.2 s, blackout 84 ms, 412 MiB on the wire (RAM 1 GiB), 3 passes\n";

#[test]
fn a_migration_is_followed_over_a_broken_stream() {
    let first = vec![event(11, &moving(MigrationPhase::WarmUp, 100, 2)), event(12, &moving(MigrationPhase::WarmUp, 50, 3))];
    let second = vec![event(13, &moving(MigrationPhase::StopAndCopy, 900, 4)), event(14, &moved(5))];
    let begun = task("vm.migrate", TaskState::Running, 1);
    let fake = Fake::start(Script { task: Some(begun), streams: [first, second].into(), ..Script::default() });
    let run = fake.run(&["vm", "migrate", "web1", "--to", "h2", "--bandwidth", "1gbit", "--reason", "test"]);
    assert_eq!((run.code, run.stdout.as_str()), (Some(0), SUMMARY), "{}", run.stderr);
    let phases: Vec<&str> = run.stderr.lines().filter(|line| line.contains('%')).collect();
    assert_eq!(phases.len(), 2, "{}", run.stderr);
    assert!(phases[0].starts_with("web1 → h2: warm-up") && phases[1].starts_with("web1 → h2: stop-and-copy"), "{}", run.stderr);
    let asked: Vec<String> = fake.seen("GET", "/events").into_iter().map(|seen| seen.path).collect();
    assert_eq!(asked, ["/events", "/events?after=12"]);
    let request: serde_json::Value = serde_json::from_slice(&fake.seen("POST", "/vms/web1/migrate")[0].body).expect("JSON");
    assert_eq!(
        (request["host"].as_str(), request["reason"].as_str(), request["dry_run"].as_bool()),
        (Some("h2"), Some("test"), Some(false))
    );
    assert_eq!(request["policy"]["bandwidth"].as_u64(), Some(125_000_000));
}

#[test]
fn without_event_streams_a_task_is_polled() {
    let polls = [moving(MigrationPhase::WarmUp, 100, 2), moved(3)];
    let begun = task("vm.migrate", TaskState::Running, 1);
    let fake = Fake::start(Script { task: Some(begun), polls: polls.into(), no_events: true, ..Script::default() });
    let run = fake.run(&["vm", "migrate", "web1", "--to", "h2"]);
    assert_eq!((run.code, run.stdout.as_str()), (Some(0), SUMMARY), "{}", run.stderr);
}

#[test]
fn a_task_that_is_left_alone_is_printed_at_once() {
    let begun = task("vm.migrate", TaskState::Running, 1);
    let fake = Fake::start(Script { task: Some(begun.clone()), ..Script::default() });
    let run = fake.run(&["vm", "migrate", "web1", "--to", "h2", "--detach"]);
    assert_eq!((run.code, run.stdout), (Some(0), format!("{}\n", begun.id)));
    let json = fake.run(&["vm", "migrate", "web1", "--to", "h2", "--detach", "-o", "json"]).stdout;
    assert_eq!(serde_json::from_str::<Task>(&json).expect("JSON"), begun);
    assert!(fake.seen("GET", "/tasks").is_empty() && fake.seen("GET", "/events").is_empty());
}

#[test]
fn a_dry_run_only_asks() {
    let mut checked = task("vm.migrate", TaskState::Done, 1);
    checked.trail = vec![TaskNote { at: UnixMillis(0), text: "h2 has 3 GiB free\u{7}".into() }];
    let fake = Fake::start(Script { task: Some(checked), ..Script::default() });
    let run = fake.run(&["vm", "migrate", "web1", "--to", "h2", "--dry-run"]);
    assert_eq!((run.code, run.stdout.as_str()), (Some(0), "web1 could move to h2\n  h2 has 3 GiB free\\u{7}\n"));
    let request: serde_json::Value = serde_json::from_slice(&fake.seen("POST", "/vms/web1/migrate")[0].body).expect("JSON");
    assert_eq!(request["dry_run"].as_bool(), Some(true));
}

#[test]
fn a_dry_run_says_what_a_move_would_cost_and_what_it_needs() {
    let millis = |least, expected, most| Estimate { least: Millis(least), expected: Millis(expected), most: Millis(most) };
    let forecast = MigrationForecast {
        memory: Bytes::mib(620),
        disks: Bytes::mib(40),
        dirty_rate: BytesPerSec(8 << 20),
        rate: BytesPerSec(100 << 20),
        total: millis(4_000, 5_000, 7_000),
        blackout: millis(40, 50, 300),
        wire_bytes: Estimate { least: Bytes::mib(150), expected: Bytes::mib(190), most: Bytes::mib(240) },
        needs: None,
        learned_from: 2,
    };
    let said = |forecast| {
        let described = Task { forecast: Some(forecast), ..task("vm.migrate", TaskState::Done, 1) };
        let fake = Fake::start(Script { task: Some(described), ..Script::default() });
        fake.run(&["vm", "migrate", "web1", "--to", "h2", "--dry-run"]).stdout
    };
    let expected = "web1 could move to h2
  time      5.0 s (4.0 s to 7.0 s)
  blackout  50 ms (40 ms to 300 ms)
  wire      190 MiB (150 MiB to 240 MiB)
  from      620 MiB that the guest has touched, 8 MiB/s written to; learned from 2 earlier moves like it
  disks     40 MiB on disks that travel with it
";
    assert_eq!(said(forecast), expected);
    let needs = MigrationNeeds { max_blackout: Millis(450), bandwidth: Some(BytesPerSec(200 << 20)) };
    let hot = said(MigrationForecast { needs: Some(needs), learned_from: 0, ..forecast });
    assert!(
        hot.contains("cannot be stopped within its budget. It could be with --max-blackout 450ms, or 200 MiB/s on the wire."),
        "{hot}"
    );
    assert!(hot.contains("nothing is known of earlier moves"), "{hot}");
}

#[test]
fn a_migrations_bandwidth_is_changed_or_lifted() {
    for (rate, sent, said) in
        [("50MiB/s", serde_json::json!(50 << 20), "50 MiB/s"), ("none", serde_json::Value::Null, "any bandwidth")]
    {
        let running = task("vm.migrate", TaskState::Running, 1);
        let id = running.id.to_string();
        let fake = Fake::start(Script { task: Some(running), ..Script::default() });
        let run = fake.run(&["task", "bandwidth", &id, rate]);
        assert_eq!((run.code, run.stdout.as_str()), (Some(0), format!("vm.migrate of web1 may take {said}\n").as_str()));
        let request: serde_json::Value =
            serde_json::from_slice(&fake.seen("POST", &format!("/tasks/{id}/bandwidth"))[0].body).expect("JSON");
        assert_eq!(request["bandwidth"], sent);
    }
    let fake = Fake::start(Script::default());
    assert_eq!(fake.run(&["task", "bandwidth", "0123", "fast"]).code, Some(2));
}

#[test]
fn a_task_ends_with_the_exit_code_of_its_end() {
    let cases = [
        (ended(TaskState::Failed, ErrorCode::NotConverging), 1),
        (ended(TaskState::Failed, ErrorCode::NotEnoughMemory), 4),
        (ended(TaskState::Cancelled, ErrorCode::Cancelled), 7),
        (Task { error: None, ..ended(TaskState::Cancelled, ErrorCode::Cancelled) }, 7),
        (Task { error: None, ..ended(TaskState::Failed, ErrorCode::Internal) }, 1),
        (moved(9), 0),
    ];
    for (task, code) in cases {
        let fake = Fake::start(Script { task: Some(task.clone()), ..Script::default() });
        for verb in ["wait", "watch"] {
            let run = fake.run(&["task", verb, &task.id.to_string()]);
            assert_eq!(run.code, Some(code), "{task:?}");
            assert!(task.error.is_none() || run.stderr.contains("hint: mend it"), "{}", run.stderr);
        }
        let run = fake.run(&["vm", "migrate", "web1", "--to", "h2", "-o", "json"]);
        assert_eq!(run.code, Some(code));
        assert_eq!(serde_json::from_str::<Task>(&run.stdout).expect("the task, however it ended"), task);
    }
}

#[test]
fn waiting_ends_without_the_task() {
    let begun = task("vm.migrate", TaskState::Running, 1);
    let fake = Fake::start(Script { task: Some(begun.clone()), ..Script::default() });
    let run = fake.run(&["task", "wait", "abcd", "--timeout", "100ms"]);
    assert_eq!(run.code, Some(6));
    assert!(run.stderr.contains(&format!("godwit task cancel {}", begun.id)), "{}", run.stderr);

    let fake = Fake::start(Script { task: Some(begun), ..Script::default() });
    let mut child = fake.command(&["vm", "migrate", "web1", "--to", "h2"]).stderr(Stdio::piped()).spawn().expect("started");
    let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
    lines.next().expect("progress").expect("a line");
    // Progress is shown before the task is waited for: only what it asks then tells that it does.
    while fake.seen("GET", "/tasks").is_empty() {
        std::thread::yield_now();
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("interrupted");
    assert_eq!(child.wait().expect("ended").code(), Some(6));
    let rest: Vec<String> = lines.map(|line| line.expect("a line")).collect();
    assert!(rest[0].contains("goes on") && rest[1].contains("godwit task cancel"), "{rest:?}");
}

#[test]
fn cancelling_waits_until_it_is_so_and_says_if_it_was_too_late() {
    let begun = task("vm.migrate", TaskState::Running, 1);
    let streams = [vec![event(1, &ended(TaskState::Cancelled, ErrorCode::Cancelled))]];
    let fake = Fake::start(Script { task: Some(begun.clone()), streams: streams.into(), ..Script::default() });
    let run = fake.run(&["task", "cancel", &begun.id.to_string()]);
    assert_eq!((run.code, run.stdout.as_str()), (Some(0), "vm.migrate of web1 cancelled\n"), "{}", run.stderr);
    let late = Fake::start(Script { task: Some(moved(3)), ..Script::default() });
    let run = late.run(&["task", "cancel", &begun.id.to_string()]);
    assert_eq!(run.code, Some(4));
    assert!(run.stderr.contains("[too_late]"), "{}", run.stderr);
}

#[test]
fn the_beginning_of_an_id_is_enough_if_it_is_only_one() {
    let fake = Fake::start(Script { task: Some(moved(3)), ..Script::default() });
    assert_eq!(fake.run(&["task", "show", "abcd"]).code, Some(0));
    assert_eq!(fake.run(&["task", "show", "ABCD0000"]).code, Some(0));
    assert_eq!(fake.run(&["task", "show", "ffff"]).code, Some(3));
    assert_eq!(fake.run(&["task", "show", "abc"]).code, Some(2));
    assert_eq!(fake.run(&["task", "show", "../x"]).code, Some(2));
}
