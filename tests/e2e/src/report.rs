//! What the demo measured: a file for programs and a table for people.

use std::fmt::Write;

use godwit_model::Bytes;
use serde::{Deserialize, Serialize};

/// An outage under this is fine on any machine.
const SHORT_MS: u64 = 400;
/// On a noisy machine an outage may be this many times that of a VM that stood still.
const NOISE: u64 = 3;
/// Migrations of a whole demo.
const MOVES: usize = 3;
/// The way home may take one byte in so many of the way out.
const HOME_SAVES: u64 = 3;

/// `target/demo/report.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Every migration in order.
    pub migrations: Vec<MigrationReport>,
    /// The last of them, home, beside the first, out.
    pub way_home: WayHomeReport,
    /// What the guest found.
    pub guest: GuestReport,
    /// What the stream went through.
    pub tcp: TcpReport,
    /// What the witness heard.
    pub witness: WitnessReport,
    /// What `godwit selftest` found.
    pub selftest: SelftestReport,
    /// The way back after the guest was broken.
    pub rollback: RollbackReport,
}

/// A snapshot, and the way back to it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RollbackReport {
    /// How long the guest stood still for the snapshot.
    pub snapshot_pause_us: u64,
    /// What was written for it.
    pub snapshot_bytes: u64,
    /// QEMU's own start.
    pub qemu_ms: u64,
    /// From the request to the first reply of the guest as it was, QEMU's start among it.
    pub to_first_reply_ms: u64,
}

/// One migration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationReport {
    /// Host before.
    pub from: String,
    /// Host after.
    pub to: String,
    /// From the request to the VM proven on its new host.
    pub total_ms: u64,
    /// No vCPU ran anywhere.
    pub blackout_ms: u64,
    /// Longest gap of the echo as seen from outside.
    pub outage_ms: u64,
    /// The same, at the same time, of a VM that did not move.
    pub control_outage_ms: u64,
    /// Bytes between the hosts.
    pub wire_bytes: u64,
    /// Bytes that QEMU wrote.
    pub ram_bytes: u64,
    /// Passes over memory.
    pub rounds: u32,
}

/// What it costs to come back to a host that still has the VM's memory as it was when the VM left.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WayHomeReport {
    /// Bytes between the hosts on the way out.
    pub out_wire_bytes: u64,
    /// And on the way home.
    pub home_wire_bytes: u64,
}

/// What the guest found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestReport {
    /// Checks of pages.
    pub pages_checked: u64,
    /// Wrong pages.
    pub page_errors: u64,
    /// Jumps of its clocks.
    pub clock_jumps: u64,
}

/// What the stream went through.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpReport {
    /// Verified bytes.
    pub bytes: u64,
    /// Connections that broke, or carried a wrong byte.
    pub resets: u64,
    /// Times of over a second without a byte.
    pub stalls_over_1s: u64,
}

/// What the witness heard.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WitnessReport {
    /// Records.
    pub records: u64,
    /// Records that cannot be of one runner.
    pub interleaved: u64,
}

/// What `godwit selftest` found, between two of the hosts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelftestReport {
    /// Checks that it made.
    pub checks: u64,
    /// What is not as it should be.
    pub failed: Vec<String>,
}

impl SelftestReport {
    /// Reads what it printed.
    #[must_use]
    pub fn read(printed: &serde_json::Value) -> Self {
        let checks = printed["checks"].as_array().map(Vec::as_slice).unwrap_or_default();
        let failed = checks.iter().filter(|check| check["verdict"] == "failed").map(|check| {
            let text = |key: &str| check[key].as_str().unwrap_or_default();
            format!("{}: {}", text("check"), text("detail"))
        });
        Self { checks: checks.len() as u64, failed: failed.collect() }
    }
}

