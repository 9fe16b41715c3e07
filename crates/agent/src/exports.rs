//! Snapshots as files that any QEMU takes, and files that become a snapshot. What is in such a directory is in `docs/spec/export.md`.
//!
//! ```text
//! export   vault ──worker──▶ memory.qemu, variables.raw
//!          vault ──worker──▶ raw image without a name ──qemu-img in a cage──▶ diskN.qcow2, one after the other
//!          and what a QEMU that is started by hand needs beside them; then all get their name at once
//! import   diskN.qcow2 ──copied, checked──qemu-img in a cage──▶ raw image without a name ──worker──▶ vault
//!          memory.qemu, variables.raw ──worker──▶ vault
//! ```
//! Whatever fails leaves nothing, neither here nor in the vault.

mod script;

use std::fs::File;
use std::io::Cursor;
use std::time::Instant;

use godwit_link::{Malformed, convert, decode, encode, v1};
use godwit_model::{
    Bytes, DiskFormat, ErrorCode, Firmware, Name, Refusal, ResolvedSpec, SnapshotExport, SnapshotFigures, SnapshotSize,
};
use godwit_qemu::PassedFds;
use godwit_qemu::command::{PlainFiles, plain_arguments};
use godwit_qemu::disks::{VARIABLES, disk_node};

use crate::firmware::{self, Flash};
use crate::host::{SharedHost, host_failed};
use crate::seed;
use crate::snapshot::{DiskFile, Job, Kept, Keyed, MemoryFile, VaultAt, Worker, key_of};
use crate::storage::Export;
use crate::vm::{Answer, fetch_image};

const MEMORY: &str = "memory.qemu";
const VARIABLES_FILE: &str = "variables.raw";
const FIRMWARE: &str = "firmware.raw";
const KERNEL: &str = "kernel";
const INITRD: &str = "initrd";
const SEED: &str = "seed.raw";

/// The file of the disk in a slot.
fn disk_file(slot: usize) -> String {
    format!("disk{slot}.qcow2")
}

async fn work(host: &SharedHost, vault: &VaultAt, job: Job, fds: PassedFds) -> Result<serde_json::Value, Refusal> {
    let directory = host.pools.vault(&vault.pool, &vault.team, host.vault_uid()).await?;
    Worker::start(host, directory, job, fds).await?.done().await
}

fn told<T: serde::de::DeserializeOwned>(told: serde_json::Value) -> Result<T, Refusal> {
    serde_json::from_value(told).map_err(|error| Refusal::new(ErrorCode::Internal, format!("the vault worker's answer: {error}")))
}

/// An export under way.
struct Exporting<'a> {
    host: &'a SharedHost,
    vault: VaultAt,
    snapshot: Keyed,
    export: Export,
}

/// Writes a snapshot as files.
pub(crate) async fn export(host: &SharedHost, asked: v1::ExportSnapshot) -> Result<Answer, Refusal> {
    let vault = VaultAt::read(asked.vault.as_ref())?;
    let snapshot = key_of(asked.snapshot.as_ref().ok_or(Malformed::Field { field: "snapshot" })?)?;
    let name: Name = convert::name("name", &asked.name)?;
    let spec: ResolvedSpec = decode("spec", &asked.spec)?;
    let about: serde_json::Value = decode("about", &asked.about)?;
    let export = host.pools.begin_export(&vault.pool, &vault.team, &name).await?;
    let mut exporting = Exporting { host, vault, snapshot, export };
    let mut files = PlainFiles::default();
    if asked.memory {
        exporting.unload(None, MEMORY).await?;
        files.memory = Some(MEMORY.to_owned());
    }
    for (slot, _) in spec.disk_slots() {
        exporting.disk(slot).await?;
        files.disks.push(script::in_run(&disk_file(slot)));
    }
    exporting.beside(&spec, &mut files).await?;
    let export = &mut exporting.export;
    let pretty = serde_json::to_vec_pretty(&about).unwrap_or_default();
    export.write("vm.json", Cursor::new(pretty)).await?;
    let arguments = plain_arguments(&spec, &files).map_err(|error| Refusal::new(ErrorCode::SpecInvalid, error.to_string()))?;
    export.write_script("start.sh", script::start(&name, &spec, &files, &arguments)).await?;
    export.write("README.txt", Cursor::new(script::read_me(&name, &spec, &files, &host.facts.qemu))).await?;
    let (path, bytes) = exporting.export.publish().await?;
    tracing::info!(snapshot = %exporting.snapshot.id, path = %path.display(), %bytes, "a snapshot was exported");
    let told = SnapshotExport { host: host.identity.name.clone(), path: path.display().to_string(), bytes };
    Ok(Answer { result: encode(&told), ..Answer::default() })
}

