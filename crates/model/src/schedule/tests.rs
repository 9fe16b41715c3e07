//! Instants against a count of every minute, retention against what it promises.

use jiff::civil::{DateTime, date};
use jiff::tz::{TimeZone, TimeZoneDatabase};
use proptest::prelude::*;

use super::*;
use crate::UnixMillis;

const MINUTE: u64 = 60_000;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

fn zone(name: &str) -> TimeZone {
    TimeZoneDatabase::bundled().get(name).expect("a zone")
}

/// As `2026-03-29T00:30:00Z`.
fn at(text: &str) -> UnixMillis {
    let at: jiff::Timestamp = text.parse().expect("a moment");
    UnixMillis(u64::try_from(at.as_millisecond()).expect("after 1970"))
}

fn shown(at: UnixMillis, zone: &TimeZone) -> DateTime {
    retention::local(at, zone).expect("within the calendar")
}

fn table(when: &str, zone_name: &str) -> Timetable {
    Timetable::new(when, zone(zone_name)).expect("an expression")
}

/// The instants between two moments.
fn runs(when: &str, zone_name: &str, from: &str, until: &str) -> Vec<String> {
    let (table, mut now, until) = (table(when, zone_name), at(from), at(until));
    let mut found = Vec::new();
    while let Some(next) = table.next(now).filter(|next| *next <= until) {
        found.push(shown(next, &TimeZone::UTC).strftime("%d %H:%M").to_string());
        now = next;
    }
    found
}

#[test]
fn what_does_not_exist_runs_once_after_the_gap_and_what_exists_twice_once() {
    let spring = |when| runs(when, "Europe/Berlin", "2026-03-28T12:00:00Z", "2026-03-30T12:00:00Z");
    assert_eq!(spring("30 2 * * *"), ["29 01:00", "30 00:30"]);
    assert_eq!(spring("*/20 2 * * *"), ["29 01:00", "30 00:00", "30 00:20", "30 00:40"]);
    assert_eq!(spring("0 2,3 * * *"), ["29 01:00", "30 00:00", "30 01:00"], "one instant, one run");
    let autumn = |when| runs(when, "Europe/Berlin", "2026-10-24T12:00:00Z", "2026-10-26T12:00:00Z");
    assert_eq!(autumn("30 2 * * *"), ["25 00:30", "26 01:30"]);
    assert_eq!(autumn("0,30 2 * * *"), ["25 00:00", "25 00:30", "26 01:00", "26 01:30"]);
    assert_eq!(autumn("0 3 * * *"), ["25 02:00", "26 02:00"]);
    // Half an hour, at midnight, and a day that one place left out.
    assert_eq!(runs("45 1 * * *", "Australia/Lord_Howe", "2026-04-03T20:00:00Z", "2026-04-05T20:00:00Z"), ["04 14:45", "05 15:15"]);
    assert_eq!(runs("15 0 * * *", "America/Havana", "2026-03-07T12:00:00Z", "2026-03-09T12:00:00Z"), ["08 05:00", "09 04:15"]);
    assert_eq!(
        runs("0 3 * * *", "Pacific/Apia", "2011-12-29T00:00:00Z", "2011-12-31T12:00:00Z"),
        ["29 13:00", "30 10:00", "30 13:00"]
    );
}

#[test]
fn the_calendar_is_known() {
    let year = |when| runs(when, "UTC", "2026-11-15T00:00:00Z", "2027-03-15T00:00:00Z");
    assert_eq!(year("0 4 L * *"), ["30 04:00", "31 04:00", "31 04:00", "28 04:00"]);
    assert_eq!(year("0 4 * * FRI#1"), ["04 04:00", "01 04:00", "05 04:00", "05 04:00"]);
    assert_eq!(year("@monthly"), ["01 00:00", "01 00:00", "01 00:00", "01 00:00"]);
    assert_eq!(year("0 12 13 * +FRI"), [] as [&str; 0]);
    let leap = table("0 0 29 2 *", "UTC");
    assert_eq!(leap.next(at("2096-03-01T00:00:00Z")), Some(at("2104-02-29T00:00:00Z")));
}

#[test]
fn what_is_no_expression_or_never_comes_to_pass_is_refused_with_the_fix() {
    let refused = |when: &str| {
        let refusal = Timetable::new(when, TimeZone::UTC).expect_err(when);
        assert!(refusal.code == ErrorCode::BadRequest && refusal.hint.is_some_and(|hint| hint.contains("30 2 * * *")), "{when}");
        refusal.message
    };
    for when in [
        "",
        "x",
        "* * * *",
        "0 0 * * * *",
        "60 * * * *",
        "0 0 0 * *",
        "* * * * * * *",
        "0 3 * * * Europe/Berlin",
        "@never",
        ", * * * *",
        "0 3 ,5 * *",
        "\u{1b}",
    ] {
        refused(when);
    }
    assert!(refused("0 0 30 2 *").contains("never comes to pass"));
    assert!(refused(&"*".repeat(201)).contains("at most 200"));
}

