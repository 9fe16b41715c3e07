//! The store in one SQLite file, on a thread of its own: one `kv` table, the change log, and one number for the revision of all.

use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::mpsc;
use std::thread::JoinHandle;

use futures::FutureExt;
use rusqlite::{Connection, ErrorCode as SqlCode, OptionalExtension, TransactionBehavior, params};
use tokio::sync::{oneshot, watch};

use super::{Change, Entry, Expect, Reply, Store, StoreError, Txn, Write};

/// Version of the tables below.
const SCHEMA: i64 = 1;

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// The store in one file.
pub(crate) struct SqliteStore {
    jobs: Mutex<Option<mpsc::Sender<Job>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    revision: watch::Sender<u64>,
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        let full = match &error {
            // Without space SQLite says FULL for the database, and an I/O error for what it must put beside it.
            rusqlite::Error::SqliteFailure(cause, _) => {
                cause.code == SqlCode::DiskFull
                    || matches!(
                        cause.extended_code,
                        rusqlite::ffi::SQLITE_IOERR_WRITE | rusqlite::ffi::SQLITE_IOERR_SHMSIZE | rusqlite::ffi::SQLITE_IOERR_FSYNC
                    )
            }
            _ => false,
        };
        if full { Self::Full(Box::new(error)) } else { Self::Failed(Box::new(error)) }
    }
}

/// The first key behind every key that begins with `prefix`. Keys are ASCII.
fn end_of(prefix: &str) -> String {
    let mut end = prefix.to_owned();
    match end.pop() {
        Some(last) => end.push(char::from_u32(u32::from(last) + 1).unwrap_or(char::MAX)),
        None => end.push(char::MAX),
    }
    end
}

impl SqliteStore {
    /// Opens or creates the store. `max_pages` bounds its size, for tests.
    pub(crate) fn open(path: &Path, max_pages: Option<u32>) -> Result<Self, StoreError> {
        // Hashes of secrets are in it; SQLite gives its journal the same mode.
        std::fs::File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(|error| StoreError::Failed(Box::new(error)))?;
        let mut connection = Connection::open(path)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "journal_size_limit", 16 << 20)?;
        if let Some(pages) = max_pages {
            connection.pragma_update(None, "max_page_count", pages)?;
        }
        let revision = create_tables(&mut connection)?;
        let (jobs, queue) = mpsc::channel::<Job>();
        let thread = std::thread::Builder::new()
            .name("store".into())
            .spawn(move || queue.into_iter().for_each(|job| job(&mut connection)))
            .map_err(|error| StoreError::Failed(Box::new(error)))?;
        Ok(Self { jobs: Mutex::new(Some(jobs)), thread: Mutex::new(Some(thread)), revision: watch::Sender::new(revision) })
    }

    /// Does what was asked before and closes the file; whatever is asked after is [`StoreError::Closed`]. Blocks.
    pub(crate) fn close(&self) {
        self.jobs.lock().expect("no holder panics").take();
        let thread = self.thread.lock().expect("no holder panics").take();
        if let Some(thread) = thread {
            // A store thread that panicked has said so on stderr; there is nothing left to save here.
            let _ = thread.join();
        }
    }

    fn run<T: Send + 'static>(&self, job: impl FnOnce(&mut Connection) -> Result<T, StoreError> + Send + 'static) -> Reply<'_, T> {
        let (answer, result) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            // Nobody waits any more: the work is done all the same.
            let _ = answer.send(job(connection));
        });
        let sent = self.jobs.lock().expect("no holder panics").as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        async move {
            if !sent {
                return Err(StoreError::Closed);
            }
            result.await.unwrap_or(Err(StoreError::Closed))
        }
        .boxed()
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        self.close();
    }
}

