//! What a move is expected to cost, before it begins: the passes of a warm-up are counted through, with what earlier moves of the VM have shown.

use godwit_model::{
    Bytes, BytesPerSec, Estimate, MigrationFigures, MigrationForecast, MigrationNeeds, MigrationPolicy, Millis, PastMove, PastMoves,
};

use crate::convergence::FIXED;

/// The hosts connect, the first pass begins; behind the last one the hosts agree that it is over.
const START: f64 = 0.7;
/// A link nobody knows, in bytes per second.
const LINK: f64 = 125e6;
/// Memory per second that two hosts deal with, whatever the link.
const WORK: f64 = 250e6;
/// Bytes on the wire for one of memory, of a guest nobody knows.
const SHARE: Spread = Spread { least: 0.1, middle: 0.45, most: 1.03 };
/// Bytes on the wire for one of a disk that is not empty, of a disk nobody knows.
const DISK_SHARE: Spread = Spread { least: 0.0, middle: 0.9, most: 1.05 };
/// More passes bring nothing.
const PASSES: u32 = 64;
/// A pass that leaves more than this part of what it sent is no progress.
const PROGRESS: f64 = 0.9;
/// Of what a VM takes along where nobody has seen it, a host that has kept its memory gets mostly so much.
const HOME: f64 = 0.1;
/// What disks may take of what their move may, while they are copied.
const OF_DISKS: f64 = 15.0 / 16.0;
/// How far off an expected time may be: of a VM that nobody knows, and of one that has moved once.
const UNKNOWN: (f64, f64) = (0.3, 3.0);
const ONCE: (f64, f64) = (0.6, 1.7);
/// Of a range that was seen, on both sides; and so much more of one that was seen once, half of it of two, a third of three.
const MARGIN: f64 = 0.15;
const FEW: f64 = 0.55;
/// A rate that is needed, or a budget, is named with so much to spare.
const SPARE: f64 = 1.25;

/// What a forecast is made from.
#[derive(Clone, Copy, Debug)]
pub struct Outlook<'a> {
    /// Memory that the guest has ever touched.
    pub memory: Bytes,
    /// What is not empty of its disks that travel.
    pub disks: Bytes,
    /// What it writes to per second.
    pub dirty_rate: BytesPerSec,
    /// Limits of the move.
    pub policy: &'a MigrationPolicy,
    /// Earlier moves of the VM.
    pub past: &'a PastMoves,
}

/// A number that was seen several times.
#[derive(Clone, Copy, Debug)]
struct Spread {
    least: f64,
    middle: f64,
    most: f64,
}

impl Spread {
    /// None of nothing.
    fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        Some(Self { least: *values.first()?, middle: *values.get(values.len() / 2)?, most: *values.last()? })
    }
}

/// What earlier moves have shown.
struct Lessons {
    count: u32,
    /// Bytes on the wire for one of memory.
    share: Spread,
    /// Memory per second; of a VM nobody knows what [`LINK`] and [`WORK`] allow. The most says what the hosts can do, the middle what they mostly did.
    rate: Spread,
    /// The same of one of a disk; and what of that went over per second.
    disk_share: Spread,
    disk_rate: f64,
    /// Seconds.
    blackout: Option<Spread>,
    /// Least and most part of what was expected that it took.
    error: (f64, f64),
}

