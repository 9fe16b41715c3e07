//! Tests of the client against a guest's agent that is played here, with everything a hostile one may do.

use std::path::Path;
use std::sync::Mutex as Lock;
use std::sync::atomic::{AtomicUsize, Ordering};

use godwit_model::guest::{EXEC_TIMEOUT, MAX_OUTPUT};
use godwit_model::{ExecRequest, Octets, UnixMillis};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;

use super::*;

/// Nothing takes this long when all is well.
const LIMIT: Duration = Duration::from_secs(20);
/// How long something is waited for that does not come.
const SHORT: Duration = Duration::from_millis(60);

/// What the played agent does about a command.
enum Does {
    Returns(Value),
    Says(Vec<u8>),
    Nothing,
    HangsUp,
}

/// An agent that does what a function says; it keeps the names of the commands in their order.
struct Played {
    agent: GuestAgent,
    heard: Arc<Lock<Vec<String>>>,
    task: tokio::task::JoinHandle<()>,
    _dir: TempDir,
}

impl Drop for Played {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Played {
    /// `greeting` is on the channel before anything was asked.
    fn with(greeting: &'static [u8], does: impl FnMut(&str, &Value) -> Does + Send + 'static) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("agent");
        let listener = UnixListener::bind(&path).expect("a socket");
        let heard = Arc::new(Lock::new(Vec::new()));
        let task = tokio::spawn(play(listener, greeting, Arc::clone(&heard), does));
        Self { agent: GuestAgent::at(path), heard, task, _dir: dir }
    }

    fn new(does: impl FnMut(&str, &Value) -> Does + Send + 'static) -> Self {
        Self::with(b"", does)
    }

    fn heard(&self) -> Vec<String> {
        self.heard.lock().expect("no panic").clone()
    }

    async fn until_heard(&self, command: &str) {
        let waiting = async {
            while !self.heard().iter().any(|heard| heard == command) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(LIMIT, waiting).await.unwrap_or_else(|_| panic!("never heard {command}: {:?}", self.heard()));
    }
}

/// As QEMU does: one client after the other.
async fn play(
    listener: UnixListener,
    greeting: &'static [u8],
    heard: Arc<Lock<Vec<String>>>,
    mut does: impl FnMut(&str, &Value) -> Does,
) {
    while let Ok((socket, _)) = listener.accept().await {
        let (reader, mut writer) = socket.into_split();
        let mut reader = BufReader::new(reader);
        let _ = writer.write_all(greeting).await;
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).await.is_ok_and(|length| length > 0) {
            let text = line.rsplit(|byte| *byte == 0xff).next().expect("one piece");
            let request: Value = serde_json::from_slice(text).expect("JSON");
            line.clear();
            let command = request["execute"].as_str().expect("a command").to_owned();
            let say = if command == "guest-sync-delimited" {
                // An answer with the number of somebody else, then the right one.
                let number = request["arguments"]["id"].as_u64().expect("a number");
                format!("\u{0}\n{{\"return\": {}}}\n", number + 1)
                    .into_bytes()
                    .into_iter()
                    .chain([0xff])
                    .chain(format!("{{\"return\": {}}}\n", number + 1).into_bytes())
                    .chain([0xff])
                    .chain(format!("{{\"return\": {number}}}\n").into_bytes())
                    .collect()
            } else {
                heard.lock().expect("no panic").push(command.clone());
                match does(&command, &request["arguments"]) {
                    Does::Returns(value) => format!("{}\n", json!({ "return": value, "weather": "fine" })).into_bytes(),
                    Does::Says(bytes) => bytes,
                    Does::Nothing => continue,
                    Does::HangsUp => break,
                }
            };
            if writer.write_all(&say).await.is_err() {
                break;
            }
        }
    }
}

fn request(program: &str) -> ExecRequest {
    ExecRequest { program: program.into(), args: vec!["-a".into()], stdin: Some(Octets(b"in".to_vec())), timeout: EXEC_TIMEOUT }
}

#[tokio::test]
async fn answers_to_an_earlier_client_are_passed_over() {
    let stale = b"{\"return\": {}}\n\xff{\"return\": 1}\n{\"return\": {\"exited\": true}}\n{\"half";
    let played = Played::with(stale, |command, _| match command {
        "guest-get-time" => Does::Returns(json!(42)),
        other => panic!("{other}"),
    });
    assert_eq!(played.agent.time().await.expect("an answer"), 42);
    assert_eq!(played.agent.time().await.expect("on the same session"), 42);
}