/// SQLite's integers are signed; a cursor from outside may be anything.
fn sql(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn revision_at(row: &rusqlite::Row<'_>, column: usize) -> Result<u64, rusqlite::Error> {
    row.get::<_, i64>(column).map(i64::cast_unsigned)
}

fn number(connection: &Connection, name: &str) -> Result<Option<i64>, rusqlite::Error> {
    connection.query_row("SELECT number FROM meta WHERE name = ?1", [name], |row| row.get(0)).optional()
}

fn create_tables(connection: &mut Connection) -> Result<u64, StoreError> {
    let txn = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    txn.execute_batch(
        "CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID;
         CREATE TABLE IF NOT EXISTS kv(key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL) WITHOUT ROWID;
         CREATE TABLE IF NOT EXISTS log(revision INTEGER PRIMARY KEY, key TEXT NOT NULL, value BLOB, removed BLOB);",
    )?;
    match number(&txn, "schema")? {
        None => {
            txn.execute("INSERT INTO meta VALUES ('schema', ?1), ('revision', 0), ('compacted', 0)", [SCHEMA])?;
        }
        Some(SCHEMA) => {}
        Some(other) => {
            return Err(StoreError::Failed(format!("the store has schema {other}, this controller knows {SCHEMA} only").into()));
        }
    }
    let revision = number(&txn, "revision")?.unwrap_or_default();
    txn.commit()?;
    Ok(revision.cast_unsigned())
}

fn entry(row: &rusqlite::Row<'_>) -> Result<Entry, rusqlite::Error> {
    Ok(Entry { key: row.get(0)?, value: row.get(1)?, revision: revision_at(row, 2)? })
}

fn get(connection: &Connection, key: &str) -> Result<Option<Entry>, rusqlite::Error> {
    connection.prepare_cached("SELECT key, value, revision FROM kv WHERE key = ?1")?.query_row([key], entry).optional()
}

fn apply(connection: &mut Connection, work: Txn) -> Result<u64, StoreError> {
    let txn = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for (key, expect) in work.expects {
        let found = get(&txn, &key)?.map(|entry| entry.revision);
        let holds = match expect {
            Expect::Absent => found.is_none(),
            Expect::At(revision) => found == Some(revision),
        };
        if !holds {
            return Err(StoreError::Conflict { key });
        }
    }
    let mut revision = number(&txn, "revision")?.unwrap_or_default();
    for write in work.writes {
        match write {
            Write::Put(key, value) => {
                revision += 1;
                txn.prepare_cached("INSERT OR REPLACE INTO kv VALUES (?1, ?2, ?3)")?.execute(params![key, value, revision])?;
                txn.prepare_cached("INSERT INTO log VALUES (?1, ?2, ?3, NULL)")?.execute(params![revision, key, value])?;
            }
            Write::Delete(key) => {
                let Some(entry) = get(&txn, &key)? else { continue };
                revision += 1;
                txn.prepare_cached("DELETE FROM kv WHERE key = ?1")?.execute([&key])?;
                txn.prepare_cached("INSERT INTO log VALUES (?1, ?2, NULL, ?3)")?.execute(params![revision, key, entry.value])?;
            }
        }
    }
    txn.execute("UPDATE meta SET number = ?1 WHERE name = 'revision'", [revision])?;
    txn.commit()?;
    Ok(revision.cast_unsigned())
}

impl Store for SqliteStore {
    fn get(&self, key: &str) -> Reply<'_, Option<Entry>> {
        let key = key.to_owned();
        self.run(move |connection| Ok(get(connection, &key)?))
    }

    fn range(&self, prefix: &str, after: Option<&str>, limit: usize) -> Reply<'_, Vec<Entry>> {
        let (first, end, after) = (prefix.to_owned(), end_of(prefix), after.unwrap_or_default().to_owned());
        self.run(move |connection| {
            let mut query = connection.prepare_cached(
                "SELECT key, value, revision FROM kv WHERE key >= ?1 AND key < ?2 AND key > ?3 ORDER BY key LIMIT ?4",
            )?;
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            Ok(query.query_map(params![first, end, after, limit], entry)?.collect::<Result<_, _>>()?)
        })
    }

    fn txn(&self, txn: Txn) -> Reply<'_, u64> {
        let announce = self.revision.clone();
        self.run(move |connection| {
            let revision = apply(connection, txn)?;
            announce.send_if_modified(|newest| std::mem::replace(newest, revision) != revision);
            Ok(revision)
        })
    }

    fn changes(&self, after: u64, limit: usize) -> Reply<'_, Vec<Change>> {
        self.run(move |connection| {
            let compacted = number(connection, "compacted")?.unwrap_or_default().cast_unsigned();
            if after < compacted {
                return Err(StoreError::Compacted { compacted });
            }
            let mut query = connection
                .prepare_cached("SELECT revision, key, value, removed FROM log WHERE revision > ?1 ORDER BY revision LIMIT ?2")?;
            let change = |row: &rusqlite::Row<'_>| {
                Ok(Change { revision: revision_at(row, 0)?, key: row.get(1)?, value: row.get(2)?, removed: row.get(3)? })
            };
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            Ok(query.query_map(params![sql(after), limit], change)?.collect::<Result<_, _>>()?)
        })
    }

    fn watch(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    fn compact(&self, upto: u64) -> Reply<'_, ()> {
        self.run(move |connection| {
            let txn = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let upto = sql(upto).min(number(&txn, "revision")?.unwrap_or_default());
            txn.execute("DELETE FROM log WHERE revision <= ?1", [upto])?;
            txn.execute("UPDATE meta SET number = max(number, ?1) WHERE name = 'compacted'", [upto])?;
            Ok(txn.commit()?)
        })
    }
}
