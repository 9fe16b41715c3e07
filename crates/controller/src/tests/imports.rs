//! Imports that are tasks, with disks made by `qemu-img`, an archive made by `tar`, and servers that do what a test says.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::http::header::LOCATION;
use axum::routing::get;
use axum_server::tls_rustls::RustlsConfig;
use futures::StreamExt;
use godwit_api::client::Imported;
use godwit_api::v1::{self as api, TaskState};
use godwit_model::{Bytes, ErrorCode, ImageKind, ImportFormat, TaskId};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use super::support::*;
use crate::{Converter, FetchRules};

/// `qemu-img` as it is, without the confinement that the real program adds.
fn unconfined() -> Converter {
    shell(
        r#"exec qemu-img convert -p -f "$2" -O "$4" $(test "$4" = vmdk && echo -o subformat=streamOptimized) "/proc/self/fd/$8" "/proc/self/fd/${10}""#,
    )
}

fn shell(script: &str) -> Converter {
    Converter { program: "/bin/sh".into(), arguments: vec!["-c".into(), script.into(), "convert".into()] }
}

fn tool(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().expect(program);
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Disks with the same content in several formats.
struct Disks {
    dir: tempfile::TempDir,
}

impl Disks {
    fn new() -> Self {
        let disks = Self { dir: tempfile::tempdir().expect("dir") };
        let content: Vec<u8> = (0..3 << 20).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        std::fs::write(disks.path("disk.raw"), content).expect("written");
        disks
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The disk in another format.
    fn convert(&self, name: &str, format: &str, options: &str) -> PathBuf {
        let (from, to) = (self.path("disk.raw"), self.path(name));
        let mut arguments = vec!["convert", "-f", "raw", "-O", format];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        arguments.extend([from.to_str().expect("plain"), to.to_str().expect("plain")]);
        tool("qemu-img", &arguments);
        to
    }

    /// An appliance as another program would pack it: the disk in the middle, a manifest at the end.
    fn ova(&self) -> PathBuf {
        self.convert("web-disk.vmdk", "vmdk", "subformat=streamOptimized");
        let description = r#"<?xml version="1.0"?>
<ovf:Envelope xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
  <ovf:References><ovf:File ovf:href="web-disk.vmdk" ovf:id="file7"/></ovf:References>
  <ovf:DiskSection><ovf:Disk ovf:diskId="d" ovf:fileRef="file7" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html"/>
  </ovf:DiskSection></ovf:Envelope>"#;
        std::fs::write(self.path("web.ovf"), description).expect("written");
        let script = "cd $1 && sha256sum web.ovf web-disk.vmdk | sed -E 's/^([0-9a-f]+)  (.*)$/SHA256(\\2)= \\1/' > web.mf && tar -cf web.ova web.ovf web-disk.vmdk web.mf";
        tool("sh", &["-c", script, "pack", self.dir.path().to_str().expect("plain")]);
        self.path("web.ova")
    }

    fn assert_same(&self, image: &Path, format: &str) {
        let raw = self.path("disk.raw");
        tool("qemu-img", &["compare", "-f", "raw", "-F", format, raw.to_str().expect("plain"), image.to_str().expect("plain")]);
    }
}

async fn import(cluster: &Cluster, image: &str, kind: ImportFormat, file: &Path) -> TaskId {
    let content = futures::stream::iter([Ok(std::fs::read(file).expect("file").into())]);
    match cluster.admin().import_image(&name(image), kind, content).await.expect("accepted") {
        Imported::Task(task) => task.id,
        Imported::Image(image) => panic!("{image:?}"),
    }
}

async fn export(cluster: &Cluster, image: &str, format: &str, to: &Path) {
    let (length, content) = cluster.admin().export_image(&name(image), format).await.expect("exported");
    let content: Vec<u8> = content.map(|chunk| chunk.expect("chunk").to_vec()).concat().await;
    assert_eq!(length, Some(content.len() as u64));
    std::fs::write(to, content).expect("written");
}

fn files(cluster: &Cluster) -> Vec<String> {
    let entries = std::fs::read_dir(cluster.options.data_dir.join("images")).expect("dir");
    entries.map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned()).collect()
}

/// Waits until so many files are left: what an image was made of goes right after its task has ended.
async fn left(cluster: &Cluster, count: usize) {
    soon(async {
        while files(cluster).len() != count {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn disks_of_other_makers_become_qcow2_with_the_same_content_and_go_out_again() {
    let cluster = Cluster::with(|options| options.converter = unconfined()).await;
    let disks = Disks::new();
    let sparse = disks.convert("a.vmdk", "vmdk", "subformat=monolithicSparse");
    let stream = disks.convert("b.vmdk", "vmdk", "subformat=streamOptimized");
    let vhdx = disks.convert("c.vhdx", "vhdx", "");
    let ova = disks.ova();
    for (image, kind, file) in [
        ("sparse", ImportFormat::Vmdk, sparse),
        ("stream", ImportFormat::Vmdk, stream),
        ("vhdx", ImportFormat::Vhdx, vhdx),
        ("ova", ImportFormat::Ova, ova),
    ] {
        let task = cluster.ended(import(&cluster, image, kind, &file).await).await;
        assert_eq!(task.state, TaskState::Done, "{image}: {task:?}");
        assert_eq!(cluster.admin().image(&name(image)).await.expect("image").kind, ImageKind::Qcow2);
        let out = disks.path("out.qcow2");
        export(&cluster, image, "stored", &out).await;
        disks.assert_same(&out, "qcow2");
    }
    let out = disks.path("out.ova");
    export(&cluster, "ova", "ova", &out).await;
    let task = cluster.ended(import(&cluster, "again", ImportFormat::Ova, &out).await).await;
    assert_eq!(task.state, TaskState::Done, "{task:?}");
    let raw = futures::stream::iter([Ok(std::fs::read(disks.path("disk.raw")).expect("file").into())]);
    cluster.admin().import_image(&name("raw"), ImportFormat::Raw, raw).await.expect("imported");
    for image in ["again", "raw"] {
        let out = disks.path("out.qcow2");
        export(&cluster, image, "qcow2", &out).await;
        disks.assert_same(&out, "qcow2");
    }
    left(&cluster, 6).await;
}

#[tokio::test]
async fn what_cannot_be_converted_leaves_nothing_but_its_reason() {
    let cluster = Cluster::with(|options| options.converter = unconfined()).await;
    let disks = Disks::new();
    let flat = disks.convert("flat.vmdk", "vmdk", "subformat=monolithicFlat");
    let cut = disks.convert("cut.vhdx", "vhdx", "");
    std::fs::OpenOptions::new().write(true).open(&cut).expect("open").set_len(100_000).expect("cut");
    for (image, kind, file) in [
        ("flat", ImportFormat::Vmdk, &flat),
        ("other", ImportFormat::Vmdk, &disks.path("disk.raw")),
        ("cut", ImportFormat::Vhdx, &cut),
        ("tar", ImportFormat::Ova, &disks.path("disk.raw")),
    ] {
        let task = cluster.ended(import(&cluster, image, kind, file).await).await;
        let error = task.error.expect("a reason");
        assert_eq!((task.state, error.code), (TaskState::Failed, ErrorCode::ImageInvalid), "{image}");
        assert!(error.hint.is_some(), "{image}: no fix");
        assert_eq!(code(cluster.admin().image(&name(image)).await), ErrorCode::NotFound);
    }
    left(&cluster, 0).await;
}

#[tokio::test]
async fn an_import_can_be_cancelled_holds_its_name_and_goes_on_after_a_restart() {
    let mut cluster = Cluster::with(|options| options.converter = shell("echo '(10.00/100%)'; exec sleep 600")).await;
    let disks = Disks::new();
    let vhdx = disks.convert("a.vhdx", "vhdx", "");
    let admin = cluster.admin();
    let cancelled = import(&cluster, "disk", ImportFormat::Vhdx, &vhdx).await;
    let task = cluster.task_when(cancelled, |task| task.transfer.is_some_and(|transfer| transfer.permille == Some(100))).await;
    assert!(task.cancellable);
    let twice = admin
        .fetch_image(&name("disk"), &api::ImageFetch { url: "https://x/y".into(), kind: ImportFormat::Raw, sha256: None })
        .await;
    assert_eq!(code(twice), ErrorCode::NameTaken);
    admin.cancel_task(cancelled).await.expect("cancelled");
    assert_eq!(cluster.ended(cancelled).await.state, TaskState::Cancelled);
    left(&cluster, 0).await;

    let resumed = import(&cluster, "disk", ImportFormat::Vhdx, &vhdx).await;
    cluster.task_when(resumed, |task| task.transfer.is_some()).await;
    cluster.stop().await;
    cluster.options.converter = unconfined();
    cluster.start().await;
    assert_eq!(cluster.ended(resumed).await.state, TaskState::Done);
    left(&cluster, 1).await;
    cluster.stop().await;
}

/// A server on loopback with a certificate of an authority of its own.
struct Server {
    url: String,
    authority: String,
}

impl Server {
    async fn new() -> Self {
        let authority_key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::new(vec![]).expect("params");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = params.self_signed(&authority_key).expect("authority");
        let key = KeyPair::generate().expect("key");
        let signed = CertificateParams::new(vec!["localhost".into()]).expect("params");
        let certificate = signed.signed_by(&key, &Issuer::new(params, authority_key)).expect("signed");
        let to = |url: &'static str| get(move || async move { (StatusCode::FOUND, [(LOCATION, url)]) });
        let router = Router::new()
            .route("/disk", get(|| async { vec![7_u8; 4_096] }))
            .route("/large", get(|| async { vec![7_u8; 65_536] }))
            .route("/moved", to("/disk"))
            .route("/inside", to("https://169.254.169.254/latest"))
            .route("/clear", to("http://localhost/disk"))
            .route("/round", to("/round"));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("listener");
        listener.set_nonblocking(true).expect("nonblocking");
        let port = listener.local_addr().expect("address").port();
        let tls = RustlsConfig::from_pem(certificate.pem().into(), key.serialize_pem().into()).await.expect("tls");
        tokio::spawn(axum_server::from_tcp_rustls(listener, tls).expect("server").serve(router.into_make_service()));
        Self { url: format!("https://localhost:{port}"), authority: authority.pem() }
    }
}

#[tokio::test]
async fn a_url_is_fetched_only_from_where_it_may_be_and_only_as_it_should_be() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let server = Server::new().await;
    let allowed = vec!["127.0.0.0/8".parse().expect("net"), "::1/128".parse().expect("net")];
    let authorities = Some(server.authority.clone());
    let cluster = Cluster::with(|options| {
        options.image_limit = Bytes(8_192);
        options.fetch = FetchRules { allowed, authorities };
    })
    .await;
    let strict = Cluster::new().await;
    let fetch = async |cluster: &Cluster, path: &str, sha256: Option<&str>| {
        let url = format!("{}{path}", server.url);
        let request = api::ImageFetch { url, kind: ImportFormat::Raw, sha256: sha256.map(str::to_owned) };
        let task = cluster.admin().fetch_image(&name("disk"), &request).await.expect("accepted");
        cluster.ended(task.id).await
    };
    let digest = "4c5e9e6db2f8bdc26a0f8c0cfe1ea8f5b4c3f5e4d2b1a09f8e7d6c5b4a392817";
    for (path, sha256, expected) in [
        ("/disk", Some(digest), ErrorCode::ImageInvalid),
        ("/large", None, ErrorCode::BodyTooLarge),
        ("/nothing", None, ErrorCode::FetchFailed),
        ("/inside", None, ErrorCode::AddressForbidden),
        ("/clear", None, ErrorCode::BadRequest),
        ("/round", None, ErrorCode::FetchFailed),
    ] {
        let task = fetch(&cluster, path, sha256).await;
        assert_eq!(task.error.map(|error| error.code), Some(expected), "{path}");
        left(&cluster, 0).await;
    }
    let refused = fetch(&strict, "/disk", None).await.error.expect("refused");
    assert_eq!(refused.code, ErrorCode::AddressForbidden, "{refused}");

    let right = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &[7; 4_096]);
    let right: String = right.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let task = fetch(&cluster, "/moved", Some(&right)).await;
    assert_eq!(task.state, TaskState::Done, "{task:?}");
    let image = cluster.admin().image(&name("disk")).await.expect("image");
    assert_eq!((image.size, image.kind), (Bytes(4_096), ImageKind::Raw));
    left(&cluster, 1).await;
    assert_eq!(files(&cluster), [image.id.to_string()]);
}
