//! What the CPUs of hosts have in common. QEMU for x86 has no such command: it is computed here, from what each host's QEMU says that it can do.

use std::collections::BTreeSet;

use godwit_api::v1::{CpuBaseline, CpuOfHost};
use godwit_model::{Accelerator, HostFacts, Name};

use crate::resolve::baseline as default_of;

/// What each x86-64 level of the psABI adds, in QEMU's spelling.
const LEVELS: [&[&str]; 4] = [
    &["cmov", "cx8", "fpu", "fxsr", "mmx", "syscall", "sse", "sse2"],
    &["cx16", "lahf-lm", "popcnt", "sse3", "sse4-1", "sse4-2", "ssse3"],
    &["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"],
    &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"],
];

fn level(features: &BTreeSet<&str>) -> u8 {
    let reached = LEVELS.iter().take_while(|level| level.iter().all(|feature| features.contains(feature))).count();
    u8::try_from(reached).unwrap_or(0)
}

/// What all sets have; nothing where there is none.
fn common<'a>(sets: &[BTreeSet<&'a str>]) -> BTreeSet<&'a str> {
    let Some((first, others)) = sets.split_first() else { return BTreeSet::new() };
    first.iter().copied().filter(|item| others.iter().all(|other| other.contains(item))).collect()
}

fn owned<'a>(items: impl Iterator<Item = &'a str>) -> Vec<String> {
    items.map(str::to_owned).collect()
}

/// One baseline for each accelerator that there is, since a VM cannot move between two of them.
pub(crate) fn baselines(hosts: &[(&Name, &HostFacts)]) -> Vec<CpuBaseline> {
    let of =
        |accelerator| baseline(accelerator, hosts.iter().copied().filter(|(_, facts)| facts.accelerator == accelerator).collect());
    [Accelerator::Kvm, Accelerator::Tcg].into_iter().filter_map(of).collect()
}

fn baseline(accelerator: Accelerator, hosts: Vec<(&Name, &HostFacts)>) -> Option<CpuBaseline> {
    if hosts.is_empty() {
        return None;
    }
    let sets = |items: fn(&HostFacts) -> &Vec<String>| -> Vec<BTreeSet<&str>> {
        hosts.iter().map(|(_, facts)| items(facts).iter().map(String::as_str).collect()).collect()
    };
    let (features, models) = (sets(|facts| &facts.cpu_features), sets(|facts| &facts.cpu_models));
    let (all_features, all_models) = (common(&features), common(&models));
    let default_model = hosts.iter().map(|(_, facts)| default_of(accelerator, facts)).find(|model| all_models.contains(model));
    let of_hosts = hosts.iter().zip(features.iter().zip(&models)).map(|((name, _), (features, models))| CpuOfHost {
        host: (*name).clone(),
        level: level(features),
        features: owned(features.difference(&all_features).copied()),
        models: owned(models.difference(&all_models).copied()),
    });
    Some(CpuBaseline {
        accelerator,
        level: level(&all_features),
        default_model: default_model.unwrap_or_default().to_owned(),
        models: owned(all_models.iter().copied()),
        features: owned(all_features.iter().copied()),
        hosts: of_hosts.collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checks::tests::facts;

    fn host(accelerator: Accelerator, levels: usize, more: &[&str], models: &[&str]) -> HostFacts {
        let features = LEVELS.iter().take(levels).flat_map(|level| level.iter()).chain(more);
        HostFacts {
            accelerator,
            cpu_features: features.map(ToString::to_string).collect(),
            cpu_models: models.iter().map(ToString::to_string).collect(),
            ..facts()
        }
    }

    #[test]
    fn a_baseline_is_what_all_hosts_of_an_accelerator_have_and_says_who_has_more() {
        let names = ["h1", "h2", "h3", "h4"].map(|name| Name::new(name).expect("name"));
        let facts = [
            host(Accelerator::Kvm, 4, &["sha-ni"], &["Nehalem-v2", "Haswell-v4", "Icelake-Server-v1"]),
            host(Accelerator::Kvm, 3, &["sha-ni", "svm"], &["Nehalem-v2", "Haswell-v4"]),
            host(Accelerator::Kvm, 2, &["avx2", "sha-ni"], &["Nehalem-v2"]),
            host(Accelerator::Tcg, 1, &[], &["qemu64-v1"]),
        ];
        let hosts: Vec<_> = names.iter().zip(&facts).collect();
        let [kvm, tcg] = &baselines(&hosts)[..] else { panic!("two accelerators") };
        assert_eq!(
            (kvm.level, kvm.default_model.as_str(), kvm.models.as_slice()),
            (2, "Nehalem-v2", &["Nehalem-v2".to_owned()][..])
        );
        assert!(kvm.features.contains(&"avx2".to_owned()) && kvm.features.contains(&"sha-ni".to_owned()), "{:?}", kvm.features);
        assert!(!kvm.features.contains(&"avx".to_owned()));
        let levels: Vec<_> = kvm.hosts.iter().map(|host| (host.host.as_str(), host.level)).collect();
        assert_eq!(levels, [("h1", 4), ("h2", 3), ("h3", 2)]);
        assert!(kvm.hosts[1].features.contains(&"svm".to_owned()) && kvm.hosts[1].models == ["Haswell-v4"]);
        assert_eq!((kvm.hosts[2].features.as_slice(), kvm.hosts[2].models.as_slice()), (&[][..], &[][..]));
        assert_eq!((tcg.level, tcg.hosts.len()), (1, 1));
        assert!(baselines(&[]).is_empty());
    }
}
