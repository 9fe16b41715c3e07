//! What a guest says about itself: JSON lines on the serial console, and the same status by UDP.

use serde::{Deserialize, Serialize};

/// How the guest is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Name of the VM.
    pub id: String,
    /// Host name that its seed gave it; empty without one.
    pub host_name: String,
    /// Made up at boot, 32 hexadecimal digits.
    pub boot: String,
    /// Milliseconds of CLOCK_MONOTONIC.
    pub uptime_ms: u64,
    /// Pages under test.
    pub pages: u64,
    /// Checks of pages since boot.
    pub pages_checked: u64,
    /// Checks that found a wrong page. Anything but 0 is a lost or damaged page.
    pub page_errors: u64,
    /// How often all pages were checked.
    pub sweeps: u64,
    /// Writes to pages since boot.
    pub pages_written: u64,
    /// Checks of blocks of disks since boot.
    pub disk_checked: u64,
    /// Checks that found a block which is not what memory knows of it.
    pub disk_errors: u64,
    /// Blocks written since boot.
    pub disk_written: u64,
    /// How often the clocks jumped.
    pub clock_jumps: u64,
    /// The largest jump, in milliseconds.
    pub largest_clock_jump_ms: u64,
    /// How often more than 300 ms passed unseen.
    pub stalls: u64,
    /// The longest of these times, in milliseconds.
    pub longest_stall_ms: u64,
    /// Counter of the last record to the witness.
    pub counter: u64,
    /// Records that could not be sent.
    pub witness_failed: u64,
    /// Generation of the runner as the host tells it, 0 if it does not.
    pub generation: u64,
    /// Echoes answered.
    pub echoes: u64,
    /// Stream connections open now.
    pub tcp_connections: u64,
    /// Stream connections since boot.
    pub tcp_accepted: u64,
    /// Bytes sent on streams since boot.
    pub tcp_bytes: u64,
}

/// A line on the serial console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum ConsoleLine {
    /// Memory is filled, the network is up, all services answer.
    Ready(Status),
    /// Once a second, and on the command `report`.
    Status(Status),
    /// A page is wrong; only the first few are told.
    PageError {
        /// What is wrong with which page.
        message: String,
    },
    /// Something does not work, the guest goes on.
    Warning {
        /// What.
        message: String,
    },
    /// The guest cannot go on and powers off.
    Failed {
        /// Why.
        message: String,
    },
    /// The guest powers off because it was asked to.
    Poweroff {
        /// By whom: `console`, `button` or `agent`.
        by: String,
    },
    /// What a command after `sh` printed.
    Shell {
        /// Its exit code, where it has one.
        code: Option<i32>,
        /// Standard output and standard error.
        output: String,
    },
}

/// Reads a line of the console; `None` for what the kernel or others printed.
#[must_use]
pub fn console_line(line: &str) -> Option<ConsoleLine> {
    // The kernel may have printed in front of it.
    let start = line.find("{\"event\":")?;
    serde_json::from_str(line.get(start..)?.trim()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_read_as_they_were_written() {
        let status = Status { id: "web1".to_owned(), pages_checked: 5, ..Status::default() };
        for line in [
            ConsoleLine::Ready(status.clone()),
            ConsoleLine::Status(status),
            ConsoleLine::Poweroff { by: "button".to_owned() },
            ConsoleLine::Shell { code: Some(1), output: "a\nb".to_owned() },
        ] {
            let text = serde_json::to_string(&line).unwrap();
            assert!(!text.contains('\n'));
            assert_eq!(console_line(&format!("[    1.0] {text}\r\n")), Some(line));
        }
    }

    #[test]
    fn what_is_no_line_is_none_and_new_fields_do_not_hurt() {
        for other in ["", "[    0.0] Linux version 6.1", "{\"event\":", "{\"event\":\"unheard\"}", "{\"x\":1}"] {
            assert_eq!(console_line(other), None);
        }
        let newer = "{\"event\":\"status\",\"id\":\"a\",\"colour\":\"blue\"}";
        assert!(matches!(console_line(newer), Some(ConsoleLine::Status(status)) if status.id == "a"));
    }
}
