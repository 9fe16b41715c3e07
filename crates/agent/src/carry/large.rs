//! Large pages of a VM's memory. Memory that was protected from writes page by page, as QEMU does for a snapshot, is in small pages from then on: the guest gets slower, and the next snapshot
//! stands still for ten times as long, since QEMU goes through all pages meanwhile.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use godwit_carrier::pages::PAGE_SIZE;

use super::memory::{EXCLUSIVE, ProcessMemory};

/// Small pages of a large one.
const SMALL: u32 = 512;
const LARGE: u64 = SMALL as u64 * PAGE_SIZE as u64;
/// Somebody has protected a page from writes, in the page map.
const PROTECTED: u64 = 1 << 57;
/// Pages whose joining is one call.
const AT_ONCE: u64 = 16 * LARGE;

impl ProcessMemory {
    /// Has the kernel make large pages of small ones, where all small ones are there and nobody else has any of them; how many large ones there are then. The guest
    /// runs on. Whoever protects this memory from writes waits until it has ended: there are kernels that forget the protection.
    ///
    /// # Errors
    /// The kernel's; older ones than 6.1 cannot.
    pub(crate) fn join_pages(&self, process: &impl AsFd) -> io::Result<u64> {
        if is_forbidden()? {
            return Ok(0);
        }
        let mut joined = 0;
        for (number, block) in (0..).zip(self.blocks()) {
            // Large pages begin at multiples of their size in the process, not in the block.
            let before = block.address.next_multiple_of(LARGE) - block.address;
            let mut first = u32::try_from(before / PAGE_SIZE as u64).unwrap_or(u32::MAX);
            let mut run = 0..0;
            while first.saturating_add(SMALL) <= block.pages {
                let at = block.address + u64::from(first) * PAGE_SIZE as u64;
                if self.is_full(number, first)? {
                    if run.end != at || at - run.start >= AT_ONCE {
                        joined += collapse(process, std::mem::replace(&mut run, at..at))?;
                    }
                    run.end = at + LARGE;
                }
                first += SMALL;
            }
            joined += collapse(process, run)?;
        }
        Ok(joined)
    }

    /// Whether a large page's place is full: in large pages or small ones, the page map does not tell them apart.
    fn is_full(&self, block: u16, first: u32) -> io::Result<bool> {
        Ok(self.entries(block, first, SMALL)?.iter().all(|entry| entry & (EXCLUSIVE | PROTECTED) == EXCLUSIVE))
    }
}

/// Whether this host is not to use large pages of its own accord.
fn is_forbidden() -> io::Result<bool> {
    std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").map(|setting| setting.contains("[never]"))
}

/// Joins the pages of a part of the process's memory; how many large ones. Where there is no room for one, or somebody holds a page, it stays as it is.
#[expect(unsafe_code, reason = "no library has this call")]
fn collapse(process: &impl AsFd, part: std::ops::Range<u64>) -> io::Result<u64> {
    let (Ok(base), Ok(length)) = (usize::try_from(part.start), usize::try_from(part.end - part.start)) else { return Ok(0) };
    if length == 0 {
        return Ok(0);
    }
    let part = libc::iovec { iov_base: std::ptr::without_provenance_mut(base), iov_len: length };
    // SAFETY: `part` is read by the kernel alone; the memory that it names is another process's, whose content does not change.
    let told = unsafe {
        libc::syscall(libc::SYS_process_madvise, process.as_fd().as_raw_fd(), &raw const part, 1_usize, libc::MADV_COLLAPSE, 0_u32)
    };
    if told >= 0 {
        return Ok(length as u64 / LARGE);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // It tells of the last place that it could not do: memory may be given back at any time.
        Some(libc::ENOMEM | libc::EBUSY | libc::EAGAIN | libc::EINVAL) => Ok(0),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::process::{PidfdFlags, getpid, pidfd_open};

    use super::*;
    use crate::carry::PlacedBlock;

    /// What the kernel says of the mapping that an address is in, in kB.
    fn large_pages(address: u64) -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("this process's");
        let bounds = |line: &str| {
            let (from, rest) = line.split_once('-')?;
            let number = |text| u64::from_str_radix(text, 16).ok();
            Some(number(from)?..number(rest.split_once(' ')?.0)?)
        };
        let lines = maps.lines().skip_while(|line| bounds(line).is_none_or(|bounds| !bounds.contains(&address)));
        let found = lines.into_iter().find_map(|line| line.strip_prefix("AnonHugePages:"));
        found.and_then(|text| text.trim().strip_suffix(" kB")?.parse().ok()).expect("a figure")
    }

    #[expect(unsafe_code, reason = "no library in use has this call")]
    fn advise(part: &mut [u8], advice: i32) {
        // SAFETY: it is a whole number of pages of ours, and the advice changes no content.
        let told = unsafe { libc::madvise(part.as_mut_ptr().cast(), part.len(), advice) };
        assert_eq!(told, 0, "{}", io::Error::last_os_error());
    }

    #[test]
    fn small_pages_are_joined_where_all_of_them_are_there() {
        const PAGES: usize = 4 * SMALL as usize;
        // The C library maps what is as large as this anew. All is touched but one page of the third large page, which is only read.
        let mut bytes = vec![0_u8; (PAGES + SMALL as usize) * PAGE_SIZE];
        let start = bytes.as_ptr().align_offset(LARGE as usize);
        advise(&mut bytes[start..start + PAGES * PAGE_SIZE], libc::MADV_NOHUGEPAGE);
        let missing = 2 * SMALL as usize + 7;
        for page in (0..PAGES).filter(|page| *page != missing) {
            bytes[start + page * PAGE_SIZE] = page as u8 | 1;
        }
        assert_eq!(std::hint::black_box(&bytes)[start + missing * PAGE_SIZE], 0);
        advise(&mut bytes[start..start + PAGES * PAGE_SIZE], libc::MADV_HUGEPAGE);
        let open = |name| File::open(format!("/proc/self/{name}")).expect("this process's");
        let address = bytes[start..].as_ptr().addr() as u64;
        let block = PlacedBlock { id: "pc.ram".into(), address, pages: PAGES as u32 };
        let memory = ProcessMemory::new(open("mem").into(), open("pagemap").into(), vec![block]);
        let process = pidfd_open(getpid(), PidfdFlags::empty()).expect("this process");

        let wanted = if is_forbidden().expect("the setting") { 0 } else { 3 };
        let before = large_pages(address);
        assert_eq!(memory.join_pages(&process).expect("joined"), wanted);
        let after = large_pages(address);
        assert!(before == 0 && after == wanted * LARGE / 1024, "{before} kB, then {after} kB");
        for page in 0..PAGES {
            let expected = if page == missing { 0 } else { page as u8 | 1 };
            assert_eq!(bytes[start + page * PAGE_SIZE], expected, "page {page}");
        }
    }
}
