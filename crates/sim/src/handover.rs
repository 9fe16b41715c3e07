//! The hand-over of one VM between hosts, in one move or two in a row, as a model to be explored. `docs/spec/handover.md` is the protocol.
//!
//! - *Freezes* cost nothing and are unlimited: an agent reads, decides and acts in separate steps, and between any two of them everything else
//!   may happen, time limits included. What was decided before a freeze is carried out after it.
//! - *Messages* that were said may arrive never, late, again and in any order: what was said is a set, and stays in it.
//! - *Faults* are counted: crashes, power cuts, cut wires, failing journals, messages lost for good, QEMUs that die, a controller that is away.

mod agent;
mod controller;
mod fault;
mod qemu;
pub mod rules;

use godwit_migration::{Destination, QemuMigration, Source, SourceRecord, Vcpus};

use crate::explore::Model;

/// Hosts. The VM begins on the first.
const HOSTS: usize = 3;
/// Moves at most.
const MOVES: usize = 2;

/// Where the VM goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// To the second host.
    Once,
    /// To the second host, and whatever became of that, from where it is then to the first, or to the second again.
    ThereAndBack,
    /// To the second host, and whatever became of that, from where it is then to the third.
    Onward,
}

/// A protocol that is wrong on purpose: the exploration must find out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// The protocol as it is.
    Nothing,
    /// The destination runs what it has loaded, released or not.
    RunsWithoutRelease,
    /// The source takes a destination that is silent after the release for one that has declined.
    TakesSilenceForDeclined,
    /// The release is said before it is durable.
    SaysReleaseEarly,
    /// The destination runs the VM before it is durable that it owns it.
    RunsBeforeDurable,
    /// QEMU's own stop is taken for ours.
    TakesQemusStopForOurs,
    /// QEMU's own stop is taken for ours, and the release does not wait for `completed`.
    ReleasesWithoutProvenStop,
    /// The source is removed as soon as it has released.
    RemovesAfterRelease,
    /// A destination says that it declines before that is durable.
    SaysDeclinedEarly,
    /// A host forgets a move and does not keep that its generation is not to be taken up again.
    KeepsNoFloor,
    /// The source does not wait until the destination has what was left.
    KeepsNothingBack,
    /// A destination takes the death of a QEMU that nobody has told to run the VM for a crash of the VM.
    TakesDeathForCrash,
    /// A destination tells the controller that the VM is its own as soon as it has activated it.
    ClaimsWhatItMayDecline,
    /// The last fact of a source is said once and never asked for again: who has forgotten a move answers nothing.
    AnswersNothingOfThePast,
    /// A destination that has ended a move without its source does not keep that it has run the VM.
    ForgetsThatItRan,
}

/// What is explored.
#[derive(Clone, Copy, Debug)]
pub struct HandOver {
    /// Where the VM goes.
    pub route: Route,
    /// Faults per run.
    pub faults: u8,
    /// QEMU from 8.1 on, which does not switch over by itself while the VM runs.
    pub held: bool,
    /// Pages are left for after the switch.
    pub postcopy: bool,
    /// What is wrong on purpose.
    pub wrong: Wrong,
}

impl HandOver {
    fn moves(&self) -> usize {
        if self.route == Route::Once { 1 } else { MOVES }
    }
}

/// All that is so at one moment.
#[derive(Clone, Debug, Hash)]
pub struct World {
    hosts: [Host; HOSTS],
    moves: [Move; MOVES],
    /// The move that the controller carries out, or did last.
    current: u8,
    controller_up: bool,
    /// Pages are left for after the switch.
    postcopy: bool,
    faults_left: u8,
    /// The QEMU that owned the VM has died, or one of which nobody knows whether it had been told to run: then nobody may be left running.
    vm_crashed: bool,
    broken: Option<&'static str>,
}

/// A host and its agent.
#[derive(Clone, Debug, Default, Hash)]
struct Host {
    /// The agent is there.
    up: bool,
    /// What the journal says.
    disk: Option<Record>,
    /// The highest generation that is not taken up again; durable.
    floor: u8,
    /// The highest generation that ran here after a move whose source does not know it; durable.
    ran: u8,
    /// How moves ended here, while the controller has not acknowledged it; durable.
    ended: [Option<bool>; MOVES],
    /// What the agent takes the journal to say.
    memory: Option<Record>,
    moving: Option<Moving>,
    doing: Doing,
    qemu: Option<Qemu>,
    /// A command to QEMU that was on its way when the agent died. It may still come to pass, until a new agent has opened the monitor.
    stale: Option<Command>,
}

