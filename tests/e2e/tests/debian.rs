//! Programs of a real Debian in a VM: its cloud-init does what the seed says, and under its kernel's AppArmor our profiles hold.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_api::v1::{VmCreate, VmExec};
use godwit_e2e::{Cluster, ClusterSpec, godwit_binary};
use godwit_model::{Boot, Bytes, CloudInit, DiskFormat, DiskSpec, ErrorCode, ImportFormat, Millis, Name, NicSpec, VmSpec};

/// Imports a Debian, and starts a VM of it on the first host: `words` are for its kernel.
fn start(cluster: &mut Cluster, words: &str, shape: impl FnOnce(VmSpec) -> VmSpec) -> Result<()> {
    let [kernel, initrd, image] = cluster.import_debian()?;
    let cmdline = format!("console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on rdinit=/boot-disk {words}");
    let boot = Boot::Kernel { kernel, initrd: Some(initrd), cmdline };
    let disk = DiskSpec { image: Some(image), ..DiskSpec::new("shared/debian".parse()?, DiskFormat::Qcow2) };
    let spec = shape(VmSpec { disks: vec![disk], ..VmSpec::new(1, Bytes::mib(320), boot) });
    cluster.ask(cluster.client().create_vm(&VmCreate { name: Name::new("debian")?, spec, golden: None }))?;
    let started = cluster.begin_start("debian", "h1")?;
    cluster.done(started, Duration::from_secs(60)).map(drop)
}

/// What a script in the Debian says; nothing while its agent is not there, or if the script fails.
fn says(cluster: &Cluster, script: &str) -> Result<Option<String>> {
    let request = VmExec {
        program: "/bin/sh".into(),
        args: vec!["-c".into(), format!("export PATH=/usr/sbin:/usr/bin; {script}")],
        stdin: None,
        timeout: Some(Millis(240_000)),
    };
    match cluster.ask(cluster.client().exec_vm(&Name::new("debian")?, &request)) {
        Ok(outcome) if outcome.exit_code == Some(0) => Ok(Some(String::from_utf8_lossy(&outcome.stdout.0).into_owned())),
        Ok(outcome) => {
            eprintln!("{script}: {:?}, {}", outcome.exit_code, String::from_utf8_lossy(&outcome.stderr.0));
            Ok(None)
        }
        Err(refusal) if refusal.code == ErrorCode::GuestSilent => Ok(None),
        Err(refusal) => Err(refusal.into()),
    }
}

/// Waits for the Debian's agent.
fn answers(cluster: &Cluster) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(90);
    while says(cluster, "true")?.is_none() {
        ensure!(Instant::now() < deadline, "the Debian does not boot");
        thread::sleep(Duration::from_secs(1));
    }
    Ok(())
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
    let nic = NicSpec { mac: Some(MAC.parse()?), ..NicSpec::new(Name::new("default")?) };
    start(&mut cluster, "", |spec| VmSpec { nics: vec![nic], cloud_init: Some(seed), ..spec })?;
    answers(&cluster)?;
    // Waited for inside: each question from outside takes time from cloud-init.
    let result = "until [ -e /run/cloud-init/result.json ]; do sleep 2; done; cat /run/cloud-init/result.json";
    let result = says(&cluster, result)?.context("a result of cloud-init")?;
    let log = "grep -E 'WARNING|ERROR|CRITICAL' /var/log/cloud-init.log || true";
    let complaints = says(&cluster, log)?.context("a log")?;
    ensure!(
        result.contains("NoCloud [seed=/dev/vdb]") && result.contains("\"errors\": []") && complaints.is_empty(),
        "{result}{complaints}"
    );

    let applied = "hostname; cat /etc/of-user-data /var/lib/of-runcmd /var/lib/of-vendor-data; stat -c %a /etc/of-user-data; \
                   cat /sys/class/net/lan0/mtu /sys/class/net/lan0/address; ip -4 -o address show lan0 | awk '{ print $4 }'";
    let expected = format!("inside\nwritten, by us\nran on inside\nfrom the vendor\n640\n1380\n{MAC}\n10.99.0.77/24\n");
    let before = says(&cluster, applied)?;
    ensure!(before.as_ref() == Some(&expected), "{before:?}");

    // On its new host it reads the seed anew, finds the instance that it is, and does nothing twice.
    cluster.migrate("debian", "h2")?;
    // What knows of this boot is forgotten, as a boot would: cloud-init then looks at the disk and not at what it remembers.
    let again = "echo 3 > /proc/sys/vm/drop_caches; rm -r /run/cloud-init; /usr/lib/cloud-init/ds-identify; : > /var/log/cloud-init.log; \
                 cloud-init init --local >&2 && cloud-init modules --mode=final >&2 || exit; \
                 cat /var/lib/cloud/data/instance-id /var/lib/cloud/data/previous-instance-id; \
                 grep -m 1 -o 'Using data from /dev/vdb' /var/log/cloud-init.log";
    let ids = says(&cluster, again)?.context("a second run of cloud-init that ends well")?;
    let id = cluster.ask(cluster.client().vm(&Name::new("debian")?))?.id;
    ensure!(ids.starts_with(&format!("{id}\n{id}\n")) && ids.contains("/dev/vdb"), "{id}: {ids}");
    let after = says(&cluster, applied)?;
    ensure!(after.as_ref() == Some(&expected), "{after:?}");
    cluster.finish()
}

fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output().with_context(|| program.to_owned())?;
    ensure!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Where a program is, links followed.
fn find(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file());
    Ok(found.with_context(|| format!("no {name}: scripts/setup installs it"))?.canonicalize()?)
}

/// A CD of what a host runs: our binary, QEMU, swtpm, and the libraries that they load. Answers QEMU's place, and the directory of one that was
/// unpacked, whose content is below `qemu` on the CD; all else is below `usr`.
fn host_disk(dir: &Path) -> Result<(PathBuf, PathBuf, Option<PathBuf>)> {
    let (root, libraries) = (dir.join("root"), dir.join("root/usr/lib/x86_64-linux-gnu"));
    let bin = root.join("usr/bin");
    [&bin, &libraries].into_iter().try_for_each(fs::create_dir_all)?;
    let (godwit, qemu, swtpm) = (godwit_binary()?, find("qemu-system-x86_64")?, find("swtpm")?);
    let text = |path: &Path| path.to_str().map(str::to_owned).context("text");
    run("strip", &["-o", &text(&bin.join("godwit"))?, &text(&godwit)?])?;
    fs::copy(&swtpm, bin.join("swtpm"))?;
    let unpacked = qemu.ancestors().nth(2).filter(|prefix| prefix.join("root/usr/bin/qemu-system-x86_64").is_file());
    let mut own = String::new();
    let program = match unpacked {
        Some(prefix) => {
            run("cp", &["-a", &text(prefix)?, &text(&root.join("qemu"))?])?;
            own = text(&prefix.join("root/usr/lib/x86_64-linux-gnu"))?;
            prefix.join("root/usr/bin/qemu-system-x86_64")
        }
        None => {
            fs::copy(&qemu, bin.join("qemu-system-x86_64"))?;
            qemu.clone()
        }
    };
    for program in [&godwit, &swtpm, &program] {
        let listed = Command::new("ldd").arg(program).env("LD_LIBRARY_PATH", &own).output()?;
        for path in String::from_utf8_lossy(&listed.stdout).lines().filter_map(|line| line.split_once("=> /")?.1.split(' ').next())
        {
            let path = Path::new("/").join(path);
            if unpacked.is_none_or(|prefix| !path.starts_with(prefix)) {
                fs::copy(&path, libraries.join(path.file_name().context("a file")?))?;
            }
        }
    }
    let disk = dir.join("host.iso");
    run("genisoimage", &["-quiet", "-R", "-V", "host", "-o", &text(&disk)?, &text(&root)?])?;
    // What is read past the host's cache is a whole number of its blocks.
    let file = fs::File::options().write(true).open(&disk)?;
    file.set_len(file.metadata()?.len().next_multiple_of(4096))?;
    Ok((disk, qemu.clone(), unpacked.map(Path::to_owned)))
}

/// Tries what a program in a cage may want, as root and without a cage, under the profile that its argument names (`-`: none).
const PROBE: &str = r#"
import ctypes, os, socket, sys
if sys.argv[1] != "-":
    open("/proc/self/attr/apparmor/exec", "w").write("exec " + sys.argv[1])
    os.execv(sys.executable, [sys.executable, sys.argv[0], "-"])
