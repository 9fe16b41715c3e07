//! The ground on which runs take place: four lab hosts, two for each version of QEMU, whose disks can be filled, and pools of copies.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use godwit_lab::layout::STATE_ROOT;
use godwit_model::{Bytes, DiskFormat, DiskSpec};

use super::clock::Clocks;
use super::disk;
use super::fault::{FullDisk, Side};
use super::plan::{Disk, Emulator, Load, Plan};
use crate::{Cluster, ClusterSpec, GuestSpec, godwit_binary, other_qemu};

/// Hosts with the QEMU on PATH, then those with the other one.
const HOSTS: [[&str; 2]; 2] = [["h1", "h2"], ["h3", "h4"]];
/// The pool that is the same storage for all hosts by its identity, and a directory of its own on each.
const COPIES: &str = "copies";
const IDENTITY: &str = r#"{"identity":"6f0c8f0e-3d5a-4c83-9a0e-6c1d1f6c2b41"}"#;
/// A disk of the pool of copies.
const VOLUME: usize = 4 << 20;

/// A cluster for runs, one after the other.
pub(super) struct Ground {
    pub(super) cluster: Cluster,
    pub(super) clocks: Clocks,
    /// How many runs it has served.
    pub(super) served: u8,
}

impl Ground {
    /// Builds it.
    pub(super) fn build() -> Result<Self> {
        let mut spec = ClusterSpec::new(4)?;
        let home = Path::new(STATE_ROOT).join(spec.name());
        let hosts = HOSTS.concat();
        let clocks = Clocks::new(&godwit_binary()?, &home, &hosts)?;
        spec = spec.godwit(clocks.program());
        if let Some(other) = other_qemu() {
            spec = HOSTS[1].into_iter().fold(spec, |spec, host| spec.qemu(host, &other));
        }
        for host in HOSTS.into_iter().flatten() {
            let pool = format!("{COPIES}={}", home.join(host).join(COPIES).display());
            spec = spec.agent(host, &["--pool", &pool, "--shared-pool", COPIES, "--unprivileged-userfaultfd"]);
        }
        let mut cluster = spec.up()?;
        cluster.listen_in_hosts()?;
        let ground = Self { cluster, clocks, served: 0 };
        ground.prepare_disks()?;
        Ok(ground)
    }

    /// Makes what can be filled small, and pools out of the directories of copies. Whoever uses them is down meanwhile.
    fn prepare_disks(&self) -> Result<()> {
        let lab = self.cluster.lab();
        lab.controller().crash()?;
        for host in HOSTS.into_iter().flatten() {
            lab.agent(host)?.crash()?;
            disk::make_small(&self.state(host)?)?;
            let pool = self.copies(host)?;
            for directory in ["volumes", "records", "partial"] {
                fs::create_dir_all(pool.join(directory))?;
            }
            fs::write(pool.join(".godwit-pool"), IDENTITY)?;
        }
        disk::make_small(&self.controller_data()?)?;
        lab.controller().spawn()?;
        for host in HOSTS.into_iter().flatten() {
            lab.agent(host)?.spawn()?;
        }
        HOSTS.into_iter().flatten().try_for_each(|host| self.cluster.wait_connected(host, true))
    }

