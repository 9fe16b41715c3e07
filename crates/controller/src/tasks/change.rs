//! A VM's spec is changed: what can change while it runs does so, one step after the other; the rest waits for its next start.

use std::collections::BTreeSet;

use godwit_link::encode;
use godwit_link::v1::{self, command::Action};
use godwit_model::{ErrorCode, ImageKind, ImageRef, Name, Refusal, TaskId, VmSpec, live_changes};

use super::admit::FoundImages;
use super::{Outcome, Tasks, note};
use crate::db::{Batch, Fault};
use crate::resolve::wanted_of;
use crate::rows::{VmRow, Work};
use crate::specs::{claims, complete_change, leaving, waiting};

/// The texts of a seed are never shown, so whoever sends back what was shown leaves them out: then they stay. An empty text takes one away, and
/// a spec without `cloud_init` the whole seed.
fn keep_seed(before: &VmSpec, wanted: &mut VmSpec) {
    if let (Some(before), Some(wanted)) = (&before.cloud_init, &mut wanted.cloud_init) {
        let keep = |text: &mut Option<String>, before: &Option<String>| match text.as_deref() {
            None => text.clone_from(before),
            Some("") => *text = None,
            Some(_) => {}
        };
        keep(&mut wanted.user_data, &before.user_data);
        keep(&mut wanted.network_config, &before.network_config);
        keep(&mut wanted.vendor_data, &before.vendor_data);
    }
}

/// A VM that begins from a snapshot begins with the disks of it, and one that has memory there as the machine which that knows.
fn can_change_before(vm: &VmRow, wanted: &VmSpec) -> Result<(), Refusal> {
    let Some(origin) = &vm.origin else { return Ok(()) };
    let disks = |spec: &VmSpec| spec.disks.iter().map(|disk| (disk.volume.clone(), disk.size, disk.slot)).collect::<Vec<_>>();
    if !origin.memory && disks(&vm.spec) == disks(wanted) {
        return Ok(());
    }
    let what = if origin.memory { "it cannot become another machine" } else { "its disks cannot change" };
    let message = format!("VM {} begins from snapshot {}, and {what} before that", vm.name, origin.snapshot);
    Err(Refusal::new(ErrorCode::InUse, message).hint(format!("start it first: `godwit vm start {}`", vm.name)))
}

impl Tasks {
    /// Makes `wanted` the VM's spec, in its row.
    pub(super) async fn admit_change(&self, vm: &mut VmRow, wanted: &VmSpec) -> Result<Work, Fault> {
        let mut wanted = wanted.clone();
        keep_seed(&vm.spec, &mut wanted);
        complete_change(&vm.spec, &mut wanted, vm.has_process())?;
        can_change_before(vm, &wanted)?;
        let mine = vm.claims();
        for key in claims(&wanted).difference(&mine) {
            if self.db.claimed(key).await?.is_some_and(|owner| owner != vm.id.to_string()) {
                return Err(in_use(key).into());
            }
        }
        vm.spec = wanted;
        vm.leaving =
            vm.resolved.as_ref().filter(|_| vm.has_process()).map(|running| leaving(running, &vm.spec)).unwrap_or_default();
        self.note_waiting(vm).await?;
        Ok(Work::Change)
    }

    /// Writes down what of the spec waits for the next start.
    pub(super) async fn note_waiting(&self, vm: &mut VmRow) -> Result<(), Fault> {
        let Some(running) = vm.resolved.as_ref().filter(|_| vm.has_process()) else {
            vm.waiting.clear();
            return Ok(());
        };
        let (images, networks) = (self.images_of(&vm.team).await?, self.networks_of(&vm.team).await?);
        vm.waiting = waiting(running, &wanted_of(&vm.spec, running, &|name| images.find(name), &networks)?);
        Ok(())
    }

    /// Whether anything is left to be done while the VM runs.
    pub(super) async fn changes_live(&self, vm: &VmRow) -> Result<bool, Fault> {
        let Some(running) = vm.resolved.as_ref().filter(|_| vm.has_process()) else { return Ok(false) };
        let (images, networks) = (self.images_of(&vm.team).await?, self.networks_of(&vm.team).await?);
        let wanted = wanted_of(&vm.spec, running, &|name| images.find(name), &networks)?;
        Ok(!live_changes(running, &wanted).is_empty())
    }

    pub(super) async fn run_change(&self, id: TaskId) -> Result<(), Fault> {
        loop {
            let (_, vm) = self.both(id).await?;
            let (Some(running), Some(host), true) = (&vm.row.resolved, vm.row.host.clone(), vm.row.has_process()) else {
                return self.finish(id, Outcome::Done, |_, vm| vm.waiting.clear()).await;
            };
            let images: FoundImages = self.images_of(&vm.row.team).await?;
            let networks = self.networks_of(&vm.row.team).await?;
            let find = |name: &Name| -> Option<(ImageRef, ImageKind)> { images.find(name) };
            let wanted = match wanted_of(&vm.row.spec, running, &find, &networks) {
                Ok(wanted) => wanted,
                Err(refusal) => return self.finish(id, Outcome::Failed(refusal), |_, _| {}).await,
            };
            let Some(change) = live_changes(running, &wanted).into_iter().next() else {
                return self.finish(id, Outcome::Done, |_, _| {}).await;
            };
            let mut next = running.clone();
            change.apply(&mut next);
            let step = change.describe();
            self.set_step(id, &step).await?;
            let (vm_id, generation) = (vm.row.id.to_string(), vm.row.generation);
            let action = Action::Change(v1::ChangeVm { vm: vm_id, generation: generation.0, spec: encode(&next) });
            match self.command(id, &host, &step, action).await? {
                Ok(_) => {
                    self.edit(id, |task, vm| {
                        if vm.generation == generation {
                            vm.resolved = Some(next.clone());
                            vm.leaving = leaving(&next, &vm.spec);
                            vm.waiting = waiting(&next, &wanted);
                        }
                        note(task, step.clone());
                    })
                    .await?;
                }
                // It ended meanwhile: everything takes effect at its next start.
                Err(refusal) if refusal.code == ErrorCode::VmNotRunning => {
                    return self
                        .finish(id, Outcome::Done, |task, vm| {
                            note(task, "the VM ended: the rest takes effect at its next start");
                            vm.waiting.clear();
                            vm.leaving.clear();
                        })
                        .await;
                }
                Err(refusal) => return self.finish(id, Outcome::Failed(refusal), |_, _| {}).await,
            }
        }
    }
}

/// Adds to `batch` what the VM claims now, and frees what it claims no more.
pub(super) fn reclaim(mut batch: Batch, before: &BTreeSet<String>, vm: &VmRow) -> Batch {
    let after = vm.claims();
    for key in after.difference(before) {
        batch = batch.claim(key.clone(), &vm.id);
    }
    for key in before.difference(&after) {
        batch = batch.free(key.clone());
    }
    batch
}

pub(super) fn in_use(key: &str) -> Refusal {
    let (what, name) = key.split_once('/').unwrap_or(("object", key));
    let what = if what == "mac" { "address" } else { what };
    Refusal::new(ErrorCode::InUse, format!("another VM has the {what} {name}")).hint("choose another one")
}
