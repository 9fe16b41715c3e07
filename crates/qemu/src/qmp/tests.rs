//! Tests of the session against a QEMU that is played here, with everything a real one may do wrong.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::*;

const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 99}, "package": ""}, "capabilities": []}}"#;
const LIMIT: Duration = Duration::from_secs(20);

/// The other end of a session.
struct Played {
    lines: Lines<BufReader<OwnedReadHalf>>,
    writer: OwnedWriteHalf,
}

impl Played {
    async fn say(&mut self, line: &str) {
        self.writer.write_all(format!("{line}\r\n").as_bytes()).await.expect("written");
    }

    /// The next command as it came.
    async fn read(&mut self) -> Value {
        let line = self.lines.next_line().await.expect("readable").expect("a command");
        serde_json::from_str(&line).expect("JSON")
    }

    /// The next command: its name and number.
    async fn hear(&mut self) -> (String, u64) {
        let command = self.read().await;
        (command["execute"].as_str().expect("a name").to_owned(), command["id"].as_u64().expect("an id"))
    }

    async fn answer(&mut self, id: u64, value: &Value) {
        self.say(&json!({"return": value, "id": id}).to_string()).await;
    }
}

async fn session() -> (Qmp, Played) {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let (reader, writer) = theirs.into_split();
    let mut played = Played { lines: BufReader::new(reader).lines(), writer };
    let play = async {
        played.say(GREETING).await;
        let (command, id) = played.hear().await;
        assert_eq!(command, "qmp_capabilities");
        played.answer(id, &json!({})).await;
    };
    let (qmp, ()) = tokio::join!(Qmp::begin(ours, LIMIT), play);
    (qmp.expect("a session"), played)
}