#[test]
fn of_what_was_missed_the_newest_is_made_up_once_if_it_is_not_too_old() {
    let nightly = table("30 2 * * *", "UTC");
    let due = |handled, now, catch_up| nightly.decide_due(at(handled), at(now), Millis(catch_up));
    let next = |text| Due::Later(Some(at(text)));
    assert_eq!(due("2026-11-20T02:30:00Z", "2026-11-20T12:00:00Z", HOUR), next("2026-11-21T02:30:00Z"));
    assert_eq!(due("2026-11-20T02:30:00Z", "2026-11-21T02:30:00Z", HOUR), Due::Run(at("2026-11-21T02:30:00Z")));
    assert_eq!(due("2026-11-20T02:30:00Z", "2026-11-21T03:30:00Z", HOUR), Due::Run(at("2026-11-21T02:30:00Z")));
    assert_eq!(due("2026-11-20T02:30:00Z", "2026-11-21T03:30:01Z", HOUR), Due::Missed(at("2026-11-21T02:30:00Z")));
    assert_eq!(due("2026-11-20T02:30:00Z", "2026-11-27T02:00:00Z", DAY), Due::Run(at("2026-11-26T02:30:00Z")));
    assert_eq!(due("2026-11-27T02:30:00Z", "2026-11-27T02:29:59Z", DAY), next("2026-11-28T02:30:00Z"));
    // A clock that was a year ahead.
    assert_eq!(due("2027-11-27T02:30:00Z", "2026-11-27T12:00:00Z", DAY), next("2026-11-28T02:30:00Z"));
    let each_minute = table("* * * * *", "UTC");
    let due = each_minute.decide_due(at("2020-01-01T00:00:00Z"), at("2026-11-27T12:00:30Z"), Millis(MINUTE));
    assert_eq!(due, Due::Run(at("2026-11-27T12:00:00Z")));
}

#[test]
fn a_schedule_is_of_the_vms_that_it_names_or_of_those_with_its_labels() {
    let name = |text: &str| Name::new(text).expect("a name");
    let labels = |key: &str, text: &str| BTreeMap::from([(name(key), text.to_owned())]);
    let (web, db) = (labels("tier", "web"), labels("tier", "db"));
    let all = ScheduleSpec::new("@daily");
    assert!(all.is_of(&name("a"), &web) && all.check().is_ok());
    let named = ScheduleSpec { vms: BTreeSet::from([name("a")]), ..all.clone() };
    assert!(named.is_of(&name("a"), &web) && !named.is_of(&name("b"), &web));
    let labelled = ScheduleSpec { labels: db.clone(), ..all.clone() };
    assert!(labelled.is_of(&name("a"), &db) && !labelled.is_of(&name("a"), &web));
    let bad = [
        ScheduleSpec { labels: db, ..named },
        ScheduleSpec { quiesce: Some(Millis(0)), ..all.clone() },
        ScheduleSpec { quiesce: Some(Millis(60_001)), ..all.clone() },
        ScheduleSpec { catch_up: Millis(59_999), ..all.clone() },
        ScheduleSpec { keep: Retention { daily: Some(0), ..Retention::default() }, ..all.clone() },
        ScheduleSpec { keep: Retention { last: Some(1_001), ..Retention::default() }, ..all },
    ];
    for spec in bad {
        let refusal = spec.check().expect_err("it says nothing sensible");
        assert!(refusal.code == ErrorCode::BadRequest && refusal.hint.is_some(), "{refusal}");
    }
}

#[test]
fn the_newest_of_each_period_is_kept_by_the_calendar_of_the_zone() {
    let taken = ["25T22:30", "26T09:00", "26T22:30", "26T23:30", "27T08:00"].map(|text| at(&format!("2026-11-{text}:00Z")));
    let kept = |keep: Retention, name: &str| plan_retention(&taken, &keep, &zone(name));
    let daily = Retention { daily: Some(2), ..Retention::default() };
    assert_eq!(kept(daily, "UTC"), [false, false, false, true, true]);
    assert_eq!(kept(daily, "Europe/Berlin"), [false, false, true, false, true], "there the 27th begins an hour earlier");
    assert_eq!(kept(Retention::default(), "UTC"), [true; 5]);
    assert_eq!(kept(Retention { last: Some(1), ..daily }, "UTC"), [false, false, false, true, true]);
    assert_eq!(kept(Retention { last: Some(3), ..daily }, "UTC"), [false, false, true, true, true]);
    assert_eq!(kept(Retention { weekly: Some(5), ..Retention::default() }, "UTC"), [false, false, false, false, true]);
    // A Sunday, and the Monday after it; the last week of one year has days of the next.
    let weeks = ["2026-12-27T12:00:00Z", "2026-12-28T12:00:00Z", "2027-01-03T12:00:00Z", "2027-01-04T12:00:00Z"].map(at);
    let weekly = plan_retention(&weeks, &Retention { weekly: Some(9), ..Retention::default() }, &TimeZone::UTC);
    assert_eq!(weekly, [true, false, true, true]);
    assert_eq!(plan_retention(&[], &daily, &TimeZone::UTC), [] as [bool; 0]);
}

