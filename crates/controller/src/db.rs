//! Typed access to the store. Every write insists on this controller's epoch: one that was superseded can no longer change anything.

use std::sync::Arc;

use godwit_model::{Epoch, ErrorCode, Refusal, Retry};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::clock;
use crate::rows::{EpochMark, EpochRow, Row};
use crate::store::{Change, Entry, Expect, Store, StoreError, Txn, Write};

/// How often something is tried that others keep changing.
pub(crate) const ATTEMPTS: u32 = 200;

/// Evaluates a block of reads and one commit, again as long as rows change in between. The block may use `?` and `return` as a function
/// that results in `Result<_, Fault>`. A macro, because futures of async closures that borrow cannot be sent between threads yet.
macro_rules! retry {
    ($attempt:block) => {{
        let mut attempts = 1;
        loop {
            let result: Result<_, $crate::db::Fault> = async $attempt.await;
            match result {
                Err(fault) if fault.is_conflict() && attempts < $crate::db::ATTEMPTS => {
                    attempts += 1;
                    tokio::task::yield_now().await;
                }
                result => break result,
            }
        }
    }};
}
pub(crate) use retry;

/// Why something could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// It may not be, and why.
    #[error("{0}")]
    Refused(Refusal),
    /// The store did not do it.
    #[error("the store refused")]
    Store(#[from] StoreError),
    /// Another controller has taken over the store.
    #[error("another controller has taken over")]
    Deposed,
    /// A row that this version cannot read.
    #[error("the row {key} cannot be read")]
    Unreadable {
        /// Where it is.
        key: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A row of a later version.
    #[error("the row {key} has schema {schema}")]
    Schema {
        /// Where it is.
        key: String,
        /// What it has.
        schema: u32,
    },
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Fault {
    /// What the user is told.
    pub(crate) fn refusal(self) -> Refusal {
        match self {
            Self::Refused(refusal) => refusal,
            Self::Store(StoreError::Full(_)) => {
                Refusal::new(ErrorCode::StoreFull, "the controller's store has no space left; nothing was changed")
                    .hint("make space on the file system of the controller's data directory, then send the request again")
                    .retry(Retry::Safe)
            }
            Self::Store(StoreError::Conflict { key }) => Refusal::new(ErrorCode::RevisionConflict, format!("{key} keeps changing"))
                .hint("send the request again")
                .retry(Retry::Safe),
            Self::Store(StoreError::Compacted { compacted }) => {
                Refusal::new(ErrorCode::RevisionConflict, format!("changes up to {compacted} are no longer kept"))
                    .hint("list the objects again, then watch without a cursor")
            }
            Self::Store(StoreError::Closed) | Self::Deposed => {
                Refusal::new(ErrorCode::HostDown, "this controller is shutting down")
                    .hint("send the request again when a controller serves")
                    .retry(Retry::Unknown)
            }
            fault => {
                tracing::error!(error = &fault as &dyn std::error::Error, "the store cannot be used");
                Refusal::new(ErrorCode::Internal, fault.to_string()).hint("the controller's log says more").retry(Retry::Unknown)
            }
        }
    }

    /// Whether reading again and trying again can help.
    pub(crate) fn is_conflict(&self) -> bool {
        matches!(self, Self::Store(StoreError::Conflict { .. }))
    }

    /// Whether it is the space that is missing.
    pub(crate) fn is_full(&self) -> bool {
        matches!(self, Self::Store(StoreError::Full(_)))
    }
}

/// A row with its revision.
#[derive(Clone, Debug)]
pub(crate) struct Stored<R> {
    /// What is stored.
    pub(crate) row: R,
    /// Its revision.
    pub(crate) revision: u64,
}

impl<R> Stored<R> {
    /// Refuses when `what` is no longer at the revision that somebody has decided by.
    pub(crate) fn still_at(&self, revision: Option<u64>, what: std::fmt::Arguments<'_>) -> Result<(), Refusal> {
        if revision.is_none_or(|revision| revision == self.revision) {
            return Ok(());
        }
        let changed = format!("{what} has changed: it is at revision {}", self.revision);
        Err(Refusal::new(ErrorCode::RevisionConflict, changed).hint("look at it again, then decide again"))
    }
}

#[derive(Serialize)]
struct EnvelopeOut<'a, R> {
    schema: u32,
    row: &'a R,
}

#[derive(Deserialize)]
struct EnvelopeIn<'a> {
    schema: u32,
    #[serde(borrow)]
    row: &'a serde_json::value::RawValue,
}

