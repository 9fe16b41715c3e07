//! What an init does first: kernel file systems and modules.

use std::fs;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::system::finit_module;

/// Made by `scripts/guest-image`: the modules, and a file `order` with one file name a line.
const MODULES: &str = "/lib/modules/guest";

/// Mounts proc, sys and dev.
pub(crate) fn mount_all() -> Result<(), Errno> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        match mount(kind, target, kind, MountFlags::empty(), None) {
            // The kernel may have mounted dev itself.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Loads all modules in order; returns what went wrong. A guest without one device can still do without.
pub(crate) fn load_modules() -> Vec<String> {
    let order = match fs::read_to_string(Path::new(MODULES).join("order")) {
        Ok(order) => order,
        Err(error) => return vec![format!("no modules: {error}")],
    };
    let load = |name: &str| -> std::io::Result<()> {
        let file = fs::File::open(Path::new(MODULES).join(name))?;
        match finit_module(&file, c"", 0) {
            // Loaded or built in; or no such device here.
            Ok(()) | Err(Errno::EXIST | Errno::NODEV) => Ok(()),
            Err(error) => Err(error.into()),
        }
    };
    order.lines().filter_map(|name| load(name).err().map(|error| format!("module {name}: {error}"))).collect()
}

/// Bytes that may be allocated without harm.
pub(crate) fn available_memory() -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? << 10)
}
