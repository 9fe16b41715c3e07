//! All that is settled before a run begins: the VM, the hosts, the link, and what goes wrong when. Drawn from the seed.

use godwit_carrier::Side;
use godwit_carrier::pages::EncoderLimits;
use godwit_model::{MigrationPolicy, Millis};

use super::random::Random;

/// Microseconds since the run began.
pub(super) type Micros = u64;

pub(super) const MILLISECOND: Micros = 1_000;
pub(super) const SECOND: Micros = 1_000_000;

/// Both, as they are drawn.
pub(super) const SIDES: [Side; 2] = [Side::Source, Side::Destination];

/// A process that can be killed or stand still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Party {
    /// Is never killed.
    Agent(Side),
    Carry(Side),
    Qemu(Side),
}

/// A moment that faults aim at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// The first page was read from the source's QEMU.
    Warming,
    /// The VM was stopped by us.
    Stopped,
    /// The source's QEMU writes device state.
    Device,
    /// The destination's QEMU has loaded all of it.
    Loaded,
    /// The source has recorded its release.
    Released,
    /// The destination has recorded that it owns the VM.
    Activated,
}

/// When a fault strikes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Trigger {
    /// At the event of this number.
    Event(u64),
    /// So long after a mark.
    After(Mark, Micros),
}

/// What goes wrong.
#[derive(Clone, Copy, Debug)]
pub(super) enum Harm {
    /// The connection breaks and what is under way is lost; each side notices by itself, or does not.
    Cut,
    /// What this side sends arrives no more, and nobody is told.
    Silent(Side),
    /// Nothing goes through the link for so long, and nothing is lost.
    Down(Micros),
    /// The link takes so many bytes per second, for so long.
    Slow(u64, Micros),
    /// The connection breaks, and the greeting of the next arrives that much too late.
    LateGreeting(Micros),
    /// A process stands still.
    Freeze(Party, Micros),
    /// A process is killed.
    Kill(Party),
    /// The agents cannot talk through the controller.
    NoController(Micros),
    /// The user wants the move cancelled.
    Cancel,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    pub(super) trigger: Trigger,
    pub(super) harm: Harm,
}

/// A block of guest memory.
#[derive(Clone, Debug)]
pub(super) struct BlockPlan {
    pub(super) name: &'static str,
    pub(super) pages: u32,
    /// The destination's carry writes to it itself.
    pub(super) placed: bool,
    /// But it takes it for longer than it is: then the source sends its pages in QEMU's stream.
    pub(super) mistaken: bool,
}

impl BlockPlan {
    fn draw(name: &'static str, pages: u64, placed: bool, random: &mut Random) -> Self {
        Self { name, pages: pages as u32, placed, mistaken: random.one_in(12) }
    }

    /// Pages as the destination's carry counts them.
    pub(super) const fn told(&self) -> u32 {
        self.pages + self.mistaken as u32
    }

    /// Whether its pages are written by the destination's carry.
    pub(super) const fn goes_past_qemu(&self) -> bool {
        self.placed && !self.mistaken
    }
}

/// How the guest writes.
#[derive(Clone, Copy, Debug)]
pub(super) struct GuestPlan {
    pub(super) every: Micros,
    pub(super) writes: u64,
    /// Pages that it writes to mostly.
    pub(super) hot: u64,
    /// So many writes in all: then it is quiet, so that every move can converge.
    pub(super) budget: u64,
}

#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) blocks: Vec<BlockPlan>,
    /// Of 100 pages so many are zero in the beginning.
    pub(super) zero: u64,
    /// Of 100 pages of the destination so many hold something already.
    pub(super) held: u64,
    pub(super) guest: GuestPlan,
    pub(super) limits: EncoderLimits,
    /// Bytes per second.
    pub(super) rate: u64,
    /// One way.
    pub(super) latency: Micros,
    /// Most bytes that arrive at once.
    pub(super) chunk: u64,
    /// Of each socket.
    pub(super) buffer: usize,
    /// What waits at a carry before it reads no more.
    pub(super) most_queued: usize,
    pub(super) policy: MigrationPolicy,
    /// QEMU from 8.1 on, which does not switch over by itself while the VM runs.
    pub(super) held_back: bool,
    pub(super) faults: Vec<Fault>,
}