#[tokio::test]
async fn what_is_allowed_out_of_band_is_asked_so_where_qemu_offers_it() {
    for (offered, key, arguments) in [("", "execute", Value::Null), (r#""oob""#, "exec-oob", json!({"enable": ["oob"]}))] {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let (reader, writer) = theirs.into_split();
        let mut played = Played { lines: BufReader::new(reader).lines(), writer };
        let play = async {
            played.say(&GREETING.replace("[]", &format!("[{offered}]"))).await;
            let command = played.read().await;
            assert_eq!((&command["execute"], &command["arguments"]), (&json!("qmp_capabilities"), &arguments));
            played.answer(command["id"].as_u64().expect("an id"), &json!({})).await;
        };
        let (qmp, ()) = tokio::join!(Qmp::begin(ours, LIMIT), play);
        let qmp = qmp.expect("a session");
        let play = async {
            let command = played.read().await;
            assert_eq!(command[key], "migrate-recover");
            played.answer(command["id"].as_u64().expect("an id"), &json!({})).await;
        };
        let (answer, ()) = tokio::join!(qmp.migrate_recover_fd("socket"), play);
        answer.expect("an answer");
    }
}

#[tokio::test]
async fn unknown_events_fields_and_lines_end_nothing() {
    let (qmp, mut played) = session().await;
    let mut notices = qmp.listen();
    let play = async {
        let (_, id) = played.hear().await;
        played.say(r#"{"event": "FROM_THE_FUTURE", "timestamp": {"seconds": -1, "microseconds": -1}, "extra": 1}"#).await;
        played.say(r#"{"return": {}, "id": 424242}"#).await;
        played.say(r#"{"return": {}, "id": "not a number"}"#).await;
        played.say(r#"{"hello": "world"}"#).await;
        played.say(r#"{"error": {"class": "Odd", "desc": "?"}}"#).await;
        played.say(r#"{"event": "MIGRATION", "data": {"status": "never-heard-of"}}"#).await;
        played.answer(id, &json!({"status": "lucid", "running": true, "more": []})).await;
    };
    let (status, ()) = tokio::join!(qmp.query_status(), play);
    assert_eq!(status.expect("an answer").status, views::RunStatus::Unknown("lucid".into()));
    assert!(matches!(notices.next().await, Notice::Event(event) if event.name == "FROM_THE_FUTURE" && event.micros.is_none()));
    let Notice::Event(event) = notices.next().await else { panic!("no second event") };
    assert_eq!(event.known(), views::Known::Migration(views::MigrationStatus::Unknown("never-heard-of".into())));
}

#[tokio::test]
async fn answers_find_their_commands_in_any_order() {
    let (qmp, mut played) = session().await;
    let play = async {
        let (first, second) = (played.hear().await, played.hear().await);
        played.answer(second.1, &json!(second.0)).await;
        played.say(&json!({"id": first.1, "error": {"class": "GenericError", "desc": "no"}}).to_string()).await;
    };
    let (first, second, ()) = tokio::join!(qmp.execute("one", Value::Null), qmp.execute("two", Value::Null), play);
    assert_eq!(second.expect("two succeeded"), json!("two"));
    assert!(matches!(first, Err(QmpError::Refused { failure, .. }) if failure.description == "no"));
}

#[tokio::test]
async fn the_end_is_heard_by_callers_and_listeners() {
    let (qmp, mut played) = session().await;
    let mut notices = qmp.listen();
    let play = async {
        played.hear().await;
        drop(played);
    };
    let (answer, ()) = tokio::join!(qmp.execute("query-status", Value::Null), play);
    assert!(matches!(answer, Err(QmpError::Ended { .. })), "{answer:?}");
    assert!(matches!(notices.next().await, Notice::Ended(reason) if matches!(*reason, Ending::Closed)));
    assert!(matches!(notices.next().await, Notice::Ended(_)), "and again");
    assert!(matches!(qmp.listen().next().await, Notice::Ended(_)), "a late listener hears it too");
    assert!(matches!(qmp.execute("quit", Value::Null).await, Err(QmpError::Ended { .. })));
    assert!(qmp.ended().is_some());
}

#[tokio::test]
async fn a_silent_qemu_costs_the_time_limit_and_a_late_answer_is_dropped() {
    let (qmp, mut played) = session().await;
    let answer = qmp.execute_within("stop", Value::Null, Duration::from_millis(50)).await;
    assert!(matches!(answer, Err(QmpError::TimedOut { .. })), "{answer:?}");
    let (_, id) = played.hear().await;
    played.answer(id, &json!("late")).await;
    let play = async {
        let (_, id) = played.hear().await;
        played.answer(id, &json!("in time")).await;
    };
    let (answer, ()) = tokio::join!(qmp.execute("next", Value::Null), play);
    assert_eq!(answer.expect("an answer"), json!("in time"));
    assert!(qmp.shared.lock().waiting.is_empty(), "nothing is left of forgotten commands");
}

#[tokio::test]
async fn a_slow_listener_misses_events_but_holds_up_nobody() {
    let (qmp, mut played) = session().await;
    let mut slow = qmp.listen();
    let play = async {
        for number in 0..3 * EVENT_BACKLOG {
            played.say(&format!(r#"{{"event": "TICK", "data": {number}}}"#)).await;
        }
        let (_, id) = played.hear().await;
        played.answer(id, &json!({})).await;
    };
    let (answer, ()) = tokio::join!(qmp.execute("query-status", Value::Null), play);
    answer.expect("the reader was not held up");
    let Notice::Missed(missed) = slow.next().await else { panic!("told of nothing missed") };
    assert_eq!(missed, 2 * EVENT_BACKLOG as u64);
    assert!(matches!(slow.next().await, Notice::Event(event) if event.data == json!(2 * EVENT_BACKLOG)));
}

#[tokio::test]
async fn what_is_no_json_ends_the_session_with_the_reason() {
    let (qmp, mut played) = session().await;
    let mut notices = qmp.listen();
    played.say("HTTP/1.1 400 Bad Request").await;
    assert!(matches!(notices.next().await, Notice::Ended(reason) if matches!(*reason, Ending::Protocol(_))));
}

#[tokio::test]
async fn a_qemu_that_does_not_greet_is_given_up() {
    let (ours, _theirs) = UnixStream::pair().expect("sockets");
    assert!(matches!(Qmp::begin(ours, Duration::from_millis(50)).await, Err(ConnectError::NoGreeting(_))));
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    drop(theirs);
    assert!(matches!(Qmp::begin(ours, LIMIT).await, Err(ConnectError::Ended(_))));
}

#[tokio::test]
async fn a_descriptor_travels_with_its_command() {
    let (qmp, played) = session().await;
    let (reader, writer) = rustix::pipe::pipe().expect("pipe");
    let socket = played.lines.into_inner().into_inner().reunite(played.writer).expect("one socket");
    let play = async {
        socket.readable().await.expect("readable");
        let (line, fd) = receive(&socket);
        assert!(line.contains("getfd"));
        let id = serde_json::from_str::<Value>(&line).expect("JSON")["id"].clone();
        let answer = json!({"return": {}, "id": id}).to_string() + "\n";
        assert_eq!(socket.try_write(answer.as_bytes()).expect("written"), answer.len());
        fd
    };
    let (answer, received) = tokio::join!(qmp.getfd("migration", writer), play);
    answer.expect("an answer");
    rustix::io::write(&received, b"through").expect("the received end works");
    drop(received);
    let mut text = [0; 16];
    assert_eq!(rustix::io::read(&reader, &mut text).expect("read"), 7);
    assert_eq!(rustix::io::read(&reader, &mut text).expect("read"), 0, "ours was closed");
}

fn receive(socket: &UnixStream) -> (String, OwnedFd) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; 512];
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC).expect("received");
    let fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fd = fds.flatten().next().expect("a descriptor");
    (String::from_utf8(bytes[..received.bytes].to_vec()).expect("text"), fd)
}