impl Lessons {
    fn of(past: &PastMoves) -> Self {
        // Of one whose agent was restarted in the middle it is not known how long it took; of one in post-copy not what had to be sent.
        let whole = |past: &&PastMove| {
            let MigrationFigures { ram_bytes, total, blackout, left, .. } = past.figures;
            ram_bytes.get() > 0 && total.get() > 0 && blackout.get() > 0 && left.get() == 0
        };
        let alike = |past: &&PastMove, returns| past.returned == returns;
        // A move to a host that kept the VM's memory is another thing than one that takes all of it along.
        let kinds: [&dyn Fn(&&PastMove) -> bool; 3] =
            [&|move_| alike(move_, past.returns) && move_.same_way, &|move_| alike(move_, past.returns), &|_| true];
        let disk_share = Spread { middle: DISK_SHARE.middle * if past.returns { HOME } else { 1.0 }, ..DISK_SHARE };
        let learned =
            kinds.iter().map(|kind| past.moves.iter().filter(whole).filter(kind).map(|past| past.figures).collect::<Vec<_>>());
        let Some(figures) = learned.into_iter().find(|figures| !figures.is_empty()) else {
            let rate = (LINK / SHARE.middle).min(WORK);
            let rate = Spread { least: rate, middle: rate, most: rate };
            return Self { count: 0, share: SHARE, rate, disk_share, disk_rate: LINK, blackout: None, error: UNKNOWN };
        };
        let known = past.moves.iter().filter(whole).any(|move_| alike(&move_, past.returns));
        let spread = |of: &dyn Fn(&MigrationFigures) -> f64| Spread::of(figures.iter().map(of)).unwrap_or(SHARE);
        let of_memory = |figures: &MigrationFigures| figures.wire_bytes.get().saturating_sub(figures.disk_bytes.get()) as f64;
        let share = spread(&|figures| of_memory(figures) / moved(figures));
        let margin = MARGIN + FEW / figures.len() as f64;
        let share = Spread { least: share.least * (1.0 - margin), most: share.most * (1.0 + margin), ..share };
        let off = figures.iter().filter_map(|figures| {
            let expected = figures.forecast.filter(|forecast| forecast.learned_from > 0)?.total.expected.get();
            Some(figures.total.get() as f64 / expected.max(1) as f64)
        });
        let error = Spread::of(off).filter(|_| known).map_or(ONCE, |off| {
            let (least, most) = (off.least * (1.0 - MARGIN), off.most * (1.0 + MARGIN));
            (least.clamp(0.1, 1.0 - MARGIN), most.clamp(1.0 + MARGIN, 10.0))
        });
        let with_disks = |figures: &&MigrationFigures| figures.disk_bytes.get() > 0 && figures.disk_time.get() > 0;
        let sent = |figures: &MigrationFigures| {
            Some(figures.disk_bytes.get() as f64 / figures.forecast.filter(|forecast| forecast.disks.get() > 0)?.disks.get() as f64)
        };
        let disk_shares = Spread::of(figures.iter().filter(with_disks).filter_map(sent)).filter(|_| known);
        let disk_rates =
            figures.iter().filter(with_disks).map(|figures| figures.disk_bytes.get() as f64 / seconds(figures.disk_time));
        Self {
            disk_share: disk_shares.map_or(disk_share, |seen| Spread {
                least: seen.least * (1.0 - margin),
                most: (seen.most * (1.0 + margin)).max(DISK_SHARE.middle),
                ..seen
            }),
            disk_rate: Spread::of(disk_rates).map_or(LINK, |seen| seen.middle),
            count: u32::try_from(figures.len()).unwrap_or(u32::MAX),
            share: match (known, past.returns) {
                (true, _) => share,
                // All of it, if nothing was kept.
                (false, true) => Spread { least: 0.0, middle: share.middle * HOME, ..share },
                (false, false) => Spread { middle: share.middle.max(SHARE.middle), most: share.most.max(SHARE.most), ..share },
            },
            rate: spread(&|figures| moved(figures) / moving_time(figures)),
            blackout: Some(spread(&|figures| seconds(figures.blackout))),
            error,
        }
    }
}

/// Memory that a move sent: all that was touched then, as it is counted now, and what was written meanwhile; of older records what QEMU wrote.
fn moved(figures: &MigrationFigures) -> f64 {
    let written = |forecast: MigrationForecast| forecast.dirty_rate.get() as f64 * moving_time(figures);
    let sent = figures.forecast.map_or(figures.ram_bytes.get() as f64, |forecast| forecast.memory.get() as f64 + written(forecast));
    sent.max(1.0)
}

/// Seconds in which memory went over.
fn moving_time(figures: &MigrationFigures) -> f64 {
    (seconds(figures.total) - seconds(figures.disk_time) - seconds(figures.blackout) - START).max(0.1)
}

fn seconds(time: Millis) -> f64 {
    time.get() as f64 / 1_000.0
}

fn millis(seconds: f64) -> Millis {
    Millis((seconds * 1_000.0).round() as u64)
}

/// How the warm-up goes.
struct WarmUpCourse {
    seconds: f64,
    sent: f64,
    /// Of the VM when it is stopped, or of the best moment there is.
    blackout: f64,
    fits: bool,
}

/// Counts the passes through: each takes its time, in which the guest writes to more.
fn warm_up(memory: f64, dirty_rate: f64, rate: f64, budget: f64) -> WarmUpCourse {
    let mut course = WarmUpCourse { seconds: 0.0, sent: 0.0, blackout: f64::MAX, fits: false };
    let mut left = memory;
    for _ in 0..PASSES {
        course.seconds += left / rate;
        course.sent += left;
        // It can write to no more than it has.
        let dirtied = (dirty_rate * left / rate).min(memory);
        course.blackout = course.blackout.min(seconds(FIXED) + dirtied / rate);
        course.fits = course.blackout <= budget;
        if course.fits || dirtied > left * PROGRESS {
            break;
        }
        left = dirtied;
    }
    course
}

