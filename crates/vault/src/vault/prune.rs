//! What no snapshot needs any more: files to which none refers go, and packs of which much is not needed are written anew without it, under their own name.
//!
//! ```text
//! files that nobody refers to ──removed, directory synced──▶ for each pack: ID.pack.W.draft ──written, synced──▶ renamed to ID.pack, directory synced
//! ```
//! After a crash at any step the old pack is there or the new one, and each has all that the snapshots need. All of it is under the vault's lock, held alone.

mod needs;

use std::collections::{BTreeMap, BTreeSet};

use godwit_model::{Bytes, SnapshotId};
use rustix::fs::FlockOperation;

use super::{Name, Step, Vault, VaultError, damaged, draft_name, draw_writer, failed, pack_name, snapshot_name};
use crate::pack::{KeptPages, PackId, RewriteError};
use crate::{PackKey, SnapshotKey};
use needs::Needs;

/// A pack is written anew if of so many of its pages one is not needed: to have a byte back at most three others are written, and no more than a third as much as is needed lies unused.
const UNNEEDED: u32 = 4;
/// And if at least so many pages go, 1 MiB: of small packs there is little to be had, and each takes a few syncs.
const LEAST: u32 = 256;

/// What nobody refers to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrunePlan {
    /// Snapshots whose key nobody has any more, with their length.
    pub snapshots: Vec<(SnapshotId, Bytes)>,
    /// Packs, with their length.
    pub packs: Vec<(PackId, Bytes)>,
    /// Files of writers, and of snapshots, that are no more, with their length.
    pub drafts: Vec<(String, Bytes)>,
    /// Packs that are written anew with what is needed of them.
    pub rewrites: Vec<Rewrite>,
}

/// A pack that is written anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// Which pack.
    pub pack: PackId,
    /// How long it is now.
    pub bytes: Bytes,
    /// How many of its pages are kept.
    pub kept: u32,
    /// How many go.
    pub gone: u32,
}

impl Rewrite {
    /// What is free afterwards that is not now: an estimate, the pages' share of the file. How much each of them takes is not known before.
    #[must_use]
    pub fn freed(&self) -> Bytes {
        let (gone, all) = (u128::from(self.gone), u128::from(self.kept) + u128::from(self.gone));
        Bytes(u64::try_from(u128::from(self.bytes.0) * gone / all.max(1)).unwrap_or(self.bytes.0))
    }
}

impl PrunePlan {
    /// What is free afterwards that is not now. Of what is written anew it is an estimate: see [`Rewrite::freed`].
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        let snapshots = self.snapshots.iter().map(|(_, bytes)| bytes.0);
        let packs = self.packs.iter().map(|(_, bytes)| bytes.0);
        let drafts = self.drafts.iter().map(|(_, bytes)| bytes.0);
        let rewrites = self.rewrites.iter().map(|rewrite| rewrite.freed().0);
        Bytes(snapshots.chain(packs).chain(drafts).chain(rewrites).fold(0, u64::saturating_add))
    }
}

/// A plan, and what it takes to write packs anew: of each that is in it its key, and what it keeps.
struct Survey {
    plan: PrunePlan,
    keep: Vec<(PackId, PackKey, KeptPages)>,
}

impl Vault {
    /// Finds what nobody refers to, and packs of which at least a quarter, and 256 pages, are not needed: those that are neither in a leaf of a snapshot nor the base of one that is.
    /// All leaves are read; in memory is a bit for each page of the packs. The keys of all snapshots are needed, of those that are being taken, too: a snapshot whose key is
    /// not among them cannot be read by anybody, and is nothing.
    ///
    /// # Errors
    /// [`VaultError`]; also if one of the others, or a pack of it, cannot be read, since what is needed is not known then: it must be mended or deleted first.
    pub fn plan_prune(&self, keys: &BTreeMap<SnapshotId, SnapshotKey>) -> Result<PrunePlan, VaultError> {
        Ok(self.survey(keys)?.plan)
    }

    /// Removes what the plan names, then writes packs anew, one after the other.
    ///
    /// # Errors
    /// [`VaultError::Busy`] while a snapshot is written; [`VaultError::Changed`] if the plan would now be another; those of [`Self::plan_prune`]. After
    /// [`VaultError::Io`], or [`VaultError::File`] of a pack that turns out to be damaged, a part of it may be done; what is there is whole, and a new plan has the rest.
    pub fn prune(&self, plan: &PrunePlan, keys: &BTreeMap<SnapshotId, SnapshotKey>) -> Result<(), VaultError> {
        self.prune_if(keys, |now| now == plan)
    }

