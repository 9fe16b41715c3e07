//! `godwit vm set`: changes what a VM is made of, by a few flags or by a whole spec.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use godwit_model::{Autostart, Bytes, CdromSpec, DiskSpec, MacAddress, Name, NicSpec, Refusal, VmSpec, VolumeRef};

use super::create::{parse_disk, parse_nic, read_file};
use crate::error::Failure;
use crate::limits::{KeptLimitArgs, LimitName};
use crate::session::{Session, WaitArgs};
use crate::text::visible;

const HINT: &str = "`godwit vm show NAME -o yaml` shows the VM's spec";

/// Which VM, and what about it.
#[derive(Args)]
#[command(
    after_help = "What can change while the VM runs does at once: media, I/O limits, cables, larger disks, more memory up to \
`memory_max`, and disks and interfaces in root ports. The rest takes effect at its next start; `godwit vm show` lists it under `waits`.

A file replaces the whole spec. If it is a whole VM, as `godwit vm show` writes it, nothing is changed unless the VM is still at the \
revision in it.

Examples:
  godwit vm set web1 --memory 4GiB --vcpus 4
  godwit vm set web1 --memory-max 16GiB
  godwit vm set web1 --cdrom 0=debian-12 && godwit vm set web1 --cdrom 0=
  godwit vm set web1 --autostart 10
  godwit vm set web1 --max-blackout 100ms --postcopy never
  godwit vm set web1 --grow shared/web1=20GiB --add-nic default
  godwit vm show web1 -o yaml > web1.yaml && editor web1.yaml && godwit vm set web1 --file web1.yaml"
)]
pub(crate) struct SetArgs {
    /// Its name
    name: Name,
    /// Take the whole spec from this file, JSON or YAML; `-` for standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["memory", "memory_max", "vcpus", "cdroms", "grow", "labels", "add_nics", "remove_nics", "plug", "unplug", "autostart", "add_disks", "remove_disks", "unset", "max_blackout", "bandwidth", "timeout", "on_miss", "patience", "postcopy"])]
    file: Option<PathBuf>,
    /// RAM, such as 1GiB; up to `memory_max` it grows while the VM runs
    #[arg(long, value_name = "SIZE")]
    memory: Option<Bytes>,
    /// What memory can grow to while the VM runs, from its next start on; `none` for not
    #[arg(long, value_name = "SIZE", value_parser = parse_memory_max)]
    memory_max: Option<MemoryMaxArg>,
    /// Number of vCPUs
    #[arg(long, value_name = "COUNT")]
    vcpus: Option<u16>,
    /// Put an image into a CD-ROM drive, or nothing: DRIVE=IMAGE or DRIVE=; can be repeated
    #[arg(long = "cdrom", value_name = "DRIVE=IMAGE", value_parser = parse_cdrom)]
    cdroms: Vec<(usize, Option<Name>)>,
    /// Make a disk larger: POOL/VOLUME=SIZE; can be repeated
    #[arg(long, value_name = "VOLUME=SIZE", value_parser = parse_grow)]
    grow: Vec<(VolumeRef, Bytes)>,
    /// Add a disk, as in `godwit vm create --disk`; can be repeated
    #[arg(long = "add-disk", value_name = "DISK", value_parser = parse_disk)]
    add_disks: Vec<DiskSpec>,
    /// Take out the disk with this volume, which stays in its pool; can be repeated
    #[arg(long = "remove-disk", value_name = "VOLUME")]
    remove_disks: Vec<VolumeRef>,
    /// Set a label, or remove it: KEY=TEXT or KEY=; can be repeated
    #[arg(long = "label", value_name = "KEY=TEXT", value_parser = parse_label)]
    labels: Vec<(Name, String)>,
    /// Add a network interface, as in `godwit vm create --nic`; can be repeated
    #[arg(long = "add-nic", value_name = "INTERFACE", value_parser = parse_nic)]
    add_nics: Vec<NicSpec>,
    /// Remove the interface with this address; can be repeated, but not together with --add-nic
    #[arg(long = "remove-nic", value_name = "MAC", conflicts_with = "add_nics")]
    remove_nics: Vec<MacAddress>,
    /// Plug in the cable of the interface with this address; can be repeated
    #[arg(long, value_name = "MAC")]
    plug: Vec<MacAddress>,
    /// Unplug the cable of the interface with this address; can be repeated
    #[arg(long, value_name = "MAC")]
    unplug: Vec<MacAddress>,
    /// Start it again when its host went down and is back, lower ones first; `none` for not
    #[arg(long, value_name = "ORDER", value_parser = parse_autostart)]
    autostart: Option<AutostartArg>,
    #[command(flatten)]
    limits: KeptLimitArgs,
    /// Say nothing of this any more, so that policies do; can be repeated
    #[arg(long, value_name = "LIMIT", help_heading = "Its migrations")]
    unset: Vec<LimitName>,
    #[command(flatten)]
    wait: WaitArgs,
}

