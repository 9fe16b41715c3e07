//! Which of several places counts, what is ruled out, what is refused, and how it is written.

use proptest::prelude::*;

use super::*;

fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<Name, String> {
    pairs.iter().map(|(key, text)| (name(key), (*text).to_owned())).collect()
}

fn blackout(ms: u64) -> MigrationSettings {
    MigrationSettings { max_blackout: Some(Millis(ms)), ..MigrationSettings::default() }
}

fn ladder(rungs: &[Rung]) -> Ladder {
    Ladder::try_from(rungs.to_vec()).expect("a ladder")
}

#[test]
fn what_is_nearest_to_the_migration_counts() {
    let (all, db, big) = (labels(&[]), labels(&[("tier", "db")]), labels(&[("size", "big"), ("tier", "db")]));
    let (a, b, c, d) = (name("a-all"), name("b-db"), name("c-big"), name("d-db"));
    let patient = MigrationSettings { patience: Some(Millis(7)), bandwidth: Some(BytesPerSec(9)), ..blackout(1) };
    let policies = [
        Labelled { name: &d, labels: &db, limits: MigrationSettings { timeout: Some(Millis(5)), ..blackout(4) } },
        Labelled { name: &a, labels: &all, limits: patient },
        Labelled { name: &b, labels: &db, limits: blackout(2) },
        Labelled { name: &c, labels: &big, limits: blackout(3) },
    ];
    let nothing = MigrationSettings::default();
    let found = |asked, own: &MigrationSettings, vm: &[(&str, &str)]| {
        let settled = settle(asked, own, &labels(vm), &policies).expect("settled");
        (settled.policy.max_blackout.get(), settled.told)
    };
    let db_and_more = [("tier", "db"), ("x", "y")];
    assert_eq!(found(blackout(6), &blackout(5), &db_and_more).0, 6, "the request");
    assert_eq!(found(nothing, &blackout(5), &db_and_more).0, 5, "the VM");
    assert_eq!(found(nothing, &nothing, &[("tier", "db"), ("size", "big")]).0, 3, "most labels");
    assert_eq!(found(nothing, &nothing, &[("tier", "web")]).0, 1, "only the one of all");
    let (first, told) = found(nothing, &nothing, &db_and_more);
    assert_eq!(first, 2, "the first by name");
    assert_eq!(told, ["policy b-db: max_blackout", "policy d-db: timeout", "policy a-all: bandwidth, patience"]);
    let settled = settle(nothing, &nothing, &labels(&db_and_more), &policies).expect("settled").policy;
    let expected = MigrationPolicy {
        max_blackout: Millis(2),
        timeout: Millis(5),
        bandwidth: Some(BytesPerSec(9)),
        patience: Millis(7),
        ..MigrationPolicy::default()
    };
    assert_eq!(settled, expected);
}

#[test]
fn post_copy_that_is_ruled_out_stays_ruled_out() {
    let never = MigrationSettings { postcopy: Some(PostCopy::Never), ..MigrationSettings::default() };
    let (strict, none) = (name("strict"), labels(&[]));
    let policies = [Labelled { name: &strict, labels: &none, limits: never }];
    let nothing = MigrationSettings::default();
    let now = MigrationSettings { postcopy: Some(PostCopy::Now), ..nothing };
    let on_miss = MigrationSettings { on_miss: Some(ladder(&[Rung::Throttle, Rung::Postcopy])), ..nothing };
    for asked in [now, on_miss] {
        let refusal = settle(asked, &nothing, &none, &policies).expect_err("ruled out");
        assert!(refusal.code == ErrorCode::NotPermitted && refusal.message.contains("policy strict"), "{refusal}");
        assert_eq!(settle(asked, &never, &none, &[]).expect_err("ruled out").code, ErrorCode::NotPermitted);
    }
    // What a VM or another policy would have done if nobody had ruled it out is left out.
    for own in [now, on_miss] {
        let policy = settle(nothing, &own, &none, &policies).expect("without").policy;
        assert!(!policy.prepares_postcopy(), "{policy:?}");
    }
    let told = settle(nothing, &on_miss, &none, &policies).expect("without").told;
    assert_eq!(told, ["the VM's own settings: on_miss", "policy strict: post-copy never, so it is left out of on_miss"]);
    let told =
        settle(nothing, &MigrationSettings { postcopy: Some(PostCopy::Ready), ..nothing }, &none, &policies).expect("without").told;
    assert_eq!(told.last().map(String::as_str), Some("policy strict: post-copy never"));
    let only = MigrationSettings { on_miss: Some(Ladder::only(Rung::Postcopy)), ..nothing };
    let policy = settle(nothing, &only, &none, &policies).expect("without").policy;
    assert_eq!(policy.on_miss, Ladder::default(), "there is always a rung");
    let ask = MigrationSettings { on_miss: Some(Ladder::only(Rung::Ask)), ..nothing };
    assert!(!settle(ask, &nothing, &none, &policies).expect("may ask").policy.prepares_postcopy());
}

#[test]
fn limits_that_no_migration_could_keep_are_refused() {
    type Say = fn(&mut MigrationSettings, Millis);
    let nothing = MigrationSettings::default();
    let said = |change: Say, ms| {
        let mut settings = nothing;
        change(&mut settings, Millis(ms));
        settings.check().is_ok()
    };
    let bounds: [(Say, u64, u64); 5] = [
        (|settings, time| settings.max_blackout = Some(time), 1, LONGEST),
        (|settings, time| settings.timeout = Some(time), 1_000, LONGEST),
        (|settings, time| settings.stall = Some(time), 1_000, LONGEST),
        (|settings, time| settings.stop_limit = Some(time), 500, LONGEST_STOP),
        (|settings, time| settings.patience = Some(time), 0, LONGEST),
    ];
    for (change, least, most) in bounds {
        assert!(said(change, least) && said(change, most) && !said(change, most + 1) && !said(change, u64::MAX));
        assert!(least == 0 || !said(change, least - 1));
    }
    assert!(nothing.check().is_ok() && MigrationSettings::from(MigrationPolicy::default()).check().is_ok());
}

#[test]
fn what_is_not_said_is_not_written() {
    assert_eq!(serde_json::to_string(&MigrationSettings::default()).expect("text"), "{}");
    let said = r#"{"max_blackout":100,"on_miss":["throttle","postcopy"],"postcopy":"never"}"#;
    let read: MigrationSettings = serde_json::from_str(said).expect("settings");
    assert_eq!(serde_json::to_string(&read).expect("text"), said);
    assert!(serde_json::from_str::<MigrationSettings>(r#"{"blackout":100}"#).is_err(), "a misspelt limit is no limit");
}

proptest! {
    #[test]
    fn prop_a_request_that_says_all_is_what_counts(ms in any::<u64>(), rate in prop::option::of(any::<u64>()), own in any::<u64>()) {
        let policy = MigrationPolicy { max_blackout: Millis(ms), bandwidth: rate.map(BytesPerSec), ..MigrationPolicy::default() };
        let own = MigrationSettings { timeout: Some(Millis(own)), ..blackout(own) };
        let settled = settle(policy.into(), &own, &labels(&[]), &[]).expect("settled");
        prop_assert_eq!(settled.policy, policy);
        prop_assert!(settled.told.is_empty());
    }
}
