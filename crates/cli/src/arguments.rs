//! The tree of commands. What a verb takes is in its own file.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};
use godwit_model::BytesPerSec;

use crate::commands::{
    cluster, completions, context, event, host, image, lab, network, policy, pool, schedule, selftest, snapshot, task, team, token,
    vault, vm,
};
use crate::daemon::{agent, serve};
use crate::output::OutputArgs;

/// Every command that is not hidden; a test holds it complete.
const GROUPS: &str = "\
Virtual machines:
  vm           Create, start, move and delete VMs, open their consoles
  snapshot     VMs as they were, to go back to
  schedule     Snapshots that are taken by themselves, and which are kept
  image        Kernels, initial ramdisks and disks to boot or copy from
  policy       Limits of the migrations of VMs with certain labels

Where they run:
  cluster      The cluster's own authority, on the controller's machine
  host         Hosts, and how they join
  pool         Where volumes are kept
  vault        What holds snapshots in a pool
  network      Layer-2 networks of VMs across hosts
  selftest     Moves a VM of its own around two hosts, and reports

What happens:
  task         Long work: follow, wait for, limit, cancel
  event        Changes as they happen

Who may do what:
  team         Owners of objects
  token        API tokens
  context      Controllers that this user works with

On this machine:
  lab          Several hosts on one machine, for trying out
  completions  Completions for a shell

Daemons:
  agent        The agent of this host
  serve        The controller
";

const TEMPLATE: &str = "{about-with-newline}\n{usage-heading} {usage}{after-help}\n\nOptions:\n{options}\n
`godwit COMMAND --help` says more. Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 refused,
5 partly done, 6 still running, 7 cancelled, 8 conflict, 9 not permitted.";

/// Virtual machines that move between hosts without anybody noticing
#[derive(Parser)]
#[command(name = "godwit", version, help_template = TEMPLATE, after_help = GROUPS, infer_subcommands = false)]
pub(crate) struct Godwit {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// A noun, or a daemon.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Create, start, move and delete VMs, open their consoles
    Vm(Noun<vm::Verb>),
    /// VMs as they were, to go back to
    Snapshot(Noun<snapshot::Verb>),
    /// Snapshots that are taken by themselves, and which are kept
    Schedule(Noun<schedule::Verb>),
    /// Kernels, initial ramdisks and disks to boot or copy from
    Image(Noun<image::Verb>),
    /// Limits of the migrations of VMs with certain labels
    Policy(Noun<policy::Verb>),
    /// The cluster's own authority, on the controller's machine
    Cluster(cluster::ClusterArgs),
    /// Hosts, and how they join
    Host(host::HostArgs),
    /// Where volumes are kept
    Pool(Noun<pool::Verb>),
    /// What holds snapshots in a pool
    Vault(Noun<vault::Verb>),
    /// Layer-2 networks of VMs across hosts
    Network(Noun<network::Verb>),
    /// Moves a VM of its own around two hosts, and reports
    Selftest(selftest::SelftestArgs),
    /// Long work: follow, wait for, limit, cancel
    Task(Noun<task::Verb>),
    /// Changes as they happen
    Event(Noun<event::Verb>),
    /// Owners of objects
    Team(Noun<team::Verb>),
    /// API tokens
    Token(Noun<token::Verb>),
    /// Controllers that this user works with
    Context(context::ContextArgs),
    /// Several hosts on one machine, for trying out
    Lab(lab::LabArgs),
    /// The agent of this host
    Agent(agent::AgentArgs),
    /// The controller
    Serve(serve::ServeArgs),
    /// Completions for a shell
    Completions(completions::CompletionsArgs),
}

/// A noun whose verbs all speak with the controller.
#[derive(Args)]
pub(crate) struct Noun<V: Subcommand> {
    #[command(flatten)]
    pub(crate) online: OnlineArgs,
    #[command(subcommand)]
    pub(crate) verb: V,
}

/// What every command that speaks with the controller takes.
#[derive(Args, Clone, Default)]
pub(crate) struct OnlineArgs {
    #[command(flatten)]
    pub(crate) connection: ConnectionArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Which controller, and with what right. Flags go before environment variables, a URL before a context, the current context is last.
#[derive(Args, Clone, Default)]
#[command(next_help_heading = "Connection")]
pub(crate) struct ConnectionArgs {
    /// Use this context instead of the current one [env: GODWIT_CONTEXT]
    #[arg(long, global = true, value_name = "NAME", conflicts_with = "url")]
    pub(crate) context: Option<String>,
    /// Use this controller and no context [env: GODWIT_URL]
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) url: Option<String>,
    /// Read the API token from this file [env: GODWIT_TOKEN_FILE]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Trust this certificate of the cluster's authority (PEM) [env: GODWIT_CA_FILE]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) ca_file: Option<PathBuf>,
}

/// A bandwidth, or none.
#[derive(Clone, Copy)]
pub(crate) struct Bandwidth(pub(crate) Option<BytesPerSec>);

impl FromStr for Bandwidth {
    type Err = <BytesPerSec as FromStr>::Err;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "none" { Ok(Self(None)) } else { text.parse().map(|limit| Self(Some(limit))) }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_tree_is_consistent() {
        Godwit::command().debug_assert();
    }

    #[test]
    fn the_groups_list_every_command_and_no_other() {
        let mut listed: Vec<String> =
            GROUPS.lines().filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next().map(str::to_owned)).collect();
        let mut real: Vec<String> = Godwit::command()
            .get_subcommands()
            .filter(|command| !command.is_hide_set() && command.get_name() != "help")
            .map(|command| command.get_name().to_owned())
            .collect();
        listed.sort();
        real.sort();
        assert_eq!(listed, real);
        for command in Godwit::command().get_subcommands().filter(|command| !command.is_hide_set()) {
            let about = command.get_about().map(ToString::to_string).unwrap_or_default();
            assert!(GROUPS.contains(&about), "the group list says something else about {}", command.get_name());
        }
    }

    #[test]
    fn every_verb_says_what_it_does() {
        fn check(command: &clap::Command, path: &str) {
            for verb in command.get_subcommands() {
                let path = format!("{path} {}", verb.get_name());
                assert!(verb.get_about().is_some(), "{path} has no help");
                for argument in verb.get_arguments().filter(|argument| !argument.is_hide_set()) {
                    assert!(argument.get_help().is_some(), "{} of {path} has no help", argument.get_id());
                }
                check(verb, &path);
            }
        }
        check(&Godwit::command(), "godwit");
    }

    #[test]
    fn no_argument_takes_a_secret() {
        fn check(command: &clap::Command) {
            for argument in command.get_arguments() {
                let name = argument.get_id().as_str();
                assert!(
                    !["token", "secret", "password", "key"].contains(&name),
                    "{name} would be seen by every user of the machine"
                );
            }
            command.get_subcommands().for_each(check);
        }
        check(&Godwit::command());
    }
}
