//! `godwit selftest`: moves a VM of its own around two real hosts, has it look at itself, and reports.
//!
//! What a test can prove under emulation, an administrator can prove of the hosts that he has. The guest writes to its memory all the time, knows
//! what every page must hold, and says once a second on its console how it is: that is all that is relied on.

mod guest;
mod report;

use std::cell::RefCell;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use futures::TryStreamExt;
use godwit_api::client::{Client, ClientError};
use godwit_api::v1::{Host, Task, TaskState, VmCreate, VmDelete, VmMigrate, VmStart};
use godwit_model::{
    Boot, Bytes, BytesPerSec, ErrorCode, ImportFormat, Ladder, MigrationFigures, MigrationPhase, MigrationPolicy,
    MigrationSettings, Millis, Name, PostCopy, Rung, VmSpec,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;
use tokio_util::io::ReaderStream;

use self::guest::{Guest, Status};
use self::report::{Check, HostReport, Report, Verdict};
use crate::arguments::OnlineArgs;
use crate::block_on;
use crate::error::Failure;
use crate::follow::{Patience, follow};
use crate::output::{note, print_data};
use crate::session::Session;

/// RAM of the guest, and what of it is written, looked at, and written anew.
const MEMORY: Bytes = Bytes::GIB;
const KNOBS: &str = "guest.id=selftest guest.touch_total=256M guest.working_set=32M guest.dirty=8M guest.check=64M";
const BOOT: Duration = Duration::from_secs(180);
const MOVE: Duration = Duration::from_secs(300);
/// A rate at which a move lasts long enough to be cancelled.
const SLOW: BytesPerSec = BytesPerSec(2_000_000);
/// A budget that no VM can keep.
const IMPOSSIBLE: Millis = Millis(1);

/// With which guest, and between which hosts.
#[derive(Args)]
#[command(
    after_help = "Creates a VM of 1 GiB, with no disk and no network, moves it there and back in every way, tries what must fail, and removes it. \
Other VMs are not touched; the moves take what the hosts' limits leave them of the network. Takes about a minute. `-o json` is the report to \
send along with a question.

The guest is the test guest of Godwit's sources; `scripts/guest-image` builds it and prints both paths.

Examples:
  godwit selftest --kernel vmlinuz --initrd initramfs.cpio.gz
  godwit selftest --kernel vmlinuz --initrd initramfs.cpio.gz --host h3 --host h4 -o json > selftest.json"
)]
pub(crate) struct SelftestArgs {
    #[command(flatten)]
    online: OnlineArgs,
    /// Kernel of the test guest
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Its initial ramdisk
    #[arg(long, value_name = "FILE")]
    initrd: PathBuf,
    /// A host that takes part; to be given twice [default: the first two that are connected]
    #[arg(long = "host", value_name = "HOST")]
    hosts: Vec<Name>,
}

pub(crate) fn run(args: SelftestArgs) -> Result<(), Failure> {
    let session = Session::open(&args.online)?;
    block_on(async {
        let hosts = choose(&session.client, &args.hosts).await?;
        let made = RefCell::default();
        let test =
            Selftest { client: session.client.clone(), name: fresh_name()?, hosts: hosts.clone().map(|host| host.name), made };
        let mut report = Report::new(hosts.iter().map(HostReport::of).collect());
        let mut terminate = signal(SignalKind::terminate()).map_err(Failure::Terminal)?;
        let interrupted = tokio::select! {
            () = test.all(&args, &mut report) => false,
            _ = tokio::signal::ctrl_c() => true,
            _ = terminate.recv() => true,
        };
        if interrupted {
            report.checks.push(Check::failed("the test", "interrupted"));
        }
        test.remove(&mut report).await;
        report.conclude();
        print_data(session.format, &report, || report.table())?;
        match report.failed() {
            0 => Ok(()),
            failed => Err(Failure::PartlyDone { failed, all: report.checks.len() }),
        }
    })
}