#[tokio::test]
async fn an_agent_that_never_answers_costs_the_time_limit_and_not_the_next_call() {
    let mut calls = 0;
    let played = Played::new(move |_, _| {
        calls += 1;
        if calls == 1 { Does::Nothing } else { Does::Returns(json!({})) }
    });
    let silent = played.agent.ping(SHORT).await;
    assert!(matches!(silent, Err(QgaError::TimedOut { command: "guest-ping", .. })), "{silent:?}");
    played.agent.ping(LIMIT).await.expect("on a session of its own");
}

#[tokio::test]
async fn a_channel_that_nobody_serves_costs_the_time_limit() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("agent");
    let agent = GuestAgent::at(path.clone());
    assert!(matches!(agent.ping(LIMIT).await, Err(QgaError::Connect(_))), "there is none");
    let _listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    for _ in 0..3 {
        assert!(matches!(agent.ping(SHORT).await, Err(QgaError::TimedOut { .. })));
    }
}

#[tokio::test]
async fn rubbish_is_an_error_and_the_next_call_begins_anew() {
    let mut says =
        [&b"SSH-2.0\n"[..], b"[]\n", b"{\"return\": {\"version\": 7}}\n", b"{\"return\": [[[", b"\n\xff\n\x00\n"].into_iter();
    let played = Played::new(move |command, _| match (command, says.next()) {
        ("guest-info", Some(bytes)) => Does::Says(bytes.to_vec()),
        (_, None) => Does::Returns(json!({"version": "1", "supported_commands": [{"name": "a", "enabled": true}, {"name": "b"}]})),
        other => panic!("{other:?}"),
    });
    for turn in 0..5 {
        let asked = tokio::time::timeout(SHORT * 4, played.agent.info()).await;
        assert!(!matches!(asked, Ok(Ok(_))), "turn {turn}: {asked:?}");
    }
    let info = played.agent.info().await.expect("an answer");
    assert_eq!(info, AgentInfo { version: "1".into(), commands: vec!["a".into()] });
}