const ZONES: [&str; 6] = ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Havana", "Asia/Kolkata"];

/// An instant for each time that clocks show and the expression means: the first minute at which they show it or more, without going back behind it.
fn by_counting(cron: &croner::Cron, zone: &TimeZone, from: UnixMillis, days: u64) -> BTreeSet<UnixMillis> {
    let minutes: Vec<(UnixMillis, DateTime)> = (0..days * 1_440)
        .map(|minute| UnixMillis(from.get() + minute * MINUTE))
        .map(|minute| (minute, shown(minute, zone)))
        .collect();
    let first = minutes.first().expect("some").1;
    let last = minutes.last().expect("some").1;
    let mut wanted = first;
    let mut found = BTreeSet::new();
    while wanted < last {
        wanted = wanted.checked_add(jiff::SignedDuration::from_mins(1)).expect("within the calendar");
        if cron.is_time_matching(&TimeZone::UTC.to_zoned(wanted).expect("UTC")).expect("a calendar's day")
            && let Some((at, _)) = minutes.iter().find(|(_, shown)| *shown >= wanted)
        {
            found.insert(*at);
        }
    }
    found
}

fn expression() -> impl Strategy<Value = String> {
    let minute = prop_oneof![Just("*".to_owned()), (0..60_u8).prop_map(|m| m.to_string()), Just("*/7".into()), Just("5,35".into())];
    let hour = prop_oneof![Just("*".to_owned()), (0..24_u8).prop_map(|h| h.to_string()), Just("0-3".into()), Just("*/2".into())];
    let day = prop_oneof![3 => Just("* * *"), 1 => Just("* * SUN"), 1 => Just("L * *"), 1 => Just("*/2 * *")];
    (minute, hour, day).prop_map(|(minute, hour, day)| format!("{minute} {hour} {day}"))
}

/// Days on which clocks of one of the zones change, and others.
fn start() -> impl Strategy<Value = UnixMillis> {
    let days = [
        date(2026, 3, 7),
        date(2026, 3, 28),
        date(2026, 4, 4),
        date(2026, 10, 3),
        date(2026, 10, 24),
        date(2026, 10, 31),
        date(2026, 7, 1),
    ];
    (prop::sample::select(days.to_vec()), 0..1_440_u64).prop_map(|(day, minute)| {
        let midnight = TimeZone::UTC.to_timestamp(day.at(0, 0, 0, 0)).expect("a day").as_millisecond();
        UnixMillis(u64::try_from(midnight).expect("after 1970") + minute * MINUTE)
    })
}

fn rules() -> impl Strategy<Value = Retention> {
    let rule = || prop::option::of(1..6_u32);
    (rule(), rule(), rule(), rule(), rule(), rule()).prop_map(|(last, hourly, daily, weekly, monthly, yearly)| Retention {
        last,
        hourly,
        daily,
        weekly,
        monthly,
        yearly,
    })
}