/// What the move is expected to cost.
#[must_use]
pub fn forecast(outlook: &Outlook<'_>) -> MigrationForecast {
    let lessons = Lessons::of(outlook.past);
    let limit = outlook.policy.bandwidth.map_or(f64::MAX, |limit| limit.get() as f64 / lessons.share.middle.max(1e-6));
    let (rate, best) = (lessons.rate.middle.min(limit).max(1.0), lessons.rate.most.min(limit).max(1.0));
    let (memory, dirty_rate) = (outlook.memory.get() as f64, outlook.dirty_rate.get() as f64);
    let budget = seconds(outlook.policy.max_blackout);
    let course = WarmUpCourse { fits: warm_up(memory, dirty_rate, best, budget).fits, ..warm_up(memory, dirty_rate, rate, budget) };
    // Within its budget a blackout is what it was before, rather than what would be allowed.
    let blackout = lessons
        .blackout
        .filter(|_| course.fits)
        .map_or(Spread { least: seconds(FIXED) / 4.0, middle: course.blackout, most: course.blackout.max(budget) }, |before| {
            Spread { least: before.least * (1.0 - MARGIN), middle: before.middle.min(budget), most: budget }
        });
    let disks = outlook.disks.get() as f64;
    let disk_limit = outlook.policy.bandwidth.map_or(f64::MAX, |limit| limit.get() as f64 * OF_DISKS);
    let disk_time = disks * lessons.disk_share.middle / lessons.disk_rate.min(disk_limit).max(1.0);
    let total = START + disk_time + course.seconds + blackout.middle;
    let wire = |share: f64, disk_share: f64| Bytes((course.sent * share + disks * disk_share) as u64);
    MigrationForecast {
        memory: outlook.memory,
        disks: outlook.disks,
        dirty_rate: outlook.dirty_rate,
        rate: BytesPerSec(rate as u64),
        total: Estimate { least: millis(total * lessons.error.0), expected: millis(total), most: millis(total * lessons.error.1) },
        blackout: Estimate {
            least: millis(blackout.least.min(blackout.middle)),
            expected: millis(blackout.middle),
            most: millis(blackout.most),
        },
        wire_bytes: Estimate {
            least: wire(lessons.share.least, lessons.disk_share.least),
            expected: wire(lessons.share.middle, lessons.disk_share.middle),
            most: wire(lessons.share.most, lessons.disk_share.most),
        },
        needs: (!course.fits).then(|| MigrationNeeds {
            max_blackout: millis((course.blackout * SPARE * 100.0).ceil() / 100.0),
            bandwidth: needed_rate(memory, dirty_rate, budget)
                .map(|rate| rate * SPARE)
                // The hosts themselves do not get on any faster.
                .filter(|rate| *rate <= lessons.rate.most.max(WORK))
                .map(|rate| BytesPerSec((rate * lessons.share.middle) as u64)),
        }),
        learned_from: lessons.count,
    }
}

