//! What stays here of a VM's memory when the VM has left, and what of it is lent to the carry that brings the VM home.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use godwit_carrier::pages::{GuestMemory, PAGE_SIZE};
use godwit_model::{Generation, VmId};
use godwit_qemu::PassedFds;
use godwit_vault::{Block, Draft, Identity, Shelf, StayKey};

use tokio::sync::oneshot;

use super::actor::Actor;
use super::placement::{self, Access};
use crate::background;
use crate::carry::{KeptMemory, PlacedBlock, ProcessMemory};

/// The process of a VM that has left is not kept for longer than this for its memory's sake.
const LIMIT: Duration = Duration::from_secs(60);

/// The key that the controller sent; none if it was of another length.
pub(crate) fn key(bytes: &[u8]) -> Option<StayKey> {
    bytes.try_into().ok().map(StayKey::new)
}

impl Actor {
    /// Keeps the memory of the VM, which has left and whose process is still here. What is in the way of that is not in the way of anything else.
    pub(super) async fn keep_memory(&self, key: StayKey, blocks: Vec<PlacedBlock>, generation: Generation) {
        let (Some(shelf), Some(process)) = (self.host.stays.clone(), &self.process) else { return };
        let began = Instant::now();
        let memory = placement::open(process.identity(), Access::Read)
            .map(|(memory, map)| ProcessMemory::new(memory.into(), map.into(), blocks));
        let vm = self.vm;
        let over = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&over);
        let (done, kept) = oneshot::channel();
        let work = move || drop(done.send(memory.and_then(|memory| keep(&shelf, vm, generation, &key, memory, &ends))));
        if let Err(error) = background::spawn("keep", work) {
            tracing::info!(%error, "memory is not kept for the way home");
            return;
        }
        let kept = tokio::time::timeout(LIMIT, kept).await;
        // Who still writes is not waited for: its memory is about to go.
        over.store(true, Ordering::Release);
        match kept {
            Ok(Ok(Ok(pages))) => tracing::info!(pages, took = ?began.elapsed(), "memory is kept for the way home"),
            Ok(Ok(Err(error))) => tracing::info!(%error, "memory is not kept for the way home"),
            Ok(Err(_)) | Err(_) => tracing::info!("memory is not kept for the way home: it took too long"),
        }
    }

    /// What is here of the VM's memory, for the carry that waits for the VM.
    pub(super) fn lend_memory(&self, key: &StayKey, fds: &mut PassedFds) -> Option<KeptMemory> {
        let file = self
            .host
            .stays
            .as_ref()?
            .find(self.vm)
            .inspect_err(|error| tracing::info!(error = error as &dyn std::error::Error, "no memory is kept here"))
            .ok()??;
        Some(KeptMemory { file_fd: fds.pass(OwnedFd::from(file)), key: *key.expose() })
    }
}

/// Writes a stay; how many pages it has.
fn keep(
    shelf: &Shelf,
    vm: VmId,
    generation: Generation,
    key: &StayKey,
    mut memory: ProcessMemory,
    over: &AtomicBool,
) -> io::Result<u64> {
    let draft = shelf.begin(vm).map_err(io::Error::other)?;
    let blocks = memory.blocks().iter().map(|block| Block { id: block.id.clone(), pages: block.pages }).collect();
    let pages = write(&draft, key, &Identity { vm, generation, blocks }, &mut memory, over)?;
    draft.commit().map_err(io::Error::other)?;
    Ok(pages)
}

fn write(draft: &Draft, key: &StayKey, identity: &Identity, memory: &mut ProcessMemory, over: &AtomicBool) -> io::Result<u64> {
    let mut writer = draft.writer(key, identity)?;
    let mut count = 0;
    let mut content = [0; PAGE_SIZE];
    for (block, pages) in (0..).zip(identity.blocks.iter().map(|block| block.pages)) {
        let mut next = 0;
        while next < pages {
            let (touched, then) = memory.touched(block, next)?;
            next = then;
            for page in touched {
                memory.read(block, page, &mut content)?;
                writer.page(block, page, &content)?;
                count += 1;
            }
            if over.load(Ordering::Acquire) {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }
    let _: File = writer.finish()?;
    Ok(count)
}
