//! The same machine for a QEMU that is started by hand, from files beside each other. What the guest sees is that of [`super::qemu_arguments`], since it is made there; only what is
//! behind it is another: files instead of descriptors, a network of its own instead of the host's, a terminal instead of sockets.

use std::collections::BTreeMap;

use godwit_model::{CacheMode, DiskFormat, ResolvedSpec};
use serde_json::{Map, Value, json};

use super::devices::{CODE_SET, VARIABLES_SET, disk_set};
use super::{ChannelFds, CommandError, DiskFds, FlashFds, Resources, Start, qemu_arguments, seed};

/// Options without a value.
const ALONE: [&str; 3] = ["-nodefaults", "-no-user-config", "-S"];

/// Files of a VM, as the command line names them. What the spec does not have is not looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlainFiles {
    /// Disks in the order of the spec, qcow2.
    pub disks: Vec<String>,
    /// Code of the firmware, and its variables; raw.
    pub flash: Option<(String, String)>,
    /// Kernel for direct boot.
    pub kernel: Option<String>,
    /// Initial ramdisk.
    pub initrd: Option<String>,
    /// What cloud-init reads.
    pub seed: Option<String>,
    /// Control socket of a swtpm.
    pub tpm: Option<String>,
    /// The stream of memory and devices; without it the VM boots.
    pub memory: Option<String>,
}

/// Arguments for QEMU, without the program's name. The serial console and the monitor are on the terminal; the CD-ROM drives are empty.
///
/// # Errors
/// See [`CommandError`].
pub fn plain_arguments(spec: &ResolvedSpec, files: &PlainFiles) -> Result<Vec<String>, CommandError> {
    // Neither of these is seen by the guest, nor goes into the stream.
    let mut spec = spec.clone();
    for disk in &mut spec.disks {
        (disk.format, disk.cache) = (DiskFormat::Qcow2, CacheMode::Writeback);
    }
    for drive in &mut spec.cdroms {
        drive.medium = None;
    }
    if spec.dimms().is_empty() {
        spec.platform.hugepages = None;
    }
    let none = DiskFds { read_only: 0, read_write: 0 };
    let resources = Resources {
        runtime_dir: "/".into(),
        channels: ChannelFds { qmp: 0, console: 0, guest_agent: 0 },
        kernel: files.kernel.as_ref().map(|_| 0),
        initrd: files.initrd.as_ref().map(|_| 0),
        flash: files.flash.as_ref().map(|_| FlashFds { code: 0, variables: none }),
        disks: files.disks.iter().map(|_| none).collect(),
        media: spec.cdroms.iter().map(|_| None).collect(),
        taps: spec.nics.iter().map(|_| 0).collect(),
        seed: files.seed.as_ref().map(|_| 0),
        tpm: files.tpm.as_ref().map(|_| 0),
        node: None,
        start: Start::Fresh,
    };
    let mut paths: BTreeMap<String, &str> = BTreeMap::new();
    let mut name = |set: usize, path| {
        paths.insert(format!("/dev/fdset/{set}"), path);
    };
    for ((slot, _), path) in spec.disk_slots().zip(&files.disks) {
        name(disk_set(slot), path.as_str());
    }
    if let Some((code, variables)) = &files.flash {
        name(CODE_SET, code.as_str());
        name(VARIABLES_SET, variables.as_str());
    }
    if let Some(seed) = &files.seed {
        name(usize::from(seed::SET), seed.as_str());
    }
    let mut line = Vec::new();
    let mut rest = qemu_arguments(&spec, &resources)?.into_iter();
    while let Some(flag) = rest.next() {
        let value = if ALONE.contains(&flag.as_str()) { None } else { rest.next() };
        let value = match (flag.as_str(), value) {
            ("-S" | "-sandbox" | "-msg" | "-add-fd" | "-mon" | "-vnc", _) => continue,
            ("-chardev", Some(value)) => match channel(&value, files) {
                Some(value) => Some(value),
                None => continue,
            },
            ("-blockdev", Some(value)) => Some(node(&value, &paths)),
            ("-netdev", Some(value)) => Some(network(&value, files)),
            ("-kernel", _) => files.kernel.clone(),
            ("-initrd", _) => files.initrd.clone(),
            (_, value) => value,
        };
        line.push(flag);
        line.extend(value);
    }
    line.extend(["-mon", "chardev=console,mode=readline"].map(str::to_owned));
    if let Some(memory) = &files.memory {
        line.extend(["-incoming".to_owned(), format!("exec:cat {memory}")]);
    }
    Ok(line)
}

/// What is at the other end of one of the VM's channels; nothing of the monitor's.
fn channel(value: &str, files: &PlainFiles) -> Option<String> {
    let is = |id: &str| value.split(',').any(|part| part == format!("id={id}"));
    if is("console") {
        return Some("stdio,id=console,mux=on,signal=off".to_owned());
    }
    if is("tpm-control") {
        return files.tpm.as_ref().map(|path| format!("socket,id=tpm-control,path={}", path.replace(',', ",,")));
    }
    is("guest-agent").then(|| "null,id=guest-agent".to_owned())
}

/// What an interface is connected to. One that has run on a tap goes on with nothing else: what it says of its frames' checksums is understood by no other.
fn network(value: &str, files: &PlainFiles) -> String {
    let value = object(value);
    let id = value.get("id");
    match files.memory {
        Some(_) => json!({"type": "tap", "id": id, "script": "no", "downscript": "no", "vhost": false}).to_string(),
        None => json!({"type": "user", "id": id}).to_string(),
    }
}

fn object(value: &str) -> Map<String, Value> {
    serde_json::from_str(value).unwrap_or_default()
}

/// A node of the block layer, with its file's path; through the kernel's cache, which not every file system does without.
fn node(value: &str, paths: &BTreeMap<String, &str>) -> String {
    let mut node = object(value);
    if let Some(path) = node.get("filename").and_then(Value::as_str).and_then(|set| paths.get(set)) {
        node.insert("filename".to_owned(), json!(path));
    }
    // What is written may be kept apart.
    node.remove("backing");
    if let Some(cache) = node.get_mut("cache").and_then(Value::as_object_mut) {
        cache.insert("direct".to_owned(), json!(false));
    }
    Value::Object(node).to_string()
}
