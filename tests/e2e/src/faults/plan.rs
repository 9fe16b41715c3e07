//! What one run does, drawn from its seed and from nothing else: the same seed is the same plan, on any machine.

use std::time::Duration;

use godwit_guest::Noise;
use godwit_model::{BytesPerSec, MigrationPolicy, Millis, PostCopy};

use super::fault::{Fault, FaultKind, FullDisk, Party, Planned, Side};
use super::moment::{Mark, Moment};

/// The whole of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// What it was drawn from.
    pub seed: u64,
    /// QEMU where the VM begins.
    pub source: Emulator,
    /// QEMU where it shall go.
    pub destination: Emulator,
    /// What the guest does.
    pub load: Load,
    /// What disk it has.
    pub disk: Disk,
    /// Limits of the move.
    pub policy: MigrationPolicy,
    /// One or two faults.
    pub faults: Vec<Planned>,
}

/// A version of QEMU that the hosts of a run have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Emulator {
    /// The one on PATH.
    Path,
    /// The other one, `GODWIT_QEMU_OTHER`; where there is none, the one on PATH.
    Other,
}

/// What the guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Load {
    /// Almost nothing: QEMU is ready for its own switch-over after one pass.
    Idle,
    /// It dirties memory all the time.
    Busy,
}

/// What disk the VM has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Disk {
    /// None.
    None,
    /// One in the pool that all hosts share.
    Shared,
    /// One of which each host has a copy of its own in what it takes for a shared pool: no lock on a file keeps a second runner away.
    Copies,
    /// One that no other host sees: it travels, and its guest writes to it all the time.
    Local,
}

impl Plan {
    /// The plan that belongs to `seed`.
    #[must_use]
    pub fn of(seed: u64) -> Self {
        let mut draw = Draw(Noise::new(seed));
        let emulators = [Emulator::Path, Emulator::Other];
        let (source, destination) = (draw.of(&emulators), draw.of(&emulators));
        let load = draw.of(&[Load::Idle, Load::Busy]);
        let disk = draw.of(&[Disk::None, Disk::Shared, Disk::Copies, Disk::Copies, Disk::Local, Disk::Local, Disk::Local]);
        let bandwidth = draw.of(&[None, Some(BytesPerSec(40_000_000)), Some(BytesPerSec(15_000_000))]);
        let policy = MigrationPolicy {
            bandwidth,
            timeout: Millis(120_000),
            stall: draw.of(&[Millis(5_000), Millis(20_000)]),
            stop_limit: draw.of(&[Millis(2_000), Millis(10_000)]),
            ..MigrationPolicy::default()
        };
        let length = load.expected_length(bandwidth) + if disk == Disk::Local { Duration::from_secs(2) } else { Duration::ZERO };
        let count = draw.of(&[1, 1, 2]);
        let mut faults: Vec<Planned> = (0..count).map(|_| draw.planned(length)).collect();
        let mut policy = policy;
        if draw.of(&[true, false]) {
            policy.postcopy = PostCopy::Now;
            policy.bandwidth = Some(draw.of(&[BytesPerSec(15_000_000), BytesPerSec(8_000_000)]));
            // What is new in it comes after the hand-over.
            if let Some(first) = faults.first_mut()
                && draw.of(&[true, false])
            {
                first.moment = Moment { mark: Mark::Follows, after: draw.millis(0, 3_000) };
            }
        }
        if disk == Disk::Local {
            faults.iter_mut().for_each(|planned| draw.towards_the_disk(&mut planned.fault.kind));
        }
        Self { seed, source, destination, load, disk, policy, faults }
    }

    /// Whether the VM goes on before all of its memory is there.
    #[must_use]
    pub fn is_postcopy(&self) -> bool {
        self.policy.postcopy == PostCopy::Now
    }

    /// The longest time for which one of its faults lasts.
    #[must_use]
    pub fn longest_fault(&self) -> Duration {
        self.faults.iter().map(|planned| planned.fault.lasts).max().unwrap_or_default()
    }
}

impl Load {
    /// From the request to the end of a move that nothing disturbs, on a small machine that emulates.
    fn expected_length(self, bandwidth: Option<BytesPerSec>) -> Duration {
        let megabytes = match self {
            Self::Idle => 60,
            Self::Busy => 110,
        };
        let rate = bandwidth.map_or(60, |rate| rate.get() / 1_000_000).max(1);
        Duration::from_secs(3) + Duration::from_millis(1_000 * megabytes / rate)
    }

    /// For people.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Busy => "busy",
        }
    }
}

impl Disk {
    /// For people.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Shared => "shared",
            Self::Copies => "copies",
            Self::Local => "local",
        }
    }
}

/// Draws choices.
struct Draw(Noise);

impl Draw {
    fn of<T: Clone>(&mut self, choices: &[T]) -> T {
        let index = usize::try_from(self.0.below(choices.len() as u64)).unwrap_or(0);
        choices.get(index).cloned().expect("there are choices, and the index is below their number")
    }

    /// One of them, each as often as its weight says.
    fn weighted<T: Clone>(&mut self, choices: &[(u64, T)]) -> T {
        let mut left = self.0.below(choices.iter().map(|(weight, _)| weight).sum());
        let found = choices.iter().find(|(weight, _)| {
            let found = left < *weight;
            left = left.saturating_sub(*weight);
            found
        });
        found.map(|(_, choice)| choice.clone()).expect("what is left is below the sum of the weights")
    }

    fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.0.below(to - from))
    }

    fn planned(&mut self, length: Duration) -> Planned {
        let fault = self.fault();
        // A disk that fails matters where something is to be written: it begins early as often as not.
        let early = matches!(fault.kind, FaultKind::Full(_) | FaultKind::FailedSync(_)) && self.of(&[true, false]);
        let moment = if early { Moment { mark: Mark::Begin, after: self.millis(0, 2_000) } } else { self.moment(length) };
        Planned { fault, moment }
    }

    fn fault(&mut self) -> Fault {
        #[derive(Clone, Copy)]
        enum Family {
            Kill,
            Stop,
            Cut,
            CutOneWay,
            Slow,
            Full,
            FailedSync,
            Jump,
        }
        let sides = [Side::Source, Side::Destination];
        let family = self.weighted(&[
            (30, Family::Kill),
            (28, Family::Stop),
            (10, Family::Cut),
            (8, Family::CutOneWay),
            (6, Family::Slow),
            (9, Family::Full),
            (9, Family::FailedSync),
            (8, Family::Jump),
        ]);
        let (kind, lasts) = match family {
            Family::Kill => (FaultKind::Kill(self.party()), self.millis(200, 6_000)),
            Family::Stop => (FaultKind::Stop(self.party()), self.while_stopped()),
            Family::Cut => (FaultKind::Cut(self.of(&sides)), self.millis(500, 16_000)),
            Family::CutOneWay => (FaultKind::CutOneWay(self.of(&sides)), self.millis(500, 16_000)),
            Family::Slow => {
                let side = self.of(&sides);
                let (megabits, delay) = (self.of(&[4, 16, 60]), self.millis(0, 200));
                (FaultKind::Slow { side, megabits, delay }, self.millis(4_000, 12_000))
            }
            Family::Full => {
                let disk = self.of(&[FullDisk::Host(Side::Source), FullDisk::Host(Side::Destination), FullDisk::Controller]);
                (FaultKind::Full(disk), self.millis(2_000, 12_000))
            }
            Family::FailedSync => {
                let party = self.of(&[Party::Agent(Side::Source), Party::Agent(Side::Destination), Party::Controller]);
                (FaultKind::FailedSync(party), self.millis(2_000, 12_000))
            }
            Family::Jump => {
                let party = self.of(&[Party::Agent(Side::Source), Party::Agent(Side::Destination), Party::Controller]);
                // Beyond the expiry of a grant, and before the beginning of a certificate; neither beyond the end of one.
                let seconds = self.of(&[-7_200, -90, 90, 7_200, 10 * 86_400]);
                (FaultKind::Jump { party, seconds }, self.millis(2_000, 12_000))
            }
        };
        Fault { kind, lasts }
    }

    /// What is done to a carry is done to the disk's as often as not.
    fn towards_the_disk(&mut self, kind: &mut FaultKind) {
        if let FaultKind::Kill(party) | FaultKind::Stop(party) = kind
            && let Party::Carry(side) = *party
            && self.of(&[true, false])
        {
            *party = Party::DiskCarry(side);
        }
    }

    fn party(&mut self) -> Party {
        let side = self.of(&[Side::Source, Side::Destination]);
        self.weighted(&[(3, Party::Agent(side)), (3, Party::Carry(side)), (3, Party::Qemu(side)), (2, Party::Controller)])
    }

    /// Longer than the limits of the policy; now and then longer than every limit there is.
    fn while_stopped(&mut self) -> Duration {
        let (from, to) = self.weighted(&[(8, (5_000, 12_000)), (1, (12_000, 30_000)), (1, (30_000, 70_000))]);
        self.millis(from, to)
    }

    /// Most moments follow a mark closely: the windows around a hand-over are short, and a time drawn blindly rarely hits them.
    fn moment(&mut self, length: Duration) -> Moment {
        let whole = u64::try_from(length.as_millis()).unwrap_or(u64::MAX).max(1);
        let (mark, longest) = self.weighted(&[
            (30, (Mark::Begin, whole)),
            (8, (Mark::Prepared, 1_500)),
            (12, (Mark::WarmUp, 3_000)),
            (20, (Mark::Stop, 150)),
            (14, (Mark::Released, 40)),
            (10, (Mark::Activated, 40)),
            (6, (Mark::Confirmed, 300)),
        ]);
        Moment { mark, after: self.millis(0, longest) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_is_a_plan() {
        assert_eq!(Plan::of(7), Plan::of(7));
        assert_ne!(Plan::of(7), Plan { seed: 7, ..Plan::of(8) });
    }

    #[test]
    fn a_thousand_plans_have_everything_in_them() {
        let plans: Vec<Plan> = (0..1_000).map(Plan::of).collect();
        let faults = || plans.iter().flat_map(|plan| &plan.faults);
        let count = |texts: BTreeSet<String>| texts.len();
        assert_eq!(count(plans.iter().map(|plan| format!("{:?}{:?}", plan.source, plan.destination)).collect()), 4);
        assert_eq!(count(plans.iter().map(|plan| format!("{:?}{:?}", plan.load, plan.disk)).collect()), 8);
        assert_eq!(count(faults().map(|planned| format!("{:?}", planned.moment.mark)).collect()), 8);
        assert!((400..600).contains(&plans.iter().filter(|plan| plan.is_postcopy()).count()));
        // Nine parties are killed and stopped; two links cut, half cut, and slow; three disks full; three processes with failing
        // syncs, and three with clocks that are off.
        let kinds = faults().map(|planned| planned.fault.kind.summary());
        assert_eq!(count(kinds.collect()), 9 + 9 + 2 + 2 + 2 + 3 + 3 + 3);
        assert!(plans.iter().any(|plan| plan.faults.len() == 1) && plans.iter().any(|plan| plan.faults.len() == 2));
        assert!(plans.iter().all(|plan| (1..=2).contains(&plan.faults.len()) && plan.longest_fault() <= Duration::from_secs(70)));
    }
}
