//! The fuzzers' corpora: what must hold for any bytes holds for these. The fuzzers start from the same files and check the same.
#![expect(clippy::disallowed_methods, reason = "a corpus is files; what is under test sees bytes")]

use std::mem::{Discriminant, discriminant};

#[path = "fuzzed/nbd_client.rs"]
mod nbd_client;
#[path = "fuzzed/nbd_server.rs"]
mod nbd_server;

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = format!("{}/tests/corpus/{name}", env!("CARGO_MANIFEST_DIR"));
    let files = std::fs::read_dir(folder).expect("the corpus is checked in");
    files.map(|file| std::fs::read(file.expect("an entry").path()).expect("readable")).collect()
}

fn kinds<'a, T: 'a>(all: impl Iterator<Item = &'a T>) -> usize {
    let kinds: Vec<Discriminant<T>> = all.map(discriminant).collect();
    kinds.iter().enumerate().filter(|(at, kind)| !kinds[..*at].contains(kind)).count()
}

#[test]
fn corpus_every_stored_client_is_served_without_panic() {
    let asked: Vec<_> = corpus("nbd_server").iter().map(|bytes| nbd_server::check(bytes)).collect();
    let requests = kinds(asked.iter().flat_map(|(requests, _)| requests));
    let errors = kinds(asked.iter().filter_map(|(_, error)| error.as_ref()));
    assert!(requests == 4 && errors == 5, "{requests} kinds of requests, {errors} of errors");
}

#[test]
fn corpus_every_stored_server_is_read_without_panic() {
    let told: Vec<_> = corpus("nbd_client").iter().map(|bytes| nbd_client::check(bytes)).collect();
    let events = kinds(told.iter().flat_map(|(events, _)| events));
    let errors = kinds(told.iter().filter_map(|(_, error)| error.as_ref()));
    assert!(events == 6 && errors == 6, "{events} kinds of events, {errors} of errors");
}
