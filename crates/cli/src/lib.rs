//! The binary `godwit`: a thin client of the API, and the start of every daemon.
//!
//! It decides nothing about VMs: what the controller refuses is shown, not argued with. Secrets never become arguments. Whatever comes
//! from elsewhere is shown through [`text`], so that it cannot drive the terminal; only the console passes a guest's bytes through, and `vm exec`
//! where its output is no terminal.
//!
//! Start with [`arguments`] for the commands, then [`error`]: the one place that maps failures to exit codes and hints.

mod arguments;
mod commands;
mod confirm;
mod context;
mod daemon;
mod error;
mod follow;
mod limits;
mod output;
mod progress;
mod session;
mod terminal;
mod text;
mod watch;

use std::process::ExitCode;

use clap::Parser;

use crate::arguments::{Command, Godwit};
use crate::error::Failure;

/// Runs the command that the process was started with.
#[must_use]
pub fn run() -> ExitCode {
    // These need a process without threads, and are for Godwit itself: they have no help.
    if let Some(code) = daemon::run_inner() {
        return code;
    }
    install_crypto();
    let result = run_command(Godwit::parse().command);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

/// TLS needs one provider for the whole process; a second call changes nothing.
fn install_crypto() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

fn run_command(command: Command) -> Result<(), Failure> {
    match command {
        Command::Cluster(noun) => commands::cluster::run(noun),
        Command::Host(noun) => commands::host::run(noun),
        Command::Pool(noun) => online(noun, commands::pool::run),
        Command::Network(noun) => online(noun, commands::network::run),
        Command::Policy(noun) => online(noun, commands::policy::run),
        Command::Image(noun) => online(noun, commands::image::run),
        Command::Vm(noun) => online(noun, commands::vm::run),
        Command::Snapshot(noun) => online(noun, commands::snapshot::run),
        Command::Schedule(noun) => online(noun, commands::schedule::run),
        Command::Vault(noun) => online(noun, commands::vault::run),
        Command::Task(noun) => online(noun, commands::task::run),
        Command::Event(noun) => online(noun, commands::event::run),
        Command::Team(noun) => online(noun, commands::team::run),
        Command::Token(noun) => online(noun, commands::token::run),
        Command::Context(noun) => commands::context::run(noun),
        Command::Lab(noun) => commands::lab::run(noun),
        Command::Selftest(args) => commands::selftest::run(args),
        Command::Agent(args) => daemon::agent::run(args),
        Command::Serve(args) => daemon::serve::run(args),
        Command::Completions(args) => commands::completions::run(&args),
    }
}

/// Runs a verb that speaks with the controller.
fn online<V, R>(noun: arguments::Noun<V>, run: impl FnOnce(session::Session, V) -> R) -> Result<(), Failure>
where
    V: clap::Subcommand,
    R: Future<Output = Result<(), Failure>>,
{
    let session = session::Session::open(&noun.online)?;
    block_on(run(session, noun.verb))
}

/// Runs the future to its end, without waiting for what it leaves behind: a read of the terminal never ends.
fn block_on<R>(future: impl Future<Output = Result<R, Failure>>) -> Result<R, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::Runtime)?;
    let result = runtime.block_on(future);
    runtime.shutdown_background();
    result
}
