//! What guests and strangers may not send: dropped and counted, before, during and after a move.

use std::net::UdpSocket;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_e2e::{Action, Cluster, ClusterSpec, Ending, GuestSpec};
use godwit_guest::Spoof;
use godwit_lab::in_namespace;
use godwit_lab::layout::{DEFAULT_NETWORK_ID, VXLAN_PORT, host_address};
use godwit_model::{DroppedFrames, Name};

/// Spoofed frames per kind and occasion.
const COUNT: u16 = 5;
/// Counters are read every few seconds and travel with a heartbeat.
const PATIENCE: Duration = Duration::from_secs(30);

/// What was dropped of the guest's only interface, on the host where it runs.
fn dropped(cluster: &Cluster) -> Result<DroppedFrames> {
    let vm = cluster.ask(cluster.client().vm(&Name::new("web")?))?;
    Ok(vm.status.dropped.first().map(|interface| interface.dropped).unwrap_or_default())
}

/// Lets the guest send every kind of spoofed frame: none is heard outside, each is counted; the honest ones are heard.
fn spoof(cluster: &Cluster, occasion: &str) -> Result<()> {
    let address = cluster.guest("web")?.address;
    let before = dropped(cluster)?;
    let mut expected = before;
    for spoof in Spoof::ALL {
        let heard = cluster.outside().spoof(address, spoof, COUNT)?;
        if spoof == Spoof::Honest {
            ensure!(heard > 0, "{occasion}: what is right was not heard");
        } else {
            ensure!(heard == 0, "{occasion}: {heard} frames of kind {spoof} came through");
            *expected.of(spoof.word()).context("a reason")? += u64::from(COUNT);
        }
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = dropped(cluster)?;
        if now == expected {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{occasion}: counted {now:?}, not {expected:?}");
        thread::sleep(Duration::from_millis(250));
    }
}

#[test]
fn spoofed_frames_are_dropped_and_counted_before_during_and_after_a_move() -> Result<()> {
    let mut cluster = ClusterSpec::new(2)?.up()?;
    cluster.boot(&GuestSpec::small("web").addressed(), "h1")?;
    let stream = cluster.outside().stream(cluster.guest("web")?.address)?;
    spoof(&cluster, "before")?;
    cluster.run(&[Action::IntoTheMiddle("web", "h2")])?;
    spoof(&cluster, "during")?;
    cluster.run(&[Action::Cancel("web"), Action::Ends("web", Ending::Cancelled("h1")), Action::Migrate("web", "h2")])?;
    ensure!(dropped(&cluster)? == DroppedFrames::default(), "the counts are those of this host");
    spoof(&cluster, "after")?;
    ensure!(stream.report().resets == 0, "{:?}", stream.report());
    drop(stream);
    cluster.finish()
}

#[test]
fn vxlan_from_an_address_that_is_no_host_is_dropped_and_counted() -> Result<()> {
    let mut cluster = ClusterSpec::new(1)?.up()?;
    let web = cluster.boot(&GuestSpec::small("web"), "h1")?;
    let switch = format!("gw-{}-sw", cluster.lab().name());
    let run = |arguments: &[&str]| -> Result<()> {
        let output = in_namespace(&switch, || Command::new("ip").args(arguments).output())??;
        ensure!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    // A neighbour on the underlay that nobody admitted.
    run(&["addr", "add", "10.77.0.99/24", "dev", "br0"])?;
    // VXLAN of the default network; then an echo request to everybody, from an address of the guests' network.
    let mut packet = vec![8, 0, 0, 0];
    packet.extend((DEFAULT_NETWORK_ID << 8).to_be_bytes());
    packet.extend(Spoof::Honest.frame([0x52, 0x54, 0, 9, 9, 9], [10, 99, 0, 77].into()));
    let strangers = || -> Result<u64> {
        let host = cluster.ask(cluster.client().host(&Name::new("h1")?))?;
        Ok(host.load.context("h1 is connected")?.networks.strangers)
    };
    let before = strangers()?;
    in_namespace(&switch, || -> std::io::Result<()> {
        let socket = UdpSocket::bind(("10.77.0.99", 0))?;
        for _ in 0..COUNT {
            socket.send_to(&packet, (host_address(1), VXLAN_PORT))?;
        }
        Ok(())
    })??;
    let deadline = Instant::now() + PATIENCE;
    while strangers()? != before + u64::from(COUNT) {
        ensure!(Instant::now() < deadline, "{} counted, not {COUNT}", strangers()? - before);
        thread::sleep(Duration::from_millis(250));
    }
    // The guest's own traffic, through the admitted tunnel endpoint outside, goes on.
    cluster.status(web.name.as_str())?;
    run(&["addr", "del", "10.77.0.99/24", "dev", "br0"])?;
    cluster.finish()
}
