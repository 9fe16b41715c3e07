//! What the guest is told at its first boot: the disk labelled `cidata`, as cloud-init's NoCloud source reads it.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use godwit_guest::host_name_of;
use rustix::mount::{MountFlags, mount};
use rustix::system::sethostname;

/// Where it is mounted, for those who look into the guest.
const PLACE: &str = "/seed";
/// Of an ISO 9660 file system: where its volume descriptor has the label.
const LABEL: (u64, usize) = (0x8028, 32);

/// Takes the host name that the seed gives, if there is a seed.
pub(crate) fn take() -> Result<Option<String>, String> {
    let Some(device) = find() else { return Ok(None) };
    fs::create_dir_all(PLACE).map_err(|error| format!("seed: {PLACE}: {error}"))?;
    mount(&device, PLACE, "iso9660", MountFlags::RDONLY, None).map_err(|error| format!("seed: {}: {error}", device.display()))?;
    let file = Path::new(PLACE).join("meta-data");
    let text = fs::read_to_string(&file).map_err(|error| format!("seed: {}: {error}", file.display()))?;
    let name = host_name_of(&text).ok_or("seed: meta-data gives no local-hostname")?;
    sethostname(name.as_bytes()).map_err(|error| format!("seed: host name {name}: {error}"))?;
    Ok(Some(name))
}

fn find() -> Option<PathBuf> {
    let devices = fs::read_dir("/sys/class/block").ok()?;
    devices.flatten().map(|entry| Path::new("/dev").join(entry.file_name())).find(|device| is_seed(device).unwrap_or(false))
}

fn is_seed(device: &Path) -> std::io::Result<bool> {
    let (offset, length) = LABEL;
    let mut label = vec![0; length];
    let mut file = fs::File::open(device)?;
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(&mut label)?;
    Ok(String::from_utf8_lossy(&label).trim().eq_ignore_ascii_case("cidata"))
}
