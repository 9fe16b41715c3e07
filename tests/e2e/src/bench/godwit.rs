//! Godwit as a user has it: controller, agents and VMs on lab hosts.

use std::net::Ipv4Addr;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use godwit_api::v1::{Task, TaskState, TeamSet};
use godwit_lab::Lab;
use godwit_model::{DiskFormat, DiskSpec, MigrationPolicy, Name, TaskId};

use super::journey::{BOOTING, Ended, HOSTS, LIMIT, Mover, set_links};
use super::scenario::{Link, Scenario};
use crate::artefacts::{CloudImage, cloud_image};
use crate::command::{run, text};
use crate::{Cluster, ClusterSpec, GuestSpec, Outside};

/// A VM of the same image that was on the other host before.
const BEFORE: &str = "earlier";
/// How long a move may take to be taken back.
const CANCEL: Duration = Duration::from_secs(60);
const ASK: Duration = Duration::from_millis(20);

/// A cluster with the guests of one row.
pub(super) struct Godwit {
    cluster: Cluster,
    names: Vec<String>,
    addresses: Vec<Ipv4Addr>,
    policy: MigrationPolicy,
}

impl Godwit {
    /// Builds the cluster, and boots the guests on the first host.
    pub(super) fn up(scenario: Scenario, link: Link, qemu: &Path) -> Result<Self> {
        let spec = HOSTS.into_iter().fold(ClusterSpec::new(2)?, |spec, host| spec.qemu(host, qemu));
        let mut cluster = spec.up()?;
        if scenario.shares_memory() {
            let team = "default".parse()?;
            cluster.ask(cluster.client().set_team(&team, &TeamSet { share_memory: true })).context("share memory")?;
        }
        let image = match scenario.debian() {
            Some(_) => Some(import_debian(&mut cluster)?),
            None => None,
        };
        let disk_of = |name: &str| -> Result<Option<DiskSpec>> {
            let Some(image) = image.clone() else { return Ok(None) };
            Ok(Some(DiskSpec { image: Some(image), ..DiskSpec::new(format!("shared/{name}").parse()?, DiskFormat::Qcow2) }))
        };
        let names: Vec<String> = (1..=scenario.guests()).map(|number| format!("wanderer{number}")).collect();
        let [home, away] = HOSTS;
        let guest = |name: &str| -> Result<GuestSpec> {
            Ok(GuestSpec {
                name: name.to_owned(),
                memory: scenario.memory(),
                vcpus: 1,
                disks: disk_of(name)?.into_iter().collect(),
                shapes: Vec::new(),
                words: scenario.words(),
                knobs: scenario.knobs(),
                cloud_init: None,
                addressed: false,
            })
        };
        if image.is_some() {
            cluster.visit(&guest(BEFORE)?, away)?;
        }
        let guests = names.iter().map(|name| Ok((guest(name)?, home))).collect::<Result<Vec<_>>>()?;
        guests.chunks(BOOTING).try_for_each(|guests| cluster.boot_all(guests))?;
        let addresses = names.iter().map(|name| Ok(cluster.guest(name)?.address)).collect::<Result<_>>()?;
        set_links(cluster.lab(), link)?;
        Ok(Self { cluster, names, addresses, policy: scenario.policy() })
    }

    /// Takes everything down.
    pub(super) fn down(self) -> Result<()> {
        self.cluster.take_down()
    }

    /// How the move ends, which was asked for at `began`.
    fn follow(&self, task: TaskId, began: Instant) -> Result<Ended> {
        let Some(ended) = self.ended(task, began + LIMIT)? else {
            let seconds = began.elapsed().as_secs_f64();
            let progress = self.cluster.task(task)?.progress;
            // A move may come to its end at this moment.
            let _ = self.cluster.ask(self.cluster.client().cancel_task(task));
            self.cluster.ended(task, CANCEL)?;
            let pass = progress.map_or(0, |progress| progress.rounds);
            return Ok(Ended { seconds, note: format!("cut off in pass {pass}"), ..Ended::default() });
        };
        let seconds = began.elapsed().as_secs_f64();
        match (ended.state, ended.figures) {
            (TaskState::Done, Some(figures)) => Ok(Ended {
                seconds,
                blackout: Some(Duration::from_millis(figures.blackout.get())),
                completed: true,
                note: format!("{} passes", figures.rounds),
            }),
            (state, _) => {
                let note = format!("{state:?}: {}", ended.error.map(|error| error.to_string()).unwrap_or_default());
                Ok(Ended { seconds, note, ..Ended::default() })
            }
        }
    }

    /// The task once it has ended by itself; nothing if that takes too long.
    fn ended(&self, task: TaskId, deadline: Instant) -> Result<Option<Task>> {
        loop {
            let now = self.cluster.task(task)?;
            if now.state.ended() {
                return Ok(Some(now));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            thread::sleep(ASK);
        }
    }
}

/// Imports our Debian as an image that is not compressed: those are indexed.
fn import_debian(cluster: &mut Cluster) -> Result<Name> {
    let CloudImage { disk, .. } = cloud_image()?;
    let dir = tempfile::tempdir()?;
    let plain = dir.path().join("plain.qcow2");
    run("qemu-img", &["convert", "-O", "qcow2", text(&disk)?, text(&plain)?])?;
    cluster.import_debian_from(&plain).map(|[_, _, image]| image)
}

impl Mover for Godwit {
    fn lab(&self) -> &Lab {
        self.cluster.lab()
    }

    fn outside(&self) -> &Outside {
        self.cluster.outside()
    }

    fn addresses(&self) -> &[Ipv4Addr] {
        &self.addresses
    }

    fn prepare(&mut self, _: &'static str) -> Result<()> {
        Ok(())
    }

    fn run(&mut self, to: &'static str) -> Result<Ended> {
        let began = Instant::now();
        let mut tasks = Vec::new();
        for name in &self.names {
            tasks.push(self.cluster.begin_move(name, to, self.policy).context("ask for the move")?);
        }
        // Whoever is waited for first, it is over with the last.
        let moves = tasks.iter().map(|task| self.follow(*task, began)).collect::<Result<Vec<_>>>()?;
        Ok(Ended::together(&moves))
    }
}
