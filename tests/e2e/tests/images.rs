//! An appliance from elsewhere becomes an image, and the VM made of it boots, moves and answers.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_api::client::Imported;
use godwit_e2e::Action::Migrate;
use godwit_e2e::{ClusterSpec, GuestSpec, guest_images};
use godwit_model::{Boot, DiskFormat, DiskSpec, ImageKind, ImportFormat, Name};

const DESCRIPTION: &str = r#"<?xml version="1.0"?>
<ovf:Envelope xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
  <ovf:References><ovf:File ovf:href="web-disk.vmdk" ovf:id="file7"/></ovf:References>
  <ovf:DiskSection><ovf:Disk ovf:diskId="d" ovf:fileRef="file7" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html"/>
  </ovf:DiskSection></ovf:Envelope>"#;

fn run(dir: &Path, program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).current_dir(dir).output().with_context(|| program.to_owned())?;
    ensure!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A disk that boots the test guest by itself, packed as other systems pack theirs.
fn appliance(dir: &Path, cmdline: &str) -> Result<Vec<u8>> {
    let images = guest_images()?;
    fs::copy(&images.kernel, dir.join("vmlinuz"))?;
    fs::copy(&images.initrd, dir.join("initrd.gz"))?;
    let menu = format!("DEFAULT guest\nPROMPT 0\nLABEL guest\nKERNEL vmlinuz\nINITRD initrd.gz\nAPPEND {cmdline}\n");
    fs::write(dir.join("syslinux.cfg"), menu)?;
    fs::File::create(dir.join("disk.raw"))?.set_len(64 << 20)?;
    run(dir, "mformat", &["-i", "disk.raw", "-t", "64", "-h", "64", "-s", "32", "::"])?;
    run(dir, "mcopy", &["-i", "disk.raw", "vmlinuz", "initrd.gz", "syslinux.cfg", "::"])?;
    run(dir, "syslinux", &["--install", "disk.raw"])?;
    let convert = ["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", "disk.raw", "web-disk.vmdk"];
    run(dir, "qemu-img", &convert)?;
    fs::write(dir.join("web.ovf"), DESCRIPTION)?;
    let digests = run(dir, "sha256sum", &["web.ovf", "web-disk.vmdk"])?;
    let line = |line: &str| line.split_once("  ").map(|(digest, name)| format!("SHA256({name})= {digest}\n"));
    fs::write(dir.join("web.mf"), digests.lines().filter_map(line).collect::<String>())?;
    run(dir, "tar", &["-cf", "web.ova", "web.ovf", "web-disk.vmdk", "web.mf"])?;
    Ok(fs::read(dir.join("web.ova"))?)
}

#[test]
fn an_appliance_made_by_other_tools_is_imported_boots_moves_and_goes_out_again() -> Result<()> {
    let mut cluster = ClusterSpec::new(2)?.up()?;
    let dir = tempfile::tempdir()?;
    let (kernel, initrd) = cluster.import_guest()?;
    // The first guest's address; what a kernel would be told stands on the disk.
    let Boot::Kernel { cmdline, .. } = GuestSpec::small("web").vm_spec(Ipv4Addr::new(10, 99, 0, 10), &kernel, &initrd).boot else {
        anyhow::bail!("the test guest boots from a kernel")
    };
    let archive = appliance(dir.path(), &cmdline)?;
    let name = Name::new("appliance")?;
    let content = futures::stream::iter([Ok(archive.into())]);
    let Imported::Task(task) = cluster.ask(cluster.client().import_image(&name, ImportFormat::Ova, content))? else {
        anyhow::bail!("an appliance is an image before it was converted")
    };
    cluster.done(task.id, Duration::from_secs(120))?;
    ensure!(cluster.ask(cluster.client().image(&name))?.kind == ImageKind::Qcow2);

    let web = GuestSpec::small("web").shape(|spec| {
        let volume = "shared/web".parse().expect("a volume");
        let image = Some(Name::new("appliance").expect("a name"));
        (spec.boot, spec.disks) = (Boot::Disk, vec![DiskSpec { image, ..DiskSpec::new(volume, DiskFormat::Qcow2) }]);
    });
    cluster.boot(&web, "h1")?;
    cluster.run(&[Migrate("web", "h2"), Migrate("web", "h1")])?;
    cluster.finish()
}
