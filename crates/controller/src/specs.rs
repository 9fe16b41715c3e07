//! A spec on its way into the store: what was left out is chosen once and kept, and what a VM that runs still uses stays its own. Pure
//! but for what is drawn.

use std::collections::BTreeSet;

use godwit_model::spec::DEFAULT_HOTPLUG_PORTS;
use godwit_model::{
    DiskBus, DiskSpec, ErrorCode, FIXED_SLOTS, MacAddress, NicSpec, Refusal, ResolvedSpec, VmSpec, Vmgenid, VolumeRef,
};
use serde_json::Value;

use crate::checks::enough_bandwidth;
use crate::clock;

/// A random address in QEMU's range.
pub(crate) fn draw_mac() -> MacAddress {
    let [a, b, c, ..] = *clock::fresh().as_bytes();
    MacAddress([0x52, 0x54, 0x00, a, b, c])
}

/// Completes the spec of a VM that is created.
pub(crate) fn complete_new(spec: &mut VmSpec) -> Result<(), Refusal> {
    spec.hotplug_ports.get_or_insert(DEFAULT_HOTPLUG_PORTS);
    spec.free_page_reporting.get_or_insert(true);
    spec.vmgenid.get_or_insert_with(|| Vmgenid::new(clock::fresh()));
    complete(spec, 0)
}

/// Completes the spec of a VM that begins from another one's snapshot: it has the devices of that, and no others.
pub(crate) fn complete_clone(spec: &mut VmSpec) -> Result<(), Refusal> {
    complete(spec, 0)
}

/// Completes what a VM shall become: what is left out stays as it is, devices keep their places, new ones get free ones. Those that come
/// to a VM that `runs` go into its root ports, if there is room, so that they can come at once.
pub(crate) fn complete_change(before: &VmSpec, wanted: &mut VmSpec, runs: bool) -> Result<(), Refusal> {
    wanted.hotplug_ports = wanted.hotplug_ports.or(before.hotplug_ports);
    wanted.free_page_reporting = wanted.free_page_reporting.or(before.free_page_reporting);
    wanted.vmgenid = wanted.vmgenid.or(before.vmgenid);
    for (index, nic) in wanted.nics.iter_mut().enumerate() {
        let same = |(at, old): &(usize, &NicSpec)| match nic.mac {
            Some(mac) => old.mac == Some(mac),
            // Without an address it is the one at its position, if that is of its network.
            None => *at == index && old.network == nic.network,
        };
        if let Some((at, old)) = before.nics.iter().enumerate().find(same) {
            nic.mac = nic.mac.or(old.mac);
            nic.slot = nic.slot.or(old.slot).or_else(|| position(at));
        }
    }
    for disk in &mut wanted.disks {
        if let Some((at, old)) = before.disks.iter().enumerate().find(|(_, old)| old.volume == disk.volume) {
            disk.slot = disk.slot.or(old.slot).or_else(|| position(at));
        }
    }
    if runs {
        keep_in_use(before, wanted)?;
    }
    complete(wanted, if runs { FIXED_SLOTS } else { 0 })
}

fn position(index: usize) -> Option<u8> {
    u8::try_from(index).ok()
}

/// What a running VM holds until it ends cannot be taken from it: another VM could get it meanwhile. What is in a root port can be taken out, and
/// stays claimed until it is, see [`leaving`].
fn keep_in_use(before: &VmSpec, wanted: &VmSpec) -> Result<(), Refusal> {
    let running = |what: String| {
        Refusal::new(ErrorCode::VmRunning, format!("{what} cannot be taken out while the VM runs"))
            .hint("stop the VM first, change it, and start it again")
    };
    let kept: Vec<&VolumeRef> = wanted.volumes().collect();
    let hot = |volume: &VolumeRef| {
        let disk = before.disks.iter().find(|disk| disk.volume == *volume);
        disk.is_some_and(|disk| disk.bus == DiskBus::Virtio && disk.slot.is_some_and(|slot| slot >= FIXED_SLOTS))
    };
    if let Some(gone) = before.volumes().find(|volume| !kept.contains(volume) && !hot(volume)) {
        return Err(running(format!("volume {gone}")));
    }
    for (at, old) in before.nics.iter().enumerate() {
        let hot = old.slot.is_some_and(|slot| slot >= FIXED_SLOTS);
        if !hot && !wanted.nics.iter().any(|nic| nic.mac == old.mac) {
            return Err(running(format!("interface {at}, which is on the root bus,")));
        }
    }
    for old in &before.disks {
        let new = wanted.disks.iter().find(|disk| disk.volume == old.volume);
        if let (Some(before), Some(size)) = (old.size, new.and_then(|disk| disk.size))
            && size < before
        {
            return Err(Refusal::new(ErrorCode::SpecInvalid, format!("volume {} cannot become smaller", old.volume))
                .hint("leave its size, or copy what is on it to a smaller one"));
        }
    }
    Ok(())
}

