//! The few commands of the guest agent protocol that a host needs to see that somebody is there.

use serde_json::{Value, json};

/// What to do about a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentAnswer {
    /// Send these bytes.
    Send(Vec<u8>),
    /// Power off; the protocol has no answer to that.
    Poweroff,
    /// Nothing: no command.
    Nothing,
}

const COMMANDS: [&str; 5] = ["guest-sync-delimited", "guest-sync", "guest-ping", "guest-info", "guest-shutdown"];

/// Answers one line of the channel.
#[must_use]
pub fn answer_agent(line: &[u8]) -> AgentAnswer {
    // A host that is unsure of the state of the channel sends 0xFF: what stood before it is void.
    let line = line.rsplit(|byte| *byte == 0xff).next().unwrap_or_default().trim_ascii();
    if line.is_empty() {
        return AgentAnswer::Nothing;
    }
    let Ok(request) = serde_json::from_slice::<Value>(line) else {
        return send(b"", &json!({"error": {"class": "GenericError", "desc": "not JSON"}}));
    };
    let id = request.pointer("/arguments/id").cloned();
    match request.get("execute").and_then(Value::as_str).unwrap_or_default() {
        "guest-sync-delimited" => send(b"\xff", &json!({"return": id})),
        "guest-sync" => send(b"", &json!({"return": id})),
        "guest-ping" => send(b"", &json!({"return": {}})),
        "guest-info" => {
            let commands = COMMANDS.map(|name| json!({"name": name, "enabled": true, "success-response": true}));
            let version = env!("CARGO_PKG_VERSION");
            send(b"", &json!({"return": {"version": version, "supported_commands": commands}}))
        }
        "guest-shutdown" => AgentAnswer::Poweroff,
        other => {
            let desc = format!("The command {other} has not been found");
            send(b"", &json!({"error": {"class": "CommandNotFound", "desc": desc}}))
        }
    }
}

fn send(before: &[u8], value: &Value) -> AgentAnswer {
    let mut bytes = before.to_vec();
    bytes.extend(value.to_string().into_bytes());
    bytes.push(b'\n');
    AgentAnswer::Send(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(line: &[u8]) -> String {
        match answer_agent(line) {
            AgentAnswer::Send(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_handshake() {
        assert_eq!(sent(b"{\"execute\":\"guest-sync\",\"arguments\":{\"id\":5}}"), "{\"return\":5}\n");
        let delimited = answer_agent(b"rubbish\xff{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":6}}\n");
        assert_eq!(delimited, AgentAnswer::Send(b"\xff{\"return\":6}\n".to_vec()));
        assert_eq!(sent(b"{\"execute\":\"guest-ping\"}"), "{\"return\":{}}\n");
        assert!(sent(b"{\"execute\":\"guest-info\"}").contains("guest-ping"));
    }

    #[test]
    fn the_rest() {
        assert_eq!(answer_agent(b"{\"execute\":\"guest-shutdown\"}"), AgentAnswer::Poweroff);
        assert_eq!(answer_agent(b"\n"), AgentAnswer::Nothing);
        assert!(sent(b"{\"execute\":\"guest-exec\"}").contains("CommandNotFound"));
        assert!(sent(b"{").contains("GenericError"));
        assert!(sent(b"[]").contains("CommandNotFound"));
    }
}
