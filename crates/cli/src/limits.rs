//! Flags for what is said of migrations: in a request, of a VM, or in a policy.

use clap::{Args, ValueEnum};
use godwit_model::{BytesPerSec, Ladder, MigrationSettings, Millis, PostCopy};
use serde_json::Value;

/// Limits that a request can name as well.
#[derive(Args, Clone, Copy, Default)]
pub(crate) struct LimitArgs {
    /// Longest time without a running vCPU [if nothing says it: 300ms]
    #[arg(long, value_name = "TIME")]
    max_blackout: Option<Millis>,
    /// Upper limit of the wire rate, such as 500mbit or 100MiB/s [if nothing says it: none]
    #[arg(long, value_name = "RATE")]
    bandwidth: Option<BytesPerSec>,
    /// Give up if memory was not copied after this time [if nothing says it: 30m]
    #[arg(long, value_name = "TIME")]
    timeout: Option<Millis>,
    /// What to do when the blackout cannot be kept, in this order: wait-for-quiet, throttle, postcopy, ask, give-up [if nothing says it: wait-for-quiet]
    #[arg(long, value_name = "RUNGS")]
    on_miss: Option<Ladder>,
    /// How long to wait for quiet, and to throttle, before what comes next in --on-miss [if nothing says it: 1m]
    #[arg(long, value_name = "TIME")]
    patience: Option<Millis>,
}

impl LimitArgs {
    /// What they say, beside what is said of post-copy.
    pub(crate) fn settings(self, postcopy: Option<PostCopy>) -> MigrationSettings {
        let Self { max_blackout, bandwidth, timeout, on_miss, patience } = self;
        MigrationSettings { max_blackout, bandwidth, timeout, on_miss, patience, postcopy, ..MigrationSettings::default() }
    }
}

/// Limits that are kept, of a VM or in a policy.
#[derive(Args, Clone, Default)]
#[command(next_help_heading = "Its migrations")]
pub(crate) struct KeptLimitArgs {
    #[command(flatten)]
    limits: LimitArgs,
    /// Post-copy
    #[arg(long, value_name = "WHEN")]
    postcopy: Option<PostCopyArg>,
}

/// As [`PostCopy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PostCopyArg {
    /// If --on-miss comes to it
    ByLadder,
    /// And on `godwit task postcopy`
    Ready,
    /// As soon as every page was looked at once
    Now,
    /// Not at all, whatever a request or another policy says
    Never,
}

/// A limit by its flag's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "they are the names of flags")]
pub(crate) enum LimitName {
    MaxBlackout,
    Bandwidth,
    Timeout,
    OnMiss,
    Patience,
    Postcopy,
    Stall,
    StopLimit,
}

impl KeptLimitArgs {
    /// What they say.
    pub(crate) fn settings(&self) -> MigrationSettings {
        self.limits.settings(self.postcopy.map(|postcopy| match postcopy {
            PostCopyArg::ByLadder => PostCopy::ByLadder,
            PostCopyArg::Ready => PostCopy::Ready,
            PostCopyArg::Now => PostCopy::Now,
            PostCopyArg::Never => PostCopy::Never,
        }))
    }

    /// Says this of `settings`, and nothing more of what is named in `unset`.
    pub(crate) fn change(&self, settings: &mut MigrationSettings, unset: &[LimitName]) {
        for name in unset {
            match name {
                LimitName::MaxBlackout => settings.max_blackout = None,
                LimitName::Bandwidth => settings.bandwidth = None,
                LimitName::Timeout => settings.timeout = None,
                LimitName::OnMiss => settings.on_miss = None,
                LimitName::Patience => settings.patience = None,
                LimitName::Postcopy => settings.postcopy = None,
                LimitName::Stall => settings.stall = None,
                LimitName::StopLimit => settings.stop_limit = None,
            }
        }
        let mut said = self.settings();
        said.fill(settings);
        *settings = said;
    }
}

/// What is said, in words; nothing if nothing is.
pub(crate) fn shown(settings: &MigrationSettings) -> Option<String> {
    let MigrationSettings { max_blackout, bandwidth, timeout, stall, stop_limit, on_miss, patience, postcopy } = settings;
    let times = [
        ("max blackout", max_blackout),
        ("time-out", timeout),
        ("patience", patience),
        ("stall", stall),
        ("stop limit", stop_limit),
    ];
    let word = |value: &Value| value.as_str().unwrap_or_default().replace('_', "-");
    let text = |value: Value| match &value {
        Value::Array(all) => all.iter().map(word).collect::<Vec<_>>().join(", then "),
        one => word(one),
    };
    let mut parts: Vec<String> = times.iter().filter_map(|(name, time)| time.map(|time| format!("{name} {time}"))).collect();
    parts.extend(bandwidth.map(|rate| format!("bandwidth {rate}")));
    parts.extend(on_miss.and_then(|ladder| serde_json::to_value(ladder).ok()).map(|value| format!("on a miss {}", text(value))));
    parts.extend(
        postcopy.and_then(|postcopy| serde_json::to_value(postcopy).ok()).map(|value| format!("post-copy {}", text(value))),
    );
    (!parts.is_empty()).then(|| parts.join("; "))
}

#[cfg(test)]
mod tests {
    use godwit_model::Rung;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        limits: KeptLimitArgs,
        #[arg(long)]
        unset: Vec<LimitName>,
    }

    fn after(before: MigrationSettings, line: &str) -> MigrationSettings {
        let line: Line = clap::Parser::try_parse_from(["x"].into_iter().chain(line.split_whitespace())).expect("parsed");
        let mut settings = before;
        line.limits.change(&mut settings, &line.unset);
        settings
    }

    #[test]
    fn what_is_given_is_said_what_is_unset_is_not_and_the_rest_stays() {
        let before = MigrationSettings {
            stall: Some(Millis(1)),
            max_blackout: Some(Millis(50)),
            timeout: Some(Millis(9)),
            ..MigrationSettings::default()
        };
        let now = after(before, "--max-blackout 100ms --on-miss throttle,postcopy --postcopy never --unset timeout");
        assert_eq!((now.stall, now.max_blackout, now.timeout), (Some(Millis(1)), Some(Millis(100)), None));
        assert_eq!(now.postcopy, Some(PostCopy::Never));
        assert!(now.on_miss.is_some_and(|ladder| ladder.has(Rung::Postcopy)));
        let text = shown(&now).expect("something");
        assert_eq!(text, "max blackout 100 ms; stall 1 ms; on a miss throttle, then postcopy; post-copy never");
        assert_eq!(shown(&MigrationSettings::default()), None);
    }
}
