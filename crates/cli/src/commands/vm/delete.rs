//! `godwit vm delete`.

use clap::Args;
use godwit_api::v1::{Vm, VmDelete};
use godwit_model::lifecycle::decide_admission;
use godwit_model::{Admission, Name, VmRequest};

use crate::confirm::{ConfirmArgs, each};
use crate::error::Failure;
use crate::output::{print, word};
use crate::session::{Session, WaitArgs};
use crate::text::visible;

/// Which VMs, and whether with their volumes.
#[derive(Args)]
#[command(after_help = "A VM that runs is not deleted; stop it first. Volumes stay unless --volumes is given.

Examples:
  godwit vm delete web1 --volumes --dry-run
  godwit vm delete web1 web2 --yes")]
pub(crate) struct DeleteArgs {
    /// Their names
    #[arg(required = true, value_name = "NAME")]
    names: Vec<Name>,
    /// Delete their volumes too
    #[arg(long)]
    volumes: bool,
    #[command(flatten)]
    confirm: ConfirmArgs,
    #[command(flatten)]
    wait: WaitArgs,
}

pub(super) async fn run(session: &Session, args: DeleteArgs) -> Result<(), Failure> {
    if args.confirm.dry_run {
        return each(&args.names, async |name| {
            let vm = session.client.vm(name).await?;
            if let Admission::Deny(refusal) = decide_admission(vm.status.state, vm.status.activity, VmRequest::Delete) {
                return Err(Failure::Refused(refusal));
            }
            print(&visible(&format!("{name} ({}) would be deleted{}", word(&vm.status.state), fate_of_volumes(&vm, args.volumes))))
        })
        .await;
    }
    let list: Vec<&str> = args.names.iter().map(Name::as_str).collect();
    let with = if args.volumes { " and all data on its volumes" } else { "" };
    args.confirm.confirm(&format!("Delete VM {}{with}", list.join(", ")))?;
    let request = VmDelete { volumes: args.volumes };
    each(&args.names, async |name| {
        let task = session.client.delete_vm(name, &request).await?;
        session.conclude(task, &args.wait, None, async |_| format!("{name} deleted")).await
    })
    .await
}

fn fate_of_volumes(vm: &Vm, delete: bool) -> String {
    let volumes: Vec<String> = vm.spec.disks.iter().map(|disk| disk.volume.to_string()).collect();
    match (volumes.is_empty(), delete) {
        (true, _) => String::new(),
        (false, true) => format!(" with its volumes {}", volumes.join(", ")),
        (false, false) => format!("; its volumes {} stay", volumes.join(", ")),
    }
}
