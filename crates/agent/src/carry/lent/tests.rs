//! A vault, what its worker writes of a snapshot, and the memory of a QEMU that waits: what comes is right, whatever becomes of the vault.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use godwit_model::{Generation, SnapshotId, VmId};
use godwit_vault::{Identity, Keys, Known, PackKey, Parts, SnapshotKey, Space, SpaceKind, StayKey, StayWriter, TeamKey, Vault};
use tokio::net::UnixStream;
use uuid::Uuid;

use super::super::PlacedBlock;
use super::super::behind::WriteBehind;
use super::super::home::{Bringing, Earlier, Lent};
use super::*;
use crate::snapshot::lend;

type Page = [u8; PAGE_SIZE];

const PAGES: u32 = 600;
const LONG: Duration = Duration::from_secs(60);
const ID: SnapshotId = SnapshotId::new(Uuid::nil());

fn key() -> SnapshotKey {
    SnapshotKey::new([1; 32])
}

fn noise(seed: u32) -> Page {
    let mut page = [0; PAGE_SIZE];
    blake3::Hasher::new().update(&seed.to_be_bytes()).finalize_xof().fill(&mut page);
    page
}

/// What page `page` of the snapshot holds: some are zero.
fn content(page: u32) -> Page {
    if page.is_multiple_of(7) { [0; PAGE_SIZE] } else { noise(page) }
}

const fn zeros(pages: u32) -> u32 {
    pages.div_ceil(7)
}

/// Blocks of this very process.
fn memory(blocks: &[(&str, u32)]) -> WriteBehind {
    let placed = |(id, pages): &(&str, u32)| {
        let bytes: &'static [u8] = Vec::leak(vec![0; (*pages as usize + 1) * PAGE_SIZE]);
        let at = bytes.as_ptr().addr() + bytes.as_ptr().align_offset(PAGE_SIZE);
        PlacedBlock { id: (*id).into(), address: at as u64, pages: *pages }
    };
    let memory = File::options().read(true).write(true).open("/proc/self/mem").expect("own memory");
    let map = File::open("/proc/self/pagemap").expect("own page map");
    let memory = ProcessMemory::new(memory.into(), map.into(), blocks.iter().map(placed).collect());
    WriteBehind::new(memory, crate::carry::tests::threads())
}

fn read(memory: &mut WriteBehind, block: u16, page: u32) -> Page {
    let mut content = [0; PAGE_SIZE];
    memory.read(block, page, &mut content).expect("read");
    content
}

/// How many pages of a block are what the snapshot has and not zero; all others are zero.
fn placed(memory: &mut WriteBehind, block: u16) -> u32 {
    let mut count = 0;
    for page in 0..PAGES {
        let here = read(memory, block, page);
        if here != [0; PAGE_SIZE] {
            assert!(here == content(page), "page {page} is another");
            count += 1;
        }
    }
    count
}

/// A vault with a snapshot of two blocks and a disk, and its directory.
fn vault() -> (tempfile::TempDir, PathBuf, Vault) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("vault");
    let vault = Vault::open(&path).expect("a vault");
    let draft = vault.begin(ID).expect("begun");
    let keys = Keys { snapshot: key(), team: TeamKey::new([2; 32]), pack: PackKey::new([3; 32]) };
    let space = |kind, name: &str| Space { kind, name: name.into(), pages: PAGES };
    let spaces = vec![space(SpaceKind::Ram, "pc.ram"), space(SpaceKind::Ram, "other"), space(SpaceKind::Disk, "disk0")];
    let mut writer = draft.writer(&keys, spaces, Known::new(0), godwit_model::Bytes(u64::MAX)).expect("a writer");
    for page in 0..PAGES {
        writer.page(0, page, &content(page)).expect("taken");
        writer.page(1, page, &noise(page ^ 0x1000)).expect("taken");
        writer.page(2, page, &noise(page ^ 0x2000)).expect("taken");
    }
    let (_, _, totals) = writer.finish(&Parts::default()).expect("finished");
    draft.commit(&totals).expect("committed");
    (dir, path, vault)
}

/// What a worker lends, and whether it could lend all.
fn lender(vault: &Vault) -> (UnixStream, std::thread::JoinHandle<bool>) {
    let (ours, workers) = std::os::unix::net::UnixStream::pair().expect("sockets");
    ours.set_nonblocking(true).expect("set");
    let contents = vault.snapshot(ID, &key());
    let lending = std::thread::spawn(move || contents.is_ok_and(|mut contents| lend(&mut contents, &workers).is_ok()));
    (UnixStream::from_std(ours).expect("a socket"), lending)
}

