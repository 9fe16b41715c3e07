//! Faults as they are done and undone.

use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use godwit_lab::{Daemon, Lab, LinkChange, LinkRate, LinkState, Signal};
use rustix::process::Pid;

use super::clock;
use super::disk;
use super::fault::{FaultKind, FullDisk, Party, Side};
use super::ground::Ground;
use super::moment::Tracks;
use super::plan::Plan;
use crate::action;
use crate::processes::HostProcess;

/// What is left of a VM whose process was killed while it held the VM: nobody can bring it back.
pub(super) const HELD: &str = ", which held the VM";
/// A destination that was about to journal that the VM is its own may still do so.
const IN_FLIGHT: Duration = Duration::from_millis(400);

/// Who and where, for the faults of one run.
#[derive(Clone, Copy)]
pub(super) struct Scene<'a> {
    pub(super) ground: &'a Ground,
    pub(super) plan: &'a Plan,
    pub(super) vm: &'a str,
    pub(super) tracks: &'a Tracks,
}

/// A fault that was done, until it is undone.
pub(super) enum Injected {
    /// A daemon is gone, or a process for good.
    Killed { daemon: Option<Party>, held: bool },
    /// A daemon stands still.
    StoppedDaemon(Party),
    /// A carry or QEMU stands still.
    StoppedProcess(HostProcess),
    /// A link is not as it was.
    Link(&'static str),
    /// A disk is full.
    Full(FullDisk),
    /// strace makes the syncs of a process fail.
    FailedSync(Child),
    /// A clock is off.
    Clock(&'static str),
}

impl<'a> Scene<'a> {
    fn lab(&self) -> &'a Lab {
        self.ground.cluster.lab()
    }

    fn host(&self, side: Side) -> &'static str {
        Ground::host(self.plan, side)
    }

