//! Conversion between disk formats by a process of its own, which runs `qemu-img` in a cage: what it reads may attack its reader.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;

use command_fds::CommandFdExt;
use command_fds::FdMapping;
use godwit_model::{Bytes, ErrorCode, Refusal, Retry};
use tokio::io::AsyncReadExt;
use tokio::process::Command;

/// What is kept of what the process says.
const MAX_COMPLAINT: u64 = 4_096;
const INPUT: i32 = 3;
const OUTPUT: i32 = 4;

/// The program that converts: `PROGRAM ARGUMENTS… --from F --to F --limit BYTES --input-fd N --output-fd N`. It prints `(12.34/100%)` now and then,
/// says on standard error why it failed, and ends with 0 if it did not.
#[derive(Clone, Debug)]
pub struct Converter {
    /// The program; by default this one.
    pub program: PathBuf,
    /// What comes before the options.
    pub arguments: Vec<String>,
}

impl Default for Converter {
    fn default() -> Self {
        Self { program: "/proc/self/exe".into(), arguments: vec!["convert".into()] }
    }
}

/// Formats that are converted from and to, by `qemu-img`'s names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Raw,
    Qcow2,
    Vmdk,
    Vhdx,
}

impl Format {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
        }
    }
}

impl Converter {
    /// Converts `input` into the empty file `output` of at most `limit`; `progress` hears how many thousandths are done. Dropping it ends the process.
    ///
    /// # Errors
    /// `image_invalid` with what the process said; `not_enough_space`; `host_failed` if it does not start.
    pub(super) async fn convert(
        &self,
        (input, from): (File, Format),
        (output, to): (File, Format),
        limit: Bytes,
        progress: impl Fn(u16),
    ) -> Result<(), Refusal> {
        let broken = |error: io::Error| {
            Refusal::new(ErrorCode::HostFailed, format!("the conversion could not be started: {error}"))
                .hint("look at the controller's log; install qemu-utils on the controller's host")
                .retry(Retry::Safe)
        };
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).args(["--from", from.as_str(), "--to", to.as_str(), "--limit", &limit.get().to_string()]);
        command.args(["--input-fd", &INPUT.to_string(), "--output-fd", &OUTPUT.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mappings = vec![
            FdMapping { parent_fd: OwnedFd::from(input), child_fd: INPUT },
            FdMapping { parent_fd: OwnedFd::from(output), child_fd: OUTPUT },
        ];
        command.as_std_mut().fd_mappings(mappings).map_err(|collision| broken(io::Error::other(collision)))?;
        let mut child = command.spawn().map_err(broken)?;
        drop(command);
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let listen = async {
            let Some(mut stdout) = stdout else { return };
            let mut buffer = [0; 256];
            while let Ok(count @ 1..) = stdout.read(&mut buffer).await {
                if let Some(permille) = buffer.get(..count).and_then(read_progress) {
                    progress(permille);
                }
            }
        };
        let complain = async {
            let (mut text, Some(mut stderr)) = (Vec::new(), stderr) else { return Vec::new() };
            // A pipe that breaks off has said what it had to say.
            let _ = (&mut stderr).take(MAX_COMPLAINT).read_to_end(&mut text).await;
            let _ = tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await;
            text
        };
        let ((), complaint, status) = tokio::join!(listen, complain, child.wait());
        let status = status.map_err(broken)?;
        if status.success() {
            return Ok(());
        }
        let complaint = String::from_utf8_lossy(&complaint);
        let complaint: String = complaint.trim().chars().filter(|c| !c.is_control()).take(400).collect();
        if complaint.contains("No space left") {
            return Err(super::trouble(&io::ErrorKind::StorageFull.into()));
        }
        Err(Refusal::new(
            ErrorCode::ImageInvalid,
            format!("the disk could not be converted from {}: {complaint} ({status})", from.as_str()),
        )
        .hint("check the file and its format (`qemu-img info`, `qemu-img check`), then import it again"))
    }
}

/// Thousandths from the last `(12.34/100%)` in what was printed.
fn read_progress(printed: &[u8]) -> Option<u16> {
    let text = String::from_utf8_lossy(printed);
    let (_, last) = text.rsplit_once('(')?;
    let (percent, _) = last.split_once('/')?;
    let percent: f64 = percent.trim().parse().ok().filter(|percent| (0.0..=100.0).contains(percent))?;
    Some((percent * 10.0) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read_from_what_is_printed_and_from_nothing_else() {
        assert_eq!(read_progress(b"    (1.00/100%)\r    (12.34/100%)\r"), Some(123));
        assert_eq!(read_progress(b"    (100.00/100%)\n"), Some(1_000));
        for bad in [b"".as_slice(), b"(", b"(x/100%)", b"(1e9/100%)", b"(-1/100%)", b"12.3/100%)", b"(NaN/100%)"] {
            assert_eq!(read_progress(bad), None, "{bad:?}");
        }
    }

    #[tokio::test]
    async fn what_the_process_says_reaches_the_user_on_one_line() {
        let file = || tempfile::tempfile().expect("file");
        let shell =
            |script: &str| Converter { program: "/bin/sh".into(), arguments: vec!["-c".into(), script.into(), "convert".into()] };
        let run = async |script: &str, seen: &std::cell::Cell<u16>| {
            shell(script).convert((file(), Format::Vmdk), (file(), Format::Qcow2), Bytes::mib(1), |now| seen.set(now)).await
        };
        let seen = std::cell::Cell::new(0);
        run("echo '(50.00/100%)'; test \"$1 $2 $3 $4\" = '--from vmdk --to qcow2'", &seen).await.expect("converted");
        assert_eq!(seen.get(), 500);
        let refusal = run("printf 'bad\\033[31m\\ndisk' >&2; exit 1", &seen).await.expect_err("failed");
        assert_eq!(refusal.code, ErrorCode::ImageInvalid);
        assert!(refusal.message.contains("bad[31mdisk"), "{}", refusal.message);
        assert_eq!(run("echo 'x: No space left on device' >&2; exit 1", &seen).await.expect_err("full").code, ErrorCode::StoreFull);
        let missing = Converter { program: "/nonexistent".into(), arguments: vec![] };
        let refused = missing.convert((file(), Format::Raw), (file(), Format::Vmdk), Bytes::mib(1), |_| {}).await;
        assert_eq!(refused.expect_err("no program").code, ErrorCode::HostFailed);
    }
}
