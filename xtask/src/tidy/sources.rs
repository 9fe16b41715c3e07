//! Rules for single source files: how they open, how long they are, where they lie.

use super::tree::TextFile;
use super::{Complaint, Rule, Tree};

static HEAD: Rule = Rule { name: "file-head", reason: "a reader learns in one to five lines what a file is for" };
static LENGTH: Rule = Rule { name: "file-length", reason: "a file that long is two things; aim at 400 lines" };
static LAYOUT: Rule = Rule { name: "no-mod-rs", reason: "`foo.rs` beside `foo/`: ten open tabs called mod.rs tell nothing" };

/// Lines, tables and generated code aside.
const LONGEST: usize = 1000;

pub(super) fn check_head(tree: &Tree, complaints: &mut Vec<Complaint>) {
    for file in tree.with_extension("rs").filter(|file| !is_generated(file)) {
        let opens =
            file.text.strip_prefix("//!").is_some_and(|rest| rest.lines().next().is_some_and(|line| !line.trim().is_empty()));
        if !opens {
            complaints.push(Complaint::new(&HEAD, &file.path, 1, "the first line is not a `//!` that says something"));
        }
    }
}

pub(super) fn check_length(tree: &Tree, complaints: &mut Vec<Complaint>) {
    for file in tree.with_extension("rs").filter(|file| !is_generated(file)) {
        let lines = file.text.lines().count();
        if lines > LONGEST {
            complaints.push(Complaint::new(&LENGTH, &file.path, LONGEST + 1, format!("{lines} lines, at most {LONGEST}")));
        }
    }
}

pub(super) fn check_layout(tree: &Tree, complaints: &mut Vec<Complaint>) {
    for file in tree.with_extension("rs") {
        if file.path.file_name().is_some_and(|name| name == "mod.rs") {
            complaints.push(Complaint::new(&LAYOUT, &file.path, 1, "move it beside its folder, under the folder's name"));
        }
    }
}

/// Generators mark what they write within the first lines.
fn is_generated(file: &TextFile) -> bool {
    file.text.lines().take(5).any(|line| line.contains("@generated"))
}
