//! `godwit lab`: several hosts on one machine.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args, Subcommand};
use godwit_lab::{Lab, LabSpec, LabStatus, LinkChange, LinkRate, LinkState, LinkStatus, Loss};
use godwit_model::{Millis, Name};

use crate::commands::context::adopt;
use crate::context::{Context, Contexts};
use crate::error::Failure;
use crate::output::{Facts, OutputArgs, Table, note, or_nothing, print, print_data, word};

/// The lab that is meant when none is named and none exists.
const DEFAULT_NAME: &str = "default";

/// `godwit lab`.
#[derive(Args)]
#[command(
    after_help = "A lab needs root, iproute2 and QEMU. Its hosts are called h1, h2, and so on; `out` is a client outside of them. \
While there is one lab, its name need not be said; of several, status and link mean the current context's.

Examples:
  godwit lab up --hosts 3 --link 1gbit
  godwit lab link h2 --delay 40ms --loss 1%
  godwit lab link h2 --down
  godwit lab down"
)]
pub(crate) struct LabArgs {
    #[command(flatten)]
    output: OutputArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build a lab, and write a context for it
    Up(UpArgs),
    /// Remove everything of a lab, also what a crash left
    Down {
        /// Its name
        name: Option<String>,
    },
    /// List labs
    List,
    /// Show a lab
    Status {
        /// Its name
        name: Option<String>,
    },
    /// Change a host's link; what is not named stays as it is
    Link(LinkArgs),
}

#[derive(Args)]
struct UpArgs {
    /// Its name
    #[arg(default_value = DEFAULT_NAME)]
    name: String,
    /// Number of hosts
    #[arg(long, default_value_t = 3, value_name = "COUNT")]
    hosts: u16,
    /// Rate of each host's link
    #[arg(long, default_value = "1gbit", value_name = "RATE")]
    link: LinkRate,
    /// Directory for state, logs and disks [default: /var/lib/godwit-lab/NAME]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Directory of the pool that all hosts share; kept when the lab goes [default: in the lab's directory]
    #[arg(long, value_name = "DIR")]
    shared_pool: Option<PathBuf>,
    /// Port of the API on 127.0.0.1 [default: any free one]
    #[arg(long)]
    port: Option<u16>,
    /// QEMU of a host, as HOST=FILE; can be repeated
    #[arg(long = "qemu", value_name = "HOST=FILE", value_parser = parse_qemu)]
    qemus: Vec<(String, PathBuf)>,
    /// One more argument for every agent; can be repeated
    #[arg(long = "agent-arg", value_name = "ARGUMENT", allow_hyphen_values = true)]
    agent_args: Vec<String>,
    /// One more argument for the controller; can be repeated
    #[arg(long = "serve-arg", value_name = "ARGUMENT", allow_hyphen_values = true)]
    serve_args: Vec<String>,
}

#[derive(Args)]
#[command(group = ArgGroup::new("cable").args(["up", "down", "one_way"]))]
#[command(group = ArgGroup::new("change").args(["rate", "delay", "loss", "up", "down", "one_way", "restore"]).multiple(true).required(true))]
struct LinkArgs {
    /// The host, or `out` for the outside client
    place: String,
    /// The lab
    #[arg(long, value_name = "NAME")]
    lab: Option<String>,
    /// Rate each way, such as 200mbit, or `unlimited`
    #[arg(long)]
    rate: Option<LinkRate>,
    /// Delay of what leaves the host, such as 40ms; 0ms for none
    #[arg(long, value_name = "TIME")]
    delay: Option<Millis>,
    /// Share of frames that get lost on the way out, such as 0.5%
    #[arg(long, value_name = "SHARE")]
    loss: Option<Loss>,
    /// Mend the cable
    #[arg(long)]
    up: bool,
    /// Cut the cable
    #[arg(long)]
    down: bool,
    /// Lose what leaves the host, let in what comes
    #[arg(long)]
    one_way: bool,
    /// Make it as it was when the lab was built
    #[arg(long, conflicts_with_all = ["rate", "delay", "loss", "cable"])]
    restore: bool,
}

pub(crate) fn run(args: LabArgs) -> Result<(), Failure> {
    let format = args.output.output;
    match args.verb {
        Verb::Up(up) => {
            note(&format!("building lab {}", up.name));
            let lab = Lab::up(spec_of(up)?)?;
            let status = lab.status()?;
            // The lab is there, with or without a context.
            if let Err(failure) = write_context(&status) {
                failure.show();
            }
            print_data(format, &status, || show(&status))
        }
        Verb::Down { name } => {
            let name = meant(name)?;
            let removed = Lab::remove(&name)?;
            if let (Some(context), Ok(contexts)) = (context_name(&name), Contexts::of_user()) {
                contexts.remove(&context)?;
            }
            print(&format!("lab {name} is gone: {} processes, {} namespaces", removed.processes, removed.namespaces))
        }
        Verb::List => {
            let labs = Lab::list();
            print_data(format, &labs, || {
                let mut table = Table::new(&["NAME"]);
                labs.iter().for_each(|lab| table.row([lab.clone()]));
                table.render()
            })
        }
        Verb::Status { name } => {
            let status = Lab::open(&meant_or_current(name)?)?.status()?;
            print_data(format, &status, || show(&status))
        }
        Verb::Link(link) => {
            let lab = Lab::open(&meant_or_current(link.lab.clone())?)?;
            let status = if link.restore { lab.restore_link(&link.place)? } else { lab.set_link(&link.place, change_of(&link))? };
            print_data(format, &status, || format!("{}: {}", link.place, describe(&status)))
        }
    }
}

