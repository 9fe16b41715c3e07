//! Every rule is broken once in a small tree, to see that it fires, and where.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::check;

const DECISION: &str = "# A title\n\n## Context\n\n## Decision\n\n## Rejected options\n\n## Consequences\n";

/// A tree that keeps every rule, until a test breaks one.
struct Sample(TempDir);

impl Sample {
    fn new() -> Self {
        let sample = Self(TempDir::new().expect("a temporary folder"));
        sample
            .with("README.md", "[what](docs/decisions/2026-11-22-a-title.md#context), [us](https://example.org/x)\n")
            .with("docs/decisions/2026-11-22-a-title.md", DECISION)
            .with("crates/model/Cargo.toml", &manifest("godwit-model", "thiserror.workspace = true\n"))
            .with("crates/model/clippy.toml", "disallowed-methods = []\n")
            .with("crates/model/src/lib.rs", "//! The nouns.\n")
            .with("crates/qemu/Cargo.toml", &manifest("godwit-qemu", "godwit-model.workspace = true\ntokio = \"1\"\n"))
            .with("crates/qemu/src/lib.rs", "//! The driver.\nmod session {\n}\n")
            .with("tests/e2e/Cargo.toml", &manifest("godwit-e2e", "godwit-agent.workspace = true\n"))
    }

    fn with(self, path: &str, text: &str) -> Self {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().expect("files lie in folders")).expect("create folders");
        fs::write(path, text).expect("write a file");
        self
    }

    /// Path, line and rule of everything that is wrong.
    fn complaints(&self) -> Vec<(PathBuf, usize, &'static str)> {
        let complaints = check(self.0.path()).expect("the tree can be read");
        complaints.into_iter().map(|complaint| (complaint.path, complaint.line, complaint.rule.name)).collect()
    }

    #[track_caller]
    fn complains(&self, path: &str, line: usize, rule: &str) {
        let complaints = self.complaints();
        let expected = (PathBuf::from(path), line, rule);
        assert!(
            complaints.iter().any(|found| (found.0.as_path(), found.1, found.2) == (expected.0.as_path(), line, rule)),
            "{complaints:?}"
        );
        assert!(complaints.iter().all(|found| found.2 == rule), "only {rule} was broken: {complaints:?}");
    }
}

fn manifest(name: &str, dependencies: &str) -> String {
    format!("[package]\nname = \"{name}\"\n\n[dependencies]\n{dependencies}")
}

#[test]
fn a_tree_in_order_has_no_complaints() {
    assert_eq!(Sample::new().complaints(), []);
}

#[test]
fn this_repository_reads() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the repository");
    assert!(super::Tree::read(root).expect("it can be read").file(Path::new("xtask/Cargo.toml")).is_some());
}

#[test]
fn a_complaint_says_where_what_and_why() {
    let sample = Sample::new().with("crates/qemu/src/wire.rs", "fn f() {}\n");
    let complaints = check(sample.0.path()).expect("the tree can be read");
    let said: Vec<String> = complaints.iter().map(ToString::to_string).collect();
    assert_eq!(said.len(), 1);
    assert!(said[0].starts_with("crates/qemu/src/wire.rs:1: file-head: the first line is not a `//!`"), "{said:?}");
    assert!(said[0].ends_with("(a reader learns in one to five lines what a file is for)"), "{said:?}");
}

#[test]
fn an_edge_outside_the_table_is_found() {
    let uphill = manifest("godwit-qemu", "godwit-model.workspace = true\ngodwit-agent.workspace = true\n");
    Sample::new().with("crates/qemu/Cargo.toml", &uphill).complains("crates/qemu/Cargo.toml", 6, "crate-edge");
}

#[test]
fn an_edge_is_found_in_every_kind_of_dependency() {
    for table in ["dev-dependencies", "build-dependencies", "target.'cfg(unix)'.dependencies"] {
        let text = format!("[package]\nname = \"godwit-qemu\"\n\n[{table}]\ngodwit-api = {{ path = \"../api\" }}\n");
        Sample::new().with("crates/qemu/Cargo.toml", &text).complains("crates/qemu/Cargo.toml", 5, "crate-edge");
    }
}

#[test]
fn an_edge_under_another_name_is_found() {
    let renamed = manifest("godwit-qemu", "words = { package = \"godwit-api\", path = \"../api\" }\n");
    Sample::new().with("crates/qemu/Cargo.toml", &renamed).complains("crates/qemu/Cargo.toml", 5, "crate-edge");
}

#[test]
fn a_crate_without_a_place_in_the_table_is_found() {
    let sample = Sample::new().with("crates/magnet/Cargo.toml", &manifest("godwit-magnet", ""));
    sample.complains("crates/magnet/Cargo.toml", 1, "crate-edge");
}

#[test]
fn the_binary_is_nobodys_library() {
    let inverted = manifest("godwit-qemu", "godwit = { path = \"../cli\" }\n");
    Sample::new().with("crates/qemu/Cargo.toml", &inverted).complains("crates/qemu/Cargo.toml", 5, "crate-edge");
}

#[test]
fn a_runtime_in_a_pure_crate_is_found() {
    let impure = manifest("godwit-model", "serde.workspace = true\ntokio.workspace = true\n");
    Sample::new().with("crates/model/Cargo.toml", &impure).complains("crates/model/Cargo.toml", 6, "pure-crate");
}

