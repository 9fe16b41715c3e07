//! What every store must do, as functions over the trait, and the SQLite store held to it.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{Change, Entry, Expect, SqliteStore, Store, StoreError, Txn, Write};

fn put(key: &str, value: &[u8]) -> Write {
    Write::Put(key.into(), value.into())
}

fn writes(writes: Vec<Write>) -> Txn {
    Txn { expects: vec![], writes }
}

async fn conforms(store: &dyn Store) {
    // Every write has a revision of its own, and the log tells them in order.
    assert_eq!(store.txn(writes(vec![put("a/1", b"x"), put("a/2", b"y")])).await.expect("txn"), 2);
    assert_eq!(store.txn(writes(vec![put("b/1", b"z"), Write::Delete("nothing".into())])).await.expect("txn"), 3);
    assert_eq!(store.get("a/2").await.expect("get"), Some(Entry { key: "a/2".into(), value: b"y".into(), revision: 2 }));
    assert_eq!(store.get("a").await.expect("get"), None);
    // Ranges keep to their prefix, begin behind `after`, and end at the limit.
    let keys = async |prefix: &str, after: Option<&str>, limit| -> Vec<String> {
        store.range(prefix, after, limit).await.expect("range").into_iter().map(|entry| entry.key).collect()
    };
    assert_eq!(keys("a/", None, 10).await, ["a/1", "a/2"]);
    assert_eq!(keys("a/", Some("a/1"), 10).await, ["a/2"]);
    assert_eq!(keys("", None, 2).await, ["a/1", "a/2"]);
    assert_eq!(keys("c/", None, 2).await, [""; 0]);
    // One failed expectation, and nothing of the transaction happens.
    for (key, expect) in [("a/1", Expect::Absent), ("a/1", Expect::At(2)), ("new", Expect::At(1))] {
        let txn = Txn { expects: vec![("b/1".into(), Expect::At(3)), (key.into(), expect)], writes: vec![put("b/1", b"!")] };
        let refused = store.txn(txn).await;
        assert!(matches!(refused, Err(StoreError::Conflict { key: conflict }) if conflict == key));
    }
    assert_eq!(*store.watch().borrow(), 3);
    let txn = Txn {
        expects: vec![("a/1".into(), Expect::At(1)), ("n".into(), Expect::Absent)],
        writes: vec![Write::Delete("a/1".into())],
    };
    let mut watch = store.watch();
    watch.mark_unchanged();
    assert_eq!(store.txn(txn).await.expect("txn"), 4);
    watch.changed().await.expect("announced");
    let removal = Change { revision: 4, key: "a/1".into(), value: None, removed: Some(b"x".into()) };
    assert_eq!(store.changes(3, 10).await.expect("changes"), std::slice::from_ref(&removal));
    assert_eq!(store.changes(0, 1).await.expect("changes").len(), 1);
    // A compacted log refuses cursors before its beginning, and only those.
    store.compact(3).await.expect("compact");
    assert!(matches!(store.changes(2, 10).await, Err(StoreError::Compacted { compacted: 3 })));
    assert_eq!(store.changes(3, 10).await.expect("changes"), [removal]);
    assert!(store.get("b/1").await.expect("get").is_some(), "compaction dropped a value");
    store.compact(u64::MAX).await.expect("compact");
    assert_eq!(store.changes(4, 10).await.expect("changes"), []);
    assert_eq!(store.txn(writes(vec![put("z", b"")])).await.expect("txn"), 5);
}

#[tokio::test]
async fn the_sqlite_store_conforms() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("store.db");
    conforms(&SqliteStore::open(&path, None).expect("open")).await;
    let again = SqliteStore::open(&path, None).expect("open");
    assert_eq!(*again.watch().borrow(), 5, "the revision was not durable");
    again.close();
    assert!(matches!(again.get("z").await, Err(StoreError::Closed)));
}

