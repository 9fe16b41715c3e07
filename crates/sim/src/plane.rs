//! The data plane of one move, run in simulated time from a seed: a source QEMU that writes a real stream while its guest writes to memory, both
//! carries, a link that loses, delays and cuts, a destination QEMU, and the agents' machines. What is real and what is modelled is in
//! `docs/reliability.md`; what must be so after every event is in [`rules`].
//!
//! Start with `world.rs`.

mod agents;
mod carry;
mod deal;
mod destination_qemu;
mod feed;
mod guest;
mod network;
mod plan;
mod random;
pub mod rules;
mod source_qemu;
mod wire;
mod world;

use godwit_carrier::pages::Encoding;
pub use rules::Broken;

/// A carry that is wrong on purpose: the simulation must find out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// As it is.
    Nothing,
    /// What has come is acknowledged before it is dealt with.
    AcknowledgesWhatWaits,
    /// After a new connection the newest frame that waits is dealt with first.
    DealsWithNewestFirst,
    /// What a connection took with it is sent again but for one frame.
    SkipsOneWhenSendingAgain,
    /// What a connection took with it is not sent again.
    SendsNothingAgain,
    /// The bytes of half a frame are kept for the next connection.
    KeepsHalfAFrame,
    /// A greeting says one frame more than has come.
    GreetsWithOneMore,
    /// A greeting that was under way for too long is taken for a new one.
    TakesOldGreetings,
    /// The destination's memory changes after it was told.
    HoldsWhatIsOutdated,
    /// The same, and a check that fails is passed over.
    IgnoresChecks,
    /// What the destination held in a block that QEMU itself writes to is taken to be there for ever.
    CopiesFromWhatQemuWrites,
    /// Device state does not wait for the pages before it.
    LetsTheStreamOvertakePages,
    /// More is read from QEMU than the window allows.
    ReadsWithoutRoom,
    /// The source's QEMU hears that all was loaded as soon as all has arrived.
    MakesUpTheLastWord,
    /// The destination runs what it has loaded, released or not.
    RunsWithoutRelease,
}

/// What became of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ran {
    /// How many events there were.
    pub events: u64,
    /// Microseconds of simulated time.
    pub simulated: u64,
    /// Whether the VM runs at the destination.
    pub moved: bool,
    /// What happened in it.
    pub seen: Seen,
}

/// How often something happened: what never does is not tested.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Faults that struck.
    pub faults: u64,
    /// Connections on which both sides greeted.
    pub connections: u64,
    /// Frames that the source had kept for one of them.
    pub kept: u64,
    /// Greetings that were out of date.
    pub old_greetings: u64,
    /// The window was full.
    pub full: u64,
    /// Pages by the way in which they went, and those in QEMU's own stream.
    pub pages: Encoding,
    /// See there.
    pub streamed: u64,
}

impl std::ops::AddAssign for Seen {
    fn add_assign(&mut self, other: Self) {
        let Self { faults, connections, kept, old_greetings, full, pages, streamed } = other;
        self.faults += faults;
        self.connections += connections;
        self.kept += kept;
        self.old_greetings += old_greetings;
        self.full += full;
        self.streamed += streamed;
        let Encoding { same, zero, copy, image, common, patch, data } = pages;
        self.pages.same += same;
        self.pages.zero += zero;
        self.pages.copy += copy;
        self.pages.image += image;
        self.pages.common += common;
        self.pages.patch += patch;
        self.pages.data += data;
    }
}

/// Runs the move of this seed.
///
/// # Errors
/// The rule that was broken first.
pub fn run(seed: u64, wrong: Wrong) -> Result<Ran, Broken> {
    world::World::new(seed, wrong).run()
}
