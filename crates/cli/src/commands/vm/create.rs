//! `godwit vm create`: a spec from flags or a file.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use godwit_api::v1::{GoldenCreate, VmCreate, VmStart};
use godwit_model::spec::{MAX_NETWORK_CONFIG, MAX_USER_DATA};
use godwit_model::{
    Boot, Bytes, BytesPerSec, CacheMode, DiskFormat, DiskSpec, MacAddress, Millis, Name, NicSpec, Refusal, VmSpec, VolumeRef,
};
use serde_json::Value;

use crate::error::Failure;
use crate::output::print_data;
use crate::session::Session;

const FILE_HINT: &str = "write a VM's spec as JSON or YAML, as under `spec` in `godwit vm show NAME -o yaml`; sizes may have units";

/// What the VM is made of.
#[derive(Args)]
#[command(
    after_help = "A disk is POOL/VOLUME,format=raw|qcow2[,size=SIZE][,image=IMAGE][,cache=direct|writeback]. With a size the volume \
is created if it is missing, from an image if one is named; without, it must exist. The format is declared, never guessed.

An interface is NETWORK[,mac=ADDRESS]. Everything else of a spec (firmware, CD-ROMs, limits, cloud-init, ...) is written in a file.

Examples:
  godwit vm create web1 --memory 1GiB --vcpus 2 --kernel debian-kernel --initrd debian-initrd \\
      --cmdline 'console=ttyS0' --disk shared/web1,format=qcow2,size=10GiB --nic default --start
  godwit vm create web2 --memory 2GiB --disk shared/web2,format=qcow2,size=10GiB,image=debian
  godwit vm create web3 --file web3.yaml --start --host h2
  godwit vm create web4 --memory 1GiB --disk shared/web4,format=qcow2,size=10GiB,image=debian --nic default \\
      --user-data user-data.yaml --hostname web4"
)]
pub(crate) struct CreateArgs {
    /// Its name
    name: Name,
    /// Take the spec from this file, JSON or YAML; `-` for standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["memory", "memory_max", "vcpus", "kernel", "initrd", "cmdline", "disks", "nics", "machine", "cpu"])]
    file: Option<PathBuf>,
    /// RAM, such as 1GiB
    #[arg(long, value_name = "SIZE", required_unless_present = "file")]
    memory: Option<Bytes>,
    /// What memory can grow to while the VM runs, such as 8GiB [default: it cannot]
    #[arg(long, value_name = "SIZE")]
    memory_max: Option<Bytes>,
    /// Number of vCPUs
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    vcpus: u16,
    /// Image of a kernel to boot; without it the VM boots from its first disk
    #[arg(long, value_name = "IMAGE")]
    kernel: Option<Name>,
    /// Image of an initial ramdisk
    #[arg(long, value_name = "IMAGE", requires = "kernel")]
    initrd: Option<Name>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", requires = "kernel", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// A disk; can be repeated
    #[arg(long = "disk", value_name = "DISK", value_parser = parse_disk)]
    disks: Vec<DiskSpec>,
    /// A network interface; can be repeated
    #[arg(long = "nic", value_name = "INTERFACE", value_parser = parse_nic)]
    nics: Vec<NicSpec>,
    /// Machine type [default: the newest that every host knows]
    #[arg(long)]
    machine: Option<String>,
    /// CPU model [default: a baseline of the cluster]
    #[arg(long, value_name = "MODEL")]
    cpu: Option<String>,
    #[command(flatten)]
    seed: SeedArgs,
    /// Take a golden snapshot NAME-golden, once, when it is first started and its guest's agent answers
    #[arg(long)]
    golden: bool,
    /// Take it after so long at the latest, such as 5min [default: 60s]
    #[arg(long, value_name = "TIME", requires = "golden")]
    golden_after: Option<Millis>,
    /// Start it
    #[arg(long)]
    start: bool,
    /// Start it on this host
    #[arg(long, requires = "start")]
    host: Option<Name>,
}

/// What the guest is told by cloud-init (NoCloud). Files, since user data often holds passwords.
#[derive(Args, Default)]
#[command(next_help_heading = "cloud-init")]
struct SeedArgs {
    /// The guest's host name [default: the VM's name]
    #[arg(long, value_name = "HOST")]
    hostname: Option<Name>,
    /// User data from this file, at most 64 KiB
    #[arg(long, value_name = "FILE")]
    user_data: Option<PathBuf>,
    /// Network configuration from this file, at most 16 KiB
    #[arg(long, value_name = "FILE")]
    network_config: Option<PathBuf>,
    /// Vendor data from this file, at most 64 KiB
    #[arg(long, value_name = "FILE")]
    vendor_data: Option<PathBuf>,
}