/// Some years of irregular snapshots.
fn taken() -> impl Strategy<Value = Vec<UnixMillis>> {
    let gap = prop_oneof![3 => 1..3 * HOUR, 2 => HOUR..3 * DAY, 1 => DAY..100 * DAY];
    prop::collection::vec(gap, 0..60).prop_map(|gaps| {
        let mut now = at("2024-01-01T00:00:00Z").get();
        gaps.into_iter()
            .map(|gap| {
                now += gap;
                UnixMillis(now)
            })
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn prop_instants_are_those_that_counting_every_minute_finds(when in expression(), zone_name in prop::sample::select(ZONES.to_vec()), from in start()) {
        let (zone, table) = (zone(zone_name), table(&when, zone_name));
        let counted = by_counting(&when.parse().expect("an expression"), &zone, from, 3);
        // What clocks show at the edges is only half in the count.
        let (begin, end) = (UnixMillis(from.get() + 3 * HOUR), UnixMillis(from.get() + 3 * DAY - 3 * HOUR));
        let mut found = BTreeSet::new();
        let mut now = begin;
        while let Some(next) = table.next(now).filter(|next| *next < end) {
            prop_assert!(next > now);
            found.insert(next);
            now = next;
        }
        let counted: BTreeSet<UnixMillis> = counted.into_iter().filter(|at| *at > begin && *at < end).collect();
        prop_assert_eq!(found, counted, "{} in {}", when, zone_name);
    }

    #[test]
    fn prop_every_instant_is_handled_once_however_often_one_looks(when in expression(), zone_name in prop::sample::select(ZONES.to_vec()), from in start(), steps in prop::collection::vec(1..5 * HOUR, 1..40)) {
        let table = table(&when, zone_name);
        let (mut handled, mut now) = (from, from);
        let mut run = BTreeSet::new();
        for step in steps {
            now = UnixMillis(now.get() + step);
            match table.decide_due(handled, now, Millis(2 * HOUR)) {
                Due::Later(next) => prop_assert!(next.is_none_or(|next| next > now)),
                Due::Run(instant) => {
                    prop_assert!(instant > handled && instant <= now && now.get() - instant.get() <= 2 * HOUR);
                    prop_assert!(table.next(instant).is_none_or(|next| next > now), "the newest");
                    prop_assert!(run.insert(instant));
                    handled = instant;
                }
                Due::Missed(instant) => {
                    prop_assert!(instant > handled && now.get() - instant.get() > 2 * HOUR);
                    handled = instant;
                }
            }
            let again = table.decide_due(handled, now, Millis(2 * HOUR));
            prop_assert!(matches!(again, Due::Later(_)), "once");
        }
    }

    #[test]
    fn prop_retention_keeps_the_newest_and_no_more_than_its_rules_say(taken in taken(), keep in rules(), zone_name in prop::sample::select(ZONES.to_vec())) {
        let zone = zone(zone_name);
        let kept = plan_retention(&taken, &keep, &zone);
        prop_assert_eq!(kept.len(), taken.len());
        if let Some(newest) = kept.last() {
            prop_assert!(newest, "the newest is kept");
        }
        let count = kept.iter().filter(|kept| **kept).count();
        let most: usize = keep.said().map(|(_, count)| count as usize).sum();
        prop_assert!(keep.keeps_all() && count == taken.len() || count <= most);
        prop_assert!(count >= taken.len().min(keep.last.unwrap_or(0) as usize));
        // Deleting what goes, in any order and as far as it comes, changes nothing of what is kept.
        let half: Vec<(UnixMillis, bool)> =
            taken.iter().copied().zip(kept.iter().copied()).enumerate().filter(|(index, (_, kept))| *kept || index % 3 == 0).map(|(_, one)| one).collect();
        let left: Vec<UnixMillis> = half.iter().map(|(at, _)| *at).collect();
        let still: Vec<bool> = half.iter().map(|(_, kept)| *kept).collect();
        prop_assert_eq!(plan_retention(&left, &keep, &zone), still);
        // The order in which they are named does not matter.
        let mut turned = taken.clone();
        turned.reverse();
        let mut turned = plan_retention(&turned, &keep, &zone);
        turned.reverse();
        prop_assert_eq!(&turned, &kept);
        // One rule more keeps no less.
        let more = plan_retention(&taken, &Retention { last: Some(keep.last.unwrap_or(0) + 3), ..keep }, &zone);
        if !keep.keeps_all() {
            prop_assert!(kept.iter().zip(&more).all(|(kept, more)| !kept || *more));
        }
    }

    #[test]
    fn prop_each_rule_keeps_the_newest_of_its_newest_periods(taken in taken(), count in 1..6_u32) {
        let zone = zone("Europe/Berlin");
        let kept = plan_retention(&taken, &Retention { daily: Some(count), ..Retention::default() }, &zone);
        let mut days: BTreeMap<jiff::civil::Date, UnixMillis> = BTreeMap::new();
        for at in &taken {
            days.insert(shown(*at, &zone).date(), *at);
        }
        let expected: BTreeSet<UnixMillis> = days.into_values().rev().take(count as usize).collect();
        let kept: BTreeSet<UnixMillis> = taken.iter().zip(kept).filter(|(_, kept)| *kept).map(|(at, _)| *at).collect();
        prop_assert_eq!(kept, expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn prop_no_text_breaks_the_reading_of_an_expression(text in "[-0-9A-Z*/,#+?@ ]{0,30}|\\PC{0,30}", after in 0..at("2100-01-01T00:00:00Z").get()) {
        if let Ok(table) = Timetable::new(&text, zone("Europe/Berlin")) {
            prop_assert!(table.next(UnixMillis(after)).is_some_and(|next| next.get() > after));
        }
    }
}
