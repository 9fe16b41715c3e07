//! Exports are there whole or not at all, and what is brought is looked at before anything else reads it.

use std::io::Cursor;

use super::*;

fn named(text: &str) -> Name {
    Name::new(text).expect("a name")
}

fn exports(fixture: &Fixture) -> Vec<String> {
    let entries = fs::read_dir(fixture.directory.path().join("p/exports/red")).into_iter().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.expect("entry").file_name().into_string().expect("text")).collect();
    names.sort();
    names
}

/// Where somebody brings files.
fn bring(fixture: &Fixture, name: &str) -> PathBuf {
    let path = fixture.directory.path().join("p/imports/red").join(name);
    fs::create_dir_all(&path).expect("directory");
    path
}

#[tokio::test]
async fn an_export_is_there_whole_or_not_at_all_and_takes_the_place_of_an_older_one() {
    let fixture = Fixture::new();
    let begin = async || fixture.pools.begin_export(&named("p"), &named("red"), &named("one")).await.expect("begun");
    let mut export = begin().await;
    export.write("a", Cursor::new("first")).await.expect("written");
    assert!(export.create("a").is_err(), "it has that file");
    drop(export);
    assert_eq!(exports(&fixture), [""; 0], "given up");
    let mut path = PathBuf::new();
    for content in ["first", "second"] {
        let mut export = begin().await;
        export.write("a", Cursor::new(content)).await.expect("written");
        export.write_script("run", "#!/bin/sh\n".into()).await.expect("written");
        let bytes;
        (path, bytes) = export.publish().await.expect("published");
        assert_eq!(path, fixture.directory.path().join("p/exports/red/one"));
        assert!(bytes.get() > 100, "{bytes}");
        assert_eq!((exports(&fixture), fs::read_to_string(path.join("a")).expect("read").as_str()), (vec!["one".into()], content));
    }
    let mode = |path: &Path| fs::metadata(path).expect("facts").mode() & 0o777;
    let modes = [mode(&path), mode(&path.join("a")), mode(&path.join("run")), mode(path.parent().expect("a directory"))];
    assert_eq!(modes, [0o700, 0o600, 0o700, 0o700]);
    let sums = fs::read_to_string(path.join("BLAKE3SUMS")).expect("read");
    assert_eq!(sums.lines().next(), Some(format!("{}  a", blake3::hash(b"second")).as_str()));

    // One whose maker died goes with the next; one that is being made stays.
    let made = begin().await;
    fs::create_dir(path.with_file_name(".00000000-0000-4000-8000-000000000000.draft")).expect("directory");
    fs::write(path.with_file_name(".00000000-0000-4000-8000-000000000000.draft").join("a"), "x").expect("written");
    assert_eq!(exports(&fixture).len(), 3);
    let other = begin().await;
    assert_eq!(exports(&fixture).iter().filter(|name| name.ends_with(".draft")).count(), 2);
    drop((made, other));
    fixture.assert_nothing_partial();
}

#[tokio::test]
async fn a_disk_goes_out_as_qcow2_and_comes_back_as_it_was() {
    let fixture = Fixture::new();
    let raw = fixture.pools.unnamed(&named("p")).await.expect("room");
    let file = File::from(raw.descriptor().expect("a descriptor"));
    file.set_len(8 * MIB).expect("length");
    file.write_all_at(&[7; 70_000], 3 * MIB).expect("written");
    let mut export = fixture.pools.begin_export(&named("p"), &named("red"), &named("one")).await.expect("begun");
    fixture.pools.export_disk(&mut export, "disk0.qcow2", &raw, Bytes::mib(8)).await.expect("exported");
    let (path, _) = export.publish().await.expect("published");
    tool("qemu-img", &["check", "-q", path.join("disk0.qcow2").to_str().expect("plain")]);
    assert_eq!(fs::metadata(path.join("disk0.qcow2")).expect("facts").uid(), rustix::process::geteuid().as_raw());

    let brought = fixture.pools.brought(&named("p"), &named("red"), &named("one")).await.expect("found");
    let import = async |size| fixture.pools.import_disk(&brought, "disk0.qcow2", DiskFormat::Qcow2, size).await.map_err(complete);
    assert_eq!(import(Bytes::mib(9)).await.err(), Some(ErrorCode::SnapshotInvalid), "the VM's is larger");
    assert_eq!(import(Bytes::mib(7)).await.err(), Some(ErrorCode::SnapshotInvalid), "the VM's is smaller");
    let back = File::from(import(Bytes::mib(8)).await.expect("imported").descriptor().expect("a descriptor"));
    let mut content = vec![0; 8 << 20];
    back.read_exact_at(&mut content, 0).expect("read");
    let mut before = vec![0; 8 << 20];
    file.read_exact_at(&mut before, 0).expect("read");
    assert!(content == before && back.metadata().expect("facts").len() == 8 * MIB);

    // One byte of it is another.
    let image = OpenOptions::new().write(true).open(path.join("disk0.qcow2")).expect("open");
    image.write_all_at(&[1], 3 * 65_536).expect("written");
    assert_eq!(import(Bytes::mib(8)).await.err(), Some(ErrorCode::SnapshotInvalid));
    drop((raw, back));
    fixture.assert_nothing_partial();
}

