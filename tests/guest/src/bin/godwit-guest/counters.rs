//! What the threads count, for the status that everybody may ask for.

use std::sync::atomic::{AtomicU64, Ordering};

use godwit_guest::Status;

/// A number that threads change and read without a lock.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    pub(crate) fn subtract(&self, less: u64) {
        self.0.fetch_sub(less, Ordering::Relaxed);
    }

    pub(crate) fn set(&self, number: u64) {
        self.0.store(number, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// All counts of this boot; the fields are those of [`Status`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    id: String,
    host_name: String,
    boot: u128,
    pub(crate) pages: Count,
    pub(crate) pages_checked: Count,
    pub(crate) page_errors: Count,
    pub(crate) sweeps: Count,
    pub(crate) pages_written: Count,
    pub(crate) disk_checked: Count,
    pub(crate) disk_errors: Count,
    pub(crate) disk_written: Count,
    pub(crate) clock_jumps: Count,
    pub(crate) largest_clock_jump_ms: Count,
    pub(crate) stalls: Count,
    pub(crate) longest_stall_ms: Count,
    pub(crate) counter: Count,
    pub(crate) witness_failed: Count,
    pub(crate) generation: Count,
    pub(crate) echoes: Count,
    pub(crate) tcp_connections: Count,
    pub(crate) tcp_accepted: Count,
    pub(crate) tcp_bytes: Count,
    /// Not told: 1 while somebody wants the memory verified.
    pub(crate) verify: Count,
}

impl Counters {
    pub(crate) fn new(id: String, host_name: String, boot: u128) -> Self {
        Self { id, host_name, boot, ..Self::default() }
    }

    pub(crate) fn status(&self) -> Status {
        Status {
            id: self.id.clone(),
            host_name: self.host_name.clone(),
            boot: format!("{:032x}", self.boot),
            uptime_ms: u64::try_from(crate::now().as_millis()).unwrap_or(u64::MAX),
            pages: self.pages.get(),
            pages_checked: self.pages_checked.get(),
            page_errors: self.page_errors.get(),
            sweeps: self.sweeps.get(),
            pages_written: self.pages_written.get(),
            disk_checked: self.disk_checked.get(),
            disk_errors: self.disk_errors.get(),
            disk_written: self.disk_written.get(),
            clock_jumps: self.clock_jumps.get(),
            largest_clock_jump_ms: self.largest_clock_jump_ms.get(),
            stalls: self.stalls.get(),
            longest_stall_ms: self.longest_stall_ms.get(),
            counter: self.counter.get(),
            witness_failed: self.witness_failed.get(),
            generation: self.generation.get(),
            echoes: self.echoes.get(),
            tcp_connections: self.tcp_connections.get(),
            tcp_accepted: self.tcp_accepted.get(),
            tcp_bytes: self.tcp_bytes.get(),
        }
    }
}
