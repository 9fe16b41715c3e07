//! What a move is expected to cost, asked of the VM's host before anything is recorded.

use std::time::Duration;

use godwit_link::v1::{self, command::Action};
use godwit_link::{decode, encode};
use godwit_model::{ErrorCode, ForecastRequest, Generation, MigrationForecast, Refusal, Retry};

use super::{Tasks, note};
use crate::db::Fault;
use crate::history;
use crate::rows::{TaskRow, Work};

/// What the VM writes is measured for a second; a host without a free core takes some.
const LIMIT: Duration = Duration::from_secs(15);

impl Tasks {
    /// Adds to a move that is only described what it would cost, or why that cannot be said.
    pub(super) async fn foresee(&self, task: &mut TaskRow, generation: Generation) -> Result<(), Fault> {
        let (Work::Migrate(work), Some(vm)) = (&task.work, task.vm) else { return Ok(()) };
        let past = history::past_moves(&self.db, vm, &work.source, &work.destination).await?;
        let request = encode(&ForecastRequest {
            policy: work.policy,
            past,
            disks: work.disks.iter().map(|disk| disk.volume.clone()).collect(),
        });
        let action = Action::Forecast(v1::ForecastMove { vm: vm.to_string(), generation: generation.0, request });
        let source = work.source.clone();
        let answer = self.one_command(task.id, &source, "forecast", action, LIMIT).await.unwrap_or_else(|| {
            Err(Refusal::new(ErrorCode::HostDown, format!("host {source} did not answer in time")).retry(Retry::Safe))
        });
        match answer.map(|answer| decode::<MigrationForecast>("forecast", &answer.result)) {
            Ok(Ok(forecast)) => task.forecast = Some(forecast),
            Ok(Err(malformed)) => note(task, format!("what it would cost is not known: {malformed}")),
            Err(refusal) => note(task, format!("what it would cost is not known: {}", refusal.message)),
        }
        if let Some(quiet) = self.hub.habits.quiet(vm) {
            note(task, format!("it writes least from {quiet}"));
        }
        Ok(())
    }
}
