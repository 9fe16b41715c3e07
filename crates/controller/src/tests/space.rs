//! A store without space refuses and loses nothing.

use godwit_api::v1 as api;
use godwit_model::{Bytes, ErrorCode};

use super::support::*;

#[tokio::test]
async fn a_full_store_refuses_and_changes_nothing() {
    let cluster = Cluster::with(|options| options.store_pages = Some(60)).await;
    cluster.create_vm("first", Bytes::mib(64)).await;
    let admin = cluster.admin();
    let mut created = vec!["first".to_owned()];
    // A smaller transaction may still fit where a larger one did not: what counts is that the refused one left nothing.
    let refused = loop {
        let vm = format!("vm{}", created.len());
        let request = api::VmCreate { name: name(&vm), spec: spec(Bytes::mib(64)), golden: None };
        let response = admin.request(reqwest::Method::POST, "/vms").json(&request).send().await.expect("answer");
        match response.status().as_u16() {
            201 => created.push(vm),
            507 => break response.json::<godwit_model::Refusal>().await.expect("a refusal"),
            other => panic!("{other}"),
        }
        assert!(created.len() < 1_000, "the store never gets full");
    };
    assert_eq!(refused.code, ErrorCode::StoreFull);
    assert!(refused.hint.is_some());
    created.sort();
    let mut there: Vec<_> = admin.vms().await.expect("vms").into_iter().map(|vm| vm.name.to_string()).collect();
    there.sort();
    assert_eq!(there, created);
}

#[tokio::test]
async fn a_full_disk_refuses_and_works_again_once_there_is_space() {
    let mount = Mount::new();
    let data = mount.0.path().join("data");
    let mut cluster = Cluster::with(|options| options.data_dir = data).await;
    cluster.create_vm("first", Bytes::mib(64)).await;
    let ballast = mount.0.path().join("ballast");
    fill(&ballast);
    let request = |vm: &str| api::VmCreate { name: name(vm), spec: spec(Bytes::mib(64)), golden: None };
    let refused = cluster.admin().create_vm(&request("second")).await;
    assert_eq!(code(refused), ErrorCode::StoreFull);
    assert_eq!(code(cluster.admin().vm(&name("second")).await), ErrorCode::NotFound);
    let image = futures::stream::iter([Ok(vec![0; 1 << 20].into())]);
    assert_eq!(
        code(cluster.admin().import_image(&name("disk"), godwit_model::ImportFormat::Raw, image).await),
        ErrorCode::StoreFull
    );
    std::fs::remove_file(&ballast).expect("removed");
    cluster.admin().create_vm(&request("second")).await.expect("created");
    cluster.stop().await;
    cluster.start().await;
    assert_eq!(cluster.admin().vms().await.expect("vms").len(), 2);
    cluster.stop().await;
}

/// A small file system of its own, in this thread's mount namespace or not: it goes when dropped.
struct Mount(tempfile::TempDir);

impl Mount {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let status = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=6m", "godwit-test"])
            .arg(dir.path())
            .status()
            .expect("mount can be run");
        assert!(status.success(), "a tmpfs cannot be mounted: this test needs root");
        Self(dir)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

/// Takes all the space there is.
fn fill(path: &std::path::Path) {
    use std::io::Write;
    let mut file = std::fs::File::create(path).expect("file");
    for size in [1 << 16, 1 << 12, 1] {
        while file.write_all(&vec![0; size]).is_ok() {}
    }
}
