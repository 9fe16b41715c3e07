//! Everything that is so at one moment, and the loop that makes the next event happen. Each actor takes its turn when it has something to do
//! and a little, random, time has passed, so that between any two turns of one all others may come.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

use godwit_carrier::pages::{Applier, Digester};

use godwit_carrier::Side;

use super::agents::{Agents, Fact};
use super::carry::{Carry, Ended, KEY};
use super::deal::{AtDestination, AtSource};
use super::destination_qemu::DestinationQemu;
use super::feed::Feed;
use super::network::Dial;
use super::plan::{BlockPlan, Fault, Mark, Micros, Plan, SECOND, Trigger};
use super::random::Random;
use super::rules::{self, Broken, Ledger, broken};
use super::source_qemu::SourceQemu;
use super::wire::Wire;
use super::{Ran, Seen, Wrong};

/// A run that takes more events goes round in circles.
const MOST_EVENTS: u64 = 2_000_000;
/// From the last fault's healing, or from when every guest is quiet, to the end.
const ENDS_WITHIN: Micros = 90 * SECOND;
const QUIET: Micros = 20 * SECOND;

/// What takes turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Actor {
    Writer(Side),
    Reader(Side),
    Feed,
    Deal(Side),
    /// The destination's carry reads what its QEMU answers.
    Returns,
    Qemu(Side),
}

const ACTORS: [Actor; 10] = [
    Actor::Writer(Side::Source),
    Actor::Writer(Side::Destination),
    Actor::Reader(Side::Source),
    Actor::Reader(Side::Destination),
    Actor::Feed,
    Actor::Deal(Side::Source),
    Actor::Deal(Side::Destination),
    Actor::Returns,
    Actor::Qemu(Side::Source),
    Actor::Qemu(Side::Destination),
];

/// What happens at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Event {
    Turn(Actor),
    Guest,
    Agent(Side),
    /// A fact of this number arrives by way of the controller.
    Fact(usize),
    /// A second of a connection's life has passed for a side.
    Tick(Side, usize),
    /// The link may take the next piece.
    Link(usize, Side),
    Arrive(usize, Side),
    /// A side is told that a connection is broken.
    Reset(usize, Side),
    Dial,
    Established(usize),
    /// Time for an attempt is over.
    AttemptOver(usize),
    DialFailed,
    /// The source's QEMU had time enough to close by itself.
    HangUp,
    Fault(usize),
    /// Somebody may have been waiting for this moment.
    Wake,
}

pub(super) struct World {
    pub(super) plan: Plan,
    pub(super) wrong: Wrong,
    pub(super) random: Random,
    pub(super) now: Micros,
    events: u64,
    agenda: BinaryHeap<Reverse<(Micros, u64, Event)>>,
    numbered: u64,
    waiting_for: BTreeSet<Micros>,
    busy: [bool; ACTORS.len()],
    pub(super) ledger: Ledger,
    pub(super) wire: Wire,
    pub(super) dial: Dial,
    pub(super) source: Carry,
    pub(super) destination: Carry,
    pub(super) feed: Feed,
    pub(super) at_source: AtSource,
    pub(super) at_destination: AtDestination,
    pub(super) source_qemu: SourceQemu,
    pub(super) destination_qemu: DestinationQemu,
    pub(super) agents: Agents,
    pub(super) facts: Vec<Fact>,
    /// Faults that have not struck.
    pub(super) ahead: Vec<bool>,
    /// When all that was broken works again.
    pub(super) healed: Micros,
    /// Whose death or standstill may explain what comes of the move.
    pub(super) struck: Vec<Fault>,
    pub(super) killed: Vec<super::plan::Party>,
    pub(super) controller_away_until: Micros,
    pub(super) source_qemu_frozen_until: Micros,
    /// The source has run since it wrote its device state.
    pub(super) outdated: bool,
    pub(super) ran_at_destination: bool,
    pub(super) seen: Seen,
}

