//! The proof that a VM ran in one place at a time: records that it sends all the time, and who watches them from outside.
//!
//! A counter in the guest's RAM is raised before each record, and each record carries a nonce. Two runners of one VM start from
//! the same RAM and so send the same counters, but not with the same nonces. One runner never does that.

use std::collections::BTreeMap;
use std::time::Duration;

const MAGIC: [u8; 4] = *b"GWIT";
const VERSION: u8 = 1;
const LONGEST_ID: usize = 64;
/// Magic, version and length of the id; after the id boot, generation, counter, nonce, time.
const HEAD: usize = 6;
const TAIL: usize = 16 + 4 * 8;

/// One datagram to the witness.
///
/// Numbers are little-endian: `GWIT`, version 1, length of the id, the id, boot (16 bytes), generation, counter, nonce, time
/// in nanoseconds (8 bytes each).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WitnessRecord {
    /// Name of the VM, up to 64 bytes.
    pub id: String,
    /// Made up by the guest at boot.
    pub boot: u128,
    /// What the host of this runner says ([`host_generation`]); 0 where it says nothing.
    pub generation: u64,
    /// Raised by one before each record.
    pub counter: u64,
    /// Unlike in any other record. The guest's random generator alone would not do, a copy of the VM has the same:
    /// the time of sending and the host's random device are mixed in.
    pub nonce: u64,
    /// CLOCK_MONOTONIC of the guest at the time of sending.
    pub monotonic: Duration,
}

/// Why a datagram is no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Not ours.
    #[error("does not start with GWIT")]
    Foreign,
    /// Of a version that is not known.
    #[error("version {found} of the record is unknown")]
    Version {
        /// The version.
        found: u8,
    },
    /// Too short or too long.
    #[error("{found} bytes, not {expected}")]
    Length {
        /// Bytes it should have.
        expected: usize,
        /// Bytes it has.
        found: usize,
    },
    /// The id is too long or not text.
    #[error("the id is not a text of up to 64 bytes")]
    Id,
}

impl WitnessRecord {
    /// The datagram. An id over 64 bytes is cut.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let id = &self.id.as_bytes()[..self.id.floor_char_boundary(LONGEST_ID)];
        let mut bytes = Vec::with_capacity(HEAD + id.len() + TAIL);
        bytes.extend(MAGIC);
        bytes.extend([VERSION, id.len() as u8]);
        bytes.extend(id);
        bytes.extend(self.boot.to_le_bytes());
        for number in [self.generation, self.counter, self.nonce, nanos(self.monotonic)] {
            bytes.extend(number.to_le_bytes());
        }
        bytes
    }

    /// Reads a datagram; any bytes may be given.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let rest = bytes.strip_prefix(&MAGIC).ok_or(RecordError::Foreign)?;
        let too_short = RecordError::Length { expected: HEAD + TAIL, found: bytes.len() };
        let (&[version, length], rest) = rest.split_first_chunk().ok_or(too_short)?;
        if version != VERSION {
            return Err(RecordError::Version { found: version });
        }
        let length = usize::from(length);
        if length > LONGEST_ID {
            return Err(RecordError::Id);
        }
        let wrong_length = RecordError::Length { expected: HEAD + length + TAIL, found: bytes.len() };
        if bytes.len() != HEAD + length + TAIL {
            return Err(wrong_length);
        }
        let (id, rest) = rest.split_at_checked(length).ok_or(wrong_length)?;
        let (boot, rest) = rest.split_first_chunk().ok_or(wrong_length)?;
        let &[generation, counter, nonce, monotonic] = rest.as_chunks().0 else { return Err(wrong_length) };
        Ok(Self {
            id: str::from_utf8(id).map_err(|_| RecordError::Id)?.to_owned(),
            boot: u128::from_le_bytes(*boot),
            generation: u64::from_le_bytes(generation),
            counter: u64::from_le_bytes(counter),
            nonce: u64::from_le_bytes(nonce),
            monotonic: Duration::from_nanos(u64::from_le_bytes(monotonic)),
        })
    }
}