fn pack<R: Row>(row: &R) -> Vec<u8> {
    serde_json::to_vec(&EnvelopeOut { schema: R::SCHEMA, row }).expect("rows have string keys and no failing serialisers")
}

/// Reads a stored value.
pub(crate) fn unpack<R: Row>(key: &str, value: &[u8]) -> Result<R, Fault> {
    let unreadable = |source| Fault::Unreadable { key: key.into(), source };
    let envelope: EnvelopeIn<'_> = serde_json::from_slice(value).map_err(unreadable)?;
    if envelope.schema != R::SCHEMA {
        return Err(Fault::Schema { key: key.into(), schema: envelope.schema });
    }
    serde_json::from_str(envelope.row.get()).map_err(unreadable)
}

fn stored<R: Row>(entry: Entry) -> Result<Stored<R>, Fault> {
    Ok(Stored { row: unpack(&entry.key, &entry.value)?, revision: entry.revision })
}

/// Writes that are done together or not at all.
#[derive(Default)]
pub(crate) struct Batch(Txn);

impl Batch {
    /// A row that must not be there yet.
    pub(crate) fn create<R: Row>(mut self, row: &R) -> Self {
        self.0.expects.push((row.key(), Expect::Absent));
        self.0.writes.push(Write::Put(row.key(), pack(row)));
        self
    }

    /// A row that must still be at the revision that was read.
    pub(crate) fn update<R: Row>(mut self, stored: &Stored<R>) -> Self {
        self.0.expects.push((stored.row.key(), Expect::At(stored.revision)));
        self.0.writes.push(Write::Put(stored.row.key(), pack(&stored.row)));
        self
    }

    /// Removes a row that must still be at the revision that was read.
    pub(crate) fn delete<R: Row>(mut self, stored: &Stored<R>) -> Self {
        self.0.expects.push((stored.row.key(), Expect::At(stored.revision)));
        self.0.writes.push(Write::Delete(stored.row.key()));
        self
    }

    /// Insists that a row is still as it was read.
    pub(crate) fn unchanged<R: Row>(mut self, stored: &Stored<R>) -> Self {
        self.0.expects.push((stored.row.key(), Expect::At(stored.revision)));
        self
    }

    /// Claims a key for `owner`; it must be free.
    pub(crate) fn claim(mut self, key: String, owner: &impl ToString) -> Self {
        self.0.expects.push((key.clone(), Expect::Absent));
        self.0.writes.push(Write::Put(key, owner.to_string().into_bytes()));
        self
    }

    /// With all of another's writes.
    pub(crate) fn and(mut self, other: Self) -> Self {
        self.0.expects.extend(other.0.expects);
        self.0.writes.extend(other.0.writes);
        self
    }

    /// Frees a claimed key.
    pub(crate) fn free(mut self, key: String) -> Self {
        self.0.writes.push(Write::Delete(key));
        self
    }
}

/// The store, under this controller's epoch.
#[derive(Clone)]
pub(crate) struct Db {
    store: Arc<dyn Store>,
    epoch: Arc<EpochRow>,
    reign: u64,
}

/// How far epoch and marks of a store that was restored from a copy are put forward: beyond all that was counted since the copy was made.
const GAP: u64 = 1 << 32;
/// Epochs of which more is remembered than their number.
const LATELY: usize = 256;

