//! The seed: the small read-only disk from which cloud-init (NoCloud) learns what a guest shall be, made from the spec that the VM was started with.
//!
//! It often holds passwords: it is never a file, only memory that QEMU is handed as a descriptor, and nothing of it is logged. The same spec makes
//! the same bytes on every host, so that a VM that moves finds the disk that it knew.

mod iso;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use godwit_model::{CloudInit, Name, VmId};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};

use iso::{IsoFile, write_iso};

/// By this label cloud-init finds it.
const LABEL: &str = "cidata";
/// What a guest gets that is told nothing: without this file the seed would not count as one.
const NOTHING: &str = "#cloud-config\n{}\n";
/// Longest host name.
const LONGEST_HOST_NAME: usize = 63;

/// The content of a VM's seed.
pub(crate) fn image(vm: VmId, name: &Name, cloud_init: &CloudInit) -> Vec<u8> {
    let host_name = cloud_init.host_name.as_ref().map_or_else(|| host_name_of(name), |name| name.as_str().to_owned());
    // In quotes: a name such as `1e5` or `no` is something else in YAML.
    let meta_data = format!("instance-id: \"{vm}\"\nlocal-hostname: \"{host_name}\"\n");
    let user_data = cloud_init.user_data.as_deref().unwrap_or(NOTHING);
    let texts = [
        ("meta-data", Some(meta_data.as_str())),
        ("user-data", Some(user_data)),
        ("vendor-data", cloud_init.vendor_data.as_deref()),
        ("network-config", cloud_init.network_config.as_deref()),
    ];
    let files: Vec<_> =
        texts.iter().filter_map(|(name, text)| text.map(|text| IsoFile { name, content: text.as_bytes() })).collect();
    write_iso(LABEL, &files)
}

/// A VM's name as a host name, which has no underscores and ends with a letter or digit.
fn host_name_of(name: &Name) -> String {
    let fit: String = name.as_str().chars().map(|c| if c == '_' { '-' } else { c }).take(LONGEST_HOST_NAME).collect();
    let parts: Vec<&str> = fit.split('.').map(|part| part.trim_matches('-')).filter(|part| !part.is_empty()).collect();
    parts.join(".")
}

/// Memory with this content, to be read only: sealed, and without a name in any file system.
pub(crate) fn descriptor(image: &[u8]) -> io::Result<OwnedFd> {
    let memory = rustix::fs::memfd_create(c"godwit-seed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(memory);
    file.write_all(image)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    // QEMU looks for a descriptor with just the access that it needs.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, SeekFrom};
    use std::process::Command;

    use super::*;

    fn name(text: &str) -> Name {
        Name::new(text).expect("name")
    }

    fn full() -> CloudInit {
        let user_data = format!("#cloud-config\npassword: hunter2\n# {}\n", "x".repeat(10_000));
        CloudInit {
            user_data: Some(user_data),
            network_config: Some("version: 2\n".into()),
            vendor_data: Some("#cloud-config\nlocale: C\n".into()),
            host_name: Some(name("inside.example")),
        }
    }

    fn seed(cloud_init: &CloudInit) -> Vec<u8> {
        image(VmId::new(uuid::Uuid::from_u128(0x1111_2222)), &name("web_1"), cloud_init)
    }

    fn said(program: &str, arguments: &[&str], file: &std::path::Path) -> String {
        let output = Command::new(program).args(arguments).arg(file).output().expect("scripts/setup installs it");
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    /// The bytes are part of what a VM sees for life: a change of them shows here, and must not happen by accident.
    #[test]
    fn golden_the_same_spec_makes_the_same_bytes_for_ever() {
        let digests = [full(), CloudInit::default()].map(|spec| blake3::hash(&seed(&spec)).to_hex()[..16].to_owned());
        assert_eq!(digests, ["1a380aea6f78b847", "a469db03e23742f1"]);
    }

    #[test]
    fn other_programs_read_the_label_and_the_files() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("seed.iso");
        std::fs::write(&path, seed(&full())).expect("written");
        assert_eq!(said("/usr/sbin/blkid", &["-o", "value", "-s", "LABEL", "-s", "TYPE"], &path), "cidata\niso9660\n");
        for joliet in [&["-f", "-J", "-i"][..], &["-f", "-i"]] {
            let listed = said("isoinfo", joliet, &path);
            let mut names: Vec<String> = listed.lines().map(|line| line.trim_end_matches(".;1").to_lowercase()).collect();
            names.sort_unstable();
            assert_eq!(names, ["/meta-data", "/network-config", "/user-data", "/vendor-data"], "{joliet:?}");
        }
        let read = |file: &str| said("isoinfo", &["-J", "-x", file, "-i"], &path);
        assert_eq!(
            read("/meta-data"),
            "instance-id: \"00000000-0000-0000-0000-000011112222\"\nlocal-hostname: \"inside.example\"\n"
        );
        assert_eq!(Some(read("/user-data")), full().user_data);
        assert_eq!(Some(read("/vendor-data")), full().vendor_data);
        assert_eq!(read("/network-config"), "version: 2\n");
    }

    #[test]
    fn a_guest_that_is_told_nothing_still_has_a_name_and_a_seed() {
        let image = seed(&CloudInit::default());
        let text = String::from_utf8_lossy(&image);
        assert!(text.contains("local-hostname: \"web-1\"") && text.contains(NOTHING) && !text.contains("NETWORK-CONFIG"));
        for (vm, host) in [("a", "a"), ("a_b", "a-b"), ("a_", "a"), ("a.-b", "a.b"), ("a..b", "a.b"), ("0", "0")] {
            assert_eq!(host_name_of(&name(vm)), host);
        }
    }

    #[test]
    fn what_qemu_is_handed_can_be_read_and_by_nobody_be_written() {
        let image = seed(&full());
        let mut file = File::from(descriptor(&image).expect("memory"));
        let mut read = Vec::new();
        file.seek(SeekFrom::Start(0)).expect("at the start");
        file.read_to_end(&mut read).expect("readable");
        assert_eq!(read, image);
        assert!(file.write_all(b"x").is_err());
        let again = std::fs::OpenOptions::new().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        assert!(again.and_then(|mut file| file.write_all(b"x")).is_err(), "sealed");
        let target = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("a link");
        assert!(target.to_string_lossy().starts_with("/memfd:"), "{target:?}");
    }
}
