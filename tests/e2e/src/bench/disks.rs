//! Every way to move with every kind of disk, between versions of QEMU; and the way home of a large disk beside a full copy by QEMU itself.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_lab::layout::STATE_ROOT;
use godwit_lab::{LabSpec, in_namespace};
use godwit_model::{Bytes, DiskFormat, DiskSpec, MigrationFigures, MigrationPolicy, PostCopy};
use serde::Serialize;
use serde_json::{Value, json};

use super::qmp::Qmp;
use super::wire;
use crate::labs::{self, OwnedNetwork};
use crate::{Cluster, ClusterSpec, GuestSpec, godwit_binary, other_qemu};

const HOSTS: [&str; 2] = ["h1", "h2"];
/// Longest that a move may take.
const PATIENCE: Duration = Duration::from_secs(900);
/// The guest is left in peace before a move, and what follows the switch belongs to its outage.
const PEACE: Duration = Duration::from_secs(3);
const START: Duration = Duration::from_secs(20);
const ASK: Duration = Duration::from_millis(100);
const PORT: u16 = 10_809;
/// What the guest writes to of the large disk, and for how long it is away.
const CHANGED: &str = "disk=100M";
const AWAY: Duration = Duration::from_secs(60);

/// One move.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WayRow {
    /// `pre-copy` or `post-copy`.
    pub way: String,
    /// `shared`, `local` or `mixed`.
    pub disks: String,
    /// Versions of QEMU.
    pub from: String,
    /// The same.
    pub to: String,
    /// From the request's acceptance by the source to the VM proven on the destination.
    pub seconds: f64,
    /// As the source measured it.
    pub blackout_ms: u64,
    /// The longest time without an echo, seen from outside.
    pub outage_ms: u64,
    /// On the wire, all in all.
    pub wire_bytes: u64,
    /// Of that, disks.
    pub disk_bytes: u64,
    /// Pages and blocks that the guest found wrong.
    pub wrong: u64,
}

/// One copy of the large disk.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HomeRow {
    /// `out`, `home`, or `qemu mirror`.
    pub way: String,
    /// How long it took.
    pub seconds: f64,
    /// On the wire, as the interface counted it.
    pub wire_bytes: u64,
    /// Blackout of the VM; none where only a disk was copied.
    pub blackout_ms: Option<u64>,
}

/// Moves a guest with two disks of 64 MiB, 24 MiB of each in use and half a MiB a second written to each, in each way between each pair of versions.
///
/// # Errors
/// What could not be built or moved.
pub fn ways(told: impl Fn(&WayRow)) -> Result<Vec<WayRow>> {
    let other = other_qemu().context("GODWIT_QEMU_OTHER is not set: there are no two versions")?;
    let mut rows = Vec::new();
    for qemus in [[None, Some(&other)], [Some(&other), None], [Some(&other), Some(&other)], [None, None]] {
        let mut spec = ClusterSpec::new(2)?;
        for (host, qemu) in HOSTS.into_iter().zip(qemus) {
            spec = qemu.into_iter().fold(spec, |spec, qemu| spec.qemu(host, qemu)).agent(host, &["--unprivileged-userfaultfd"]);
        }
        let mut cluster = spec.up()?;
        for way in ["pre-copy", "post-copy"] {
            for disks in ["shared", "local", "mixed"] {
                let row = way_of(&mut cluster, way, disks)?;
                told(&row);
                rows.push(row);
            }
        }
        cluster.finish()?;
    }
    Ok(rows)
}

