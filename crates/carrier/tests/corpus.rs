//! The fuzzers' corpora: what must hold for any bytes holds for these. The fuzzers start from the same files and check the same.
#![expect(clippy::disallowed_methods, reason = "a corpus is files; what is under test sees bytes")]

use std::collections::BTreeSet;
use std::mem::discriminant;

use fuzzed_pages::Checked;

#[path = "fuzzed/frames.rs"]
mod fuzzed_frames;
#[path = "fuzzed/pages.rs"]
mod fuzzed_pages;

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = format!("{}/tests/corpus/{name}", env!("CARGO_MANIFEST_DIR"));
    let files = std::fs::read_dir(folder).expect("the corpus is checked in");
    files.map(|file| std::fs::read(file.expect("an entry").path()).expect("readable")).collect()
}

#[test]
fn corpus_every_stored_stretch_of_frames_is_taken_without_panic() {
    let inputs = corpus("frames");
    let kinds: Vec<_> = inputs.iter().flat_map(|bytes| fuzzed_frames::check(bytes)).map(|frame| discriminant(&frame)).collect();
    let different = kinds.iter().enumerate().filter(|(at, kind)| !kinds[..*at].contains(kind)).count();
    assert!(inputs.len() >= 15 && different == 26, "{} inputs with {different} kinds of frames", inputs.len());
}

#[test]
fn corpus_every_stored_batch_and_move_of_pages_is_taken_without_panic() {
    let inputs = corpus("pages");
    let checked: Vec<_> = inputs.iter().map(|bytes| fuzzed_pages::check(bytes)).collect();
    let outcomes: BTreeSet<_> = checked
        .iter()
        .map(|checked| match checked {
            Checked::Batch(outcome) => format!("{outcome:?}").split(' ').take(1).collect(),
            Checked::Move { refused, .. } => format!("move, refused: {refused}"),
        })
        .collect();
    assert!(inputs.len() >= 10 && outcomes.len() == 6, "{} inputs: {outcomes:?}", inputs.len());
}
