//! What the controller tells Prometheus: counters of what has ended since it started, and gauges of how things are when it is asked.

use std::sync::atomic::AtomicU64;

use godwit_model::{Millis, Name};
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::db::{Db, Fault};
use crate::hub::Hub;
use crate::rows::{HostRow, TaskRow, VmRow, Work};

/// How [`Metrics::gather`] writes.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels<const N: usize> = Family<[(&'static str, String); N], Counter>;

/// What has ended since the controller started.
pub(crate) struct Metrics {
    registry: Registry,
    migrations: Labels<1>,
    wire: Counter,
    duration: Histogram,
    blackout: Histogram,
    excess: Histogram,
    error: Histogram,
    last: Family<[(&'static str, String); 3], Gauge<f64, AtomicU64>>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        // 10 ms to 10 s, and a second to an hour.
        let blackouts = || Histogram::new(exponential_buckets(0.01, 2.0, 11));
        let mut metrics = Self {
            registry: Registry::with_prefix("godwit"),
            migrations: Family::default(),
            wire: Counter::default(),
            duration: Histogram::new(exponential_buckets(1.0, 2.0, 13)),
            blackout: blackouts(),
            excess: blackouts(),
            // A hundredth to five times.
            error: Histogram::new(exponential_buckets(0.01, 2.0, 10)),
            last: Family::default(),
        };
        let registry = &mut metrics.registry;
        registry.register("migrations", "Migrations that have ended, by outcome", metrics.migrations.clone());
        registry.register_with_unit(
            "migration_wire",
            "On the wire for migrations that were done, TLS included",
            Unit::Bytes,
            metrics.wire.clone(),
        );
        registry.register_with_unit("migration_duration", "Of migrations that were done", Unit::Seconds, metrics.duration.clone());
        registry.register_with_unit("migration_blackout", "No vCPU ran anywhere", Unit::Seconds, metrics.blackout.clone());
        registry.register_with_unit(
            "migration_blackout_excess",
            "By how much the blackout exceeded what was predicted at the stop; 0 where it did not",
            Unit::Seconds,
            metrics.excess.clone(),
        );
        registry.register_with_unit(
            "migration_duration_error",
            "By which part of the time that a migration took its forecast was off, either way",
            Unit::Ratios,
            metrics.error.clone(),
        );
        registry.register_with_unit(
            "vm_last_blackout",
            "Of the last migration of each VM: as it was, and as predicted",
            Unit::Seconds,
            metrics.last.clone(),
        );
        metrics
    }

    /// A task has ended.
    pub(crate) fn on_ended(&self, task: &TaskRow) {
        if !matches!(task.work, Work::Migrate(_)) {
            return;
        }
        self.migrations.get_or_create(&[("outcome", word(&task.state))]).inc();
        if let Some(figures) = &task.figures {
            self.wire.inc_by(figures.wire_bytes.get());
            self.duration.observe(seconds(figures.total));
            self.blackout.observe(seconds(figures.blackout));
            self.last.get_or_create(&of_vm(&task.team, &task.subject, "actual")).set(seconds(figures.blackout));
            if let Some(forecast) = figures.forecast {
                let (took, expected) = (seconds(figures.total), seconds(forecast.total.expected));
                self.error.observe((expected - took).abs() / took.max(0.001));
            }
            if let Some(predicted) = figures.predicted_blackout {
                self.last.get_or_create(&of_vm(&task.team, &task.subject, "predicted")).set(seconds(predicted));
                self.excess.observe(seconds(Millis(figures.blackout.get().saturating_sub(predicted.get()))));
            }
        }
    }

    /// A VM was deleted.
    pub(crate) fn on_deleted(&self, team: &Name, vm: &Name) {
        for kind in ["actual", "predicted"] {
            self.last.remove(&of_vm(team, vm, kind));
        }
    }

    /// All of it, in the text format of OpenMetrics.
    pub(crate) async fn gather(&self, db: &Db, hub: &Hub) -> Result<String, Fault> {
        let mut now = Registry::with_prefix("godwit");
        let hosts: Family<[(&str, String); 1], Gauge> = Family::default();
        let (connected, known) = (hub.present().len(), db.all::<HostRow>().await?.len());
        for (state, count) in [("connected", connected), ("away", known.saturating_sub(connected))] {
            hosts.get_or_create(&[("state", state.to_owned())]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        now.register("hosts", "Hosts, by whether they are connected", hosts);

        let vms: Family<[(&str, String); 2], Gauge> = Family::default();
        for vm in db.all::<VmRow>().await? {
            let vm = vm.row;
            vms.get_or_create(&[("team", vm.team.to_string()), ("state", word(&vm.state))]).inc();
        }
        now.register("vms", "VMs, by team and state", vms);

        let mut text = String::new();
        let written = encode_registry(&mut text, &self.registry).and_then(|()| encode_registry(&mut text, &now));
        written.and_then(|()| encode_eof(&mut text)).expect("a string takes all that is written");
        Ok(text)
    }
}

fn of_vm(team: &Name, vm: &Name, kind: &str) -> [(&'static str, String); 3] {
    [("team", team.to_string()), ("vm", vm.to_string()), ("kind", kind.to_owned())]
}

/// The word that the API has for it.
fn word(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|word| word.as_str().map(str::to_owned)).unwrap_or_default()
}

fn seconds(time: Millis) -> f64 {
    time.get() as f64 / 1_000.0
}