impl SeedArgs {
    /// Whether any of them is given: then the VM gets a seed.
    fn is_given(&self) -> bool {
        self.hostname.is_some() || self.user_data.is_some() || self.network_config.is_some() || self.vendor_data.is_some()
    }

    fn add_to(self, spec: &mut VmSpec) -> Result<(), Failure> {
        if !self.is_given() {
            return Ok(());
        }
        let seed = spec.cloud_init.get_or_insert_default();
        let texts = [
            (self.user_data, &mut seed.user_data, MAX_USER_DATA),
            (self.network_config, &mut seed.network_config, MAX_NETWORK_CONFIG),
            (self.vendor_data, &mut seed.vendor_data, MAX_USER_DATA),
        ];
        for (path, text, longest) in texts {
            if let Some(path) = path {
                *text = Some(read_text(&path, longest)?);
            }
        }
        seed.host_name = self.hostname.or(seed.host_name.take());
        Ok(())
    }
}

/// Reads a file, and not a byte more than may be sent.
fn read_text(path: &Path, longest: usize) -> Result<String, Failure> {
    let refused = |source| Failure::File { action: "read", path: path.to_owned(), source };
    let mut text = String::new();
    std::fs::File::open(path).and_then(|file| file.take(longest as u64 + 1).read_to_string(&mut text)).map_err(refused)?;
    if text.len() > longest {
        let what = format!("{} has more than {longest} bytes", path.display());
        return Err(Failure::usage(what, "let user data fetch what is longer, with `#include` or a script"));
    }
    Ok(text)
}

pub(super) async fn run(session: &Session, args: CreateArgs) -> Result<(), Failure> {
    let (name, start, host) = (args.name.clone(), args.start, args.host.clone());
    let golden = args.golden.then_some(GoldenCreate { after: args.golden_after });
    let mut args = args;
    let seed = std::mem::take(&mut args.seed);
    let mut spec = match &args.file {
        Some(path) => read_spec(path)?,
        None => spec_of(args),
    };
    seed.add_to(&mut spec)?;
    spec.validate().map_err(|error| Failure::Refused(Refusal::from(error)))?;
    let mut vm = session.client.create_vm(&VmCreate { name: name.clone(), spec, golden }).await?;
    if start {
        let started = async {
            let task = session.client.start_vm(&name, &VmStart { host }).await?;
            session.wait(task, None).await
        };
        match started.await {
            Ok(_) => vm = session.client.vm(&name).await?,
            Err(failure @ Failure::StillRunning { .. }) => return Err(failure),
            Err(failure) => {
                failure.show();
                let done = format!("{name} was created, but not started");
                return Err(Failure::Halfway { done, hint: format!("`godwit vm start {name}` tries again") });
            }
        }
    }
    print_data(session.format, &vm, || match &vm.status.host {
        Some(host) if start => format!("{name} created, runs on {host}"),
        _ => format!("{name} created"),
    })
}

fn spec_of(args: CreateArgs) -> VmSpec {
    let boot = match args.kernel {
        Some(kernel) => Boot::Kernel { kernel, initrd: args.initrd, cmdline: args.cmdline.unwrap_or_default() },
        None => Boot::Disk,
    };
    VmSpec {
        memory_max: args.memory_max,
        disks: args.disks,
        nics: args.nics,
        machine: args.machine,
        cpu: args.cpu,
        // Memory is required unless there is a file.
        ..VmSpec::new(args.vcpus, args.memory.unwrap_or_default(), boot)
    }
}

fn read_spec(path: &Path) -> Result<VmSpec, Failure> {
    read_file(path).map(|(spec, _)| spec)
}

/// A spec from a file, with the revision of the VM that it was written from, if it says.
pub(super) fn read_file(path: &Path) -> Result<(VmSpec, Option<u64>), Failure> {
    let refused = |source| Failure::File { action: "read", path: path.to_owned(), source };
    let text = if path == Path::new("-") { std::io::read_to_string(std::io::stdin()) } else { std::fs::read_to_string(path) };
    parse_spec(&text.map_err(refused)?).map_err(|what| Failure::usage(format!("{}: {what}", path.display()), FILE_HINT))
}

