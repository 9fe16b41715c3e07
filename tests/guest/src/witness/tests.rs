//! One runner over any network is quiet; two runners are not.

use proptest::prelude::*;

use super::*;

fn record(counter: u64, nonce: u64) -> WitnessRecord {
    WitnessRecord { id: "web1".to_owned(), boot: 7, generation: 0, counter, nonce, monotonic: Duration::from_millis(counter * 10) }
}

fn heard(records: impl IntoIterator<Item = WitnessRecord>) -> VmWitness {
    let mut log = WitnessLog::new();
    for (step, record) in records.into_iter().enumerate() {
        log.consume(&record, Duration::from_millis(step as u64 * 10));
    }
    log.vm("web1").unwrap().clone()
}

#[test]
fn golden_bytes_of_version_1() {
    let record = WitnessRecord {
        id: "web1".to_owned(),
        boot: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10,
        generation: 2,
        counter: 3,
        nonce: 0xfeed,
        monotonic: Duration::from_nanos(5),
    };
    let expected = b"GWIT\x01\x04web1\x10\x0f\x0e\x0d\x0c\x0b\x0a\x09\x08\x07\x06\x05\x04\x03\x02\x01\
        \x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\xed\xfe\0\0\0\0\0\0\x05\0\0\0\0\0\0\0";
    assert_eq!(record.encode(), expected);
    assert_eq!(WitnessRecord::decode(expected), Ok(record));
}

#[test]
fn every_truncation_and_every_addition_is_refused() {
    let bytes = record(1, 2).encode();
    for length in 0..bytes.len() {
        assert!(WitnessRecord::decode(&bytes[..length]).is_err());
    }
    assert!(WitnessRecord::decode(&[bytes.as_slice(), b"x"].concat()).is_err());
    let mut newer = bytes.clone();
    newer[4] = 2;
    assert_eq!(WitnessRecord::decode(&newer), Err(RecordError::Version { found: 2 }));
    let mut long = bytes;
    long[5] = 65;
    assert_eq!(WitnessRecord::decode(&long), Err(RecordError::Id));
}

proptest! {
    #[test]
    fn decoding_anything_does_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = WitnessRecord::decode(&bytes);
        let mut with_head = b"GWIT\x01".to_vec();
        with_head.extend(bytes);
        let mut log = WitnessLog::new();
        log.consume_datagram(&with_head, Duration::ZERO);
    }

    #[test]
    fn what_is_encoded_is_decoded(id in "[a-z0-9ö]{0,40}", boot: u128, numbers: [u64; 4]) {
        let [generation, counter, nonce, time] = numbers;
        let record = WitnessRecord { id, boot, generation, counter, nonce, monotonic: Duration::from_nanos(time) };
        prop_assert_eq!(WitnessRecord::decode(&record.encode()), Ok(record));
    }

    /// Loss, exact duplicates and reordering within the window: whatever a network does to one runner.
    #[test]
    fn one_runner_is_never_interleaved(
        fates in proptest::collection::vec((0_u64..200, 0_u8..20), 1..600),
    ) {
        let mut arrivals = Vec::new();
        for (counter, (delay, fate)) in fates.iter().enumerate() {
            let counter = counter as u64;
            match fate {
                0 => {}
                1 => arrivals.extend([(counter, counter), (counter + delay, counter)]),
                2 => arrivals.push((counter + delay, counter)),
                _ => arrivals.push((counter, counter)),
            }
        }
        arrivals.sort();
        let mut log = WitnessLog::new();
        for (time, counter) in &arrivals {
            log.consume(&record(*counter, counter ^ 0x55), Duration::from_millis(*time));
        }
        prop_assert_eq!(log.interleaved(), 0);
        prop_assert_eq!(log.records(), arrivals.len() as u64);
    }

    /// However two copies of a VM take turns, the first counter that both sent gives them away.
    #[test]
    fn two_runners_are_always_found(turns in proptest::collection::vec(any::<bool>(), 40..200)) {
        let (mut one, mut two) = (100, 100);
        let mut both = Vec::new();
        for turn in &turns {
            let (counter, runner) = if *turn { (&mut one, 1) } else { (&mut two, 2) };
            *counter += 1;
            both.push(record(*counter, *counter * 10 + runner));
        }
        prop_assume!(one > 100 && two > 100);
        prop_assert!(heard(both).interleaved > 0);
    }
}

