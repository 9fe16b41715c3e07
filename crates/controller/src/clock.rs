//! The wall clock and random identities: the only place of this crate that reads either.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use godwit_model::UnixMillis;
use uuid::Uuid;

/// Now.
pub(crate) fn now() -> UnixMillis {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    UnixMillis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// What tells the time to schedules; tests have their own.
#[derive(Clone)]
pub struct WallClock(Arc<dyn Fn() -> UnixMillis + Send + Sync>);

impl WallClock {
    /// One that says what `tell` does.
    pub fn new(tell: impl Fn() -> UnixMillis + Send + Sync + 'static) -> Self {
        Self(Arc::new(tell))
    }

    pub(crate) fn now(&self) -> UnixMillis {
        (self.0)()
    }
}

impl Default for WallClock {
    /// The machine's.
    fn default() -> Self {
        Self::new(now)
    }
}

impl fmt::Debug for WallClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WallClock")
    }
}

/// A moment for people, UTC to the second.
pub(crate) fn readable(moment: UnixMillis) -> String {
    let seconds = i64::try_from(moment.0 / 1_000).unwrap_or(i64::MAX);
    jiff::Timestamp::from_second(seconds).map_or_else(|_| "an unknown moment".into(), |stamp| stamp.to_string())
}

/// A moment as a part of a name, UTC to the second.
pub(crate) fn stamp(moment: UnixMillis) -> String {
    let seconds = i64::try_from(moment.0 / 1_000).unwrap_or(i64::MAX);
    let known = jiff::Timestamp::from_second(seconds).ok();
    known.map_or_else(|| moment.0.to_string(), |stamp| stamp.strftime("%Y%m%d-%H%M%S").to_string())
}

/// A fresh identity.
pub(crate) fn fresh() -> Uuid {
    Uuid::new_v4()
}

/// A fresh secret, 64 hexadecimal digits.
pub(crate) fn secret() -> String {
    format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple())
}
