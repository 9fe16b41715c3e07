//! Snapshots and VMs out of them, beside a plain QEMU that writes its state to a file and loads it.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_api::v1::{SnapshotClone, VmDelete};
use godwit_lab::layout::STATE_ROOT;
use godwit_lab::{LabSpec, in_namespace};
use godwit_model::{Bytes, DiskFormat, DiskSpec, Name};
use serde::Serialize;
use serde_json::json;

use super::ground::{self, Ground};
use super::qmp::Qmp;
use super::scenario::Scenario;
use super::system::System;
use crate::guest::command_line;
use crate::labs::{self, OwnedNetwork};
use crate::processes::ProcessRole;
use crate::{Cluster, ClusterSpec, GuestSpec, Outside, godwit_binary, other_qemu};

const HOST: &str = "h1";
const BOOT: Duration = Duration::from_secs(180);
const START: Duration = Duration::from_secs(20);
/// Plain QEMU may take so long for its file.
const FILE: Duration = Duration::from_secs(300);
/// The guest is left in peace before and after.
const PEACE: Duration = Duration::from_secs(3);
/// Clones of one snapshot.
const CLONES: usize = 20;
/// Pauses of which the median counts.
const PAUSES: usize = 5;

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What was measured, with its unit.
    pub name: String,
    /// Godwit's.
    pub godwit: f64,
    /// The peer's; none where there is nothing to compare with.
    pub peer: Option<f64>,
    /// Who that is.
    pub peer_name: String,
    /// Godwit's by the peer's.
    pub ratio: Option<f64>,
    /// What it is to be.
    pub aim: String,
    /// Whether it is.
    pub aim_met: bool,
}

impl Row {
    fn new(name: &str, godwit: f64, peer: Option<(f64, &str)>, aim: &str, aim_met: bool) -> Self {
        let (peer, peer_name) = peer.map_or((None, String::new()), |(peer, name)| (Some(peer), name.to_owned()));
        let ratio = peer.map(|peer| godwit / peer);
        Self { name: name.to_owned(), godwit, peer, peer_name, ratio, aim: aim.to_owned(), aim_met }
    }
}

/// Parts of the bench.
pub const PARTS: [&str; 5] = ["pause", "bytes", "rollback", "disk", "clones"];

/// Measures one of [`PARTS`]; `apart` is the time between two of ten snapshots.
///
/// # Errors
/// What could not be built or measured.
pub fn measure(part: &str, apart: Duration, told: &dyn Fn(&Row)) -> Result<Vec<Row>> {
    let rows = match part {
        "pause" => pause(told)?,
        "bytes" => bytes(apart, told)?,
        "rollback" => rollback(told)?,
        "clones" => clones(told)?,
        _ => disk(told)?,
    };
    Ok(rows)
}

fn cluster() -> Result<Cluster> {
    let mut spec = ClusterSpec::new(1)?.agent(HOST, &["--unprivileged-userfaultfd"]);
    if let Some(other) = other_qemu() {
        spec = spec.qemu(HOST, &other);
    }
    spec.up()
}

/// A guest of this size whose memory is full of what nobody can compress or share.
fn full(gib: u64) -> GuestSpec {
    let touched = (gib << 10) - 250;
    let guest = GuestSpec::small("full").memory(Bytes::mib(gib << 10));
    guest.knob(&format!("touch_total={touched}M")).knob("mix=unique:100").knob("working_set=16M").knob("dirty=4M").knob("check=16M")
}

/// The guest of scenario A.
fn of_a() -> GuestSpec {
    let guest = GuestSpec::small("a").memory(Bytes::GIB);
    Scenario::A.knobs().iter().fold(guest, |guest, knob| guest.knob(knob))
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// What is read from now on comes from the disk.
fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("drop the caches")
}

