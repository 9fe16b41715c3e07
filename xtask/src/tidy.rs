//! The house rules that a machine can check. Each complaint says where, what, and why the rule exists.
//! To add a rule: write a `fn(&Tree, &mut Vec<Complaint>)`, list it in [`RULES`], break it once in `tests`.

mod documents;
mod edges;
mod names;
mod sources;
mod tree;

#[cfg(test)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::Result;

pub(crate) use tree::Tree;

/// A rule's short name and the reason why it exists.
#[derive(Debug)]
pub(crate) struct Rule {
    pub(crate) name: &'static str,
    pub(crate) reason: &'static str,
}

/// One place that breaks a rule.
#[derive(Debug)]
pub(crate) struct Complaint {
    path: PathBuf,
    line: usize,
    rule: &'static Rule,
    what: String,
}

impl Complaint {
    /// Lines count from 1, as editors do.
    fn new(rule: &'static Rule, path: &Path, line: usize, what: impl Into<String>) -> Self {
        Self { path: path.to_path_buf(), line, rule, what: what.into() }
    }
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, line, rule, what } = self;
        write!(f, "{}:{line}: {}: {what} ({})", path.display(), rule.name, rule.reason)
    }
}

type Check = fn(&Tree, &mut Vec<Complaint>);

const RULES: &[Check] = &[
    edges::check_edges,
    edges::check_pure,
    sources::check_head,
    sources::check_length,
    sources::check_layout,
    names::check_words,
    names::check_machine_paths,
    documents::check_links,
    documents::check_mentions,
    documents::check_decisions,
    documents::check_named_tests,
];

/// Every complaint about the repository at `root`, by path and line.
pub(crate) fn check(root: &Path) -> Result<Vec<Complaint>> {
    let tree = Tree::read(root)?;
    let mut complaints = Vec::new();
    for rule in RULES {
        rule(&tree, &mut complaints);
    }
    complaints.sort_by(|a, b| (&a.path, a.line).cmp(&(&b.path, b.line)));
    Ok(complaints)
}
