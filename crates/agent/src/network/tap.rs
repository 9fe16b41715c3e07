//! Taps: the host's end of a VM's interface. One lives as long as its last descriptor, which QEMU holds.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use godwit_model::VmId;
use rustix::fs::{Mode, OFlags, open};

/// Names of taps begin with this.
pub(super) const PREFIX: &str = "gwt";

/// Makes a tap that hands out frames with a virtio header and returns it with its name: `gwt`, 8 digits of the VM, its slot, and one
/// letter more if that name is taken (two VMs may share 8 digits; a QEMU that is about to end still holds its tap).
pub(super) fn create(vm: VmId, slot: usize) -> io::Result<(OwnedFd, String)> {
    let head = format!("{:.8}", vm.uuid().simple().to_string());
    let suffixes = std::iter::once(String::new()).chain(('a'..='z').map(String::from));
    let mut last = io::ErrorKind::AddrInUse.into();
    for suffix in suffixes {
        let name = format!("{PREFIX}{head}{slot}{suffix}");
        let tap = open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?;
        match attach(&tap, &request(&name)?) {
            Ok(()) => return Ok((tap, name)),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // Exclusively: a tap of this name that exists is another's.
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    // The flags have 16 bits in this structure.
    let ifr_ifru = libc::__c_anonymous_ifr_ifru { ifru_flags: flags as i16 };
    Ok(libc::ifreq { ifr_name, ifr_ifru })
}

#[expect(unsafe_code, reason = "rustix has no ioctls of taps")]
fn attach(tap: &OwnedFd, request: &libc::ifreq) -> io::Result<()> {
    let mut request = *request;
    // SAFETY: the descriptor is open; TUNSETIFF reads and writes one `struct ifreq`, of which this is a copy.
    let result: c_int = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
