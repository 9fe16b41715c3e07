//! Runs `nft`: one transaction from its standard input, and counters back as JSON.

use std::io;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// A transaction takes milliseconds; one that hangs must not hold up a VM for ever.
const LIMIT: Duration = Duration::from_secs(20);
/// Where the program is: an agent's PATH may leave out directories of the administrator.
const PLACES: [&str; 3] = ["nft", "/usr/sbin/nft", "/sbin/nft"];
/// The tables that are ours are called so, in any family.
const TABLE: &str = "godwit";

/// Why the kernel's filter is not as it should be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NftError {
    /// It is not installed.
    #[error("there is no program nft on this host")]
    Missing,
    /// It could not be run.
    #[error("nft could not be run")]
    Run(#[source] io::Error),
    /// It took too long.
    #[error("nft has not ended within {LIMIT:?}")]
    Late,
    /// It, or the kernel, refused.
    #[error("nft refused: {said}")]
    Refused {
        /// The first line that it said.
        said: String,
    },
    /// It said something else than expected.
    #[error("nft answers what cannot be read")]
    Answer(#[source] serde_json::Error),
}

/// A counter of one of our tables.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Counter {
    pub(super) family: String,
    pub(super) name: String,
    pub(super) packets: u64,
}

/// Applies a text as one transaction: all of it or nothing.
pub(super) async fn apply(text: &str) -> Result<(), NftError> {
    run(&["-f", "-"], text).await.map(drop)
}

/// Every counter of our tables; none if they are not there.
pub(super) async fn counters() -> Result<Vec<Counter>, NftError> {
    let answer = run(&["-j", "list", "counters"], "").await?;
    read_counters(&answer)
}

fn read_counters(answer: &[u8]) -> Result<Vec<Counter>, NftError> {
    let answer: Value = serde_json::from_slice(answer).map_err(NftError::Answer)?;
    let objects = answer.get("nftables").and_then(Value::as_array).into_iter().flatten();
    let ours = objects.filter_map(|object| object.get("counter")).filter(|counter| counter.get("table") == Some(&TABLE.into()));
    Ok(ours
        .filter_map(|counter| {
            let text = |field| counter.get(field).and_then(Value::as_str).map(str::to_owned);
            Some(Counter { family: text("family")?, name: text("name")?, packets: counter.get("packets")?.as_u64()? })
        })
        .collect())
}

/// Runs it in the network namespace of the calling thread.
async fn run(arguments: &[&str], input: &str) -> Result<Vec<u8>, NftError> {
    let start = |place: &str| {
        let mut command = Command::new(place);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command.spawn()
    };
    let mut started = Err(io::ErrorKind::NotFound.into());
    for place in PLACES {
        started = start(place);
        if !started.as_ref().is_err_and(|error: &io::Error| error.kind() == io::ErrorKind::NotFound) {
            break;
        }
    }
    let mut child = started.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => NftError::Missing,
        _ => NftError::Run(error),
    })?;
    let done = async {
        if let Some(mut stdin) = child.stdin.take() {
            // It may end without having read everything: what it says then is the reason.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(LIMIT, done).await.map_err(|_| NftError::Late)?.map_err(NftError::Run)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or_default().chars().take(300).collect();
    Err(NftError::Refused { said })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_counters_of_our_tables_are_read() {
        let answer = br#"{"nftables": [{"metainfo": {"json_schema_version": 1}},
            {"counter": {"family": "bridge", "name": "unknown", "table": "godwit", "handle": 4, "packets": 3, "bytes": 90}},
            {"counter": {"family": "inet", "name": "x", "table": "other", "handle": 4, "packets": 3, "bytes": 90}}]}"#;
        let expected = Counter { family: "bridge".into(), name: "unknown".into(), packets: 3 };
        assert_eq!(read_counters(answer).expect("read"), [expected]);
        assert!(matches!(read_counters(b"Error"), Err(NftError::Answer(_))));
    }
}
