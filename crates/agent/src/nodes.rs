//! Memory nodes of this host: what each has, and which one a VM is put on. Which one it is, is this host's choice at each start and arrival; the guest
//! does not see it.

use std::collections::BTreeMap;
use std::path::Path;

use godwit_model::{Bytes, HugePages};

/// Where the kernel says what nodes there are.
pub(crate) const NODES: &str = "/sys/devices/system/node";

/// A node with memory and processors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MemoryNode {
    pub(crate) id: u32,
    pub(crate) cpus: Vec<u32>,
    /// All of its memory.
    pub(crate) memory: Bytes,
    /// What is free now, or would be if files were forgotten that can be read again.
    free: Bytes,
    /// Huge pages that are free now.
    huge: BTreeMap<u64, Bytes>,
}

impl MemoryNode {
    /// What a VM of these pages can get here, where VMs that were put here may still use `promised` in all. Huge pages are taken at once, so that
    /// those that are free are promised to nobody.
    pub(crate) fn room(&self, pages: Option<HugePages>, promised: Bytes) -> Bytes {
        match pages {
            Some(pages) => self.huge.get(&pages.size().get()).copied().unwrap_or_default(),
            None => self.free.min(Bytes(self.memory.get().saturating_sub(promised.get()))),
        }
    }
}

/// Nodes that VMs can be put on, as the directory `nodes` says.
pub(crate) fn read(nodes: &Path) -> Vec<MemoryNode> {
    let entries = std::fs::read_dir(nodes).into_iter().flatten().flatten();
    let id = |name: &str| name.strip_prefix("node").and_then(|number| number.parse().ok());
    let ids = entries.filter_map(|entry| id(entry.file_name().to_str()?));
    let mut all: Vec<MemoryNode> = ids.filter_map(|id| read_node(id, &nodes.join(format!("node{id}")))).collect();
    all.sort_by_key(|node| node.id);
    all
}

fn read_node(id: u32, dir: &Path) -> Option<MemoryNode> {
    let text = |file: &str| std::fs::read_to_string(dir.join(file)).unwrap_or_default();
    let meminfo = text("meminfo");
    let kib = |field: &str| {
        let line = meminfo.lines().find_map(|line| line.split_once(&format!(" {field}:")))?;
        Some(line.1.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
    };
    let (memory, cpus) = (Bytes(kib("MemTotal")?), parse_cpus(&text("cpulist")));
    if memory.get() == 0 || cpus.is_empty() {
        return None;
    }
    let free = ["MemFree", "Active(file)", "Inactive(file)"].into_iter().filter_map(kib).fold(0, u64::saturating_add);
    let huge = [HugePages::Mib2, HugePages::Gib1].into_iter().map(|pages| {
        let size = pages.size().get();
        let count = text(&format!("hugepages/hugepages-{}kB/free_hugepages", size >> 10)).trim().parse().unwrap_or(0_u64);
        (size, Bytes(count.saturating_mul(size)))
    });
    Some(MemoryNode { id, cpus, memory, free: Bytes(free), huge: huge.collect() })
}

/// A list such as `0-3,8`; what is none is empty.
fn parse_cpus(text: &str) -> Vec<u32> {
    let ranges = text.trim().split(',').filter_map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<u32>().ok()?..=last.parse::<u32>().ok()?.min(u32::from(u16::MAX)))
    });
    ranges.flatten().collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A tree as the kernel's: nodes of (number, processors, MiB in all, MiB free, free huge pages of 2 MiB).
    pub(crate) fn tree(nodes: &[(u32, &str, u64, u64, u64)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        for (id, cpus, all, free, huge) in nodes {
            let node = dir.path().join(format!("node{id}"));
            let pages = node.join("hugepages/hugepages-2048kB");
            std::fs::create_dir_all(&pages).expect("a directory");
            let write = |path: &Path, text: String| std::fs::write(path, text).expect("written");
            let files = 10;
            let meminfo = format!(
                "Node {id} MemTotal:       {} kB\nNode {id} MemFree:  {} kB\nNode {id} Active(file): {} kB\nNode {id} HugePages_Free: 9\n",
                all << 10,
                (free - files) << 10,
                files << 10,
            );
            write(&node.join("meminfo"), meminfo);
            write(&node.join("cpulist"), format!("{cpus}\n"));
            write(&pages.join("free_hugepages"), format!("{huge}\n"));
        }
        std::fs::create_dir_all(dir.path().join("power")).expect("what is no node");
        dir
    }

    #[test]
    fn nodes_are_read_with_what_they_have() {
        // One with memory alone, and one with processors alone, as there are.
        let tree = tree(&[(0, "0-1,4", 4_096, 1_000, 8), (3, "2-3", 8_192, 500, 0), (4, "", 4_096, 4_096, 0), (5, "9", 0, 10, 0)]);
        let nodes = read(tree.path());
        assert_eq!(
            nodes.iter().map(|node| (node.id, node.cpus.as_slice())).collect::<Vec<_>>(),
            [(0, &[0, 1, 4][..]), (3, &[2, 3][..])]
        );
        assert_eq!(nodes[0].room(None, Bytes(0)), Bytes::mib(1_000));
        assert_eq!(nodes[0].room(None, Bytes::mib(3_500)), Bytes::mib(596), "VMs that have not used theirs yet");
        assert_eq!(nodes[0].room(Some(HugePages::Mib2), Bytes::mib(3_500)), Bytes::mib(16));
        assert_eq!(nodes[0].room(Some(HugePages::Gib1), Bytes(0)), Bytes(0));
        assert_eq!(read(Path::new("/nonexistent")), []);
    }

    #[test]
    fn lists_of_processors_are_read_whole_or_not_at_all() {
        for (text, cpus) in [("0\n", vec![0]), ("0-2,5\n", vec![0, 1, 2, 5]), ("", vec![]), ("x-2,3", vec![3]), ("3-1", vec![])] {
            assert_eq!(parse_cpus(text), cpus, "{text:?}");
        }
    }
}
