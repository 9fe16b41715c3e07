//! State of TPMs in a pool with real files, left at every point of a move and taken up again.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use godwit_model::Name;

use super::super::PoolConfig;
use super::*;

struct Fixture {
    directory: tempfile::TempDir,
    pools: Pools,
    volume: VolumeRef,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("directory");
        let pools = Self::open(&directory);
        Self { directory, pools, volume: "p/tpm".parse().expect("volume") }
    }

    fn open(directory: &tempfile::TempDir) -> Pools {
        let config = PoolConfig { name: Name::new("p").expect("name"), path: directory.path().join("p"), shared: false };
        Pools::open(vec![config]).expect("pools")
    }

    /// A pool whose volume has the source's state, and the state of a destination beside it.
    async fn moving() -> (Self, Successor, OwnedFd) {
        let fixture = Self::new();
        drop(fixture.pools.open_tpm(&fixture.volume, uid()).await.expect("made"));
        fs::write(fixture.path(), "source").expect("written");
        let (state, file) = fixture.pools.begin_tpm(&fixture.volume, uid()).await.expect("begun");
        fs::write(fixture.partial(&state.id.to_string()), "destination").expect("written");
        (fixture, state, file)
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("p/volumes/tpm")
    }

    fn partial(&self, name: &str) -> PathBuf {
        self.directory.path().join("p/partial").join(name)
    }

    fn content(&self) -> String {
        fs::read_to_string(self.path()).expect("the volume is there")
    }

    fn partials(&self) -> usize {
        fs::read_dir(self.directory.path().join("p/partial")).expect("directory").count()
    }
}

/// Who runs the test is who may give files to itself.
fn uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

#[tokio::test]
async fn a_tpms_state_is_made_once_is_secret_and_has_one_user_at_a_time() {
    let fixture = Fixture::new();
    let open = async || fixture.pools.open_tpm(&fixture.volume, uid()).await;
    let first = open().await.expect("made");
    let facts = fs::metadata(fixture.path()).expect("there");
    assert_eq!((facts.permissions().mode() & 0o777, facts.uid(), facts.len()), (0o600, uid(), 0));
    let refusal = open().await.expect_err("it has a user");
    assert!(refusal.code == ErrorCode::InUse && refusal.hint.is_some(), "{refusal:?}");
    assert_eq!(fixture.pools.delete(&fixture.volume).await.expect_err("it has a user").code, ErrorCode::InUse);
    // What swtpm holds is a copy of the descriptor: ours alone says nothing.
    let of_swtpm = first.try_clone().expect("a copy");
    drop(first);
    assert!(open().await.is_err(), "the copy is open");
    drop(of_swtpm);
    fs::write(fixture.path(), [&MAGIC[..], b"..."].concat()).expect("written");
    fs::set_permissions(fixture.path(), PermissionsExt::from_mode(0o644)).expect("opened to all");
    drop(open().await.expect("opened"));
    assert_eq!(fs::metadata(fixture.path()).expect("there").permissions().mode() & 0o777, 0o600);
}

/// swtpm would make it anew, and what was in it would be gone.
#[tokio::test]
async fn a_volume_that_is_no_tpms_state_is_refused_and_left_alone() {
    let fixture = Fixture::new();
    drop(fixture.pools.open_tpm(&fixture.volume, uid()).await.expect("made"));
    for content in [&b"somebody's disk"[..], b"nilm", &[0; 4_096]] {
        fs::write(fixture.path(), content).expect("written");
        let refusal = fixture.pools.open_tpm(&fixture.volume, uid()).await.expect_err("no state");
        assert!(refusal.code == ErrorCode::VolumeFormat && refusal.hint.is_some(), "{refusal:?}");
        assert_eq!(fs::read(fixture.path()).expect("there"), content);
    }
}

/// Left by a crash at each point, as files; then every way on, each step twice.
#[tokio::test]
async fn state_that_comes_is_handed_over_or_given_back_from_wherever_it_was_left() {
    type Leave = fn(&Fixture, &str);
    let left: [(&str, Leave); 4] = [
        ("begun", |_, _| {}),
        ("kept", |fixture, own| {
            fs::hard_link(fixture.path(), fixture.partial(&format!("{own}.before"))).expect("linked");
        }),
        ("taken away where there are no links", |fixture, own| {
            fs::rename(fixture.path(), fixture.partial(&format!("{own}.before"))).expect("renamed");
        }),
        ("published", |fixture, own| {
            fs::rename(fixture.path(), fixture.partial(&format!("{own}.before"))).expect("renamed");
            fs::rename(fixture.partial(own), fixture.path()).expect("renamed");
        }),
    ];
    for (what, leave) in left {
        let (fixture, state, _file) = Fixture::moving().await;
        let Fixture { pools, volume, .. } = &fixture;
        leave(&fixture, &state.id.to_string());
        for _ in 0..2 {
            pools.publish_tpm(volume, &state).await.expect(what);
            assert_eq!((fixture.content().as_str(), fixture.partials()), ("destination", 1), "{what}: published");
        }
        for _ in 0..2 {
            pools.settle_tpm(volume, &state).await.expect(what);
            assert_eq!((fixture.content().as_str(), fixture.partials()), ("destination", 0), "{what}: settled");
        }

        let (fixture, state, _file) = Fixture::moving().await;
        let Fixture { pools, volume, .. } = &fixture;
        leave(&fixture, &state.id.to_string());
        for _ in 0..2 {
            pools.withdraw_tpm(volume, &state).await.expect(what);
            assert_eq!((fixture.content().as_str(), fixture.partials()), ("source", 0), "{what}: withdrawn");
        }
        let refusal = pools.publish_tpm(volume, &state).await.expect_err("what was withdrawn does not come again");
        assert!(refusal.hint.is_some() && fixture.content() == "source", "{what}: {refusal:?}");
    }
}

#[tokio::test]
async fn state_that_is_used_is_not_taken_for_abandoned() {
    let (fixture, state, file) = Fixture::moving().await;
    let source = OwnedFd::from(File::options().read(true).write(true).open(fixture.path()).expect("open"));
    assert!(super::super::locks::hold(&source, Hold::Taken).expect("locked"));
    fixture.pools.publish_tpm(&fixture.volume, &state).await.expect("published");
    let before = fixture.partial(&format!("{}.before", state.id));
    let day = Duration::from_secs(86_400);
    File::options().write(true).open(&before).and_then(|file| file.set_modified(SystemTime::now() - day)).expect("old");
    // As another host, or the agent's next life, finds it.
    drop(Fixture::open(&fixture.directory));
    assert!(before.exists(), "the source's state is gone while its TPM lives");
    drop((source, file));
    drop(Fixture::open(&fixture.directory));
    assert!(!before.exists(), "nobody removes it");
}
