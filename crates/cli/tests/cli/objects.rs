//! Lists, formats, watching, creating, importing, deleting.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use godwit_api::v1::{Change, TaskState, Vm};
use serde_json::{Value, json};

use crate::fake::{Fake, Script, task, vm, vm_event};

#[test]
fn a_list_is_a_table_or_json_or_yaml() {
    let fake = Fake::start(Script { vms: vec![vm("web1"), vm("a-longer-name")], ..Script::default() });
    let table = "\
NAME           STATE    HOST  VCPUS  MEMORY  ACTIVITY  TEAM     CONDITIONS
web1           running  h1    2      1 GiB   -         default  -
a-longer-name  running  h1    2      1 GiB   -         default  -
";
    assert_eq!(fake.run(&["vm", "list"]).stdout, table);
    let json: Vec<Vm> = serde_json::from_str(&fake.run(&["vm", "list", "-o", "json"]).stdout).expect("JSON");
    let yaml: Vec<Vm> = serde_yaml_ng::from_str(&fake.run(&["vm", "list", "-o", "yaml"]).stdout).expect("YAML");
    assert_eq!(json, [vm("web1"), vm("a-longer-name")]);
    assert_eq!(yaml, json);
    assert!(fake.run(&["vm", "show", "web1"]).stdout.contains("\nMemory:        1 GiB\n"));
}

#[test]
fn a_watched_list_tells_what_is_and_then_what_changes_once_each() {
    let (old, mut new) = (vm("web1"), vm("web1"));
    new.revision += 1;
    let stale = vm_event(1, &old, Change::Set);
    let streams = [
        vec![stale.clone(), vm_event(2, &new, Change::Set)],
        vec![vm_event(2, &new, Change::Set), vm_event(3, &new, Change::Deleted)],
    ];
    let fake = Fake::start(Script { vms: vec![old], streams: streams.into(), ..Script::default() });
    let mut child = fake.command(&["vm", "list", "--watch"]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("started");
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines().take(3);
    let lines: Vec<Value> = lines.map(|line| serde_json::from_str(&line.expect("a line")).expect("JSON")).collect();
    child.kill().expect("killed");
    child.wait().expect("ended");
    let told: Vec<_> = lines.iter().map(|line| (line["change"].as_str(), line["object"]["revision"].as_u64())).collect();
    assert_eq!(told, [(Some("set"), Some(7)), (Some("set"), Some(8)), (Some("deleted"), None)]);
    let asked: Vec<String> = fake.seen("GET", "/events").into_iter().map(|seen| seen.path).collect();
    assert_eq!(asked.get(..2), Some(&["/events".to_owned(), "/events?after=2".to_owned()][..]));
}

#[test]
fn a_vm_is_created_from_flags_as_from_a_file() {
    let fake = Fake::start(Script { task: Some(task("vm.start", TaskState::Done, 1)), ..Script::default() });
    let flags = fake.run(&[
        "vm",
        "create",
        "web1",
        "--memory",
        "1GiB",
        "--vcpus",
        "2",
        "--kernel",
        "k",
        "--initrd",
        "i",
        "--cmdline",
        "console=ttyS0",
        "--disk",
        "shared/web1,format=qcow2,size=1GiB,cache=direct",
        "--nic",
        "default,mac=52:54:00:00:00:01",
        "--start",
        "--host",
        "h2",
    ]);
    assert_eq!((flags.code, flags.stdout.as_str()), (Some(0), "web1 created, runs on h1\n"), "{}", flags.stderr);
    let spec = "vcpus: 2\nmemory: 1GiB\nboot: {from: kernel, kernel: k, initrd: i, cmdline: console=ttyS0}\n\
                disks: [{volume: shared/web1, format: qcow2, size: 1GiB}]\nnics: [{network: default, mac: '52:54:00:00:00:01'}]\n";
    assert_eq!(fake.run_with_input(&["vm", "create", "web1", "--file", "-"], spec.as_bytes()).code, Some(0));
    let bodies: Vec<Value> = fake
        .seen("POST", "/vms")
        .iter()
        .filter(|seen| seen.path == "/vms")
        .map(|seen| serde_json::from_slice(&seen.body).expect("JSON"))
        .collect();
    assert_eq!(bodies.len(), 2);
    assert_eq!(bodies[0], bodies[1]);
    assert_eq!(bodies[0]["spec"]["memory"], json!(1 << 30));
    let starts = fake.seen("POST", "/vms/web1/start");
    assert_eq!(starts.len(), 1);
    assert_eq!(serde_json::from_slice::<Value>(&starts[0].body).expect("JSON"), json!({ "host": "h2" }));
}

#[test]
fn a_vm_that_was_created_but_not_started_is_half_of_it() {
    let fake = Fake::start(Script::default());
    let ended = fake.run(&["vm", "create", "bad", "--memory", "1GiB", "--kernel", "k", "--start"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(5), ""));
    let told: Vec<&str> = ended.stderr.lines().collect();
    assert_eq!(told[0], "error: another task works on it [vm_busy]");
    assert_eq!(told[1], "error: bad was created, but not started");
}

#[test]
fn a_spec_that_cannot_be_is_refused_before_anything_is_sent() {
    let fake = Fake::start(Script::default());
    let ended = fake.run(&["vm", "create", "web1", "--memory", "1000001", "--kernel", "k"]);
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains("[spec_invalid]"), "{}", ended.stderr);
    assert!(fake.script().seen.is_empty());
}

