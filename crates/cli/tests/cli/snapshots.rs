//! Snapshots and vaults.

use godwit_api::v1::{Snapshot, SnapshotState, Task, TaskState};
use godwit_model::{Bytes, RestoreFigures, SnapshotExport, VaultFile, VaultPlan, VaultRewrite};
use serde_json::{Value, json};

use crate::fake::{Fake, Script, name, snapshot, task};

fn body(fake: &Fake, method: &str, path: &str) -> Value {
    let seen = fake.seen(method, path).pop().expect("a request");
    serde_json::from_slice(&seen.body).expect("JSON")
}

#[test]
fn a_snapshot_says_what_it_came_to_in_one_line() {
    let done = Task { snapshot: Some(name("web1-20261127-183000")), ..task("vm.snapshot", TaskState::Done, 1) };
    let fake = Fake::start(Script { task: Some(done.clone()), ..Script::default() });
    let ended = fake.run(&["snapshot", "create", "web1"]);
    let line = "web1-20261127-183000 of web1: 512 MiB memory, pause 8.2 ms, 143 MiB new, 2.1 s\n";
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), line), "{}", ended.stderr);
    assert_eq!(ended.stderr, "warning: a \\u{1b}[2J\n");
    let plain =
        json!({ "vm": "web1", "name": null, "memory": true, "quiesce": null, "pool": null, "golden": false, "reason": null });
    assert_eq!(body(&fake, "POST", "/snapshots"), plain);
    let all =
        ["snapshot", "create", "web1", "--name", "n", "--disks-only", "--quiesce=30", "--pool", "p", "--golden", "--reason", "r"];
    assert_eq!(fake.run(&all).code, Some(0));
    let asked =
        json!({ "vm": "web1", "name": "n", "memory": false, "quiesce": 30_000, "pool": "p", "golden": true, "reason": "r" });
    assert_eq!(body(&fake, "POST", "/snapshots"), asked);
    assert_eq!(fake.run(&["snapshot", "create", "web1", "--quiesce", "--detach"]).stdout, format!("{}\n", done.id));
    assert_eq!(body(&fake, "POST", "/snapshots")["quiesce"], 10_000);
    for bad in ["--quiesce=0", "--quiesce=61", "--quiesce=soon"] {
        assert_eq!(fake.run(&["snapshot", "create", "web1", bad]).code, Some(2), "{bad}");
    }
    let told: Task = serde_json::from_str(&fake.run(&["snapshot", "create", "web1", "-o", "json"]).stdout).expect("JSON");
    assert_eq!(told, done);
}

#[test]
fn snapshots_are_listed_and_shown() {
    let other = Snapshot { golden: true, state: SnapshotState::Taking, memory: None, figures: None, ..snapshot("nightly") };
    let fake = Fake::start(Script { snapshots: vec![snapshot("one"), other.clone()], ..Script::default() });
    let table = "\
NAME     VM    CREATED               STATE   MEMORY   NEW      POOL    GOLDEN  TEAM
one      web1  2026-11-27 18:30:00Z  ready   512 MiB  143 MiB  shared  -       default
nightly  web1  2026-11-27 18:30:00Z  taking  -        -        shared  yes     default
";
    assert_eq!(fake.run(&["snapshot", "list"]).stdout, table);
    let told: Vec<Snapshot> = serde_json::from_str(&fake.run(&["snapshot", "list", "-o", "json"]).stdout).expect("JSON");
    assert_eq!(told, [snapshot("one"), other]);
    assert_eq!(fake.run(&["snapshot", "list", "--vm", "web1"]).code, Some(0));
    assert_eq!(fake.seen("GET", "/snapshots?vm=web1").len(), 1);
    let shown = fake.run(&["snapshot", "show", "one"]).stdout;
    for line in ["Disk:          shared/root", "Pause:         8.2 ms", "Warning:       a \\u{1b}[2J", "New:           143 MiB"] {
        assert!(shown.lines().any(|shown| shown == line), "{line} is not in\n{shown}");
    }
    let set = fake.run(&["snapshot", "set", "one", "--golden=true"]);
    assert_eq!((set.code, set.stdout.as_str()), (Some(0), "snapshot one is golden\n"));
    assert_eq!(body(&fake, "PATCH", "/snapshots/one"), json!({ "golden": true }));
    assert_eq!(fake.run(&["snapshot", "set", "one", "--golden=false"]).stdout, "snapshot one can be deleted\n");
    assert_eq!(fake.run(&["snapshot", "set", "one"]).code, Some(2));
}

