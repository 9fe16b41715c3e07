//! `make demo`: three lab hosts, a VM that moves h1 to h2 to h3 and home to h1 while it is watched from outside, and what that cost.
//!
//! Prints a table, writes `target/demo/report.json`, and fails when anybody could have noticed more than a short outage.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context, Result};
use godwit_e2e::{
    Cluster, ClusterSpec, GuestReport, GuestSpec, MigrationReport, Report, RollbackReport, SelftestReport, TcpReport,
    WayHomeReport, WitnessReport, other_qemu,
};
use godwit_model::Bytes;

const HOSTS: [&str; 3] = ["h1", "h2", "h3"];
const JOURNEY: [(&str, &str); 3] = [("h1", "h2"), ("h2", "h3"), ("h3", "h1")];
/// How long the guest may take to break.
const PATIENCE: Duration = Duration::from_secs(20);
/// The VM is left in peace for this long before and after each move.
const PEACE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    match run() {
        Ok(report) => {
            let faults = report.faults();
            for fault in &faults {
                eprintln!("demo: {fault}");
            }
            ExitCode::from(u8::from(!faults.is_empty()))
        }
        Err(error) => {
            eprintln!("demo: {error:?}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<Report> {
    say("builds a lab of three hosts with links of 1 Gbit/s");
    let mut spec = ClusterSpec::new(3)?.link("1gbit");
    for host in HOSTS {
        spec = spec.agent(host, &["--unprivileged-userfaultfd"]);
    }
    if let Some(newer) = newer_emulator()? {
        say(&format!("takes {}: older ones, emulating, let the guest stand still when a warm-up begins", newer.display()));
        for host in HOSTS {
            spec = spec.qemu(host, &newer);
        }
    }
    let mut cluster = spec.up()?;
    let wanderer = GuestSpec {
        name: "wanderer".to_owned(),
        memory: Bytes::GIB,
        vcpus: 2,
        disks: Vec::new(),
        shapes: Vec::new(),
        words: Vec::new(),
        knobs: ["touch_total=512M", "working_set=32M", "dirty=8M", "check=48M"].map(ToOwned::to_owned).to_vec(),
        cloud_init: None,
        addressed: false,
    };
    let control = GuestSpec::small("control").memory(Bytes::mib(256)).knob("dirty=0").knob("check=8M");
    say("boots a VM of 1 GiB with two vCPUs on h1, and one on h2 that will not move");
    cluster.boot_all(&[(wanderer, HOSTS[0]), (control, HOSTS[1])])?;

    let (wanderer, control) = (cluster.guest("wanderer")?.address, cluster.guest("control")?.address);
    let stream = cluster.outside().stream(wanderer)?;
    let echo = cluster.outside().echo(wanderer)?;
    let control = cluster.outside().echo(control)?;
    let mut report = Report::default();
    thread::sleep(PEACE);
    for (from, to) in JOURNEY {
        say(&format!("moves it from {from} to {to}"));
        let began = Instant::now();
        let task = cluster.migrate("wanderer", to)?;
        // What follows the switch belongs to the outage: the announcement, and what the switches learn.
        thread::sleep(PEACE);
        let ended = Instant::now();
        let figures = task.figures.context("the migration has no figures")?;
        report.migrations.push(MigrationReport {
            from: from.to_owned(),
            to: to.to_owned(),
            total_ms: figures.total.get(),
            blackout_ms: figures.blackout.get(),
            outage_ms: millis(echo.longest_gap(began, ended)),
            control_outage_ms: millis(control.longest_gap(began, ended)),
            wire_bytes: figures.wire_bytes.get(),
            ram_bytes: figures.ram_bytes.get(),
            rounds: figures.rounds,
        });
    }
    if let [out, .., home] = &report.migrations[..] {
        report.way_home = WayHomeReport { out_wire_bytes: out.wire_bytes, home_wire_bytes: home.wire_bytes };
    }
    let status = cluster.status("wanderer")?;
    report.guest =
        GuestReport { pages_checked: status.pages_checked, page_errors: status.page_errors, clock_jumps: status.clock_jumps };
    let streamed = stream.report();
    report.tcp =
        TcpReport { bytes: streamed.bytes, resets: streamed.resets + streamed.mismatches, stalls_over_1s: streamed.stalls_over_1s };
    let heard = cluster.witness().log();
    report.witness = WitnessReport { records: heard.records(), interleaved: heard.interleaved() };
    drop((stream, echo, control));
    report.rollback = break_and_roll_back(&mut cluster)?;
    say("has `godwit selftest` do what it does on hosts that are not a lab's");
    report.selftest = SelftestReport::read(&cluster.selftest([HOSTS[0], HOSTS[1]])?);
    print!("\n{}\n", report.table());
    write(&report)?;
    end(cluster)?;
    Ok(report)
}

/// Keeps the VM as it is, breaks its guest, and has it as it was.
fn break_and_roll_back(cluster: &mut Cluster) -> Result<RollbackReport> {
    say("takes a snapshot of it while it runs");
    let taken = cluster.take("wanderer", "before")?.figures.context("the snapshot has no figures")?;
    thread::sleep(PEACE);
    say("breaks it: its kernel panics");
    let address = cluster.guest("wanderer")?.address;
    cluster.outside().panic(address, PATIENCE)?;
    say("rolls it back");
    let echo = cluster.outside().echo(address)?;
    let began = Instant::now();
    let figures = cluster.roll_back("wanderer", "before", None)?;
    let answered = echo.first_after(began, PATIENCE).context("it does not answer")?;
    thread::sleep(PEACE);
    cluster.check()?;
    Ok(RollbackReport {
        snapshot_pause_us: taken.pause_us.unwrap_or_default(),
        snapshot_bytes: taken.written.get(),
        qemu_ms: figures.qemu_ms,
        to_first_reply_ms: millis(answered.duration_since(began)),
    })
}

/// The other QEMU at hand, if it is from 9.0 on and the one in PATH is older.
fn newer_emulator() -> Result<Option<PathBuf>> {
    const SOUND: u32 = 9;
    let major = |qemu: &Path| -> Result<u32> {
        let output = Command::new(qemu).arg("--version").output().with_context(|| format!("run {}", qemu.display()))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.split("version ").nth(1).and_then(|rest| rest.split('.').next()).and_then(|major| major.parse().ok());
        version.with_context(|| format!("{} does not say its version: {text:?}", qemu.display()))
    };
    let Some(other) = other_qemu() else { return Ok(None) };
    let newer = major(Path::new("qemu-system-x86_64"))? < SOUND && major(&other)? >= SOUND;
    Ok(newer.then_some(other))
}

fn end(cluster: Cluster) -> Result<()> {
    say("takes the lab down");
    cluster.take_down()
}

fn write(report: &Report) -> Result<()> {
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    let path = target.join("demo/report.json");
    fs::create_dir_all(target.join("demo")).with_context(|| format!("make {}", target.display()))?;
    let mut text = serde_json::to_string_pretty(report)?;
    text.push('\n');
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    say(&format!("wrote {}", path.display()));
    Ok(())
}

fn say(text: &str) {
    println!("demo: {text}");
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
