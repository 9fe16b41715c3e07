//! What a move of a VM is expected to cost: what only its host can measure, and `godwit_migration::forecast`.

use std::sync::Arc;
use std::time::Duration;

use godwit_migration::{Outlook, forecast};
use godwit_model::{
    Bytes, BytesPerSec, ErrorCode, ForecastRequest, Generation, MigrationForecast, MigrationPolicy, PastMoves, Refusal, Retry,
};
use godwit_qemu::qmp::Qmp;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::actor::{Actor, Answer, qemu_failed};
use super::placement::{self, Access};
use crate::carry::{PlacedBlock, ProcessMemory};
use crate::host::SharedHost;

/// A sample takes a second; on a host without a free core, some.
pub(super) const SAMPLE_LIMIT: Duration = Duration::from_secs(10);

impl Actor {
    /// Answers when the VM's writes have been measured, and holds up nothing meanwhile.
    pub(super) async fn on_forecast(
        &mut self,
        generation: Generation,
        request: ForecastRequest,
        reply: oneshot::Sender<Result<Answer, Refusal>>,
    ) {
        let host = Arc::clone(&self.host);
        // That disks cannot be measured now is no reason to say nothing.
        let disks = self.allocated(&request.disks).await.unwrap_or_default();
        match self.look_ahead(generation).await {
            Ok((qmp, memory)) => drop(tokio::spawn(async move {
                let told = forecast_with(&qmp, memory, disks, &host, &request).await;
                let _ = reply.send(told.map(|told| Answer { result: godwit_link::encode(&told), ..Answer::default() }));
            })),
            Err(refusal) => drop(reply.send(Err(refusal))),
        }
    }

    async fn look_ahead(&mut self, generation: Generation) -> Result<(Qmp, JoinHandle<Option<Bytes>>), Refusal> {
        self.owned(generation)?;
        self.runs_here()?;
        let qmp = self.monitor()?.clone();
        let blocks = self.memory_blocks(&qmp).await;
        Ok((qmp, self.count_touched(blocks)))
    }

    /// Counts the memory that the guest has ever touched, beside everything else.
    pub(super) fn count_touched(&self, blocks: Option<Vec<PlacedBlock>>) -> JoinHandle<Option<Bytes>> {
        let opened = self.process.as_ref().and_then(|process| placement::open(process.identity(), Access::Read).ok());
        tokio::task::spawn_blocking(move || {
            let (memory, map) = opened?;
            touched(&ProcessMemory::new(memory.into(), map.into(), blocks?)).ok()
        })
    }
}

fn touched(memory: &ProcessMemory) -> std::io::Result<Bytes> {
    let mut pages = 0;
    for (block, length) in (0..).zip(memory.blocks().iter().map(|block| block.pages)) {
        let mut next = 0;
        while next < length {
            let (touched, then) = memory.touched(block, next)?;
            pages += touched.len() as u64;
            next = then;
        }
    }
    Ok(Bytes(pages * 4096))
}

async fn forecast_with(
    qmp: &Qmp,
    memory: JoinHandle<Option<Bytes>>,
    disks: Bytes,
    host: &SharedHost,
    request: &ForecastRequest,
) -> Result<MigrationForecast, Refusal> {
    qmp.begin_dirty_rate(1).await.map_err(qemu_failed)?;
    let measured = qmp.wait_for_dirty_rate(SAMPLE_LIMIT).await.map_err(qemu_failed)?;
    let memory = memory.await.ok().flatten();
    let (Some(mib), Some(memory)) = (measured, memory) else {
        return Err(Refusal::new(ErrorCode::QemuFailed, "what the VM has, or writes, could not be measured").retry(Retry::Safe));
    };
    Ok(of_measured(host, (memory, disks), rate_of(mib), &request.policy, &request.past))
}

/// QEMU counts in whole MiB per second: the fraction is taken for one more.
pub(super) fn rate_of(mib: i64) -> BytesPerSec {
    BytesPerSec(u64::try_from(mib).unwrap_or(0).saturating_add(1) << 20)
}

pub(super) fn of_measured(
    host: &SharedHost,
    (memory, disks): (Bytes, Bytes),
    dirty_rate: BytesPerSec,
    policy: &MigrationPolicy,
    past: &PastMoves,
) -> MigrationForecast {
    // What the host may send counts as the move's own limit.
    let bandwidth = [policy.bandwidth, host.budget.limit()].into_iter().flatten().min();
    forecast(&Outlook { memory, disks, dirty_rate, policy: &MigrationPolicy { bandwidth, ..*policy }, past })
}