#[test]
fn a_hand_over_is_one_runner() {
    let vm = heard((1..=500).map(|counter| record(counter, counter * 3)));
    assert_eq!((vm.records, vm.interleaved, vm.missing, vm.reordered), (500, 0, 0, 0));
    assert_eq!(vm.longest_gap, Duration::from_millis(10));
}

#[test]
fn a_source_that_wakes_up_again_is_found() {
    // The source stopped at 100, the destination goes on; then the source goes on as well.
    let destination = (1..=200).map(|counter| record(counter, counter));
    let source = (101..=150).map(|counter| record(counter, counter + 1_000_000));
    assert_eq!(heard(destination.chain(source)).interleaved, 50);
}

#[test]
fn a_runner_from_long_ago_is_found_even_where_its_counters_were_lost() {
    let destination = (1..=100).chain(200..=20_000).map(|counter| record(counter, counter));
    let source = (101..=150).map(|counter| record(counter, counter));
    assert_eq!(heard(destination.chain(source)).interleaved, 50);
}

#[test]
fn reordering_and_duplicates_are_not_interleaved() {
    let vm = heard([1, 2, 4, 3, 5, 5, 6, 9, 8].map(|counter| record(counter, counter)));
    assert_eq!((vm.interleaved, vm.reordered, vm.duplicates, vm.missing), (0, 2, 1, 1));
}

#[test]
fn an_old_generation_that_goes_on_is_found() {
    let at = |counter, generation| WitnessRecord { generation, ..record(counter, counter) };
    let late = heard([at(1, 4), at(3, 5), at(2, 4), at(4, 5)]);
    assert_eq!((late.interleaved, late.reordered, late.generation), (0, 1, 5));
    let two = heard([at(1, 4), at(3, 5), at(4, 4), at(5, 5)]);
    assert_eq!(two.interleaved, 1);
    let unknown = heard([at(1, 4), at(2, 0), at(3, 5), at(4, 0)]);
    assert_eq!((unknown.interleaved, unknown.generation), (0, 5));
}

#[test]
fn a_reboot_is_quiet_and_two_boots_in_turn_are_not() {
    let at = |counter, boot| WitnessRecord { boot, ..record(counter, counter) };
    let reboot = heard([at(1, 7), at(2, 7), at(1, 8), at(2, 8)]);
    assert_eq!((reboot.interleaved, reboot.reboots), (0, 1));
    let two = heard([at(1, 7), at(2, 7), at(1, 8), at(3, 7), at(2, 8)]);
    assert_eq!(two.interleaved, 1);
}

#[test]
fn vms_are_kept_apart_and_their_number_is_bounded() {
    let mut log = WitnessLog::new();
    for vm in 0..2000 {
        log.consume(&WitnessRecord { id: vm.to_string(), ..record(1, vm) }, Duration::ZERO);
    }
    log.consume_datagram(b"hello", Duration::ZERO);
    assert_eq!((log.records(), log.interleaved(), log.rejected()), (1024, 0, 977));
}

#[test]
fn only_the_fixed_form_is_a_generation() {
    assert_eq!(host_generation(b"godwit-00000000000000ff"), Some(255));
    for other in ["", "7", "godwit-7", "godwit-+0000000000000ff", "godwit-00000000000000ff\n", "etc/smbios"] {
        assert_eq!(host_generation(other.as_bytes()), None, "{other:?}");
    }
}