/// The two hosts.
async fn choose(client: &Client, wanted: &[Name]) -> Result<[Host; 2], Failure> {
    const HINT: &str = "`godwit host list` shows the hosts; two that are connected are needed";
    let all = client.hosts().await?;
    let chosen: Vec<Host> = match wanted {
        [] => all.into_iter().filter(|host| host.connected).take(2).collect(),
        wanted => wanted.iter().filter_map(|name| all.iter().find(|host| host.name == *name && host.connected).cloned()).collect(),
    };
    match <[Host; 2]>::try_from(chosen) {
        Ok([one, other]) if one.name != other.name => Ok([one, other]),
        _ => Err(Failure::usage("the test takes two hosts that are connected", HINT)),
    }
}

/// One that nobody has.
fn fresh_name() -> Result<Name, Failure> {
    let mut drawn = [0; 4];
    rustix::rand::getrandom(&mut drawn, rustix::rand::GetRandomFlags::empty()).map_err(|error| Failure::Runtime(error.into()))?;
    Name::new(format!("selftest-{:08x}", u32::from_ne_bytes(drawn)))
        .map_err(|_| Failure::usage("no name can be made for the VM", "this is a mistake of the program"))
}

/// The VM, and where it may be.
struct Selftest {
    client: Client,
    name: Name,
    hosts: [Name; 2],
    made: RefCell<Made>,
}

/// What is there and has to go again.
#[derive(Default)]
struct Made {
    vm: bool,
    images: Vec<Name>,
}

/// Why the test cannot go on.
type Stop = String;

fn told(error: &ClientError) -> Stop {
    error.refusal().to_string()
}

fn why(task: &Task) -> Stop {
    task.error.as_ref().map_or_else(|| format!("the task is {:?}", task.state), ToString::to_string)
}

impl Selftest {
    fn image(&self, part: &str) -> Name {
        Name::new(format!("{}-{part}", self.name)).unwrap_or_else(|_| self.name.clone())
    }

    /// Every check, in an order in which one that fails leaves the next ones something to look at.
    async fn all(&self, args: &SelftestArgs, report: &mut Report) {
        note(&format!("boots {} on {}", self.name, self.hosts[0]));
        let guest = Guest::follow(self.client.clone(), self.name.clone());
        let booted = self.boot(args, &guest).await;
        let went = booted.is_ok();
        report.note("a VM boots", booted.map(|status| (Verdict::Passed, format!("{} pages under test", status.pages))));
        if !went {
            return;
        }
        for (what, postcopy) in [
            ("a move", PostCopy::ByLadder),
            ("a move back", PostCopy::ByLadder),
            ("a move in post-copy", PostCopy::Now),
            ("a move in post-copy back", PostCopy::Now),
        ] {
            note(what);
            let settings = MigrationSettings { postcopy: Some(postcopy), ..MigrationPolicy::default().into() };
            match self.migrate(&guest, settings).await {
                Ok(Moved::To(to, figures, detail)) => report.moved(what, &to, *figures, detail),
                Ok(Moved::Impossible(reason)) => report.note(what, Ok((Verdict::Skipped, reason))),
                Err(stop) => report.note(what, Err(stop)),
            }
        }
        note("a move that is cancelled");
        report.note("a move that is cancelled leaves the VM alone", self.cancel(&guest).await);
        note("a move with a budget that cannot be kept");
        report.note("a budget that cannot be kept is not raised", self.keep_budget(&guest).await);
    }

    async fn import(&self, part: &str, kind: ImportFormat, file: &PathBuf) -> Result<(), Stop> {
        let open = tokio::fs::File::open(file).await.map_err(|error| format!("{}: {error}", file.display()))?;
        let content = ReaderStream::new(open).map_err(std::io::Error::other);
        let name = self.image(part);
        self.client.import_image(&name, kind, content).await.map_err(|error| told(&error))?;
        self.made.borrow_mut().images.push(name);
        Ok(())
    }