impl World {
    pub(super) fn new(seed: u64, wrong: Wrong) -> Self {
        let mut random = Random::new(seed);
        let plan = Plan::draw(&mut random);
        let source_qemu = SourceQemu::new(&plan, &mut random);
        let destination_qemu = DestinationQemu::new(&plan, &source_qemu.memory, &mut random);
        // The destination numbers its blocks in an order of its own.
        let mut placed: Vec<usize> = (0..plan.blocks.len()).filter(|place| plan.blocks[*place].placed).collect();
        if random.one_in(2) {
            placed.reverse();
        }
        let digester = Digester::new(&KEY);
        let lengths = placed.iter().map(|place| plan.blocks[*place].told()).collect();
        let applier = Applier::new(digester.clone(), lengths);
        let pages = plan.blocks.iter().map(|block| u64::from(block.pages)).sum();
        let is_placed = plan.blocks.iter().map(BlockPlan::goes_past_qemu).collect();
        let mut world = Self {
            ledger: Ledger::new(destination_qemu.memory.clone(), is_placed, pages),
            wire: Wire::new(&plan),
            dial: Dial::default(),
            source: Carry::new(Side::Source, &plan, wrong),
            destination: Carry::new(Side::Destination, &plan, wrong),
            feed: Feed::new(digester.clone(), plan.limits, wrong),
            at_source: AtSource::default(),
            at_destination: AtDestination::new(applier, digester, placed),
            agents: Agents::new(&plan),
            facts: vec![],
            ahead: vec![true; plan.faults.len()],
            healed: 0,
            struck: vec![],
            killed: vec![],
            controller_away_until: 0,
            source_qemu_frozen_until: 0,
            outdated: false,
            ran_at_destination: false,
            seen: Seen::default(),
            source_qemu,
            destination_qemu,
            plan,
            wrong,
            random,
            now: 0,
            events: 0,
            agenda: BinaryHeap::new(),
            numbered: 0,
            waiting_for: BTreeSet::new(),
            busy: [false; ACTORS.len()],
        };
        for event in [Event::Dial, Event::Guest, Event::Agent(Side::Source), Event::Agent(Side::Destination)] {
            world.at(0, event);
        }
        world
    }

    /// Has an event happen later.
    pub(super) fn at(&mut self, time: Micros, event: Event) {
        self.numbered += 1;
        self.agenda.push(Reverse((time.max(self.now), self.numbered, event)));
    }

    pub(super) fn after(&mut self, time: Micros, event: Event) {
        self.at(self.now + time, event);
    }

    pub(super) const fn carry(&mut self, side: Side) -> &mut Carry {
        match side {
            Side::Source => &mut self.source,
            Side::Destination => &mut self.destination,
        }
    }

    /// Faults that aim at it are on their way.
    pub(super) fn mark(&mut self, mark: Mark) {
        for number in 0..self.plan.faults.len() {
            if let Trigger::After(aimed, time) = self.plan.faults[number].trigger
                && aimed == mark
            {
                self.after(time, Event::Fault(number));
            }
        }
    }

    /// Runs to the end.
    pub(super) fn run(&mut self) -> Result<Ran, Broken> {
        while !self.agents.are_done() {
            self.give_turns();
            let Some(Reverse((time, _, event))) = self.agenda.pop() else {
                return broken(rules::COMES_TO_AN_END, "nothing is left to happen");
            };
            self.now = time;
            self.events += 1;
            let late = self.now > self.healed.max(QUIET) + ENDS_WITHIN;
            if late || self.events > MOST_EVENTS {
                return broken(rules::COMES_TO_AN_END, self.picture());
            }
            for number in 0..self.plan.faults.len() {
                if let Trigger::Event(at) = self.plan.faults[number].trigger
                    && at == self.events
                {
                    self.strike(number);
                }
            }
            self.happen(event)?;
            self.check()?;
        }
        self.check_end()?;
        self.seen.faults = self.struck.len() as u64;
        (self.seen.pages, self.seen.streamed) = self.feed.encoding();
        Ok(Ran { events: self.events, simulated: self.now, moved: self.agents.moved(), seen: self.seen })
    }

    /// What is so, for people.
    fn picture(&self) -> String {
        let (qemu, destination) = (&self.source_qemu, &self.destination_qemu);
        format!(
            "{} s after {} events: {}; QEMUs {:?} {:?} and {:?} {:?}, {} bytes of this pass left; carries {:?} and {:?}, window {:?}, unanswered {} us; faults {:?}",
            self.now / SECOND,
            self.events,
            self.agents.tell(),
            qemu.vcpus,
            qemu.migration,
            destination.vcpus,
            destination.migration,
            qemu.remaining(),
            self.source.ended,
            self.destination.ended,
            self.source.session.window(),
            self.feed.unanswered(self.now),
            self.struck,
        )
    }