#[tokio::test]
async fn what_a_snapshot_has_of_a_block_of_the_same_name_and_length_is_put_there_and_nothing_else() {
    let (_dir, _, vault) = vault();
    let (from, lending) = lender(&vault);
    // One is longer now, and they come in another order.
    let mut memory = memory(&[("other", PAGES + 1), ("pc.ram", PAGES)]);
    assert_eq!(bring_lent(from, LONG, &mut memory).await, u64::from(PAGES - zeros(PAGES)));
    assert!(lending.join().expect("no panic"), "all of it was lent");
    assert_eq!(placed(&mut memory, 1), PAGES - zeros(PAGES));
    assert!((0..PAGES).all(|page| read(&mut memory, 0, page) == [0; PAGE_SIZE]));
}

#[tokio::test]
async fn a_snapshot_that_is_deleted_and_pruned_while_it_is_lent_is_lent_to_the_end_and_afterwards_is_worth_nothing() {
    let (_dir, path, vault) = vault();
    let (from, lending) = lender(&vault);
    vault.delete(ID).expect("deleted");
    let keys = std::collections::BTreeMap::new();
    let plan = vault.plan_prune(&keys).expect("planned");
    assert_eq!(plan.packs.len(), 1, "nobody refers to it");
    vault.prune(&plan, &keys).expect("pruned");
    let mut memory = memory(&[("pc.ram", PAGES)]);
    assert_eq!(bring_lent(from, LONG, &mut memory).await, u64::from(PAGES - zeros(PAGES)));
    assert!(lending.join().expect("no panic"));
    assert_eq!(placed(&mut memory, 0), PAGES - zeros(PAGES));
    assert!(std::fs::read_dir(&path).expect("a directory").flatten().all(|entry| entry.file_name() == "lock"));
    let (from, lending) = lender(&vault);
    assert_eq!(bring_lent(from, LONG, &mut memory).await, 0);
    assert!(!lending.join().expect("no panic"));
}

#[tokio::test]
async fn of_a_damaged_snapshot_nothing_wrong_is_put_anywhere() {
    let (_dir, path, vault) = vault();
    for (kind, parts) in [("pack", 16), ("snapshot", 8)] {
        let file = File::options().read(true).write(true).open(path.join(format!("{ID}.{kind}"))).expect("a file");
        let length = file.metadata().expect("a file").len();
        let mut some = 0;
        for part in 0..parts {
            let (at, mut byte) = (length * part / parts, [0]);
            file.read_exact_at(&mut byte, at).expect("read");
            file.write_all_at(&[byte[0] ^ 4], at).expect("damaged");
            let (from, lending) = lender(&vault);
            let mut memory = memory(&[("pc.ram", PAGES)]);
            let count = bring_lent(from, LONG, &mut memory).await;
            let whole = lending.join().expect("no panic");
            assert_eq!(u64::from(placed(&mut memory, 0)), count, "{kind} at {at}");
            // What is damaged may be of the disk, or of the other block.
            assert!(!whole || count == u64::from(PAGES - zeros(PAGES)), "{kind} at {at}: {count}");
            some += u64::from(!whole && count > 0);
            file.write_all_at(&byte, at).expect("mended");
        }
        // What comes before the damage is as good as ever.
        assert!(kind == "snapshot" || some > 0, "{some} times a part of it");
    }
}

/// What a worker would write that is somebody else's.
fn stream(blocks: &[(&str, u32)], runs: &[(u16, u32, u16)]) -> Vec<u8> {
    let mut out = u16::try_from(blocks.len()).expect("few").to_be_bytes().to_vec();
    for (name, pages) in blocks {
        out.push(u8::try_from(name.len()).expect("short"));
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(&pages.to_be_bytes());
    }
    for (block, first, pages) in runs {
        out.extend_from_slice(&block.to_be_bytes());
        out.extend_from_slice(&first.to_be_bytes());
        out.extend_from_slice(&pages.to_be_bytes());
        (0..u32::from(*pages)).for_each(|page| out.extend_from_slice(&content(first.wrapping_add(page))));
    }
    out.extend_from_slice(&END.to_be_bytes());
    out
}