#[tokio::test]
async fn a_full_store_changes_nothing_and_works_on_once_there_is_space() {
    let dir = tempfile::tempdir().expect("dir");
    let store = SqliteStore::open(&dir.path().join("store.db"), Some(24)).expect("open");
    store.txn(writes(vec![put("kept", b"1")])).await.expect("small txn");
    let large = vec![0_u8; 300 << 10];
    let refused = store.txn(writes(vec![put("kept", b"2"), put("large", &large)])).await;
    assert!(matches!(refused, Err(StoreError::Full(_))), "{refused:?}");
    assert_eq!(store.get("kept").await.expect("get").expect("there").value, b"1");
    assert_eq!(store.changes(0, 10).await.expect("changes").len(), 1);
    store.txn(writes(vec![put("kept", b"3")])).await.expect("space for a small one");
}

#[derive(Clone, Debug)]
enum Step {
    Write(Vec<(u8, Option<u8>)>, Option<(u8, bool)>),
    Compact(u64),
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let change = (0..6_u8, prop::option::of(any::<u8>()));
    let write =
        (prop::collection::vec(change, 1..4), prop::option::of((0..6_u8, any::<bool>()))).prop_map(|(w, e)| Step::Write(w, e));
    prop::collection::vec(prop_oneof![8 => write, 1 => (0..30_u64).prop_map(Step::Compact), 1 => Just(Step::Reopen)], 1..30)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn prop_the_store_is_a_map_with_a_log(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
        runtime.block_on(async {
            let dir = tempfile::tempdir().expect("dir");
            let path = dir.path().join("store.db");
            let mut store = SqliteStore::open(&path, None).expect("open");
            let mut map: BTreeMap<String, (Vec<u8>, u64)> = BTreeMap::new();
            let (mut log, mut revision, mut compacted) = (Vec::<(u64, String, Option<Vec<u8>>)>::new(), 0_u64, 0_u64);
            for step in steps {
                match step {
                    Step::Reopen => {
                        store.close();
                        store = SqliteStore::open(&path, None).expect("open");
                    }
                    Step::Compact(upto) => {
                        store.compact(upto).await.expect("compact");
                        compacted = compacted.max(upto.min(revision));
                        log.retain(|(at, ..)| *at > upto.min(revision));
                    }
                    Step::Write(changes, expect) => {
                        let mut seen = std::collections::BTreeSet::new();
                        let changes: Vec<_> = changes.into_iter().filter(|(key, _)| seen.insert(*key)).collect();
                        // An expectation that is right, or wrong by one revision.
                        let expects: Vec<_> = expect.into_iter().map(|(key, right)| {
                            let key = format!("k/{key}");
                            let now = map.get(&key).map(|(_, at)| *at);
                            let expect = match (now, right) {
                                (Some(at), true) => Expect::At(at),
                                (Some(at), false) => Expect::At(at + 1),
                                (None, true) => Expect::Absent,
                                (None, false) => Expect::At(revision + 1),
                            };
                            (key, expect)
                        }).collect();
                        let holds = expect.is_none_or(|(_, right)| right);
                        let writes = changes.iter().map(|(key, value)| match value {
                            Some(value) => Write::Put(format!("k/{key}"), vec![*value]),
                            None => Write::Delete(format!("k/{key}")),
                        }).collect();
                        let done = store.txn(Txn { expects, writes }).await;
                        prop_assert_eq!(done.is_ok(), holds);
                        if !holds { continue }
                        for (key, value) in changes {
                            let key = format!("k/{key}");
                            match value {
                                Some(value) => {
                                    revision += 1;
                                    map.insert(key.clone(), (vec![value], revision));
                                    log.push((revision, key, Some(vec![value])));
                                }
                                None if map.remove(&key).is_some() => {
                                    revision += 1;
                                    log.push((revision, key, None));
                                }
                                None => {}
                            }
                        }
                        prop_assert_eq!(done.expect("holds"), revision);
                    }
                }
                let found: Vec<_> = store.range("k/", None, 100).await.expect("range").into_iter().map(|e| (e.key, (e.value, e.revision))).collect();
                prop_assert_eq!(found, map.clone().into_iter().collect::<Vec<_>>());
                let changes: Vec<_> = store.changes(compacted, 1000).await.expect("changes").into_iter().map(|c| (c.revision, c.key, c.value)).collect();
                prop_assert_eq!(&changes, &log);
            }
            Ok(())
        })?;
    }
}
