//! Plain QEMUs on two lab hosts that migrate by themselves, over the same kind of link and with the same kind of network for their guests.

use std::fmt::Write as _;
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_lab::layout::STATE_ROOT;
use godwit_lab::{Lab, LabSpec, in_namespace};
use serde_json::{Value, json};

use super::ground::{self, Ground};
use super::journey::{BOOTING, Ended, HOSTS, LIMIT, Mover, set_links};
use super::qmp::Qmp;
use super::scenario::{Link, Scenario};
use super::system::System;
use super::tls;
use crate::labs::{self, OwnedNetwork};
use crate::{Outside, godwit_binary};

/// Of the first guest; the others have those behind it.
const PORT: u16 = 4444;
const BOOT: Duration = Duration::from_secs(90);
const START: Duration = Duration::from_secs(20);
const RESUME: Duration = Duration::from_secs(20);
const ASK: Duration = Duration::from_millis(20);
/// Post-copy begins when the first pass is over, as those do who run it in production.
const FIRST_PASS: u64 = 2;

/// Two hosts and guests on one of them.
pub(super) struct Peer {
    system: System,
    scenario: Scenario,
    program: PathBuf,
    ground: Ground,
    outside: Outside,
    addresses: Vec<Ipv4Addr>,
    /// By guest.
    sources: Vec<Qemu>,
    /// By guest; none before the first move is made ready.
    destinations: Vec<Qemu>,
    started: usize,
    network: OwnedNetwork,
}