libc = ctypes.CDLL(None, use_errno=True)
def call(function, *arguments):
    if function(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")
for name, attempt in {
    "library": lambda: open("/usr/lib/os-release"),
    "own": lambda: open("/run/godwit/1111/own/vnc", "w"),
    "other": lambda: open("/run/godwit/2222/own/vnc", "w"),
    "state": lambda: open("/var/lib/godwit/agent/journal"),
    "volume": lambda: open("/srv/pool/volume", "r+"),
    "system": lambda: open("/etc/shadow"),
    "exec": lambda: os.posix_spawn("/usr/bin/true", ["true"], {}),
    "mount": lambda: call(libc.mount, b"none", b"/mnt", b"tmpfs", 0, None),
    "ptrace": lambda: call(libc.ptrace, 0x4206, os.getppid(), 0, 0),
    "signal": lambda: os.kill(os.getppid(), 0),
    "inet": lambda: socket.socket(socket.AF_INET),
    "packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "capability": lambda: socket.sethostname("taken"),
}.items():
    try:
        attempt()
        print(name)
    except PermissionError:
        pass
"#;

/// Where things are on the host that the probe attacks; the files of another VM belong to another uid.
const PREPARE: &str = "umask 022 && mount -t securityfs securityfs /sys/kernel/security && mkdir -p /host /mnt /srv/pool /var/lib/godwit/agent \
    /run/godwit/1111/own /run/godwit/2222/own && mount -o ro /dev/vdb /host && cp -rn /host/usr / && \
    touch /srv/pool/volume /var/lib/godwit/agent/journal /run/godwit/2222/own/vnc && chown -R 70000 /run/godwit/2222";

/// `host check` loads the profiles and starts QEMU and swtpm in cages; meanwhile the labels of all processes are looked at.
const CHECK: &str = "(until [ -e /run/checked ]; do for label in /proc/[0-9]*/attr/current; do \
    read -r name <$label && case $name in godwit*) echo $name;; esac; done; sleep 0.5; done >/run/seen 2>/dev/null) & \
    godwit host check -o json --pool local=/srv/pool --qemu";

#[test]
fn where_apparmor_is_enforced_qemu_runs_under_our_profile_which_refuses_what_it_has_no_use_for() -> Result<()> {
    let mut cluster = ClusterSpec::new(1)?.up()?;
    let dir = tempfile::tempdir()?;
    let (disk, qemu, unpacked) = host_disk(dir.path())?;
    let name = Name::new("host")?;
    cluster.import(&name, ImportFormat::Raw, fs::read(disk)?)?;
    let disk = DiskSpec { image: Some(name), ..DiskSpec::new("shared/host".parse()?, DiskFormat::Raw) };
    start(&mut cluster, "apparmor=1 security=apparmor", |mut spec| {
        spec.disks.push(disk);
        VmSpec { memory: Bytes::mib(768), ..spec }
    })?;
    answers(&cluster)?;
    let place = unpacked.map(|prefix| format!("mkdir -p {0} && mount --bind /host/qemu {0}", prefix.display()));
    says(&cluster, &format!("{PREPARE} && {}", place.unwrap_or_else(|| "true".into())))?.context("what a host has")?;

    let check = format!("{CHECK} {} ; touch /run/checked", qemu.display());
    let findings: serde_json::Value = serde_json::from_str(&says(&cluster, &check)?.context("findings")?)?;
    for wanted in ["apparmor", "qemu", "tpm"] {
        let finding = findings.as_array().into_iter().flatten().find(|finding| finding["name"] == wanted).context("a finding")?;
        // An older QEMU works and is warned of.
        let well = finding["level"] == "ok" || (wanted == "qemu" && finding["level"] == "warn");
        ensure!(well, "{finding}");
    }
    let profiles =
        says(&cluster, "sed -n 's/ (enforce)$//p' /sys/kernel/security/apparmor/profiles | grep ^godwit-")?.unwrap_or_default();
    let profile =
        |kind: &str| profiles.lines().find(|name| name.starts_with(kind)).with_context(|| format!("{kind} in {profiles}"));
    let seen = says(&cluster, "sort -u /run/seen; dmesg | grep 'apparmor=\"DENIED\".*profile=\"godwit' >&2 && exit 1; true")?;
    let seen = seen.context("QEMU and swtpm did something that their profiles refuse")?;
    ensure!(seen.contains(&format!("{} (enforce)", profile("godwit-qemu-")?)), "{seen}");

    let attempts = |profile: &str| -> Result<BTreeSet<String>> {
        let quoted = PROBE.replace('\'', "'\\''");
        // Where every profile lets Python read it.
        let script = format!("printf %s '{quoted}' >/usr/lib/probe.py; python3 /usr/lib/probe.py {profile}");
        let said = says(&cluster, &script)?.with_context(|| format!("the probe under {profile}"))?;
        Ok(said.lines().map(str::to_owned).collect())
    };
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    let everything = attempts("-")?;
    ensure!(everything.len() == 13, "without a profile: {everything:?}");
    for (kind, allowed) in [
        ("godwit-qemu-", set(&["library", "own"])),
        ("godwit-tpm-", set(&["library", "volume"])),
        ("godwit-tool-", set(&["library", "volume"])),
        ("godwit-carry-", set(&["library", "inet"])),
    ] {
        let done = attempts(profile(kind)?)?;
        ensure!(done == allowed, "under {kind} {done:?} instead of {allowed:?}");
    }
    cluster.finish()
}
