//! Sends a record to the witness every few milliseconds, for as long as this copy of the VM runs.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use godwit_guest::{Knobs, Noise, WitnessRecord, host_generation};
use rustix::fs::OFlags;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::counters::Counters;
use crate::{now, thread};

/// The file that [`host_generation`] reads.
const GENERATION: &str = "/sys/firmware/qemu_fw_cfg/by_name/opt/godwit/generation/raw";

/// Starts sending.
pub(crate) fn start(knobs: &Knobs, to: SocketAddr, boot: u128, counters: &Arc<Counters>) -> std::io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // A network that is down must not hold up the counter.
    socket.set_write_timeout(Some(Duration::from_millis(1)))?;
    let (id, every, counters) = (knobs.id.clone(), knobs.witness_every, Arc::clone(counters));
    thread("witness", move || {
        let mut device = host_random();
        let has_generation = std::path::Path::new(GENERATION).exists();
        let mut next = now();
        loop {
            counters.counter.add(1);
            if has_generation {
                let file = std::fs::read(GENERATION).unwrap_or_default();
                counters.generation.set(host_generation(&file).unwrap_or(0));
            }
            let record = WitnessRecord {
                id: id.clone(),
                boot,
                generation: counters.generation.get(),
                counter: counters.counter.get(),
                nonce: nonce(device.as_mut()),
                monotonic: now(),
            };
            if socket.send_to(&record.encode(), to).is_err() {
                counters.witness_failed.add(1);
            }
            next = (next + every).max(now());
            std::thread::sleep(next.saturating_sub(now()));
        }
    })
}

/// Unlike in any other copy of this VM: the kernel's generator is copied with the RAM, but not the moment of the call, and
/// not what the host's random device gives.
pub(crate) fn nonce(device: Option<&mut File>) -> u64 {
    let (mut kernel, mut host) = ([0; 8], [0; 8]);
    // INSECURE: never waits for entropy at boot. Without any of the sources the others still differ.
    let _ = getrandom(&mut kernel[..], GetRandomFlags::INSECURE);
    if let Some(device) = device {
        let _ = device.read(&mut host);
    }
    let moment = now().as_nanos() as u64;
    let mut noise = Noise::new(u64::from_ne_bytes(kernel) ^ u64::from_ne_bytes(host).rotate_left(7));
    Noise::new(noise.next_word() ^ moment).next_word()
}

fn host_random() -> Option<File> {
    OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open("/dev/hwrng").ok()
}
