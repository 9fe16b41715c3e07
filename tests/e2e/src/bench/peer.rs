//! Two plain QEMUs on lab hosts that migrate by themselves, over the same kind of link and with the same kind of network for their guest.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use godwit_lab::layout::STATE_ROOT;
use godwit_lab::{Lab, LabSpec, in_namespace};
use serde_json::{Value, json};

use super::ground::{self, ADDRESS, arguments};
use super::journey::{Ended, HOSTS, LIMIT, Mover, set_links};
use super::qmp::Qmp;
use super::scenario::{Link, Scenario};
use super::system::System;
use super::tls;
use crate::artefacts::{GuestImages, guest_images};
use crate::labs::{self, OwnedNetwork};
use crate::{Outside, godwit_binary};

const PORT: u16 = 4444;
const BOOT: Duration = Duration::from_secs(90);
const START: Duration = Duration::from_secs(20);
const RESUME: Duration = Duration::from_secs(20);
const ASK: Duration = Duration::from_millis(20);
/// Post-copy begins when the first pass is over, as those do who run it in production.
const FIRST_PASS: u64 = 2;

/// Two hosts and a guest on one of them.
pub(super) struct Peer {
    system: System,
    scenario: Scenario,
    program: PathBuf,
    images: GuestImages,
    outside: Outside,
    /// The source, and behind it the destination once there is one.
    qemus: VecDeque<Qemu>,
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
    /// Builds the hosts, and boots the guest on the first.
    pub(super) fn up(system: System, scenario: Scenario, link: Link, program: &Path) -> Result<Self> {
        let network = OwnedNetwork::up(LabSpec { hosts: 2, ..LabSpec::new(labs::free_name(), godwit_binary()?) })?;
        for host in HOSTS {
            ground::connect_guests(network.lab(), host)?;
        }
        let outside = Outside::new(network.lab().outside_namespace());
        let mut peer = Self {
            system,
            scenario,
            program: program.to_owned(),
            images: guest_images()?,
            outside,
            qemus: VecDeque::new(),
            started: 0,
            network,
        };
        if system.has_tls() {
            tls::make(&peer.certificates())?;
        }
        let [home, _] = HOSTS;
        let qemu = peer.start(home, false)?;
        peer.qemus.push_back(qemu);
        peer.outside.status(ADDRESS, BOOT).context("boot the guest")?;
        set_links(peer.lab(), link)?;
        Ok(peer)
    }

    /// Takes everything down.
    pub(super) fn down(self) -> Result<()> {
        let Self { qemus, network, .. } = self;
        drop(qemus);
        network.down()
    }

    fn start(&mut self, host: &str, incoming: bool) -> Result<Qemu> {
        let home = Path::new(STATE_ROOT).join(self.lab().name());
        self.started += 1;
        let (socket, log) = (home.join(format!("{}.qmp", self.started)), home.join(format!("{}.log", self.started)));
        let log = File::create(&log).with_context(|| log.display().to_string())?;
        let mut command = Command::new(&self.program);
        command
            .args(arguments(self.system, self.scenario, &self.images, &socket)?)
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
        Path::new(STATE_ROOT).join(self.lab().name()).join("tls")
    }

    fn uri(&self, to: &str) -> Result<String> {
        Ok(format!("tcp:{}:{PORT}", self.lab().address(to)?))
    }

    fn ends(&mut self) -> Result<[&mut Qmp; 2]> {
        match self.qemus.make_contiguous() {
            [source, destination] => Ok([&mut source.qmp, &mut destination.qmp]),
            other => bail!("{} QEMUs instead of two", other.len()),
        }
    }
}

impl Mover for Peer {
    fn lab(&self) -> &Lab {
        self.network.lab()
    }

    fn outside(&self) -> &Outside {
        &self.outside
    }

    fn address(&self) -> Ipv4Addr {
        ADDRESS
    }

    fn prepare(&mut self, to: &'static str) -> Result<()> {
        if self.qemus.len() > 1 {
            // What has moved away is of no more use.
            self.qemus.pop_front();
        }
        let mut destination = self.start(to, true)?;
        if self.system.has_tls() {
            tls::choose(&mut destination.qmp, tls::SERVER)?;
        }
        destination.qmp.run("migrate-incoming", json!({ "uri": self.uri(to)? }))?;
        self.qemus.push_back(destination);
        Ok(())
    }

    fn run(&mut self, to: &'static str) -> Result<Ended> {
        let uri = self.uri(to)?;
        let system = self.system;
        let [source, destination] = self.ends()?;
        if system.has_tls() {
            tls::choose(source, tls::CLIENT)?;
        }
        let began = Instant::now();
        source.run("migrate", json!({ "uri": uri }))?;
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
}