impl Db {
    /// Begins a new epoch; on a store that was `restored` from a copy, one beyond every epoch since.
    pub(crate) async fn open(store: Arc<dyn Store>, restored: bool) -> Result<Self, Fault> {
        let key = EpochRow::PREFIX;
        let before = store.get(key).await?;
        let (mut row, expect) = match before {
            None => (EpochRow { epoch: Epoch(0), past: 0, lately: vec![] }, Expect::Absent),
            Some(entry) => (unpack::<EpochRow>(key, &entry.value)?, Expect::At(entry.revision)),
        };
        if let Some(last) = row.lately.last_mut() {
            last.ended = Some(row.past + *store.watch().borrow());
        }
        let gap = if restored { GAP } else { 0 };
        (row.epoch, row.past) = (Epoch(row.epoch.0 + 1 + gap), row.past + gap);
        row.lately.push(EpochMark { epoch: row.epoch, id: clock::fresh().to_string(), ended: None });
        row.lately.drain(..row.lately.len().saturating_sub(LATELY));
        let writes = vec![Write::Put(key.into(), pack(&row))];
        let reign = store.txn(Txn { expects: vec![(key.into(), expect)], writes }).await?;
        Ok(Self { store, epoch: Arc::new(row), reign })
    }

    /// How far the store is, as agents are told in this epoch.
    pub(crate) fn mark(&self) -> u64 {
        self.epoch.past + *self.store.watch().borrow()
    }

    /// What agents are told of this epoch besides its number.
    pub(crate) fn epoch_id(&self) -> &str {
        self.epoch.lately.last().map_or("", |epoch| epoch.id.as_str())
    }

    /// Whether somebody who was told of this epoch and mark was told by this very store, and no more than it knows. Epochs of before those that
    /// are remembered are taken on trust; one that is missing between them is another store's.
    pub(crate) fn knows(&self, epoch: Epoch, id: &str, mark: u64) -> bool {
        let lately = &self.epoch.lately;
        let Some(known) = lately.iter().find(|known| known.epoch == epoch) else {
            return lately.first().is_some_and(|first| epoch < first.epoch);
        };
        (id.is_empty() || known.id == id) && mark <= known.ended.unwrap_or_else(|| self.mark())
    }

    /// The epoch of this controller.
    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch.epoch
    }

    /// One row.
    pub(crate) async fn find<R: Row>(&self, rest: &str) -> Result<Option<Stored<R>>, Fault> {
        self.store.get(&format!("{}{rest}", R::PREFIX)).await?.map(stored).transpose()
    }

    /// One page of rows under a part of their prefix.
    pub(crate) async fn page<R: Row>(&self, under: &str, after: Option<&str>, limit: usize) -> Result<Vec<Stored<R>>, Fault> {
        let prefix = format!("{}{under}", R::PREFIX);
        let after = after.map(|after| format!("{prefix}{after}"));
        self.store.range(&prefix, after.as_deref(), limit).await?.into_iter().map(stored).collect()
    }

    /// Every row of a kind.
    pub(crate) async fn all<R: Row>(&self) -> Result<Vec<Stored<R>>, Fault> {
        self.page("", None, usize::MAX).await
    }

    /// Who claimed `key`.
    pub(crate) async fn claimed(&self, key: &str) -> Result<Option<String>, Fault> {
        Ok(self.store.get(key).await?.map(|entry| String::from_utf8_lossy(&entry.value).into_owned()))
    }

    /// The claims under `prefix`, as (what follows the prefix, owner).
    pub(crate) async fn claims(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<(String, String)>, Fault> {
        let after = after.map(|after| format!("{prefix}{after}"));
        let entries = self.store.range(prefix, after.as_deref(), limit).await?;
        let claim = |entry: Entry| {
            (entry.key.get(prefix.len()..).unwrap_or_default().to_owned(), String::from_utf8_lossy(&entry.value).into_owned())
        };
        Ok(entries.into_iter().map(claim).collect())
    }

    /// Writes a batch.
    pub(crate) async fn commit(&self, batch: Batch) -> Result<(), Fault> {
        let mut txn = batch.0;
        txn.expects.insert(0, (EpochRow::PREFIX.into(), Expect::At(self.reign)));
        match self.store.txn(txn).await {
            Ok(_) => Ok(()),
            Err(StoreError::Conflict { key }) if key == EpochRow::PREFIX => Err(Fault::Deposed),
            Err(error) => Err(error.into()),
        }
    }

    /// Changes behind `after`.
    pub(crate) async fn changes(&self, after: u64, limit: usize) -> Result<Vec<Change>, Fault> {
        Ok(self.store.changes(after, limit).await?)
    }

    /// The newest revision.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.store.watch()
    }

    /// Keeps `kept` changes in the log.
    pub(crate) async fn trim(&self, kept: u64) -> Result<(), Fault> {
        let newest = *self.store.watch().borrow();
        Ok(self.store.compact(newest.saturating_sub(kept)).await?)
    }
}

