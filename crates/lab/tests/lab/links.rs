//! Links do what they are told: rate, cut, one way, delay, loss.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use godwit_lab::{Lab, LabError, LinkChange, LinkRate, LinkState, Loss, in_namespace, layout};

use crate::support::{Echo, Scoped, spec, transfer};

/// Long enough for a datagram on a busy machine.
const ARRIVES: Duration = Duration::from_secs(5);
/// How long to listen for what must not come.
const SILENCE: Duration = Duration::from_millis(300);
const H1: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const H2: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

fn set(lab: &Lab, host: &str, change: LinkChange) {
    lab.set_link(host, change).expect("the link changes");
}

fn state(state: LinkState) -> LinkChange {
    LinkChange { state: Some(state), ..LinkChange::default() }
}

fn rate(megabits: u64) -> LinkChange {
    LinkChange { rate: Some(LinkRate::from_bits_per_second(megabits * 1_000_000)), ..LinkChange::default() }
}

fn delay(millis: u64) -> LinkChange {
    LinkChange { delay: Some(Duration::from_millis(millis)), ..LinkChange::default() }
}

fn h1_to_h2(lab: &Lab, seconds: u64) -> f64 {
    let (h1, h2) = (lab.namespace("h1").expect("h1"), lab.namespace("h2").expect("h2"));
    let transfer = transfer(&h1, &h2, H2, Duration::from_secs(seconds));
    eprintln!("h1 to h2: {:.1} Mbit/s", transfer.bits_per_second() / 1e6);
    transfer.bits_per_second()
}

#[test]
fn bulk_traffic_keeps_to_the_rate_of_the_link() {
    let scoped = Scoped::network(spec(2));
    let lab = &scoped.0;
    set(lab, "h2", rate(80));
    let slow = h1_to_h2(lab, 3);
    // At most the rate and the burst; a loaded machine may be slower, never faster.
    assert!(slow < 80e6 * 1.1, "{slow}");
    assert!(slow > 80e6 * 0.3, "{slow}");
    set(lab, "h2", rate(400));
    let fast = h1_to_h2(lab, 3);
    assert!(fast < 400e6 * 1.1, "{fast}");
    assert!(fast > slow * 1.5, "{fast} after {slow}");
    assert!(matches!(lab.set_link("h3", rate(1)), Err(LabError::UnknownHost { .. })));
}

#[test]
fn a_cut_link_passes_nothing_but_keeps_its_carrier_and_mends() {
    let scoped = Scoped::network(spec(2));
    let lab = &scoped.0;
    let (cut, whole) = (Echo::host_to_switch(lab, "h1"), Echo::host_to_switch(lab, "h2"));
    assert!(cut.goes(ARRIVES) && cut.comes(H1, ARRIVES));
    set(lab, "h1", state(LinkState::Down));
    assert!(!cut.goes(SILENCE));
    assert!(!cut.comes(H1, SILENCE));
    assert!(whole.goes(ARRIVES));
    let carrier = in_namespace(&lab.namespace("h1").expect("h1"), || {
        // Not /sys/class/net, which shows the namespace that mounted it.
        let up = std::process::Command::new("ip").args(["-o", "link", "show", "eth0"]).output().expect("ip");
        String::from_utf8_lossy(&up.stdout).contains("LOWER_UP")
    });
    assert!(carrier.expect("entered"));
    set(lab, "h1", state(LinkState::Up));
    assert!(cut.goes(ARRIVES) && cut.comes(H1, ARRIVES));
}

#[test]
fn a_one_way_link_loses_only_what_leaves_the_host() {
    let scoped = Scoped::network(spec(1));
    let lab = &scoped.0;
    let echo = Echo::host_to_switch(lab, "h1");
    assert!(echo.round_trip(1).is_some());
    set(lab, "h1", state(LinkState::OneWay));
    assert!(!echo.goes(SILENCE));
    assert!(echo.comes(H1, ARRIVES));
    assert_eq!(lab.restore_link("h1").expect("restored").state, LinkState::Up);
    assert!(echo.goes(ARRIVES));
}