fn way_of(cluster: &mut Cluster, way: &str, disks: &str) -> Result<WayRow> {
    let vm = format!("{}-{disks}", way.replace('-', ""));
    let pools = match disks {
        "shared" => ["shared", "shared"],
        "local" => ["local", "local"],
        _ => ["local", "shared"],
    };
    let disk = |pool: &str, number: usize, format| -> Result<DiskSpec> {
        Ok(DiskSpec { size: Some(Bytes::mib(64)), ..DiskSpec::new(format!("{pool}/{vm}-{number}").parse()?, format) })
    };
    let guest = GuestSpec::small(&vm).knob("disk=24M").knob("disk_dirty=512K");
    let guest = guest.disk(disk(pools[0], 0, DiskFormat::Qcow2)?).disk(disk(pools[1], 1, DiskFormat::Raw)?);
    let address = cluster.boot(&guest, HOSTS[0])?.address;
    let echo = cluster.outside().echo(address)?;
    thread::sleep(PEACE);
    let postcopy = if way == "post-copy" { PostCopy::Now } else { PostCopy::ByLadder };
    let began = Instant::now();
    let task = cluster.begin_move(&vm, HOSTS[1], MigrationPolicy { postcopy, ..MigrationPolicy::default() })?;
    let figures = cluster.done(task, PATIENCE)?.figures.context("figures")?;
    thread::sleep(PEACE);
    let outage = echo.longest_gap(began, Instant::now());
    let status = cluster.status(&vm)?;
    cluster.check()?;
    let version = |host: &str| -> Result<String> {
        let facts = cluster.ask(cluster.client().host(&host.parse()?))?.facts.context("facts")?;
        Ok(facts.qemu.split(' ').next().unwrap_or_default().to_owned())
    };
    let row = WayRow {
        way: way.to_owned(),
        disks: disks.to_owned(),
        from: version(HOSTS[0])?,
        to: version(HOSTS[1])?,
        seconds: seconds(&figures),
        blackout_ms: figures.blackout.get(),
        outage_ms: u64::try_from(outage.as_millis()).unwrap_or(u64::MAX),
        wire_bytes: figures.wire_bytes.get(),
        disk_bytes: figures.disk_bytes.get(),
        wrong: status.page_errors + status.disk_errors,
    };
    // One guest at a time.
    let name = vm.parse()?;
    let kill = cluster.ask(cluster.client().kill_vm(&name))?;
    cluster.done(kill.id, PATIENCE)?;
    let delete = cluster.ask(cluster.client().delete_vm(&name, &godwit_api::v1::VmDelete { volumes: true }))?;
    cluster.done(delete.id, PATIENCE)?;
    Ok(row)
}

fn seconds(figures: &MigrationFigures) -> f64 {
    figures.total.get() as f64 / 1e3
}

/// A VM with a full disk of so many GiB goes out and comes home after 100 MiB of it were written to; and QEMU's own mirror copies the same disk in the
/// clear, once.
///
/// # Errors
/// What could not be built or moved.
pub fn home(gib: u64, told: impl Fn(&HomeRow)) -> Result<Vec<HomeRow>> {
    let mut spec = ClusterSpec::new(2)?;
    if let Some(other) = other_qemu() {
        spec = HOSTS.into_iter().fold(spec, |spec, host| spec.qemu(host, &other));
    }
    let mut cluster = spec.up()?;
    let volume = cluster.lab().local_pool(HOSTS[0])?.join("volumes/data");
    fill(&volume, gib)?;
    let guest = GuestSpec::small("web").knob(CHANGED).knob("disk_dirty=4M");
    cluster.boot(&guest.disk(DiskSpec::new("local/data".parse()?, DiskFormat::Raw)), HOSTS[0])?;
    let mut rows = Vec::new();
    for (way, to) in [("out", HOSTS[1]), ("home", HOSTS[0])] {
        let namespace = cluster.lab().namespace(HOSTS[0])?;
        let wire = wire::passed(&namespace)?;
        let task = cluster.begin_move("web", to, MigrationPolicy::default())?;
        let figures = cluster.done(task, PATIENCE)?.figures.context("figures")?;
        let wire_bytes = wire::passed(&namespace)?.saturating_sub(wire);
        cluster.check()?;
        let blackout_ms = Some(figures.blackout.get());
        let row = HomeRow { way: way.to_owned(), seconds: seconds(&figures), wire_bytes, blackout_ms };
        told(&row);
        rows.push(row);
        if way == "out" {
            thread::sleep(AWAY);
        }
    }
    let status = cluster.status("web")?;
    ensure!(status.disk_errors == 0 && status.page_errors == 0, "{status:?}");
    cluster.finish()?;
    let row = mirror(gib)?;
    told(&row);
    rows.push(row);
    Ok(rows)
}

/// A disk that nobody can compress.
pub(super) fn fill(path: &Path, gib: u64) -> Result<()> {
    fs::create_dir_all(path.parent().context("a pool")?)?;
    let mut random = File::open("/dev/urandom")?;
    let (mut piece, mut file) = (vec![0; 1 << 20], File::create(path)?);
    for _ in 0..gib << 10 {
        random.read_exact(&mut piece)?;
        file.write_all(&piece)?;
    }
    Ok(file.sync_all()?)
}

/// A QEMU without a machine.
struct Plain {
    child: Child,
    qmp: Qmp,
}

