//! Schedules: when snapshots of which VMs are taken by themselves, and which of them are kept. Pure: the time zone's rules and the time are arguments.

mod retention;
mod timetable;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::snapshot::LONGEST_QUIESCE;
use crate::spec::check_labels;
use crate::{ErrorCode, Millis, Name, Refusal};

pub use retention::{Retention, plan_retention};
pub use timetable::{Due, Timetable};

/// Snapshots that are taken of the VMs of one host at a time; further ones wait for their turn.
pub const AT_ONCE: usize = 2;
/// VMs that a schedule can name.
pub const MOST_VMS: usize = 1_000;
/// How late a run may begin, if nothing else was said: a day.
pub const CATCH_UP: Millis = Millis(24 * 3_600_000);

const SHORTEST_CATCH_UP: Millis = Millis(60_000);
const LONGEST_CATCH_UP: Millis = Millis(31 * 24 * 3_600_000);
/// What `zone` is, if nothing else was said.
const UTC: &str = "UTC";

/// What a schedule says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ScheduleSpec {
    /// The VMs, by name. None: those that have the labels.
    #[serde(default)]
    pub vms: BTreeSet<Name>,
    /// What the VMs' labels must be, at least, where none are named; none are every VM's of the team.
    #[serde(default)]
    pub labels: BTreeMap<Name, String>,
    /// When: minute, hour, day of the month, month, day of the week, as cron has them; or `@hourly`, `@daily`, `@weekly`, `@monthly`, `@yearly`.
    #[schema(example = "30 2 * * *")]
    pub when: String,
    /// The time zone of `when` and of the days that retention counts, by its name in the IANA database; `UTC` by default.
    #[serde(default = "utc")]
    #[schema(example = "Europe/Berlin")]
    pub zone: String,
    /// With RAM and devices; without, a VM boots from its disks. True by default.
    #[serde(default = "yes")]
    pub memory: bool,
    /// The guest's file systems are brought to rest first, which may take this long, at most a minute. Takes a guest agent.
    #[serde(default)]
    pub quiesce: Option<Millis>,
    /// The pool that is to hold them; by default that of the VM's first disk, else the host's first shared one, else its first.
    #[serde(default)]
    pub pool: Option<Name>,
    /// How late a run may begin that was missed, since the controller or the VM's host was away; a day by default. Only the newest one that was missed is made up.
    #[serde(default = "catch_up")]
    pub catch_up: Millis,
    /// Which of its snapshots are kept; without any rule all of them are.
    #[serde(default)]
    pub keep: Retention,
    /// Whether it runs by itself. True by default.
    #[serde(default = "yes")]
    pub enabled: bool,
}

fn utc() -> String {
    UTC.to_owned()
}

const fn yes() -> bool {
    true
}

const fn catch_up() -> Millis {
    CATCH_UP
}

impl ScheduleSpec {
    /// One for every VM of a team, with the defaults.
    #[must_use]
    pub fn new(when: impl Into<String>) -> Self {
        Self {
            vms: BTreeSet::new(),
            labels: BTreeMap::new(),
            when: when.into(),
            zone: utc(),
            memory: true,
            quiesce: None,
            pool: None,
            catch_up: CATCH_UP,
            keep: Retention::default(),
            enabled: true,
        }
    }

    /// Whether it is said of a VM with this name and these labels.
    #[must_use]
    pub fn is_of(&self, name: &Name, labels: &BTreeMap<Name, String>) -> bool {
        if self.vms.is_empty() {
            return self.labels.iter().all(|(key, text)| labels.get(key) == Some(text));
        }
        self.vms.contains(name)
    }

    /// What can be checked without a time zone's rules; [`Timetable::new`] does the rest.
    ///
    /// # Errors
    /// `bad_request`, with the fix.
    pub fn check(&self) -> Result<(), Refusal> {
        let bad = |message: String, hint: &str| Err(Refusal::new(ErrorCode::BadRequest, message).hint(hint));
        check_labels(&self.labels)?;
        if !self.vms.is_empty() && !self.labels.is_empty() {
            return bad("a schedule is for VMs that it names, or for those with certain labels".into(), "say one of the two");
        }
        if self.vms.len() > MOST_VMS {
            return bad(format!("a schedule names at most {MOST_VMS} VMs"), "give the VMs a label, and name that");
        }
        if self.quiesce.is_some_and(|quiesce| quiesce == Millis(0) || quiesce > LONGEST_QUIESCE) {
            return bad(
                format!("a guest is brought to rest within at most {LONGEST_QUIESCE}"),
                "give it between 1 ms and that, or leave it out",
            );
        }
        if !(SHORTEST_CATCH_UP..=LONGEST_CATCH_UP).contains(&self.catch_up) {
            return bad("a run can begin 1 minute to 31 days late".into(), "choose a catch_up between them; a day is the default");
        }
        self.keep.check()
    }
}

#[cfg(test)]
mod tests;
