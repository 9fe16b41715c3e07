//! `godwit vm start|stop|kill|pause|unpause|suspend|unsuspend`.

use clap::Args;
use godwit_api::client::ClientError;
use godwit_api::v1::{Task, VmStart, VmStop};
use godwit_model::{Millis, Name};

use crate::confirm::each;
use crate::error::Failure;
use crate::session::{Session, WaitArgs};

/// Which VMs.
#[derive(Args)]
pub(crate) struct PowerArgs {
    /// Their names
    #[arg(required = true, value_name = "NAME")]
    names: Vec<Name>,
    #[command(flatten)]
    wait: WaitArgs,
}

/// Which VMs, and where.
#[derive(Args)]
#[command(after_help = "Examples:\n  godwit vm start web1 web2\n  godwit vm start web1 --host h2")]
pub(crate) struct StartArgs {
    #[command(flatten)]
    power: PowerArgs,
    /// The host; by default the one with most free memory among those that can run it
    #[arg(long)]
    host: Option<Name>,
}

/// Which VMs, and how long.
#[derive(Args)]
#[command(after_help = "A guest that does not listen is not killed; `godwit vm kill` does that.

Example:\n  godwit vm stop web1 --timeout 30s || godwit vm kill web1")]
pub(crate) struct StopArgs {
    #[command(flatten)]
    power: PowerArgs,
    /// How long to wait for the guest, such as 30s; 5 minutes by default
    #[arg(long, value_name = "TIME")]
    timeout: Option<Millis>,
}

pub(super) async fn start(session: &Session, args: StartArgs) -> Result<(), Failure> {
    let request = VmStart { host: args.host };
    let begin = async |name: &Name| session.client.start_vm(name, &request).await;
    change(session, &args.power, begin, async |name: &Name| {
        let host = session.client.vm(name).await.ok().and_then(|vm| vm.status.host);
        host.map_or("runs".to_owned(), |host| format!("runs on {host}"))
    })
    .await
}

pub(super) async fn stop(session: &Session, args: StopArgs) -> Result<(), Failure> {
    let request = VmStop { timeout: args.timeout };
    change(session, &args.power, async |name| session.client.stop_vm(name, &request).await, said("stopped")).await
}

pub(super) async fn kill(session: &Session, args: PowerArgs) -> Result<(), Failure> {
    change(session, &args, async |name| session.client.kill_vm(name).await, said("killed")).await
}

pub(super) async fn pause(session: &Session, args: PowerArgs) -> Result<(), Failure> {
    change(session, &args, async |name| session.client.pause_vm(name).await, said("paused")).await
}

pub(super) async fn unpause(session: &Session, args: PowerArgs) -> Result<(), Failure> {
    change(session, &args, async |name| session.client.unpause_vm(name).await, said("runs")).await
}

pub(super) async fn suspend(session: &Session, args: PowerArgs) -> Result<(), Failure> {
    change(session, &args, async |name| session.client.suspend_vm(name).await, said("is suspended")).await
}

pub(super) async fn unsuspend(session: &Session, args: StartArgs) -> Result<(), Failure> {
    let request = VmStart { host: args.host };
    let begin = async |name: &Name| session.client.unsuspend_vm(name, &request).await;
    change(session, &args.power, begin, async |name: &Name| {
        let host = session.client.vm(name).await.ok().and_then(|vm| vm.status.host);
        host.map_or("goes on".to_owned(), |host| format!("goes on, on {host}"))
    })
    .await
}

fn said(what: &str) -> impl AsyncFn(&Name) -> String {
    async move |_: &Name| what.to_owned()
}

/// Begins the task for each VM, sees it to its end, and says what the VM does then.
async fn change(
    session: &Session,
    args: &PowerArgs,
    begin: impl AsyncFn(&Name) -> Result<Task, ClientError>,
    then: impl AsyncFn(&Name) -> String,
) -> Result<(), Failure> {
    each(&args.names, async |name| {
        let task = begin(name).await?;
        session.conclude(task, &args.wait, None, async |_| format!("{name} {}", then(name).await)).await
    })
    .await
}
