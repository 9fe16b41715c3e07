//! The test guest, as its console tells of it.

use std::time::Duration;

use godwit_api::client::Client;
use godwit_model::Name;
use serde::Deserialize;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Between two attempts to open the console.
const RETRY: Duration = Duration::from_millis(500);
/// Longer than any line of the guest.
const LONGEST_LINE: usize = 64 << 10;

/// How the guest is; what else it tells is of no interest here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct Status {
    /// Made up at boot.
    pub(super) boot: String,
    /// Pages under test.
    pub(super) pages: u64,
    /// Checks of pages since boot.
    pub(super) pages_checked: u64,
    /// Those that found a wrong page.
    pub(super) page_errors: u64,
    /// How often all pages were checked.
    pub(super) sweeps: u64,
    /// How often the clocks jumped.
    pub(super) clock_jumps: u64,
    /// The largest jump.
    pub(super) largest_clock_jump_ms: u64,
    /// How often more than 300 ms passed unseen.
    pub(super) stalls: u64,
    /// The longest of these times.
    pub(super) longest_stall_ms: u64,
}

#[derive(Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Line {
    Ready(Status),
    Status(Status),
    Failed { message: String },
}

/// What was heard last.
#[derive(Clone, Debug, Default)]
struct Heard {
    status: Option<Status>,
    failed: Option<String>,
}

/// A guest whose console is read until this is dropped.
pub(super) struct Guest {
    heard: watch::Receiver<Heard>,
    reader: JoinHandle<()>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Guest {
    /// Reads the console of a VM, which may not be there yet, wherever the VM is.
    pub(super) fn follow(client: Client, vm: Name) -> Self {
        let (tell, heard) = watch::channel(Heard::default());
        let reader = tokio::spawn(async move {
            loop {
                if let Ok(mut console) = client.console(&vm).await {
                    let mut lines = Lines::default();
                    while let Some(written) = console.receive().await {
                        for line in lines.add(&written) {
                            tell.send_modify(|heard| heard.hear(line));
                        }
                    }
                }
                tokio::time::sleep(RETRY).await;
            }
        });
        Self { heard, reader }
    }

    /// How it was when it said so last.
    pub(super) fn now(&self) -> Result<Status, String> {
        self.heard.borrow().status.clone().ok_or_else(|| "the guest has said nothing".into())
    }

    /// Waits until it says this of itself.
    pub(super) async fn until(&self, limit: Duration, so: impl Fn(&Status) -> bool) -> Result<Status, String> {
        let mut heard = self.heard.clone();
        let waited = heard.wait_for(|heard| heard.failed.is_some() || heard.status.as_ref().is_some_and(&so));
        let heard = match tokio::time::timeout(limit, waited).await {
            Ok(Ok(heard)) => heard.clone(),
            _ => return Err(format!("the guest does not say on its console within {} s that it is well", limit.as_secs())),
        };
        match heard {
            Heard { failed: Some(message), .. } => Err(format!("the guest has failed: {message}")),
            Heard { status, .. } => status.ok_or_else(|| "the guest has said nothing".into()),
        }
    }
}

impl Heard {
    fn hear(&mut self, line: Line) {
        match line {
            Line::Ready(status) | Line::Status(status) => self.status = Some(status),
            Line::Failed { message } => self.failed = Some(message),
        }
    }
}

/// Puts lines together from pieces.
#[derive(Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    fn add(&mut self, piece: &[u8]) -> Vec<Line> {
        self.rest.extend_from_slice(piece);
        let whole = self.rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let text: Vec<u8> = self.rest.drain(..whole).collect();
        if self.rest.len() > LONGEST_LINE {
            self.rest.clear();
        }
        String::from_utf8_lossy(&text).lines().filter_map(parse).collect()
    }
}

/// A line of the guest's own; the kernel may have printed in front of it.
fn parse(line: &str) -> Option<Line> {
    let start = line.find("{\"event\":")?;
    serde_json::from_str(line.get(start..)?.trim()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_in_pieces_and_among_others() {
        let mut lines = Lines::default();
        let mut heard = Heard::default();
        let pieces: [&[u8]; 4] = [
            b"[    1.0] Linux\r\n[    2.0] {\"event\":\"ready\",\"boot\":\"a\",\"pa",
            b"ges\":7,\"colour\":\"blue\"}\r\n{\"event\":\"warning\",\"message\":\"x\"}\r\n",
            b"{\"event\":\"status\",\"boot\":\"a\",\"sweeps\":3}\n\xff\xfe{\n",
            &vec![b'x'; LONGEST_LINE + 1],
        ];
        for piece in pieces {
            lines.add(piece).into_iter().for_each(|line| heard.hear(line));
        }
        assert_eq!(heard.status, Some(Status { boot: "a".into(), sweeps: 3, ..Status::default() }));
        assert!(heard.failed.is_none() && lines.rest.is_empty(), "an endless line is not kept");
        lines.add(b"{\"event\":\"failed\",\"message\":\"no memory\"}\n").into_iter().for_each(|line| heard.hear(line));
        assert_eq!(heard.failed.as_deref(), Some("no memory"));
    }
}
