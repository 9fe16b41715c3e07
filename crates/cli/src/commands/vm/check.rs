//! `godwit vm check`: whether a running VM could move, and what is in the way.

use clap::Args;
use godwit_api::v1::{HostCheck, VmCheck};
use godwit_model::{ErrorCode, Name, Refusal};

use crate::error::Failure;
use crate::output::{Format, Table, note, print_data};
use crate::session::Session;
use crate::text::visible;

/// Which VM, and where to.
#[derive(Args)]
#[command(
    after_help = "Nothing is changed. It ends with 0 if the VM could move (to that host, or to any), and with 4 if not; whether it could \
move at all is also in `godwit vm show`, and a change of that is an event.

Examples:
  godwit vm check web1
  godwit vm check web1 --to h2"
)]
pub(crate) struct CheckArgs {
    /// Its name
    name: Name,
    /// One host [default: all that are connected]
    #[arg(long, value_name = "HOST")]
    to: Option<Name>,
}

pub(super) async fn run(session: &Session, args: CheckArgs) -> Result<(), Failure> {
    let VmCheck { source, hosts } = session.client.check_vm(&args.name, args.to.as_ref()).await?;
    print_data(session.format, &VmCheck { source: source.clone(), hosts: hosts.clone() }, || show(&hosts))?;
    if session.format == Format::Table {
        for hint in hosts.iter().flat_map(|check| &check.obstacles).filter_map(|obstacle| obstacle.hint.as_ref()) {
            note(&format!("fix: {}", visible(hint)));
        }
    }
    if hosts.iter().any(|check| check.obstacles.is_empty()) {
        return Ok(());
    }
    let message = match hosts.as_slice() {
        [] => format!("no host but {source} is connected"),
        [only] => format!("{} cannot move to {}", args.name, only.host),
        all => format!("{} cannot move to any of {} hosts", args.name, all.len()),
    };
    Err(Failure::Refused(Refusal::new(ErrorCode::NoHost, message).hint("what is in the way of each host is listed above")))
}

fn show(hosts: &[HostCheck]) -> String {
    let mut table = Table::new(&["HOST", "POSSIBLE", "IN THE WAY"]);
    for HostCheck { host, obstacles } in hosts {
        let possible = if obstacles.is_empty() { "yes" } else { "no" };
        let first = obstacles.first().map(|obstacle| visible(&obstacle.message).into_owned()).unwrap_or_default();
        table.row([host.to_string(), possible.to_owned(), first]);
        for obstacle in obstacles.iter().skip(1) {
            table.row([String::new(), String::new(), visible(&obstacle.message).into_owned()]);
        }
    }
    table.render()
}
