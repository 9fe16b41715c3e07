//! Keeps the kernel's filter what it should be: rules before a tap is attached, none for taps that are gone, all of them again after
//! somebody has flushed the ruleset; and reads what was dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use godwit_model::{DroppedFrames, HostNetworks, InterfaceDrops, ResolvedNic, VmId};

use super::filter::{self, TapRules};
use super::netlink::{Link, LinkKind};
use super::nft::{self, Counter, NftError};
use super::{HostNetwork, Inner, NetworkError, PORT, State, bridge, kernel, tap};

/// What is known of the filter.
#[derive(Default)]
pub(super) struct Guard {
    /// Taps with rules, by their index.
    taps: BTreeMap<u32, TapRules>,
    members: Option<BTreeSet<IpAddr>>,
    tallies: BTreeMap<String, Tally>,
    /// What was dropped of interfaces that are gone.
    gone: DroppedFrames,
    /// Why the filter does not work, if it does not.
    pub(super) broken: Option<String>,
}

/// A count that goes on where the kernel's begins anew.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    before: u64,
    last: u64,
}

impl Tally {
    fn see(&mut self, now: u64) {
        if now < self.last {
            self.before += self.last;
        }
        self.last = now;
    }

    fn total(self) -> u64 {
        self.before + self.last
    }
}

impl Guard {
    /// Remembers whether the filter works; says so when that changes.
    fn note(&mut self, result: &Result<(), NftError>) {
        let broken = result.as_ref().err().map(ToString::to_string);
        if broken != self.broken {
            match &broken {
                Some(reason) => tracing::warn!(reason, "the kernel's filter does not work: what guests send is not checked"),
                None => tracing::info!("the kernel's filter works"),
            }
            self.broken = broken;
        }
    }

    fn see(&mut self, counters: &[Counter]) {
        for counter in counters {
            self.tallies.entry(key(&counter.family, &counter.name)).or_default().see(counter.packets);
        }
    }

    fn total(&self, family: &str, name: &str) -> u64 {
        self.tallies.get(&key(family, name)).copied().unwrap_or_default().total()
    }

    /// What was dropped under the counters of a chain.
    fn of_chain(&self, chain: &str) -> DroppedFrames {
        let mut dropped = DroppedFrames::default();
        for reason in DroppedFrames::REASONS {
            if let Some(count) = dropped.of(reason) {
                *count = self.total("bridge", &format!("{chain}-{reason}"));
            }
        }
        dropped
    }

    fn forget(&mut self, chain: &str, index: u32) {
        self.gone.add(&self.of_chain(chain));
        self.tallies.retain(|key, _| !key.starts_with(&format!("bridge {chain}-")));
        self.taps.remove(&index);
    }
}

fn key(family: &str, name: &str) -> String {
    format!("{family} {name}")
}

/// The VM and the place of the interface that a tap's alias names.
fn owner(link: &Link) -> Option<(VmId, usize)> {
    if link.kind != LinkKind::Tap || !link.name.starts_with(tap::PREFIX) {
        return None;
    }
    let (vm, slot) = link.alias.as_deref()?.split_once(' ')?;
    Some((vm.parse().ok()?, slot.parse().ok()?))
}

impl HostNetwork {
    /// Takes over the taps that an earlier agent made: each gets its rules (again), before anything is heard from the controller. `nic` says
    /// what is known of an interface; a tap of which nothing is known sends nothing.
    ///
    /// # Errors
    /// When the links cannot be listed. A filter that does not work is a condition of the host, not an error.
    pub(crate) async fn adopt(&self, nic: impl Fn(VmId, usize) -> Option<ResolvedNic>) -> Result<(), NetworkError> {
        let mut state = self.inner.state.lock().await;
        let links = self.inner.netlink.links().await.map_err(kernel("list", "its links"))?;
        for link in &links {
            if let Some((vm, slot)) = owner(link)
                && let Some(nic) = nic(vm, slot)
            {
                let rules =
                    TapRules { tap: link.name.clone(), index: link.index, vm, slot, mac: nic.mac, addresses: nic.addresses };
                state.guard.taps.insert(link.index, rules);
            }
        }
        self.inner.restore_taps(&mut state).await;
        self.inner.look(&mut state, &links).await;
        Ok(())
    }

    /// Changes what the interface in a slot may send while it is there.
    ///
    /// # Errors
    /// When the links cannot be listed, or the filter does not work and addresses are promised.
    pub(crate) async fn limit(&self, nic: &ResolvedNic, vm: VmId, slot: usize) -> Result<(), NetworkError> {
        let mut state = self.inner.state.lock().await;
        let links = self.inner.netlink.links().await.map_err(kernel("list", "its links"))?;
        // One that is not there gets its rules when it is made.
        let Some(link) = links.iter().find(|link| owner(link) == Some((vm, slot))) else { return Ok(()) };
        let (tap, index) = (link.name.clone(), link.index);
        let rules = TapRules { tap, index, vm, slot, mac: nic.mac, addresses: nic.addresses.clone() };
        self.inner.protect(&mut state, rules).await
    }

