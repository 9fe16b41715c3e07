//! When to stop the VM: the predicted blackout against the budget.

use godwit_model::{Bytes, BytesPerSec, Millis};

use crate::view::{CarryView, QemuView};

/// Device state, loading it, the journals and the resume: 60 to 100 ms with QEMU 7.2 and 10.0 under TCG on two busy cores.
pub(crate) const FIXED: Millis = Millis(100);

/// So many passes more, behind the next, are worth waiting for.
const PASSES: i32 = 3;
/// A blackout that is longer by so much is worth a moment.
const WORTH: Millis = Millis(15);

/// What a prediction is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WarmUp {
    /// RAM still to send in this pass.
    pub remaining: Bytes,
    /// What the guest dirties per second.
    pub dirty_rate: BytesPerSec,
    /// Time since QEMU last collected dirty pages: what was dirtied since is not in `remaining`.
    pub since_sync: Millis,
    /// What of it reaches the destination per second.
    pub rate: BytesPerSec,
    /// How long what is under way takes to arrive.
    pub queued: Millis,
    /// Round trip.
    pub round_trip: Millis,
}

impl WarmUp {
    /// Puts together what QEMU and carry say; `None` while one of the rates is not known.
    #[must_use]
    pub fn of(qemu: &QemuView, carry: &CarryView) -> Option<Self> {
        let dirty_rate = qemu.dirty_rate?;
        let known = carry.rate.get() > 0;
        known.then_some(Self {
            remaining: qemu.remaining,
            dirty_rate,
            since_sync: qemu.since_sync,
            rate: carry.rate,
            queued: carry.queued,
            round_trip: carry.round_trip,
        })
    }
}

/// Blackout if the VM were stopped now: the rest of this pass and what was dirtied since the last collection, at the present rate, plus
/// what is under way, two round trips and a fixed part.
#[must_use]
pub fn predict_blackout(warm_up: &WarmUp) -> Millis {
    let dirtied = u128::from(warm_up.dirty_rate.get()) * u128::from(warm_up.since_sync.get()) / 1_000;
    let bytes = u128::from(warm_up.remaining.get()).saturating_add(dirtied);
    let copy = bytes.saturating_mul(1_000) / u128::from(warm_up.rate.get().max(1));
    let copy = u64::try_from(copy).unwrap_or(u64::MAX);
    let round_trips = warm_up.round_trip.get().saturating_mul(2);
    Millis(copy.saturating_add(warm_up.queued.get()).saturating_add(FIXED.get()).saturating_add(round_trips))
}

/// What every stop costs, however little is left to send.
#[must_use]
pub(crate) fn least_blackout(warm_up: &WarmUp) -> Millis {
    predict_blackout(&WarmUp { remaining: Bytes(0), since_sync: Millis(0), queued: Millis(0), ..*warm_up })
}

/// Whether some more passes will bring the blackout within the budget, if the guest goes on as it does. Each pass leaves what was dirtied while the one before
/// it was sent.
#[must_use]
pub(crate) fn converges(warm_up: &WarmUp, budget: Millis) -> bool {
    let Some(copying) = budget.get().checked_sub(least_blackout(warm_up).get()) else { return false };
    let (dirty, rate) = (warm_up.dirty_rate.get() as f64, warm_up.rate.get().max(1) as f64);
    let pass = warm_up.since_sync.get() as f64 / 1e3 + warm_up.remaining.get() as f64 / rate;
    dirty * pass * (dirty / rate).powi(PASSES) <= rate * copying as f64 / 1e3
}

/// Whether the rest of this pass, and what is under way, is worth waiting for: the guest dirties so much less than is moved that the blackout is
/// then at most half as long, apart from what every switch costs.
#[must_use]
pub(crate) fn shrinks_soon(warm_up: &WarmUp) -> bool {
    let blackout = predict_blackout(warm_up);
    let least = least_blackout(warm_up);
    let pass = blackout.get().saturating_sub(least.get());
    // A pass later this much is to be sent again.
    let since_sync = Millis(warm_up.since_sync.get().saturating_add(pass));
    let next = WarmUp { remaining: Bytes(0), since_sync, queued: Millis(0), ..*warm_up };
    pass > WORTH.get() && predict_blackout(&next).get().saturating_sub(least.get()) <= pass / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_is_worth_waiting_for_when_little_comes_after_it() {
        let warm_up = WarmUp {
            remaining: Bytes(20_000_000),
            dirty_rate: BytesPerSec(5_000_000),
            since_sync: Millis(100),
            rate: BytesPerSec(200_000_000),
            queued: Millis(10),
            round_trip: Millis(1),
        };
        assert!(shrinks_soon(&warm_up), "100 ms now, 10 ms a pass later");
        assert!(!shrinks_soon(&WarmUp { remaining: Bytes(500_000), ..warm_up }), "not for so little");
        assert!(shrinks_soon(&WarmUp { remaining: Bytes(500_000), queued: Millis(40), ..warm_up }), "what is under way, too");
        assert!(!shrinks_soon(&WarmUp { dirty_rate: BytesPerSec(80_000_000), ..warm_up }), "a hot guest: now or never");
        assert!(!shrinks_soon(&WarmUp { since_sync: Millis(8_000), ..warm_up }), "as much is dirty already");
    }

    #[test]
    fn what_was_dirtied_since_the_last_collection_counts() {
        let quiet = WarmUp {
            remaining: Bytes(10_000_000),
            dirty_rate: BytesPerSec(0),
            since_sync: Millis(1_000),
            rate: BytesPerSec(100_000_000),
            queued: Millis(0),
            round_trip: Millis(0),
        };
        assert_eq!(predict_blackout(&quiet), Millis(200));
        let busy = WarmUp { dirty_rate: BytesPerSec(50_000_000), ..quiet };
        assert_eq!(predict_blackout(&busy), Millis(700));
        let far = WarmUp { round_trip: Millis(40), ..quiet };
        assert_eq!(predict_blackout(&far), Millis(280));
        let full = WarmUp { queued: Millis(50), ..quiet };
        assert_eq!(predict_blackout(&full), Millis(250));
    }

    #[test]
    fn a_guest_converges_if_a_few_passes_more_do() {
        let warm_up = |dirty: u64, remaining: u64| WarmUp {
            remaining: Bytes(remaining * 1_000_000),
            dirty_rate: BytesPerSec(dirty * 1_000_000),
            since_sync: Millis(0),
            rate: BytesPerSec(120_000_000),
            queued: Millis(0),
            round_trip: Millis(0),
        };
        let budget = Millis(300);
        for (dirty, remaining, converges_) in [
            (10, 1_000, true),
            (50, 256, true),
            // Four passes leave 49 MB of it, and 24 fit.
            (80, 256, false),
            (90, 40, true),
            (130, 256, false),
        ] {
            assert_eq!(converges(&warm_up(dirty, remaining), budget), converges_, "{dirty} MB/s, {remaining} MB");
        }
        assert!(!converges(&warm_up(0, 0), Millis(90)), "what every stop costs is more");
        assert!(converges(&warm_up(0, 0), Millis(110)));
    }

    #[test]
    fn nothing_overflows() {
        let worst = WarmUp {
            remaining: Bytes(u64::MAX),
            dirty_rate: BytesPerSec(u64::MAX),
            since_sync: Millis(u64::MAX),
            rate: BytesPerSec(0),
            queued: Millis(u64::MAX),
            round_trip: Millis(0),
        };
        assert_eq!(predict_blackout(&worst), Millis(u64::MAX));
        assert!(!converges(&worst, Millis(300)));
    }
}