/// What a journal says of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Record {
    generation: u8,
    holding: Holding,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Holding {
    Owner,
    Source(u8, SourceRecord),
    Destination(u8, Taken),
}

/// A destination's record without its reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Taken {
    Prepared,
    Activated,
    Running,
    Declined,
}

/// The volatile half of a move: the real machines, and what they were told.
#[derive(Clone, Debug, Hash)]
enum Moving {
    Source(u8, SourceMove),
    Destination(u8, DestinationMove),
}

#[derive(Clone, Debug, Hash)]
struct SourceMove {
    machine: Source,
    clock: u64,
    declined: bool,
    running: bool,
    whole: bool,
    cancel: bool,
}

impl SourceMove {
    fn forget_what_made_it_give_up(&mut self) {
        if self.machine.giving_up().is_some() {
            (self.clock, self.cancel) = (0, false);
        }
    }
}

#[derive(Clone, Debug, Hash)]
struct DestinationMove {
    machine: Destination,
    clock: u64,
    released: bool,
    aborted: bool,
    lost: bool,
    settled: bool,
    source_given_up: bool,
    cont_refused: bool,
    announced: bool,
}

/// What an agent is in the middle of; it can be frozen in any of these for any time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Doing {
    #[default]
    Idle,
    /// `query-status` has been answered, `query-migrate` not yet.
    Seen(Vcpus),
    /// A command to QEMU is decided, and not carried out.
    Told(Command),
    /// Our stop is proven by what QEMU says before and after it: it ran before.
    Stopping(bool),
    /// The stop was carried out, the answer to what is so after it is not there yet.
    Stopped(bool),
    /// A record is decided, and not written.
    WritesSource(SourceRecord),
    WritesDestination(Taken),
    EndsQemu,
    /// The move ends here, moved or not: what of that is done already.
    Ends(bool, Ending),
}

/// The steps of an end, each a line at which the agent may die.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Ending {
    Keep,
    RaiseFloor,
    Tell,
    EndQemu,
    Forget,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Command {
    Migrate,
    Stop,
    Continue,
    Cancel,
    Cont,
}

/// A QEMU process.
#[derive(Clone, Copy, Debug, Hash)]
struct Qemu {
    vcpus: Vcpus,
    migration: QemuMigration,
    /// The move that it migrates or loads for.
    of: u8,
    /// QEMU stopped the VM itself, and runs it again when the migration comes to nothing.
    resumes: bool,
    /// It holds a socket to migrate into.
    descriptor: bool,
}

/// The connection between the two carries of a move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Wire {
    #[default]
    None,
    Listening,
    Connected,
    Cut,
}

/// How far the controller is with a move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Stage {
    #[default]
    NotYet,
    Prepare,
    MoveOut,
    Moving,
    Done,
}

/// One move: generation `its number + 2`.
#[derive(Clone, Copy, Debug, Default, Hash)]
struct Move {
    source: u8,
    destination: u8,
    stage: Stage,
    source_ended: Option<bool>,
    destination_ended: Option<bool>,
    /// The controller has told the destination that the task is over; this may arrive at any time.
    settle: bool,
    /// The user has asked for it to be cancelled; this may arrive at any time.
    cancel: bool,
    /// The controller waits for the source no more, and has told the destination; this may arrive at any time.
    source_given_up: bool,
    wire: Wire,
    /// The last byte has reached the destination's carry.
    whole: bool,
    /// The grant has expired by the destination's clock.
    expired: bool,
    /// Facts that were said, and may arrive at any time.
    said: [bool; FACTS],
    /// What has been so, for the rules.
    past: Past,
}

#[derive(Clone, Copy, Debug, Default, Hash)]
struct Past {
    released: bool,
    /// The destination's agent has decided to run it, or one before it may have.
    told: bool,
    ran: bool,
    /// The source ran on after the destination had loaded everything: what is loaded is older than the disks.
    outdated: bool,
    source: Option<bool>,
    destination: Option<bool>,
}

