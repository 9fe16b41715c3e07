//! What every kind of pool must keep to, tried on real storage through two views of it, as two hosts have. The tests run it on directories, and
//! administrators on their own pools by `godwit host check --try-pools`.
//!
//! It makes small volumes under names that nobody else has, and removes them again.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use godwit_model::{Bytes, DiskFormat, ErrorCode, Generation, Name, Refusal, VmId, VolumeRef};
use godwit_qemu::cage::tool;
use uuid::Uuid;

use super::driver::{Access, Driver, Hold, Item, Left, OpenError, Record, Storage};
use super::volume;

const MIB: u64 = 1 << 20;
/// A volume has two pieces of data at these places, and holes besides.
const PIECES: [u64; 2] = [0, 5 * MIB];
const PIECE: usize = 128 << 10;
const SIZE: Bytes = Bytes(8 * MIB);
/// Storage with more room than this is not filled for a try.
const MAY_FILL: Bytes = Bytes::GIB;

/// What became of one thing that was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tried {
    /// Which.
    pub(crate) what: &'static str,
    /// What was seen, or what is wrong.
    pub(crate) outcome: Result<Seen, String>,
}

/// What was seen of something that is not wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// It is as it must be.
    Right,
    /// It could not be tried, or is possible with a restriction.
    Restricted(&'static str),
}

/// Something that storage must not do.
#[derive(Debug, thiserror::Error)]
enum Wrong {
    #[error("{0}")]
    Seen(String),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("{}", .0.message)]
    Refused(Refusal),
}

