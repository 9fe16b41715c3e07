//! `kill -9` of every party in the middle of a migration: nothing is lost, nothing runs twice, nothing is left, and the next one works.

use std::time::Duration;

use anyhow::Result;
use godwit_e2e::Action::{Ends, IntoTheMiddle, Kill, Migrate, Pass, Restart};
use godwit_e2e::Party::{Agent, Carry, Controller, Qemu};
use godwit_e2e::{Action, Cluster, ClusterSpec, Ending, GuestSpec};
use godwit_model::ErrorCode;

/// A guest on h1 that is about to move to h2.
fn cluster(expected: &[&str]) -> Result<Cluster> {
    let mut cluster = ClusterSpec::new(2)?.up()?;
    for words in expected {
        cluster.expect_log(words);
    }
    cluster.boot(&GuestSpec::small("web"), "h1")?;
    Ok(cluster)
}

fn scenario(expected: &[&str], actions: &[Action<'_>]) -> Result<()> {
    let mut cluster = cluster(expected)?;
    let stream = cluster.outside().stream(cluster.guest("web")?.address)?;
    cluster.run(actions)?;
    let report = stream.report();
    anyhow::ensure!(report.resets == 0 && report.mismatches == 0, "its users noticed: {report:?}");
    drop(stream);
    cluster.finish()
}

const A_WHILE: Action<'_> = Pass(Duration::from_secs(3));
/// A destination that lost its QEMU, or ends it, says so.
const NO_QEMU: &[&str] = &["QEMU cannot be looked at"];
const NO_CONNECTION: &[ErrorCode] = &[ErrorCode::MigrationFailed, ErrorCode::QemuFailed];

#[test]
fn a_source_agent_killed_in_the_middle_of_a_migration_loses_nothing() -> Result<()> {
    scenario(
        &[],
        &[
            IntoTheMiddle("web", "h2"),
            Kill(Agent("h1")),
            A_WHILE,
            Restart(Agent("h1")),
            Ends("web", Ending::Moved("h2")),
            Migrate("web", "h1"),
        ],
    )
}

#[test]
fn a_destination_agent_killed_in_the_middle_of_a_migration_loses_nothing() -> Result<()> {
    scenario(
        &[],
        &[
            IntoTheMiddle("web", "h2"),
            Kill(Agent("h2")),
            A_WHILE,
            Restart(Agent("h2")),
            Ends("web", Ending::Moved("h2")),
            Migrate("web", "h1"),
        ],
    )
}

#[test]
fn a_controller_killed_in_the_middle_of_a_migration_loses_nothing() -> Result<()> {
    scenario(
        &[],
        &[
            IntoTheMiddle("web", "h2"),
            Kill(Controller),
            A_WHILE,
            Restart(Controller),
            Ends("web", Ending::Moved("h2")),
            Migrate("web", "h1"),
        ],
    )
}

#[test]
fn a_source_carry_killed_in_the_middle_of_a_migration_leaves_the_vm_where_it_was() -> Result<()> {
    scenario(
        NO_QEMU,
        &[
            IntoTheMiddle("web", "h2"),
            Kill(Carry("web", "h1")),
            Ends("web", Ending::Stayed("h1", NO_CONNECTION)),
            Migrate("web", "h2"),
        ],
    )
}

#[test]
fn a_destination_carry_killed_in_the_middle_of_a_migration_leaves_the_vm_where_it_was() -> Result<()> {
    scenario(
        NO_QEMU,
        &[
            IntoTheMiddle("web", "h2"),
            Kill(Carry("web", "h2")),
            Ends("web", Ending::Stayed("h1", NO_CONNECTION)),
            Migrate("web", "h2"),
        ],
    )
}

#[test]
fn a_destination_qemu_killed_in_the_middle_of_a_migration_leaves_the_vm_where_it_was() -> Result<()> {
    scenario(
        NO_QEMU,
        &[
            IntoTheMiddle("web", "h2"),
            Kill(Qemu("web", "h2")),
            Ends("web", Ending::Stayed("h1", NO_CONNECTION)),
            Migrate("web", "h2"),
        ],
    )
}