    fn party(&self, party: Party) -> action::Party<'a> {
        match party {
            Party::Controller => action::Party::Controller,
            Party::Agent(side) => action::Party::Agent(self.host(side)),
            Party::Carry(side) => action::Party::Carry(self.vm, self.host(side)),
            Party::DiskCarry(side) => action::Party::DiskCarry(self.vm, self.host(side)),
            Party::Qemu(side) => action::Party::Qemu(self.vm, self.host(side)),
        }
    }

    /// Does it.
    ///
    /// # Errors
    /// Mostly that the process is not there, or not there any more.
    pub(super) fn inject(&self, kind: &FaultKind) -> Result<Injected> {
        let cluster = &self.ground.cluster;
        match kind {
            FaultKind::Kill(party) => {
                let holds = || !self.tracks.source_released() || self.tracks.keeps_memory();
                let held = matches!(party, Party::Qemu(Side::Source)) && holds();
                cluster.kill(self.party(*party))?;
                let held = held || matches!(party, Party::Qemu(Side::Destination)) && self.destination_holds();
                let daemon = matches!(party, Party::Agent(_) | Party::Controller).then_some(*party);
                Ok(Injected::Killed { daemon, held })
            }
            FaultKind::Stop(party @ (Party::Controller | Party::Agent(_))) => {
                cluster.signal(self.party(*party), Signal::STOP)?;
                Ok(Injected::StoppedDaemon(*party))
            }
            FaultKind::Stop(party @ (Party::Carry(_) | Party::DiskCarry(_) | Party::Qemu(_))) => {
                let process = cluster.process(self.party(*party))?;
                process.signal(Signal::STOP)?;
                Ok(Injected::StoppedProcess(process))
            }
            FaultKind::Cut(side) => self.change_link(*side, &LinkChange { state: Some(LinkState::Down), ..LinkChange::default() }),
            FaultKind::CutOneWay(side) => {
                self.change_link(*side, &LinkChange { state: Some(LinkState::OneWay), ..LinkChange::default() })
            }
            FaultKind::Slow { side, megabits, delay } => {
                let rate = Some(LinkRate::from_bits_per_second(megabits * 1_000_000));
                self.change_link(*side, &LinkChange { rate, delay: Some(*delay), ..LinkChange::default() })
            }
            FaultKind::Full(full) => {
                disk::fill(&self.ground.full_disk(self.plan, *full)?)?;
                Ok(Injected::Full(*full))
            }
            FaultKind::FailedSync(party) => {
                let daemon = match party {
                    Party::Controller => self.lab().controller(),
                    Party::Agent(side) => self.lab().agent(self.host(*side))?,
                    Party::Carry(_) | Party::DiskCarry(_) | Party::Qemu(_) => bail!("{party} syncs nothing"),
                };
                fail_syncs(daemon.pid()?.context("it is down")?).map(Injected::FailedSync)
            }
            FaultKind::Jump { party, seconds } => {
                let daemon = match party {
                    Party::Controller => clock::CONTROLLER,
                    Party::Agent(side) => self.host(*side),
                    Party::Carry(_) | Party::DiskCarry(_) | Party::Qemu(_) => bail!("{party} has the clock of its host"),
                };
                self.ground.clocks.set(daemon, *seconds)?;
                Ok(Injected::Clock(daemon))
            }
        }
    }

    /// Whether the destination has taken the VM, or was about to.
    fn destination_holds(&self) -> bool {
        self.tracks.destination_activated() || {
            thread::sleep(IN_FLIGHT);
            self.tracks.destination_activated()
        }
    }

    fn change_link(&self, side: Side, change: &LinkChange) -> Result<Injected> {
        let host = self.host(side);
        self.lab().set_link(host, *change)?;
        Ok(Injected::Link(host))
    }

    /// Undoes it.
    ///
    /// # Errors
    /// Mostly that another fault came in between: [`Ground::mend`] puts right what is left.
    pub(super) fn undo(&self, injected: Injected) -> Result<()> {
        let cluster = &self.ground.cluster;
        match injected {
            Injected::Killed { daemon: Some(Party::Controller), .. } => {
                self.lab().controller().spawn()?;
            }
            Injected::Killed { daemon: Some(Party::Agent(side)), .. } => {
                self.lab().agent(self.host(side))?.spawn()?;
            }
            Injected::Killed { .. } => {}
            Injected::StoppedDaemon(party) => cluster.signal(self.party(party), Signal::CONT)?,
            Injected::StoppedProcess(process) => process.signal(Signal::CONT)?,
            Injected::Link(host) => {
                self.lab().restore_link(host)?;
            }
            Injected::Clock(daemon) => self.ground.clocks.set(daemon, 0)?,
            Injected::Full(full) => disk::unfill(&self.ground.full_disk(self.plan, full)?)?,
            Injected::FailedSync(mut strace) => {
                // Told to end it lets go of the process.
                rustix::process::kill_process(Pid::from_child(&strace), Signal::TERM)?;
                strace.wait()?;
            }
        }
        Ok(())
    }
}

impl Ground {
    /// Everything that a fault can have left is put right: processes run, daemons are there, links are whole, disks have space.
    ///
    /// # Errors
    /// What cannot be.
    pub(super) fn mend(&self) -> Result<()> {
        let lab = self.cluster.lab();
        self.unfill()?;
        self.right_clocks()?;
        let hosts = lab.hosts()?;
        for host in &hosts {
            lab.restore_link(host)?;
            for process in self.cluster.processes(host)? {
                // One that is gone by now needs nothing.
                let _ = process.signal(Signal::CONT);
            }
        }
        for daemon in self.daemons()? {
            if daemon.pid()?.is_some() {
                daemon.signal(Signal::CONT)?;
            }
        }
        self.start_daemons()
    }

    /// Daemons that are down are started, as a host's own service manager would.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn start_daemons(&self) -> Result<()> {
        for daemon in self.daemons()? {
            if daemon.pid()?.is_none() {
                daemon.spawn()?;
            }
        }
        Ok(())
    }

    fn daemons(&self) -> Result<Vec<Daemon>> {
        let lab = self.cluster.lab();
        let agents = lab.hosts()?.into_iter().map(|host| Ok(lab.agent(&host)?));
        agents.chain([Ok(lab.controller())]).collect()
    }
}

/// Lets strace answer every fsync and fdatasync of a process, and of its threads, with EIO; the calls are not made.
fn fail_syncs(pid: u32) -> Result<Child> {
    Command::new("strace")
        .args(["-f", "-q", "-o", "/dev/null", "-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=EIO", "-p"])
        .arg(pid.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("run strace, which `scripts/setup` installs")
}