#[test]
fn a_delay_shows_in_the_round_trip_and_goes_again() {
    let scoped = Scoped::network(spec(2));
    let lab = &scoped.0;
    let echo = Echo::host_to_switch(lab, "h1");
    set(lab, "h1", delay(40));
    let slow = echo.round_trip(5).expect("answered");
    assert!(slow >= Duration::from_millis(40) && slow < Duration::from_millis(70), "{slow:?}");
    // A change replaces the relay.
    set(lab, "h1", delay(80));
    let slower = echo.round_trip(5).expect("answered");
    assert!(slower >= Duration::from_millis(80) && slower < Duration::from_millis(110), "{slower:?}");
    set(lab, "h1", delay(0));
    let quick = echo.round_trip(20).expect("answered");
    assert!(quick < Duration::from_millis(40), "{quick:?}");
    set(lab, "h1", delay(10));
    assert!(echo.round_trip(5).expect("answered") >= Duration::from_millis(10));
}

#[test]
fn a_delayed_link_still_carries_bulk_traffic_and_keeps_to_its_rate() {
    let scoped = Scoped::network(spec(2));
    let lab = &scoped.0;
    set(lab, "h1", LinkChange { delay: Some(Duration::from_millis(40)), ..rate(200) });
    let delayed = h1_to_h2(lab, 4);
    assert!(delayed < 200e6 * 1.1, "{delayed}");
    assert!(delayed > 200e6 * 0.2, "{delayed}");
    set(lab, "h1", state(LinkState::Down));
    assert!(!Echo::host_to_switch(lab, "h1").goes(SILENCE));
}

#[test]
fn loss_takes_the_share_that_was_asked_for() {
    let scoped = Scoped::network(spec(1));
    let lab = &scoped.0;
    let echo = Echo::host_to_switch(lab, "h1");
    assert!(echo.goes(ARRIVES));
    let loss = Loss::from_parts_per_million(300_000);
    set(lab, "h1", LinkChange { loss: Some(loss), ..LinkChange::default() });
    let arrived = echo.arrivals(200);
    assert!((100..180).contains(&arrived), "{arrived} of 200");
    set(lab, "h1", LinkChange { loss: Some(Loss::NONE), ..LinkChange::default() });
    assert!(echo.arrivals(50) >= 45);
}

#[test]
fn a_dead_relay_shows_in_the_status_and_setting_the_link_again_repairs_it() {
    let scoped = Scoped::network(spec(1));
    let lab = &scoped.0;
    set(lab, "h1", delay(5));
    let echo = Echo::host_to_switch(lab, "h1");
    assert!(echo.goes(ARRIVES));
    assert!(!lab.status().expect("status").hosts[0].relay_died);
    let pids = std::process::Command::new("ip").args(["netns", "pids", &lab.namespace("h1").expect("h1")]).output();
    let pids = String::from_utf8_lossy(&pids.expect("ip").stdout).into_owned();
    let relay: i32 = pids.trim().parse().expect("the relay is alone in its namespace");
    let relay = rustix::process::Pid::from_raw(relay).expect("a pid");
    rustix::process::kill_process(relay, godwit_lab::Signal::KILL).expect("killed");
    let _ = rustix::process::waitpid(Some(relay), rustix::process::WaitOptions::empty());
    assert!(lab.status().expect("status").hosts[0].relay_died);
    set(lab, "h1", delay(5));
    assert!(!lab.status().expect("status").hosts[0].relay_died);
    assert!(echo.goes(ARRIVES));
}

#[test]
fn what_the_outside_client_sends_to_guests_reaches_every_host() {
    let scoped = Scoped::network(spec(2));
    let lab = &scoped.0;
    let hosts: Vec<UdpSocket> = ["h1", "h2"]
        .iter()
        .map(|host| {
            let bind = || UdpSocket::bind(("0.0.0.0", layout::VXLAN_PORT)).expect("bound");
            in_namespace(&lab.namespace(host).expect("a host"), bind).expect("entered")
        })
        .collect();
    let ask = || {
        let socket = UdpSocket::bind((layout::OUTSIDE_GUEST_ADDRESS, 0)).expect("bound");
        socket.send_to(b"hello", "10.99.0.10:7").expect("sent")
    };
    in_namespace(&lab.outside_namespace(), ask).expect("entered");
    for host in &hosts {
        host.set_read_timeout(Some(ARRIVES)).expect("set");
        let mut frame = [0; 2000];
        let (length, from) = host.recv_from(&mut frame).expect("the question who has 10.99.0.10");
        assert_eq!(from.ip(), layout::OUTSIDE_ADDRESS);
        // VXLAN header: flags, then the network's id; inside, an ARP frame to everybody.
        assert_eq!(frame[4..7], [0, 0, 1], "of {length} bytes");
        assert_eq!(frame[8..14], [0xff; 6]);
    }
}