#[cfg(test)]
mod tests {
    use godwit_model::Name;

    use super::*;
    use crate::clock::now;
    use crate::rows::TeamRow;
    use crate::store::SqliteStore;

    #[tokio::test]
    async fn what_hosts_were_told_by_another_store_or_beyond_this_one_is_not_known() {
        let dir = tempfile::tempdir().expect("dir");
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&dir.path().join("store.db"), None).expect("open"));
        let first = Db::open(store.clone(), false).await.expect("first");
        let (one, id, mark) = (first.epoch(), first.epoch_id().to_owned(), first.mark());
        assert!(first.knows(one, &id, mark) && !first.knows(one, &id, mark + 1) && !first.knows(Epoch(2), "", 0));
        let restored = Db::open(store.clone(), true).await.expect("restored");
        assert!(restored.epoch() > Epoch(1 << 32) && restored.mark() > 1 << 32);
        assert!(restored.knows(one, &id, mark), "of before the copy");
        assert!(!restored.knows(one, &id, mark + 1), "more than the copy knows");
        assert!(!restored.knows(one, "another", mark) && restored.knows(one, "", mark), "an agent of before says no id");
        assert!(!restored.knows(Epoch(2), "lost", 1), "an epoch that the copy has never seen");
        let came_to = restored.mark();
        let next = Db::open(store, false).await.expect("next");
        assert!(next.knows(restored.epoch(), restored.epoch_id(), came_to) && !next.knows(Epoch(2), "lost", 1));
    }

    #[tokio::test]
    async fn a_controller_that_was_superseded_changes_nothing_any_more() {
        let dir = tempfile::tempdir().expect("dir");
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&dir.path().join("store.db"), None).expect("open"));
        let old = Db::open(store.clone(), false).await.expect("first");
        let new = Db::open(store, false).await.expect("second");
        assert!(new.epoch() > old.epoch());
        let team = TeamRow { name: Name::new("red").expect("name"), created: now(), share_memory: false };
        assert!(matches!(old.commit(Batch::default().create(&team)).await, Err(Fault::Deposed)));
        assert!(new.find::<TeamRow>("red").await.expect("read").is_none());
        new.commit(Batch::default().create(&team)).await.expect("the newer one may");
        assert!(new.commit(Batch::default().create(&team)).await.expect_err("twice").is_conflict());
    }

    #[test]
    fn a_row_of_another_schema_is_not_guessed_at() {
        let newer = br#"{"schema":2,"row":{"name":"red","created":0}}"#;
        assert!(matches!(unpack::<TeamRow>("team/red", newer), Err(Fault::Schema { schema: 2, .. })));
        assert!(matches!(unpack::<TeamRow>("team/red", b"{"), Err(Fault::Unreadable { .. })));
    }
}