    /// The host of a side of a plan.
    pub(super) fn host(plan: &Plan, side: Side) -> &'static str {
        let of = |emulator| match emulator {
            Emulator::Path => HOSTS[0],
            Emulator::Other => HOSTS[1],
        };
        match side {
            Side::Source => of(plan.source)[0],
            Side::Destination if plan.destination == plan.source => of(plan.destination)[1],
            Side::Destination => of(plan.destination)[0],
        }
    }

    /// The directory of a host's agent.
    pub(super) fn state(&self, host: &str) -> Result<PathBuf> {
        Ok(self.cluster.lab_status()?.dir.join(host).join("state"))
    }

    fn controller_data(&self) -> Result<PathBuf> {
        let token = self.cluster.lab().api()?.token_file;
        Ok(token.parent().context("the token is in the controller's data")?.to_owned())
    }

    /// The directory on a disk that can be filled.
    pub(super) fn full_disk(&self, plan: &Plan, disk: FullDisk) -> Result<PathBuf> {
        match disk {
            FullDisk::Host(side) => self.state(Self::host(plan, side)),
            FullDisk::Controller => self.controller_data(),
        }
    }

    /// Every disk that can be filled has space again.
    pub(super) fn unfill(&self) -> Result<()> {
        disk::unfill(&self.controller_data()?)?;
        HOSTS.into_iter().flatten().try_for_each(|host| disk::unfill(&self.state(host)?))
    }

    /// Every clock is right again.
    pub(super) fn right_clocks(&self) -> Result<()> {
        self.clocks.right(&HOSTS.concat())
    }

    fn copies(&self, host: &str) -> Result<PathBuf> {
        Ok(self.cluster.lab_status()?.dir.join(host).join(COPIES))
    }

    fn copy(&self, host: &str, vm: &str) -> Result<PathBuf> {
        Ok(self.copies(host)?.join("volumes").join(vm))
    }

    /// The guest of a plan, and the copies of its disk.
    pub(super) fn guest(&self, plan: &Plan, vm: &str) -> Result<GuestSpec> {
        let small = GuestSpec::small(vm).memory(Bytes::mib(160));
        let spec = match plan.load {
            Load::Idle => small.knob("dirty=0").knob("touch_total=24M").knob("check=6M").knob("witness_every=20"),
            Load::Busy if plan.is_postcopy() => {
                small.knob("touch_total=64M").knob("working_set=32M").knob("dirty=12M").knob("mix=unique:100").knob("check=12M")
            }
            Load::Busy => small.knob("touch_total=64M").knob("working_set=8M").knob("dirty=2M").knob("check=12M"),
        };
        Ok(match plan.disk {
            Disk::None => spec,
            Disk::Shared => {
                let size = Some(Bytes::mib(16));
                spec.disk(DiskSpec { size, ..DiskSpec::new(format!("shared/{vm}").parse()?, DiskFormat::Qcow2) })
            }
            Disk::Local => {
                let format = if plan.seed.is_multiple_of(2) { DiskFormat::Qcow2 } else { DiskFormat::Raw };
                let size = Some(Bytes::mib(32));
                let disk = DiskSpec { size, ..DiskSpec::new(format!("local/{vm}").parse()?, format) };
                spec.disk(disk).knob("disk=8M").knob("disk_dirty=128K")
            }
            Disk::Copies => {
                for side in [Side::Source, Side::Destination] {
                    fs::write(self.copy(Self::host(plan, side), vm)?, content(plan.seed))?;
                }
                spec.disk(DiskSpec::new(format!("{COPIES}/{vm}").parse()?, DiskFormat::Raw))
            }
        })
    }

    /// Whether the copies of a VM's disk still are what they were: its guest writes nothing to it, so nobody may have.
    pub(super) fn copies_are_whole(&self, plan: &Plan, vm: &str) -> Result<bool> {
        let original = content(plan.seed);
        let same = |side| Ok::<_, anyhow::Error>(fs::read(self.copy(Self::host(plan, side), vm)?)? == original);
        Ok(same(Side::Source)? && same(Side::Destination)?)
    }

    /// Removes the copies of a VM's disk.
    pub(super) fn remove_copies(&self, plan: &Plan, vm: &str) -> Result<()> {
        for side in [Side::Source, Side::Destination] {
            let copy = self.copy(Self::host(plan, side), vm)?;
            match fs::remove_file(&copy) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| copy.display().to_string());
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Copies every log of the cluster into a directory, named by the path that it has in the lab.
    pub(super) fn keep_logs(&self, into: &Path) -> Result<()> {
        let home = self.cluster.lab_status()?.dir;
        fs::create_dir_all(into).with_context(|| into.display().to_string())?;
        for log in self.cluster.logs()?.into_iter().filter(|log| log.exists()) {
            let name = log.strip_prefix(&home).unwrap_or(&log).to_string_lossy().replace('/', "-");
            fs::copy(&log, into.join(name)).with_context(|| log.display().to_string())?;
        }
        for (vm, said) in self.cluster.consoles() {
            fs::write(into.join(format!("console-{vm}.log")), said).context("a console's log")?;
        }
        Ok(())
    }

    /// The version of QEMU on a host, as it says itself.
    pub(super) fn version(&self, host: &str) -> Result<String> {
        let host = self.cluster.ask(self.cluster.client().host(&host.parse()?))?;
        let version = host.facts.context("a host that is connected has told its facts")?.qemu;
        // Behind it is what its packager says.
        Ok(version.split(' ').next().unwrap_or_default().to_owned())
    }
}

/// What a disk holds, as its seed says.
fn content(seed: u64) -> Vec<u8> {
    let mut noise = godwit_guest::Noise::new(seed);
    (0..VOLUME / 8).flat_map(|_| noise.next_word().to_le_bytes()).collect()
}