impl From<Refusal> for Wrong {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

type Try = fn(&Views<'_>) -> Result<Seen, Wrong>;

/// Tries everything. Blocks for some seconds.
pub(super) fn run(pool: &Name, first: &dyn Driver, second: &dyn Driver) -> Vec<Tried> {
    let (here, there) = match (first.open(), second.open()) {
        (Ok(here), Ok(there)) => (here, there),
        (Err(refusal), _) | (_, Err(refusal)) => return vec![Tried { what: "open", outcome: Err(refusal.message) }],
    };
    let tries: [(&'static str, Try); 12] = [
        ("identity", identity),
        ("create", create),
        ("create at once", create_at_once),
        ("clone", clone),
        ("grow", grow),
        ("snapshot", snapshot),
        ("succeed", succeed),
        ("travel", travel),
        ("use by QEMU", use_by_qemu),
        ("hold against QEMU", hold_against_qemu),
        ("direct I/O", direct),
        ("out of space", out_of_space),
    ];
    let tried = tries.into_iter().map(|(what, try_it)| {
        // Each with volumes of its own, so that one that fails leaves the next ones alone.
        let views = Views { pool, mark: Uuid::new_v4().simple().to_string(), here: &*here, there: &*there };
        let outcome = try_it(&views);
        let outcome = views.clean_up().and(outcome).map_err(|wrong| wrong.to_string());
        Tried { what, outcome }
    });
    tried.collect()
}

/// The storage as two hosts see it.
struct Views<'a> {
    pool: &'a Name,
    mark: String,
    here: &'a dyn Storage,
    there: &'a dyn Storage,
}

impl Views<'_> {
    fn both(&self) -> [&dyn Storage; 2] {
        [self.here, self.there]
    }

    fn name(&self, which: &str) -> Name {
        Name::new(format!("try-{}-{which}", self.mark.get(..12).unwrap_or_default())).expect("letters, digits and dashes")
    }

    fn volume(&self, which: &str) -> VolumeRef {
        VolumeRef { pool: self.pool.clone(), volume: self.name(which) }
    }

    /// Makes a raw volume with two pieces of `fill`.
    fn make(&self, which: &str, fill: u8) -> Result<VolumeRef, Wrong> {
        let volume = self.volume(which);
        let won = self.publish(self.here, &volume, fill)?;
        ensure(won, "a new volume was not published")?;
        Ok(volume)
    }

    fn publish(&self, storage: &dyn Storage, volume: &VolumeRef, fill: u8) -> Result<bool, Wrong> {
        let room = storage.begin()?;
        room.file().set_len(SIZE.get())?;
        write(room.file(), fill)?;
        Ok(room.publish(&Item::volume(&volume.volume), Record { format: DiskFormat::Raw, size: SIZE })?)
    }

    /// Makes an empty qcow2 volume: of those QEMU keeps every other writer out by itself. `None`: there is no `qemu-img`.
    fn make_qcow2(&self, which: &str) -> Result<Option<VolumeRef>, Wrong> {
        let Some(qemu_img) = tool::find("qemu-img") else { return Ok(None) };
        let (volume, room) = (self.volume(which), self.here.begin()?);
        let mut command = Command::new(qemu_img);
        command.args(["create", "-q", "-f", "qcow2", &path_of(room.file()), &SIZE.get().to_string()]);
        let made = command.stdin(Stdio::null()).status()?;
        ensure(made.success(), "qemu-img could not make a disk in a new volume")?;
        let record = Record { format: DiskFormat::Qcow2, size: SIZE };
        ensure(room.publish(&Item::volume(&volume.volume), record)?, "a new volume was not published")?;
        Ok(Some(volume))
    }

    /// The volume has exactly this content, in both views.
    fn must_have(&self, item: &Item, fill: u8, size: Bytes) -> Result<(), Wrong> {
        let mut expected = vec![0; usize::try_from(size.get()).unwrap_or_default()];
        for at in PIECES {
            let from = usize::try_from(at).unwrap_or_default();
            expected.get_mut(from..from + PIECE).unwrap_or_default().fill(fill);
        }
        for storage in self.both() {
            let mut content = Vec::new();
            storage.open(item, Access::READ)?.read_to_end(&mut content)?;
            ensure(content.len() == expected.len(), "a volume has another length than it was given")?;
            ensure(content == expected, "a volume has another content than was written to it")?;
        }
        Ok(())
    }

    fn delete_snapshot(&self, volume: &VolumeRef, snapshot: &Name) -> Result<(), Wrong> {
        Ok(self.here.remove(&Item::snapshot(&volume.volume, snapshot))?)
    }

    fn clean_up(&self) -> Result<(), Wrong> {
        for which in NAMES {
            let name = self.name(which);
            for snapshot in self.here.snapshots(&name)? {
                self.here.remove(&Item::snapshot(&name, &snapshot))?;
            }
            for item in [Item::volume(&name), Item::arriving(&name), Item::spare(&name)] {
                self.here.remove(&item)?;
            }
            ensure(!self.there.exists(&Item::volume(&name))?, "a volume that was removed is still there")?;
        }
        Ok(())
    }
}

/// All the names that are used.
const NAMES: [&str; 3] = ["one", "two", "three"];

fn ensure(right: bool, otherwise: &str) -> Result<(), Wrong> {
    if right { Ok(()) } else { Err(Wrong::Seen(otherwise.to_owned())) }
}

/// The work is refused, with this code.
fn refused<T>(result: Result<T, Refusal>, code: ErrorCode, what: &str) -> Result<(), Wrong> {
    match result {
        Err(refusal) if refusal.code == code => Ok(()),
        Err(refusal) => Err(Wrong::Seen(format!("{what}: refused with {}, not {}", refusal.code.as_str(), code.as_str()))),
        Ok(_) => Err(Wrong::Seen(what.to_owned())),
    }
}

fn write(file: &File, fill: u8) -> io::Result<()> {
    PIECES.iter().try_for_each(|at| file.write_all_at(&vec![fill; PIECE], *at))
}

fn identity(views: &Views<'_>) -> Result<Seen, Wrong> {
    ensure(views.here.identity() == views.there.identity(), "two views of one storage have two identities")?;
    let space = views.here.space()?;
    ensure(space.capacity > Bytes(0) && space.free <= space.capacity, "more is free than there is")?;
    Ok(Seen::Right)
}

fn create(views: &Views<'_>) -> Result<Seen, Wrong> {
    let item = Item::volume(&views.name("one"));
    let room = views.here.begin()?;
    write(room.file(), 1)?;
    ensure(!views.there.exists(&item)?, "a volume is seen before it is published")?;
    drop(room);
    let volume = views.make("one", 2)?;
    views.must_have(&item, 2, SIZE)?;
    for storage in views.both() {
        let file = storage.open(&item, Access::READ)?;
        let record = storage.record(&item, &file)?;
        ensure(record == Some(Record { format: DiskFormat::Raw, size: SIZE }), "what a volume was made as was not kept")?;
        // Somebody else's volume is never replaced.
        ensure(!views.publish(storage, &volume, 3)?, "a volume replaced another of the same name")?;
        views.must_have(&item, 2, SIZE)?;
    }
    volume::delete(views.there, &volume)?;
    volume::delete(views.here, &volume)?;
    ensure(!views.here.exists(&item)?, "a volume that was deleted is still there")?;
    ensure(matches!(views.here.open(&item, Access::READ), Err(OpenError::Missing)), "a volume that was deleted can be opened")?;
    Ok(Seen::Right)
}

fn create_at_once(views: &Views<'_>) -> Result<Seen, Wrong> {
    let volume = &views.volume("one");
    let results: Vec<(u8, Result<bool, Wrong>)> = std::thread::scope(|scope| {
        let makers: Vec<_> = (1..=8)
            .zip(views.both().into_iter().cycle())
            .map(|(fill, storage)| (fill, scope.spawn(move || views.publish(storage, volume, fill))))
            .collect();
        let joined = |maker: std::thread::ScopedJoinHandle<'_, _>| {
            maker.join().unwrap_or_else(|_| Err(Wrong::Seen("a maker of a volume panicked".to_owned())))
        };
        makers.into_iter().map(|(fill, maker)| (fill, joined(maker))).collect()
    });
    let mut winners = vec![];
    for (fill, result) in results {
        if result? {
            winners.push(fill);
        }
    }
    let [winner] = winners.as_slice() else {
        return Err(Wrong::Seen(format!("{} of 8 made one volume at once", winners.len())));
    };
    views.must_have(&Item::volume(&volume.volume), *winner, SIZE)?;
    Ok(Seen::Right)
}