/// A small file system, until it is dropped.
struct Mount(PathBuf);

impl Mount {
    fn tmpfs(at: PathBuf, options: &std::ffi::CStr) -> Self {
        rustix::mount::mount("godwit-test", &at, "tmpfs", rustix::mount::MountFlags::empty(), options).expect("mounted");
        Self(at)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[tokio::test]
async fn an_export_for_which_there_is_no_room_in_the_middle_leaves_nothing_and_the_older_one_as_it_was() {
    let fixture = Fixture::new();
    let begin = async || fixture.pools.begin_export(&named("p"), &named("red"), &named("one")).await.expect("begun");
    let raw = fixture.pools.unnamed(&named("p")).await.expect("room");
    let file = File::from(raw.descriptor().expect("a descriptor"));
    file.set_len(8 * MIB).expect("length");
    file.write_all_at(&[7; 4 << 20], MIB).expect("written");
    let place = fixture.directory.path().join("p/exports/red");
    fs::create_dir_all(&place).expect("directory");
    let _small = Mount::tmpfs(place.clone(), c"size=2m");
    let mut older = begin().await;
    older.write("a", Cursor::new("older")).await.expect("written");
    older.publish().await.expect("published");
    for disk in [true, false] {
        let mut export = begin().await;
        export.write("a", Cursor::new("newer")).await.expect("there is room for it");
        let written = if disk {
            fixture.pools.export_disk(&mut export, "disk0.qcow2", &raw, Bytes::mib(8)).await
        } else {
            export.write("firmware.raw", Cursor::new(vec![7; 4 << 20])).await
        };
        assert_eq!(written.map_err(complete), Err(ErrorCode::NotEnoughSpace), "{disk}");
        drop(export);
        assert_eq!(exports(&fixture), ["one"], "{disk}");
        assert_eq!(fs::read_to_string(place.join("one/a")).expect("read"), "older");
    }
    drop(raw);
    fixture.assert_nothing_partial();
}

#[tokio::test]
async fn what_is_brought_is_a_whole_file_that_leads_nowhere_else() {
    let fixture = Fixture::new();
    let directory = bring(&fixture, "one");
    let path = |name: &str| directory.join(name).to_str().expect("plain").to_owned();
    let secret = fixture.directory.path().join("secret");
    fs::write(&secret, vec![5; 8 << 20]).expect("write");
    let secret = secret.to_str().expect("plain");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", &path("backed"), "8M"]);
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", &format!("data_file={},data_file_raw=on", path("data")), &path("split"), "8M"],
    );
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &path("encrypted"), "8M"]);
    let encrypted = OpenOptions::new().write(true).open(path("encrypted")).expect("open");
    encrypted.write_all_at(&[0, 0, 0, 1], 32).expect("written");
    full_qcow2(Path::new(&path("cut")));
    cut(Path::new(&path("cut")), 2 * MIB);
    fs::write(path("text"), "no disk").expect("written");
    fs::write(path("empty"), "").expect("written");
    fs::create_dir(path("directory")).expect("directory");
    tool("mkfifo", &[&path("pipe")]);
    full_qcow2(&fixture.directory.path().join("good"));
    std::os::unix::fs::symlink("../../../../good", path("link")).expect("link");
    let brought = fixture.pools.brought(&named("p"), &named("red"), &named("one")).await.expect("found");
    let import = async |name: &str, format| {
        let imported = fixture.pools.import_disk(&brought, name, format, Bytes::mib(64)).await;
        imported.map(drop).map_err(complete)
    };
    for name in ["backed", "split", "encrypted", "cut", "text", "empty", "directory", "pipe", "link", "missing", "data"] {
        assert_eq!(import(name, DiskFormat::Qcow2).await, Err(ErrorCode::SnapshotInvalid), "{name}");
    }
    assert_eq!(import("text", DiskFormat::Raw).await, Err(ErrorCode::SnapshotInvalid), "too short");
    fs::rename(fixture.directory.path().join("good"), path("good")).expect("renamed");
    assert_eq!(import("good", DiskFormat::Qcow2).await, Ok(()));

    // Digests that were brought are held to.
    let digests = async |text: String| {
        fs::write(path("BLAKE3SUMS"), text).expect("written");
        let brought = fixture.pools.brought(&named("p"), &named("red"), &named("one")).await.map_err(complete)?;
        fixture.pools.open_brought(&brought, "good").await.map(drop).map_err(complete)
    };
    let good = blake3::hash(&fs::read(path("good")).expect("read"));
    assert_eq!(digests(format!("{good}  good\n")).await, Ok(()));
    for wrong in [String::new(), format!("{}  good\n", blake3::hash(b"x")), format!("{good}  other\n"), "garbage".into()] {
        assert_eq!(digests(wrong.clone()).await, Err(ErrorCode::SnapshotInvalid), "{wrong:?}");
    }
    // Another team has brought nothing.
    let other = fixture.pools.brought(&named("p"), &named("blue"), &named("one")).await.expect("looked for");
    let found = fixture.pools.open_brought(&other, "good").await;
    assert_eq!(found.map(drop).map_err(complete), Err(ErrorCode::SnapshotInvalid));
    fixture.assert_nothing_partial();
}