#[test]
fn a_pure_crates_tests_may_write_files() {
    let text = manifest("godwit-model", "\n[dev-dependencies]\ntempfile.workspace = true\n");
    assert_eq!(Sample::new().with("crates/model/Cargo.toml", &text).complaints(), []);
}

#[test]
fn a_pure_crate_without_the_bans_is_found() {
    let sample = Sample::new().with("crates/carrier/Cargo.toml", &manifest("godwit-carrier", ""));
    sample.complains("crates/carrier/clippy.toml", 1, "pure-crate");
    let sample = sample.with("crates/carrier/clippy.toml", "disallowed-methods = [\"only this one\"]\n");
    sample.complains("crates/carrier/clippy.toml", 1, "pure-crate");
}

#[test]
fn a_file_without_a_head_is_found() {
    for text in ["", "use std::fmt;\n", "//!\n\nfn f() {}\n", "\n//! Late.\n"] {
        Sample::new().with("crates/qemu/build.rs", text).complains("crates/qemu/build.rs", 1, "file-head");
    }
}

#[test]
fn a_long_file_is_found_unless_it_was_generated() {
    let body = "// line\n".repeat(1000);
    let long = format!("//! Long.\n{body}");
    Sample::new().with("crates/qemu/src/long.rs", &long).complains("crates/qemu/src/long.rs", 1001, "file-length");
    let generated = format!("// @generated by the schema\n{body}");
    assert_eq!(Sample::new().with("crates/qemu/src/long.rs", &generated).complaints(), []);
}

#[test]
fn a_mod_rs_is_found() {
    let path = "crates/qemu/src/session/mod.rs";
    Sample::new().with(path, "//! Sessions.\n").complains(path, 1, "no-mod-rs");
}

#[test]
fn empty_words_are_found_in_files_folders_and_modules() {
    for path in ["crates/qemu/src/util.rs", "crates/qemu/src/vm_manager.rs", "crates/qemu/src/helpers/disk.rs"] {
        Sample::new().with(path, "//! Something.\n").complains(path, 1, "empty-word");
    }
    let module = "//! Something.\n\npub(crate) mod test_helper {\n}\n";
    Sample::new().with("crates/qemu/src/disk.rs", module).complains("crates/qemu/src/disk.rs", 3, "empty-word");
    let utility = "//! Something.\nmod commonwealth {\n}\n";
    assert_eq!(Sample::new().with("crates/qemu/src/utility.rs", utility).complaints(), []);
}

#[test]
fn a_path_of_one_machine_is_found() {
    let home = concat!("/ho", "me/someone/godwit");
    let script = format!("#!/bin/sh\ncd {home}\n");
    Sample::new().with("scripts/build", &script).complains("scripts/build", 2, "machine-path");
    let part_of_another = format!("//! See tests{home} and $ROOT{home}.\n");
    assert_eq!(Sample::new().with("crates/qemu/src/disk.rs", &part_of_another).complaints(), []);
}

#[test]
fn a_dead_link_is_found() {
    Sample::new().with("docs/glossary.md", "One.\n\n[two](three.md#four)\n").complains("docs/glossary.md", 3, "dead-link");
}

#[test]
fn a_link_out_of_the_repository_is_found() {
    Sample::new().with("docs/glossary.md", "[design](../../beside/DESIGN.md)\n").complains("docs/glossary.md", 1, "dead-link");
}

#[test]
fn links_in_code_blocks_are_examples() {
    assert_eq!(Sample::new().with("docs/glossary.md", "```\n[two](three.md)\n```\n").complaints(), []);
}

#[test]
fn a_comment_that_names_a_missing_document_is_found() {
    let gone = concat!("docs", "/spec/gone.md");
    let source = format!("//! Frames, see {gone}.\n");
    Sample::new().with("crates/qemu/src/frame.rs", &source).complains("crates/qemu/src/frame.rs", 1, "dead-mention");
    let configuration = format!("key = 1 # see `{gone}`\n");
    Sample::new().with("deny.toml", &configuration).complains("deny.toml", 1, "dead-mention");
}

#[test]
fn a_decision_needs_its_date_title_and_sections() {
    for name in ["why.md", "2026-13-01-why.md", "2026-11-22.md", "2026-11-22-Why.md", "2026-11-22-why.txt", "26-11-22-why.md"] {
        let path = format!("docs/decisions/{name}");
        Sample::new().with(&path, DECISION).complains(&path, 1, "decision-form");
    }
    let path = "docs/decisions/2026-11-22-why.md";
    Sample::new().with(path, &DECISION.replace("## Rejected options", "")).complains(path, 1, "decision-form");
}

#[test]
fn a_test_that_the_threat_model_names_and_nobody_wrote_is_found() {
    let model = "| it tries | what stops it | shown by |\n|---|---|---|\n| `x` | y | `there`, `missing` |\n";
    let source = "//! The nouns.\n#[tokio::test]\nasync fn there() {}\n\n#[test]\nfn other() {}\nfn missing() {}\n";
    let sample = Sample::new().with("docs/threat-model.md", model).with("crates/model/src/lib.rs", source);
    sample.complains("docs/threat-model.md", 3, "named-test");
    assert_eq!(sample.complaints().len(), 1);
}
