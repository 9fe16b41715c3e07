//! Refusals and failures as data: a stable code, a message, a fix, and whether trying again is safe.
//!
//! The same value crosses agent, controller, API and CLI. The table of codes is documented in `docs/errors.md`.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

use crate::hostile;

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal,)*) => {
        /// A stable, documented code. Texts that this version does not know become [`ErrorCode::Internal`] when read.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum ErrorCode {
            $($(#[$doc])* $variant,)*
        }

        impl ErrorCode {
            /// Every code, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The text that crosses processes.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

codes! {
    /// The request is not well formed.
    BadRequest = "bad_request",
    /// The body is larger than this operation takes.
    BodyTooLarge = "body_too_large",
    /// A name breaks the rules for names.
    NameInvalid = "name_invalid",
    /// The VM spec contradicts itself or a limit.
    SpecInvalid = "spec_invalid",
    /// This version of Godwit does not do it.
    Unsupported = "unsupported",
    /// No or unknown credentials.
    Unauthenticated = "unauthenticated",
    /// Known principal, but it may not do this.
    NotPermitted = "not_permitted",
    /// No such object, or not visible to this principal.
    NotFound = "not_found",
    /// The name is in use.
    NameTaken = "name_taken",
    /// The object changed since it was read.
    RevisionConflict = "revision_conflict",
    /// Another task works on the VM.
    VmBusy = "vm_busy",
    /// The VM runs, the request needs it stopped.
    VmRunning = "vm_running",
    /// The VM does not run, the request needs it running.
    VmNotRunning = "vm_not_running",
    /// The VM is already on the wanted host.
    AlreadyOnHost = "already_on_host",
    /// Something else still refers to the object.
    InUse = "in_use",
    /// The host is not connected.
    HostDown = "host_down",
    /// No host satisfies the VM.
    NoHost = "no_host",
    /// The host cannot run the VM.
    HostIncompatible = "host_incompatible",
    /// The host has too little free memory.
    NotEnoughMemory = "not_enough_memory",
    /// The host has too little free space.
    NotEnoughSpace = "not_enough_space",
    /// The pool is unknown on the host, or not shared where that is needed.
    PoolUnavailable = "pool_unavailable",
    /// A volume does not exist.
    VolumeMissing = "volume_missing",
    /// A volume is shorter than it must be.
    VolumeTruncated = "volume_truncated",
    /// A volume is not of its declared format.
    VolumeFormat = "volume_format",
    /// An uploaded image is not of its declared kind, or refers outside itself.
    ImageInvalid = "image_invalid",
    /// A URL leads to an address that the controller does not go to.
    AddressForbidden = "address_forbidden",
    /// A URL could not be fetched.
    FetchFailed = "fetch_failed",
    /// The join token is unknown.
    TokenInvalid = "token_invalid",
    /// The join token was used before.
    TokenUsed = "token_used",
    /// The join token is past its time.
    TokenExpired = "token_expired",
    /// The peer's certificate is not of this cluster, or of another host.
    CertificateRefused = "certificate_refused",
    /// The host's certificate has ended.
    CertificateExpired = "certificate_expired",
    /// The agent spoke about a VM that is not granted to its host.
    NotGranted = "not_granted",
    /// The command carries an older generation or epoch than the agent knows.
    GenerationStale = "generation_stale",
    /// The grant's time was over before the hand-over began.
    GrantExpired = "grant_expired",
    /// The clock of a host is too far off the controller's.
    ClockSkew = "clock_skew",
    /// QEMU does not let the VM move.
    MigrationBlocked = "migration_blocked",
    /// A migration failed; the VM runs where it was.
    MigrationFailed = "migration_failed",
    /// Nothing moved for longer than the policy allows.
    MigrationStalled = "migration_stalled",
    /// The VM dirties memory faster than its blackout budget allows on this link.
    NotConverging = "not_converging",
    /// QEMU reached its own switch-over before ours.
    QemuFirst = "qemu_first",
    /// The hand-over has begun; it can no longer be cancelled.
    TooLate = "too_late",
    /// Cancelled by request.
    Cancelled = "cancelled",
    /// QEMU refused or died.
    QemuFailed = "qemu_failed",
    /// The host does not allow userfaultfd to the VM.
    UserfaultUnavailable = "userfault_unavailable",
    /// The guest's agent is not there, or does not answer.
    GuestSilent = "guest_silent",
    /// The guest's agent refused.
    GuestRefused = "guest_refused",
    /// The program still runs in the guest; nobody waits for it any longer.
    ExecUnfinished = "exec_unfinished",
    /// The snapshot, or what it needs of the vault, is not what was written.
    SnapshotDamaged = "snapshot_damaged",
    /// The snapshot could not be taken; the VM runs on.
    SnapshotFailed = "snapshot_failed",
    /// A file that is to become a snapshot is not what it must be.
    SnapshotInvalid = "snapshot_invalid",
    /// The VM's disks are half of a snapshot.
    DisksUnfinished = "disks_unfinished",
    /// The controller's store has no space.
    StoreFull = "store_full",
    /// The operating system refused.
    HostFailed = "host_failed",
    /// A fault of ours.
    Internal = "internal",
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for ErrorCode {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for ErrorCode {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self::parse(&String::deserialize(deserializer)?))
    }
}

impl ErrorCode {
    /// Reads a code; one that this version does not know is [`ErrorCode::Internal`].
    #[must_use]
    pub fn parse(text: &str) -> Self {
        Self::ALL.iter().copied().find(|code| code.as_str() == text).unwrap_or(Self::Internal)
    }
}

/// Whether the same request may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Retry {
    /// It will be refused again until something else changes.
    Never,
    /// Nothing was changed; trying again is safe.
    Safe,
    /// It is not known whether it took effect: look first.
    Unknown,
}

/// Most characters of a line of what a refusal says.
const LINE: usize = 4_000;

/// Why something was refused or failed, and what to do about it. Its texts may quote guests, QEMU and other hosts: they are made harmless
/// when it is made and when it is read, so that whoever shows or logs a refusal need not think of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Stable code.
    #[schema(value_type = String, example = "not_enough_memory")]
    pub code: ErrorCode,
    /// What is wrong, in one sentence with the facts.
    #[serde(deserialize_with = "harmless")]
    pub message: String,
    /// What to do.
    #[serde(default, deserialize_with = "harmless_option")]
    pub hint: Option<String>,
    /// Whether to try again.
    pub retry: Retry,
}

fn harmless<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(hostile::bounded_lines(&String::deserialize(deserializer)?, LINE))
}

