//! TPMs: what a guest keeps in one is there after every move, after a move that was given up, after a restart of the agent, and after a stop.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_api::v1::{VmDelete, VmExec};
use godwit_e2e::{Action, Cluster, ClusterSpec, Ending, GuestSpec, Party, ProcessRole, other_qemu, tpm};
use godwit_model::{Bytes, DiskFormat, DiskSpec, ExecOutcome, Firmware, Name, Octets, Retry, Tpm, TpmVersion, VmSpec};

const INDEX: u32 = 0x0150_0001;
const VALUE: &[u8] = b"kept in the TPM";
/// A register that neither firmware nor kernel use.
const REGISTER: u8 = 23;
const VARIABLE: &str = "/efi/Godwit-6f1a3c52-8f0e-4a57-9d6b-2f6f0d5a7c11";

/// Runs a script in the guest, as soon as its agent answers.
fn script(cluster: &Cluster, script: &str, stdin: &[u8]) -> Result<ExecOutcome> {
    let args = ["sh", "-c", script].map(ToOwned::to_owned).to_vec();
    let request = VmExec { program: "/bin/busybox".into(), args, stdin: Some(Octets(stdin.to_vec())), timeout: None };
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match cluster.ask(cluster.client().exec_vm(&Name::new("web")?, &request)) {
            Err(refusal) if refusal.retry == Retry::Safe && Instant::now() < deadline => thread::sleep(Duration::from_millis(200)),
            other => return other.context(script.to_owned()),
        }
    }
}

/// What a script prints; it must succeed.
fn said(cluster: &Cluster, text: &str) -> Result<Vec<u8>> {
    let outcome = script(cluster, text, &[])?;
    ensure!(outcome.exit_code == Some(0), "{text}: {outcome:?}");
    Ok(outcome.stdout.0)
}

/// One command to the guest's TPM, and its response.
fn ask_tpm(cluster: &Cluster, command: &[u8]) -> Result<Vec<u8>> {
    let outcome = script(cluster, "exec 3<>/dev/tpm0 && cat >&3 && dd bs=4096 count=1 <&3 2>/dev/null", command)?;
    ensure!(outcome.exit_code == Some(0), "{outcome:?}");
    Ok(outcome.stdout.0)
}

fn register(cluster: &Cluster) -> Result<Vec<u8>> {
    tpm::digest(&ask_tpm(cluster, &tpm::register(REGISTER))?)
}

fn permanent(cluster: &Cluster) -> Result<Vec<u8>> {
    tpm::data(&ask_tpm(cluster, &tpm::read(INDEX, u16::try_from(VALUE.len())?))?)
}

fn with_firmware_and_tpm(spec: &mut VmSpec) {
    spec.firmware = Firmware::Uefi { variables: "shared/web-efi".parse().expect("a volume"), secure_boot: false };
    spec.tpm = Some(Tpm { version: TpmVersion::V2, state: "shared/web-tpm".parse().expect("a volume") });
}

/// No other host sees them.
fn of_the_host_alone(spec: &mut VmSpec) {
    spec.firmware = Firmware::Uefi { variables: "local/web-efi".parse().expect("a volume"), secure_boot: false };
    spec.tpm = Some(Tpm { version: TpmVersion::V2, state: "local/web-tpm".parse().expect("a volume") });
}