fn clone(views: &Views<'_>) -> Result<Seen, Wrong> {
    let (from, to) = (views.make("one", 1)?, views.name("two"));
    let (source, copy) = (Item::volume(&from.volume), Item::volume(&to));
    volume::clone(views.there, &from, None, &to, DiskFormat::Raw)?;
    views.must_have(&copy, 1, SIZE)?;
    write(&views.here.open(&copy, Access::WRITE)?, 2)?;
    views.must_have(&source, 1, SIZE)?;
    write(&views.there.open(&source, Access::WRITE)?, 3)?;
    views.must_have(&copy, 2, SIZE)?;
    refused(volume::clone(views.here, &from, None, &to, DiskFormat::Raw), ErrorCode::NameTaken, "a clone replaced a volume")?;
    views.must_have(&copy, 2, SIZE)?;
    let missing = views.volume("three");
    let cloned = volume::clone(views.here, &missing, None, &views.name("two"), DiskFormat::Raw);
    refused(cloned, ErrorCode::VolumeMissing, "what does not exist was cloned")?;
    Ok(Seen::Right)
}

fn grow(views: &Views<'_>) -> Result<Seen, Wrong> {
    let (volume, larger) = (views.make("one", 1)?, Bytes(SIZE.get() + 4 * MIB));
    let item = Item::volume(&volume.volume);
    for _ in 0..2 {
        volume::grow(views.there, &volume, larger)?;
        views.must_have(&item, 1, larger)?;
    }
    let file = views.here.open(&item, Access::READ)?;
    let size = views.here.record(&item, &file)?.map(|record| record.size);
    ensure(size == Some(larger), "the size that a volume was given was not kept")?;
    refused(volume::grow(views.here, &volume, SIZE), ErrorCode::SpecInvalid, "a volume was made smaller")?;
    views.must_have(&item, 1, larger)?;
    Ok(Seen::Right)
}

