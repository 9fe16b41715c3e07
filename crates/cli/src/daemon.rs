//! What runs on and on, and what only Godwit itself starts. Each is a few lines of glue to the crate that does the work.

pub(crate) mod agent;
mod cage;
mod carry;
mod convert;
pub(crate) mod join;
mod kvm_probe;
mod lab_relay;
pub(crate) mod serve;
mod vault_worker;

use std::ffi::OsString;
use std::io;
use std::os::fd::RawFd;
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

use crate::error::Failure;

/// Runs the subcommand if it is one that only Godwit itself starts. They are told apart before anything else happens: they need a
/// process that has no other thread, and should start fast.
pub(crate) fn run_inner() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    let name = arguments.next()?;
    let run: fn(Vec<OsString>) -> ExitCode = match name.to_str()? {
        "cage" => cage::run,
        "carry" => carry::run,
        "convert" => convert::run,
        "kvm-probe" => kvm_probe::run,
        "lab-relay" => lab_relay::run,
        "vault-worker" => vault_worker::run,
        _ => return None,
    };
    Some(run(arguments.collect()))
}

/// Reads `--name N` pairs: the inherited descriptors of `names`, in their order.
fn descriptors<const N: usize>(arguments: &[OsString], names: [&str; N]) -> Option<[Option<RawFd>; N]> {
    let mut found = [None; N];
    for pair in arguments.chunks(2) {
        let [name, value] = pair else { return None };
        let index = names.iter().position(|known| name == known)?;
        let fd = value.to_str()?.parse::<RawFd>().ok().filter(|fd| *fd > 2)?;
        *found.get_mut(index)? = Some(fd);
    }
    Some(found)
}

/// Writes log lines to standard error: `info` and worse, or what RUST_LOG says.
fn log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // Fails if somebody else writes them already, which is as good.
    // A line that finds no reader is lost: saying so on the same standard error would end the process.
    let lines =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(false).log_internal_errors(false);
    let _ = lines.try_init();
}

/// Runs a daemon to its end on as many threads as there are processors.
fn run_to_end(daemon: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Failure::Runtime)?;
    let result = runtime.block_on(daemon);
    runtime.shutdown_background();
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_read_strictly() {
        let read = |text: &str| {
            let arguments: Vec<_> = text.split_whitespace().map(OsString::from).collect();
            descriptors(&arguments, ["--plan-fd", "--status-fd"])
        };
        assert_eq!(read("--plan-fd 3 --status-fd 4"), Some([Some(3), Some(4)]));
        assert_eq!(read("--status-fd 4 --plan-fd 3"), Some([Some(3), Some(4)]));
        assert_eq!(read("--plan-fd 3"), Some([Some(3), None]));
        assert_eq!(read(""), Some([None, None]));
        for bad in ["--plan-fd", "--plan-fd 0", "--plan-fd x", "--plan-fd 3 --help", "--plan-fd 3 --x 4"] {
            assert_eq!(read(bad), None, "{bad:?}");
        }
    }
}