    /// Removes the rules of taps that are gone, restores what is missing, and reads what was dropped.
    pub(crate) async fn tend(&self) {
        let mut state = self.inner.state.lock().await;
        match self.inner.netlink.links().await {
            Ok(links) => self.inner.look(&mut state, &links).await,
            Err(error) => tracing::warn!(%error, "the links cannot be listed"),
        }
    }

    /// What the host offers to networks and has dropped on them, as last looked at.
    pub(crate) fn offer(&self) -> HostNetworks {
        self.inner.offer.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

impl Inner {
    /// Puts the rules of a tap in place; it is not attached yet.
    pub(super) async fn protect(&self, state: &mut State, rules: TapRules) -> Result<(), NetworkError> {
        let result = nft::apply(&(filter::base() + &filter::add(&rules))).await;
        state.guard.note(&result);
        match result {
            // Nothing was promised about what it may send.
            Err(_) if rules.addresses.is_empty() => Ok(()),
            Err(source) => Err(NetworkError::Unfiltered { vm: rules.vm, slot: rules.slot, source }),
            Ok(()) => {
                state.guard.taps.insert(rules.index, rules);
                Ok(())
            }
        }
    }

    /// Lets only these addresses send VXLAN to this host.
    pub(super) async fn admit(&self, state: &mut State, members: BTreeSet<IpAddr>) {
        if state.guard.members.as_ref() == Some(&members) && state.guard.broken.is_none() {
            return;
        }
        let result = nft::apply(&filter::members(&members, PORT)).await;
        state.guard.note(&result);
        state.guard.members = Some(members);
    }

    async fn restore_taps(&self, state: &mut State) {
        let text = state.guard.taps.values().fold(filter::base(), |text, rules| text + &filter::add(rules));
        state.guard.note(&nft::apply(&text).await);
    }

    async fn look(&self, state: &mut State, links: &[Link]) {
        let counters = match nft::counters().await {
            Ok(counters) => counters,
            Err(error) => {
                state.guard.note(&Err(error));
                self.publish(state, links);
                return;
            }
        };
        state.guard.see(&counters);
        let there = |family: &str, name: &str| counters.iter().any(|counter| counter.family == family && counter.name == name);
        let live = |index: u32| links.iter().any(|link| link.index == index && link.name.starts_with(tap::PREFIX));
        let read = counters.iter().filter(|counter| counter.family == "bridge").filter_map(|c| filter::read_counter(&c.name));
        let stale: BTreeSet<(&str, u32)> =
            read.map(|(chain, index, _)| (chain, index)).filter(|(_, index)| !live(*index)).collect();
        for (chain, index) in stale {
            state.guard.note(&nft::apply(&filter::remove(chain, index)).await);
            state.guard.forget(chain, index);
        }
        state.guard.taps.retain(|index, _| live(*index));
        let whole = state.guard.taps.values().all(|rules| there("bridge", &format!("{}-mac", rules.chain())));
        if !there("bridge", filter::UNKNOWN) || !whole {
            if !state.guard.taps.is_empty() {
                tracing::warn!("somebody has removed the rules of guests' interfaces: they are restored");
            }
            self.restore_taps(state).await;
        }
        if let Some(members) = state.guard.members.clone().filter(|_| !there("inet", filter::STRANGERS)) {
            tracing::warn!("somebody has removed the rules about who may send VXLAN: they are restored");
            state.guard.members = None;
            self.admit(state, members).await;
        }
        self.publish(state, links);
    }

    fn publish(&self, state: &State, links: &[Link]) {
        let guard = &state.guard;
        let mut offer = HostNetworks {
            overlay_mtu: state.room,
            bridges: bridge::offered(links),
            no_vlans: state.no_vlans,
            filters: guard.broken.is_none(),
            strangers: guard.total("inet", filter::STRANGERS),
            dropped: guard.gone,
            interfaces: Vec::new(),
        };
        offer.dropped.unknown += guard.total("bridge", filter::UNKNOWN);
        for rules in guard.taps.values() {
            let dropped = guard.of_chain(&rules.chain());
            offer.dropped.add(&dropped);
            if dropped.total() > 0 {
                offer.interfaces.push(InterfaceDrops { vm: rules.vm, slot: u8::try_from(rules.slot).unwrap_or(u8::MAX), dropped });
            }
        }
        *self.offer.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = offer;
    }
}