/// Draws addresses and places from `first` on, and checks that no address is there twice.
fn complete(spec: &mut VmSpec, first: u8) -> Result<(), Refusal> {
    let ends = FIXED_SLOTS + spec.hotplug_ports.unwrap_or(0);
    let mut disks: BTreeSet<u8> = spec.disks.iter().filter_map(|disk| disk.slot).collect();
    let mut nics: BTreeSet<u8> = spec.nics.iter().filter_map(|nic| nic.slot).collect();
    let in_ports = |slots: &BTreeSet<u8>| slots.iter().copied().filter(|slot| *slot >= FIXED_SLOTS).collect::<BTreeSet<u8>>();
    let mut ports: BTreeSet<u8> = in_ports(&disks).union(&in_ports(&nics)).copied().collect();
    let mut choose = |first: u8, ends: u8, own: &mut BTreeSet<u8>| {
        let places = (first..ends).chain(0..first.min(ends));
        let free = |slot: &u8| if *slot < FIXED_SLOTS { !own.contains(slot) } else { !ports.contains(slot) };
        let slot = places.into_iter().find(free);
        if let Some(slot) = slot {
            own.insert(slot);
            ports.insert(slot);
        }
        slot.ok_or_else(|| {
            Refusal::new(ErrorCode::SpecInvalid, "the VM has no free place for another device").hint("take one out first")
        })
    };
    for disk in &mut spec.disks {
        if disk.slot.is_none() {
            let (first, ends) = reach(disk, first, ends);
            disk.slot = Some(choose(first, ends, &mut disks)?);
        }
    }
    for nic in &mut spec.nics {
        nic.mac.get_or_insert_with(draw_mac);
        if nic.slot.is_none() {
            nic.slot = Some(choose(first, ends, &mut nics)?);
        }
    }
    let twice = spec.nics.iter().enumerate().find(|(index, nic)| spec.nics.iter().take(*index).any(|other| other.mac == nic.mac));
    if let Some((_, nic)) = twice {
        let mac = nic.mac.map(|mac| mac.to_string()).unwrap_or_default();
        return Err(
            Refusal::new(ErrorCode::SpecInvalid, format!("two interfaces have the address {mac}")).hint("leave one of them out")
        );
    }
    spec.migration.check()?;
    enough_bandwidth(spec.migration.bandwidth)?;
    spec.validate().map_err(Refusal::from)
}

/// Where a disk of its bus can be.
fn reach(disk: &DiskSpec, first: u8, ends: u8) -> (u8, u8) {
    match disk.bus {
        DiskBus::Virtio | DiskBus::Nvme => (first, ends),
        DiskBus::Scsi => (0, FIXED_SLOTS),
        DiskBus::Sata => (0, 6),
    }
}

/// The keys that belong to the VM of a spec.
pub(crate) fn claims(spec: &VmSpec) -> BTreeSet<String> {
    let macs = spec.nics.iter().filter_map(|nic| nic.mac).map(|mac| format!("mac/{mac}"));
    macs.chain(spec.volumes().map(|volume| format!("volume/{volume}"))).collect()
}

/// The keys of disks that a VM that runs as `running` still has, though its spec has them no more.
pub(crate) fn leaving(running: &ResolvedSpec, spec: &VmSpec) -> BTreeSet<String> {
    let gone = running.disks.iter().filter(|disk| spec.volumes().all(|volume| *volume != disk.volume));
    gone.map(|disk| format!("volume/{}", disk.volume)).collect()
}

/// Something that waits for the next start.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Waiting {
    /// Which part of the spec.
    pub(crate) field: String,
    /// What the VM was started with, or changed to since.
    pub(crate) running: Value,
    /// What it is to be.
    pub(crate) wanted: Value,
    /// Why it waits, where such a part can change while the VM runs.
    #[serde(default)]
    pub(crate) reason: Option<String>,
}

