//! What is done to whom.

use std::fmt;
use std::time::Duration;

use super::moment::Moment;

/// A fault and when it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// What is done.
    pub fault: Fault,
    /// When.
    pub moment: Moment,
}

/// Something that goes wrong, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What is done to whom.
    pub kind: FaultKind,
    /// How long until it is undone; for a killed daemon, until it is started again.
    pub lasts: Duration,
}

/// What is done to whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FaultKind {
    /// SIGKILL. Daemons are started again; nobody starts a carry or a QEMU again.
    Kill(Party),
    /// SIGSTOP, then SIGCONT.
    Stop(Party),
    /// Nothing passes between a host and all others.
    Cut(Side),
    /// What a host sends is lost, what is sent to it arrives.
    CutOneWay(Side),
    /// A host's link is slow and what it sends is late.
    Slow {
        /// The host.
        side: Side,
        /// Megabits per second, each way.
        megabits: u64,
        /// Added to what the host sends.
        delay: Duration,
    },
    /// No byte more goes onto a disk.
    Full(FullDisk),
    /// Every fsync and fdatasync of a process fails with EIO.
    FailedSync(Party),
    /// The wall clock of a daemon is put forward or back.
    Jump {
        /// The controller or an agent.
        party: Party,
        /// By how many seconds.
        seconds: i64,
    },
}

/// A process that takes part in the move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Party {
    /// The controller.
    Controller,
    /// The agent of a side.
    Agent(Side),
    /// The carry of the move on a side.
    Carry(Side),
    /// A side's carry of the disk that travels.
    DiskCarry(Side),
    /// The VM's QEMU on a side.
    Qemu(Side),
}

/// A host of the move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Where the VM runs at first.
    Source,
    /// Where it shall go.
    Destination,
}

/// A disk that can be filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FullDisk {
    /// The one that holds the state of a side's agent: its journal above all.
    Host(Side),
    /// The one that holds the controller's data.
    Controller,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "the source",
            Self::Destination => "the destination",
        })
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Controller => f.write_str("the controller"),
            Self::Agent(side) => write!(f, "{side}'s agent"),
            Self::Carry(side) => write!(f, "{side}'s carry"),
            Self::DiskCarry(side) => write!(f, "{side}'s carry of the disk"),
            Self::Qemu(side) => write!(f, "{side}'s QEMU"),
        }
    }
}

impl fmt::Display for FullDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(side) => write!(f, "{side}'s state"),
            Self::Controller => f.write_str("the controller's data"),
        }
    }
}

impl FaultKind {
    /// Without its figures: what is counted together.
    #[must_use]
    pub fn summary(&self) -> String {
        match self {
            Self::Kill(party) => format!("kill {party}"),
            Self::Stop(party) => format!("stop {party}"),
            Self::Cut(side) => format!("cut {side}'s link"),
            Self::CutOneWay(side) => format!("cut what {side} sends"),
            Self::Slow { side, .. } => format!("slow {side}'s link"),
            Self::Full(disk) => format!("fill {disk}"),
            Self::FailedSync(party) => format!("fail the syncs of {party}"),
            Self::Jump { party, .. } => format!("put {party}'s clock off"),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.kind.summary())?;
        let lasts = self.lasts.as_millis();
        match &self.kind {
            FaultKind::Kill(Party::Carry(_) | Party::DiskCarry(_) | Party::Qemu(_)) => Ok(()),
            FaultKind::Kill(_) => write!(f, ", back after {lasts} ms"),
            FaultKind::Slow { megabits, delay, .. } => {
                write!(f, " to {megabits} Mbit/s and {} ms for {lasts} ms", delay.as_millis())
            }
            FaultKind::Jump { seconds, .. } => write!(f, " by {seconds:+} s for {lasts} ms"),
            _ => write!(f, " for {lasts} ms"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_say_what_is_done_to_whom() {
        let lasts = Duration::from_millis(1_500);
        for (kind, text) in [
            (FaultKind::Kill(Party::Qemu(Side::Source)), "kill the source's QEMU"),
            (FaultKind::Kill(Party::Controller), "kill the controller, back after 1500 ms"),
            (FaultKind::Stop(Party::Carry(Side::Destination)), "stop the destination's carry for 1500 ms"),
            (FaultKind::CutOneWay(Side::Source), "cut what the source sends for 1500 ms"),
            (FaultKind::Full(FullDisk::Host(Side::Source)), "fill the source's state for 1500 ms"),
            (
                FaultKind::Jump { party: Party::Agent(Side::Source), seconds: -90 },
                "put the source's agent's clock off by -90 s for 1500 ms",
            ),
            (
                FaultKind::Slow { side: Side::Source, megabits: 4, delay: Duration::from_millis(20) },
                "slow the source's link to 4 Mbit/s and 20 ms for 1500 ms",
            ),
        ] {
            assert_eq!(Fault { kind, lasts }.to_string(), text);
        }
    }
}
