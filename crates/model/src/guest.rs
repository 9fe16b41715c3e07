//! What a guest says of itself through its agent, and programs that are run in it. All of it is a guest's word: bounded, harmless to show, and
//! never believed about anything but the guest.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{ErrorCode, MacAddress, Millis, Refusal, UnixMillis};

/// Interfaces of a guest that are kept.
pub const MAX_INTERFACES: usize = 32;
/// Addresses of one interface that are kept.
pub const MAX_ADDRESSES: usize = 32;
/// Characters of a guest's text that are kept.
pub const MAX_TEXT: usize = 120;
/// Bytes of each of a program's two outputs that are kept.
pub const MAX_OUTPUT: usize = 512 << 10;
/// Bytes that a program can be given as its input.
pub const MAX_INPUT: usize = 512 << 10;
/// Arguments of a program, and their bytes together with its name.
pub const MAX_ARGUMENTS: (usize, usize) = (256, 64 << 10);
/// How long a program is waited for if nothing else is said.
pub const EXEC_TIMEOUT: Millis = Millis(60_000);
/// How long a program is waited for at most.
pub const LONGEST_EXEC: Millis = Millis(15 * 60_000);

/// What a guest says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct GuestFacts {
    /// Version of its agent.
    pub agent: String,
    /// Its host name.
    pub host_name: Option<String>,
    /// Its operating system.
    pub os: Option<String>,
    /// Its network interfaces.
    pub interfaces: Vec<GuestInterface>,
    /// Its clock, if its agent tells the time.
    #[serde(default)]
    pub clock: Option<GuestClock>,
    /// When it was asked, by its host's clock.
    pub seen: UnixMillis,
}

/// A guest's clock beside that of its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct GuestClock {
    /// The guest's less the host's, in milliseconds.
    pub offset_ms: i64,
    /// How far the offset may be wrong: half the time that the question took, in milliseconds.
    pub within_ms: u64,
    /// By how much it was put forward before, in milliseconds: after the VM had stood still, as it does in a move.
    pub put_forward_ms: Option<u64>,
}

/// Clocks that are behind by no more than this are left alone.
const UNNOTICED_MS: u64 = 20;
/// Who is behind by more keeps a time of its own.
const OWN_TIME_MS: u64 = 24 * 3_600_000;

impl GuestClock {
    /// By how much to put forward the clock of a guest that has just stood still; a clock that is ahead is never put back.
    #[must_use]
    pub fn behind_ms(&self) -> Option<u64> {
        let behind = u64::try_from(self.offset_ms.checked_neg()?).ok()?;
        (behind > UNNOTICED_MS.saturating_add(self.within_ms) && behind <= OWN_TIME_MS).then_some(behind)
    }
}

/// A network interface as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct GuestInterface {
    /// The guest's name of it.
    pub name: String,
    /// Its address on the wire.
    #[schema(value_type = Option<String>)]
    pub mac: Option<MacAddress>,
    /// Its IP addresses, `ADDRESS/PREFIX`.
    #[schema(value_type = Vec<String>)]
    pub addresses: Vec<GuestAddress>,
}

/// An IP address with the length of its prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestAddress {
    /// The address.
    pub ip: IpAddr,
    /// Bits of its network.
    pub prefix: u8,
}

impl GuestAddress {
    /// Whether others may reach the guest by it: it means neither the guest itself nor only its own link.
    #[must_use]
    pub const fn is_reachable(&self) -> bool {
        match self.ip {
            IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local() && !ip.is_unspecified(),
            IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local() && !ip.is_unspecified(),
        }
    }
}

impl fmt::Display for GuestAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

/// A text that is not `ADDRESS/PREFIX`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an address with the length of its prefix")]
pub struct InvalidAddress;

impl FromStr for GuestAddress {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let (ip, prefix) = text.split_once('/').ok_or(InvalidAddress)?;
        let (ip, prefix) = (ip.parse().map_err(|_| InvalidAddress)?, prefix.parse().map_err(|_| InvalidAddress)?);
        Ok(Self { ip, prefix })
    }
}