fn snapshot(views: &Views<'_>) -> Result<Seen, Wrong> {
    let (volume, name) = (views.make("one", 1)?, views.name("three"));
    volume::snapshot(views.here, &volume, &name, DiskFormat::Raw)?;
    write(&views.there.open(&Item::volume(&volume.volume), Access::WRITE)?, 2)?;
    let kept = Item::snapshot(&volume.volume, &name);
    views.must_have(&kept, 1, SIZE)?;
    let again = volume::snapshot(views.there, &volume, &name, DiskFormat::Raw);
    refused(again, ErrorCode::NameTaken, "a snapshot replaced another")?;
    views.must_have(&kept, 1, SIZE)?;
    for storage in views.both() {
        ensure(storage.snapshots(&volume.volume)? == [name.clone()], "the snapshots of a volume are not listed")?;
    }
    ensure(views.here.snapshots(&views.name("two"))?.is_empty(), "a volume without snapshots has some")?;
    refused(volume::delete(views.here, &volume), ErrorCode::InUse, "a volume with a snapshot was deleted")?;
    volume::clone(views.there, &volume, Some(&name), &views.name("two"), DiskFormat::Raw)?;
    views.must_have(&Item::volume(&views.name("two")), 1, SIZE)?;
    views.must_have(&Item::volume(&volume.volume), 2, SIZE)?;
    views.delete_snapshot(&volume, &name)?;
    ensure(views.there.snapshots(&volume.volume)?.is_empty(), "a snapshot that was deleted is still there")?;
    views.must_have(&Item::volume(&views.name("two")), 1, SIZE)?;
    Ok(Seen::Right)
}

fn succeed(views: &Views<'_>) -> Result<Seen, Wrong> {
    let volume = views.make("one", 1)?;
    let item = Item::volume(&volume.volume);
    let begin = |fill| -> Result<_, Wrong> {
        let (successor, file) = views.there.begin_successor()?;
        file.set_len(SIZE.get())?;
        write(&file, fill)?;
        views.must_have(&item, 1, SIZE)?;
        Ok(successor)
    };
    // Given up before and after it had the name, each step from both sides and again.
    for taken in [false, true] {
        let successor = begin(2)?;
        for storage in views.both().into_iter().filter(|_| taken) {
            storage.succeed(&item, &successor)?;
            views.must_have(&item, 2, SIZE)?;
        }
        for storage in views.both() {
            storage.withdraw(&item, &successor)?;
            views.must_have(&item, 1, SIZE)?;
        }
    }
    let successor = begin(3)?;
    for storage in views.both() {
        storage.settle(&item, &successor)?;
        views.must_have(&item, 3, SIZE)?;
    }
    views.here.withdraw(&item, &successor)?;
    views.must_have(&item, 3, SIZE)?;
    Ok(Seen::Right)
}

