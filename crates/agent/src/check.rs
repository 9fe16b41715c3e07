//! What a machine must have to be a host: one list of findings. `godwit host check` prints all of it; what is not well of the same list is
//! what the agent reports as the host's conditions.

mod machine;
mod probes;

use std::path::Path;
use std::time::Duration;

use godwit_model::{Accelerator, Bytes, HostCondition};
use godwit_qemu::Launcher;
use godwit_qemu::accel::{self, AccelReport, ProbeCommand};
use godwit_qemu::cage::apparmor::{self, Loaded, NoProfiles, Places};
use godwit_qemu::capabilities::{self, HostCapabilities, Interview, InterviewError, Support};
use godwit_qemu::cgroup::{self, CgroupLimits, VmCgroup};
use godwit_qemu::tpm::{self, NoTpm};
use serde::Serialize;

use crate::AgentOptions;
use crate::host::with_causes;
use crate::identity::Identity;

pub(crate) use machine::Machine;

/// QEMU under TCG on a loaded machine takes seconds to load; a hanging one must not hang the agent.
const LIMIT: Duration = Duration::from_secs(60);

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// VMs run, but something will be slow, refused or unsafe to rely on.
    Warn,
    /// This machine cannot be a host as it is.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Stable name, that of the host's condition.
    pub name: String,
    /// How bad it is.
    pub level: Level,
    /// What was found.
    pub message: String,
    /// What to do; none if nothing needs to be done.
    pub fix: Option<String>,
}

impl Finding {
    pub(crate) fn ok(name: &str, message: impl Into<String>) -> Self {
        Self { name: name.into(), level: Level::Ok, message: message.into(), fix: None }
    }

    pub(crate) fn warn(name: &str, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name: name.into(), level: Level::Warn, message: message.into(), fix: Some(fix.into()) }
    }

    pub(crate) fn fail(name: &str, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name: name.into(), level: Level::Fail, message: message.into(), fix: Some(fix.into()) }
    }

    /// A condition of the host as a finding of this level.
    fn of(condition: HostCondition, level: Level) -> Self {
        Self { name: condition.name, level, message: condition.message, fix: Some(condition.fix) }
    }

    /// The host's condition, if there is something to say.
    pub(crate) fn condition(self) -> Option<HostCondition> {
        let worth = self.level > Level::Ok;
        worth.then(|| HostCondition { name: self.name, message: self.message, fix: self.fix.unwrap_or_default() })
    }
}

/// Looks at everything, with the options that the agent has or will have. No VM is touched; what is left behind is what the agent would make as
/// well: the mark of a pool that was never seen before, and the parent of the VMs' cgroups.
/// With `try_pools` the storage of every pool is tried, with small volumes that are removed again.
pub async fn check(options: &AgentOptions, try_pools: bool) -> Vec<Finding> {
    let mut findings = vec![probes::root()];
    let profiles = load_profiles(options).await;
    findings.push(of_profiles(profiles.as_ref().err()));
    let launcher = Launcher::godwit("/proc/self/exe".into()).with_profiles(profiles.ok());
    let (probe, qemu) = ask_qemu(options, &launcher).await;
    findings.extend(of_qemu(&probe, &qemu));
    findings.push(ask_tpm(options, &launcher).await);
    findings.extend(of_cgroups(options));
    findings.extend(Machine::real().findings());
    findings.push(machine::clock_synchronised());
    findings.push(machine::space("state_space", "the agent's state", &options.state_dir));
    findings.extend(probes::pools(options).await);
    if try_pools {
        findings.extend(probes::try_pools(options).await);
    }
    findings.extend(probes::networks().await);
    findings.push(probes::nftables().await);
    findings.extend(probes::identity(Identity::load(&options.state_dir).ok()).await);
    findings
}

/// The part of the list that is looked at before each session, beside what the agent asked of QEMU, pools and networks when it began.
pub(crate) fn standing(options: &AgentOptions) -> Vec<Finding> {
    let mut findings = of_cgroups(options);
    findings.extend(Machine::real().findings());
    findings.push(machine::clock_synchronised());
    findings.push(machine::space("state_space", "the agent's state", &options.state_dir));
    findings
}

