//! What is asked of guests through QEMU's own agent in them: addresses, and programs that run while the VM moves.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_api::v1::{SnapshotCreate, VmExec};
use godwit_e2e::{Action, Cluster, ClusterSpec, GuestSpec, godwit_binary};
use godwit_model::{
    Bytes, CloudInit, DiskFormat, DiskSpec, ErrorCode, ExecOutcome, GuestFacts, ImportFormat, Millis, Name, Octets, Refusal,
};

fn shell(script: &str) -> VmExec {
    VmExec {
        program: "/bin/busybox".into(),
        args: ["sh", "-c", script].map(ToOwned::to_owned).to_vec(),
        stdin: None,
        timeout: None,
    }
}

fn exec(cluster: &Cluster, vm: &str, request: &VmExec) -> Result<ExecOutcome, Refusal> {
    let vm = Name::new(vm).expect("a name");
    cluster.ask(cluster.client().exec_vm(&vm, request))
}

fn told(cluster: &Cluster, vm: &str, enough: impl Fn(&GuestFacts) -> bool) -> Result<GuestFacts> {
    let deadline = Instant::now() + Duration::from_secs(60);
    let name = Name::new(vm)?;
    loop {
        let now = cluster.ask(cluster.client().vm(&name))?.status.guest;
        if let Some(facts) = now.filter(&enough) {
            return Ok(facts);
        }
        ensure!(Instant::now() < deadline, "{vm} does not tell what it should");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_guest_tells_its_addresses_and_runs_programs_also_while_it_moves() -> Result<()> {
    let mut cluster = ClusterSpec::new(2)?.up()?;
    cluster.import_guest_with_agent()?;
    let spec = GuestSpec::small("web").memory(Bytes::mib(256));
    let guest = cluster.boot(&spec, "h1")?;
    let has_address = |facts: &GuestFacts| {
        facts.interfaces.iter().flat_map(|interface| &interface.addresses).any(|address| address.ip == guest.address)
    };
    told(&cluster, "web", has_address)?;

    let outcome = exec(&cluster, "web", &shell("echo out; echo err >&2; exit 3"))?;
    ensure!(
        (outcome.exit_code, outcome.stdout.0.as_slice(), outcome.stderr.0.as_slice()) == (Some(3), b"out\n", b"err\n"),
        "{outcome:?}"
    );
    let outcome = exec(&cluster, "web", &VmExec { stdin: Some(Octets(b"typed".to_vec())), ..shell("cat") })?;
    ensure!(outcome.stdout.0 == b"typed", "{outcome:?}");
    let missing = exec(&cluster, "web", &VmExec { program: "/bin/nothing".into(), ..shell("") }).err().context("it ran")?;
    ensure!(missing.code == ErrorCode::GuestRefused && missing.hint.is_some(), "{missing:?}");
    let slow = exec(&cluster, "web", &VmExec { timeout: Some(Millis(1_500)), ..shell("sleep 600") }).err().context("it ended")?;
    ensure!(slow.code == ErrorCode::ExecUnfinished, "{slow:?}");

    // Begun on one host, ended on the other, and nobody notices.
    let client = cluster.client().clone();
    let (name, long) = (Name::new("web")?, shell("sleep 12; echo moved; exit 7"));
    let running = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(client.exec_vm(&name, &long)).map_err(|error| error.refusal())
    });
    let begun = Instant::now() + Duration::from_secs(30);
    while !cluster.ask(cluster.client().tasks())?.iter().any(|task| task.kind == "vm.exec" && !task.state.ended()) {
        ensure!(Instant::now() < begun, "the program is not on record");
        thread::sleep(Duration::from_millis(50));
    }
    // The record is there before the guest was asked.
    thread::sleep(Duration::from_secs(1));
    cluster.run(&[Action::IntoTheMiddle("web", "h2")])?;
    let busy = exec(&cluster, "web", &shell("true")).err().context("something was begun in a VM that moves")?;
    ensure!(busy.code == ErrorCode::VmBusy, "{busy:?}");
    cluster.run(&[Action::Ends("web", godwit_e2e::Ending::Moved("h2"))])?;
    let outcome = running.join().expect("no panic")?;
    ensure!((outcome.exit_code, outcome.stdout.0.as_slice()) == (Some(7), b"moved\n"), "{outcome:?}");
    // Both of its clocks stood still with it; one of them is to tell the time.
    let clock =
        told(&cluster, "web", |facts| has_address(facts) && facts.clock.is_some_and(|clock| clock.put_forward_ms.is_some()))?;
    let clock = clock.clock.context("its clock")?;
    println!("after the move: {clock:?}");
    // How near depends on how busy this machine is; that it is nearer, and not ahead, does not.
    let before = clock.put_forward_ms.context("it was not put forward")?;
    ensure!(clock.offset_ms.unsigned_abs() < before + clock.within_ms, "{clock:?}");
    ensure!(clock.offset_ms <= i64::try_from(20 + clock.within_ms)?, "{clock:?}");
    let outcome = exec(&cluster, "web", &shell("echo here"))?;
    ensure!(outcome.stdout.0 == b"here\n", "{outcome:?}");

    // Its agent says nothing when it is to bring its file systems to rest: that takes no longer than it may, and the snapshot is taken.
    let silent =
        "setsid sh -c 'sleep 1; kill -STOP $(pidof qemu-ga); sleep 15; kill -CONT $(pidof qemu-ga)' </dev/null >/dev/null 2>&1 &";
    exec(&cluster, "web", &shell(silent))?;
    thread::sleep(Duration::from_secs(2));
    let quiesce = Some(Millis(2_000));
    let wanted = SnapshotCreate {
        vm: Name::new("web")?,
        name: Some(Name::new("silent")?),
        memory: true,
        quiesce,
        pool: None,
        golden: false,
        reason: None,
    };
    let task = cluster.ask(cluster.client().create_snapshot(&wanted))?.id;
    cluster.done(task, Duration::from_secs(60))?;
    let taken = cluster.ask(cluster.client().snapshot(&Name::new("silent")?))?;
    let warnings = taken.figures.context("figures")?.warnings;
    ensure!(warnings.len() == 1 && warnings[0].contains("as after a power cut"), "{warnings:?}");
    let answers = Instant::now() + Duration::from_secs(60);
    while let Err(refusal) = exec(&cluster, "web", &shell("true")) {
        ensure!(Instant::now() < answers, "it never answers again: {refusal:?}");
        thread::sleep(Duration::from_secs(1));
    }

    // The command line ends as the program ends.
    let endpoint = cluster.client().endpoint();
    let files = tempfile::tempdir()?;
    let (token, authority) = (files.path().join("token"), files.path().join("ca.pem"));
    std::fs::write(&token, &endpoint.token)?;
    std::fs::write(&authority, endpoint.authority.as_deref().unwrap_or_default())?;
    let mut command = Command::new(godwit_binary()?);
    command.args(["vm", "exec", "web", "--url", &endpoint.url]).arg("--token-file").arg(&token).arg("--ca-file").arg(&authority);
    let output = command.args(["--", "/bin/busybox", "sh", "-c", "uname -s; exit 9"]).output()?;
    ensure!(output.status.code() == Some(9) && output.stdout == b"Linux\n", "{output:?}");
    cluster.finish()
}

