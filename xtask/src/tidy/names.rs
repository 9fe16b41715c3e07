//! Words that name nothing, and paths that exist on one machine only.

use std::path::Path;

use super::{Complaint, Rule, Tree};

static WORDS: Rule =
    Rule { name: "empty-word", reason: "a name that fits everything attracts everything; name the noun or the verb" };
static MACHINE: Rule = Rule { name: "machine-path", reason: "a path of one developer's machine is of no use on any other" };

const EMPTY: &[&str] = &["common", "helper", "helpers", "manager", "misc", "util", "utils"];

/// Where developers' own files lie. Cut in two, so that this file may be checked too.
const MACHINE_PATHS: &[&str] = &[concat!("/ho", "me/"), concat!("/Use", "rs/"), concat!("/ro", "ot/."), concat!("/wo", "rk/")];

/// Names of files, folders and modules.
pub(super) fn check_words(tree: &Tree, complaints: &mut Vec<Complaint>) {
    for file in tree.files() {
        for part in &file.path {
            let part = part.to_string_lossy();
            if let Some(word) = empty_word(part.split('.').next().unwrap_or(&part)) {
                complaints.push(Complaint::new(&WORDS, &file.path, 1, format!("`{part}` is called `{word}`")));
            }
        }
        if !file.has_extension("rs") {
            continue;
        }
        for (number, line) in file.lines() {
            // A module in a file of its own is found by the file's name.
            let declared = line.trim_end().strip_suffix('{').and_then(|line| line.trim_end().rsplit_once("mod "));
            let Some((before, name)) = declared else { continue };
            if ["", "pub ", "pub(crate) ", "pub(super) "].contains(&before.trim_start())
                && let Some(word) = empty_word(name)
            {
                complaints.push(Complaint::new(&WORDS, &file.path, number, format!("module `{name}` is called `{word}`")));
            }
        }
    }
}

/// The empty word among the words of a `snake_case` or `kebab-case` name.
fn empty_word(name: &str) -> Option<&'static str> {
    name.split(['_', '-']).find_map(|word| EMPTY.iter().copied().find(|empty| word.eq_ignore_ascii_case(empty)))
}

pub(super) fn check_machine_paths(tree: &Tree, complaints: &mut Vec<Complaint>) {
    for file in tree.files().filter(|file| file.path != Path::new("LICENSE")) {
        for (number, line) in file.lines() {
            if let Some(path) = MACHINE_PATHS.iter().find(|path| begins_a_path(line, path)) {
                complaints.push(Complaint::new(&MACHINE, &file.path, number, format!("names a path below `{path}`")));
            }
        }
    }
}

/// Whether `path` stands in `line` at the start of a path: `/v1/work/` and `tests/home/` are none.
fn begins_a_path(line: &str, path: &str) -> bool {
    line.match_indices(path).any(|(at, _)| {
        let before = line.get(..at).and_then(|head| head.chars().next_back());
        before.is_none_or(|c| !c.is_alphanumeric() && !"/._-}$~*".contains(c))
    })
}