#[tokio::test]
async fn an_agent_that_hangs_up_is_asked_anew_and_no_command_is_sent_twice() {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let played = Played::new(move |command, _| match (command, counted.fetch_add(1, Ordering::Relaxed)) {
        ("guest-exec", _) => Does::HangsUp,
        _ => Does::Returns(json!({})),
    });
    played.agent.ping(LIMIT).await.expect("an answer");
    let error = played.agent.exec(&request("/bin/true"), LIMIT).await.expect_err("hung up");
    assert!(matches!(error, QgaError::Closed(_)) && error.may_have_acted(), "{error:?}");
    played.agent.ping(LIMIT).await.expect("an answer again");
    assert_eq!(count.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn output_without_end_is_given_up_and_holds_up_nobody() {
    let played = Played::new(|command, _| match command {
        // No string, no end of a line.
        "guest-info" => Does::Says(vec![b'['; 1 << 20]),
        // One string that is cut.
        "guest-get-host-name" => Does::Says([&b"{\"return\": {\"host-name\": \""[..], &vec![b'x'; 8 << 20], b"\"}}\n"].concat()),
        _ => Does::Returns(json!({})),
    });
    let endless = tokio::time::timeout(SHORT * 4, played.agent.info()).await;
    assert!(!matches!(endless, Ok(Ok(_))), "{endless:?}");
    let (name, cut) =
        played.agent.call::<Value>("guest-get-host-name", Value::Null, Limits::FACTS, LIMIT).await.expect("an answer");
    assert!(cut && name["host-name"].as_str().expect("text").len() == Limits::FACTS.string);
    played.agent.ping(LIMIT).await.expect("an answer");
}

#[tokio::test]
async fn the_answer_of_a_caller_who_went_away_is_given_to_nobody() {
    let mut calls = 0;
    let played = Played::new(move |command, _| {
        calls += 1;
        match command {
            "guest-get-time" if calls == 1 => Does::Nothing,
            "guest-get-time" => Does::Returns(json!(calls)),
            _ => Does::Returns(json!({})),
        }
    });
    let agent = played.agent.clone();
    let gone = tokio::spawn(async move { agent.time().await });
    played.until_heard("guest-get-time").await;
    gone.abort();
    let _ = gone.await;
    assert_eq!(played.agent.time().await.expect("its own answer"), 2);
    // Many at once get one answer each.
    let mut asking = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let agent = played.agent.clone();
        asking.spawn(async move { agent.time().await.expect("an answer") });
    }
    let mut answers = asking.join_all().await;
    answers.sort_unstable();
    assert_eq!(answers, (3..11).collect::<Vec<i64>>());
}

#[tokio::test]
async fn a_refusal_is_the_guests_word_made_harmless() {
    let played = Played::new(|_, _| {
        let desc = format!("no\u{1b}[2J\n{}", "x".repeat(5_000));
        Does::Says(format!("{}\n", json!({"error": {"class": "CommandNotFound", "desc": desc}})).into_bytes())
    });
    let error = played.agent.ping(LIMIT).await.expect_err("refused");
    assert!(error.is_refusal() && !error.may_have_acted());
    let text = error.to_string();
    assert!(text.len() < 400 && !text.chars().any(char::is_control), "{text}");
}

#[tokio::test]
async fn what_a_guest_tells_of_itself_is_taken_as_far_as_it_makes_sense() {
    let commands = ["guest-get-host-name", "guest-get-osinfo", "guest-network-get-interfaces"];
    let commands = commands.map(|name| json!({"name": name, "enabled": true}));
    let played = Played::new(move |command, _| match command {
        "guest-info" => Does::Returns(json!({"version": "10.0\u{7}", "supported_commands": commands})),
        "guest-get-host-name" => Does::Returns(json!({"host-name": "web1\u{1b}[2J"})),
        "guest-get-osinfo" => Does::Says(b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"disabled\"}}\n".to_vec()),
        "guest-network-get-interfaces" => Does::Returns(json!([
            {"name": "lo", "hardware-address": "00:00:00:00:00:00", "ip-addresses": [{"ip-address-type": "ipv4", "ip-address": "127.0.0.1", "prefix": 8}]},
            {"name": "eth0", "hardware-address": "52:54:00:00:00:01", "ip-addresses": [
                {"ip-address-type": "ipv4", "ip-address": "10.0.0.5", "prefix": 24},
                {"ip-address-type": "ipv6", "ip-address": "fe80::1", "prefix": 64},
                {"ip-address-type": "ipv4", "ip-address": "evil\u{1b}", "prefix": 24},
                {"ip-address-type": "ipv4", "ip-address": "10.0.0.6", "prefix": 5_000_000},
            ]},
            {"name": "tun0"},
        ])),
        other => panic!("{other}"),
    });
    let facts = played.agent.look(UnixMillis(7)).await.expect("facts");
    assert_eq!((facts.agent.as_str(), facts.host_name.as_deref(), facts.os), ("10.0", Some("web1[2J"), None));
    let told: Vec<String> = facts
        .interfaces
        .iter()
        .map(|interface| {
            format!("{} {:?}", interface.name, interface.addresses.iter().map(ToString::to_string).collect::<Vec<_>>())
        })
        .collect();
    assert_eq!(told, ["lo [\"127.0.0.1/8\"]", "eth0 [\"10.0.0.5/24\", \"fe80::1/64\"]", "tun0 []"]);
}

#[tokio::test]
async fn a_program_runs_and_tells_how_it_ended() {
    let mut polls = 0;
    let played = Played::new(move |command, arguments| match command {
        "guest-exec" => {
            assert_eq!(arguments, &json!({"path": "/bin/x", "arg": ["-a"], "capture-output": true, "input-data": "aW4="}));
            Does::Returns(json!({"pid": 77}))
        }
        "guest-exec-status" => {
            assert_eq!(arguments, &json!({"pid": 77}));
            polls += 1;
            match polls {
                1 => Does::Returns(json!({"exited": false})),
                2 => Does::Returns(
                    json!({"exited": true, "exitcode": 3, "out-data": "b3V0", "err-data": "ZXJy", "err-truncated": true}),
                ),
                3 => Does::Returns(json!({"exited": true, "signal": 9, "out-data": "A".repeat(2 << 20)})),
                _ => Does::Returns(json!({"exited": true, "exitcode": 7_000_000_000_i64, "out-data": "%%%"})),
            }
        }
        other => panic!("{other}"),
    });
    let pid = played.agent.exec(&request("/bin/x"), LIMIT).await.expect("started");
    assert_eq!(played.agent.exec_status(pid, LIMIT).await.expect("runs"), Exec::Running);
    let ended = async || match played.agent.exec_status(pid, LIMIT).await.expect("an answer") {
        Exec::Ended(outcome) => outcome,
        Exec::Running => panic!("it has ended"),
    };
    let outcome = ended().await;
    assert_eq!((outcome.exit_code, outcome.signal), (Some(3), None));
    assert_eq!((outcome.stdout.0.as_slice(), outcome.stderr.0.as_slice()), (&b"out"[..], &b"err"[..]));
    assert_eq!((outcome.stdout_truncated, outcome.stderr_truncated), (false, true));
    let outcome = ended().await;
    assert_eq!((outcome.signal, outcome.stdout.0.len(), outcome.stdout_truncated), (Some(9), MAX_OUTPUT, true));
    let outcome = ended().await;
    assert_eq!((outcome.exit_code, outcome.stdout.0.len(), outcome.stdout_truncated), (None, 0, true));
}

/// An agent with file systems that can be frozen; `answers` says whether it tells of the freeze.
fn freezable(answers: bool) -> (Played, Arc<Lock<bool>>) {
    let frozen = Arc::new(Lock::new(false));
    let state = Arc::clone(&frozen);
    let played = Played::new(move |command, _| {
        let mut state = state.lock().expect("no panic");
        match command {
            "guest-fsfreeze-freeze" => {
                *state = true;
                if answers { Does::Returns(json!(2)) } else { Does::Nothing }
            }
            "guest-fsfreeze-thaw" => {
                *state = false;
                Does::Returns(json!(2))
            }
            "guest-fsfreeze-status" => Does::Returns(json!(if *state { "frozen" } else { "thawed" })),
            other => panic!("{other}"),
        }
    });
    (played, frozen)
}

async fn thawed(frozen: &Lock<bool>) {
    let waiting = async {
        while *frozen.lock().expect("no panic") {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, waiting).await.expect("thawed in the end");
}

#[tokio::test]
async fn a_freeze_ends_when_it_is_told_to() {
    let (played, frozen) = freezable(true);
    let held = played.agent.freeze(LIMIT, LIMIT).await.expect("frozen");
    assert_eq!(held.file_systems, 2);
    assert!(*frozen.lock().expect("no panic"));
    assert!(!played.agent.thaw_orphan().await.expect("asked"), "a freeze of ours is nobody's orphan");
    assert_eq!(held.thaw().await, Thawed::ByRequest);
    assert!(!*frozen.lock().expect("no panic"));
}

#[tokio::test]
async fn a_freeze_never_outlives_its_time_or_its_caller() {
    let (played, frozen) = freezable(true);
    // The caller lives, and says nothing.
    let held = played.agent.freeze(LIMIT, SHORT).await.expect("frozen");
    thawed(&frozen).await;
    assert_eq!(held.thaw().await, Thawed::TimeWasOver);
    // The caller dies.
    let agent = played.agent.clone();
    let caller = tokio::spawn(async move {
        let _held = agent.freeze(LIMIT, LIMIT).await.expect("frozen");
        std::future::pending::<()>().await;
    });
    played.until_heard("guest-fsfreeze-freeze").await;
    caller.abort();
    let _ = caller.await;
    thawed(&frozen).await;
    // The caller forgets it.
    std::mem::forget(played.agent.freeze(LIMIT, SHORT).await.expect("frozen"));
    thawed(&frozen).await;
}

#[tokio::test]
async fn a_guest_that_froze_without_saying_so_is_thawed() {
    let (played, frozen) = freezable(false);
    let silent = played.agent.freeze(SHORT, LIMIT).await;
    assert!(matches!(silent, Err(QgaError::TimedOut { .. })), "{silent:?}");
    thawed(&frozen).await;
}

#[tokio::test]
async fn what_an_earlier_life_of_the_host_left_frozen_is_thawed() {
    let (played, frozen) = freezable(true);
    *frozen.lock().expect("no panic") = true;
    assert!(played.agent.thaw_orphan().await.expect("thawed"));
    assert!(!*frozen.lock().expect("no panic"));
    assert!(!played.agent.thaw_orphan().await.expect("asked"));
}

#[tokio::test]
async fn numbers_of_sessions_are_not_repeated() {
    let (one, two) = (draw_number().expect("a number"), draw_number().expect("a number"));
    assert!(one != two && one < 1 << 53);
    assert!(GuestAgent::at(Path::new("/nonexistent").to_owned()).ping(LIMIT).await.is_err());
}