/// Memory per second at which a budget can be kept; none if it cannot at any.
fn needed_rate(memory: f64, dirty_rate: f64, budget: f64) -> Option<f64> {
    (budget > seconds(FIXED)).then(|| {
        let keeps = |rate: &f64| warm_up(memory, dirty_rate, *rate, budget).fits;
        // From a tenth of what it writes to on, by a quarter each.
        std::iter::successors(Some(dirty_rate.max(1.0) / 10.0), |rate| Some(rate * SPARE)).find(keeps)
    })?
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MB: u64 = 1_000_000;

    fn figures(total: u64, ram: u64, wire: u64, blackout: u64) -> MigrationFigures {
        MigrationFigures {
            total: Millis(total),
            blackout: Millis(blackout),
            wire_bytes: Bytes(wire * MB),
            ram_bytes: Bytes(ram * MB),
            ..MigrationFigures::default()
        }
    }

    fn of(memory: u64, dirty: u64, policy: &MigrationPolicy, past: &[PastMove]) -> MigrationForecast {
        returning(false, memory, dirty, policy, past)
    }

    fn returning(returns: bool, memory: u64, dirty: u64, policy: &MigrationPolicy, past: &[PastMove]) -> MigrationForecast {
        let past = PastMoves { returns, moves: past.to_vec() };
        forecast(&Outlook { memory: Bytes(memory * MB), disks: Bytes(0), dirty_rate: BytesPerSec(dirty * MB), policy, past: &past })
    }

    #[test]
    fn a_vm_that_nobody_knows_gets_a_wide_range() {
        let quiet = of(1_000, 1, &MigrationPolicy::default(), &[]);
        assert_eq!((quiet.learned_from, quiet.needs), (0, None));
        let (least, most) = (quiet.total.least.get(), quiet.total.most.get());
        assert!((1_000..2_000).contains(&least) && (10_000..20_000).contains(&most), "{quiet:?}");
        assert_eq!(quiet.blackout.most, Millis(300), "the budget is a limit");
        assert!(quiet.wire_bytes.least < Bytes(200 * MB) && quiet.wire_bytes.most > Bytes(1_000 * MB));
    }

    #[test]
    fn a_vm_that_has_moved_is_expected_to_move_as_before_out_as_out_and_home_as_home() {
        let policy = MigrationPolicy::default();
        let out = PastMove { same_way: true, returned: false, figures: figures(5_750, 500, 200, 50) };
        let home = PastMove { same_way: false, returned: true, figures: figures(2_750, 500, 10, 60) };
        let told = of(500, 1, &policy, &[home, out]);
        assert_eq!(told.learned_from, 1);
        assert!((5_700..5_900).contains(&told.total.expected.get()), "{told:?}");
        assert!((195 * MB..205 * MB).contains(&told.wire_bytes.expected.get()), "{told:?}");
        assert_eq!(told.blackout.expected, Millis(50));
        assert!(returning(true, 500, 1, &policy, &[home, out]).wire_bytes.expected < Bytes(20 * MB));
        let first_way_home = returning(true, 500, 1, &policy, &[out]);
        assert_eq!((first_way_home.learned_from, first_way_home.wire_bytes.least), (1, Bytes(0)));
        assert!(
            first_way_home.wire_bytes.expected < Bytes(25 * MB) && first_way_home.wire_bytes.most > Bytes(200 * MB),
            "{first_way_home:?}"
        );
        let first_way_out = of(500, 1, &policy, &[home]).wire_bytes;
        assert!(first_way_out.expected > Bytes(200 * MB) && first_way_out.most > Bytes(500 * MB), "{first_way_out:?}");
        // What was off before is the range of the next.
        let mut known = out;
        let total = Estimate { expected: Millis(5_000), ..Estimate::default() };
        known.figures.forecast = Some(MigrationForecast { total, learned_from: 1, ..told });
        let told = of(500, 1, &policy, &[known]);
        let part = |time: Millis| time.get() * 1_000 / told.total.expected.get();
        assert_eq!((part(told.total.least) / 2 * 2, part(told.total.most) / 2 * 2), (850, 1_322));
    }

    #[test]
    fn disks_take_their_time_and_mostly_less_on_the_way_home() {
        let policy = MigrationPolicy::default();
        let with = |returns, disks: u64, policy: &MigrationPolicy, moves: &[PastMove]| {
            let past = PastMoves { returns, moves: moves.to_vec() };
            let (memory, dirty_rate) = (Bytes(500 * MB), BytesPerSec(MB));
            forecast(&Outlook { memory, disks: Bytes(disks * MB), dirty_rate, policy, past: &past })
        };
        let (without, unknown) = (with(false, 0, &policy, &[]), with(false, 10_000, &policy, &[]));
        assert_eq!(unknown.total.expected.get() - without.total.expected.get(), 72_000, "9 GB at 1 Gbit/s");
        assert!(unknown.wire_bytes.most > Bytes(10_000 * MB) && unknown.blackout == without.blackout);
        let limited = MigrationPolicy { bandwidth: Some(BytesPerSec(16 * MB)), ..policy };
        assert!(with(false, 10_000, &limited, &[]).total.expected.get() > 600_000, "9 GB at 15 MB/s");
        assert!(with(true, 10_000, &policy, &[]).wire_bytes.expected < Bytes(2_000 * MB), "home");
        // 5,000 MB of 10,000 in 50 s.
        let mut out = PastMove { same_way: true, returned: false, figures: figures(55_750, 500, 5_200, 50) };
        (out.figures.disk_bytes, out.figures.disk_time) = (Bytes(5_000 * MB), Millis(50_000));
        out.figures.forecast =
            Some(MigrationForecast { memory: Bytes(500 * MB), disks: Bytes(10_000 * MB), ..MigrationForecast::default() });
        let told = with(false, 10_000, &policy, &[out]);
        assert!((55_500..56_000).contains(&told.total.expected.get()), "{told:?}");
        assert!((5_190 * MB..5_210 * MB).contains(&told.wire_bytes.expected.get()), "{told:?}");
    }

    #[test]
    fn what_a_guest_wrote_while_it_moved_is_not_counted_twice() {
        let policy = MigrationPolicy::default();
        // 600 MB and what a guest that writes 120 MB/s wrote in 4 s: 1,080 MB in 4 s.
        let mut busy = PastMove { same_way: true, returned: false, figures: figures(4_950, 1_080, 216, 250) };
        busy.figures.forecast =
            Some(MigrationForecast { memory: Bytes(600 * MB), dirty_rate: BytesPerSec(120 * MB), ..MigrationForecast::default() });
        let told = of(600, 120, &policy, &[busy]);
        assert!((4_000..6_000).contains(&told.total.expected.get()) && told.needs.is_none(), "{told:?}");
        assert!((180 * MB..260 * MB).contains(&told.wire_bytes.expected.get()), "{told:?}");
    }

    #[test]
    fn a_guest_that_writes_too_much_is_told_what_it_needs_and_has_enough_with_it() {
        let policy = MigrationPolicy::default();
        let hot = of(1_000, 400, &policy, &[]);
        let needs = hot.needs.expect("it cannot be stopped within 300 ms");
        let allowed = MigrationPolicy { max_blackout: needs.max_blackout, ..policy };
        assert_eq!(of(1_000, 400, &allowed, &[]).needs, None);
        assert_eq!(needs.bandwidth, None, "no link makes hosts faster that are believed to move 250 MB/s");
        let fast = PastMove { same_way: true, returned: false, figures: figures(10_750, 10_000, 4_500, 50) };
        assert!(of(1_000, 400, &policy, &[fast]).needs.is_none(), "such hosts have moved 1 GB/s");
        let limited = MigrationPolicy { bandwidth: Some(BytesPerSec(5 * MB)), ..policy };
        let wire = of(1_000, 20, &limited, &[fast]).needs.expect("5 MB/s are too little").bandwidth.expect("more does it");
        assert!(of(1_000, 20, &MigrationPolicy { bandwidth: Some(wire), ..policy }, &[fast]).needs.is_none(), "{wire}");
        let impossible = MigrationPolicy { max_blackout: Millis(20), ..policy };
        assert_eq!(of(1_000, 1, &impossible, &[]).needs.expect("less than a switch takes").bandwidth, None);
    }

    proptest! {
        #[test]
        fn prop_whatever_is_measured_the_estimates_are_in_order(
            memory in any::<u64>(), dirty in any::<u64>(), blackout in any::<u64>(), bandwidth in prop::option::of(any::<u64>()),
            returns in any::<bool>(), disks in any::<u64>(), past in prop::collection::vec((any::<[bool; 2]>(), any::<[u64; 6]>()), 0..4),
        ) {
            let moves = past
                .into_iter()
                .map(|([same_way, returned], [total, ram, wire, blackout, disk_bytes, disk_time])| PastMove {
                    same_way,
                    returned,
                    figures: MigrationFigures {
                        total: Millis(total), ram_bytes: Bytes(ram), wire_bytes: Bytes(wire), blackout: Millis(blackout),
                        disk_bytes: Bytes(disk_bytes), disk_time: Millis(disk_time),
                        forecast: Some(MigrationForecast { memory: Bytes(ram), disks: Bytes(wire), ..MigrationForecast::default() }),
                        ..MigrationFigures::default()
                    },
                })
                .collect();
            let policy = MigrationPolicy { max_blackout: Millis(blackout), bandwidth: bandwidth.map(BytesPerSec), ..MigrationPolicy::default() };
            let past = PastMoves { returns, moves };
            let told = forecast(&Outlook { memory: Bytes(memory), disks: Bytes(disks), dirty_rate: BytesPerSec(dirty), policy: &policy, past: &past });
            prop_assert!(told.total.least <= told.total.expected && told.total.expected <= told.total.most, "{told:?}");
            prop_assert!(told.blackout.least <= told.blackout.expected && told.blackout.expected <= told.blackout.most, "{told:?}");
            prop_assert!(told.wire_bytes.least <= told.wire_bytes.expected && told.wire_bytes.expected <= told.wire_bytes.most, "{told:?}");
        }
    }
}
