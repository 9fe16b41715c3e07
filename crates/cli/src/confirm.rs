//! Asking before something is destroyed.

use std::io::{self, BufRead, IsTerminal, Write};

use clap::Args;

use crate::error::Failure;

/// How to proceed with what cannot be undone.
#[derive(Args)]
pub(crate) struct ConfirmArgs {
    /// Do not ask
    #[arg(long, short = 'y')]
    yes: bool,
    /// Only say what would be done
    #[arg(long, conflicts_with = "yes")]
    pub(crate) dry_run: bool,
}

impl ConfirmArgs {
    /// Goes on if the user wants `what`, a sentence without its full stop.
    pub(crate) fn confirm(&self, what: &str) -> Result<(), Failure> {
        if self.yes {
            return Ok(());
        }
        if !io::stdin().is_terminal() {
            return Err(Failure::Unconfirmed { what: what.to_owned() });
        }
        let mut stderr = io::stderr();
        let _ = write!(stderr, "{what}? [y/N] ").and_then(|()| stderr.flush());
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer).map_err(Failure::Terminal)?;
        if matches!(answer.trim(), "y" | "Y" | "yes") { Ok(()) } else { Err(Failure::Declined) }
    }
}

/// Does something to each of several objects: a failure is told at once and does not keep the others from being done.
pub(crate) async fn each<T>(objects: &[T], mut act: impl AsyncFnMut(&T) -> Result<(), Failure>) -> Result<(), Failure> {
    if let [object] = objects {
        return act(object).await;
    }
    let mut failed = 0;
    for object in objects {
        match act(object).await {
            Ok(()) => {}
            Err(failure @ (Failure::StillRunning { .. } | Failure::Declined | Failure::Output(_))) => return Err(failure),
            Err(failure) => {
                failure.show();
                failed += 1;
            }
        }
    }
    if failed == 0 { Ok(()) } else { Err(Failure::PartlyDone { failed, all: objects.len() }) }
}
