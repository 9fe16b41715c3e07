//! The commands of the guest agent that we use, typed. What a guest may lack is optional.

use std::net::IpAddr;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use godwit_model::guest::{
    ExecOutcome, ExecRequest, GuestAddress, GuestFacts, GuestInterface, MAX_ADDRESSES, MAX_INTERFACES, MAX_OUTPUT, Octets,
};
use godwit_model::{MacAddress, UnixMillis};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::{CALL_LIMIT, GuestAgent, Limits, QgaError};

/// For the answer that holds what a program wrote, in base64.
const OUTPUT: Limits = Limits { line: 2 * MAX_ENCODED + (64 << 10), string: MAX_ENCODED };
/// [`MAX_OUTPUT`] in base64. A multiple of 4, so that what is kept of a longer one is base64 as well.
const MAX_ENCODED: usize = MAX_OUTPUT.div_ceil(3) * 4;

/// What an agent says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AgentInfo {
    /// Its version, for people.
    pub version: String,
    /// Commands that it carries out.
    pub commands: Vec<String>,
}

/// A program in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exec {
    /// It runs.
    Running,
    /// It has ended. The agent forgets it with this answer.
    Ended(ExecOutcome),
}

#[derive(Deserialize)]
struct Info {
    #[serde(default)]
    version: String,
    #[serde(default)]
    supported_commands: Vec<SupportedCommand>,
}