impl Exporting<'_> {
    async fn work(&self, disk: Option<String>, to: std::os::fd::OwnedFd) -> Result<Bytes, Refusal> {
        let mut fds = PassedFds::new();
        let job = Job::Unload { snapshot: self.snapshot.clone(), disk, to_fd: fds.pass(to) };
        told(work(self.host, &self.vault, job, fds).await?)
    }

    /// Memory, or a disk as it is.
    async fn unload(&mut self, disk: Option<String>, name: &str) -> Result<(), Refusal> {
        let (file, theirs) = self.export.create(name)?;
        self.work(disk, theirs).await?;
        self.export.close(name, file).await
    }

    async fn disk(&mut self, slot: usize) -> Result<(), Refusal> {
        let raw = self.host.pools.unnamed(&self.vault.pool).await?;
        let size = self.work(Some(disk_node(slot)), raw.descriptor()?).await?;
        self.host.pools.export_disk(&mut self.export, &disk_file(slot), &raw, size).await
    }

    /// What a machine that is started by hand needs, and no snapshot has.
    async fn beside(&mut self, spec: &ResolvedSpec, files: &mut PlainFiles) -> Result<(), Refusal> {
        if let Firmware::Uefi { secure_boot, .. } = &spec.platform.firmware {
            self.unload(Some(VARIABLES.to_owned()), VARIABLES_FILE).await?;
            let code = File::open(Flash::require(*secure_boot)?.code);
            let code = code.map_err(|error| host_failed("the UEFI firmware cannot be read", &error))?;
            self.export.write(FIRMWARE, code).await?;
            files.flash = Some((FIRMWARE.to_owned(), script::in_run(VARIABLES_FILE)));
        }
        for (image, name, file) in [(&spec.kernel, KERNEL, &mut files.kernel), (&spec.initrd, INITRD, &mut files.initrd)] {
            if let Some(image) = image {
                self.export.write(name, File::from(fetch_image(self.host, image).await?.file)).await?;
                *file = Some(name.to_owned());
            }
        }
        if let Some(cloud_init) = &spec.cloud_init {
            self.export.write(SEED, Cursor::new(seed::image(spec.vm, &spec.name, cloud_init))).await?;
            files.seed = Some(SEED.to_owned());
        }
        files.tpm = spec.platform.tpm.as_ref().map(|_| script::in_run(script::TPM));
        Ok(())
    }
}

/// Makes files a snapshot.
pub(crate) async fn import(host: &SharedHost, asked: v1::ImportSnapshot) -> Result<Answer, Refusal> {
    let began = Instant::now();
    let vault = VaultAt::read(asked.vault.as_ref())?;
    let snapshot = key_of(asked.snapshot.as_ref().ok_or(Malformed::Field { field: "snapshot" })?)?;
    let known: Vec<Keyed> = asked.known.iter().map(key_of).collect::<Result<_, _>>()?;
    let from: Name = convert::name("from", &asked.from)?;
    let spec: ResolvedSpec = decode("spec", &asked.spec)?;
    let brought = host.pools.brought(&vault.pool, &vault.team, &from).await?;
    let mut fds = PassedFds::new();
    let memory = if asked.memory {
        let stream = host.pools.open_brought(&brought, MEMORY).await?;
        Some(MemoryFile { fd: fds.pass(stream), machine: spec.machine.clone() })
    } else {
        None
    };
    let (mut disks, mut images, mut sizes) = (Vec::new(), Vec::new(), Vec::new());
    for (slot, disk) in spec.disk_slots() {
        let size = host.pools.size_of(disk).await?;
        sizes.push(SnapshotSize { volume: disk.volume.clone(), size });
        let image = host.pools.import_disk(&brought, &disk_file(slot), DiskFormat::Qcow2, size).await?;
        disks.push(DiskFile { node: disk_node(slot), fd: fds.pass(image.descriptor()?), size });
        images.push(image);
    }
    if spec.platform.firmware.is_uefi() {
        let image = host.pools.import_disk(&brought, VARIABLES_FILE, DiskFormat::Raw, firmware::VARIABLES).await?;
        disks.push(DiskFile { node: VARIABLES.to_owned(), fd: fds.pass(image.descriptor()?), size: firmware::VARIABLES });
        images.push(image);
    }
    if disks.is_empty() && memory.is_none() {
        return Err(Refusal::new(ErrorCode::BadRequest, "the VM has no disk, and its memory is not wanted: nothing would be kept"));
    }
    let has_memory = memory.is_some();
    let job = Job::Load { snapshot, team: vault.key, known, memory, disks, about: asked.about };
    let kept: Kept = told(work(host, &vault, job, fds).await?)?;
    drop(images);
    let figures = SnapshotFigures {
        memory: has_memory,
        pause_us: None,
        took_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        pages_known: kept.known,
        pages_new: kept.new,
        written: kept.written,
        disks_read: kept.read,
        sizes,
        warnings: vec![],
    };
    Ok(Answer { result: encode(&figures), ..Answer::default() })
}