/// A volume that leaves, comes back, and meets another of its name.
fn travel(views: &Views<'_>) -> Result<Seen, Wrong> {
    let volume = views.make("one", 1)?;
    let (item, arriving, spare) = (Item::volume(&volume.volume), Item::arriving(&volume.volume), Item::spare(&volume.volume));
    let left = Left { vm: VmId::new(Uuid::new_v4()), generation: Some(Generation(7)) };
    // Each step from both sides and again.
    for storage in views.both() {
        ensure(storage.rename(&item, &spare, Some(left), DiskFormat::Raw)?, "a volume did not become a spare")?;
        ensure(!storage.exists(&item)?, "a volume that has left is still there")?;
        ensure(storage.leftovers()?.contains(&spare), "a spare is not listed")?;
        let file = storage.open(&spare, Access::READ)?;
        ensure(storage.left(&spare, &file)? == Some(left), "it is not known any more whose a spare is")?;
        views.must_have(&spare, 1, SIZE)?;
    }
    for storage in views.both() {
        ensure(storage.rename(&spare, &arriving, None, DiskFormat::Raw)?, "a spare did not become an arriving volume")?;
        let file = storage.open(&arriving, Access::READ)?;
        ensure(storage.left(&arriving, &file)?.is_none(), "an arriving volume is taken for a state that its VM had")?;
    }
    views.publish(views.there, &volume, 2)?;
    ensure(!views.here.rename(&arriving, &item, None, DiskFormat::Raw)?, "a volume took the name of another")?;
    views.must_have(&item, 2, SIZE)?;
    views.must_have(&arriving, 1, SIZE)?;
    views.here.remove(&item)?;
    for storage in views.both() {
        ensure(storage.rename(&arriving, &item, None, DiskFormat::Raw)?, "an arriving volume did not get its name")?;
        views.must_have(&item, 1, SIZE)?;
    }
    Ok(Seen::Right)
}

const NO_QEMU: Seen = Seen::Restricted("not tried: there are no qemu-img and qemu-io on this machine (Debian: qemu-utils)");

/// A name under which another process can open a file that is open here.
fn path_of(file: &File) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}

fn use_by_qemu(views: &Views<'_>) -> Result<Seen, Wrong> {
    let (Some(qemu_io), Some(volume)) = (tool::find("qemu-io"), views.make_qcow2("one")?) else { return Ok(NO_QEMU) };
    let item = Item::volume(&volume.volume);
    let mut user = User::open(&qemu_io, &views.here.open(&item, Access::WRITE)?, Open::Write)?;
    ensure(user.is_in, "QEMU could not open a volume that nobody uses")?;
    for storage in views.both() {
        let file = storage.open(&item, Access::WRITE)?;
        ensure(storage.in_use(&file)?, "a volume that QEMU has open counts as unused")?;
        for hold in [Hold::Still, Hold::Alone] {
            let file = storage.open(&item, Access::WRITE)?;
            ensure(!storage.hold(&file, hold)?, "a volume that QEMU writes to could be held still")?;
        }
        let (two, larger) = (views.name("two"), Bytes(2 * SIZE.get()));
        refused(
            volume::clone(storage, &volume, None, &two, DiskFormat::Raw),
            ErrorCode::InUse,
            "a volume was cloned while QEMU wrote",
        )?;
        refused(
            volume::snapshot(storage, &volume, &two, DiskFormat::Raw),
            ErrorCode::InUse,
            "a snapshot was made while QEMU wrote",
        )?;
        refused(volume::grow(storage, &volume, larger), ErrorCode::InUse, "a volume grew under a QEMU")?;
        refused(volume::delete(storage, &volume), ErrorCode::InUse, "a volume was deleted while QEMU had it open")?;
        let second = User::open(&qemu_io, &storage.open(&item, Access::WRITE)?, Open::Write)?;
        ensure(!second.is_in, "two QEMUs write to one volume")?;
    }
    // Killed: nothing of it may stay.
    user.kill()?;
    let file = views.there.open(&item, Access::WRITE)?;
    ensure(!views.there.in_use(&file)?, "a volume counts as used after its QEMU died")?;
    ensure(views.there.hold(&file, Hold::Alone)?, "a volume cannot be held after its QEMU died")?;
    Ok(Seen::Right)
}