/// What `--autostart` says.
#[derive(Clone, Copy)]
struct AutostartArg(Option<Autostart>);

/// What `--memory-max` says.
#[derive(Clone, Copy)]
struct MemoryMaxArg(Option<Bytes>);

pub(super) async fn run(session: &Session, args: SetArgs) -> Result<(), Failure> {
    let (spec, revision) = match &args.file {
        Some(path) => read_file(path)?,
        None => {
            let vm = session.client.vm(&args.name).await?;
            let mut spec = vm.spec;
            edit(&mut spec, &args).map_err(|what| Failure::usage(what, HINT))?;
            (spec, Some(vm.revision))
        }
    };
    spec.validate().map_err(|error| Failure::Refused(Refusal::from(error)))?;
    let task = session.client.set_vm(&args.name, &spec, revision).await?;
    let name = &args.name;
    session
        .conclude(task, &args.wait, None, async |_| {
            let waiting = session.client.vm(name).await.map(|vm| vm.status.waiting).unwrap_or_default();
            if waiting.is_empty() {
                return format!("{name} changed");
            }
            let reason = |reason: &String| format!(" ({})", visible(reason));
            let fields = waiting
                .iter()
                .map(|waiting| format!("{}{}", waiting.field, waiting.reason.as_ref().map(reason).unwrap_or_default()));
            let fields: Vec<String> = fields.collect();
            format!("{name} changed; takes effect at its next start: {}", fields.join(", "))
        })
        .await
}

fn edit(spec: &mut VmSpec, args: &SetArgs) -> Result<(), String> {
    spec.memory = args.memory.unwrap_or(spec.memory);
    if let Some(MemoryMaxArg(max)) = args.memory_max {
        spec.memory_max = max;
    }
    spec.vcpus = args.vcpus.unwrap_or(spec.vcpus);
    for (drive, image) in &args.cdroms {
        let count = spec.cdroms.len();
        match spec.cdroms.get_mut(*drive) {
            Some(cdrom) => cdrom.image.clone_from(image),
            None if *drive == count => spec.cdroms.push(CdromSpec { image: image.clone() }),
            None => return Err(format!("the VM has {count} CD-ROM drives, so the next one is {count}, not {drive}")),
        }
    }
    for (volume, size) in &args.grow {
        let disk = spec.disks.iter_mut().find(|disk| disk.volume == *volume);
        let disk = disk.ok_or_else(|| format!("the VM has no disk {volume}"))?;
        if disk.size.is_some_and(|now| now > *size) {
            return Err(format!("disk {volume} is larger than {size} already"));
        }
        disk.size = Some(*size);
    }
    for volume in &args.remove_disks {
        let index = spec.disks.iter().position(|disk| disk.volume == *volume);
        spec.disks.remove(index.ok_or_else(|| format!("the VM has no disk {volume}"))?);
    }
    spec.disks.extend(args.add_disks.iter().cloned());
    if let Some(AutostartArg(autostart)) = args.autostart {
        spec.autostart = autostart;
    }
    args.limits.change(&mut spec.migration, &args.unset);
    change_labels(&mut spec.labels, &args.labels);
    for mac in &args.remove_nics {
        let index =
            spec.nics.iter().position(|nic| nic.mac == Some(*mac)).ok_or_else(|| format!("the VM has no interface {mac}"))?;
        spec.nics.remove(index);
    }
    for (macs, up) in [(&args.plug, true), (&args.unplug, false)] {
        for mac in macs {
            let nic = spec.nics.iter_mut().find(|nic| nic.mac == Some(*mac));
            nic.ok_or_else(|| format!("the VM has no interface {mac}"))?.link_up = up;
        }
    }
    spec.nics.extend(args.add_nics.iter().cloned());
    Ok(())
}

fn pair(text: &str) -> Result<(&str, &str), String> {
    text.split_once('=').ok_or_else(|| format!("{text:?} has no `=`"))
}

fn parse_cdrom(text: &str) -> Result<(usize, Option<Name>), String> {
    let (drive, image) = pair(text)?;
    let drive = drive.parse().map_err(|_| format!("{drive:?} is no number of a drive"))?;
    let image = if image.is_empty() { None } else { Some(image.parse().map_err(|error| format!("{error}"))?) };
    Ok((drive, image))
}

fn parse_grow(text: &str) -> Result<(VolumeRef, Bytes), String> {
    let (volume, size) = pair(text)?;
    Ok((volume.parse().map_err(|error| format!("{error}"))?, size.parse().map_err(|error| format!("{error}"))?))
}