/// Reads the generation out of the fw_cfg file that QEMU was started with:
/// `-fw_cfg name=opt/godwit/generation,string=godwit-0000000000000007` (16 hexadecimal digits).
///
/// fw_cfg does not move with a VM, so the file tells runners apart. A guest asks for it by a number and a length that it
/// learned at boot, and after a move to another version of QEMU the number may be another file's: hence the fixed form.
#[must_use]
pub fn host_generation(file: &[u8]) -> Option<u64> {
    let digits = file.strip_prefix(b"godwit-")?;
    let good = digits.len() == 16 && digits.iter().all(u8::is_ascii_hexdigit);
    u64::from_str_radix(str::from_utf8(digits).ok()?, 16).ok().filter(|_| good)
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// What a witness knows about all the VMs that it heard.
#[derive(Debug, Clone, Default)]
pub struct WitnessLog {
    vms: BTreeMap<String, VmWitness>,
    rejected: u64,
}

/// What a witness knows about one VM.
#[derive(Debug, Clone)]
pub struct VmWitness {
    /// Records that came.
    pub records: u64,
    /// Records that cannot be of one runner. Anything but 0 means that the VM ran twice.
    pub interleaved: u64,
    /// The same datagram again: the network's doing.
    pub duplicates: u64,
    /// Records that came after later ones: the network's doing.
    pub reordered: u64,
    /// Counters that never came.
    pub missing: u64,
    /// Boots seen after the first.
    pub reboots: u64,
    /// The longest time without a record.
    pub longest_gap: Duration,
    /// Counter of the newest record.
    pub counter: u64,
    /// The newest generation, 0 where the host says nothing.
    pub generation: u64,
    /// The counter at which the generation was first seen.
    generation_since: u64,
    boot: u128,
    earlier_boots: Vec<u128>,
    /// When the newest record came.
    pub last_received: Duration,
    /// Counters and their nonces, at the place of the counter modulo the length.
    seen: Vec<Option<(u64, u64)>>,
}

impl WitnessLog {
    /// VMs that are kept apart: datagrams may come from anybody.
    const MOST_VMS: usize = 1024;

    /// Nothing heard yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { vms: BTreeMap::new(), rejected: 0 }
    }

    /// Takes a datagram that came at `received` (a monotonic clock of the witness).
    pub fn consume_datagram(&mut self, bytes: &[u8], received: Duration) {
        match WitnessRecord::decode(bytes) {
            Ok(record) => self.consume(&record, received),
            Err(_) => self.rejected += 1,
        }
    }

    /// Takes a record that came at `received`.
    pub fn consume(&mut self, record: &WitnessRecord, received: Duration) {
        if let Some(vm) = self.vms.get_mut(&record.id) {
            vm.consume(record, received);
        } else if self.vms.len() < Self::MOST_VMS {
            self.vms.insert(record.id.clone(), VmWitness::first(record, received));
        } else {
            self.rejected += 1;
        }
    }

    /// The VM was turned back on purpose: it says once more what it has said, and what was heard of it before is nothing to judge it by.
    pub fn forget(&mut self, id: &str) {
        self.vms.remove(id);
    }

    /// What is known about the VM with this id.
    #[must_use]
    pub fn vm(&self, id: &str) -> Option<&VmWitness> {
        self.vms.get(id)
    }

    /// All VMs by id.
    pub fn vms(&self) -> impl Iterator<Item = (&str, &VmWitness)> {
        self.vms.iter().map(|(id, vm)| (id.as_str(), vm))
    }

    /// Records of all VMs.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.vms.values().map(|vm| vm.records).sum()
    }

    /// Interleaved records of all VMs: 0, or a VM ran twice.
    #[must_use]
    pub fn interleaved(&self) -> u64 {
        self.vms.values().map(|vm| vm.interleaved).sum()
    }

    /// Datagrams that were no records, or of too many VMs.
    #[must_use]
    pub const fn rejected(&self) -> u64 {
        self.rejected
    }
}

impl VmWitness {
    /// Records of which the nonces are remembered: 40 s of one each 10 ms.
    const WINDOW: usize = 4096;
    /// How far behind the newest a record may come without being a counter that went back: 2.5 s.
    const REORDERING: u64 = 256;
    const MOST_BOOTS: usize = 64;

    fn first(record: &WitnessRecord, received: Duration) -> Self {
        let mut vm = Self {
            records: 1,
            interleaved: 0,
            duplicates: 0,
            reordered: 0,
            missing: 0,
            reboots: 0,
            longest_gap: Duration::ZERO,
            counter: record.counter,
            generation: record.generation,
            generation_since: record.counter,
            boot: record.boot,
            earlier_boots: Vec::new(),
            last_received: received,
            seen: vec![None; Self::WINDOW],
        };
        vm.remember(record);
        vm
    }

    fn consume(&mut self, record: &WitnessRecord, received: Duration) {
        self.records += 1;
        self.longest_gap = self.longest_gap.max(received.saturating_sub(self.last_received));
        self.last_received = self.last_received.max(received);
        if record.boot != self.boot {
            return self.other_boot(record);
        }
        match *self.place(record.counter) {
            Some((counter, nonce)) if counter == record.counter => {
                if nonce == record.nonce {
                    self.duplicates += 1;
                } else {
                    self.interleaved += 1;
                }
                return;
            }
            _ => {}
        }
        let known = record.generation != 0;
        if known && record.generation < self.generation && record.counter > self.generation_since {
            // Somebody goes on although a newer generation already sends.
            self.interleaved += 1;
        } else if record.counter > self.counter {
            self.missing = self.missing.saturating_add(record.counter - self.counter - 1);
            self.counter = record.counter;
            if record.generation > self.generation {
                self.generation = record.generation;
                self.generation_since = record.counter;
            }
            self.remember(record);
        } else if self.counter - record.counter <= Self::REORDERING {
            self.reordered += 1;
            self.missing = self.missing.saturating_sub(1);
            self.remember(record);
        } else {
            self.interleaved += 1;
        }
    }

    /// A reboot changes the boot once and for good; two runners that were booted apart change it back and forth.
    fn other_boot(&mut self, record: &WitnessRecord) {
        if self.earlier_boots.contains(&record.boot) || self.earlier_boots.len() >= Self::MOST_BOOTS {
            self.interleaved += 1;
            return;
        }
        self.earlier_boots.push(self.boot);
        self.reboots += 1;
        self.boot = record.boot;
        self.counter = record.counter;
        self.generation = record.generation;
        self.generation_since = record.counter;
        self.seen.fill(None);
        self.remember(record);
    }

    fn remember(&mut self, record: &WitnessRecord) {
        *self.place(record.counter) = Some((record.counter, record.nonce));
    }

    fn place(&mut self, counter: u64) -> &mut Option<(u64, u64)> {
        &mut self.seen[(counter % Self::WINDOW as u64) as usize]
    }
}

#[cfg(test)]
mod tests;
