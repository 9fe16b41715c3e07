//! Which accelerator a host really has: `/dev/kvm` is believed only after a few instructions of 64-bit guest code ran through it.
//!
//! Some hosts offer a `/dev/kvm` that makes a VM but never runs an ordinary guest, or hangs. So the probe runs in a child process (the
//! hidden subcommand `kvm-probe`) that is killed when its time is over, and can hang nobody.

mod guest;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use godwit_model::Accelerator;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;

/// Time for the probe. It needs some milliseconds.
const LIMIT: Duration = Duration::from_secs(5);

/// Most that is read of what the child says.
const MAX_VERDICT: u64 = 4_096;

/// What a host's VMs run on, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccelReport {
    /// The accelerator.
    pub accelerator: Accelerator,
    /// Why it is that one, for people.
    pub reason: String,
}

impl AccelReport {
    fn tcg(reason: impl Into<String>) -> Self {
        Self { accelerator: Accelerator::Tcg, reason: reason.into() }
    }
}

/// How to run the hidden subcommand: normally our own binary with `kvm-probe`.
#[derive(Clone, Debug)]
pub struct ProbeCommand {
    /// The binary.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

impl ProbeCommand {
    /// `PROGRAM kvm-probe`.
    #[must_use]
    pub fn godwit(program: PathBuf) -> Self {
        Self { program, arguments: vec!["kvm-probe".into()] }
    }
}

/// Finds out what this host's VMs can run on. Any doubt means TCG.
pub async fn probe(command: &ProbeCommand) -> AccelReport {
    probe_within(command, LIMIT).await
}

async fn probe_within(command: &ProbeCommand, limit: Duration) -> AccelReport {
    let spawned = tokio::process::Command::new(&command.program)
        .args(&command.arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => return AccelReport::tcg(format!("the probe of /dev/kvm could not be started: {error}")),
    };
    let Some(stdout) = child.stdout.take() else {
        return AccelReport::tcg("the probe of /dev/kvm has no output");
    };
    let mut text = Vec::new();
    let read = async { stdout.take(MAX_VERDICT).read_to_end(&mut text).await };
    match tokio::time::timeout(limit, read).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => return AccelReport::tcg(format!("the probe of /dev/kvm could not be read: {error}")),
        // The child is killed; should the kernel not let it die, it is left behind and hinders nobody.
        Err(_) => return AccelReport::tcg(format!("/dev/kvm hung: no answer within {limit:?}")),
    }
    serde_json::from_slice(&text).unwrap_or_else(|_| AccelReport::tcg("the probe of /dev/kvm ended without an answer"))
}

/// The hidden subcommand: tries `/dev/kvm` and prints an [`AccelReport`] as JSON.
#[must_use]
pub fn run_probe_child() -> ExitCode {
    let report = match guest::run() {
        Ok(()) => AccelReport { accelerator: Accelerator::Kvm, reason: "64-bit guest code ran through /dev/kvm".to_owned() },
        Err(error) => AccelReport::tcg(error.to_string()),
    };
    match serde_json::to_string(&report) {
        Ok(text) => println!("{text}"),
        Err(_) => return ExitCode::FAILURE,
    }
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> ProbeCommand {
        ProbeCommand { program: "/bin/sh".into(), arguments: vec!["-c".into(), script.into()] }
    }

    #[tokio::test]
    async fn a_probe_that_hangs_dies_or_babbles_means_tcg_with_a_reason() {
        let hung = probe_within(&shell("exec sleep 600"), Duration::from_millis(50)).await;
        assert!(hung.accelerator == Accelerator::Tcg && hung.reason.contains("hung"), "{hung:?}");
        let died = probe(&shell("kill -9 $$")).await;
        assert!(died.accelerator == Accelerator::Tcg && died.reason.contains("without an answer"), "{died:?}");
        let babbled = probe(&shell("yes | head -c 100000")).await;
        assert_eq!(babbled.accelerator, Accelerator::Tcg);
        let missing = probe(&ProbeCommand::godwit("/nonexistent/godwit".into())).await;
        assert!(missing.accelerator == Accelerator::Tcg && missing.reason.contains("could not be started"), "{missing:?}");
    }

    #[tokio::test]
    async fn an_answer_is_believed() {
        let report = AccelReport { accelerator: Accelerator::Kvm, reason: "it ran".into() };
        let text = serde_json::to_string(&report).expect("JSON");
        assert_eq!(probe(&shell(&format!("echo '{text}'"))).await, report);
    }
}