#[test]
fn an_image_is_streamed_from_a_file_and_from_standard_input() {
    let fake = Fake::start(Script::default());
    let content: Vec<u8> = (0..1_000_000_u32).map(|number| number as u8).collect();
    let path = fake.home.path().join("disk.raw");
    std::fs::write(&path, &content).expect("written");
    let ended = fake.run(&["image", "import", "disk", path.to_str().expect("UTF-8"), "--kind", "raw"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), "image disk imported: raw, 976.5 KiB\n"), "{}", ended.stderr);
    assert_eq!(fake.run_with_input(&["image", "import", "disk", "-", "--kind", "raw"], &content).code, Some(0));
    let seen = fake.seen("PUT", "/images/disk?kind=raw");
    assert_eq!(seen.len(), 2);
    assert!(seen.iter().all(|seen| seen.body == content));
    let missing = fake.run(&["image", "import", "disk", "/nonexistent", "--kind", "raw"]);
    assert_eq!(missing.code, Some(2));
    assert!(missing.stderr.contains("cannot read /nonexistent: No such file"), "{}", missing.stderr);
    assert_eq!(fake.run(&["image", "import", "disk", "/", "--kind", "raw"]).code, Some(2));
}

#[test]
fn nothing_is_deleted_without_a_word_for_it() {
    let fake = Fake::start(Script { task: Some(task("vm.delete", TaskState::Done, 1)), ..Script::default() });
    let unasked = fake.run(&["vm", "delete", "web1", "--volumes"]);
    assert_eq!(unasked.code, Some(4));
    assert!(unasked.stderr.contains("--yes"), "{}", unasked.stderr);
    // The pretended VM runs.
    let dry = fake.run(&["vm", "delete", "web1", "--dry-run"]);
    assert_eq!(dry.code, Some(4));
    assert!(dry.stderr.contains("[vm_running]"), "{}", dry.stderr);
    assert!(fake.seen("DELETE", "/").is_empty());
    let deleted = fake.run(&["vm", "delete", "web1", "--volumes", "--yes"]);
    assert_eq!((deleted.code, deleted.stdout.as_str()), (Some(0), "web1 deleted\n"));
    assert_eq!(fake.seen("DELETE", "/vms/web1?volumes=true").len(), 1);
}

#[test]
fn one_failure_of_several_is_part_of_the_work() {
    let fake = Fake::start(Script { task: Some(task("vm.kill", TaskState::Done, 1)), ..Script::default() });
    let ended = fake.run(&["vm", "kill", "a", "bad", "b"]);
    assert_eq!(ended.code, Some(5));
    assert_eq!(ended.stdout, "a killed\nb killed\n");
    assert!(ended.stderr.contains("[vm_busy]") && ended.stderr.contains("1 of 3 failed"), "{}", ended.stderr);
    assert_eq!(fake.run(&["vm", "kill", "bad"]).code, Some(8));
}

#[test]
fn a_host_is_removed_only_on_purpose() {
    let fake = Fake::start(Script::default());
    let unasked = fake.run(&["host", "remove", "h1"]);
    assert_eq!(unasked.code, Some(4), "{}", unasked.stderr);
    assert_eq!(fake.run(&["host", "remove", "h1", "--force"]).code, Some(4), "force is no yes");
    let dry = fake.run(&["host", "remove", "h1", "--force", "--dry-run"]);
    assert!(dry.stdout.contains("2 VMs on it that nothing can be told to"), "{}", dry.stdout);
    assert!(fake.seen("DELETE", "/hosts").is_empty());
    assert_eq!(fake.run(&["host", "remove", "h1", "--yes"]).code, Some(0));
    assert_eq!(fake.run(&["host", "remove", "h1", "--yes", "--force"]).code, Some(0));
    let seen: Vec<_> = fake.seen("DELETE", "/hosts").into_iter().map(|seen| seen.path).collect();
    assert_eq!(seen, ["/hosts/h1?force=false", "/hosts/h1?force=true"]);
}