#[test]
fn a_guest_takes_its_host_name_from_its_seed_and_keeps_the_seed_when_it_moves() -> Result<()> {
    let mut cluster = ClusterSpec::new(2)?.up()?;
    cluster.import_guest_with_agent()?;
    let user_data = "#cloud-config\npassword: hunter2\n";
    let seed = CloudInit { user_data: Some(user_data.into()), host_name: Some(Name::new("inside")?), ..CloudInit::default() };
    cluster.boot(&GuestSpec::small("web_1").memory(Bytes::mib(256)).cloud_init(seed), "h1")?;
    ensure!(cluster.status("web_1")?.host_name == "inside", "{:?}", cluster.status("web_1")?);
    told(&cluster, "web_1", |facts| facts.host_name.as_deref() == Some("inside"))?;
    let read = "cat /seed/user-data; cat /dev/vda | md5sum";
    let before = exec(&cluster, "web_1", &shell(read))?;
    ensure!(before.stdout.0.starts_with(user_data.as_bytes()), "{}", String::from_utf8_lossy(&before.stdout.0));
    let write = exec(&cluster, "web_1", &shell("echo x > /dev/vda"))?;
    ensure!(write.exit_code != Some(0), "the guest wrote on its seed: {write:?}");
    cluster.run(&[Action::Migrate("web_1", "h2")])?;
    told(&cluster, "web_1", |facts| facts.host_name.as_deref() == Some("inside"))?;
    // Read anew from the disk: what its host made there, and not what the guest remembers.
    let after = exec(&cluster, "web_1", &shell(&format!("echo 3 > /proc/sys/vm/drop_caches; {read}")))?;
    ensure!(after.stdout == before.stdout, "another seed: {}", String::from_utf8_lossy(&after.stdout.0));

    let shown = cluster.ask(cluster.client().vm(&Name::new("web_1")?))?;
    ensure!(shown.status.cloud_init.as_ref().is_some_and(|seed| seed.user_data.is_some()), "{:?}", shown.status.cloud_init);
    ensure!(!serde_json::to_string(&shown)?.contains("hunter2"), "the API shows what the seed holds");
    for log in cluster.logs()? {
        let text = std::fs::read(&log).unwrap_or_default();
        ensure!(!String::from_utf8_lossy(&text).contains("hunter2"), "{} holds what the seed holds", log.display());
    }
    cluster.finish()
}

#[test]
fn what_a_guest_has_read_of_its_image_does_not_travel_to_a_host_that_has_the_image() -> Result<()> {
    let mut cluster = ClusterSpec::new(2)?.up()?;
    cluster.import_guest_with_agent()?;
    // More than all else that is in the guest's memory, compressed.
    let mut noise = vec![0; 96 << 20];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut noise)?;
    let size = Bytes(noise.len() as u64);
    let image = Name::new("noise")?;
    cluster.import(&image, ImportFormat::Raw, noise)?;
    let of_image = |name: &str| {
        let volume = format!("shared/{name}").parse().expect("a volume");
        let disk = DiskSpec { image: Some(image.clone()), ..DiskSpec::new(volume, DiskFormat::Raw) };
        GuestSpec::small(name).memory(Bytes::mib(320)).disk(disk)
    };
    cluster.boot_all(&[(of_image("web"), "h1"), (of_image("other"), "h2")])?;
    told(&cluster, "web", |facts| !facts.interfaces.is_empty())?;
    let before = exec(&cluster, "web", &shell("md5sum < /dev/vda"))?;
    ensure!(before.exit_code == Some(0), "{before:?}");

    let moved = cluster.migrate("web", "h2")?;
    let wire = moved.figures.context("figures")?.wire_bytes;
    println!("{wire} on the wire, and the guest has read {size} of noise");
    ensure!(wire < size, "{wire} on the wire, for a guest that has read {size} which cannot be compressed");
    let kept = exec(&cluster, "web", &shell("md5sum < /dev/vda; echo 3 > /proc/sys/vm/drop_caches; md5sum < /dev/vda"))?;
    ensure!(kept.stdout.0 == [&before.stdout.0[..], &before.stdout.0].concat(), "{kept:?}");
    cluster.finish()
}
