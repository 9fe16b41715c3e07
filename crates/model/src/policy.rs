//! What is said of a VM's migrations, by itself and by policies, and how the limits of one come of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{BytesPerSec, ErrorCode, Ladder, MigrationPolicy, Millis, Name, PostCopy, Refusal, Rung};

/// A week, in milliseconds: longer than anybody waits for a migration.
const LONGEST: u64 = 7 * 24 * 3_600_000;
/// Ten minutes: so long a VM may stand still at most, should its QEMU not answer.
const LONGEST_STOP: u64 = 10 * 60_000;

/// Limits of migrations as they are said at one place: in a request, in a VM's spec, or in a policy. What is not said there comes from elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MigrationSettings {
    /// Longest predicted blackout at which the VM is stopped, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_blackout: Option<Millis>,
    /// Upper limit of the wire rate, in bytes per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<BytesPerSec>,
    /// Longest warm-up, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Millis>,
    /// Longest time without any byte acknowledged during warm-up, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stall: Option<Millis>,
    /// Longest time between our stop and QEMU's `completed`, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_limit: Option<Millis>,
    /// What is done when the blackout cannot be kept, in this order.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Rung>>)]
    pub on_miss: Option<Ladder>,
    /// How long waiting for quiet, or throttling, is given before the next rung, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patience: Option<Millis>,
    /// Post-copy. `never`, wherever it is said, counts for every migration that it is said of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postcopy: Option<PostCopy>,
}

impl MigrationSettings {
    /// Takes over what is not said here; the names of what that was.
    pub fn fill(&mut self, from: &Self) -> Vec<&'static str> {
        let mut filled = Vec::new();
        macro_rules! fill {
            ($($field:ident),*) => {$(
                if self.$field.is_none() && from.$field.is_some() {
                    self.$field = from.$field;
                    filled.push(stringify!($field));
                }
            )*};
        }
        fill!(max_blackout, bandwidth, timeout, stall, stop_limit, on_miss, patience, postcopy);
        filled
    }

    /// With the defaults for what is not said.
    #[must_use]
    pub fn or_defaults(&self) -> MigrationPolicy {
        let defaults = MigrationPolicy::default();
        MigrationPolicy {
            max_blackout: self.max_blackout.unwrap_or(defaults.max_blackout),
            bandwidth: self.bandwidth.or(defaults.bandwidth),
            timeout: self.timeout.unwrap_or(defaults.timeout),
            stall: self.stall.unwrap_or(defaults.stall),
            stop_limit: self.stop_limit.unwrap_or(defaults.stop_limit),
            on_miss: self.on_miss.unwrap_or(defaults.on_miss),
            patience: self.patience.unwrap_or(defaults.patience),
            postcopy: self.postcopy.unwrap_or(defaults.postcopy),
        }
    }

    /// Whether a migration can go by them.
    ///
    /// # Errors
    /// `bad_request` for a limit that no migration could keep, or that is none.
    pub fn check(&self) -> Result<(), Refusal> {
        let limits = [
            ("max_blackout", self.max_blackout, 1),
            ("timeout", self.timeout, 1_000),
            ("stall", self.stall, 1_000),
            ("stop_limit", self.stop_limit, 500),
            ("patience", self.patience, 0),
        ];
        for (name, limit, least) in limits {
            let most = if name == "stop_limit" { LONGEST_STOP } else { LONGEST };
            if limit.is_some_and(|limit| !(least..=most).contains(&limit.get())) {
                return Err(Refusal::new(ErrorCode::BadRequest, format!("{name} is {least} to {most} ms"))
                    .hint("give another, or leave it out for what policies say or the default"));
            }
        }
        Ok(())
    }

    fn wants_postcopy(&self) -> bool {
        let by_ladder = self.on_miss.is_some_and(|ladder| ladder.has(Rung::Postcopy));
        by_ladder || matches!(self.postcopy, Some(PostCopy::Ready | PostCopy::Now))
    }
}

impl From<MigrationPolicy> for MigrationSettings {
    /// All of them said; a policy without a bandwidth says nothing of it.
    fn from(policy: MigrationPolicy) -> Self {
        let MigrationPolicy { max_blackout, bandwidth, timeout, stall, stop_limit, on_miss, patience, postcopy } = policy;
        Self {
            max_blackout: Some(max_blackout),
            bandwidth,
            timeout: Some(timeout),
            stall: Some(stall),
            stop_limit: Some(stop_limit),
            on_miss: Some(on_miss),
            patience: Some(patience),
            postcopy: Some(postcopy),
        }
    }
}

/// Settings for the VMs that have certain labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labelled<'a> {
    /// Its name.
    pub name: &'a Name,
    /// What a VM's labels must be, at least; none are every VM's.
    pub labels: &'a BTreeMap<Name, String>,
    /// What it says.
    pub limits: MigrationSettings,
}

impl Labelled<'_> {
    /// Whether it is said of a VM with these labels.
    #[must_use]
    pub fn is_of(&self, labels: &BTreeMap<Name, String>) -> bool {
        self.labels.iter().all(|(key, text)| labels.get(key) == Some(text))
    }
}

/// The limits of one migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settled {
    /// All of them.
    pub policy: MigrationPolicy,
    /// Where those that the request does not name come from, for people; the defaults are not told.
    pub told: Vec<String>,
}

/// Settles the limits of a migration of a VM with these labels: what is asked for goes before what the VM says, that before policies, and of those the
/// one with the most labels before the others, then the first by name.
///
/// # Errors
/// `not_permitted` for post-copy that is asked for and ruled out.
pub fn settle(
    asked: MigrationSettings,
    own: &MigrationSettings,
    labels: &BTreeMap<Name, String>,
    policies: &[Labelled<'_>],
) -> Result<Settled, Refusal> {
    let mut policies: Vec<&Labelled<'_>> = policies.iter().filter(|policy| policy.is_of(labels)).collect();
    policies.sort_by_key(|policy| (std::cmp::Reverse(policy.labels.len()), policy.name));
    let further = std::iter::once(("the VM's own settings".to_owned(), own))
        .chain(policies.into_iter().map(|policy| (format!("policy {}", policy.name), &policy.limits)));
    let (mut limits, mut told) = (asked, Vec::new());
    let mut ruled_out = (asked.postcopy == Some(PostCopy::Never)).then(|| "the request".to_owned());
    for (name, settings) in further {
        if settings.postcopy == Some(PostCopy::Never) && ruled_out.is_none() {
            ruled_out = Some(name.clone());
        }
        let mut filled = limits.fill(settings);
        filled.retain(|field| ruled_out.is_none() || *field != "postcopy");
        if !filled.is_empty() {
            told.push(format!("{name}: {}", filled.join(", ")));
        }
    }
    let mut policy = limits.or_defaults();
    if let Some(by) = ruled_out {
        if asked.wants_postcopy() {
            return Err(Refusal::new(ErrorCode::NotPermitted, format!("post-copy is ruled out for this VM: {by} says `never`"))
                .hint("migrate it without post-copy, or have that changed: `godwit policy list`"));
        }
        let left_out = if policy.on_miss.has(Rung::Postcopy) { ", so it is left out of on_miss" } else { "" };
        told.push(format!("{by}: post-copy never{left_out}"));
        policy.postcopy = PostCopy::Never;
        policy.on_miss = policy.on_miss.without(Rung::Postcopy);
    }
    Ok(Settled { policy, told })
}

#[cfg(test)]
mod tests;
