//! The commands that we use, typed. Each is one line of QMP; the arguments are ours, never a user's text.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_model::{Bytes, BytesPerSec, Millis};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::views::{BlockDevice, CpuDefinition, DirtyRate, Machine, Migration, MigrationCapability, RunStatus, Status};
use super::{Qmp, QmpError};

/// What `migrate-set-parameters` sets; `None` leaves as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MigrationParameters {
    /// How fast QEMU may write to the migration socket.
    pub max_bandwidth: Option<BytesPerSec>,
    /// Blackout under which QEMU itself switches over.
    pub downtime_limit: Option<Millis>,
    /// Rate that QEMU should assume for its own decision (8.2 and later).
    pub avail_switchover_bandwidth: Option<BytesPerSec>,
    /// How auto-converge slows the guest down.
    pub cpu_throttle: Option<CpuThrottle>,
}

/// In percent of the time of its vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuThrottle {
    /// At first.
    pub initial: u8,
    /// More, each time that this does not suffice.
    pub increment: u8,
    /// At most.
    pub most: u8,
}

/// Who stopped the vCPUs of a migrating source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoppedBy {
    /// Our `stop`, for certain: QEMU will not start them again by itself, whatever becomes of the migration.
    Us,
    /// It is not certain: QEMU's own switch-over may have been first, and then it resumes by itself when the migration fails.
    Unproven(RunStatus),
}

/// How often the guest's new place is announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnnounceSchedule {
    /// Time before the second.
    pub initial: Millis,
    /// Most time between two.
    pub max: Millis,
    /// How many, at most 100.
    pub rounds: u32,
    /// How much longer each wait is.
    pub step: Millis,
}

impl Default for AnnounceSchedule {
    fn default() -> Self {
        Self { initial: Millis(50), max: Millis(550), rounds: 5, step: Millis(100) }
    }
}

fn read<T: DeserializeOwned>(command: &str, value: Value) -> Result<T, QmpError> {
    serde_json::from_value(value).map_err(|source| QmpError::Answer { command: command.to_owned(), source: Arc::new(source) })
}

impl Qmp {
    async fn ask<T: DeserializeOwned>(&self, command: &str) -> Result<T, QmpError> {
        read(command, self.execute(command, Value::Null).await?)
    }

    async fn tell(&self, command: &str, arguments: Value) -> Result<(), QmpError> {
        self.execute(command, arguments).await.map(drop)
    }

    /// `query-status`.
    ///
    /// # Errors
    /// See [`QmpError`]; so for all of these.
    pub async fn query_status(&self) -> Result<Status, QmpError> {
        self.ask("query-status").await
    }