/// Has the kernel take the AppArmor profiles of this host's VMs.
pub(crate) async fn load_profiles(options: &AgentOptions) -> Result<Loaded, NoProfiles> {
    let pools = options.pools.iter().map(|(_, path, _)| path.clone());
    let places = Places {
        qemu: options.qemu.clone(),
        run_dir: options.run_dir.clone(),
        volumes: pools.chain([options.state_dir.join("images")]).collect(),
    };
    apparmor::load(&places).await
}

/// What that means for VMs.
pub(crate) fn of_profiles(none: Option<&NoProfiles>) -> Finding {
    const NAME: &str = "apparmor";
    let Some(why) = none else {
        return Finding::ok(NAME, "the kernel enforces AppArmor, with our profiles on all that runs for VMs");
    };
    let fix = match why {
        NoProfiles::NotEnforced => "boot with `apparmor=1 security=apparmor` where the distribution has AppArmor",
        NoProfiles::NoDoor => "mount -t securityfs securityfs /sys/kernel/security, and restart the agent",
        NoProfiles::NoParser => "install the package apparmor, and restart the agent",
        NoProfiles::Place(_) => "use a path of letters, digits, spaces and `/._-+:,~=` for it, and restart the agent",
        NoProfiles::Run(_) | NoProfiles::TimedOut(_) | NoProfiles::Refused(_) => {
            "install AppArmor 3.0 or newer (Debian 12), run the agent as root and unconfined, and restart it"
        }
    };
    Finding::warn(NAME, format!("VMs are confined by their cages alone, without AppArmor: {}", with_causes(why)), fix)
}

/// Tries the accelerator, and interviews QEMU as a VM's own user.
pub(crate) async fn ask_qemu(
    options: &AgentOptions,
    launcher: &Launcher,
) -> (AccelReport, Result<HostCapabilities, InterviewError>) {
    let probe = accel::probe(&ProbeCommand::godwit("/proc/self/exe".into())).await;
    let interview = Interview {
        binary: options.qemu.clone(),
        accelerator: probe.accelerator,
        uid: options.uid_base,
        gid: options.uid_base,
        working_dir: "/".into(),
        limit: LIMIT,
    };
    let qemu = capabilities::interview(launcher, &interview).await;
    (probe, qemu)
}

/// Whether VMs can have a TPM here.
pub(crate) async fn ask_tpm(options: &AgentOptions, launcher: &Launcher) -> Finding {
    of_tpm(tpm::find(launcher, options.uid_base).await.err())
}

fn of_tpm(none: Option<NoTpm>) -> Finding {
    const NAME: &str = "tpm";
    match none {
        None => Finding::ok(NAME, "VMs can have a TPM: swtpm with all that it needs"),
        Some(why) => Finding::warn(
            NAME,
            format!("VMs with a TPM are refused: {}", with_causes(&why)),
            "install the package swtpm of Debian 12 or 13 (0.7), and restart the agent",
        ),
    }
}

/// The accelerator, QEMU, and what QEMU may do here.
pub(crate) fn of_qemu(probe: &AccelReport, qemu: &Result<HostCapabilities, InterviewError>) -> Vec<Finding> {
    let accelerator = match probe.accelerator {
        Accelerator::Kvm => Finding::ok("accelerator", format!("KVM: {}", probe.reason)),
        Accelerator::Tcg => Finding::warn(
            "accelerator",
            format!("VMs are emulated, slowly: {}", probe.reason),
            "enable virtualisation in the firmware (or nested virtualisation in the hypervisor) and load kvm_intel or kvm_amd",
        ),
    };
    let mut findings = vec![accelerator];
    let known = match qemu {
        Ok(known) => known,
        Err(error) => {
            findings.push(Finding::fail(
                "qemu",
                with_causes(error),
                "install QEMU 7.2 or newer (Debian: qemu-system-x86), or name it with --qemu",
            ));
            return findings;
        }
    };
    let (version, machines) = (&known.version, known.machines.len());
    findings.push(match ("pause-before-switchover", "switchover-ack") {
        (pause, _) if !known.has_migration(pause) => Finding::fail(
            "qemu",
            format!("QEMU {version} cannot pause before its switch-over: VMs cannot be moved safely"),
            "install QEMU 7.2 or newer",
        ),
        (_, ack) if !known.has_migration(ack) => Finding::warn(
            "qemu",
            format!("QEMU {version} cannot be kept from switching over by itself: a move of an idle VM may have to begin again"),
            "QEMU 8.1 or newer can; nothing needs to be done if that is acceptable",
        ),
        _ => Finding::ok("qemu", format!("QEMU {version} with {machines} machine types and all that a move needs")),
    });
    // Post-copy and RAM snapshots are refused where QEMU may not use userfaultfd as the VM's own user.
    for (name, what, support) in [
        (HostCondition::NO_POSTCOPY, "post-copy", &known.postcopy),
        (HostCondition::NO_MEMORY_SNAPSHOT, "RAM snapshots", &known.background_snapshot),
    ] {
        findings.push(match support {
            Support::Yes => Finding::ok(name, format!("{what}: possible")),
            Support::No { reason, fix } => Finding::warn(name, format!("{what} is refused: {reason}"), fix),
        });
    }
    findings
}