struct Qemu {
    child: Child,
    qmp: Qmp,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Peer {
    /// Builds the hosts, and boots the guests on the first.
    pub(super) fn up(system: System, scenario: Scenario, link: Link, program: &Path) -> Result<Self> {
        let network = OwnedNetwork::up(LabSpec { hosts: 2, ..LabSpec::new(labs::free_name(), godwit_binary()?) })?;
        for host in HOSTS {
            ground::connect_guests(network.lab(), host, scenario.guests())?;
        }
        let outside = Outside::new(network.lab().outside_namespace());
        let mut peer = Self {
            system,
            scenario,
            program: program.to_owned(),
            ground: Ground::make(scenario, &home(network.lab()))?,
            outside,
            addresses: (0..scenario.guests()).map(ground::address).collect(),
            sources: Vec::new(),
            destinations: Vec::new(),
            started: 0,
            network,
        };
        if system.has_tls() {
            tls::make(&peer.certificates())?;
        }
        let [host, _] = HOSTS;
        let guests: Vec<u8> = (0..scenario.guests()).collect();
        for guests in guests.chunks(BOOTING) {
            for guest in guests {
                let qemu = peer.start(host, *guest, false)?;
                peer.sources.push(qemu);
            }
            for guest in guests {
                peer.outside.status(ground::address(*guest), BOOT).context("boot the guest")?;
            }
        }
        set_links(peer.lab(), link)?;
        Ok(peer)
    }

    /// Takes everything down.
    pub(super) fn down(self) -> Result<()> {
        let Self { sources, destinations, network, .. } = self;
        drop((sources, destinations));
        network.down()
    }

    fn start(&mut self, host: &str, guest: u8, incoming: bool) -> Result<Qemu> {
        let home = home(self.lab());
        self.started += 1;
        let (socket, log) = (home.join(format!("{}.qmp", self.started)), home.join(format!("{}.log", self.started)));
        let log = File::create(&log).with_context(|| log.display().to_string())?;
        let mut command = Command::new(&self.program);
        command
            .args(ground::arguments(self.system, self.scenario, &self.ground, guest, &socket)?)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        let child = in_namespace(&self.lab().namespace(host)?, || command.spawn())?.context("start QEMU")?;
        let qmp = Qmp::connect(&socket, START);
        let mut qemu = match qmp {
            Ok(qmp) => Qemu { child, qmp },
            Err(error) => {
                let mut child = child;
                let _ = child.kill();
                let _ = child.wait();
                return Err(error);
            }
        };
        let capabilities: Vec<Value> =
            self.system.capabilities().iter().map(|name| json!({ "capability": name, "state": true })).collect();
        qemu.qmp.run("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
        let parameters = self.system.parameters(self.scenario.working_set());
        qemu.qmp.run("migrate-set-parameters", Value::Object(parameters))?;
        if self.system.has_tls() {
            tls::give(&mut qemu.qmp, &self.certificates())?;
        }
        Ok(qemu)
    }

    fn certificates(&self) -> PathBuf {
        home(self.lab()).join("tls")
    }

    fn uri(&self, to: &str, guest: u8) -> Result<String> {
        Ok(format!("tcp:{}:{}", self.lab().address(to)?, PORT + u16::from(guest)))
    }
}

/// Where the files of a lab are; it goes with the lab.
fn home(lab: &Lab) -> PathBuf {
    Path::new(STATE_ROOT).join(lab.name())
}

impl Mover for Peer {
    fn lab(&self) -> &Lab {
        self.network.lab()
    }

    fn outside(&self) -> &Outside {
        &self.outside
    }

    fn addresses(&self) -> &[Ipv4Addr] {
        &self.addresses
    }

    fn prepare(&mut self, to: &'static str) -> Result<()> {
        if !self.destinations.is_empty() {
            // What has moved away is of no more use.
            self.sources = std::mem::take(&mut self.destinations);
        }
        for guest in 0..self.scenario.guests() {
            let mut destination = self.start(to, guest, true)?;
            if self.system.has_tls() {
                tls::choose(&mut destination.qmp, tls::SERVER)?;
            }
            destination.qmp.run("migrate-incoming", json!({ "uri": self.uri(to, guest)? }))?;
            self.destinations.push(destination);
        }
        Ok(())
    }

    fn run(&mut self, to: &'static str) -> Result<Ended> {
        let (system, guests) = (self.system, 0..self.scenario.guests());
        let uris = guests.map(|guest| self.uri(to, guest)).collect::<Result<Vec<_>>>()?;
        for source in self.sources.iter_mut().filter(|_| system.has_tls()) {
            tls::choose(&mut source.qmp, tls::CLIENT)?;
        }
        let began = Instant::now();
        for (source, uri) in self.sources.iter_mut().zip(uris) {
            source.qmp.run("migrate", json!({ "uri": uri }))?;
        }
        let both = self.sources.iter_mut().zip(&mut self.destinations);
        let moves = thread::scope(|scope| {
            let threads: Vec<_> = both
                .map(|(source, destination)| scope.spawn(move || follow(system, &mut source.qmp, &mut destination.qmp, began)))
                .collect();
            threads.into_iter().map(|thread| thread.join().ok().context("the thread of a move")?).collect::<Result<Vec<_>>>()
        })?;
        Ok(Ended::together(&moves))
    }
}

/// How the move ends, which was begun at `began`.
fn follow(system: System, source: &mut Qmp, destination: &mut Qmp, began: Instant) -> Result<Ended> {
    let (mut switched, mut note) = (false, String::new());
    loop {
        let now = source.run("query-migrate", json!({}))?;
        let pass = now["ram"]["dirty-sync-count"].as_u64().unwrap_or_default();
        match now["status"].as_str().unwrap_or_default() {
            "completed" => {
                // Writing to a string cannot fail.
                let _ = write!(note, "{pass} passes");
                if let Some(throttle) = now["cpu-throttle-percentage"].as_u64() {
                    let _ = write!(note, ", throttled by {throttle}%");
                }
                break;
            }
            status @ ("failed" | "cancelled" | "postcopy-paused") => {
                let why = now["error-desc"].as_str().unwrap_or_default();
                let seconds = began.elapsed().as_secs_f64();
                return Ok(Ended { seconds, note: format!("{status}: {why}"), ..Ended::default() });
            }
            "active" if system == System::Postcopy && !switched && pass >= FIRST_PASS => {
                source.run("migrate-start-postcopy", json!({}))?;
                switched = true;
            }
            _ => {}
        }
        if began.elapsed() >= LIMIT {
            let seconds = began.elapsed().as_secs_f64();
            // Refused once post-copy has begun: the guest is then lost with its destination.
            let _ = source.run("migrate_cancel", json!({}));
            return Ok(Ended { seconds, note: format!("cut off in pass {pass}"), ..Ended::default() });
        }
        thread::sleep(ASK);
    }
    let seconds = began.elapsed().as_secs_f64();
    let resumed = destination.wait("RESUME", RESUME)?;
    let stopped = source.last("STOP").context("the source did not stop")?;
    ensure!(resumed >= stopped, "the destination ran before the source stopped");
    Ok(Ended { seconds, blackout: Some(resumed.saturating_sub(stopped)), completed: true, note })
}