    /// `query-migrate`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn query_migrate(&self) -> Result<Migration, QmpError> {
        self.ask("query-migrate").await
    }

    /// `query-migrate-capabilities`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn query_migrate_capabilities(&self) -> Result<Vec<MigrationCapability>, QmpError> {
        self.ask("query-migrate-capabilities").await
    }

    /// `query-migrate-parameters`, untyped: it differs most between versions.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn query_migrate_parameters(&self) -> Result<Value, QmpError> {
        self.ask("query-migrate-parameters").await
    }

    /// `query-machines`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn query_machines(&self) -> Result<Vec<Machine>, QmpError> {
        self.ask("query-machines").await
    }

    /// `query-cpu-definitions`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn query_cpu_definitions(&self) -> Result<Vec<CpuDefinition>, QmpError> {
        self.ask("query-cpu-definitions").await
    }

    /// Every property of a CPU model and its value, as it would be on this host; from `query-cpu-model-expansion`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn query_cpu_properties(&self, model: &str) -> Result<Map<String, Value>, QmpError> {
        let answer = self.execute("query-cpu-model-expansion", json!({ "type": "full", "model": { "name": model } })).await?;
        let properties = answer.pointer("/model/props").and_then(Value::as_object).cloned();
        Ok(properties.unwrap_or_default())
    }

    /// `query-block`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn query_block(&self) -> Result<Vec<BlockDevice>, QmpError> {
        self.ask("query-block").await
    }

    /// Whether the guest has opened its side of the channel `label`, from `query-chardev`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn query_channel_open(&self, label: &str) -> Result<bool, QmpError> {
        let channels: Vec<Value> = self.ask("query-chardev").await?;
        let is_it = |channel: &&Value| channel.get("label").and_then(Value::as_str) == Some(label);
        Ok(channels.iter().find(is_it).and_then(|channel| channel.get("frontend-open")).and_then(Value::as_bool).unwrap_or(false))
    }

    /// Names of the commands that `query-qmp-schema` lists.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn query_command_names(&self) -> Result<Vec<String>, QmpError> {
        let schema: Vec<Value> = self.ask("query-qmp-schema").await?;
        let is_command = |entry: &&Value| entry.get("meta-type").and_then(Value::as_str) == Some("command");
        let name = |entry: &Value| entry.get("name").and_then(Value::as_str).map(str::to_owned);
        Ok(schema.iter().filter(is_command).filter_map(name).collect())
    }

    /// `stop`: vCPUs stand still. It drains and flushes, so it may take as long as the slowest disk: `limit` is the caller's.
    /// Whether it came before QEMU's own switch-over must be read from [`Qmp::query_status`] afterwards.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn stop(&self, limit: Duration) -> Result<(), QmpError> {
        self.execute_within("stop", Value::Null, limit).await.map(drop)
    }

    /// `stop` during warm-up, and whether it was first. `held`: `switchover-ack` is on at this source and at nobody else, which keeps QEMU
    /// (8.1 and later) from switching over while vCPUs run, so that a `stop` that found them running was first.
    ///
    /// Without it the proof is that QEMU says `paused` right after; it says `finish-migrate` when it was first, and also when it was quick
    /// after us.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn stop_first(&self, held: bool, limit: Duration) -> Result<StoppedBy, QmpError> {
        // Sent at once, so that QEMU has the least time between them.
        let (before, stopped, after) = tokio::join!(self.query_status(), self.stop(limit), async {
            let value = self.execute_within("query-status", Value::Null, limit).await?;
            read::<Status>("query-status", value)
        });
        stopped?;
        let (before, after) = (before?, after?);
        let first = after.status == RunStatus::Paused || (held && before.running && !after.running);
        Ok(if first { StoppedBy::Us } else { StoppedBy::Unproven(after.status) })
    }

    /// `cont`: vCPUs run. Only for who holds the grant.
    ///
    /// Refused for a QEMU that waits for or loads a migration: it would take it as leave to start by itself as soon as it is loaded,
    /// whatever the source does then. (It leaves that state only for `paused`, so looking first is no race.)
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn cont(&self) -> Result<(), QmpError> {
        if self.query_status().await?.status == RunStatus::InMigrate {
            return Err(QmpError::NotLoaded);
        }
        self.tell("cont", Value::Null).await
    }

    /// `quit`: QEMU ends at once, the guest is not asked.
    ///
    /// # Errors
    /// See [`QmpError`]; a session that ends instead of an answer is a success.
    pub async fn quit(&self) -> Result<(), QmpError> {
        match self.tell("quit", Value::Null).await {
            Err(QmpError::Ended { .. }) => Ok(()),
            other => other,
        }
    }

    /// `system_powerdown`: asks the guest to power off.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn system_powerdown(&self) -> Result<(), QmpError> {
        self.tell("system_powerdown", Value::Null).await
    }

    /// `announce-self`: the guest's interfaces announce their addresses.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn announce_self(&self, schedule: AnnounceSchedule) -> Result<(), QmpError> {
        let AnnounceSchedule { initial, max, rounds, step } = schedule;
        self.tell("announce-self", json!({"initial": initial.get(), "max": max.get(), "rounds": rounds, "step": step.get()})).await
    }

    /// `migrate-set-capabilities`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn set_migration_capabilities(&self, capabilities: &[(&str, bool)]) -> Result<(), QmpError> {
        let list: Vec<Value> = capabilities.iter().map(|(name, on)| json!({"capability": name, "state": on})).collect();
        self.tell("migrate-set-capabilities", json!({"capabilities": list})).await
    }

    /// `migrate-set-parameters`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn set_migration_parameters(&self, parameters: MigrationParameters) -> Result<(), QmpError> {
        let fields = [
            ("max-bandwidth", parameters.max_bandwidth.map(BytesPerSec::get)),
            ("downtime-limit", parameters.downtime_limit.map(Millis::get)),
            ("avail-switchover-bandwidth", parameters.avail_switchover_bandwidth.map(BytesPerSec::get)),
            ("cpu-throttle-initial", parameters.cpu_throttle.map(|throttle| throttle.initial.into())),
            ("cpu-throttle-increment", parameters.cpu_throttle.map(|throttle| throttle.increment.into())),
            ("max-cpu-throttle", parameters.cpu_throttle.map(|throttle| throttle.most.into())),
        ];
        let set = fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), json!(value?))));
        self.tell("migrate-set-parameters", Value::Object(set.collect::<Map<_, _>>())).await
    }

    /// `migrate` to a unix socket that listens at `path`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn migrate_unix(&self, path: &Path) -> Result<(), QmpError> {
        self.tell("migrate", json!({"uri": format!("unix:{}", path.display())})).await
    }

    /// `migrate` to a connected socket, passed before with [`Qmp::getfd`] under `name`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn migrate_fd(&self, name: &str) -> Result<(), QmpError> {
        self.tell("migrate", json!({"uri": format!("fd:{name}")})).await
    }

    /// `migrate-incoming` from a unix socket that QEMU makes at `path`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn migrate_incoming_unix(&self, path: &Path) -> Result<(), QmpError> {
        self.tell("migrate-incoming", json!({"uri": format!("unix:{}", path.display())})).await
    }

    /// `migrate-incoming` from a connected socket, passed before with [`Qmp::getfd`] under `name`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn migrate_incoming_fd(&self, name: &str) -> Result<(), QmpError> {
        self.tell("migrate-incoming", json!({"uri": format!("fd:{name}")})).await
    }

    /// `migrate-recover` on a connected socket, passed before with [`Qmp::getfd`] under `name`: of a post-copy that lost its connection. Out of band,
    /// since QEMU's main loop may be waiting for a page that only that connection can bring.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn migrate_recover_fd(&self, name: &str) -> Result<(), QmpError> {
        self.execute_out_of_band("migrate-recover", json!({"uri": format!("fd:{name}")})).await.map(drop)
    }

    /// `migrate_cancel`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn migrate_cancel(&self) -> Result<(), QmpError> {
        self.tell("migrate_cancel", Value::Null).await
    }

    /// `migrate-continue` from `pre-switchover`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn migrate_continue(&self) -> Result<(), QmpError> {
        self.tell("migrate-continue", json!({"state": "pre-switchover"})).await
    }

    /// `getfd`: passes a descriptor that QEMU keeps under `name`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn getfd(&self, name: &str, fd: OwnedFd) -> Result<(), QmpError> {
        self.execute_with_fd("getfd", json!({"fdname": name}), fd).await.map(drop)
    }

    /// `closefd`: QEMU closes the descriptor that it keeps under `name`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn closefd(&self, name: &str) -> Result<(), QmpError> {
        self.tell("closefd", json!({"fdname": name})).await
    }

    /// `add-fd`: passes a descriptor into `/dev/fdset/SET`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn add_fd(&self, set: u32, opaque: &str, fd: OwnedFd) -> Result<(), QmpError> {
        self.execute_with_fd("add-fd", json!({"fdset-id": set, "opaque": opaque}), fd).await.map(drop)
    }

    /// `calc-dirty-rate` over whole seconds; read the result with [`Qmp::query_dirty_rate`] or [`Qmp::wait_for_dirty_rate`].
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn calc_dirty_rate(&self, seconds: u32) -> Result<(), QmpError> {
        self.tell("calc-dirty-rate", json!({"calc-time": seconds})).await
    }

    /// As [`Qmp::calc_dirty_rate`]; one that is under way already is as good, which QEMU refuses to begin again.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn begin_dirty_rate(&self, seconds: u32) -> Result<(), QmpError> {
        let Err(refused) = self.calc_dirty_rate(seconds).await else { return Ok(()) };
        if self.query_dirty_rate().await?.status == "measuring" { Ok(()) } else { Err(refused) }
    }

    /// `query-dirty-rate`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn query_dirty_rate(&self) -> Result<DirtyRate, QmpError> {
        self.ask("query-dirty-rate").await
    }

    /// Waits until what [`Qmp::calc_dirty_rate`] began is measured, and answers its MiB per second; `None` if that takes longer than `limit`.
    ///
    /// A sample that was asked for is `unstarted` until QEMU's thread for it runs.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn wait_for_dirty_rate(&self, limit: Duration) -> Result<Option<i64>, QmpError> {
        let begun = Instant::now();
        loop {
            let rate = self.query_dirty_rate().await?;
            if rate.status == "measured" {
                return Ok(rate.mib_per_sec);
            }
            if begun.elapsed() >= limit {
                return Ok(None);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Where QEMU has the guest's memory at a guest address: the name of the block, and the address in QEMU's own address space; `None` if it
    /// does not say. There is no command of QMP's own for it: this is the monitor's `gpa2hva`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn host_address(&self, guest: u64) -> Result<Option<(String, u64)>, QmpError> {
        let line = format!("gpa2hva {guest:#x}");
        let said = self.execute("human-monitor-command", json!({"command-line": line})).await?;
        Ok(said.as_str().and_then(|said| host_address(guest, said)))
    }

    /// RAM of the VM, from `query-memory-size-summary`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn query_memory(&self) -> Result<Bytes, QmpError> {
        let summary: Value = self.ask("query-memory-size-summary").await?;
        Ok(Bytes(summary.get("base-memory").and_then(Value::as_u64).unwrap_or(0)))
    }
}

/// Reads `Host virtual address for 0x0 (pc.ram) is 0x7f0000000000`.
fn host_address(guest: u64, said: &str) -> Option<(String, u64)> {
    let rest = said.trim().strip_prefix(&format!("Host virtual address for {guest:#x} ("))?;
    let (name, address) = rest.rsplit_once(") is 0x")?;
    Some((name.to_owned(), u64::from_str_radix(address, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_memory_is_is_read_from_what_qemu_says_and_from_nothing_else() {
        let said = "Host virtual address for 0x0 (pc.ram) is 0x7f4dcbe00000\r\n";
        assert_eq!(host_address(0, said), Some(("pc.ram".into(), 0x7f4d_cbe0_0000)));
        let dimm = "Host virtual address for 0x180000000 (/objects/dimm0-memory) is 0x7f574be00000\r\n";
        assert_eq!(host_address(0x1_8000_0000, dimm), Some(("/objects/dimm0-memory".into(), 0x7f57_4be0_0000)));
        for other in ["", "No memory is mapped at address 0x0\r\n", "Memory at address 0x0 is not RAM\r\n", &said[..40], dimm] {
            assert_eq!(host_address(0, other), None, "{other}");
        }
    }
}