impl Plan {
    pub(super) fn draw(random: &mut Random) -> Self {
        let ram = if random.one_in(4) { random.between(300, 1_500) } else { random.between(60, 260) };
        let kinds = [("pc.ram", ram, !random.one_in(10)), ("vga.vram", random.between(4, 40), !random.one_in(3))];
        let tables = ("/rom@etc/acpi/tables", random.between(1, 8), random.one_in(2));
        let mut blocks: Vec<BlockPlan> =
            kinds.into_iter().chain([tables]).map(|(name, pages, placed)| BlockPlan::draw(name, pages, placed, random)).collect();
        let rate = random.pick(&[2 << 20, 10 << 20, 40 << 20, 120 << 20]);
        let latency = random.pick(&[50, 500, 5_000, 40_000]);
        // What a guest that is quiet costs in any case, and a bit more.
        let least = 120 + 5 * latency / MILLISECOND;
        let turn = random.index(3);
        blocks.rotate_left(turn);
        Self {
            blocks,
            zero: random.pick(&[0, 20, 60, 95]),
            held: random.pick(&[0, 0, 30, 80, 100]),
            guest: GuestPlan {
                every: random.between(500, 40_000),
                writes: random.between(1, 12),
                hot: random.between(1, 150),
                budget: random.pick(&[0, 50, 300, 1_500]),
            },
            limits: EncoderLimits {
                signatures: random.pick(&[0, 520 * 5, 520 * 40, 64 << 20, 64 << 20, 64 << 20]),
                contents: random.pick(&[0, 40 * 10, 40 * 60, 64 << 20]),
            },
            rate,
            latency,
            chunk: random.pick(&[100, 1_500, 9_000, 64 << 10]),
            buffer: random.pick(&[16 << 10, 64 << 10, 208 << 10]),
            most_queued: random.pick(&[64 << 10, 1 << 20, 64 << 20]),
            policy: MigrationPolicy {
                max_blackout: Millis(least + random.pick(&[10, 100, 2_000])),
                bandwidth: None,
                timeout: Millis(120_000),
                stall: Millis(30_000),
                stop_limit: Millis(10_000),
                ..MigrationPolicy::default()
            },
            held_back: random.one_in(2),
            faults: Self::faults(random),
        }
    }

    /// Two in five runs have faults of the link only, so that a session must outlive them.
    fn faults(random: &mut Random) -> Vec<Fault> {
        let (count, link_only) = (random.pick(&[0, 1, 1, 2, 2, 3, 5]), random.below(5) < 2);
        (0..count).map(|_| Fault { trigger: Self::trigger(random), harm: Self::harm(random, link_only) }).collect()
    }

    fn trigger(random: &mut Random) -> Trigger {
        if random.one_in(2) {
            // As often in the first hundred events as in the next thousand, and so on.
            let most = random.pick(&[100, 600, 2_000, 6_000]);
            return Trigger::Event(random.below(most));
        }
        let mark =
            random.pick(&[Mark::Warming, Mark::Stopped, Mark::Device, Mark::Device, Mark::Loaded, Mark::Released, Mark::Activated]);
        let most = random.pick(&[1, 1_000, 20_000, 300_000]);
        Trigger::After(mark, random.below(most))
    }

    fn harm(random: &mut Random, link_only: bool) -> Harm {
        let side = random.pick(&SIDES);
        let party = if random.one_in(2) { Party::Carry(side) } else { Party::Qemu(side) };
        let frozen = if random.one_in(4) { Party::Agent(side) } else { party };
        match random.below(if link_only { 14 } else { 24 }) {
            0..=4 => Harm::Cut,
            5..=7 => Harm::Silent(side),
            8 => Harm::Down(random.between(10, 9_000) * MILLISECOND),
            9..=10 => Harm::Slow(random.between(100, 600) << 10, random.between(100, 4_000) * MILLISECOND),
            11..=13 => Harm::LateGreeting(random.between(3_000, 9_000) * MILLISECOND),
            14..=17 => Harm::Freeze(frozen, random.between(50, 14_000) * MILLISECOND),
            18..=21 => Harm::Kill(party),
            22 => Harm::NoController(random.between(1, 20) * SECOND),
            _ => Harm::Cancel,
        }
    }
}