/// What of `wanted` a running VM is not: it takes effect at the next start.
pub(crate) fn waiting(running: &ResolvedSpec, wanted: &ResolvedSpec) -> Vec<Waiting> {
    let (mut before, mut after) = (parts(running), parts(wanted));
    // Some hosts need a little more, which nobody asked for.
    let growth = running.growth_to(wanted);
    if growth == Ok(None) {
        before.retain(|(field, _)| field != "memory");
        after.retain(|(field, _)| field != "memory");
    }
    let stays = growth.err();
    let find =
        |parts: &[(String, Value)], field: &str| parts.iter().find(|(other, _)| other == field).map(|(_, value)| value.clone());
    let mut fields: Vec<&String> = before.iter().chain(&after).map(|(field, _)| field).collect();
    fields.sort();
    fields.dedup();
    let pairs = fields.into_iter().map(|field| Waiting {
        field: field.clone(),
        running: find(&before, field).unwrap_or_default(),
        wanted: find(&after, field).unwrap_or_default(),
        reason: stays.as_ref().filter(|_| field == "memory").map(ToString::to_string),
    });
    let mut all: Vec<Waiting> = pairs.filter(|pair| pair.running != pair.wanted).collect();
    for pair in all.iter_mut().filter(|pair| pair.field == "cloud_init") {
        // It often holds passwords.
        (pair.running, pair.wanted) = (Value::Null, Value::Null);
    }
    all
}

/// A spec by its parts, each with a name that people know from the spec.
fn parts(spec: &ResolvedSpec) -> Vec<(String, Value)> {
    let mut parts: Vec<(String, Value)> = vec![
        ("machine".into(), json(&spec.machine)),
        ("cpu".into(), json(&spec.cpu)),
        ("vcpus".into(), json(&spec.vcpus)),
        ("memory".into(), json(&spec.memory_with_dimms())),
        ("memory_max".into(), json(&spec.growth.as_ref().map(|growth| growth.max))),
        ("boot".into(), json(&(&spec.kernel, &spec.initrd, &spec.cmdline))),
        ("cdroms".into(), json(&spec.cdroms)),
        ("cloud_init".into(), json(&spec.cloud_init)),
    ];
    for (slot, disk) in spec.disk_slots() {
        let mut disk = disk.clone();
        (disk.slot, disk.serial) = (None, Some(disk.serial.unwrap_or_else(|| format!("disk{slot}"))));
        // Where it came from says nothing once it is there; its size changes while the VM runs.
        (disk.image, disk.create) = (None, None);
        parts.push((format!("disk in slot {slot}"), json(&disk)));
    }
    for (slot, nic) in spec.nic_slots() {
        parts.push((format!("interface in slot {slot}"), json(&godwit_model::ResolvedNic { slot: None, ..nic.clone() })));
    }
    if let Value::Object(platform) = json(&spec.platform) {
        parts.extend(platform);
    }
    parts
}

