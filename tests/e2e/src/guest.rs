//! A test guest as a test asks for it, and as the harness knows it once it runs.

use std::net::{Ipv4Addr, SocketAddr};

use godwit_lab::layout::OUTSIDE_GUEST_ADDRESS;
use godwit_model::{Boot, Bytes, CloudInit, DiskSpec, Name, NicSpec, VmId, VmSpec};

use crate::outside::WITNESS_PORT;

/// What a guest shall be like.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    /// Its name, also in the witness's records.
    pub name: String,
    /// RAM.
    pub memory: Bytes,
    /// vCPUs.
    pub vcpus: u16,
    /// Disks.
    pub disks: Vec<DiskSpec>,
    /// What else its spec says, applied in this order.
    pub shapes: Vec<fn(&mut VmSpec)>,
    /// Words for its kernel itself, beside those that all have.
    pub words: Vec<String>,
    /// Words `KEY=VALUE` for the guest, without their `guest.`.
    pub knobs: Vec<String>,
    /// What its seed holds.
    pub cloud_init: Option<CloudInit>,
    /// Whether its interface may use its own IP address only.
    pub addressed: bool,
}

/// A guest that was created.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Its name.
    pub name: Name,
    /// Its identity.
    pub id: VmId,
    /// Its address in the default network.
    pub address: Ipv4Addr,
    /// Its network interfaces.
    pub nics: usize,
}

/// The words for the kernel itself.
const KERNEL_WORDS: &str = "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on";

/// The command line of a guest's kernel; `words` and `knobs` are those of [`GuestSpec`].
pub(crate) fn command_line(id: &str, address: Ipv4Addr, words: &[String], knobs: &[String]) -> String {
    let witness = SocketAddr::from((OUTSIDE_GUEST_ADDRESS, WITNESS_PORT));
    let own = [format!("id={id}"), format!("ip={address}/24"), format!("witness={witness}")];
    let guest = own.iter().chain(knobs).map(|word| format!("guest.{word}"));
    [KERNEL_WORDS.to_owned()].into_iter().chain(words.iter().cloned()).chain(guest).collect::<Vec<_>>().join(" ")
}

impl GuestSpec {
    /// A guest that costs little: one vCPU, 192 MiB, 64 MiB under test, slowly dirtied.
    #[must_use]
    pub fn small(name: &str) -> Self {
        let knobs = ["touch_total=64M", "working_set=4M", "dirty=256K", "check=16M", "tcp_rate=256K"];
        Self {
            name: name.to_owned(),
            memory: Bytes::mib(192),
            vcpus: 1,
            disks: Vec::new(),
            shapes: Vec::new(),
            words: Vec::new(),
            knobs: knobs.map(ToOwned::to_owned).to_vec(),
            cloud_init: None,
            addressed: false,
        }
    }

    /// A guest that does nothing but check a little and answer: QEMU is then ready for its own switch-over at once.
    #[must_use]
    pub fn idle(name: &str) -> Self {
        Self::small(name).knob("dirty=0").knob("check=1M").knob("witness_every=1000")
    }

    /// Adds a word `KEY=VALUE`; the last one of a key counts.
    #[must_use]
    pub fn knob(mut self, word: &str) -> Self {
        self.knobs.push(word.to_owned());
        self
    }

    /// With an interface that may use its own IP address only.
    #[must_use]
    pub fn addressed(mut self) -> Self {
        self.addressed = true;
        self
    }

    /// With this much RAM.
    #[must_use]
    pub fn memory(mut self, memory: Bytes) -> Self {
        self.memory = memory;
        self
    }

    /// With this many vCPUs.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u16) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// With what `shape` does to its spec.
    #[must_use]
    pub fn shape(mut self, shape: fn(&mut VmSpec)) -> Self {
        self.shapes.push(shape);
        self
    }

    /// With a seed.
    #[must_use]
    pub fn cloud_init(mut self, cloud_init: CloudInit) -> Self {
        self.cloud_init = Some(cloud_init);
        self
    }

    /// With one disk more.
    #[must_use]
    pub fn disk(mut self, disk: DiskSpec) -> Self {
        self.disks.push(disk);
        self
    }

    /// What the controller is asked for.
    pub fn vm_spec(&self, address: Ipv4Addr, kernel: &Name, initrd: &Name) -> VmSpec {
        let boot = Boot::Kernel {
            kernel: kernel.clone(),
            initrd: Some(initrd.clone()),
            cmdline: command_line(&self.name, address, &self.words, &self.knobs),
        };
        let mut spec = VmSpec {
            disks: self.disks.clone(),
            nics: vec![NicSpec {
                addresses: if self.addressed { vec![address.into()] } else { Vec::new() },
                ..NicSpec::new(Name::new("default").expect("a name"))
            }],
            cloud_init: self.cloud_init.clone(),
            ..VmSpec::new(self.vcpus, self.memory, boot)
        };
        self.shapes.iter().for_each(|shape| shape(&mut spec));
        spec
    }
}

#[cfg(test)]
mod tests {
    use godwit_guest::Knobs;

    use super::*;

    #[test]
    fn the_guest_understands_every_word() {
        let (kernel, initrd) = (Name::new("k").unwrap(), Name::new("i").unwrap());
        for spec in [GuestSpec::small("a1"), GuestSpec::idle("a1").knob("check=2M")] {
            let Boot::Kernel { cmdline, .. } = spec.vm_spec(Ipv4Addr::new(10, 99, 0, 12), &kernel, &initrd).boot else {
                panic!("boots a kernel")
            };
            let knobs = Knobs::parse(&cmdline).unwrap();
            assert_eq!(knobs.id, "a1");
            assert_eq!(knobs.ip, Some((Ipv4Addr::new(10, 99, 0, 12), 24)));
            assert_eq!(knobs.witness, Some(SocketAddr::from((OUTSIDE_GUEST_ADDRESS, WITNESS_PORT))));
        }
    }
}