    async fn boot(&self, args: &SelftestArgs, guest: &Guest) -> Result<Status, Stop> {
        self.import("kernel", ImportFormat::Kernel, &args.kernel).await?;
        self.import("initrd", ImportFormat::Initrd, &args.initrd).await?;
        let cmdline = format!("console=ttyS0 quiet panic=-1 random.trust_cpu=on {KNOBS}");
        let boot = Boot::Kernel { kernel: self.image("kernel"), initrd: Some(self.image("initrd")), cmdline };
        let request = VmCreate { name: self.name.clone(), spec: VmSpec::new(2, MEMORY, boot), golden: None };
        self.client.create_vm(&request).await.map_err(|error| told(&error))?;
        self.made.borrow_mut().vm = true;
        let start = VmStart { host: Some(self.hosts[0].clone()) };
        let task = self.client.start_vm(&self.name, &start).await.map_err(|error| told(&error))?;
        self.done(task).await?;
        guest.until(BOOT, |status| status.sweeps > 0).await
    }

    async fn ended(&self, task: Task) -> Result<Task, Stop> {
        let id = task.id;
        if task.state.ended() {
            return Ok(task);
        }
        follow(&self.client, id, Patience::Until(MOVE), &mut |_| ()).await.map_err(|failure| failure.to_string())
    }

    async fn done(&self, task: Task) -> Result<Task, Stop> {
        let task = self.ended(task).await?;
        if task.state == TaskState::Done { Ok(task) } else { Err(why(&task)) }
    }

    async fn begin(&self, to: &Name, policy: MigrationSettings) -> Result<Task, ClientError> {
        let request = VmMigrate { host: to.clone(), policy, dry_run: false, reason: Some("selftest".into()) };
        self.client.migrate_vm(&self.name, &request).await
    }

    /// Where the VM is, and the host where it is not.
    async fn here_and_there(&self) -> Result<[&Name; 2], Stop> {
        let at = self.client.vm(&self.name).await.map_err(|error| told(&error))?.status.host;
        let [one, other] = &self.hosts;
        Ok(if at.as_ref() == Some(other) { [other, one] } else { [one, other] })
    }

    async fn migrate(&self, guest: &Guest, settings: MigrationSettings) -> Result<Moved, Stop> {
        let ([_, to], before) = (self.here_and_there().await?, guest.now()?);
        let task = match self.begin(to, settings).await {
            Ok(task) => task,
            // Post-copy that a host cannot do, or that a policy rules out.
            Err(error) => {
                let impossible = matches!(error.refusal().code, ErrorCode::UserfaultUnavailable | ErrorCode::NotPermitted);
                return if impossible { Ok(Moved::Impossible(told(&error))) } else { Err(told(&error)) };
            }
        };
        let task = self.done(task).await?;
        let figures = task.figures.ok_or("the move has no figures")?;
        let after = self.is_sound_on(guest, &before, to).await?;
        let checked = after.pages_checked.saturating_sub(before.pages_checked);
        let stall =
            if after.stalls > before.stalls { format!(", stood still for {} ms", after.longest_stall_ms) } else { String::new() };
        Ok(Moved::To(to.clone(), Box::new(figures), format!("{checked} pages right{stall}")))
    }

    /// The same boot of the VM is on this host, and every page has been looked at since.
    async fn is_sound_on(&self, guest: &Guest, before: &Status, host: &Name) -> Result<Status, Stop> {
        let now = self.client.vm(&self.name).await.map_err(|error| told(&error))?;
        if now.status.host.as_ref() != Some(host) {
            return Err(format!(
                "the VM is on {} and not on {host}",
                now.status.host.map_or_else(|| "no host".into(), |at| at.to_string())
            ));
        }
        // One that began before may have passed a page already.
        let sweeps = guest.now()?.sweeps + 2;
        let after =
            guest.until(MOVE, |status| status.sweeps >= sweeps || status.page_errors > 0 || status.boot != before.boot).await?;
        match () {
            () if after.boot != before.boot => Err("the VM has been booted again".into()),
            () if after.page_errors > 0 => Err(format!("{} pages of its memory are wrong", after.page_errors)),
            () if after.clock_jumps > before.clock_jumps => Err(format!("its clock jumped by {} ms", after.largest_clock_jump_ms)),
            () => Ok(after),
        }
    }

