//! `godwit cluster`: the cluster's own authority, on the machine of the controller; and what its hosts have in common.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use godwit_api::v1::CpuBaseline;
use godwit_controller::AuthorityPlace;

use crate::arguments::OnlineArgs;
use crate::confirm::ConfirmArgs;
use crate::daemon::serve::SecretArgs;
use crate::error::Failure;
use crate::output::{Facts, OutputArgs, Table, note, or_nothing, print_data, word};
use crate::session::Session;
use crate::text::moment;

/// `godwit cluster`.
#[derive(Args)]
pub(crate) struct ClusterArgs {
    #[command(subcommand)]
    noun: Noun,
}

#[derive(Subcommand)]
enum Noun {
    /// The authority: the root that everybody trusts, and the intermediate that signs
    Ca(CaArgs),
    /// Show what the CPUs of all connected hosts have in common
    #[command(
        after_help = "A VM with a CPU model that runs on all hosts can move to any of them; one with `host` or `max` only between equal hosts.
The level is that of the x86-64 psABI. Features that a host has and not all others are what holds the baseline back elsewhere.

Example:
  godwit cluster cpu-baseline -o yaml"
    )]
    CpuBaseline {
        #[command(flatten)]
        online: OnlineArgs,
    },
}

#[derive(Args)]
struct CaArgs {
    #[command(subcommand)]
    verb: Verb,
}

/// Which authority.
#[derive(Args)]
struct PlaceArgs {
    /// The controller's directory
    #[arg(long, value_name = "DIR", default_value = "/var/lib/godwit/controller")]
    data_dir: PathBuf,
    #[command(flatten)]
    secret: SecretArgs,
}

#[derive(Subcommand)]
enum Verb {
    /// Show fingerprint, ends, and where the root's key is
    Show {
        #[command(flatten)]
        place: PlaceArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Take the root's key off this machine
    #[command(
        after_help = "It writes certificate and key of the root to a file that must not exist, on another medium, reads them back, and then
removes the key here. Everything goes on without it; it is needed to sign a new intermediate, every two years at the
latest. Whoever has the file can make hosts and controllers of this cluster: keep it in a safe. The controller must not run;
VMs run on meanwhile.

Example:
  systemctl stop godwit-controller; godwit cluster ca export-root --out /mnt/usb/godwit-root.pem"
    )]
    ExportRoot {
        /// The file to write
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        #[command(flatten)]
        place: PlaceArgs,
        #[command(flatten)]
        confirm: ConfirmArgs,
    },
    /// Sign a new intermediate with the root's key
    #[command(
        after_help = "Hosts and users trust the root and need nothing; what the old intermediate signed is good until it ends. The
controller must not run; VMs run on meanwhile.

Example:
  systemctl stop godwit-controller; godwit cluster ca rotate-intermediate --root-key /mnt/usb/godwit-root.pem"
    )]
    RotateIntermediate {
        /// The root's key, as `export-root` wrote it [default: the one that is still here]
        #[arg(long, value_name = "FILE")]
        root_key: Option<PathBuf>,
        #[command(flatten)]
        place: PlaceArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
}

pub(crate) fn run(args: ClusterArgs) -> Result<(), Failure> {
    let verb = match args.noun {
        Noun::Ca(CaArgs { verb }) => verb,
        Noun::CpuBaseline { online } => return cpu_baseline(&Session::open(&online)?),
    };
    match verb {
        Verb::Show { place, output } => {
            let view = place.with(|place| place.show())?;
            show(&view, &output)
        }
        Verb::ExportRoot { out, place, confirm } => {
            let what = format!("take the root's key to {}, and remove it here", out.display());
            if confirm.dry_run {
                return crate::output::print(&format!("would {what}"));
            }
            confirm.confirm(&what)?;
            place.with(|place| place.export_root(&out))?;
            note(&format!("the root's key is in {} and no longer here; keep it in a safe", out.display()));
            Ok(())
        }
        Verb::RotateIntermediate { root_key, place, output } => {
            let view = place.with(|place| place.rotate_intermediate(root_key.as_deref()))?;
            show(&view, &output)
        }
    }
}

impl PlaceArgs {
    fn with<T>(&self, act: impl FnOnce(AuthorityPlace<'_>) -> Result<T, godwit_controller::ServeError>) -> Result<T, Failure> {
        let secret = self.secret.file();
        act(AuthorityPlace { data_dir: &self.data_dir, secret: secret.as_deref() }).map_err(Failure::daemon)
    }
}

fn cpu_baseline(session: &Session) -> Result<(), Failure> {
    let baselines = crate::block_on(async { Ok(session.client.cpu_baseline().await?) })?;
    print_data(session.format, &baselines, || {
        let text: Vec<String> = baselines.iter().map(baseline).collect();
        if text.is_empty() { "no host is connected\n".to_owned() } else { text.join("\n") }
    })
}

fn baseline(baseline: &CpuBaseline) -> String {
    let mut facts = Facts::default();
    facts
        .fact("Accelerator", word(&baseline.accelerator))
        .fact("Level", format!("x86-64-v{}", baseline.level))
        .fact("Default model", &baseline.default_model)
        .fact("Models", baseline.models.len())
        .fact("Features", baseline.features.join(" "));
    let mut table = Table::new(&["HOST", "LEVEL", "MODELS MORE", "FEATURES MORE"]);
    for host in &baseline.hosts {
        let more = or_nothing((!host.features.is_empty()).then(|| host.features.join(" ")));
        table.row([host.host.to_string(), format!("x86-64-v{}", host.level), host.models.len().to_string(), more]);
    }
    format!("{}{}", facts.render(), table.render())
}

fn show(view: &godwit_controller::AuthorityView, output: &OutputArgs) -> Result<(), Failure> {
    print_data(output.output, view, || {
        let mut facts = Facts::default();
        facts.fact("Fingerprint", &view.fingerprint).fact("Root ends", moment(view.root_ends));
        facts.fact("Root's key", if view.root_key_here { "here, sealed" } else { "taken away" });
        facts.fact("Intermediate", view.intermediate.as_deref().unwrap_or("none"));
        if let Some(ends) = view.intermediate_ends {
            facts.fact("  ends", moment(ends));
        }
        facts.render()
    })
}