fn hold_against_qemu(views: &Views<'_>) -> Result<Seen, Wrong> {
    let (Some(qemu_io), Some(volume)) = (tool::find("qemu-io"), views.make_qcow2("one")?) else { return Ok(NO_QEMU) };
    let item = Item::volume(&volume.volume);
    for (hold, open, gets_in) in [
        (Hold::Still, Open::Write, false),
        (Hold::Still, Open::Read, true),
        (Hold::Alone, Open::Write, false),
        (Hold::Alone, Open::Read, false),
    ] {
        let held = views.there.open(&item, Access::WRITE)?;
        ensure(views.there.hold(&held, hold)?, "a volume that nobody uses cannot be held")?;
        let user = User::open(&qemu_io, &views.here.open(&item, Access::WRITE)?, open)?;
        ensure(user.is_in == gets_in, "a volume that is held does not keep QEMU out as it should")?;
        drop(user);
        drop(held);
        let user = User::open(&qemu_io, &views.here.open(&item, Access::WRITE)?, open)?;
        ensure(user.is_in, "a volume that was held keeps QEMU out afterwards")?;
    }
    Ok(Seen::Right)
}

fn direct(views: &Views<'_>) -> Result<Seen, Wrong> {
    let volume = views.make("one", 1)?;
    match views.here.open(&Item::volume(&volume.volume), Access { direct: true, ..Access::WRITE }) {
        Ok(_) => Ok(Seen::Right),
        Err(OpenError::NoDirect) => Ok(Seen::Restricted("disks here need cache mode writeback, and VMs cannot move with them")),
        Err(error) => Err(error.into()),
    }
}

fn out_of_space(views: &Views<'_>) -> Result<Seen, Wrong> {
    let free = views.here.space()?.free;
    if free > MAY_FILL {
        return Ok(Seen::Restricted("not tried: there is more than 1 GiB free, which is not filled for this"));
    }
    let volume = views.make("one", 1)?;
    let item = Item::volume(&volume.volume);
    // All of it is written, so that a clone needs as much again, which is not there.
    let file = views.here.open(&item, Access::WRITE)?;
    let large = Bytes((free.get() / 3 * 2).next_multiple_of(MIB));
    volume::grow(views.here, &volume, large)?;
    let piece = vec![7; usize::try_from(MIB).unwrap_or_default()];
    (0..large.get() / MIB).try_for_each(|at| file.write_all_at(&piece, at * MIB))?;
    file.sync_all()?;
    let cloned = volume::clone(views.there, &volume, None, &views.name("two"), DiskFormat::Raw);
    refused(cloned, ErrorCode::NotEnoughSpace, "a clone was made without room for it")?;
    ensure(!views.here.exists(&Item::volume(&views.name("two")))?, "a clone without room left something behind")?;
    let room = views.here.begin()?;
    let full = (0_u64..).try_for_each(|at| room.file().write_all_at(&piece, at * MIB)).and_then(|()| room.file().sync_all());
    ensure(full.is_err_and(|error| error.kind() == io::ErrorKind::StorageFull), "full storage does not say that it is full")?;
    drop(room);
    ensure(views.here.space()?.free.get() > free.get() / 6, "what was not published still takes space")?;
    let mut content = vec![0; piece.len()];
    for at in 0..large.get() / MIB {
        file.read_exact_at(&mut content, at * MIB)?;
        ensure(content == piece, "a volume changed when the storage became full")?;
    }
    Ok(Seen::Right)
}

/// How a QEMU opens a volume.
#[derive(Clone, Copy)]
enum Open {
    Read,
    Write,
}

/// A `qemu-io` that has a volume open, until it is dropped.
struct User {
    child: Child,
    is_in: bool,
}

impl User {
    fn open(qemu_io: &PathBuf, file: &File, open: Open) -> io::Result<Self> {
        let mut command = Command::new(qemu_io);
        if let Open::Read = open {
            command.arg("-r");
        }
        command.args(["-f", "qcow2", &path_of(file)]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn()?;
        // It prints its prompt when it is in, and ends when it is not.
        let mut prompt = [0; 1];
        let is_in = match &mut child.stdout {
            Some(said) => said.read(&mut prompt)? > 0,
            None => false,
        };
        Ok(Self { child, is_in })
    }

    fn kill(&mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

#[cfg(test)]
mod tests;