fn json(part: &impl serde::Serialize) -> Value {
    serde_json::to_value(part).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use godwit_model::{Boot, Bytes, DiskFormat, Name};

    use super::*;

    fn name(text: &str) -> Name {
        Name::new(text).expect("name")
    }

    fn disk(volume: &str) -> DiskSpec {
        DiskSpec::new(volume.parse().expect("volume"), DiskFormat::Raw)
    }

    fn created() -> VmSpec {
        let mut spec = VmSpec::new(1, Bytes::mib(512), Boot::Disk);
        spec.disks = vec![disk("a/0"), disk("a/1")];
        spec.nics = vec![NicSpec::new(name("default")), NicSpec::new(name("default"))];
        complete_new(&mut spec).expect("complete");
        spec
    }

    fn slots(spec: &VmSpec) -> (Vec<u8>, Vec<u8>) {
        (spec.disks.iter().filter_map(|disk| disk.slot).collect(), spec.nics.iter().filter_map(|nic| nic.slot).collect())
    }

    #[test]
    fn what_was_left_out_is_chosen_once() {
        let spec = created();
        assert_eq!(slots(&spec), (vec![0, 1], vec![0, 1]));
        assert!(spec.vmgenid.is_some() && spec.hotplug_ports == Some(4) && spec.free_page_reporting == Some(true));
        let mut again = created();
        again.vmgenid = None;
        let mut wanted = spec.clone();
        (wanted.vmgenid, wanted.hotplug_ports, wanted.free_page_reporting) = (None, None, None);
        wanted.nics.iter_mut().for_each(|nic| (nic.mac, nic.slot) = (None, None));
        complete_change(&spec, &mut wanted, true).expect("complete");
        assert_eq!(wanted, spec);
    }

    #[test]
    fn a_device_that_comes_or_goes_moves_no_other() {
        let spec = created();
        let mut wanted = spec.clone();
        wanted.disks.remove(0);
        wanted.nics.remove(0);
        complete_change(&spec, &mut wanted, false).expect("complete");
        assert_eq!(slots(&wanted), (vec![1], vec![1]));
        let mut more = wanted.clone();
        more.disks.insert(0, disk("a/2"));
        more.nics.push(NicSpec::new(name("default")));
        complete_change(&wanted, &mut more, false).expect("complete");
        assert_eq!(slots(&more), (vec![0, 1], vec![1, 0]));
        let mut live = wanted.clone();
        live.disks.push(disk("a/3"));
        live.nics.push(NicSpec::new(name("default")));
        complete_change(&wanted, &mut live, true).expect("complete");
        assert_eq!(slots(&live), (vec![1, 8], vec![1, 9]));
    }

    #[test]
    fn a_spec_of_before_places_existed_keeps_its_positions() {
        let mut old = created();
        old.disks.iter_mut().for_each(|disk| disk.slot = None);
        old.nics.iter_mut().for_each(|nic| nic.slot = None);
        (old.hotplug_ports, old.vmgenid, old.free_page_reporting) = (None, None, None);
        let mut wanted = old.clone();
        wanted.disks.remove(0);
        complete_change(&old, &mut wanted, false).expect("complete");
        assert_eq!(slots(&wanted), (vec![1], vec![0, 1]));
        assert_eq!((wanted.hotplug_ports, wanted.vmgenid, wanted.free_page_reporting), (None, None, None));
    }

    #[test]
    fn a_running_vm_keeps_what_it_uses() {
        let spec = created();
        for change in [
            (|s: &mut VmSpec| {
                s.disks.remove(1);
            }) as fn(&mut VmSpec),
            |s| {
                s.nics.remove(1);
            },
            |s| s.disks[0].volume = "a/9".parse().expect("volume"),
        ] {
            let mut wanted = spec.clone();
            change(&mut wanted);
            assert_eq!(complete_change(&spec, &mut wanted.clone(), true).expect_err("in use").code, ErrorCode::VmRunning);
            complete_change(&spec, &mut wanted, false).expect("nothing is in use");
        }
    }

    #[test]
    fn memory_that_came_is_not_waited_for_and_what_waits_says_why() {
        let mut running: ResolvedSpec = serde_json::from_str(
            r#"{"schema":2,"vm":"11112222-3333-4444-5555-666677778888","name":"web1","accelerator":"tcg","machine":"pc-q35-7.2",
            "cpu":"qemu64-v1","vcpus":1,"memory":536879104,"kernel":null,"initrd":null,"cmdline":"","disks":[],"nics":[]}"#,
        )
        .expect("of a version before");
        let wanted = |memory: Bytes, max: Option<Bytes>| ResolvedSpec {
            memory,
            growth: max.map(godwit_model::Growth::to),
            ..running.clone()
        };
        let (half, whole) = (wanted(Bytes::mib(512), Some(Bytes::GIB)), wanted(Bytes::GIB, Some(Bytes::GIB)));
        let fields = |running: &ResolvedSpec, wanted: &ResolvedSpec| -> Vec<(String, Option<String>)> {
            waiting(running, wanted).into_iter().map(|waiting| (waiting.field, waiting.reason)).collect()
        };
        assert_eq!(fields(&running, &wanted(Bytes::mib(512), None)), []);
        assert_eq!(fields(&running, &half), [("memory_max".into(), None)]);
        let fixed = godwit_model::NoGrowth::Fixed.to_string();
        assert_eq!(fields(&running, &whole), [("memory".into(), Some(fixed)), ("memory_max".into(), None)]);
        running.growth.clone_from(&half.growth);
        assert_eq!(fields(&running, &half), []);
        assert_eq!(fields(&running, &whole), [("memory".into(), None)], "it can come");
        let dimm = running.growth_to(&whole).expect("room").expect("a DIMM");
        godwit_model::LiveChange::Memory { dimm }.apply(&mut running);
        assert_eq!(fields(&running, &whole), []);
        let smaller = godwit_model::NoGrowth::Smaller.to_string();
        assert_eq!(fields(&running, &half), [("memory".into(), Some(smaller))]);
    }

    #[test]
    fn two_interfaces_with_one_address_are_refused() {
        let mut spec = created();
        spec.nics[1].mac = spec.nics[0].mac;
        let before = created();
        assert_eq!(complete_change(&before, &mut spec, false).expect_err("twice").code, ErrorCode::SpecInvalid);
    }
}
