//! What is asked of guests through QEMU's own agent in them: addresses, and programs that run while the VM moves.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_api::v1::{VmCreate, VmExec};
use godwit_e2e::{Action, CloudImage, Cluster, ClusterSpec, GuestImages, GuestSpec, cloud_image, godwit_binary, guest_images};
use godwit_model::{
    Boot, Bytes, CloudInit, DiskFormat, DiskSpec, ErrorCode, ExecOutcome, GuestFacts, ImportFormat, Millis, Name, NicSpec, Octets,
    Refusal, VmSpec,
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
    told(&cluster, "web", has_address)?;
    let outcome = exec(&cluster, "web", &shell("echo here"))?;
    ensure!(outcome.stdout.0 == b"here\n", "{outcome:?}");

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

/// Imports a Debian and creates a VM of it.
fn create_debian(cluster: &Cluster, vm: &Name, cloud_init: CloudInit, mac: &str) -> Result<()> {
    let (GuestImages { kernel, initrd }, CloudImage { disk, boot }) = (guest_images()?, cloud_image()?);
    let names = ["debian-kernel", "debian-initrd", "debian"].map(|name| Name::new(name).expect("a name"));
    cluster.import(&names[0], ImportFormat::Kernel, std::fs::read(kernel)?)?;
    cluster.import(&names[1], ImportFormat::Initrd, [std::fs::read(initrd)?, std::fs::read(boot)?].concat())?;
    cluster.import(&names[2], ImportFormat::Qcow2, std::fs::read(disk)?)?;
    let [kernel, initrd, image] = names;
    let words = "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on rdinit=/boot-disk";
    let boot = Boot::Kernel { kernel, initrd: Some(initrd), cmdline: words.into() };
    let disk = DiskSpec { image: Some(image), ..DiskSpec::new("shared/debian".parse()?, DiskFormat::Qcow2) };
    let nic = NicSpec { mac: Some(mac.parse()?), ..NicSpec::new(Name::new("default")?) };
    let spec = VmSpec { disks: vec![disk], nics: vec![nic], cloud_init: Some(cloud_init), ..VmSpec::new(1, Bytes::mib(320), boot) };
    cluster.ask(cluster.client().create_vm(&VmCreate { name: vm.clone(), spec }))?;
    Ok(())
}

/// What a command in the Debian says; not before its agent is there.
fn debian_says(cluster: &Cluster, vm: &str, script: &str) -> Result<Option<String>> {
    let request = VmExec {
        program: "/bin/sh".into(),
        args: vec!["-c".into(), format!("export PATH=/usr/sbin:/usr/bin; {script}")],
        stdin: None,
        timeout: Some(Millis(90_000)),
    };
    match exec(cluster, vm, &request) {
        Ok(outcome) if outcome.exit_code == Some(0) => Ok(Some(String::from_utf8_lossy(&outcome.stdout.0).into_owned())),
        Ok(_) => Ok(None),
        Err(refusal) if refusal.code == ErrorCode::GuestSilent => Ok(None),
        Err(refusal) => Err(refusal.into()),
    }
}

#[test]
fn debians_own_cloud_init_does_what_the_seed_says_and_knows_it_again_on_another_host() -> Result<()> {
    const MAC: &str = "52:54:00:67:77:01";
    let mut cluster = ClusterSpec::new(2)?.up()?;
    let network = format!(
        "version: 2\nethernets:\n  first:\n    match: {{macaddress: \"{MAC}\"}}\n    set-name: lan0\n    \
         addresses: [10.99.0.77/24]\n    mtu: 1380\n"
    );
    let user_data = "#cloud-config\nwrite_files:\n- {path: /etc/of-user-data, content: \"written, by us\\n\", permissions: \"0640\"}\n\
                     runcmd:\n- [sh, -c, 'echo ran on $(hostname) >> /var/lib/of-runcmd']\n";
    let seed = CloudInit {
        user_data: Some(user_data.into()),
        network_config: Some(network),
        vendor_data: Some("#!/bin/sh\necho from the vendor >> /var/lib/of-vendor-data\n".into()),
        host_name: Some(Name::new("inside.example")?),
    };
    let vm = Name::new("debian")?;
    create_debian(&cluster, &vm, seed, MAC)?;
    let started = cluster.begin_start("debian", "h1")?;
    cluster.done(started, Duration::from_secs(60))?;
    let deadline = Instant::now() + Duration::from_secs(180);
    let result = loop {
        if let Some(result) = debian_says(&cluster, "debian", "cat /run/cloud-init/result.json")? {
            break result;
        }
        ensure!(
            Instant::now() < deadline,
            "cloud-init does not end: {:?}",
            debian_says(&cluster, "debian", "cat /var/log/cloud-init.log")
        );
        thread::sleep(Duration::from_secs(1));
    };
    let log = "grep -E 'WARNING|ERROR|CRITICAL' /var/log/cloud-init.log || true";
    let complaints = debian_says(&cluster, "debian", log)?.context("a log")?;
    ensure!(
        result.contains("NoCloud [seed=/dev/vdb]") && result.contains("\"errors\": []") && complaints.is_empty(),
        "{result}{complaints}"
    );

    let applied = "hostname; cat /etc/of-user-data /var/lib/of-runcmd /var/lib/of-vendor-data; stat -c %a /etc/of-user-data; \
                   cat /sys/class/net/lan0/mtu /sys/class/net/lan0/address; ip -4 -o address show lan0 | awk '{ print $4 }'";
    let expected = format!("inside\nwritten, by us\nran on inside\nfrom the vendor\n640\n1380\n{MAC}\n10.99.0.77/24\n");
    let before = debian_says(&cluster, "debian", applied)?;
    ensure!(before.as_ref() == Some(&expected), "{before:?}");
    told(&cluster, "debian", |facts| facts.host_name.as_deref() == Some("inside"))?;

    // On its new host it reads the seed anew, finds the instance that it is, and does nothing twice.
    cluster.migrate("debian", "h2")?;
    // What knows of this boot is forgotten, as a boot would: cloud-init then looks at the disk and not at what it remembers.
    let again = "echo 3 > /proc/sys/vm/drop_caches; rm -r /run/cloud-init; /usr/lib/cloud-init/ds-identify; : > /var/log/cloud-init.log; \
                 cloud-init init --local >&2 && cloud-init modules --mode=final >&2 || exit; \
                 cat /var/lib/cloud/data/instance-id /var/lib/cloud/data/previous-instance-id; \
                 grep -m 1 -o 'Using data from /dev/vdb' /var/log/cloud-init.log";
    let ids = debian_says(&cluster, "debian", again)?.context("a second run of cloud-init that ends well")?;
    let id = cluster.ask(cluster.client().vm(&vm))?.id;
    ensure!(ids.starts_with(&format!("{id}\n{id}\n")) && ids.contains("/dev/vdb"), "{id}: {ids}");
    let after = debian_says(&cluster, "debian", applied)?;
    ensure!(after.as_ref() == Some(&expected), "{after:?}");
    cluster.finish()
}