fn spec_of(up: UpArgs) -> Result<LabSpec, Failure> {
    let refused = |path: &str| {
        let path = PathBuf::from(path);
        move |source| Failure::File { action: "find", path, source }
    };
    let absolute = |path: PathBuf| std::path::absolute(&path).map_err(refused("the given directory"));
    let mut spec = LabSpec::new(up.name, std::env::current_exe().map_err(refused("the program itself"))?);
    spec.hosts = up.hosts;
    spec.link_rate = up.link;
    spec.dir = up.dir.map(absolute).transpose()?;
    spec.shared_pool = up.shared_pool.map(absolute).transpose()?;
    spec.api_port = up.port;
    spec.agent_args = up.agent_args;
    spec.serve_args = up.serve_args;
    for (host, qemu) in up.qemus {
        spec.overrides.entry(host).or_default().qemu = Some(absolute(qemu)?);
    }
    Ok(spec)
}

fn parse_qemu(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((host, path)) if !host.is_empty() && !path.is_empty() => Ok((host.to_owned(), path.into())),
        _ => Err("write HOST=FILE, such as h2=/usr/bin/qemu-system-x86_64".to_owned()),
    }
}

fn change_of(link: &LinkArgs) -> LinkChange {
    let states = [(link.up, LinkState::Up), (link.down, LinkState::Down), (link.one_way, LinkState::OneWay)];
    LinkChange {
        rate: link.rate,
        delay: link.delay.map(|delay| Duration::from_millis(delay.get())),
        loss: link.loss,
        state: states.into_iter().find(|(given, _)| *given).map(|(_, state)| state),
    }
}

/// The lab that is named, or the only one.
fn meant(name: Option<String>) -> Result<String, Failure> {
    if let Some(name) = name {
        return Ok(name);
    }
    let mut labs = Lab::list();
    match labs.len() {
        0 => Ok(DEFAULT_NAME.to_owned()),
        1 => Ok(labs.remove(0)),
        _ => Err(Failure::usage(format!("there are several labs: {}", labs.join(", ")), "say which one")),
    }
}

/// As [`meant`]; of several, the one that the current context is for. Not for what destroys.
fn meant_or_current(name: Option<String>) -> Result<String, Failure> {
    let current = || {
        let current = Contexts::of_user().ok()?.current().ok()??;
        let lab = current.as_str().strip_prefix("lab-")?.to_owned();
        Lab::list().contains(&lab).then_some(lab)
    };
    name.or_else(current).map_or_else(|| meant(None), Ok)
}

fn write_context(status: &LabStatus) -> Result<(), Failure> {
    let Some(name) = context_name(&status.name) else { return Ok(()) };
    let api = status.api.clone();
    let context = Context { url: api.url, token_file: api.token_file, ca_file: Some(api.ca_file) };
    adopt(&Contexts::of_user()?, &name, &context)
}

/// The name of a lab's context; every name of a lab makes one.
fn context_name(lab: &str) -> Option<Name> {
    Name::new(format!("lab-{lab}")).ok()
}

fn describe(link: &LinkStatus) -> String {
    let mut text = format!("{} {}", word(&link.state), link.rate);
    if link.delay_us > 0 {
        text.push_str(&format!(", delay {} ms", link.delay_us as f64 / 1_000.0));
    }
    if link.loss > Loss::NONE {
        text.push_str(&format!(", loss {}", link.loss));
    }
    text
}

fn show(status: &LabStatus) -> String {
    let pid = |pid: Option<u32>| pid.map_or("not running".to_owned(), |pid| format!("process {pid}"));
    let mut facts = Facts::default();
    facts.fact("Lab", &status.name);
    if !status.complete {
        facts.fact("Incomplete", "it was not built to the end: take it down");
    }
    facts.fact("API", &status.api.url).fact("Controller", pid(status.controller.pid));
    facts.fact("Controller's log", status.controller.log.display()).fact("State and logs", status.dir.display());
    facts.fact("Shared pool", status.shared_pool.display());
    facts.fact("Outside client", format!("ip netns exec {} …", status.outside_namespace));
    let mut table = Table::new(&["HOST", "ADDRESS", "AGENT", "LINK", "NAMESPACE", "LOG"]);
    for host in &status.hosts {
        let relay = if host.relay_died { " (relay died: set the link again)" } else { "" };
        table.row([
            host.name.clone(),
            host.address.to_string(),
            pid(host.agent.pid),
            format!("{}{relay}", or_nothing(host.link.as_ref().map(describe))),
            host.namespace.clone(),
            host.agent.log.display().to_string(),
        ]);
    }
    format!("{}\n{}", facts.render(), table.render())
}
