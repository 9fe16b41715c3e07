//! What a lab is like now, for people and programs.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::layout::{self, OUTSIDE};
use crate::network::SWITCH;
use crate::record::{CONTROLLER, Record};
use crate::{ApiAccess, LinkStatus, daemon, namespace};

/// A lab as it is now.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LabStatus {
    /// Its name.
    pub name: String,
    /// Whether it was built to the end; if not, take it down.
    pub complete: bool,
    /// Where the API is.
    pub api: ApiAccess,
    /// The controller.
    pub controller: DaemonStatus,
    /// The namespace of the switch and the controller.
    pub switch_namespace: String,
    /// The namespace of the outside client.
    pub outside_namespace: String,
    /// The link of the outside client.
    pub outside_link: Option<LinkStatus>,
    /// The hosts, in order.
    pub hosts: Vec<HostStatus>,
    /// Where state and logs are.
    pub dir: PathBuf,
    /// The directory of the pool that all hosts share.
    pub shared_pool: PathBuf,
}

/// A host of a lab as it is now.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostStatus {
    /// Its name.
    pub name: String,
    /// Its address in the underlay.
    pub address: std::net::Ipv4Addr,
    /// Its network namespace.
    pub namespace: String,
    /// Whether the namespace is there.
    pub namespace_exists: bool,
    /// Its link.
    pub link: Option<LinkStatus>,
    /// Whether delay and loss are wanted but nobody makes them: set the link again.
    pub relay_died: bool,
    /// Its agent.
    pub agent: DaemonStatus,
    /// The first of 1024 user ids for its virtual machines.
    pub uid_base: u32,
}

/// A daemon as it is now.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Its process, if it runs.
    pub pid: Option<u32>,
    /// Its log.
    pub log: PathBuf,
}

pub(crate) fn of(record: &Record) -> LabStatus {
    let lab = &record.spec.name;
    LabStatus {
        name: lab.clone(),
        complete: record.complete,
        api: api(record),
        controller: daemon_status(record, CONTROLLER),
        switch_namespace: layout::namespace(lab, SWITCH),
        outside_namespace: layout::namespace(lab, OUTSIDE),
        outside_link: record.links.get(OUTSIDE).map(|link| link.status),
        hosts: record.spec.host_names().map(|host| host_status(record, host)).collect(),
        dir: record.paths().data().to_path_buf(),
        shared_pool: daemon::pool(record),
    }
}

pub(crate) fn api(record: &Record) -> ApiAccess {
    let data = record.paths().controller_data();
    ApiAccess {
        url: format!("https://127.0.0.1:{}", record.api_port.unwrap_or_default()),
        token_file: data.join("admin.token"),
        ca_file: data.join("ca.pem"),
    }
}

fn host_status(record: &Record, name: String) -> HostStatus {
    let number = layout::host_number(&name).unwrap_or_default();
    let namespace = layout::namespace(&record.spec.name, &name);
    let link = record.links.get(&name);
    let relay = link.and_then(|link| link.relay);
    HostStatus {
        address: layout::host_address(number),
        namespace_exists: namespace::path(&namespace).exists(),
        namespace,
        link: link.map(|link| link.status),
        relay_died: relay.is_some_and(|relay| !(record.is_of_this_boot() && relay.process.is_running())),
        agent: daemon_status(record, &name),
        uid_base: layout::host_uid_base(record.uid_slot, number),
        name,
    }
}

fn daemon_status(record: &Record, role: &str) -> DaemonStatus {
    DaemonStatus { pid: record.running(role).map(|process| process.pid), log: daemon::log_of(record, role) }
}