/// Reads a spec, or a whole VM with a spec in it and its revision. JSON is YAML.
fn parse_spec(text: &str) -> Result<(VmSpec, Option<u64>), String> {
    let mut value: Value = serde_yaml_ng::from_str(text).map_err(|error| error.to_string())?;
    let mut revision = None;
    if let Some(inner) = value.get_mut("spec") {
        let inner = inner.take();
        revision = value.get("revision").and_then(Value::as_u64);
        value = inner;
    }
    read_size(&mut value, "memory")?;
    read_size(&mut value, "memory_max")?;
    for disk in value.get_mut("disks").and_then(Value::as_array_mut).into_iter().flatten() {
        read_size(disk, "size")?;
        if let Some(limits) = disk.get_mut("io_limits") {
            ["rate", "read_rate", "write_rate"].iter().try_for_each(|key| read_rate(limits, key))?;
        }
    }
    Ok((serde_json::from_value(value).map_err(|error| error.to_string())?, revision))
}

/// Makes a rate with a unit a number of bytes per second.
fn read_rate(value: &mut Value, key: &str) -> Result<(), String> {
    if let Some(rate) = value.get_mut(key)
        && let Some(text) = rate.as_str()
    {
        let bytes: BytesPerSec = text.parse().map_err(|error| format!("{key}: {error}"))?;
        *rate = bytes.get().into();
    }
    Ok(())
}

/// Makes a size with a unit a number of bytes.
fn read_size(value: &mut Value, key: &str) -> Result<(), String> {
    if let Some(size) = value.get_mut(key)
        && let Some(text) = size.as_str()
    {
        let bytes: Bytes = text.parse().map_err(|error| format!("{key}: {error}"))?;
        *size = bytes.get().into();
    }
    Ok(())
}

/// Keys with their values.
type Pairs<'a> = Vec<(&'a str, &'a str)>;

/// Splits `first,key=value,…` and checks the keys.
fn parts<'a>(text: &'a str, keys: &[&str]) -> Result<(&'a str, Pairs<'a>), String> {
    let mut fields = text.split(',');
    let first = fields.next().unwrap_or_default();
    let mut pairs = Pairs::new();
    for field in fields {
        let (key, value) = field.split_once('=').ok_or_else(|| format!("{field:?} is not key=value"))?;
        if !keys.contains(&key) {
            return Err(format!("{key:?} is none of {}", keys.join(", ")));
        }
        if pairs.iter().any(|(other, _)| *other == key) {
            return Err(format!("{key} is given twice"));
        }
        pairs.push((key, value));
    }
    Ok((first, pairs))
}

fn parsed<T: FromStr<Err: std::fmt::Display>>(pairs: &[(&str, &str)], key: &str) -> Result<Option<T>, String> {
    let found = pairs.iter().find(|(other, _)| *other == key);
    found.map(|(_, value)| value.parse().map_err(|error| format!("{key}: {error}"))).transpose()
}

pub(super) fn parse_disk(text: &str) -> Result<DiskSpec, String> {
    let (volume, pairs) = parts(text, &["format", "size", "image", "cache"])?;
    let word = |key| pairs.iter().find(|(other, _)| *other == key).map(|(_, value)| *value);
    let format = match word("format") {
        Some("raw") => DiskFormat::Raw,
        Some("qcow2") => DiskFormat::Qcow2,
        Some(other) => return Err(format!("{other:?} is no format: write format=raw or format=qcow2")),
        None => return Err("say what it is: format=raw or format=qcow2".to_owned()),
    };
    let cache = match word("cache") {
        None | Some("direct") => CacheMode::Direct,
        Some("writeback") => CacheMode::Writeback,
        Some(other) => return Err(format!("{other:?} is no cache mode: write cache=direct or cache=writeback")),
    };
    let volume: VolumeRef = volume.parse().map_err(|error| format!("{error}"))?;
    let (size, image) = (parsed::<Bytes>(&pairs, "size")?, parsed::<Name>(&pairs, "image")?);
    Ok(DiskSpec { cache, size, image, ..DiskSpec::new(volume, format) })
}