fn harmless_option<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.map(|text| hostile::bounded_lines(&text, LINE)))
}

impl Refusal {
    /// A refusal that stands until something changes.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: hostile::bounded_lines(&message.into(), LINE), hint: None, retry: Retry::Never }
    }

    /// Adds the fix.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hostile::bounded_lines(&hint.into(), LINE));
        self
    }

    /// Sets whether trying again is safe.
    #[must_use]
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_refusal_quotes_is_harmless_when_it_is_made_and_when_it_is_read() {
        let quoted = "QEMU refused cont: \u{1b}]0;owned\u{7}\nnext";
        let made = Refusal::new(ErrorCode::QemuFailed, quoted).hint("\u{9b}2J");
        assert_eq!(made.message, "QEMU refused cont: \\u{1b}]0;owned\\u{7}\nnext");
        assert_eq!(made.hint.as_deref(), Some("\\u{9b}2J"));
        let sent = serde_json::json!({ "code": "qemu_failed", "message": quoted, "hint": "\u{9b}2J", "retry": "never" });
        assert_eq!(serde_json::from_value::<Refusal>(sent).expect("a refusal"), made);
        assert_eq!(Refusal::new(ErrorCode::QemuFailed, "x".repeat(1 << 20)).message.chars().count(), LINE);
    }

    #[test]
    fn every_code_survives_its_text_and_is_documented() {
        let page = include_str!("../../../docs/errors.md");
        for code in ErrorCode::ALL {
            assert_eq!(ErrorCode::parse(code.as_str()), *code);
            assert!(page.contains(&format!("| `{code}` |")), "docs/errors.md does not list {code}");
        }
        assert_eq!(ErrorCode::parse("of_the_future"), ErrorCode::Internal);
    }
}
