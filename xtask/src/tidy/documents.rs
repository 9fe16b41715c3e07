//! Rules for documents: links lead somewhere, files that comments name exist, decisions have one form.

use std::path::{Component, Path, PathBuf};

use super::{Complaint, Rule, Tree};

static LINK: Rule = Rule { name: "dead-link", reason: "a reader who follows a link must arrive, in every clone" };
static MENTION: Rule =
    Rule { name: "dead-mention", reason: "a comment that sends the reader to a document must name one that exists" };
static DECISION: Rule = Rule {
    name: "decision-form",
    reason: "decisions are read by date, years later: context, decision, rejected options, consequences",
};

static NAMED_TEST: Rule = Rule { name: "named-test", reason: "what stops an attack is believed because a test shows it" };

/// What every decision has to say, as headings.
const SECTIONS: &[&str] = &["## Context", "## Decision", "## Rejected options", "## Consequences"];

/// Relative links of Markdown files.
pub(super) fn check_links(tree: &Tree, complaints: &mut Vec<Complaint>) {
    for file in tree.with_extension("md") {
        let mut in_code = false;
        for (number, line) in file.lines() {
            if line.trim_start().starts_with("```") {
                in_code = !in_code;
            }
            if in_code {
                continue;
            }
            for target in link_targets(line) {
                let folder = file.path.parent().unwrap_or(Path::new(""));
                match resolve(folder, target) {
                    Some(path) if tree.exists(&path) => {}
                    Some(_) => complaints.push(Complaint::new(&LINK, &file.path, number, format!("`{target}` does not exist"))),
                    None => complaints.push(Complaint::new(
                        &LINK,
                        &file.path,
                        number,
                        format!("`{target}` leads out of the repository"),
                    )),
                }
            }
        }
    }
}

/// Targets of `[text](target)`, without anchors; what has a scheme or is only an anchor is left out.
fn link_targets(line: &str) -> impl Iterator<Item = &str> {
    let targets = line.split("](").skip(1).filter_map(|rest| rest.split([')', ' ']).next());
    targets.filter_map(|target| {
        let path = target.split('#').next().unwrap_or_default();
        let elsewhere = path.contains("://") || path.starts_with("mailto:");
        (!path.is_empty() && !elsewhere).then_some(path)
    })
}

/// `target` as seen from `folder`, both relative to the root; `None` where it leaves the repository.
fn resolve(folder: &Path, target: &str) -> Option<PathBuf> {
    let mut path = PathBuf::new();
    for component in folder.join(target).components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::CurDir => {}
            Component::ParentDir if path.pop() => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(path)
}

/// Tests that the threat model names, in the last column of its tables: each is a function of some source, right below `#[test]` or its like.
pub(super) fn check_named_tests(tree: &Tree, complaints: &mut Vec<Complaint>) {
    let Some(model) = tree.file(Path::new("docs/threat-model.md")) else { return };
    for (number, line) in model.lines().filter(|(_, line)| line.starts_with("| ") && line.ends_with(" |")) {
        let last = line.trim_end_matches(['|', ' ']).rsplit('|').next().unwrap_or_default();
        for name in last.split('`').skip(1).step_by(2) {
            if !tree.with_extension("rs").any(|file| has_test(&file.text, name)) {
                complaints.push(Complaint::new(&NAMED_TEST, &model.path, number, format!("there is no test `{name}`")));
            }
        }
    }
}

fn has_test(source: &str, name: &str) -> bool {
    let mut above = "";
    source.lines().map(str::trim).filter(|line| !line.is_empty()).any(|line| {
        let is_test = above.starts_with("#[") && above.contains("test");
        let found =
            is_test && line.trim_start_matches("async ").strip_prefix("fn ").and_then(|rest| rest.split('(').next()) == Some(name);
        above = line;
        found
    })
}

/// Paths below `docs/` in the comments of sources, scripts and configuration.
pub(super) fn check_mentions(tree: &Tree, complaints: &mut Vec<Complaint>) {
    let sources = tree.files().filter_map(|file| {
        let extension = file.path.extension().unwrap_or_default().to_str()?;
        match extension {
            "rs" | "proto" => Some((file, "//")),
            "toml" | "sh" | "" => Some((file, "#")),
            _ => None,
        }
    });
    for (file, mark) in sources {
        for (number, line) in file.lines() {
            let Some((_, comment)) = line.split_once(mark) else { continue };
            for mentioned in mentions(comment) {
                if !tree.exists(Path::new(mentioned)) {
                    complaints.push(Complaint::new(&MENTION, &file.path, number, format!("`{mentioned}` does not exist")));
                }
            }
        }
    }
}

fn mentions(comment: &str) -> impl Iterator<Item = &str> {
    let words = comment.split(|c: char| !c.is_ascii_alphanumeric() && !"/._-".contains(c));
    words.filter(|word| word.starts_with("docs/")).map(|word| word.trim_end_matches(['.', '-']))
}

/// Names and headings of decisions.
pub(super) fn check_decisions(tree: &Tree, complaints: &mut Vec<Complaint>) {
    for file in tree.files().filter(|file| file.path.starts_with("docs/decisions")) {
        let name = file.path.file_name().unwrap_or_default().to_string_lossy();
        if !is_decision_name(&name) {
            complaints.push(Complaint::new(&DECISION, &file.path, 1, format!("`{name}` is not `YYYY-MM-DD-title.md`")));
        }
        for section in SECTIONS {
            if !file.lines().any(|(_, line)| line == *section) {
                complaints.push(Complaint::new(&DECISION, &file.path, 1, format!("has no `{section}`")));
            }
        }
    }
}

/// `YYYY-MM-DD-title.md`, the title in lower case with hyphens.
fn is_decision_name(name: &str) -> bool {
    let Some(stem) = name.strip_suffix(".md") else { return false };
    let mut parts = stem.splitn(4, '-');
    let mut number = |digits: usize| {
        let part = parts.next().filter(|part| part.len() == digits && part.bytes().all(|b| b.is_ascii_digit()))?;
        part.parse::<u32>().ok()
    };
    let dated = number(4).is_some_and(|year| year >= 2026)
        && number(2).is_some_and(|month| (1..=12).contains(&month))
        && number(2).is_some_and(|day| (1..=31).contains(&day));
    let title = parts.next().unwrap_or_default();
    let plain = title.split('-').all(|word| !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()));
    dated && plain
}