/// A guest with UEFI, a TPM and two disks, and something of its own in each of them.
fn boot(cluster: &mut Cluster, pool: &'static str) -> Result<()> {
    cluster.import_guest_with_agent()?;
    let disk = |name: &str, format| -> Result<DiskSpec> {
        Ok(DiskSpec { size: Some(Bytes::mib(64)), ..DiskSpec::new(format!("{pool}/{name}").parse()?, format) })
    };
    let guest = GuestSpec::small("web").memory(Bytes::mib(384));
    let guest = guest.disk(disk("root", DiskFormat::Qcow2)?).disk(disk("data", DiskFormat::Raw)?).shape(with_firmware_and_tpm);
    let guest = if pool == "local" { guest.shape(of_the_host_alone) } else { guest };
    cluster.boot(&guest, "h1")?;
    mount(cluster)?;
    said(cluster, &format!("printf '\\007\\000\\000\\000variable' > {VARIABLE}"))?;
    for disk in ["vda", "vdb"] {
        said(cluster, &format!("echo content of {disk} | dd of=/dev/{disk} conv=fsync,notrunc"))?;
    }
    ensure!(register(cluster)? == [0; 32], "the register is in use");
    let size = u16::try_from(VALUE.len())?;
    for command in [tpm::define(INDEX, size), tpm::write(INDEX, VALUE), tpm::extend(REGISTER, [7; 32])] {
        tpm::accepted(&ask_tpm(cluster, &command)?)?;
    }
    Ok(())
}

fn mount(cluster: &Cluster) -> Result<()> {
    said(cluster, "mkdir -p /efi && mount -t efivarfs none /efi").map(drop)
}

/// Everything is there, but for the registers, which a start clears.
fn is_kept(cluster: &Cluster) -> Result<()> {
    let value = permanent(cluster)?;
    ensure!(value == VALUE, "the TPM has {value:?}");
    let variable = said(cluster, &format!("tail -c 8 {VARIABLE}"))?;
    ensure!(variable == b"variable", "the variable is {variable:?}");
    for disk in ["vda", "vdb"] {
        let content = said(cluster, &format!("echo 3 > /proc/sys/vm/drop_caches; head -c 15 /dev/{disk}"))?;
        ensure!(content == format!("content of {disk}\n").as_bytes(), "{disk} has {content:?}");
    }
    Ok(())
}

fn pool(cluster: &Cluster) -> Result<PathBuf> {
    Ok(cluster.lab().shared_pool()?)
}

/// The state's volume belongs to the user of the TPM on `host` and to nobody else, and nothing of a move is left in the pool.
fn state_is_secret(cluster: &Cluster, host: &str) -> Result<u64> {
    let id = cluster.guest("web")?.id;
    let processes = cluster.processes(host)?;
    let process = processes.iter().find(|process| process.role == ProcessRole::Tpm(id)).context("no TPM")?;
    let user = fs::metadata(format!("/proc/{}", process.pid))?.uid();
    let state = fs::metadata(pool(cluster)?.join("volumes/web-tpm"))?;
    ensure!((state.uid(), state.mode() & 0o777) == (user, 0o600), "the state is {} {:o}", state.uid(), state.mode());
    // The destination clears up when it has heard that the source is gone, which is told to nobody.
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let left: Vec<_> = fs::read_dir(pool(cluster)?.join("partial"))?.flatten().map(|entry| entry.file_name()).collect();
        if left.is_empty() {
            return Ok(state.ino());
        }
        ensure!(Instant::now() < deadline, "left in the pool: {left:?}");
        thread::sleep(Duration::from_millis(200));
    }
}

/// Switches the VM off and deletes it with its volumes: the TPM is gone and its state with it.
fn delete(cluster: &Cluster) -> Result<()> {
    let vm = Name::new("web")?;
    let soon = Duration::from_secs(60);
    let task = cluster.ask(cluster.client().kill_vm(&vm))?;
    cluster.done(task.id, soon)?;
    let task = cluster.ask(cluster.client().delete_vm(&vm, &VmDelete { volumes: true }))?;
    cluster.done(task.id, soon)?;
    ensure!(!pool(cluster)?.join("volumes/web-tpm").exists(), "the state is still there");
    Ok(())
}

