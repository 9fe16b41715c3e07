//! What VMs write at which time of day: samples of their hosts are gathered for a slot, and stored when it is over.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use godwit_model::habits::slot_at;
use godwit_model::{BytesPerSec, QuietTime, UnixMillis, VmId};

use crate::db::{Batch, Db, Fault, retry};
use crate::rows::{HabitsRow, VmRow};

/// What is gathered, and what was found of it.
#[derive(Default)]
pub(crate) struct Gathered {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    slots: HashMap<VmId, Slot>,
    quiet: HashMap<VmId, QuietTime>,
    last: HashMap<VmId, BytesPerSec>,
}

/// Samples of a VM in the slot that lasts.
#[derive(Clone, Copy)]
struct Slot {
    number: usize,
    sum: u64,
    samples: u64,
}

impl Gathered {
    fn locked(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When a VM writes least, as far as is known.
    pub(crate) fn quiet(&self, vm: VmId) -> Option<QuietTime> {
        self.locked().quiet.get(&vm).copied()
    }

    /// What a VM wrote when that was measured last.
    pub(crate) fn last(&self, vm: VmId) -> Option<BytesPerSec> {
        self.locked().last.get(&vm).copied()
    }

    /// Takes over what is stored.
    pub(crate) async fn load(&self, db: &Db) -> Result<(), Fault> {
        let rows = db.all::<HabitsRow>().await?;
        let quiet = rows.iter().filter_map(|row| Some((row.row.vm, row.row.habits.quiet()?))).collect();
        self.locked().quiet = quiet;
        Ok(())
    }

    /// Notes a sample; the slot before with its mean, if that is over by it.
    fn add(&self, vm: VmId, rate: u64, now: UnixMillis) -> Option<(usize, BytesPerSec)> {
        let number = slot_at(now);
        let fresh = Slot { number, sum: rate, samples: 1 };
        let mut inner = self.locked();
        inner.last.insert(vm, BytesPerSec(rate));
        match inner.slots.get_mut(&vm) {
            Some(slot) if slot.number == number => {
                slot.sum = slot.sum.saturating_add(rate);
                slot.samples += 1;
                None
            }
            Some(slot) => {
                let over = std::mem::replace(slot, fresh);
                Some((over.number, BytesPerSec(over.sum / over.samples.max(1))))
            }
            None => {
                inner.slots.insert(vm, fresh);
                None
            }
        }
    }

    /// Takes a sample in. What is gathered of a slot and not stored when the controller ends is lost, and nothing else.
    pub(crate) async fn sample(&self, db: &Db, vm: VmId, rate: u64, now: UnixMillis) -> Result<(), Fault> {
        let Some((slot, mean)) = self.add(vm, rate, now) else { return Ok(()) };
        let quiet = retry!({
            let owner = db.find::<VmRow>(&vm.to_string()).await?;
            let Some(owner) = owner else { return Ok(None) };
            let found = db.find::<HabitsRow>(&vm.to_string()).await?;
            let mut row = found.as_ref().map_or_else(|| HabitsRow { vm, habits: Default::default() }, |found| found.row.clone());
            row.habits.learn(slot, mean);
            let quiet = row.habits.quiet();
            let batch = Batch::default().unchanged(&owner);
            db.commit(match found {
                Some(mut found) => {
                    found.row = row;
                    batch.update(&found)
                }
                None => batch.create(&row),
            })
            .await?;
            Ok(quiet)
        })?;
        let mut inner = self.locked();
        match quiet {
            Some(quiet) => inner.quiet.insert(vm, quiet),
            None => inner.quiet.remove(&vm),
        };
        Ok(())
    }

    /// The VM is deleted.
    pub(crate) fn forget(&self, vm: VmId) {
        let mut inner = self.locked();
        inner.slots.remove(&vm);
        inner.quiet.remove(&vm);
        inner.last.remove(&vm);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::{SqliteStore, Store};
    use crate::tests::support::vm_row;

    #[test]
    fn a_slot_is_told_with_its_mean_when_a_sample_of_another_comes() {
        let (gathered, vm) = (Gathered::default(), VmId::new(uuid::Uuid::from_u128(1)));
        let minute = |minute: u64| UnixMillis(minute * 60_000);
        assert_eq!(gathered.add(vm, 10, minute(1)), None);
        assert_eq!(gathered.add(vm, 30, minute(29)), None);
        assert_eq!(gathered.add(VmId::new(uuid::Uuid::from_u128(2)), 99, minute(29)), None, "another VM's");
        assert_eq!(gathered.add(vm, 5, minute(31)), Some((0, BytesPerSec(20))));
        assert_eq!(gathered.last(vm), Some(BytesPerSec(5)));
        assert_eq!(gathered.add(vm, u64::MAX, minute(32)), None);
        assert_eq!(gathered.add(vm, u64::MAX, minute(33)), None);
        assert_eq!(gathered.add(vm, 1, minute(24 * 60)), Some((1, BytesPerSec(u64::MAX / 3))));
        gathered.forget(vm);
        assert_eq!(gathered.add(vm, 1, minute(24 * 60 + 31)), None);
    }

    #[tokio::test]
    async fn what_is_known_of_a_vm_outlives_the_controller_and_ends_with_the_vm() {
        let dir = tempfile::tempdir().expect("dir");
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&dir.path().join("store.db"), None).expect("open"));
        let db = Db::open(store, false).await.expect("db");
        let (gathered, row) = (Gathered::default(), vm_row());
        let day = async |gathered: &Gathered, day: u64| {
            for half_hour in 0..=48 {
                let rate = if half_hour % 48 == 7 { 1 << 20 } else { 32 << 20 };
                let at = UnixMillis((day * 48 + half_hour) * 1_800_000);
                gathered.sample(&db, row.id, rate, at).await.expect("stored");
            }
        };
        day(&gathered, 20_000).await;
        assert_eq!(gathered.quiet(row.id), None, "nobody has such a VM");
        assert!(db.all::<HabitsRow>().await.expect("read").is_empty());
        db.commit(Batch::default().create(&row)).await.expect("created");
        day(&gathered, 20_001).await;
        let quiet = gathered.quiet(row.id).expect("known");
        assert_eq!((quiet.from, quiet.until, quiet.dirty_rate), (210, 240, BytesPerSec(1 << 20)));
        let later = Gathered::default();
        later.load(&db).await.expect("read");
        assert_eq!(later.quiet(row.id), Some(quiet));
        later.forget(row.id);
        assert_eq!(later.quiet(row.id), None);
    }
}