impl Serialize for GuestAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GuestAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl GuestFacts {
    /// The same within its bounds, and without characters that act on who looks at it.
    #[must_use]
    pub fn harmless(mut self) -> Self {
        let text = |text: &mut String| *text = text.chars().filter(|c| !c.is_control()).take(MAX_TEXT).collect();
        text(&mut self.agent);
        self.host_name.iter_mut().chain(&mut self.os).for_each(text);
        self.interfaces.truncate(MAX_INTERFACES);
        for interface in &mut self.interfaces {
            text(&mut interface.name);
            interface.addresses.truncate(MAX_ADDRESSES);
        }
        self
    }
}

/// Bytes; base64 where they are written as text.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Octets(pub Vec<u8>);

impl fmt::Debug for Octets {
    /// Not what they are: they may be a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Octets({} bytes)", self.0.len())
    }
}

impl Serialize for Octets {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Octets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map(Self).map_err(|_| serde::de::Error::custom("not base64"))
    }
}

/// A program to be run in a guest.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// The program: a path, or a name that the guest's agent looks up.
    pub program: String,
    /// Its arguments; they may hold secrets, and are not recorded.
    pub args: Vec<String>,
    /// What it reads.
    pub stdin: Option<Octets>,
    /// How long it is waited for.
    pub timeout: Millis,
}

impl fmt::Debug for ExecRequest {
    /// Not its arguments: they may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExecRequest").field("program", &self.program).field("args", &self.args.len()).finish_non_exhaustive()
    }
}

impl ExecRequest {
    /// Checks what can be checked without a guest.
    ///
    /// # Errors
    /// [`ErrorCode::BadRequest`] with what is wrong.
    pub fn validate(&self) -> Result<(), Refusal> {
        let bad = |what: String, hint: &str| Err(Refusal::new(ErrorCode::BadRequest, what).hint(hint));
        let (most, bytes) = MAX_ARGUMENTS;
        if self.program.is_empty() || self.program.chars().any(char::is_control) {
            return bad("the program's name is empty or holds control characters".into(), "name a program, such as /bin/uname");
        }
        if self.args.iter().any(|arg| arg.contains('\0')) {
            return bad("an argument holds a zero byte".into(), "a program's arguments cannot; pass it with --stdin");
        }
        if self.args.len() > most || self.args.iter().map(String::len).sum::<usize>() + self.program.len() > bytes {
            return bad(
                format!("a program gets at most {most} arguments of {bytes} bytes together"),
                "pass what is longer with --stdin",
            );
        }
        if self.stdin.as_ref().is_some_and(|stdin| stdin.0.len() > MAX_INPUT) {
            return bad(format!("a program's input has at most {MAX_INPUT} bytes"), "copy larger files over the network");
        }
        if self.timeout.0 == 0 || self.timeout > LONGEST_EXEC {
            return bad(
                format!("a program is waited for at least 1 ms and at most {LONGEST_EXEC}"),
                "start longer work in the background of the guest, and look at it later",
            );
        }
        Ok(())
    }
}