#[test]
fn a_rollback_is_asked_about_and_says_how_the_vm_came_out() {
    let restore = RestoreFigures { qemu_ms: 180, memory_ms: 9, ..RestoreFigures::default() };
    let kept = name("web1-before-rollback-20261127-190000");
    let done = Task { kept: Some(kept), restore: Some(restore), ..task("vm.rollback", TaskState::Done, 1) };
    let fake = Fake::start(Script { task: Some(done), ..Script::default() });
    let unasked = fake.run(&["snapshot", "rollback", "one"]);
    assert_eq!(unasked.code, Some(4), "{}", unasked.stderr);
    assert!(unasked.stderr.contains("what it is now is kept"), "{}", unasked.stderr);
    let dry = fake.run(&["snapshot", "rollback", "one", "--discard-present", "--dry-run"]);
    let would = "web1 (running) would become what it was in one at 2026-11-27 18:30:00Z; what it is now would be lost\n";
    assert_eq!((dry.code, dry.stdout.as_str()), (Some(0), would));
    assert!(fake.seen("POST", "/snapshots").is_empty());
    let ended = fake.run(&["snapshot", "rollback", "one", "--yes", "--host", "h2", "--reason", "r"]);
    let line = "web1 is as in one on h1: QEMU started in 180 ms, disks 0 ms, memory 9 ms; \
                what it was before is web1-before-rollback-20261127-190000\n";
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), line), "{}", ended.stderr);
    let asked = json!({ "host": "h2", "discard_present": false, "reason": "r" });
    assert_eq!(body(&fake, "POST", "/snapshots/one/rollback"), asked);
    let booted = RestoreFigures { memory_ms: 0, ..restore };
    fake.script().task = Some(Task { restore: Some(booted), ..task("vm.rollback", TaskState::Done, 1) });
    let ended = fake.run(&["snapshot", "rollback", "one", "--yes", "--discard-present"]);
    assert_eq!(ended.stdout, "web1 is as in one on h1: QEMU started in 180 ms, disks 0 ms, it boots\n");
    let followed = RestoreFigures { filled_ms: 41_000, filled: Bytes::mib(10 << 10), ..restore };
    fake.script().task = Some(Task { restore: Some(followed), ..task("vm.rollback", TaskState::Done, 1) });
    let ended = fake.run(&["snapshot", "rollback", "one", "--yes", "--discard-present"]);
    assert_eq!(
        ended.stdout,
        "web1 is as in one on h1: QEMU started in 180 ms, 10 GiB of its disks followed in 41.0 s, memory 9 ms\n"
    );
    assert_eq!(fake.run(&["snapshot", "rollback", "bad", "--yes"]).code, Some(8));
}

#[test]
fn an_export_says_where_it_is_and_an_import_what_it_came_to() {
    let written = SnapshotExport { host: name("h1"), path: "/pool/exports/default/one\u{1b}".into(), bytes: Bytes::mib(600) };
    let done = Task { export: Some(written), ..task("snapshot.export", TaskState::Done, 1) };
    let fake = Fake::start(Script { task: Some(done), ..Script::default() });
    let ended = fake.run(&["snapshot", "export", "one", "--host", "h1"]);
    let line = "one is in /pool/exports/default/one\\u{1b} on h1, 600 MiB\n";
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), line), "{}", ended.stderr);
    assert_eq!(body(&fake, "POST", "/snapshots/one/export"), json!({ "host": "h1", "reason": null }));
    fake.script().task = Some(task("snapshot.import", TaskState::Done, 1));
    let words = ["snapshot", "import", "one", "--vm", "web1", "--from", "shared/brought", "--memory", "--reason", "r"];
    let ended = fake.run(&words);
    let line = "one of web1: 512 MiB memory, pause 8.2 ms, 143 MiB new, 2.1 s\n";
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), line), "{}", ended.stderr);
    let asked = json!({ "vm": "web1", "from": "shared/brought", "memory": true, "host": null, "golden": false, "reason": "r" });
    assert_eq!(body(&fake, "POST", "/snapshots/one/import"), asked);
    for bad in [["--from", "/etc"], ["--from", "shared/../x"], ["--from", "shared"]] {
        assert_eq!(fake.run(&[&["snapshot", "import", "one", "--vm", "web1"], bad.as_slice()].concat()).code, Some(2), "{bad:?}");
    }
    assert_eq!(fake.run(&["snapshot", "import", "one", "--from", "shared/brought"]).code, Some(2));
}

