//! What people read and run who have an export and no Godwit.

use std::fmt::Write;

use godwit_model::{Name, ResolvedSpec};
use godwit_qemu::command::PlainFiles;

/// Where the machine writes: the export itself stays as it is.
const RUN: &str = "run";
/// The control socket of its TPM.
pub(super) const TPM: &str = "tpm.sock";

/// A file that the machine writes to.
pub(super) fn in_run(name: &str) -> String {
    format!("{RUN}/{name}")
}

/// The file of the export that a file in `run` begins as.
fn in_export(path: &str) -> &str {
    path.strip_prefix("run/").unwrap_or(path)
}

/// A word that the shell leaves as it is.
fn quoted(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_=.,:/".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// `start.sh`.
pub(super) fn start(name: &Name, spec: &ResolvedSpec, files: &PlainFiles, arguments: &[String]) -> String {
    let how = if files.memory.is_some() { "goes on where it was" } else { "boots" };
    let mut text = format!(
        "#!/bin/sh\n# Starts VM {} as it was in snapshot {name}: it {how}. See README.txt.\nset -eu\ncd \"$(dirname \"$0\")\"\n\
         if [ -e {RUN} ]; then\n    echo \"$PWD/{RUN} is there: what the VM wrote when it was started before. Remove it to begin anew.\" >&2\n    \
         exit 1\nfi\nmkdir {RUN}\n",
        spec.name
    );
    for disk in &files.disks {
        let _ = writeln!(text, "qemu-img create -q -f qcow2 -F qcow2 -b ../{} {disk}", in_export(disk));
    }
    if let Some((_, variables)) = &files.flash {
        let _ = writeln!(text, "cp {} {variables}", in_export(variables));
    }
    if let Some(socket) = &files.tpm {
        text.push_str(&tpm(socket));
    }
    if files.memory.is_some() {
        text.push_str("echo 'The VM stands still where it was taken: ctrl-a c, then cont, lets it go on.' >&2\n");
    }
    text.push_str("exec \"${QEMU:-qemu-system-x86_64}\"");
    for argument in arguments {
        // An option on a line, with its value.
        text.push_str(if argument.starts_with('-') { " \\\n    " } else { " " });
        text.push_str(&quoted(argument));
    }
    text.push_str(" \\\n    \"$@\"\n");
    text
}

/// Starts a TPM. In the background it works in the root directory, once its socket is there: where its state is must not depend on that.
fn tpm(socket: &str) -> String {
    format!(
        "mkdir {RUN}/tpm\n\
         swtpm socket --tpm2 --tpmstate \"dir=$PWD/{RUN}/tpm\" --ctrl type=unixio,path={socket} --daemon --terminate\n"
    )
}

/// `README.txt`.
pub(super) fn read_me(name: &Name, spec: &ResolvedSpec, files: &PlainFiles, qemu: &str) -> String {
    let mut text = format!(
        "Snapshot {name} of VM {}, as files that QEMU takes by itself. They are not encrypted.\n\n\
         sh start.sh                     starts it; what the VM writes goes to the directory {RUN} beside it\n\
         sh start.sh -display gtk        the same with its screen; any other options of QEMU, too\n\
         QEMU=/path/to/qemu sh start.sh  with another QEMU than that in PATH; this was written with {qemu}\n\
         b3sum --check BLAKE3SUMS        whether the files are whole\n\n\
         The serial console is on the terminal; ctrl-a c changes to QEMU's monitor, ctrl-a x ends the VM.\n\n",
        spec.name
    );
    if files.memory.is_some() {
        text.push_str("It stands still at first, where it was taken: cont in QEMU's monitor lets it go on.\n\n");
    }
    text.push_str(match (spec.nics.is_empty(), &files.memory) {
        (true, _) => "",
        (false, None) => "It is on a network of QEMU's own: it gets out, and nobody gets in.\n\n",
        (false, Some(_)) => {
            "Its interfaces are taps (tap0 and so on), which takes root; nobody hears them before they are put somewhere, such as by\n\
             ip link set tap0 master BRIDGE up. Two machines that go on from one snapshot are one and the same to whoever hears both.\n\n"
        }
    });
    text.push_str("vm.json        what the VM was: its spec, and what was made of it\n");
    let mut file = |name: &str, what: &str| {
        let _ = writeln!(text, "{name:<15}{what}");
    };
    for (disk, (slot, of)) in files.disks.iter().zip(spec.disk_slots()) {
        file(in_export(disk), &format!("the disk in slot {slot}, which was volume {}; qcow2", of.volume));
    }
    if let Some((code, variables)) = &files.flash {
        file(code, "the code of its UEFI firmware");
        file(in_export(variables), "the variables of that");
    }
    if files.memory.is_some() {
        file("memory.qemu", "its memory and devices: QEMU's own stream of a migration (-incoming)");
    }
    for (path, what) in [
        (&files.kernel, "its kernel"),
        (&files.initrd, "its initial ramdisk"),
        (&files.seed, "the disk that cloud-init reads; it may hold passwords"),
    ] {
        if let Some(path) = path {
            file(path, what);
        }
    }
    if spec.cdroms.iter().any(|drive| drive.medium.is_some()) {
        text.push_str("\nMedia that were in its CD-ROM drives are not here: the drives are empty.\n");
    }
    if files.tpm.is_some() {
        let state = if files.memory.is_some() {
            "its state is in memory.qemu"
        } else {
            "it begins empty, since its state is in no snapshot"
        };
        let _ = writeln!(text, "\nIts TPM is swtpm, which has to be installed; {state}.");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write as _};
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    use super::*;

    #[test]
    fn the_tpm_that_is_started_finds_its_state() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(dir.path().join(RUN)).expect("a directory");
        let script = tpm(&in_run(TPM));
        let started = Command::new("sh").args(["-euc", &script]).current_dir(dir.path()).status().expect("sh");
        assert!(started.success());
        let mut socket = UnixStream::connect(dir.path().join(in_run(TPM))).expect("it listens");
        // Its first command: it begins, with its state as it is.
        socket.write_all(&[0, 0, 0, 2, 0, 0, 0, 0]).expect("heard");
        let mut result = [0xff; 4];
        socket.read_exact(&mut result).expect("answered");
        assert_eq!(u32::from_be_bytes(result), 0);
    }

    #[test]
    fn no_word_is_more_than_a_word_to_the_shell() {
        for (word, expected) in [
            ("-m", "-m"),
            ("size=1k", "size=1k"),
            ("", "''"),
            ("a b", "'a b'"),
            ("$(x)`y`", "'$(x)`y`'"),
            ("it's", r"'it'\''s'"),
            ("exec:cat memory.qemu", "'exec:cat memory.qemu'"),
        ] {
            assert_eq!(quoted(word), expected);
        }
    }
}