/// What agents tell each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fact {
    /// See `PeerMessage::Released`.
    Released,
    /// See `PeerMessage::Aborted`.
    Aborted,
    /// See `PeerMessage::Settled`.
    Settled,
    /// See `PeerMessage::Running`.
    Running,
    /// See `PeerMessage::Declined`.
    Declined,
    /// See `PeerMessage::Whole`.
    Whole,
    /// See `PeerMessage::Lost`.
    Lost,
}

const FACTS: usize = 7;
const EVERY_FACT: [Fact; FACTS] =
    [Fact::Released, Fact::Aborted, Fact::Settled, Fact::Running, Fact::Declined, Fact::Whole, Fact::Lost];

impl Fact {
    const fn is_for_destination(self) -> bool {
        matches!(self, Self::Released | Self::Aborted | Self::Settled | Self::Lost)
    }
}

/// What can happen. Hosts and moves are numbered from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// An agent asks its QEMU for the run state.
    LooksAtStatus(u8),
    /// An agent sees the rest and decides.
    Decides(u8),
    /// The same, while what is left to send does not fit the budget yet.
    DecidesThatItDoesNotFit(u8),
    /// An agent carries out what it has decided, or the next part of it.
    Acts(u8),
    /// A time limit of an agent passes.
    LimitPasses(u8),
    /// An agent that died is started again.
    Restarts(u8),
    /// A command of an agent that died is carried out after all.
    StaleCommand(u8),
    /// A command of an agent that died is thrown away.
    StaleCommandDropped(u8),
    /// QEMU goes on by itself.
    Qemu(u8),
    /// QEMU reaches its own switch-over while the VM runs.
    QemuIsFirst(u8),
    /// The last byte reaches the destination's carry.
    LastByte(u8),
    /// The destination's QEMU has the last page that was left.
    LastPage(u8),
    /// A fact arrives.
    Arrives(u8, Fact),
    /// The controller goes on.
    Controller(Order),
    /// A fault.
    Fault(Fault),
}

/// What the controller does or gets done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The controller is there again.
    Returns,
    /// The destination prepares.
    Prepare,
    /// The source begins.
    MoveOut,
    /// The end of a move as this host knows it is stored and acknowledged.
    Ended(u8),
    /// The task ends.
    Finish,
    /// The destination of a move hears that its task is over.
    Settle(u8),
    /// The source of a move hears that it is to be cancelled.
    Cancel(u8),
    /// The destination runs the VM, and its source is taken for gone.
    GiveSourceUp,
    /// The next move is asked for.
    Next,
}

/// What may go wrong. Each takes one of the faults of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// An agent dies. What it was in the middle of is lost.
    AgentDies(u8),
    /// An agent dies. What it was in the middle of comes to pass all the same.
    AgentDiesTooLate(u8),
    /// A host loses power: agent, carry and QEMU are gone, the journal is kept.
    Power(u8),
    /// A host loses power, right after a write.
    PowerAfterWrite(u8),
    /// A QEMU dies.
    QemuDies(u8),
    /// The connection of a move is cut.
    Cut(u8),
    /// A write fails, and the journal is as before.
    WriteFails(u8),
    /// A write fails, and holds all the same: the directory could not be synced.
    WriteHolds(u8),
    /// All copies of a fact are lost.
    Lost(u8, Fact),
    /// The controller is away.
    ControllerAway,
    /// The answer to what the controller wants is lost: it asks again.
    AnswerLost,
    /// The acknowledgement of an end is lost.
    AckLost(u8),
    /// The user wants the move cancelled.
    Cancelled,
    /// The destination's QEMU refuses to run the VM.
    ContRefused(u8),
    /// The destination's QEMU does not answer while it loads.
    QemuHangs(u8),
}

/// The generation that a move leads to.
const fn generation(number: u8) -> u8 {
    number + 2
}

impl World {
    fn new(faults: u8, postcopy: bool) -> Self {
        let owner = Record { generation: 1, holding: Holding::Owner };
        let qemu = Qemu { vcpus: Vcpus::Running, migration: QemuMigration::None, of: 0, resumes: false, descriptor: false };
        let first = Host { up: true, disk: Some(owner), memory: Some(owner), qemu: Some(qemu), ..Host::default() };
        let empty = Host { up: true, ..Host::default() };
        let going = Move { source: 0, destination: 1, stage: Stage::Prepare, ..Move::default() };
        Self {
            hosts: [first, empty.clone(), empty],
            moves: [going, Move::default()],
            current: 0,
            controller_up: true,
            postcopy,
            faults_left: faults,
            vm_crashed: false,
            broken: None,
        }
    }

