//! `godwit host join`: makes this machine a host of the cluster.

use std::io::{self, IsTerminal, Read};
use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;
use godwit_agent::JoinOptions;
use godwit_model::Name;

use super::log;
use crate::error::Failure;
use crate::output::{note, print};

/// Longer texts are no token.
const MAX_TOKEN: u64 = 4_096;

/// Which cluster, and who this host is in it.
#[derive(Args)]
#[command(
    after_help = "The token comes from a file or from standard input, never as an argument: those are seen by every user of the machine.

Example, with a token from `godwit host token h7`:
  godwit host join --controller gw.example.org:7444 --name h7 --address 10.0.0.7 < h7.token"
)]
pub(crate) struct JoinArgs {
    /// Where the controller listens for agents
    #[arg(long, value_name = "HOST:PORT")]
    controller: String,
    /// Name of this host, as the token was made for
    #[arg(long)]
    name: Name,
    /// Address at which other hosts reach this one
    #[arg(long, value_name = "ADDRESS")]
    address: IpAddr,
    /// Address at which other hosts reach this one's moves, if VMs shall move over another network
    #[arg(long, value_name = "ADDRESS")]
    migration_address: Option<IpAddr>,
    /// Read the join token from this file [default: standard input]
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Give a host that has joined before a new certificate, with a token of `godwit host token --rejoin`; it keeps its VMs
    #[arg(long)]
    rejoin: bool,
    /// Directory for the agent's state
    #[arg(long, value_name = "DIR", default_value = "/var/lib/godwit/agent")]
    state_dir: PathBuf,
}

pub(crate) fn run(args: JoinArgs) -> Result<(), Failure> {
    let token = match &args.token_file {
        Some(path) => {
            let refused = |source| Failure::File { action: "read", path: path.clone(), source };
            read_token(std::fs::File::open(path).map_err(refused)?).map_err(refused)?
        }
        None => {
            if io::stdin().is_terminal() {
                note("paste the join token, then press Enter and Ctrl-D:");
            }
            read_token(io::stdin()).map_err(|source| Failure::File { action: "read", path: "/dev/stdin".into(), source })?
        }
    };
    log();
    let JoinArgs { controller, name, address, migration_address, state_dir, rejoin, .. } = args;
    let done = format!("{name} has joined; start `godwit agent --state-dir {}`", state_dir.display());
    let options = JoinOptions { controller, name, address, migration_address, state_dir, token, rejoin };
    crate::block_on(async { godwit_agent::join(options).await.map_err(|error| Failure::Refused(error.refusal())) })?;
    print(&done)
}

fn read_token(from: impl Read) -> io::Result<String> {
    let mut token = String::new();
    from.take(MAX_TOKEN).read_to_string(&mut token)?;
    Ok(token.trim().to_owned())
}