#[derive(Deserialize)]
struct SupportedCommand {
    name: String,
    #[serde(default)]
    enabled: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Interface {
    name: String,
    hardware_address: Option<String>,
    #[serde(default)]
    ip_addresses: Vec<Address>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Address {
    ip_address: String,
    #[serde(default)]
    prefix: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct HostName {
    host_name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct OsInfo {
    pretty_name: Option<String>,
    name: Option<String>,
}

#[derive(Deserialize)]
struct Pid {
    pid: i64,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ExecStatus {
    exited: bool,
    exitcode: Option<i64>,
    signal: Option<i64>,
    out_data: Option<String>,
    err_data: Option<String>,
    #[serde(default)]
    out_truncated: bool,
    #[serde(default)]
    err_truncated: bool,
}

impl GuestAgent {
    pub(super) async fn facts<T: serde::de::DeserializeOwned>(&self, command: &'static str) -> Result<T, QgaError> {
        self.call(command, Value::Null, Limits::FACTS, CALL_LIMIT).await.map(|(value, _)| value)
    }

    /// `guest-ping`, within `limit`.
    ///
    /// # Errors
    /// See [`QgaError`]; so for all of these.
    pub async fn ping(&self, limit: Duration) -> Result<(), QgaError> {
        self.call::<IgnoredAny>("guest-ping", Value::Null, Limits::FACTS, limit).await.map(drop)
    }

    /// `guest-info`.
    ///
    /// # Errors
    /// See [`QgaError`].
    pub async fn info(&self) -> Result<AgentInfo, QgaError> {
        let info: Info = self.facts("guest-info").await?;
        let commands = info.supported_commands.into_iter().filter(|command| command.enabled).map(|command| command.name);
        Ok(AgentInfo { version: info.version, commands: commands.collect() })
    }

    /// `guest-network-get-interfaces`, as far as it makes sense.
    ///
    /// # Errors
    /// See [`QgaError`].
    pub async fn interfaces(&self) -> Result<Vec<GuestInterface>, QgaError> {
        let interfaces: Vec<Interface> = self.facts("guest-network-get-interfaces").await?;
        let address = |address: Address| {
            let ip: IpAddr = address.ip_address.parse().ok()?;
            Some(GuestAddress { ip, prefix: u8::try_from(address.prefix).ok()? })
        };
        let interface = |interface: Interface| GuestInterface {
            name: interface.name,
            mac: interface.hardware_address.and_then(|mac| mac.parse::<MacAddress>().ok()),
            addresses: interface.ip_addresses.into_iter().take(MAX_ADDRESSES).filter_map(address).collect(),
        };
        Ok(interfaces.into_iter().take(MAX_INTERFACES).map(interface).collect())
    }

    /// What the guest says of itself, as much as its agent can tell; `seen` is the time of asking.
    ///
    /// # Errors
    /// See [`QgaError`]: only if the agent is not there, not if it lacks a command.
    pub async fn look(&self, seen: UnixMillis) -> Result<GuestFacts, QgaError> {
        let info = self.info().await?;
        let can = |command: &str| info.commands.iter().any(|other| other == command);
        let mut facts =
            GuestFacts { agent: info.version.clone(), host_name: None, os: None, interfaces: vec![], clock: None, seen };
        if can("guest-get-host-name") {
            facts.host_name = told(self.facts::<HostName>("guest-get-host-name").await)?.map(|name| name.host_name);
        }
        if can("guest-get-osinfo") {
            facts.os = told(self.facts::<OsInfo>("guest-get-osinfo").await)?.and_then(|os| os.pretty_name.or(os.name));
        }
        if can("guest-network-get-interfaces") {
            facts.interfaces = told(self.interfaces().await)?.unwrap_or_default();
        }
        Ok(facts.harmless())
    }

    /// `guest-exec`: starts a program; its number.
    ///
    /// # Errors
    /// See [`QgaError`]; [`QgaError::may_have_acted`] says whether it may run nevertheless.
    pub async fn exec(&self, request: &ExecRequest, limit: Duration) -> Result<i64, QgaError> {
        let mut arguments = json!({ "path": request.program, "arg": request.args, "capture-output": true });
        if let (Some(stdin), Some(object)) = (&request.stdin, arguments.as_object_mut()) {
            object.insert("input-data".to_owned(), STANDARD.encode(&stdin.0).into());
        }
        let (pid, _) = self.call::<Pid>("guest-exec", arguments, Limits::FACTS, limit).await?;
        Ok(pid.pid)
    }

    /// `guest-exec-status` of a program that was started.
    ///
    /// # Errors
    /// See [`QgaError`]. An answer that is lost is lost for ever: the agent forgets a program that it has told of.
    pub async fn exec_status(&self, pid: i64, limit: Duration) -> Result<Exec, QgaError> {
        let (status, cut) = self.call::<ExecStatus>("guest-exec-status", json!({ "pid": pid }), OUTPUT, limit).await?;
        if !status.exited {
            return Ok(Exec::Running);
        }
        let number = |value: Option<i64>| value.and_then(|value| i32::try_from(value).ok());
        let (stdout, out_cut) = output(status.out_data, cut);
        let (stderr, err_cut) = output(status.err_data, cut);
        Ok(Exec::Ended(ExecOutcome {
            exit_code: number(status.exitcode),
            signal: number(status.signal),
            stdout,
            stderr,
            stdout_truncated: status.out_truncated || out_cut,
            stderr_truncated: status.err_truncated || err_cut,
        }))
    }

    /// `guest-get-time`: the guest's clock, in nanoseconds since 1970.
    ///
    /// # Errors
    /// See [`QgaError`].
    pub async fn time(&self) -> Result<i64, QgaError> {
        self.facts("guest-get-time").await
    }

    /// `guest-set-time`: sets the guest's clock to `nanos` since 1970, or, without, to what the machine's own clock says.
    ///
    /// # Errors
    /// See [`QgaError`].
    pub async fn set_time(&self, nanos: Option<i64>) -> Result<(), QgaError> {
        let arguments = nanos.map_or(Value::Null, |nanos| json!({ "time": nanos }));
        self.call::<IgnoredAny>("guest-set-time", arguments, Limits::FACTS, CALL_LIMIT).await.map(drop)
    }
}

/// A refusal is nothing told, and no error.
fn told<T>(result: Result<T, QgaError>) -> Result<Option<T>, QgaError> {
    match result {
        Err(error) if !error.is_refusal() => Err(error),
        other => Ok(other.ok()),
    }
}

/// What a program wrote, and whether there was more. What is no base64 is no output.
fn output(encoded: Option<String>, cut: bool) -> (Octets, bool) {
    let encoded = encoded.unwrap_or_default();
    let cut = cut && encoded.len() >= MAX_ENCODED;
    let whole = encoded.get(..encoded.len() / 4 * 4).unwrap_or_default();
    let decoded = STANDARD.decode(if cut { whole } else { &encoded });
    let lost = decoded.is_err();
    let mut bytes = decoded.unwrap_or_default();
    let more = bytes.len() > MAX_OUTPUT;
    bytes.truncate(MAX_OUTPUT);
    (Octets(bytes), cut || lost || more)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_wrote_is_bounded_and_says_so() {
        let text = |bytes: &[u8]| output(Some(STANDARD.encode(bytes)), false);
        assert_eq!(text(b"hello"), (Octets(b"hello".to_vec()), false));
        assert_eq!(output(None, true), (Octets(vec![]), false));
        assert_eq!(output(Some("%%%".into()), false), (Octets(vec![]), true));
        let long = STANDARD.encode(vec![7; MAX_OUTPUT + 1_000]);
        let (kept, truncated) = output(Some(long[..MAX_ENCODED].to_owned()), true);
        assert!(truncated && kept.0.len() == MAX_OUTPUT && kept.0.iter().all(|byte| *byte == 7));
        // A guest may send what is no text where the cut falls.
        assert_eq!(output(Some("é".repeat(MAX_ENCODED)), true), (Octets(vec![]), true));
    }
}
