//! `godwit vm console`: the serial console, raw on a terminal, piped otherwise.
//!
//! This is the one place where a guest's bytes reach the terminal as they are: who opens a console expects that.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use godwit_api::client::Console;
use godwit_model::{Millis, Name};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until};

use crate::error::Failure;
use crate::output::note;
use crate::session::Session;
use crate::terminal::RawTerminal;

/// Ctrl-]
const ESCAPE: u8 = 0x1d;

/// Which VM's console.
#[derive(Args)]
#[command(
    after_help = "On a terminal every key goes to the guest, and Ctrl-] leaves. Otherwise standard input is typed to the guest and what \
it writes goes to standard output, until a while after standard input has ended.

Examples:
  godwit vm console web1
  echo 'uname -a' | godwit vm console web1 --linger 2s"
)]
pub(crate) struct ConsoleArgs {
    /// Its name
    name: Name,
    /// Without a terminal: how long to go on after standard input has ended
    #[arg(long, value_name = "TIME", default_value = "1s")]
    linger: Millis,
}

pub(super) async fn run(session: &Session, args: ConsoleArgs) -> Result<(), Failure> {
    let mut console = session.client.console(&args.name).await?;
    if !io::stdin().is_terminal() {
        return pass(&mut console, Some(Duration::from_millis(args.linger.get()))).await;
    }
    note(&format!("console of {}; Ctrl-] leaves it", args.name));
    let raw = RawTerminal::enter()?;
    let result = pass(&mut console, None).await;
    drop(raw);
    result
}

/// Passes bytes both ways until one side ends. With `linger` standard input is a pipe, without it is a terminal.
async fn pass(console: &mut Console, linger: Option<Duration>) -> Result<(), Failure> {
    // The default action of these would leave the terminal raw.
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::Terminal)?;
    let mut hang_up = signal(SignalKind::hangup()).map_err(Failure::Terminal)?;
    let mut stdin = tokio::io::stdin();
    let mut typed = vec![0; 4_096];
    let mut end: Option<Instant> = None;
    loop {
        let over = async {
            match end {
                Some(end) => sleep_until(end).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            written = console.receive() => {
                let Some(written) = written else {
                    note("the console was closed");
                    return Ok(());
                };
                let mut stdout = io::stdout().lock();
                stdout.write_all(&written).and_then(|()| stdout.flush()).map_err(Failure::Output)?;
            }
            read = stdin.read(&mut typed), if end.is_none() => {
                let length = read.map_err(Failure::Terminal)?;
                let mut keys = typed.get(..length).unwrap_or_default();
                let left = linger.is_none().then(|| keys.iter().position(|key| *key == ESCAPE)).flatten();
                if let Some(left) = left {
                    keys = keys.get(..left).unwrap_or_default();
                }
                if !keys.is_empty() && !console.send(Bytes::copy_from_slice(keys)).await {
                    note("the console was closed");
                    return Ok(());
                }
                if left.is_some() {
                    return Ok(());
                }
                if length == 0 {
                    end = Some(Instant::now() + linger.unwrap_or_default());
                }
            }
            () = over => return Ok(()),
            _ = terminate.recv() => return Ok(()),
            _ = hang_up.recv() => return Ok(()),
        }
    }
}