impl Drop for Plain {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Plain {
    fn start(namespace: &str, program: &Path, home: &Path, name: &str, disk: &Path) -> Result<Self> {
        let monitor = home.join(format!("{name}.qmp"));
        let file = json!({ "driver": "file", "filename": disk, "aio": "threads", "cache": { "direct": true } });
        let node = json!({ "driver": "raw", "node-name": "disk", "file": file, "cache": { "direct": true } });
        let mut command = Command::new(program);
        command.args(["-machine", "none", "-nodefaults", "-display", "none", "-S", "-blockdev", &node.to_string()]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", monitor.display())]).stdin(Stdio::null());
        let child = in_namespace(namespace, || command.spawn())?.context("start QEMU")?;
        let mut started = Self { child, qmp: Qmp::connect(&monitor, START)? };
        started.qmp.run("query-status", json!({}))?;
        Ok(started)
    }
}

fn mirror(gib: u64) -> Result<HomeRow> {
    let network = OwnedNetwork::up(LabSpec { hosts: 2, ..LabSpec::new(labs::free_name(), godwit_binary()?) })?;
    let home = Path::new(STATE_ROOT).join(network.lab().name());
    let program = other_qemu().unwrap_or_else(|| PathBuf::from("qemu-system-x86_64"));
    let disks = HOSTS.map(|host| home.join(format!("{host}.raw")));
    fill(&disks[0], gib)?;
    File::create(&disks[1])?.set_len(gib << 30)?;
    let namespaces = [network.lab().namespace(HOSTS[0])?, network.lab().namespace(HOSTS[1])?];
    let mut source = Plain::start(&namespaces[0], &program, &home, "source", &disks[0])?;
    let mut destination = Plain::start(&namespaces[1], &program, &home, "destination", &disks[1])?;
    let host = network.lab().address(HOSTS[1])?.to_string();
    let inet = |host: &str| json!({ "type": "inet", "data": { "host": host, "port": PORT.to_string() } });
    destination.qmp.run("nbd-server-start", json!({ "addr": inet("0.0.0.0") }))?;
    let export = json!({ "type": "nbd", "id": "disk", "node-name": "disk", "name": "disk", "writable": true });
    destination.qmp.run("block-export-add", export)?;
    let (began, wire) = (Instant::now(), wire::passed(&namespaces[0])?);
    let server = json!({ "type": "inet", "host": host, "port": PORT.to_string() });
    source.qmp.run("blockdev-add", json!({ "driver": "nbd", "node-name": "target", "server": server, "export": "disk" }))?;
    source.qmp.run("blockdev-mirror", json!({ "job-id": "mirror", "device": "disk", "target": "target", "sync": "full" }))?;
    loop {
        let jobs = source.qmp.run("query-block-jobs", json!({}))?;
        if jobs.pointer("/0/ready").and_then(Value::as_bool) == Some(true) {
            break;
        }
        ensure!(began.elapsed() < PATIENCE && jobs.pointer("/0").is_some(), "QEMU's mirror does not end: {jobs}");
        thread::sleep(ASK);
    }
    let (seconds, wire_bytes) = (began.elapsed().as_secs_f64(), wire::passed(&namespaces[0])?.saturating_sub(wire));
    drop((source, destination));
    network.down()?;
    Ok(HomeRow { way: "qemu mirror".to_owned(), seconds, wire_bytes, blackout_ms: None })
}

/// Rows of a page.
#[must_use]
pub fn ways_table(rows: &[WayRow]) -> String {
    let mut text = "| way | disks | from | to | seconds | blackout ms | outage ms | wire MiB | of that disks | wrong |\n|---|---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    for WayRow { way, disks, from, to, seconds, blackout_ms, outage_ms, wire_bytes, disk_bytes, wrong } in rows {
        let mib = |bytes: &u64| *bytes as f64 / f64::from(1 << 20);
        let (wire, disk) = (mib(wire_bytes), mib(disk_bytes));
        text += &format!(
            "| {way} | {disks} | {from} | {to} | {seconds:.1} | {blackout_ms} | {outage_ms} | {wire:.1} | {disk:.1} | {wrong} |\n"
        );
    }
    text
}

/// The same.
#[must_use]
pub fn home_table(rows: &[HomeRow]) -> String {
    let mut text = "| copy | seconds | wire MiB | blackout ms |\n|---|---|---|---|\n".to_owned();
    for HomeRow { way, seconds, wire_bytes, blackout_ms } in rows {
        let blackout = blackout_ms.map_or("-".to_owned(), |blackout| blackout.to_string());
        text += &format!("| {way} | {seconds:.1} | {:.1} | {blackout} |\n", *wire_bytes as f64 / f64::from(1 << 20));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_say_what_was_measured() {
        let row = WayRow {
            way: "pre-copy".into(),
            disks: "local".into(),
            from: "7.2.22".into(),
            to: "10.0.2".into(),
            seconds: 2.55,
            blackout_ms: 90,
            outage_ms: 120,
            wire_bytes: 3 << 20,
            disk_bytes: 1 << 19,
            wrong: 0,
        };
        assert!(ways_table(&[row]).ends_with("| pre-copy | local | 7.2.22 | 10.0.2 | 2.5 | 90 | 120 | 3.0 | 0.5 | 0 |\n"));
        let row = HomeRow { way: "home".into(), seconds: 1.0, wire_bytes: 1 << 20, blackout_ms: None };
        assert!(home_table(&[row]).ends_with("| home | 1.0 | 1.0 | - |\n"));
    }
}