fn pause(told: &dyn Fn(&Row)) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for gib in [1, 2, 4] {
        let mut cluster = cluster()?;
        let disk = DiskSpec { size: Some(Bytes::mib(256)), ..DiskSpec::new("shared/full".parse()?, DiskFormat::Raw) };
        cluster.boot(&full(gib).knob("disk=64M").knob("disk_dirty=1M").disk(disk), HOST)?;
        let mut pauses = Vec::new();
        for number in 0..PAUSES {
            thread::sleep(PEACE);
            let figures = cluster.take("full", &format!("s{number}"))?.figures.context("figures")?;
            pauses.push(figures.pause_us.context("a pause")? as f64 / 1000.0);
        }
        cluster.check()?;
        cluster.finish()?;
        pauses.sort_unstable_by(f64::total_cmp);
        let median = pauses[PAUSES / 2];
        let peer = if gib == 1 {
            Some((millis(Plain::boot(gib, full(gib))?.save()?.stood_still), "stop, migrate to a file, cont"))
        } else {
            None
        };
        let row = Row::new(&format!("pause with a disk, {gib} GiB, ms"), median, peer, "at most 15", median <= 15.0);
        told(&row);
        rows.push(row);
    }
    Ok(rows)
}

fn bytes(apart: Duration, told: &dyn Fn(&Row)) -> Result<Vec<Row>> {
    let mut cluster = cluster()?;
    cluster.boot(&of_a(), HOST)?;
    thread::sleep(PEACE);
    let mut written = Vec::new();
    for number in 0..10 {
        let began = Instant::now();
        written.push(cluster.take("a", &format!("s{number}"))?.figures.context("figures")?.written.get());
        if number < 9 {
            thread::sleep(apart.saturating_sub(began.elapsed()));
        }
    }
    cluster.check()?;
    cluster.finish()?;
    let first = mib(written[0]);
    let file = mib(Plain::boot(1, of_a())?.save()?.bytes);
    let all = mib(written.iter().sum());
    let rows = vec![
        Row::new(
            "first snapshot of guest A, MiB",
            first,
            Some((file, "QEMU's file")),
            "at most 0.40 of QEMU's file",
            first <= 0.40 * file,
        ),
        Row::new(
            &format!("ten snapshots of guest A, {} s apart, MiB", apart.as_secs()),
            all,
            Some((first, "the first of them")),
            "at most 1.5 of the first",
            all <= 1.5 * first,
        ),
    ];
    rows.iter().for_each(told);
    Ok(rows)
}

fn rollback(told: &dyn Fn(&Row)) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for gib in [1, 2, 4] {
        let mut cluster = cluster()?;
        let address = cluster.boot(&full(gib), HOST)?.address;
        thread::sleep(PEACE);
        cluster.take("full", "first")?;
        thread::sleep(PEACE);
        let echo = cluster.outside().echo(address)?;
        drop_caches()?;
        let (figures, first_reply) = cluster.roll_back_timed("full", "first", None, Some(&echo))?;
        thread::sleep(PEACE);
        drop_caches()?;
        let (_, again) = cluster.roll_back_timed("full", "first", None, Some(&echo))?;
        thread::sleep(PEACE);
        drop(echo);
        cluster.check()?;
        cluster.finish()?;
        let (ours, again) = (millis(first_reply), millis(again));
        let row = Row::new(
            &format!("rollback to the same snapshot once more, to the first reply, {gib} GiB, cold, ms"),
            again,
            Some((ours, "the first one")),
            "at most 100",
            again <= 100.0,
        );
        told(&row);
        rows.push(row);
        let row = Row::new(
            &format!("rollback to the first reply, {gib} GiB, cold, without QEMU's start ({} ms), ms", figures.qemu_ms),
            ours,
            None,
            "at most 100",
            ours <= 100.0,
        );
        told(&row);
        rows.push(row);
        if gib == 4 {
            let plain = Plain::boot(gib, full(gib))?.save()?;
            drop_caches()?;
            let (theirs, ran) = plain.load()?;
            let (theirs, ran) = (millis(theirs), millis(ran));
            let row = Row::new(
                "rollback to the first reply, 4 GiB, cold, ms",
                ours,
                Some((theirs, &format!("QEMU loads its file; with all memory there its guest answers {ran:.0} ms after it runs"))),
                "at most 0.1 of QEMU",
                ours * 10.0 <= theirs,
            );
            told(&row);
            rows.push(row);
        }
    }
    Ok(rows)
}