impl Report {
    /// What is not as it should be; nothing when the demo went well.
    #[must_use]
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.migrations.len() < MOVES {
            faults.push(format!("{} migrations instead of {MOVES}", self.migrations.len()));
        }
        for (count, what) in [
            (self.guest.page_errors, "wrong pages"),
            (self.tcp.resets, "broken connections"),
            (self.witness.interleaved, "records of a second runner"),
        ] {
            if count > 0 {
                faults.push(format!("{count} {what}"));
            }
        }
        for (what, count) in [
            ("page was checked", self.guest.pages_checked),
            ("byte was streamed", self.tcp.bytes),
            ("record was heard", self.witness.records),
        ] {
            if count == 0 {
                faults.push(format!("no {what}: nothing is proven"));
            }
        }
        if self.selftest.checks == 0 {
            faults.push("the selftest made no check".into());
        }
        faults.extend(self.selftest.failed.iter().map(|failed| format!("selftest: {failed}")));
        let WayHomeReport { out_wire_bytes, home_wire_bytes } = self.way_home;
        if home_wire_bytes.saturating_mul(HOME_SAVES) >= out_wire_bytes {
            faults.push(format!(
                "the way home took {home_wire_bytes} bytes, the way out {out_wire_bytes}: the memory left there was of no use"
            ));
        }
        if self.rollback.to_first_reply_ms == 0 {
            faults.push("the VM did not come back from its snapshot".into());
        }
        for MigrationReport { from, to, outage_ms, control_outage_ms, .. } in &self.migrations {
            if *outage_ms >= SHORT_MS && *outage_ms >= NOISE * control_outage_ms {
                faults.push(format!(
                    "{from} to {to}: an outage of {outage_ms} ms, beside {control_outage_ms} ms of a VM that stood still"
                ));
            }
        }
        faults
    }

    /// A table for people.
    #[must_use]
    pub fn table(&self) -> String {
        const HEAD: [&str; 9] = ["MOVE", "TOTAL", "BLACKOUT", "OUTAGE", "CONTROL", "WIRE", "RAM", "ROUNDS", "RATE"];
        let mut rows = vec![HEAD.map(ToOwned::to_owned)];
        rows.extend(self.migrations.iter().map(|migration| {
            let MigrationReport { from, to, total_ms, blackout_ms, outage_ms, control_outage_ms, wire_bytes, ram_bytes, rounds } =
                migration;
            let rate = wire_bytes.saturating_mul(1000) / (*total_ms).max(1);
            [
                format!("{from} -> {to}"),
                format!("{}.{} s", total_ms / 1000, total_ms % 1000 / 100),
                format!("{blackout_ms} ms"),
                format!("{outage_ms} ms"),
                format!("{control_outage_ms} ms"),
                Bytes(*wire_bytes).to_string(),
                Bytes(*ram_bytes).to_string(),
                rounds.to_string(),
                format!("{}/s", Bytes(rate)),
            ]
        }));
        let widths: [usize; 9] = std::array::from_fn(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0));
        let mut text = String::new();
        for row in rows {
            let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{}", cells.join("  ").trim_end());
        }
        let Self { guest, tcp, witness, way_home, selftest, rollback, .. } = self;
        let _ = write!(
            text,
            "\nguest    {} pages checked, {} wrong, {} clock jumps\n\
             tcp      {} verified on one connection, {} resets, {} stalls over 1 s\n\
             witness  {} records, {} of a second runner\n\
             home     {} on the wire, {} on the way out\n\
             selftest {} checks, {} failed\n\
             snapshot {}.{} ms of pause, {} written; broken, and back: {} ms to the first reply, {} ms of that QEMU's start\n",
            guest.pages_checked,
            guest.page_errors,
            guest.clock_jumps,
            Bytes(tcp.bytes),
            tcp.resets,
            tcp.stalls_over_1s,
            witness.records,
            witness.interleaved,
            Bytes(way_home.home_wire_bytes),
            Bytes(way_home.out_wire_bytes),
            selftest.checks,
            selftest.failed.len(),
            rollback.snapshot_pause_us / 1000,
            rollback.snapshot_pause_us % 1000 / 100,
            Bytes(rollback.snapshot_bytes),
            rollback.to_first_reply_ms,
            rollback.qemu_ms,
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Report {
        let migration =
            MigrationReport { from: "h1".into(), to: "h2".into(), outage_ms: 120, control_outage_ms: 10, ..Default::default() };
        Report {
            migrations: vec![migration; 3],
            way_home: WayHomeReport { out_wire_bytes: 100, home_wire_bytes: 10 },
            guest: GuestReport { pages_checked: 1, ..Default::default() },
            tcp: TcpReport { bytes: 1, ..Default::default() },
            witness: WitnessReport { records: 1, interleaved: 0 },
            selftest: SelftestReport { checks: 9, failed: vec![] },
            rollback: RollbackReport { to_first_reply_ms: 400, ..Default::default() },
        }
    }

    #[test]
    fn each_fault_is_found_and_noise_is_none() {
        assert_eq!(good().faults(), Vec::<String>::new());
        let spoil: [fn(&mut Report); 12] = [
            |report| drop(report.migrations.pop()),
            |report| report.guest.page_errors = 1,
            |report| report.tcp.resets = 1,
            |report| report.witness.interleaved = 1,
            |report| report.guest.pages_checked = 0,
            |report| report.tcp.bytes = 0,
            |report| report.witness.records = 0,
            |report| report.migrations[1].outage_ms = 400,
            |report| report.way_home.home_wire_bytes = 34,
            |report| report.rollback.to_first_reply_ms = 0,
            |report| report.selftest.checks = 0,
            |report| report.selftest.failed = vec!["a move: it failed".into()],
        ];
        for (number, spoil) in spoil.iter().enumerate() {
            let mut report = good();
            spoil(&mut report);
            assert_eq!(report.faults().len(), 1, "{number}: {:?}", report.faults());
        }
        let mut noisy = good();
        (noisy.migrations[0].outage_ms, noisy.migrations[0].control_outage_ms) = (900, 301);
        assert_eq!(noisy.faults(), Vec::<String>::new());
    }

    #[test]
    fn the_file_has_the_documented_shape() {
        let value = serde_json::to_value(good()).unwrap();
        let keys = |value: &serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
        assert_eq!(keys(&value), "guest migrations rollback selftest tcp way_home witness");
        assert_eq!(keys(&value["way_home"]), "home_wire_bytes out_wire_bytes");
        let migration = "blackout_ms control_outage_ms from outage_ms ram_bytes rounds to total_ms wire_bytes";
        assert_eq!(keys(&value["migrations"][0]), migration);
        assert_eq!(keys(&value["guest"]), "clock_jumps page_errors pages_checked");
        assert_eq!(keys(&value["tcp"]), "bytes resets stalls_over_1s");
        assert_eq!(keys(&value["witness"]), "interleaved records");
        assert_eq!(keys(&value["selftest"]), "checks failed");
        assert_eq!(keys(&value["rollback"]), "qemu_ms snapshot_bytes snapshot_pause_us to_first_reply_ms");
        let printed = serde_json::json!({"checks": [{"verdict": "passed"}, {"verdict": "failed", "check": "a", "detail": "b"}]});
        assert_eq!(SelftestReport::read(&printed), SelftestReport { checks: 2, failed: vec!["a: b".into()] });
    }

    #[test]
    fn the_table_has_a_line_for_each_move() {
        let table = good().table();
        assert_eq!(table.lines().filter(|line| line.starts_with("h1 -> h2")).count(), 3);
        assert!(table.lines().all(|line| line.len() <= 120));
    }
}