/// Tries a cgroup with limits and tells which of them this host cannot keep.
fn of_cgroups(options: &AgentOptions) -> Vec<Finding> {
    const NAME: &str = "cgroup_limits";
    const FIX: &str = "boot with cgroup v2 alone (systemd.unified_cgroup_hierarchy=1) so that all controllers are there";
    let tried = cgroup::hierarchy().and_then(|root| {
        let (group, unapplied) =
            VmCgroup::create(&root.join(Path::new(&options.cgroup)), "probe", CgroupLimits::for_ram(Bytes::GIB))?;
        group.remove(Duration::from_secs(1))?;
        Ok(unapplied)
    });
    vec![match tried {
        Ok(unapplied) if unapplied.is_empty() => Finding::ok(NAME, "cgroup v2 with limits of memory, processes and CPU"),
        Ok(unapplied) => {
            let limits: Vec<String> = unapplied.iter().map(|limit| format!("{} ({})", limit.limit, limit.reason)).collect();
            Finding::warn(NAME, format!("limits of VMs that this host cannot keep: {}", limits.join(", ")), FIX)
        }
        Err(error) => Finding::warn(NAME, format!("VMs have no cgroup: {error}"), FIX),
    }]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_not_well_becomes_a_condition() {
        assert_eq!(Finding::ok("clock", "it is in step").condition(), None);
        let condition = Finding::fail("seccomp", "the kernel has none", "boot another").condition().expect("a condition");
        assert_eq!((condition.name.as_str(), condition.fix.as_str()), ("seccomp", "boot another"));
    }

    #[test]
    fn a_host_without_swtpm_is_one_for_vms_without_a_tpm() {
        let finding = of_tpm(Some(NoTpm::Missing));
        assert_eq!((finding.level, finding.message.as_str()), (Level::Warn, "VMs with a TPM are refused: swtpm is not in PATH"));
        assert!(finding.fix.is_some_and(|fix| fix.contains("swtpm")));
        assert_eq!(of_tpm(None).level, Level::Ok);
    }

    #[test]
    fn a_host_without_profiles_says_which_wall_is_missing_and_how_to_get_it() {
        assert_eq!(of_profiles(None).level, Level::Ok);
        let refused = || NoProfiles::Refused("syntax error, line 7".into());
        for (why, found, fix) in [
            (NoProfiles::NotEnforced, "the kernel does not enforce AppArmor", "apparmor=1"),
            (NoProfiles::NoDoor, "/sys/kernel/security/apparmor is not there", "securityfs"),
            (NoProfiles::NoParser, "apparmor_parser is not in PATH", "the package apparmor"),
            (NoProfiles::Place("/a*".into()), "/a* has signs", "letters"),
            (refused(), "syntax error, line 7", "3.0 or newer"),
        ] {
            let finding = of_profiles(Some(&why));
            assert_eq!(finding.level, Level::Warn);
            assert!(finding.message.contains(found), "{finding:?}");
            assert!(finding.fix.as_ref().is_some_and(|text| text.contains(fix)), "{finding:?}");
        }
    }

    #[test]
    fn a_qemu_that_cannot_be_asked_is_a_failure_with_a_fix() {
        let probe = AccelReport { accelerator: Accelerator::Tcg, reason: "no /dev/kvm".into() };
        let findings = of_qemu(&probe, &Err(InterviewError::TimedOut(Duration::from_secs(1))));
        let levels: Vec<_> = findings.iter().map(|finding| (finding.name.as_str(), finding.level)).collect();
        assert_eq!(levels, [("accelerator", Level::Warn), ("qemu", Level::Fail)]);
        assert!(findings.iter().all(|finding| finding.fix.is_some()));
    }
}