fn disk(told: &dyn Fn(&Row)) -> Result<Vec<Row>> {
    let mut cluster = cluster()?;
    let volume = cluster.lab().local_pool(HOST)?.join("volumes/data");
    super::disks::fill(&volume, 10)?;
    let guest = full(1).knob("disk=100M").knob("disk_dirty=4M");
    let address = cluster.boot(&guest.disk(DiskSpec::new("local/data".parse()?, DiskFormat::Raw)), HOST)?.address;
    thread::sleep(PEACE);
    cluster.take("full", "first")?;
    thread::sleep(PEACE);
    let echo = cluster.outside().echo(address)?;
    drop_caches()?;
    let (figures, first_reply) = cluster.roll_back_timed("full", "first", None, Some(&echo))?;
    drop(echo);
    cluster.check()?;
    cluster.finish()?;
    let ours = millis(first_reply) + figures.disks_ms as f64;
    let row = Row::new(
        "rollback of 1 GiB with a disk of 10 GiB to the first reply, cold, ms",
        ours,
        None,
        "at most 1000",
        ours <= 1000.0,
    );
    told(&row);
    Ok(vec![row])
}

/// Clones with their memory, all asked for at once.
fn clones(told: &dyn Fn(&Row)) -> Result<Vec<Row>> {
    let mut cluster = cluster()?;
    cluster.boot(&GuestSpec::small("one").memory(Bytes::mib(256)), HOST)?;
    thread::sleep(PEACE);
    let of_one = memory_of(cluster.qemu("one", HOST)?)?;
    cluster.take("one", "first")?;
    drop_caches()?;
    let (mut vms, mut tasks, began) = (Vec::new(), Vec::new(), Instant::now());
    for number in 1..=CLONES {
        let name: Name = format!("clone{number}").parse()?;
        let clone = SnapshotClone { name: name.clone(), host: Some(HOST.parse()?), start: true, memory: true, reason: None };
        tasks.push(cluster.ask(cluster.client().clone_snapshot(&"first".parse()?, &clone))?.id);
        vms.push(name);
    }
    for task in tasks {
        cluster.done(task, BOOT)?;
    }
    let all_run = millis(began.elapsed());
    thread::sleep(PEACE);
    let mut of_all = 0;
    for process in cluster.processes(HOST)? {
        if matches!(process.role, ProcessRole::Qemu(_)) && process.pid != cluster.qemu("one", HOST)? {
            of_all += memory_of(process.pid)?;
        }
    }
    for vm in &vms {
        let kill = cluster.ask(cluster.client().kill_vm(vm))?.id;
        cluster.done(kill, BOOT)?;
        let delete = cluster.ask(cluster.client().delete_vm(vm, &VmDelete { volumes: true }))?.id;
        cluster.done(delete, BOOT)?;
    }
    // Clones say that they are it.
    cluster.turned_back("one")?;
    cluster.finish()?;
    let shares = of_all as f64 / of_one as f64;
    let rows = vec![
        Row::new(
            "20 clones of 256 MiB with memory, asked for at once, until all run, ms",
            all_run,
            None,
            "at most 5000",
            all_run <= 5000.0,
        ),
        Row::new("memory of 20 clones by that of one VM", shares, None, "at most 1.5", shares <= 1.5),
    ];
    rows.iter().for_each(told);
    Ok(rows)
}

/// Memory that a process has, what it shares by its share of it.
fn memory_of(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).context("read a process's memory")?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("no such line")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}

/// A plain QEMU with a guest, in a lab's host.
struct Plain {
    child: Child,
    qmp: Qmp,
    outside: Outside,
    guest: GuestSpec,
    gib: u64,
    started: u32,
    network: OwnedNetwork,
}

/// What it has written.
struct Saved {
    plain: Plain,
    stood_still: Duration,
    bytes: u64,
}

impl Drop for Plain {
    fn drop(&mut self) {
        self.end();
    }
}

const ADDRESS: Ipv4Addr = ground::address(0);

