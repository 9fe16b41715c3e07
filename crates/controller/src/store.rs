//! Where the controller keeps what it must not forget: one narrow key-value trait with revisions and a change log.
//!
//! Durable: everything written by a transaction that was answered with success. Every write has a revision of its own, unique and
//! growing over the whole store, so that a revision is at once an object's version, and a watcher's cursor that loses and repeats nothing.

use futures::future::BoxFuture;
use tokio::sync::watch;

#[cfg(test)]
mod conformance;
mod sqlite;

pub(crate) use sqlite::SqliteStore;

/// A value as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its key.
    pub(crate) key: String,
    /// Its bytes.
    pub(crate) value: Vec<u8>,
    /// The write that made it what it is.
    pub(crate) revision: u64,
}

/// What a transaction insists on before it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expect {
    /// No such key.
    Absent,
    /// The key was last written by this revision.
    At(u64),
}

/// A write of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Write {
    /// Sets a key.
    Put(String, Vec<u8>),
    /// Removes a key; one that is not there is no error and makes no change.
    Delete(String),
}

/// All or nothing: every expectation holds and every write is done, or nothing is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Txn {
    /// What must hold.
    pub(crate) expects: Vec<(String, Expect)>,
    /// What is then written, in this order; each key at most once.
    pub(crate) writes: Vec<Write>,
}

/// A line of the change log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    /// Its place in the order of all changes.
    pub(crate) revision: u64,
    /// What changed.
    pub(crate) key: String,
    /// What it became; nothing if it was removed.
    pub(crate) value: Option<Vec<u8>>,
    /// What it was, if it was removed.
    pub(crate) removed: Option<Vec<u8>>,
}

/// Why the store did not do it. Nothing was changed, except after [`StoreError::Failed`], where it is not known.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// An expectation did not hold.
    #[error("{key} has changed meanwhile")]
    Conflict {
        /// The key whose expectation it was.
        key: String,
    },
    /// The changes asked for are no longer in the log.
    #[error("changes up to {compacted} are no longer in the log")]
    Compacted {
        /// The last revision that was dropped.
        compacted: u64,
    },
    /// There is no space left.
    #[error("the store has no space left")]
    Full(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Anything else.
    #[error("the store failed")]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It is shutting down.
    #[error("the store is closed")]
    Closed,
}

/// The answer of a store, later.
pub(crate) type Reply<'a, T> = BoxFuture<'a, Result<T, StoreError>>;

/// The store. Implementations are held to `conformance`.
pub(crate) trait Store: Send + Sync + 'static {
    /// One value.
    fn get(&self, key: &str) -> Reply<'_, Option<Entry>>;
    /// The first `limit` values whose keys begin with `prefix` and are greater than `after`, in the order of their keys.
    fn range(&self, prefix: &str, after: Option<&str>, limit: usize) -> Reply<'_, Vec<Entry>>;
    /// Does `txn` and returns the revision of the last change of the store after it.
    fn txn(&self, txn: Txn) -> Reply<'_, u64>;
    /// The first `limit` changes behind `after`, oldest first.
    fn changes(&self, after: u64, limit: usize) -> Reply<'_, Vec<Change>>;
    /// The newest revision; changes are announced here after they are durable.
    fn watch(&self) -> watch::Receiver<u64>;
    /// Drops the log up to and including `upto`. Values stay.
    fn compact(&self, upto: u64) -> Reply<'_, ()>;
}