    fn breaks(&mut self, rule: &'static str) {
        self.broken.get_or_insert(rule);
    }

    /// States that differ only in what nobody will ever look at again count as one. A machine that is past the record for which it remembers
    /// something is replaced by a fresh one: as it is after a crash, which its contract allows at any moment.
    fn forget_what_no_longer_matters(&mut self) {
        for here in &mut self.hosts {
            let Some(record) = here.memory else { continue };
            match (&mut here.moving, record.holding) {
                (Some(Moving::Source(_, moving)), Holding::Source(_, SourceRecord::Offered)) => {
                    moving.forget_what_made_it_give_up()
                }
                (Some(Moving::Source(number, moving)), Holding::Source(..)) => {
                    let (declined, running, whole) = (moving.declined, moving.running, moving.whole);
                    let fresh = agent::source_move(self.postcopy);
                    here.moving = Some(Moving::Source(*number, SourceMove { declined, running, whole, ..fresh }));
                }
                (Some(Moving::Destination(_, moving)), Holding::Destination(_, Taken::Prepared)) if !moving.released => {
                    moving.clock = 0
                }
                (Some(Moving::Destination(_, moving)), Holding::Destination(_, Taken::Activated)) => {
                    (moving.clock, moving.released) = (0, false);
                }
                (Some(Moving::Destination(number, moving)), Holding::Destination(_, Taken::Running | Taken::Declined)) => {
                    let DestinationMove { aborted, lost, settled, source_given_up, announced, .. } = *moving;
                    let fresh = agent::destination_move();
                    let moving = DestinationMove { aborted, lost, settled, source_given_up, announced, ..fresh };
                    here.moving = Some(Moving::Destination(*number, moving));
                }
                _ => {}
            }
        }
        for number in 0..self.current {
            let going = &mut self.moves[usize::from(number)];
            if going.past.source.is_some() && going.past.destination.is_some() {
                let Move { source, destination, stage, said, .. } = *going;
                let past = Past { ran: going.past.ran, ..Past::default() };
                let wire = if going.wire == Wire::None { Wire::None } else { Wire::Cut };
                *going = Move { source, destination, stage, said, wire, past, ..Move::default() };
            }
        }
    }

    fn cut(&mut self, number: u8) {
        let wire = &mut self.moves[usize::from(number)].wire;
        if *wire != Wire::None {
            *wire = Wire::Cut;
        }
    }

    fn say(&mut self, number: u8, fact: Fact) {
        self.moves[usize::from(number)].said[fact as usize] = true;
    }
}

/// Collects what can happen next.
struct Steps<'a> {
    world: &'a World,
    next: &'a mut Vec<(Step, World)>,
}

impl Steps<'_> {
    fn add(&mut self, step: Step, change: impl FnOnce(&mut World)) {
        let mut after = self.world.clone();
        change(&mut after);
        rules::look(&mut after);
        after.forget_what_no_longer_matters();
        self.next.push((step, after));
    }

    /// A fault, if one is left.
    fn fault(&mut self, fault: Fault, change: impl FnOnce(&mut World)) {
        if self.world.faults_left > 0 {
            self.add(Step::Fault(fault), |after| {
                after.faults_left -= 1;
                change(after);
            });
        }
    }
}

impl Model for HandOver {
    type State = World;
    type Step = Step;

    fn begin(&self) -> World {
        World::new(self.faults, self.postcopy)
    }

    fn steps(&self, world: &World, next: &mut Vec<(Step, World)>) {
        let mut steps = Steps { world, next };
        for host in 0..HOSTS as u8 {
            agent::steps(self, &mut steps, host);
            qemu::steps(self, &mut steps, host);
        }
        controller::steps(self, &mut steps);
        fault::steps(&mut steps);
    }

    fn is_fault(&self, step: Step) -> bool {
        matches!(step, Step::Fault(_))
    }

    fn broken(&self, world: &World) -> Option<&'static str> {
        world.broken
    }

    fn is_good_end(&self, world: &World) -> bool {
        rules::is_good_end(self, world)
    }
}
