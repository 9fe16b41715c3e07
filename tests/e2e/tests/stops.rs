//! A minute in which a party of a migration stands still (SIGSTOP, then SIGCONT): the VM runs on, in one place, and the migration goes on.

use std::time::Duration;

use anyhow::Result;
use godwit_e2e::Action::{Continue, Ends, IntoTheMiddle, Migrate, Pass, Stop};
use godwit_e2e::Party::{Agent, Carry, Controller, Qemu};
use godwit_e2e::{ClusterSpec, Ending, GuestSpec};

const A_MINUTE: Duration = Duration::from_secs(60);

/// Kept small: several of them stand beside each other.
fn guest(name: &str) -> GuestSpec {
    GuestSpec::small(name).knob("check=4M")
}

#[test]
fn a_minutes_stop_of_a_carry_or_of_the_destinations_qemu_loses_nothing() -> Result<()> {
    let mut cluster = ClusterSpec::new(2)?.up()?;
    // Of the QEMU that stands still.
    cluster.expect_log("QEMU did not answer");
    cluster.boot_all(&[(guest("a"), "h1"), (guest("b"), "h1"), (guest("c"), "h1")])?;
    cluster.run(&[
        IntoTheMiddle("a", "h2"),
        Stop(Carry("a", "h1")),
        IntoTheMiddle("b", "h2"),
        Stop(Carry("b", "h2")),
        IntoTheMiddle("c", "h2"),
        Stop(Qemu("c", "h2")),
        Pass(A_MINUTE),
        Continue(Carry("a", "h1")),
        Continue(Carry("b", "h2")),
        Continue(Qemu("c", "h2")),
        Ends("a", Ending::Moved("h2")),
        Ends("b", Ending::Moved("h2")),
        Ends("c", Ending::Moved("h2")),
        Migrate("a", "h1"),
    ])?;
    cluster.finish()
}

#[test]
fn a_minutes_stop_of_the_sources_or_the_destinations_agent_loses_nothing() -> Result<()> {
    let mut cluster = ClusterSpec::new(3)?.up()?;
    // Of an agent that stands still: its clock goes on, and what it had asked seems late.
    cluster.expect_log("QEMU cannot be looked at");
    cluster.expect_log("nft has not ended within");
    cluster.boot_all(&[(guest("a"), "h1"), (guest("b"), "h2")])?;
    cluster.run(&[IntoTheMiddle("a", "h2"), IntoTheMiddle("b", "h3"), Stop(Agent("h1")), Stop(Agent("h3"))])?;
    std::thread::sleep(A_MINUTE);
    // Its source was ready long ago, and waits for the agent that is to let it run. The other may stand still where QEMU reached its own
    // switch-over, until its own agent is back.
    cluster.status("b")?;
    cluster.run(&[Continue(Agent("h1")), Continue(Agent("h3")), Ends("a", Ending::Moved("h2")), Ends("b", Ending::Moved("h3"))])?;
    // A move can end by what the agents say to each other, before both have found the controller again.
    for host in ["h1", "h3"] {
        cluster.wait_connected(host, true)?;
    }
    cluster.run(&[Migrate("a", "h3"), Migrate("b", "h1")])?;
    cluster.finish()
}

#[test]
fn a_minutes_stop_of_the_controller_loses_nothing() -> Result<()> {
    let mut cluster = ClusterSpec::new(2)?.up()?;
    cluster.boot(&guest("a"), "h1")?;
    cluster.run(&[
        IntoTheMiddle("a", "h2"),
        Stop(Controller),
        Pass(A_MINUTE),
        Continue(Controller),
        Ends("a", Ending::Moved("h2")),
        Migrate("a", "h1"),
    ])?;
    cluster.finish()
}