/// How a program in a guest ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ExecOutcome {
    /// Its exit code, if it ended by itself.
    pub exit_code: Option<i32>,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
    /// What it wrote to its standard output, base64; at most 512 KiB.
    #[schema(value_type = String)]
    pub stdout: Octets,
    /// What it wrote to its standard error, base64; at most 512 KiB.
    #[schema(value_type = String)]
    pub stderr: Octets,
    /// Whether it wrote more to its standard output than is kept.
    pub stdout_truncated: bool,
    /// Whether it wrote more to its standard error than is kept.
    pub stderr_truncated: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(program: &str, args: &[&str]) -> ExecRequest {
        let args = args.iter().map(ToString::to_string).collect();
        ExecRequest { program: program.into(), args, stdin: None, timeout: EXEC_TIMEOUT }
    }

    #[test]
    fn a_program_that_no_guest_could_be_asked_for_is_refused() {
        request("/bin/uname", &["-a", "zwei\n"]).validate().expect("fine");
        let long = "x".repeat(MAX_ARGUMENTS.1);
        let many = vec!["x"; MAX_ARGUMENTS.0 + 1];
        for bad in [
            request("", &[]),
            request("/bin/\0", &[]),
            request("a\nb", &[]),
            request("a", &["\0"]),
            request("a", &[&long]),
            request("a", &many),
            ExecRequest { timeout: Millis(0), ..request("a", &[]) },
            ExecRequest { timeout: Millis(LONGEST_EXEC.0 + 1), ..request("a", &[]) },
            ExecRequest { stdin: Some(Octets(vec![0; MAX_INPUT + 1])), ..request("a", &[]) },
        ] {
            let refusal = bad.validate().expect_err("refused");
            assert!(refusal.code == ErrorCode::BadRequest && refusal.hint.is_some(), "{refusal:?}");
        }
    }

    #[test]
    fn secrets_are_not_shown_by_accident() {
        let shown = format!("{:?}", ExecRequest { stdin: Some(Octets(b"hunter2".to_vec())), ..request("sh", &["s3cret"]) });
        assert!(shown.contains("sh") && !shown.contains("s3cret") && !shown.contains("hunter2"), "{shown}");
        assert_eq!(format!("{:?}", Octets(vec![1, 2])), "Octets(2 bytes)");
    }

    #[test]
    fn what_a_guest_says_is_bounded_and_harmless() {
        let address: GuestAddress = "10.0.0.5/24".parse().expect("an address");
        let interface = GuestInterface { name: "eth0\u{1b}[2J".into(), mac: None, addresses: vec![address; MAX_ADDRESSES + 5] };
        let facts = GuestFacts {
            agent: "9".repeat(5_000),
            host_name: Some("a\nb".into()),
            os: None,
            interfaces: vec![interface; MAX_INTERFACES + 5],
            clock: None,
            seen: UnixMillis(0),
        };
        let kept = facts.harmless();
        assert_eq!((kept.agent.len(), kept.host_name.as_deref()), (MAX_TEXT, Some("ab")));
        assert_eq!((kept.interfaces.len(), kept.interfaces[0].addresses.len()), (MAX_INTERFACES, MAX_ADDRESSES));
        assert_eq!(kept.interfaces[0].name, "eth0[2J");
        let again: GuestFacts = serde_json::from_value(serde_json::to_value(&kept).expect("JSON")).expect("the same");
        assert_eq!(again, kept);
    }

    #[test]
    fn clocks_are_put_forward_only_and_only_by_what_was_measured_for_certain() {
        let behind = |offset_ms, within_ms| GuestClock { offset_ms, within_ms, put_forward_ms: None }.behind_ms();
        assert_eq!(behind(-250, 3), Some(250));
        assert_eq!((behind(-20, 0), behind(-120, 100)), (None, None), "within what is not noticed, or not known");
        assert_eq!((behind(250, 3), behind(0, 0)), (None, None), "ahead");
        assert_eq!((behind(-86_400_000, 0), behind(-86_400_001, 0)), (Some(86_400_000), None), "a time of its own");
        assert_eq!((behind(i64::MIN, 0), behind(i64::MAX, u64::MAX)), (None, None));
    }

    #[test]
    fn addresses_of_the_guest_itself_reach_nobody() {
        let addresses = ["127.0.0.1/8", "::1/128", "fe80::1/64", "169.254.7.7/16", "10.99.0.10/24", "fd00::7/64"];
        let is_reachable = |text: &&str| text.parse::<GuestAddress>().expect("an address").is_reachable();
        let far: Vec<&str> = addresses.into_iter().filter(is_reachable).collect();
        assert_eq!(far, ["10.99.0.10/24", "fd00::7/64"]);
        for bad in ["", "10.0.0.1", "10.0.0.1/", "10.0.0.1/300", "x/24", "10.0.0.1/24/1"] {
            assert!(bad.parse::<GuestAddress>().is_err(), "{bad:?}");
        }
    }
}
