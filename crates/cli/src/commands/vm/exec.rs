//! `godwit vm exec`: a program in the guest, with its output and its exit code as if it had run here.

use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use godwit_api::v1::VmExec;
use godwit_model::guest::MAX_INPUT;
use godwit_model::{ExecOutcome, Millis, Name, Octets};

use crate::error::Failure;
use crate::output::{Format, note, print_data};
use crate::session::Session;
use crate::text::visible;

/// What is added to the number of a signal, as shells do.
const SIGNALLED: i32 = 128;

/// Which program, in which VM.
#[derive(Args)]
#[command(
    after_help = "The program is run by the guest's agent (qemu-guest-agent), as its user, without a shell and without a terminal. What it \
writes is shown when it has ended, at most 512 KiB of each output.

The exit code is the program's own, 128 and the signal's number if a signal ended it. Where the program did not run, or was not seen to end, the \
reason is on standard error and the exit code is one of Godwit's: 6 if it still runs, 4 if it was refused, 1 if the guest's agent does not \
answer. With `-o json` or `-o yaml` the outcome is printed as data, its outputs in base64.

It is recorded who ran which program in which VM (`godwit task list`), but not its arguments, its input or its output.

Examples:
  godwit vm exec web1 -- uname -a
  godwit vm exec web1 -- sh -c 'systemctl is-active nginx'
  godwit vm exec web1 --stdin app.conf -- tee /etc/app.conf
  godwit vm exec web1 --timeout 10min -- apt-get -y upgrade"
)]
pub(crate) struct ExecArgs {
    /// The VM's name
    name: Name,
    /// How long to wait for its end, such as 30s; a minute by default, at most 15. It is never ended by this
    #[arg(long, value_name = "TIME")]
    timeout: Option<Millis>,
    /// What it reads: this file, or `-` for standard input; nothing by default, at most 512 KiB
    #[arg(long, value_name = "FILE")]
    stdin: Option<PathBuf>,
    /// The program, and its arguments
    #[arg(required = true, last = true, value_name = "PROGRAM")]
    command: Vec<String>,
}

pub(super) async fn run(session: &Session, args: ExecArgs) -> Result<(), Failure> {
    let mut command = args.command.into_iter();
    let program = command.next().unwrap_or_default();
    let stdin = args.stdin.as_deref().map(read_input).transpose()?;
    let request = VmExec { program, args: command.collect(), stdin, timeout: args.timeout };
    let outcome = session.client.exec_vm(&args.name, &request).await?;
    if session.format == Format::Table {
        show(&outcome).map_err(Failure::Output)?;
    } else {
        print_data(session.format, &outcome, String::new)?;
    }
    match exit_code(&outcome) {
        0 => Ok(()),
        code => Err(Failure::Guest { code }),
    }
}

/// Reads what the program is given, and not a byte more than may be sent.
fn read_input(path: &Path) -> Result<Octets, Failure> {
    let refused = |source| Failure::File { action: "read", path: path.to_owned(), source };
    let source: Box<dyn Read> =
        if path == Path::new("-") { Box::new(io::stdin()) } else { Box::new(std::fs::File::open(path).map_err(refused)?) };
    let mut bytes = Vec::new();
    source.take(MAX_INPUT as u64 + 1).read_to_end(&mut bytes).map_err(refused)?;
    if bytes.len() > MAX_INPUT {
        return Err(Failure::usage(
            format!("{} has more than {MAX_INPUT} bytes", path.display()),
            "a program's input is bounded; copy larger files over the network",
        ));
    }
    Ok(Octets(bytes))
}

fn show(outcome: &ExecOutcome) -> io::Result<()> {
    write_output(&mut io::stdout().lock(), io::stdout().is_terminal(), &outcome.stdout.0)?;
    write_output(&mut io::stderr().lock(), io::stderr().is_terminal(), &outcome.stderr.0)?;
    for (truncated, which) in [(outcome.stdout_truncated, "standard output"), (outcome.stderr_truncated, "standard error")] {
        if truncated {
            note(&format!("note: the program wrote more to its {which}; the rest is left out"));
        }
    }
    Ok(())
}

/// The guest's bytes: as they are into a file or pipe, made harmless on a terminal.
fn write_output(writer: &mut impl Write, terminal: bool, bytes: &[u8]) -> io::Result<()> {
    if terminal && !bytes.is_empty() {
        // Columns are often made with tabs, which do no harm.
        let columns: Vec<String> = String::from_utf8_lossy(bytes).split('\t').map(visible_text).collect();
        writer.write_all(columns.join("\t").as_bytes())?;
    } else {
        writer.write_all(bytes)?;
    }
    writer.flush()
}

/// As [`visible`], but lines stay lines, and end where they ended.
fn visible_text(text: &str) -> String {
    text.split('\n').map(visible).collect::<Vec<_>>().join("\n")
}

/// The exit code of this process.
fn exit_code(outcome: &ExecOutcome) -> u8 {
    let code = match (outcome.exit_code, outcome.signal) {
        (_, Some(signal)) => SIGNALLED.saturating_add(signal),
        (Some(code), None) => code,
        // Ended, and nothing else is known: not to be taken for success.
        (None, None) => 1,
    };
    // Windows has larger ones. What is not 0 there must not become 0 here.
    u8::try_from(code).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(exit_code: Option<i32>, signal: Option<i32>) -> ExecOutcome {
        let octets = Octets::default;
        ExecOutcome { exit_code, signal, stdout: octets(), stderr: octets(), stdout_truncated: false, stderr_truncated: false }
    }

    #[test]
    fn the_exit_code_is_the_programs() {
        let table = [
            (Some(0), None, 0),
            (Some(7), None, 7),
            (Some(255), None, 255),
            (Some(256), None, 255),
            (Some(-1_073_741_819), None, 255),
            (None, Some(9), 137),
            (None, Some(i32::MAX), 255),
            (None, None, 1),
        ];
        for (code, signal, expected) in table {
            assert_eq!(exit_code(&outcome(code, signal)), expected, "{code:?} {signal:?}");
        }
    }

    #[test]
    fn a_guests_output_does_not_drive_the_terminal() {
        let mut shown = Vec::new();
        write_output(&mut shown, true, b"a\x1b[2J\tx\nb\xff\n").expect("written");
        assert_eq!(String::from_utf8(shown).expect("text"), "a\\u{1b}[2J\tx\nb\u{fffd}\n");
        let mut raw = Vec::new();
        write_output(&mut raw, false, b"a\x1b[2J\xff").expect("written");
        assert_eq!(raw, b"a\x1b[2J\xff");
    }
}