    /// As [`Self::prune`], if the plan as it is now is wanted.
    ///
    /// # Errors
    /// Those of [`Self::prune`]; [`VaultError::Changed`] if it is not.
    pub fn prune_if(
        &self,
        keys: &BTreeMap<SnapshotId, SnapshotKey>,
        is_wanted: impl FnOnce(&PrunePlan) -> bool,
    ) -> Result<(), VaultError> {
        let _lock = self.shared.lock(FlockOperation::NonBlockingLockExclusive)?;
        let survey = self.survey(keys)?;
        let plan = &survey.plan;
        if !is_wanted(plan) {
            return Err(VaultError::Changed);
        }
        let snapshots = plan.snapshots.iter().map(|(id, _)| snapshot_name(*id));
        let packs = plan.packs.iter().map(|(pack, _)| pack_name(*pack));
        let mut names = snapshots.chain(packs).chain(plan.drafts.iter().map(|(name, _)| name.clone()));
        let removed = names.try_for_each(|name| self.shared.remove(&name));
        removed.and_then(|()| self.shared.sync()).map_err(failed("changed"))?;
        survey.keep.iter().try_for_each(|(pack, key, keep)| self.rewrite(*pack, key, keep))
    }

    fn survey(&self, keys: &BTreeMap<SnapshotId, SnapshotKey>) -> Result<Survey, VaultError> {
        let (mut needs, mut plan) = (Needs::default(), PrunePlan::default());
        let mut packs = BTreeMap::new();
        for (text, name) in self.shared.names().map_err(failed("read"))? {
            let length = || self.shared.length(&text).map_err(failed("read"));
            match name {
                Name::Snapshot(id) => match keys.get(&id) {
                    Some(key) => self.add_needs(id, key, &mut needs)?,
                    None => plan.snapshots.push((id, length()?)),
                },
                Name::Pack(id) => drop(packs.insert(id, length()?)),
                Name::First(id) if keys.contains_key(&id) => {}
                Name::First(_) | Name::Draft => plan.drafts.push((text.clone(), length()?)),
            }
        }
        let mut keep = vec![];
        let mut needed = BTreeSet::new();
        for need in needs.into_packs() {
            needed.insert(need.id);
            let (kept, has) = (need.keep(), need.has());
            let gone = has - kept.count();
            if gone >= LEAST && gone >= has.div_ceil(UNNEEDED) {
                let bytes = packs.get(&need.id).copied().unwrap_or_default();
                plan.rewrites.push(Rewrite { pack: need.id, bytes, kept: kept.count(), gone });
                keep.push((need.id, need.key, kept));
            }
        }
        plan.packs.extend(packs.into_iter().filter(|(pack, _)| !needed.contains(pack)));
        plan.snapshots.sort_unstable();
        plan.drafts.sort_unstable();
        Ok(Survey { plan, keep })
    }

    fn add_needs(&self, id: SnapshotId, key: &SnapshotKey, needs: &mut Needs) -> Result<(), VaultError> {
        match self.snapshot(id, key) {
            // Deleted just now.
            Err(VaultError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
            Ok(contents) => needs.add(&contents).map_err(damaged(snapshot_name(id))),
        }
    }

    /// Writes a pack anew with the pages of `keep`.
    fn rewrite(&self, id: PackId, key: &PackKey, keep: &KeptPages) -> Result<(), VaultError> {
        let name = pack_name(id);
        let Some(pack) = self.pack(id, key)? else { return Err(VaultError::Changed) };
        let draft = draft_name(&name, draw_writer().map_err(failed("written"))?);
        let written = (|| {
            let file = self.shared.create(&draft)?;
            self.shared.act(Step::Write, || Ok(()))?;
            pack.rewrite(keep, key, file)?;
            Ok(self.shared.rename(&draft, &name)?)
        })();
        if let Err(error) = written {
            // What cannot be removed now is removed by the next pruning.
            let _ = self.shared.remove(&draft);
            return Err(match error {
                RewriteError::Read(source) => VaultError::File { name, source },
                RewriteError::Write(source) => failed("written")(source),
            });
        }
        self.shared.sync().map_err(failed("written"))
    }
}
