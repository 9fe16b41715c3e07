//! The fuzzer's corpus: whatever is taken can be written, and reads the same again.

use super::*;

#[test]
#[expect(clippy::disallowed_methods, reason = "the corpus is files; the reader under test sees bytes")]
fn corpus_every_stored_stream_is_taken_without_panic() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/stream");
    let (mut inputs, mut whole) = (0, 0);
    for entry in std::fs::read_dir(folder).expect("the corpus is checked in") {
        let path = entry.expect("readable").path();
        let bytes = std::fs::read(&path).expect("readable");
        let result = read(&bytes, bytes.len().max(1));
        assert_eq!(result, read(&bytes, 3), "{}", path.display());
        if let Ok(elements) = result {
            assert_eq!(read_again(&elements).as_ref(), Ok(&elements), "{}", path.display());
            whole += 1;
        }
        inputs += 1;
    }
    assert!(inputs >= 10 && whole >= 5, "the corpus has {inputs} inputs, of which {whole} are streams");
}
