//! Which crate may use which, and what the pure crates must do without. The table below is the only place that says so.

use std::path::Path;

use toml::{Table, Value};

use super::tree::TextFile;
use super::{Complaint, Rule, Tree};

static EDGE: Rule = Rule {
    name: "crate-edge",
    reason: "crates are walls; a new edge needs a decision in docs/decisions and a line in xtask/src/tidy/edges.rs",
};
static PURE: Rule = Rule {
    name: "pure-crate",
    reason: "pure crates get time, ids and seeds as arguments, so that a thousand simulated migrations run in a second",
};

/// Each crate below `crates/` and what it may use of ours, tests included. Some are not there yet: the walls come first.
const EDGES: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("stream", &[]),
    ("nbd", &[]),
    ("carrier", &["stream"]),
    ("migration", &["model", "stream", "carrier"]),
    ("planner", &["model"]),
    ("qemu", &["model"]),
    ("vault", &["model", "stream"]),
    ("api", &["model"]),
    ("link", &["model"]),
    ("agent", &["migration", "carrier", "stream", "nbd", "qemu", "vault", "link", "model"]),
    ("controller", &["planner", "api", "link", "model"]),
    ("cli", &["agent", "controller", "lab", "qemu", "api", "link", "model"]),
    ("lab", &["api", "model"]),
    ("sim", &["model", "stream", "carrier", "migration", "planner"]),
];

/// Packages outside `crates/` that may use all of ours (`true`) or nothing of ours (`false`).
const OTHERS: &[(&str, bool)] = &[("xtask", true), ("godwit-e2e", true), ("godwit-guest", false)];

/// Crates without runtime, file, socket, process, thread, clock or random source.
const PURE_CRATES: &[&str] = &["model", "stream", "nbd", "carrier", "migration", "planner"];

/// What gives a crate one of those. The standard library's part is banned by `crates/model/clippy.toml`.
const IMPURE: &[&str] = &[
    "async-std",
    "axum",
    "fastrand",
    "getrandom",
    "hyper",
    "libc",
    "mio",
    "nix",
    "rand",
    "rayon",
    "reqwest",
    "rusqlite",
    "rustix",
    "rustls",
    "smol",
    "socket2",
    "tempfile",
    "tokio",
    "tokio-stream",
    "tokio-util",
    "tonic",
    "tracing-subscriber",
];

pub(super) fn check_edges(tree: &Tree, complaints: &mut Vec<Complaint>) {
    for manifest in manifests(tree) {
        let parsed = match manifest.text.parse::<Table>() {
            Ok(parsed) => parsed,
            Err(error) => {
                complaints.push(Complaint::new(&EDGE, &manifest.path, 1, format!("not TOML: {}", error.message())));
                continue;
            }
        };
        let Some(package) = package_name(&parsed) else { continue };
        let allowed = match allowed(package) {
            Some(Allowed::All) => continue,
            Some(Allowed::These(these)) => these,
            None => {
                complaints.push(Complaint::new(
                    &EDGE,
                    &manifest.path,
                    1,
                    format!("package `{package}` is not in the table of edges"),
                ));
                continue;
            }
        };
        for (name, _) in dependencies(&parsed) {
            if let Some(used) = crate_of(name)
                && !allowed.contains(&used)
            {
                let line = line_of(manifest, name);
                complaints.push(Complaint::new(&EDGE, &manifest.path, line, format!("`{package}` may not use `{name}`")));
            }
        }
    }
}

pub(super) fn check_pure(tree: &Tree, complaints: &mut Vec<Complaint>) {
    let bans = Path::new("crates/model/clippy.toml");
    for manifest in manifests(tree) {
        let Ok(parsed) = manifest.text.parse::<Table>() else { continue };
        let Some(package) = package_name(&parsed) else { continue };
        if !crate_of(package).is_some_and(|name| PURE_CRATES.contains(&name)) {
            continue;
        }
        for (name, kind) in dependencies(&parsed) {
            // Tests of a pure crate may write a temporary file; its code may not.
            if kind != DEV && IMPURE.contains(&name) {
                let line = line_of(manifest, name);
                complaints.push(Complaint::new(&PURE, &manifest.path, line, format!("pure crate `{package}` uses `{name}`")));
            }
        }
        let own = manifest.path.with_file_name("clippy.toml");
        let same = match (tree.file(&own), tree.file(bans)) {
            (Some(own), Some(bans)) => own.text == bans.text,
            _ => false,
        };
        if !same {
            complaints.push(Complaint::new(&PURE, &own, 1, format!("is not there or differs from {}: link to it", bans.display())));
        }
    }
}

enum Allowed {
    All,
    These(&'static [&'static str]),
}

fn allowed(package: &str) -> Option<Allowed> {
    if let Some((_, all)) = OTHERS.iter().find(|(name, _)| *name == package) {
        return Some(if *all { Allowed::All } else { Allowed::These(&[]) });
    }
    let own = crate_of(package)?;
    EDGES.iter().find(|(name, _)| *name == own).map(|(_, these)| Allowed::These(these))
}

/// The crate behind a package of ours: `godwit-model` is `model`, and `godwit`, the binary, is `cli`.
fn crate_of(package: &str) -> Option<&str> {
    if package == "godwit" { Some("cli") } else { package.strip_prefix("godwit-") }
}

fn manifests(tree: &Tree) -> impl Iterator<Item = &TextFile> {
    // `fuzz/` is a workspace of its own, which reaches into whatever it fuzzes.
    tree.files().filter(|file| file.path.file_name().is_some_and(|name| name == "Cargo.toml") && !file.path.starts_with("fuzz"))
}

fn package_name(manifest: &Table) -> Option<&str> {
    manifest.get("package")?.get("name")?.as_str()
}

const DEV: &str = "dev-dependencies";

/// Name (of the package, not its alias) and kind of every dependency, those of single targets included.
fn dependencies(manifest: &Table) -> Vec<(&str, &'static str)> {
    let mut found = Vec::new();
    let targets = manifest.get("target").and_then(Value::as_table).into_iter().flat_map(Table::values).filter_map(Value::as_table);
    for table in std::iter::once(manifest).chain(targets) {
        for kind in ["dependencies", "build-dependencies", DEV] {
            for (alias, value) in table.get(kind).and_then(Value::as_table).into_iter().flatten() {
                let package = value.get("package").and_then(Value::as_str).unwrap_or(alias);
                found.push((package, kind));
            }
        }
    }
    found
}

/// The line that names a dependency; the first one where it cannot be told.
fn line_of(manifest: &TextFile, name: &str) -> usize {
    let names = |line: &str| {
        let rest = line.trim_start().strip_prefix(name);
        rest.is_some_and(|rest| rest.starts_with(['.', ' ', '='])) || line.contains(&format!("\"{name}\""))
    };
    manifest.lines().find(|(_, line)| names(line)).map_or(1, |(number, _)| number)
}