#[test]
fn a_tpm_moves_there_and_back_with_variables_and_disks_and_is_there_after_a_start_elsewhere() -> Result<()> {
    let cluster = ClusterSpec::new(2)?;
    let mut cluster = match other_qemu() {
        Some(other) => cluster.qemu("h2", &other).up()?,
        None => cluster.up()?,
    };
    boot(&mut cluster, "shared")?;
    is_kept(&cluster)?;
    let extended = register(&cluster)?;
    ensure!(extended != [0; 32], "the register was not extended");
    state_is_secret(&cluster, "h1")?;
    for host in ["h2", "h1"] {
        cluster.run(&[Action::Migrate("web", host)])?;
        is_kept(&cluster).with_context(|| format!("on {host}"))?;
        ensure!(register(&cluster)? == extended, "the register is another on {host}");
        state_is_secret(&cluster, host)?;
    }
    // What was written since the move is written where the VM is.
    tpm::accepted(&ask_tpm(&cluster, &tpm::write(INDEX, VALUE))?)?;
    cluster.stop_and_start("web", "h2")?;
    mount(&cluster)?;
    is_kept(&cluster).context("after a start on h2")?;
    ensure!(register(&cluster)? == [0; 32], "a start clears registers");
    state_is_secret(&cluster, "h2")?;
    delete(&cluster)?;
    cluster.finish()
}

#[test]
fn a_move_that_is_given_up_and_a_restart_of_the_agent_leave_the_tpm_as_it_is() -> Result<()> {
    let mut cluster = ClusterSpec::new(2)?.up()?;
    boot(&mut cluster, "shared")?;
    let extended = register(&cluster)?;
    let state = state_is_secret(&cluster, "h1")?;
    for (what, fault) in [("cancelled", Action::Cancel("web")), ("QEMU killed", Action::Kill(Party::Qemu("web", "h2")))] {
        let ending = if what == "cancelled" { Ending::Cancelled("h1") } else { Ending::Stayed("h1", &[]) };
        cluster.run(&[Action::IntoTheMiddle("web", "h2"), fault, Action::Ends("web", ending)]).context(what)?;
        is_kept(&cluster).context(what)?;
        ensure!(register(&cluster)? == extended, "{what}: the register is another");
        ensure!(state_is_secret(&cluster, "h1")? == state, "{what}: the state is in another file");
    }
    cluster.run(&[Action::Kill(Party::Agent("h1")), Action::Restart(Party::Agent("h1"))])?;
    is_kept(&cluster).context("after a restart of the agent")?;
    // The new life of the destination's agent knows from its journal which file is to become the volume.
    cluster.run(&[
        Action::IntoTheMiddle("web", "h2"),
        Action::Kill(Party::Agent("h2")),
        Action::Restart(Party::Agent("h2")),
        Action::Ends("web", Ending::Moved("h2")),
    ])?;
    is_kept(&cluster).context("on h2")?;
    ensure!(register(&cluster)? == extended && state_is_secret(&cluster, "h2")? != state, "the state did not come along");
    cluster.finish()
}

#[test]
fn a_tpm_variables_and_disks_that_no_other_host_sees_travel_with_their_vm() -> Result<()> {
    let cluster = ClusterSpec::new(2)?;
    let mut cluster = match other_qemu() {
        Some(other) => cluster.qemu("h2", &other).up()?,
        None => cluster.up()?,
    };
    boot(&mut cluster, "local")?;
    let extended = register(&cluster)?;
    let volumes = |cluster: &Cluster, host: &str| -> Result<Vec<String>> {
        let entries = fs::read_dir(cluster.lab().local_pool(host)?.join("volumes"))?.flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        Ok(names)
    };
    for (from, to) in [("h1", "h2"), ("h2", "h1")] {
        cluster.run(&[Action::Migrate("web", to)])?;
        is_kept(&cluster).with_context(|| format!("on {to}"))?;
        ensure!(register(&cluster)? == extended, "the register is another on {to}");
        ensure!(volumes(&cluster, to)? == ["data", "root", "web-efi", "web-tpm"] && volumes(&cluster, from)?.is_empty());
    }
    // What the firmware and the TPM read at a start came along, too.
    cluster.stop_and_start("web", "h1")?;
    mount(&cluster)?;
    is_kept(&cluster).context("after a start on h1")?;
    cluster.finish()
}