pub(super) fn parse_nic(text: &str) -> Result<NicSpec, String> {
    let (network, pairs) = parts(text, &["mac"])?;
    let network = network.parse().map_err(|error| format!("{error}"))?;
    Ok(NicSpec { mac: parsed::<MacAddress>(&pairs, "mac")?, ..NicSpec::new(network) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_read_from_files_and_bounded() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = |name: &str, length: usize| {
            let path = dir.path().join(name);
            std::fs::write(&path, "x".repeat(length)).expect("written");
            Some(path)
        };
        let disk = || VmSpec::new(1, Bytes::GIB, Boot::Disk);
        let mut spec = disk();
        SeedArgs::default().add_to(&mut spec).expect("nothing to do");
        assert_eq!(spec.cloud_init, None);
        let hostname = Some(Name::new("inside").expect("name"));
        SeedArgs { hostname, user_data: file("u", MAX_USER_DATA), network_config: file("n", 3), vendor_data: None }
            .add_to(&mut spec)
            .expect("a seed");
        let seed = spec.cloud_init.expect("a seed");
        assert_eq!((seed.user_data.map(|text| text.len()), seed.network_config.as_deref()), (Some(MAX_USER_DATA), Some("xxx")));
        assert_eq!((seed.vendor_data, seed.host_name.map(|name| name.to_string())), (None, Some("inside".to_owned())));
        for bad in [
            SeedArgs { user_data: file("u", MAX_USER_DATA + 1), ..SeedArgs::default() },
            SeedArgs { network_config: file("n", MAX_NETWORK_CONFIG + 1), ..SeedArgs::default() },
            SeedArgs { vendor_data: Some(dir.path().join("none")), ..SeedArgs::default() },
            SeedArgs { vendor_data: Some("/dev/zero".into()), ..SeedArgs::default() },
        ] {
            assert!(bad.add_to(&mut disk()).is_err());
        }
    }

    #[test]
    fn disks_are_read_strictly() {
        let disk = parse_disk("shared/web1,format=qcow2,size=1GiB,image=debian,cache=writeback").expect("a disk");
        assert_eq!(
            (disk.volume.to_string().as_str(), disk.format, disk.cache),
            ("shared/web1", DiskFormat::Qcow2, CacheMode::Writeback)
        );
        assert_eq!((disk.size, disk.image), (Some(Bytes::GIB), Some(Name::new("debian").expect("name"))));
        assert_eq!(parse_disk("a/b,format=raw").expect("a disk").cache, CacheMode::Direct);
        for bad in [
            "shared/web1",
            "web1,format=raw",
            "/etc/passwd,format=raw",
            "a/b,format=vmdk",
            "a/b,format=raw,format=raw",
            "a/b,format=raw,size=1.5G",
            "a/b,format=raw,readonly",
            "a/b,format=raw,file=x",
            "a/b,format=raw,image=../x",
            "",
        ] {
            assert!(parse_disk(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn interfaces_are_read_strictly() {
        let nic = parse_nic("default,mac=52:54:00:00:00:01").expect("an interface");
        assert_eq!(nic.mac.map(|mac| mac.to_string()).as_deref(), Some("52:54:00:00:00:01"));
        for bad in ["", "default,mac=1", "default,model=e1000", "a/b"] {
            assert!(parse_nic(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn a_spec_is_read_from_yaml_json_and_from_a_whole_vm() {
        let yaml = "vcpus: 2\nmemory: 512MiB\nmemory_max: 2GiB\nboot: {from: disk}\ndisks:\n- {volume: shared/a, format: raw, size: 1GiB}\n";
        let (spec, _) = parse_spec(yaml).expect("a spec");
        assert_eq!((spec.vcpus, spec.memory, spec.disks[0].size), (2, Bytes::mib(512), Some(Bytes::GIB)));
        assert_eq!(spec.memory_max, Some(Bytes(2 << 30)));
        let json = serde_json::to_string(&spec).expect("JSON");
        assert_eq!(parse_spec(&json), Ok((spec.clone(), None)));
        assert_eq!(parse_spec(&format!("{{\"name\": \"x\", \"revision\": 7, \"spec\": {json}}}")), Ok((spec, Some(7))));
        let limited = yaml.replace("size: 1GiB}", "size: 1GiB, io_limits: {rate: 10MiB/s}}");
        let (spec, _) = parse_spec(&limited).expect("a spec");
        assert_eq!(spec.disks[0].io_limits.rate, Some(BytesPerSec(10 << 20)));
        for bad in [
            "",
            "[]",
            "vcpus: 2",
            "memory: lots\nvcpus: 1\nboot: {from: disk}",
            "vcpus: 1\nmemory: 1GiB\nboot: {from: disk}\nfoo: 1",
        ] {
            assert!(parse_spec(bad).is_err(), "{bad:?} was accepted");
        }
    }
}
