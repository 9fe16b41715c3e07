//! What a test does, one after the other, with a check after each.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use godwit_api::v1::TaskState;
use godwit_lab::{LinkChange, LinkState, Signal};
use godwit_model::{BytesPerSec, ErrorCode, MigrationPhase, MigrationPolicy};

use crate::Cluster;
use crate::processes::{self, HostProcess, ProcessRole};

/// A process that takes part in a migration.
#[derive(Debug, Clone, Copy)]
pub enum Party<'a> {
    /// The controller.
    Controller,
    /// The agent of a host.
    Agent(&'a str),
    /// The carry of a VM's move on a host.
    Carry(&'a str, &'a str),
    /// The carry of the first of a VM's disks that travel, on a host.
    DiskCarry(&'a str, &'a str),
    /// The QEMU of a VM on a host.
    Qemu(&'a str, &'a str),
}

/// How a migration shall end.
#[derive(Debug, Clone, Copy)]
pub enum Ending<'a> {
    /// The VM runs on this host.
    Moved(&'a str),
    /// The VM runs where it was, and the task says one of these codes.
    Stayed(&'a str, &'a [ErrorCode]),
    /// The VM runs where it was, by request.
    Cancelled(&'a str),
    /// The VM runs on one of these hosts, and the task says which and why.
    Either(&'a [&'a str]),
}