impl Plain {
    fn boot(gib: u64, guest: GuestSpec) -> Result<Self> {
        let network = OwnedNetwork::up(LabSpec { hosts: 2, ..LabSpec::new(labs::free_name(), godwit_binary()?) })?;
        ground::connect_guests(network.lab(), HOST, 1)?;
        let outside = Outside::new(network.lab().outside_namespace());
        let (child, qmp) = start(&network, &guest, gib, 0)?;
        let plain = Self { child, qmp, outside, guest, gib, started: 1, network };
        plain.outside.status(ADDRESS, BOOT).context("boot the guest")?;
        thread::sleep(PEACE);
        Ok(plain)
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn file(&self) -> PathBuf {
        home(&self.network).join("state")
    }

    /// Stops the guest, writes everything to a file, and lets it run on.
    fn save(mut self) -> Result<Saved> {
        let unlimited = json!({ "max-bandwidth": 1_u64 << 40 });
        self.qmp.run("migrate-set-parameters", unlimited)?;
        let began = Instant::now();
        self.qmp.run("stop", json!({}))?;
        self.qmp.run("migrate", json!({ "uri": format!("exec:cat > {}", self.file().display()) }))?;
        self.completed(began)?;
        self.qmp.run("cont", json!({}))?;
        let stood_still = began.elapsed();
        rustix::fs::sync();
        let bytes = fs::metadata(self.file())?.len();
        Ok(Saved { plain: self, stood_still, bytes })
    }

    fn completed(&mut self, began: Instant) -> Result<()> {
        loop {
            let now = self.qmp.run("query-migrate", json!({}))?;
            match now["status"].as_str().unwrap_or_default() {
                "completed" => return Ok(()),
                status => ensure!(status != "failed" && began.elapsed() < FILE, "{now}"),
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Saved {
    /// A QEMU that has started loads the file: from then to the guest's first answer, and how much of that the guest ran, with all its memory.
    fn load(self) -> Result<(Duration, Duration)> {
        let mut plain = self.plain;
        plain.qmp.run("stop", json!({}))?;
        plain.end();
        (plain.child, plain.qmp) = start(&plain.network, &plain.guest, plain.gib, plain.started)?;
        let echo = plain.outside.echo(ADDRESS)?;
        let began = Instant::now();
        plain.qmp.run("migrate-incoming", json!({ "uri": format!("exec:cat {}", plain.file().display()) }))?;
        plain.completed(began)?;
        let runs = Instant::now();
        plain.qmp.run("cont", json!({}))?;
        let answered = echo.first_after(began, FILE).context("it never answers")?;
        Ok((answered.saturating_duration_since(began), answered.saturating_duration_since(runs)))
    }
}

fn home(network: &OwnedNetwork) -> PathBuf {
    Path::new(STATE_ROOT).join(network.lab().name())
}

/// Starts a QEMU; from the second on it waits for what the first has written.
fn start(network: &OwnedNetwork, guest: &GuestSpec, gib: u64, started: u32) -> Result<(Child, Qmp)> {
    let home = home(network);
    let (socket, log) = (home.join(format!("{started}.qmp")), File::create(home.join(format!("{started}.log")))?);
    let ground = Ground::make(Scenario::A, &home)?;
    let mut arguments = ground::arguments(System::Precopy, Scenario::A, &ground, 0, &socket)?;
    let mut replace = |option: &str, value: String| -> Result<()> {
        let at = arguments.iter().position(|word| word == option).context("an option")?;
        *arguments.get_mut(at + 1).context("its value")? = value;
        Ok(())
    };
    replace("-m", format!("size={gib}G"))?;
    replace("-append", command_line("plain", ADDRESS, &guest.words, &guest.knobs))?;
    let mut command = Command::new(other_qemu().unwrap_or_else(|| PathBuf::from("qemu-system-x86_64")));
    command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    if started > 0 {
        command.args(["-incoming", "defer", "-S"]);
    }
    let mut child = in_namespace(&network.lab().namespace(HOST)?, || command.spawn())?.context("start QEMU")?;
    match Qmp::connect(&socket, START) {
        Ok(qmp) => Ok((child, qmp)),
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(error)
        }
    }
}

/// Rows of a page.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let mut text = "| what | Godwit | peer | ratio | aim | met |\n|---|---|---|---|---|---|\n".to_owned();
    for Row { name, godwit, peer, peer_name, ratio, aim, aim_met } in rows {
        let peer = peer.map_or("-".to_owned(), |peer| format!("{peer:.1} ({peer_name})"));
        let ratio = ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.3}"));
        let met = if *aim_met { "yes" } else { "no" };
        text += &format!("| {name} | {godwit:.1} | {peer} | {ratio} | {aim} | {met} |\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_says_what_was_measured() {
        let rows = [Row::new("x, ms", 5.0, Some((50.0, "QEMU")), "at most 10", true), Row::new("y", 1.5, None, "at most 1", false)];
        let text = table(&rows);
        assert!(
            text.ends_with("| x, ms | 5.0 | 50.0 (QEMU) | 0.100 | at most 10 | yes |\n| y | 1.5 | - | - | at most 1 | no |\n"),
            "{text}"
        );
    }
}