#[test]
fn snapshots_are_deleted_only_on_purpose() {
    let fake = Fake::start(Script::default());
    assert_eq!(fake.run(&["snapshot", "delete", "one"]).code, Some(4));
    let dry = fake.run(&["snapshot", "delete", "one", "--dry-run"]);
    assert_eq!(dry.stdout, "snapshot one (of web1, 2026-11-27 18:30:00Z) would be deleted\n");
    assert!(fake.seen("DELETE", "/").is_empty());
    let deleted = fake.run(&["snapshot", "delete", "one", "two", "--yes"]);
    assert_eq!((deleted.code, deleted.stdout.as_str()), (Some(0), "snapshot one deleted\nsnapshot two deleted\n"));
    assert_eq!(fake.seen("DELETE", "/snapshots/").len(), 2);
}

#[test]
fn a_vault_is_looked_at_and_pruned_by_the_plan_that_was_shown() {
    let file = |name: &str, mib| VaultFile { name: name.into(), bytes: Bytes::mib(mib) };
    let plan = VaultPlan { files: vec![file("a.pack", 3), file("b\u{1b}.draft", 1)], rewrites: vec![] };
    let fake = Fake::start(Script { plan, task: Some(task("vault.verify", TaskState::Done, 1)), ..Script::default() });
    let table = "\
POOL    SNAPSHOTS  PACKS  SIZE     HOST
shared  2          3      150 MiB  h1
local   -          -      -        -
";
    assert_eq!(fake.run(&["vault", "status"]).stdout, table);
    assert_eq!(fake.run(&["vault", "verify", "shared", "--host", "h1"]).stdout, "the vault in shared is whole\n");
    assert_eq!(fake.seen("POST", "/vaults/shared/verify?host=h1").len(), 1);
    let files = "FILE           SIZE\na.pack         3 MiB\nb\\u{1b}.draft  1 MiB\n";
    assert_eq!(fake.run(&["vault", "prune", "shared"]).stdout, format!("{files}2 files would be removed, 4 MiB\n"));
    assert_eq!(body(&fake, "POST", "/vaults/shared/prune"), json!({ "apply": false, "plan": null }));
    let applied = fake.run(&["vault", "prune", "shared", "--apply"]);
    assert_eq!((applied.code, applied.stdout), (Some(0), format!("{files}2 files removed, 4 MiB\n")), "{}", applied.stderr);
    assert_eq!(body(&fake, "POST", "/vaults/shared/prune")["plan"]["files"][0]["name"], "a.pack");
    let told: VaultPlan = serde_json::from_str(&fake.run(&["vault", "prune", "shared", "-o", "json"]).stdout).expect("JSON");
    assert_eq!(told.files.len(), 2);
    let rewrite = VaultRewrite { name: "c.pack".into(), bytes: Bytes::mib(8), freed: Bytes::mib(6) };
    fake.script().plan = VaultPlan { files: vec![file("a.pack", 3)], rewrites: vec![rewrite.clone()] };
    let files = "FILE    SIZE\na.pack  3 MiB\nWRITTEN ANEW  SIZE   FREES ABOUT\nc.pack        8 MiB  6 MiB\n";
    let told = format!("{files}1 file would be removed, 1 file would be written anew, about 9 MiB\n");
    assert_eq!(fake.run(&["vault", "prune", "shared"]).stdout, told);
    // Also if nothing is removed.
    fake.script().plan = VaultPlan { files: vec![], rewrites: vec![rewrite.clone(), rewrite] };
    let applied = fake.run(&["vault", "prune", "shared", "--apply"]);
    assert!(applied.stdout.ends_with("6 MiB\n2 files written anew, about 12 MiB\n"), "{}", applied.stdout);
    assert_eq!(body(&fake, "POST", "/vaults/shared/prune")["plan"]["rewrites"][1]["freed"], 6 << 20);
    fake.script().plan = VaultPlan::default();
    assert_eq!(fake.run(&["vault", "prune", "shared", "--apply"]).stdout, "every file is needed\n");
}