#[tokio::test]
async fn what_is_malformed_or_torn_ends_it_and_nothing_beyond_a_block_is_written() {
    let ram = &[("pc.ram", PAGES)][..];
    let mut count = 0;
    let mut whole = memory(ram);
    assert!(bring_all(&stream(ram, &[(0, 1, 6), (0, 8, 3)])[..], &mut whole, &mut count).await.is_ok());
    assert_eq!((count, placed(&mut whole, 0)), (9, 9));
    for runs in [
        &[(0, 1, 6), (1, 1, 1)][..],
        &[(0, 1, 6), (0, 0, 0)],
        &[(0, 1, 6), (0, 1, 17)],
        &[(0, 1, 6), (0, 1, u16::MAX)],
        &[(0, 1, 6), (0, PAGES - 1, 2)],
        &[(0, 1, 6), (0, u32::MAX, 1)],
    ] {
        let (mut memory, mut count) = (memory(ram), 0);
        let error = bring_all(&stream(ram, runs)[..], &mut memory, &mut count).await;
        assert!(error.is_err() && count == 6 && placed(&mut memory, 0) == 6, "{runs:?}: {error:?}");
    }
    let many = [&(MOST_BLOCKS + 1).to_be_bytes()[..], &[0; 16]].concat();
    assert!(matches!(bring_all(&many[..], &mut memory(ram), &mut 0).await, Err(LentError::Malformed)));
    // Its names are compared, whatever they are.
    let (foreign, mut count) = (stream(&[("", PAGES), ("pc.ram", PAGES)], &[(0, 1, 2), (1, 1, 2)]), 0);
    assert!(bring_all(&foreign[..], &mut memory(ram), &mut count).await.is_ok() && count == 2);

    let full = stream(ram, &[(0, 1, 2)]);
    for length in (0..64).chain((64..full.len()).step_by(509)).chain([full.len() - 1]) {
        let (mut memory, mut count) = (memory(ram), 0);
        let torn = bring_all(full.get(..length).expect("a part"), &mut memory, &mut count).await;
        assert!(matches!(torn, Err(LentError::Io(_))), "{length} bytes: {torn:?}");
        assert_eq!(u64::from(placed(&mut memory, 0)), count, "{length} bytes");
    }
}

#[tokio::test]
async fn a_vault_that_does_not_answer_is_not_waited_for_and_whoever_has_enough_ends_the_worker() {
    let (silent, _theirs) = UnixStream::pair().expect("sockets");
    assert_eq!(bring_lent(silent, Duration::from_millis(20), &mut memory(&[("pc.ram", PAGES)])).await, 0);
    let (_dir, _, vault) = vault();
    let (from, lending) = lender(&vault);
    drop(from);
    assert!(lending.join().expect("no panic"), "it ended, and that is no error");
}

async fn bring_all_back(earlier: Earlier, memory: &mut WriteBehind) {
    let mut bringing = Bringing::begin(earlier, memory).await;
    while bringing.through().is_some() {
        bringing.next(memory);
    }
}

/// A stay of this generation, whose pages are none of the snapshot's.
fn stay(generation: u64) -> (File, [u8; 32]) {
    let blocks = vec![godwit_vault::Block { id: "pc.ram".into(), pages: PAGES }];
    let identity = Identity { vm: VmId::new(Uuid::nil()), generation: Generation(generation), blocks };
    let file = tempfile::tempfile().expect("a file");
    let mut writer = StayWriter::begin(file.try_clone().expect("a file"), &StayKey::new([4; 32]), &identity).expect("begun");
    writer.page(0, 3, &noise(0x3000)).expect("written");
    writer.finish().expect("written");
    (file, [4; 32])
}

#[tokio::test]
async fn of_a_stay_and_a_snapshot_the_newer_is_brought_back_and_the_other_if_that_is_of_no_use() {
    let (_dir, path, vault) = vault();
    // The stay of the generation on which the snapshot was taken came after it.
    for (left_on, taken_on, by_stay) in [(Some(2), 3, false), (Some(3), 3, true), (Some(3), 0, true), (None, 0, false)] {
        let (from, lending) = lender(&vault);
        let lent = Some(Lent { from, generation: Generation(taken_on), within: LONG });
        let mut memory = memory(&[("pc.ram", PAGES)]);
        bring_all_back(Earlier { stay: left_on.map(stay), lent }, &mut memory).await;
        assert!(lending.join().expect("no panic"));
        assert!((read(&mut memory, 0, 3) == noise(0x3000)) == by_stay, "{left_on:?} {taken_on}");
        assert!((read(&mut memory, 0, 4) == content(4)) != by_stay, "{left_on:?} {taken_on}");
    }
    std::fs::remove_file(path.join(format!("{ID}.pack"))).expect("removed");
    let (from, _) = lender(&vault);
    let mut memory = memory(&[("pc.ram", PAGES)]);
    let lent = Some(Lent { from, generation: Generation(3), within: LONG });
    bring_all_back(Earlier { stay: Some(stay(2)), lent }, &mut memory).await;
    assert!(read(&mut memory, 0, 3) == noise(0x3000));
}
