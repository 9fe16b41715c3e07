//! What every agent is told of the others: members, networks, and where each VM's address is. Pushed when it changed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use godwit_link::v1::{self, controller_message::Body};
use godwit_model::{BytesPerSec, Name, VmRequest};

use crate::db::{Db, Fault};
use crate::hub::Hub;
use crate::networks::told;
use crate::rows::{HostRow, NetworkRow, Row, VmRow};

/// Keeps the fleet and tells it.
pub(crate) struct Fleet {
    db: Db,
    hub: Arc<Hub>,
    /// Held while it is sent, so that no agent gets an older one after a newer one.
    current: Mutex<Current>,
}

/// What is told, and how many generations had been issued then.
#[derive(Default, PartialEq)]
struct Current {
    fleet: v1::Fleet,
    issued: u64,
}

fn address_of(host: &HostRow, hub: &Hub) -> String {
    hub.presence(&host.name).map_or_else(|| host.address.clone(), |presence| presence.address)
}

impl Fleet {
    /// Empty until it is first computed.
    pub(crate) fn new(db: Db, hub: Arc<Hub>) -> Self {
        Self { db, hub, current: Mutex::default() }
    }

    async fn compute(&self) -> Result<Current, Fault> {
        let rows = self.db.all::<HostRow>().await?;
        let hosts: HashMap<Name, String> =
            rows.iter().map(|host| (host.row.name.clone(), address_of(&host.row, &self.hub))).collect();
        let mut members: Vec<_> = rows
            .iter()
            .map(|host| v1::Member {
                host: host.row.name.to_string(),
                address: address_of(&host.row, &self.hub),
                keys: host.row.keys.clone(),
                migration_bandwidth: host.row.migration_bandwidth.map_or(0, BytesPerSec::get),
            })
            .collect();
        members.sort_by(|a, b| a.host.cmp(&b.host));
        let networks = self.db.all::<NetworkRow>().await?;
        let id_of = |vm: &VmRow, network: &Name| {
            let same = |row: &NetworkRow| row.team == vm.team && row.name == *network;
            networks.iter().find(|network| same(&network.row)).map(|network| network.row.id.to_string())
        };
        let mut locations = Vec::new();
        let mut issued = 0_u64;
        for vm in self.db.all::<VmRow>().await? {
            issued = issued.wrapping_add(vm.row.issued.0);
            let begins = |request| matches!(request, VmRequest::Start | VmRequest::Rollback);
            let starting = vm.row.activity.is_some_and(|activity| begins(activity.request));
            let address = vm.row.host.as_ref().and_then(|host| hosts.get(host));
            let (Some(address), true) = (address, starting || vm.row.has_process()) else { continue };
            for nic in &vm.row.spec.nics {
                let Some(network) = id_of(&vm.row, &nic.network) else { continue };
                locations.push(v1::Location {
                    mac: nic.mac.map(|mac| mac.to_string()).unwrap_or_default(),
                    network,
                    address: address.clone(),
                    vm: vm.row.id.to_string(),
                    generation: vm.row.generation.0,
                });
            }
        }
        locations.sort_by(|a, b| a.mac.cmp(&b.mac));
        let networks = networks.iter().map(|network| told(&network.row)).collect();
        Ok(Current { fleet: v1::Fleet { members, networks, locations, mark: 0 }, issued })
    }

    /// Tells one host that has just connected.
    pub(crate) fn tell(&self, host: &Name) {
        let current = self.current.lock().expect("no holder panics");
        self.hub.send(host, Body::Fleet(v1::Fleet { mark: self.db.mark(), ..current.fleet.clone() }));
    }

    /// Computes it anew and tells everybody if it changed; a grant counts as a change, whether or not the VM can be reached.
    pub(crate) async fn refresh(&self) -> Result<(), Fault> {
        let fresh = self.compute().await?;
        let mut current = self.current.lock().expect("no holder panics");
        if *current != fresh {
            *current = fresh;
            for (host, _) in self.hub.present() {
                self.hub.send(&host, Body::Fleet(v1::Fleet { mark: self.db.mark(), ..current.fleet.clone() }));
            }
        }
        Ok(())
    }

    /// Follows the store, for ever.
    pub(crate) async fn follow(&self) {
        let mut watch = self.db.watch();
        let mut seen = 0;
        loop {
            let newest = *watch.borrow_and_update();
            // Without the log (it was compacted) everything may have changed.
            let relevant = match self.db.changes(seen, 1_000).await {
                Ok(changes) => {
                    seen = changes.last().map_or(newest, |change| change.revision);
                    let told = [HostRow::PREFIX, VmRow::PREFIX, NetworkRow::PREFIX];
                    changes.iter().any(|change| told.iter().any(|prefix| change.key.starts_with(prefix)))
                }
                Err(_) => {
                    seen = newest;
                    true
                }
            };
            if relevant && let Err(fault) = self.refresh().await {
                tracing::error!(error = &fault as &dyn std::error::Error, "the fleet cannot be read");
            }
            if seen >= newest && watch.changed().await.is_err() {
                return;
            }
        }
    }
}