    fn happen(&mut self, event: Event) -> Result<(), Broken> {
        match event {
            Event::Turn(actor) => {
                if let Some(place) = ACTORS.iter().position(|other| *other == actor) {
                    self.busy[place] = false;
                }
                if self.has_work(actor) {
                    return self.take_turn(actor);
                }
            }
            Event::Guest => {
                if self.now >= self.source_qemu_frozen_until {
                    self.source_qemu.run_guest(&self.plan, &mut self.random);
                }
                self.after(self.plan.guest.every, Event::Guest);
            }
            Event::Agent(side) => return self.on_agent(side),
            Event::Fact(number) => self.on_fact(number),
            Event::Tick(side, connection) => self.on_tick(side, connection),
            Event::Link(connection, from) => self.on_link(connection, from),
            Event::Arrive(connection, from) => {
                if let Some(later) = self.wire.arrive(connection, from, self.now) {
                    self.at(later, event);
                }
            }
            Event::Reset(connection, side) => self.lose(side, connection),
            Event::Dial => self.on_dial(),
            Event::Established(connection) => self.on_established(connection),
            Event::AttemptOver(connection) => self.on_attempt_over(connection),
            Event::DialFailed => self.on_dial_failed(),
            Event::HangUp => self.source_qemu.hung_up = true,
            Event::Fault(number) => self.strike(number),
            Event::Wake => {
                self.waiting_for.remove(&self.now);
            }
        }
        Ok(())
    }

    /// Who has something to do gets a turn soon.
    fn give_turns(&mut self) {
        for (place, actor) in ACTORS.into_iter().enumerate() {
            if !self.busy[place] && self.has_work(actor) {
                self.busy[place] = true;
                let most = match actor {
                    Actor::Deal(_) => self.random.pick(&[20, 200, 3_000]),
                    Actor::Feed | Actor::Qemu(_) => 400,
                    Actor::Writer(_) | Actor::Reader(_) | Actor::Returns => 100,
                };
                let time = self.random.between(1, most);
                self.after(time, Event::Turn(actor));
            }
        }
        for (connection, side) in self.wire.idle_pipes() {
            self.after(0, Event::Link(connection, side));
        }
        let gates = [
            self.source.frozen_until,
            self.destination.frozen_until,
            self.feed.paused_until,
            self.source_qemu.idle_until,
            self.source_qemu_frozen_until,
            self.destination_qemu.frozen_until,
            self.destination_qemu.loads_until().unwrap_or(0),
        ];
        for gate in gates {
            if gate > self.now && self.waiting_for.insert(gate) {
                self.at(gate, Event::Wake);
            }
        }
    }

    fn has_work(&self, actor: Actor) -> bool {
        let now = self.now;
        match actor {
            Actor::Writer(side) => self.can_write(side),
            Actor::Reader(side) => self.can_read(side),
            Actor::Feed => self.source.is_up(now) && self.feed.is_busy(self.is_source_readable(), &self.source, now),
            Actor::Deal(Side::Source) => self.source.is_up(now) && !self.source.queue.is_empty(),
            Actor::Deal(Side::Destination) => self.destination.is_up(now) && self.can_deal(),
            Actor::Returns => self.destination.is_up(now) && self.can_return(),
            Actor::Qemu(Side::Source) => now >= self.source_qemu_frozen_until && self.source_qemu.is_busy(now),
            Actor::Qemu(Side::Destination) => self.destination_qemu.is_busy(now),
        }
    }

    fn take_turn(&mut self, actor: Actor) -> Result<(), Broken> {
        match actor {
            Actor::Writer(side) => self.write(side),
            Actor::Reader(side) => return self.read(side),
            Actor::Feed => return self.feed_on(),
            Actor::Deal(Side::Source) => return self.deal_at_source(),
            Actor::Deal(Side::Destination) => return self.deal_at_destination(),
            Actor::Returns => self.return_on(),
            Actor::Qemu(Side::Source) => return self.source_qemu_on(),
            Actor::Qemu(Side::Destination) => return self.destination_qemu_on(),
        }
        Ok(())
    }

    /// What must be so after every event.
    fn check(&mut self) -> Result<(), Broken> {
        if self.source_qemu.runs() && self.destination_qemu.runs() {
            return broken(rules::ONE_RUNNER, "both run");
        }
        self.seen.full += u64::from(!self.source.session.window().has_room());
        self.outdated |= self.source_qemu.runs() && self.source_qemu.last.is_some();
        self.ledger.check_session(Side::Source, &self.source.session)?;
        self.ledger.check_session(Side::Destination, &self.destination.session)?;
        for carry in [&self.source, &self.destination] {
            if let Some(Ended::Failed(why)) = &carry.ended {
                return broken(rules::NO_END_WITHOUT_CAUSE, format!("the {:?}'s carry: {why}", carry.side));
            }
        }
        Ok(())
    }
}