    async fn cancel(&self, guest: &Guest) -> Result<(Verdict, String), Stop> {
        let ([here, there], before) = (self.here_and_there().await?, guest.now()?);
        let slow = MigrationSettings { bandwidth: Some(SLOW), ..MigrationPolicy::default().into() };
        let task = self.begin(there, slow).await.map_err(|error| told(&error))?;
        let begun = async {
            loop {
                let now = self.client.task(task.id).await.map_err(|error| told(&error))?;
                if now.state.ended() {
                    return Err(why(&now));
                }
                if now
                    .progress
                    .is_some_and(|progress| progress.phase == MigrationPhase::WarmUp && progress.wire_bytes > Bytes::mib(1))
                {
                    return Ok(());
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        tokio::time::timeout(MOVE, begun).await.map_err(|_| "it does not begin".to_owned())??;
        let task = self.client.cancel_task(task.id).await.map_err(|error| told(&error))?;
        let task = self.ended(task).await?;
        if task.state != TaskState::Cancelled {
            return Err(why(&task));
        }
        self.is_sound_on(guest, &before, here).await.map(|_| (Verdict::Passed, format!("it runs on {here}")))
    }

    async fn keep_budget(&self, guest: &Guest) -> Result<(Verdict, String), Stop> {
        let ([here, there], before) = (self.here_and_there().await?, guest.now()?);
        let settings = MigrationSettings {
            max_blackout: Some(IMPOSSIBLE),
            on_miss: Some(Ladder::only(Rung::GiveUp)),
            timeout: Some(Millis(60_000)),
            ..MigrationPolicy::default().into()
        };
        let task = self.begin(there, settings).await.map_err(|error| told(&error))?;
        let task = self.ended(task).await?;
        // A QEMU before 8.1 can come to its own switch-over while this waits, and is cancelled: nothing was raised then either.
        let kept = matches!(task.error.as_ref().map(|refusal| refusal.code), Some(ErrorCode::NotConverging | ErrorCode::QemuFirst));
        if !kept {
            return Err(format!("within {IMPOSSIBLE}: {}", why(&task)));
        }
        self.is_sound_on(guest, &before, here).await.map(|_| (Verdict::Passed, format!("given up, it runs on {here}")))
    }

    /// What the test made, and nothing else.
    async fn remove(&self, report: &mut Report) {
        note("removes what it made");
        let Made { vm, images } = self.made.take();
        let removed = async {
            if vm {
                self.remove_vm().await.map_err(|stop| {
                    format!("{stop}; to remove it: `godwit vm kill {0}`, `godwit vm delete {0}`, `godwit image delete`", self.name)
                })?;
            }
            for image in images {
                self.client.delete_image(&image).await.map_err(|error| told(&error))?;
            }
            Ok((Verdict::Passed, "what the test made is gone".to_owned()))
        };
        report.note("nothing is left", removed.await);
    }

    async fn remove_vm(&self) -> Result<(), Stop> {
        self.patiently(async || self.client.kill_vm(&self.name).await).await?;
        self.patiently(async || self.client.delete_vm(&self.name, &VmDelete { volumes: false }).await).await
    }

    /// Asks again while something else that was interrupted has not ended: the VM's start, or a move.
    async fn patiently(&self, ask: impl AsyncFn() -> Result<Task, ClientError>) -> Result<(), Stop> {
        let deadline = Instant::now() + MOVE;
        loop {
            match ask().await {
                Ok(task) => return self.done(task).await.map(drop),
                Err(error) if error.refusal().code == ErrorCode::VmBusy && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                Err(error) => return Err(told(&error)),
            }
        }
    }
}

/// What became of a move.
enum Moved {
    To(Name, Box<MigrationFigures>, String),
    Impossible(String),
}
