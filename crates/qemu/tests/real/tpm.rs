//! A VM's TPM with real swtpm and real QEMUs: how it is confined, how it ends, and what of it moves.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use godwit_model::{ResolvedSpec, Tpm, TpmVersion};
use godwit_qemu::Start;
use godwit_qemu::process::Exit;

use crate::devices::complete;
use crate::place::{LIMIT, Place, Vm, launch, pairs, qemus, spec, start_tpm};
use crate::start::status_field;

fn with_tpm() -> ResolvedSpec {
    let mut spec = spec("pc-q35-7.2", &[]);
    spec.platform.tpm = Some(Tpm { version: TpmVersion::V2, state: "shared/tpm".parse().expect("volume") });
    spec
}

/// What is permanent of a TPM, as swtpm keeps it: the first section of its file, whose offset and length are behind 12 bytes of header.
fn permanent(state: &Path) -> Vec<u8> {
    let file = fs::read(state).expect("state");
    let number = |at: usize| {
        let bytes = file.get(at..at + 4).expect("a header");
        u32::from_le_bytes(bytes.try_into().expect("4 bytes")) as usize
    };
    let (offset, length) = (number(12), number(16));
    file.get(offset..offset + length).expect("the first section").to_vec()
}

async fn ended(vm: &Vm) -> Exit {
    let tpm = vm.tpm.as_ref().expect("a TPM");
    tokio::time::timeout(LIMIT, tpm.process.exited()).await.expect("the TPM ends with its QEMU")
}

fn links(dir: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).expect(dir).flatten();
    entries.filter_map(|entry| fs::read_link(entry.path()).ok()).collect()
}

#[tokio::test]
async fn a_tpm_runs_confined_and_ends_with_its_qemu() {
    for binary in qemus() {
        let place = Place::new();
        let vm = launch(&place, &binary, &with_tpm(), &[], Start::Fresh).await;
        vm.boot().await;
        let tpm = vm.tpm.as_ref().expect("a TPM");
        let pid = tpm.process.identity().pid;
        let uid = vm.uid.to_string();
        for (field, value) in [
            ("Uid", [uid.as_str(); 4].join(" ").as_str()),
            ("Gid", [uid.as_str(); 4].join(" ").as_str()),
            ("Groups", ""),
            ("CapEff", "0000000000000000"),
            ("CapPrm", "0000000000000000"),
            ("NoNewPrivs", "1"),
            ("Seccomp", "2"),
            // Three of the cage, and its own.
            ("Seccomp_filters", "4"),
            ("Threads", "1"),
        ] {
            assert_eq!(status_field(pid, field), value, "{field}");
        }
        let namespaces = |pid: u32| {
            ["mnt", "pid", "ipc", "uts", "net"].map(|kind| fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("a namespace"))
        };
        for other in [std::process::id(), vm.process.identity().pid] {
            for (own, others) in namespaces(pid).iter().zip(namespaces(other)) {
                assert_ne!(*own, others);
            }
        }
        let network = fs::read_to_string(format!("/proc/{pid}/net/dev")).expect("interfaces");
        assert_eq!(network.lines().filter(|line| line.contains(':')).count(), 1, "more than a loopback: {network}");
        // Its root has nothing of this machine but the system's programs, and nothing that it could write to.
        let root = format!("/proc/{pid}/root");
        assert!(!Path::new(&format!("{root}/etc/passwd")).exists() && !Path::new(&format!("{root}/tmp")).exists());
        for line in fs::read_to_string(format!("/proc/{pid}/mountinfo")).expect("mounts").lines() {
            let fields: Vec<&str> = line.split(' ').collect();
            assert!(fields[5].split(',').any(|option| option == "ro") || fields[4] == "/proc", "{line}");
        }
        let files: Vec<PathBuf> = links(&format!("/proc/{pid}/fd"))
            .into_iter()
            .filter(|target| target.is_absolute() && !target.starts_with("/dev"))
            .collect();
        let own = |file: &PathBuf| *file == tpm.state || *file == tpm.log;
        assert!(files.iter().all(own) && files.contains(&tpm.state), "{files:?}");
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("limits");
        let limit = |name: &str| {
            let line = limits.lines().find_map(|line| line.strip_prefix(name)).expect(name);
            line.split_whitespace().next().map(ToOwned::to_owned).expect(name)
        };
        for (name, value) in [
            ("Max core file size", "0"),
            ("Max address space", "268435456"),
            ("Max file size", "4194304"),
            ("Max open files", "64"),
        ] {
            assert_eq!(limit(name), value, "{name}");
        }

        // QEMU is killed, and nobody tells the TPM.
        vm.process.kill();
        vm.process.exited().await;
        assert!(matches!(ended(&vm).await, Exit::Status(status) if status.success()), "{}", binary.display());
        assert!(!permanent(&tpm.state).is_empty());
    }
}

#[tokio::test]
async fn the_state_of_a_tpm_moves_with_its_vm_into_an_empty_file() {
    for (from, to) in pairs() {
        let way = format!("{} -> {}", from.display(), to.display());
        let place = Place::new();
        let spec = with_tpm();
        let source = launch(&place, &from, &spec, &[], Start::Fresh).await;
        source.boot().await;
        let destination = launch(&place, &to, &spec, &[], Start::Incoming).await;
        let state = |vm: &Vm| vm.tpm.as_ref().expect("a TPM").state.clone();
        assert_eq!(fs::metadata(state(&destination)).expect("state").len(), 0, "{way}: written before anything came");
        complete(&source, &destination, &way).await;
        assert!(matches!(ended(&source).await, Exit::Status(status) if status.success()), "{way}");
        let (before, after) = (permanent(&state(&source)), permanent(&state(&destination)));
        assert!(!before.is_empty() && before == after, "{way}: {} and {} bytes", before.len(), after.len());
        destination.process.kill();
        destination.process.exited().await;
        ended(&destination).await;
    }
}

#[tokio::test]
async fn a_tpm_whose_file_is_damaged_keeps_the_vm_from_starting_and_the_file_as_it_is() {
    let place = Place::new();
    let vm = launch(&place, &qemus()[0], &with_tpm(), &[], Start::Fresh).await;
    vm.boot().await;
    vm.process.kill();
    vm.process.exited().await;
    ended(&vm).await;
    let state = vm.tpm.as_ref().expect("a TPM").state.clone();
    let whole = fs::read(&state).expect("state");
    let cut = &whole[..whole.len() / 2];
    fs::write(&state, cut).expect("cut");
    let (again, control) = start_tpm(&state, vm.uid).await;
    let mut control = UnixStream::from(control);
    // As QEMU begins: CMD_INIT without flags, answered by a number, which is 0 for success.
    let mut answer = [0; 4];
    control.write_all(&[0, 0, 0, 2, 0, 0, 0, 0]).and_then(|()| control.read_exact(&mut answer)).expect("answered");
    again.process.kill();
    again.process.exited().await;
    assert_ne!(answer, [0; 4], "a damaged TPM was started");
    assert_eq!(fs::read(&state).expect("state"), cut);
}
