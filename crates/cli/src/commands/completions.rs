//! `godwit completions`.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::arguments::Godwit;
use crate::error::Failure;
use crate::output::print;

/// Prints completions for a shell.
#[derive(Args)]
#[command(after_help = "Example:\n  godwit completions bash > /etc/bash_completion.d/godwit")]
pub(crate) struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

pub(crate) fn run(args: &CompletionsArgs) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Godwit::command(), "godwit", &mut script);
    print(&String::from_utf8_lossy(&script))
}