fn parse_memory_max(text: &str) -> Result<MemoryMaxArg, String> {
    if text == "none" {
        return Ok(MemoryMaxArg(None));
    }
    text.parse().map(|max| MemoryMaxArg(Some(max))).map_err(|error| format!("{text:?} is neither `none` nor a size: {error}"))
}

fn parse_autostart(text: &str) -> Result<AutostartArg, String> {
    if text == "none" {
        return Ok(AutostartArg(None));
    }
    let order = text.parse().map_err(|_| format!("{text:?} is neither `none` nor a number from 0 to 65535"))?;
    Ok(AutostartArg(Some(Autostart { order })))
}

/// Sets labels, and removes those without a text.
pub(crate) fn change_labels(labels: &mut BTreeMap<Name, String>, changes: &[(Name, String)]) {
    for (key, text) in changes {
        if text.is_empty() {
            labels.remove(key);
        } else {
            labels.insert(key.clone(), text.clone());
        }
    }
}

/// Labels as they are given, for people; nothing if there are none.
pub(crate) fn shown_labels(labels: &BTreeMap<Name, String>) -> Option<String> {
    let all: Vec<String> = labels.iter().map(|(key, text)| format!("{key}={text}")).collect();
    (!all.is_empty()).then(|| visible(&all.join(", ")).into_owned())
}

/// A label as a flag: `KEY=TEXT`.
pub(crate) fn parse_label(text: &str) -> Result<(Name, String), String> {
    let (key, value) = pair(text)?;
    Ok((key.parse().map_err(|error| format!("{error}"))?, value.to_owned()))
}

#[cfg(test)]
mod tests {
    use godwit_model::{Boot, DiskFormat};

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: SetArgs,
    }

    fn edited(flags: &[&str]) -> Result<VmSpec, String> {
        let mut spec = VmSpec::new(1, Bytes::GIB, Boot::Disk);
        spec.disks = vec![DiskSpec { size: Some(Bytes::GIB), ..DiskSpec::new("a/b".parse().expect("volume"), DiskFormat::Raw) }];
        spec.memory_max = Some(Bytes(8 << 30));
        let mut nic = NicSpec::new(Name::new("default").expect("name"));
        nic.mac = Some("52:54:00:00:00:01".parse().expect("mac"));
        spec.nics = vec![nic];
        let line: Line = clap::Parser::try_parse_from(["set", "web1"].iter().chain(flags)).map_err(|error| error.to_string())?;
        edit(&mut spec, &line.args)?;
        Ok(spec)
    }

    #[test]
    fn flags_change_what_they_name_and_nothing_else() {
        let before = edited(&[]).expect("unchanged");
        let after = edited(&[
            "--memory=2GiB",
            "--memory-max=4GiB",
            "--cdrom=0=debian",
            "--grow=a/b=2GiB",
            "--label=tier=web",
            "--unplug=52:54:00:00:00:01",
            "--add-nic=default",
            "--autostart=7",
            "--add-disk=a/c,format=raw,size=1GiB",
        ])
        .expect("changed");
        assert_eq!((after.memory, after.vcpus, after.disks[0].size), (Bytes(2 << 30), before.vcpus, Some(Bytes(2 << 30))));
        assert_eq!(after.cdroms[0].image, Some(Name::new("debian").expect("name")));
        assert_eq!(after.labels.values().collect::<Vec<_>>(), ["web"]);
        assert_eq!((after.nics.len(), after.nics[0].link_up), (2, false));
        assert_eq!((after.disks.len(), after.autostart), (2, Some(Autostart { order: 7 })));
        assert_eq!((before.memory_max, after.memory_max), (Some(Bytes(8 << 30)), Some(Bytes(4 << 30))));
        let without = edited(&["--autostart=none", "--remove-disk=a/b", "--memory-max=none"]).expect("changed");
        assert_eq!((without.disks.len(), without.autostart, without.memory_max), (0, None, None));
        assert_eq!(edited(&["--cdrom=0=", "--remove-nic=52:54:00:00:00:01"]).expect("changed").nics, []);
    }

    #[test]
    fn flags_that_name_what_is_not_there_are_refused() {
        for flags in [
            &["--cdrom=1=debian"][..],
            &["--cdrom=x=debian"],
            &["--cdrom=0"],
            &["--grow=a/c=2GiB"],
            &["--grow=a/b=1MiB"],
            &["--remove-nic=52:54:00:00:00:02"],
            &["--remove-disk=a/c"],
            &["--autostart=first"],
            &["--memory-max=lots"],
            &["--file=x", "--memory=1GiB"],
            &["--file=x", "--memory-max=1GiB"],
            &["--file=x", "--postcopy=never"],
            &["--file=x", "--max-blackout=1s"],
            &["--file=x", "--unset=patience"],
        ] {
            assert!(edited(flags).is_err(), "{flags:?} was accepted");
        }
    }
}
