//! What the migrations that leave this host may take of the wire together. The controller says how much, and may say something else at any time; each
//! move asks for its share as often as it looks at QEMU. Shares are max-min fair: a move that does not use its share leaves it to those that do.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use godwit_model::{BytesPerSec, VmId};

/// How long a use is measured.
const SPAN: Duration = Duration::from_millis(500);
/// A move that uses less than this part of its share, in percent, could not use more.
const USED: u64 = 75;
/// What a move may take always, so that it can show what it could use.
const LEAST: u64 = 256 << 10;

/// The budget of this host.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// None until the controller has said so.
    told: Option<Limit>,
    /// Of each VM's lanes.
    moves: BTreeMap<(VmId, u16), Move>,
}

/// What all moves may take; none is no limit.
type Limit = Option<BytesPerSec>;

#[derive(Debug)]
struct Move {
    /// By its own policy.
    own: Option<BytesPerSec>,
    /// Bytes on the wire, when they were last looked at.
    sent: (Instant, u64),
    /// Per second, over the last span; and the least share that it had then.
    used: Option<(u64, u64)>,
    least: u64,
    share: u64,
}

impl Budget {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The controller says what all moves may take.
    pub(crate) fn set(&self, limit: Limit) {
        self.lock().told = Some(limit);
    }

    /// What all moves may take together, as far as the controller has said it.
    pub(crate) fn limit(&self) -> Limit {
        self.lock().told.flatten()
    }

    /// The limit for a lane of the move of `vm`, which has sent so many bytes by `now` and may take `own` by its policy. `None` as long as the controller has not
    /// said anything: what was said to a carry before still counts.
    pub(crate) fn share(&self, lane: (VmId, u16), own: Option<BytesPerSec>, sent: u64, now: Instant) -> Option<Limit> {
        let mut inner = self.lock();
        let Inner { told, moves } = &mut *inner;
        let this = moves.entry(lane).or_insert(Move { own, sent: (now, sent), used: None, least: u64::MAX, share: u64::MAX });
        this.own = own;
        let time = now.saturating_duration_since(this.sent.0);
        if time >= SPAN {
            let bytes = sent.saturating_sub(this.sent.1);
            this.used = Some(((bytes as f64 / time.as_secs_f64()) as u64, this.least));
            this.least = this.share;
            this.sent = (now, sent);
        }
        let Some(limit) = (*told)? else { return Some(own) };
        let wants: Vec<u64> = moves.values().map(Move::wants).collect();
        for (each, share) in moves.values_mut().zip(shares(limit.get(), &wants)) {
            each.share = share.min(each.own.map_or(u64::MAX, BytesPerSec::get));
            each.least = each.least.min(each.share);
        }
        moves.get(&lane).map(|this| Some(BytesPerSec(this.share.max(1))))
    }

    /// The move of `vm` is over.
    pub(crate) fn leave(&self, vm: VmId) {
        self.lock().moves.retain(|(other, _), _| *other != vm);
    }
}

impl Move {
    /// The most that it could use, as far as is known.
    fn wants(&self) -> u64 {
        let own = self.own.map_or(u64::MAX, BytesPerSec::get);
        match self.used {
            // Half as much again as it uses: it keeps that until it uses more of it, and then may have any.
            Some((used, share)) if u128::from(used) * 100 < u128::from(share) * u128::from(USED) => {
                (used + used / 2).max(LEAST).min(own)
            }
            _ => own,
        }
    }
}

/// Divides `limit`: nobody gets more than is wanted while another wants more than it gets; what nobody wants is divided evenly.
fn shares(limit: u64, wants: &[u64]) -> Vec<u64> {
    let mut shares = vec![0; wants.len()];
    let mut order: Vec<usize> = (0..wants.len()).collect();
    order.sort_by_key(|index| wants.get(*index));
    let mut left = limit;
    for (position, index) in order.iter().enumerate() {
        let others = (wants.len() - position) as u64;
        let (Some(share), Some(want)) = (shares.get_mut(*index), wants.get(*index)) else { continue };
        *share = (left / others).min(*want);
        left -= *share;
    }
    let each = left / (wants.len() as u64).max(1);
    shares.iter_mut().for_each(|share| *share += each);
    shares
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn vm(number: u128) -> VmId {
        VmId::new(uuid::Uuid::from_u128(number))
    }

    #[test]
    fn nothing_is_said_before_the_controller_has_spoken_and_no_limit_leaves_the_policys() {
        let (budget, now) = (Budget::default(), Instant::now());
        assert_eq!(budget.share((vm(1), 0), Some(BytesPerSec(5)), 0, now), None);
        budget.set(None);
        assert_eq!(budget.share((vm(1), 0), Some(BytesPerSec(5)), 0, now), Some(Some(BytesPerSec(5))));
        assert_eq!(budget.share((vm(2), 0), None, 0, now), Some(None));
    }

    #[test]
    fn moves_share_and_what_one_cannot_use_or_leaves_the_others_get() {
        const MB: u64 = 1_000_000;
        let (budget, start) = (Budget::default(), Instant::now());
        budget.set(Some(BytesPerSec(100 * MB)));
        assert_eq!(budget.limit(), Some(BytesPerSec(100 * MB)));
        let share = |number, own: Option<u64>, sent, seconds| {
            let now = start + Duration::from_secs(seconds);
            budget.share((vm(number), 0), own.map(BytesPerSec), sent, now).flatten().map_or(0, BytesPerSec::get)
        };
        assert_eq!(share(1, None, 0, 0), 100 * MB);
        assert_eq!((share(2, None, 0, 0), share(1, None, 0, 0)), (50 * MB, 50 * MB));
        // The first has a slow link, the second uses what it gets.
        assert_eq!(share(1, None, 6 * MB, 1), 9 * MB);
        assert_eq!(share(2, None, 50 * MB, 1), 91 * MB);
        assert_eq!(share(1, None, 12 * MB, 2), 9 * MB);
        // A policy of its own keeps one below its share.
        assert_eq!(share(3, Some(10 * MB), 0, 1), 10 * MB);
        assert_eq!(share(2, None, 50 * MB, 1), 81 * MB);
        // Which may change.
        assert_eq!((share(3, Some(20 * MB), 0, 1), share(2, None, 50 * MB, 1)), (20 * MB, 71 * MB));
        assert_eq!((share(3, Some(10 * MB), 0, 1), share(2, None, 50 * MB, 1)), (10 * MB, 81 * MB));
        // Changed while they run; and when two are over, the third gets all.
        budget.set(Some(BytesPerSec(10 * MB)));
        assert!(share(2, None, 60 * MB, 1) < 5 * MB);
        budget.leave(vm(1));
        budget.leave(vm(3));
        assert_eq!(share(2, None, 60 * MB, 1), 10 * MB);
    }

    proptest! {
        #[test]
        fn a_limit_is_divided_and_never_exceeded(limit in any::<u64>(), wants in prop::collection::vec(any::<u64>(), 1..20)) {
            let shares = shares(limit, &wants);
            let sum: u128 = shares.iter().map(|share| u128::from(*share)).sum();
            prop_assert!(sum <= u128::from(limit) && sum + (2 * wants.len()) as u128 > u128::from(limit));
            // Nobody who wants more gets less than another.
            for (share, want) in shares.iter().zip(&wants) {
                prop_assert!(share >= want || shares.iter().all(|other| *other <= share + 1));
            }
        }
    }
}
