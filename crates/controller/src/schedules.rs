//! Schedules: their time zones, and which of their snapshots go. Pure but for the machine's database of time zones.

use godwit_api::v1::SnapshotState;
use godwit_model::schedule::{Timetable, plan_retention};
use godwit_model::{ErrorCode, Name, Refusal, ScheduleId, ScheduleSpec, UnixMillis, VmId};
use jiff::tz::{TimeZone, TimeZoneDatabase};

use crate::rows::SnapshotRow;

/// Schedules that a team can have.
pub(crate) const MOST: usize = 100;
/// Longest name of a time zone.
const LONGEST: usize = 64;

/// Who is recorded as having asked for what a schedule does.
pub(crate) fn principal(schedule: &Name) -> String {
    format!("schedule {schedule}")
}

/// A time zone, as the machine knows it, else as it was when this was built.
fn zone(name: &str) -> Result<TimeZone, Refusal> {
    let known = || TimeZone::get(name).or_else(|_| TimeZoneDatabase::bundled().get(name)).ok();
    let is_name = name.len() <= LONGEST && name.chars().all(|c| c.is_ascii_alphanumeric() || "/_+-".contains(c));
    is_name.then(known).flatten().ok_or_else(|| {
        let shown: String = name.chars().take(LONGEST).collect();
        Refusal::new(ErrorCode::BadRequest, format!("there is no time zone {shown}"))
            .hint("give its name in the IANA database, such as Europe/Berlin, or UTC; `timedatectl list-timezones` lists them")
    })
}

/// When a schedule that says this runs.
pub(crate) fn timetable(spec: &ScheduleSpec) -> Result<Timetable, Refusal> {
    Timetable::new(&spec.when, zone(&spec.zone)?)
}

/// Whether a schedule can say this.
pub(crate) fn check(spec: &ScheduleSpec) -> Result<(), Refusal> {
    spec.check()?;
    timetable(spec).map(|_| ())
}

/// What a schedule has taken of a VM, the oldest first. What is golden is somebody's own.
pub(crate) fn taken_by<'a>(schedule: ScheduleId, vm: VmId, all: impl IntoIterator<Item = &'a SnapshotRow>) -> Vec<&'a SnapshotRow> {
    let own = |row: &&SnapshotRow| row.schedule == Some(schedule) && row.vm == vm && !row.golden;
    let mut own: Vec<&SnapshotRow> = all.into_iter().filter(own).collect();
    own.sort_by_key(|row| (row.created, row.id));
    own
}

/// Which of these go, the oldest first; with another one that is to come, once it is there. What did not come to be, or is half deleted, goes when there
/// is a good one after it, and counts for nothing.
pub(crate) fn expired<'a>(
    spec: &ScheduleSpec,
    own: &[&'a SnapshotRow],
    coming: Option<UnixMillis>,
) -> Result<Vec<&'a SnapshotRow>, Refusal> {
    if spec.keep.keeps_all() {
        return Ok(Vec::new());
    }
    let ready: Vec<&SnapshotRow> = own.iter().copied().filter(|row| row.state == SnapshotState::Ready).collect();
    let times: Vec<UnixMillis> = ready.iter().map(|row| row.created).chain(coming).collect();
    let kept = plan_retention(&times, &spec.keep, &zone(&spec.zone)?);
    let kept: Vec<&SnapshotRow> = ready.iter().zip(kept).filter(|(_, kept)| *kept).map(|(row, _)| *row).collect();
    let newest = times.iter().max();
    let goes = |row: &&SnapshotRow| match row.state {
        SnapshotState::Ready => !kept.iter().any(|kept| kept.id == row.id),
        SnapshotState::Failed | SnapshotState::Deleting => newest.is_some_and(|newest| row.created < *newest),
        SnapshotState::Taking => false,
    };
    Ok(own.iter().copied().filter(goes).collect())
}

#[cfg(test)]
mod tests {
    use godwit_model::Retention;

    use super::*;

    #[test]
    fn a_zone_is_known_by_its_name_only() {
        for known in ["UTC", "Europe/Berlin", "US/Eastern", "America/Argentina/Buenos_Aires", "Etc/GMT+5"] {
            assert!(zone(known).is_ok(), "{known}");
        }
        for unknown in ["", "Mars/Olympus", "../../etc/passwd", "Europe/Berlin\u{7}", &"x".repeat(99), "CET-1CEST", "+02:00"] {
            let refusal = zone(unknown).expect_err(unknown);
            assert!(refusal.code == ErrorCode::BadRequest && refusal.hint.is_some(), "{refusal}");
        }
        let named = |when: &str, zone: &str| ScheduleSpec { zone: zone.into(), ..ScheduleSpec::new(when) };
        assert!(check(&named("@daily", "Asia/Tokyo")).is_ok());
        assert!(check(&named("@daily", "Asia/Nowhere")).is_err() && check(&named("0 0 31 4 *", "Asia/Tokyo")).is_err());
    }

    #[test]
    fn only_good_ones_count_and_others_go_behind_a_good_one() {
        let keep = Retention { last: Some(2), ..Retention::default() };
        let spec = ScheduleSpec { keep, ..ScheduleSpec::new("@daily") };
        let (schedule, vm) = (ScheduleId::new(uuid::Uuid::from_u128(1)), VmId::new(uuid::Uuid::nil()));
        let row = |number: u64, state| SnapshotRow {
            name: Name::new(format!("s{number}")).expect("name"),
            id: godwit_model::SnapshotId::new(uuid::Uuid::from_u128(number.into())),
            created: UnixMillis(number),
            state,
            schedule: Some(schedule),
            vm,
            ..crate::clones::tests::snapshot()
        };
        use SnapshotState as S;
        let rows = [
            row(1, S::Ready),
            row(2, S::Failed),
            row(3, S::Ready),
            row(4, S::Deleting),
            row(5, S::Ready),
            row(6, S::Failed),
            row(7, S::Taking),
        ];
        let names = |spec: &ScheduleSpec, rows: &[SnapshotRow], coming| {
            let own = taken_by(schedule, vm, rows);
            let goes = expired(spec, &own, coming).expect("a zone");
            goes.iter().map(|row| row.name.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(names(&spec, &rows, None), ["s1", "s2", "s4"]);
        assert_eq!(names(&spec, &rows, Some(UnixMillis(8))), ["s1", "s2", "s3", "s4", "s6"]);
        assert_eq!(names(&ScheduleSpec::new("@daily"), &rows, None), [] as [&str; 0]);
        // Those of others, of other VMs, and golden ones do not even count.
        let mut others = rows.clone();
        others[0].schedule = None;
        others[2].golden = true;
        others[4].vm = VmId::new(uuid::Uuid::from_u128(9));
        assert_eq!(names(&spec, &others, None), [] as [&str; 0]);
        // However many failed: the newest good one stays.
        let failed: Vec<SnapshotRow> = rows.iter().take(1).cloned().chain((10..30).map(|number| row(number, S::Failed))).collect();
        assert_eq!(names(&ScheduleSpec { keep: Retention { last: Some(1), ..keep }, ..spec }, &failed, None), [] as [&str; 0]);
    }
}