/// One step of a test.
#[derive(Debug, Clone, Copy)]
pub enum Action<'a> {
    /// Begins to move a VM slowly, and waits until it is in the middle of its warm-up.
    IntoTheMiddle(&'a str, &'a str),
    /// Ends a process as a crash would.
    Kill(Party<'a>),
    /// Stops a process (SIGSTOP).
    Stop(Party<'a>),
    /// Lets a stopped process go on (SIGCONT).
    Continue(Party<'a>),
    /// Cuts the link of a host, both ways, or restores it.
    Link(&'a str, LinkState),
    /// Starts a daemon that was killed.
    Restart(Party<'a>),
    /// Lets time pass.
    Pass(Duration),
    /// Cancels the migration of a VM.
    Cancel(&'a str),
    /// The migration of a VM ends, like this.
    Ends(&'a str, Ending<'a>),
    /// Moves a VM at full speed to a host, which must succeed.
    Migrate(&'a str, &'a str),
}

/// The rate of a migration that shall last long enough to be caught in its middle.
const SLOW: BytesPerSec = BytesPerSec(5_000_000);
/// Bytes on the wire by which the warm-up is well under way.
const MIDDLE: u64 = 3_000_000;
const PATIENCE: Duration = Duration::from_secs(150);

impl Cluster {
    /// Does one action after the other and checks after each.
    ///
    /// # Errors
    /// The action that failed, or after which something did not hold.
    pub fn run(&mut self, actions: &[Action<'_>]) -> Result<()> {
        for (number, action) in actions.iter().enumerate() {
            eprintln!("-- {}: {action:?}", number + 1);
            self.act(*action).with_context(|| format!("action {}, {action:?}", number + 1))?;
            // While a party of the cluster stands still or is gone, guests are the only ones that can be asked.
            self.check().with_context(|| format!("after action {}, {action:?}", number + 1))?;
        }
        Ok(())
    }

    fn act(&mut self, action: Action<'_>) -> Result<()> {
        match action {
            Action::IntoTheMiddle(vm, to) => {
                let policy = MigrationPolicy { bandwidth: Some(SLOW), ..MigrationPolicy::default() };
                let task = self.begin_move(vm, to, policy)?;
                let middle = |phase, wire: u64| phase == MigrationPhase::WarmUp && wire >= MIDDLE;
                self.wait_progress(task, |progress| middle(progress.phase, progress.wire_bytes.get()))?;
            }
            Action::Kill(party) => self.kill(party)?,
            Action::Stop(party) => self.signal(party, Signal::STOP)?,
            Action::Continue(party) => self.signal(party, Signal::CONT)?,
            Action::Link(host, state) => {
                self.lab().set_link(host, LinkChange { state: Some(state), ..LinkChange::default() })?;
            }
            Action::Restart(party) => self.restart(party)?,
            Action::Pass(time) => thread::sleep(time),
            Action::Cancel(vm) => {
                let task = *self.moves.get(vm).context("no migration of it was begun")?;
                self.ask(self.client().cancel_task(task))?;
            }
            Action::Ends(vm, ending) => self.ends(vm, ending)?,
            Action::Migrate(vm, to) => {
                self.migrate(vm, to)?;
            }
        }
        Ok(())
    }

    /// Ends a process as a crash would.
    ///
    /// # Errors
    /// When it is not there.
    pub fn kill(&self, party: Party<'_>) -> Result<()> {
        match party {
            Party::Controller => Ok(self.lab().controller().crash()?),
            Party::Agent(host) => Ok(self.lab().agent(host)?.crash()?),
            Party::Carry(..) | Party::DiskCarry(..) | Party::Qemu(..) => self.process(party)?.signal(Signal::KILL),
        }
    }

    /// Sends a process a signal.
    pub(crate) fn signal(&self, party: Party<'_>, signal: Signal) -> Result<()> {
        match party {
            Party::Controller => Ok(self.lab().controller().signal(signal)?),
            Party::Agent(host) => Ok(self.lab().agent(host)?.signal(signal)?),
            Party::Carry(..) | Party::DiskCarry(..) | Party::Qemu(..) => self.process(party)?.signal(signal),
        }
    }

    fn restart(&self, party: Party<'_>) -> Result<()> {
        match party {
            Party::Controller => {
                self.lab().controller().spawn()?;
                for host in self.lab().hosts()? {
                    self.wait_connected(&host, true)?;
                }
                Ok(())
            }
            Party::Agent(host) => {
                self.lab().agent(host)?.spawn()?;
                self.wait_connected(host, true)
            }
            Party::Carry(..) | Party::DiskCarry(..) | Party::Qemu(..) => bail!("nobody starts {party:?} again"),
        }
    }

    /// The carry or QEMU that a party is.
    pub(crate) fn process(&self, party: Party<'_>) -> Result<HostProcess> {
        let (vm, host) = match party {
            Party::Carry(vm, host) | Party::DiskCarry(vm, host) | Party::Qemu(vm, host) => (self.guest(vm)?.id, host),
            Party::Controller | Party::Agent(_) => bail!("{party:?} is a daemon of the lab"),
        };
        let wanted = |process: &&HostProcess| match (&process.role, party) {
            (ProcessRole::Carry(name), Party::Carry(..)) => processes::names(name, vm),
            (ProcessRole::Carry(name), Party::DiskCarry(..)) => {
                name.strip_suffix(".1").is_some_and(|name| processes::names(name, vm))
            }
            (ProcessRole::Qemu(id), Party::Qemu(..)) => *id == vm,
            _ => false,
        };
        let all = self.processes(host)?;
        let found: Vec<&HostProcess> = all.iter().filter(wanted).collect();
        match found.as_slice() {
            [process] => Ok((*process).clone()),
            _ => bail!("{} processes on {host} are {party:?}, there are {all:?}", found.len()),
        }
    }

    fn ends(&mut self, vm: &str, ending: Ending<'_>) -> Result<()> {
        let task = self.moves.remove(vm).context("no migration of it was begun")?;
        let task = self.ended(task, PATIENCE)?;
        let host = self.host_of(vm)?;
        eprintln!("   {vm} on {host}: {:?} {:?}", task.state, task.error.as_ref().map(|error| (error.code, &error.message)));
        let code = task.error.as_ref().map(|error| error.code);
        let stayed = |codes: &[ErrorCode]| {
            let error = task.error.as_ref().context("it ended badly and says not why")?;
            ensure!(codes.is_empty() || codes.contains(&error.code), "its code is {}: {}", error.code, error.message);
            ensure!(error.hint.is_some(), "its refusal has no fix: {}", error.message);
            Ok(())
        };
        match ending {
            Ending::Moved(to) => {
                ensure!(task.state == TaskState::Done, "it ended {:?}, {code:?}: {:?}", task.state, task.trail);
                ensure!(host == to, "it is on {host}, not on {to}");
            }
            Ending::Stayed(on, codes) => {
                ensure!(task.state == TaskState::Failed, "it ended {:?}: {:?}", task.state, task.trail);
                stayed(codes)?;
                ensure!(host == on, "it is on {host}, not on {on}");
            }
            Ending::Cancelled(on) => {
                ensure!(task.state == TaskState::Cancelled, "it ended {:?}: {:?}", task.state, task.trail);
                ensure!(host == on, "it is on {host}, not on {on}");
            }
            Ending::Either(hosts) => {
                ensure!(hosts.contains(&host.as_str()), "it is on {host}");
                if task.state != TaskState::Done {
                    stayed(&[])?;
                }
            }
        }
        Ok(())
    }
}
