//! What VMs write at which time of day: samples of their hosts are gathered, and what was learned is stored now and then.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use godwit_model::habits::slot_at;
use godwit_model::{BytesPerSec, Habits, QuietTime, UnixMillis, VmId};

use crate::db::{Batch, Db, Fault, retry};
use crate::rows::{HabitsRow, VmRow};

/// Slots of a VM that are stored together: four hours. What is gathered and not stored when the controller ends is lost, and nothing else; a
/// transaction for each VM and slot would cost a large cluster more than this is worth.
const TOGETHER: usize = 8;
/// How long a sample is told as what a VM writes now.
const FRESH: u64 = 3_600_000;

/// What is gathered, and what was found of it.
#[derive(Default)]
pub(crate) struct Gathered {
    inner: Mutex<HashMap<VmId, Known>>,
}

#[derive(Default)]
struct Known {
    slot: Slot,
    /// Slots that are over, with what was written in them.
    over: Vec<(usize, BytesPerSec)>,
    last: Option<(UnixMillis, BytesPerSec)>,
    quiet: Option<QuietTime>,
}

/// Samples in the slot that lasts.
#[derive(Clone, Copy, Default)]
struct Slot {
    number: usize,
    sum: u64,
    samples: u64,
}

impl Known {
    fn add(&mut self, rate: BytesPerSec, now: UnixMillis) {
        self.last = Some((now, rate));
        let number = slot_at(now);
        if self.slot.samples > 0 && self.slot.number != number {
            let Slot { number, sum, samples } = std::mem::take(&mut self.slot);
            self.over.push((number, BytesPerSec(sum / samples)));
        }
        self.slot.number = number;
        self.slot.sum = self.slot.sum.saturating_add(rate.get());
        self.slot.samples += 1;
    }
}

impl Gathered {
    fn locked(&self) -> MutexGuard<'_, HashMap<VmId, Known>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When a VM writes least, as far as is known.
    pub(crate) fn quiet(&self, vm: VmId) -> Option<QuietTime> {
        self.locked().get(&vm)?.quiet
    }

    /// What a VM that is in its state since `since` wrote when that was measured last, if that was lately.
    pub(crate) fn last(&self, vm: VmId, since: UnixMillis, now: UnixMillis) -> Option<BytesPerSec> {
        let (at, rate) = self.locked().get(&vm)?.last?;
        (at >= since && now.0.saturating_sub(at.0) <= FRESH).then_some(rate)
    }

    /// Takes over what is stored, and removes what belongs to nobody.
    pub(crate) async fn load(&self, db: &Db) -> Result<(), Fault> {
        for row in db.all::<HabitsRow>().await? {
            if db.find::<VmRow>(&row.row.vm.to_string()).await?.is_none() {
                db.commit(Batch::default().delete(&row)).await?;
            } else {
                self.locked().entry(row.row.vm).or_default().quiet = row.row.habits.quiet();
            }
        }
        Ok(())
    }

    /// Takes a sample in.
    pub(crate) async fn sample(&self, db: &Db, vm: VmId, rate: BytesPerSec, now: UnixMillis) -> Result<(), Fault> {
        let over = {
            let mut inner = self.locked();
            let known = inner.entry(vm).or_default();
            known.add(rate, now);
            if known.over.len() < TOGETHER {
                return Ok(());
            }
            std::mem::take(&mut known.over)
        };
        let learned = retry!({
            let Some(owner) = db.find::<VmRow>(&vm.to_string()).await? else { return Ok(None) };
            let found = db.find::<HabitsRow>(&vm.to_string()).await?;
            let mut habits = found.as_ref().map_or_else(Habits::default, |found| found.row.habits.clone());
            over.iter().for_each(|(slot, rate)| habits.learn(*slot, *rate));
            let (quiet, batch) = (habits.quiet(), Batch::default().unchanged(&owner));
            db.commit(match found {
                Some(mut found) => {
                    found.row.habits = habits;
                    batch.update(&found)
                }
                None => batch.create(&HabitsRow { vm, habits }),
            })
            .await?;
            Ok(Some(quiet))
        })?;
        match learned {
            Some(quiet) => {
                if let Some(known) = self.locked().get_mut(&vm) {
                    known.quiet = quiet;
                }
            }
            None => self.forget(vm),
        }
        Ok(())
    }

    /// The VM is deleted.
    pub(crate) fn forget(&self, vm: VmId) {
        self.locked().remove(&vm);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::{SqliteStore, Store};
    use crate::tests::support::vm_row;

    fn minute(minute: u64) -> UnixMillis {
        UnixMillis(minute * 60_000)
    }

    #[test]
    fn a_slot_is_over_with_its_mean_when_a_sample_of_another_comes() {
        let mut known = Known::default();
        let mut add = |rate, at| {
            known.add(BytesPerSec(rate), minute(at));
            known.over.clone()
        };
        assert_eq!(add(10, 1), []);
        assert_eq!(add(30, 29), []);
        assert_eq!(add(5, 31), [(0, BytesPerSec(20))]);
        add(u64::MAX, 32);
        add(u64::MAX, 33);
        assert_eq!(add(1, 24 * 60)[1..], [(1, BytesPerSec(u64::MAX / 3))]);
    }

    #[tokio::test]
    async fn what_is_known_of_a_vm_outlives_the_controller_and_ends_with_the_vm() {
        let dir = tempfile::tempdir().expect("dir");
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&dir.path().join("store.db"), None).expect("open"));
        let db = Db::open(store, false).await.expect("db");
        let (gathered, row) = (Gathered::default(), vm_row());
        let day = async |day: u64| {
            for half_hour in 0..=48 {
                let rate = BytesPerSec(if half_hour % 48 == 7 { 1 << 20 } else { 32 << 20 });
                gathered.sample(&db, row.id, rate, minute((day * 48 + half_hour) * 30)).await.expect("taken in");
            }
        };
        day(20_000).await;
        assert_eq!(gathered.quiet(row.id), None, "nobody has such a VM");
        assert!(db.all::<HabitsRow>().await.expect("read").is_empty());
        gathered.forget(row.id);
        db.commit(Batch::default().create(&row)).await.expect("created");
        day(20_001).await;
        let quiet = gathered.quiet(row.id).expect("known");
        assert_eq!((quiet.from, quiet.until, quiet.dirty_rate), (210, 240, BytesPerSec(1 << 20)));
        let now = minute((20_001 * 48 + 48) * 30);
        assert_eq!(gathered.last(row.id, now, now), Some(BytesPerSec(32 << 20)));
        assert_eq!(gathered.last(row.id, UnixMillis(now.0 + 1), now), None, "of before it was started");
        assert_eq!(gathered.last(row.id, now, UnixMillis(now.0 + FRESH + 1)), None, "long ago");
        let later = Gathered::default();
        later.load(&db).await.expect("read");
        assert_eq!(later.quiet(row.id), Some(quiet));
        let stored = db.find::<VmRow>(&row.id.to_string()).await.expect("read").expect("there");
        db.commit(Batch::default().delete(&stored)).await.expect("deleted");
        let last = Gathered::default();
        last.load(&db).await.expect("read");
        assert_eq!(last.quiet(row.id), None);
        assert!(db.all::<HabitsRow>().await.expect("read").is_empty(), "what belongs to nobody is removed");
    }
}
