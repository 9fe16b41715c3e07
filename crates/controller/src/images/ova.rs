//! Appliances (OVA): a tar archive of a description (OVF), a manifest of digests, and disks. Reads one disk out of it; writes one around a disk.
//!
//! Formats as DMTF's DSP0243 gives them. What the archive says about itself is believed only as far as it is checked: names are compared,
//! never used as paths; sizes are bounded before anything is read; every digest of the manifest must be right.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use aws_lc_rs::digest::{Context, Digest, SHA1_FOR_LEGACY_USE_ONLY, SHA256, SHA512};
use godwit_model::Bytes;

/// Members of an archive that are looked at.
const MAX_MEMBERS: usize = 64;
/// Longest description and manifest.
const MAX_TEXT: u64 = 1 << 20;
const CHUNK: usize = 256 << 10;

/// Why an appliance cannot be taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum InvalidOva {
    /// Not a tar archive, or one that is cut off.
    #[error("the appliance is not a whole tar archive: {0}")]
    Archive(#[source] io::Error),
    /// More in it than an appliance has.
    #[error("the appliance has more than {MAX_MEMBERS} files")]
    Members,
    /// No description.
    #[error("the appliance has no description (.ovf)")]
    NoDescription,
    /// A description or manifest out of all proportion.
    #[error("the appliance's {0} is longer than {MAX_TEXT} bytes")]
    TooLong(&'static str),
    /// A description that is not understood.
    #[error("the appliance's description cannot be read: {0}")]
    Description(String),
    /// No disk, or more than one.
    #[error("an image is one disk, the appliance has {0}")]
    Disks(usize),
    /// A disk in a format that is not a VMDK.
    #[error("the appliance's disk is of format {0}, known is VMDK")]
    Format(String),
    /// A compressed disk.
    #[error("the appliance's disk is compressed as a file ({0})")]
    Compressed(String),
    /// The description names a disk that the archive does not have.
    #[error("the appliance has no file {0}, which its description names as the disk")]
    Missing(String),
    /// The manifest is not understood.
    #[error("the appliance's manifest cannot be read: {0}")]
    Manifest(String),
    /// A digest is wrong.
    #[error("the appliance is damaged: {0} does not have the digest that its manifest gives")]
    Digest(String),
}

impl InvalidOva {
    /// What to do.
    pub(super) const fn fix(&self) -> &'static str {
        match self {
            Self::Archive(_) | Self::Digest(_) => "copy the file again and import that",
            Self::Disks(_) => "unpack it (`tar -xf`) and import each disk as an image of its own, with its own format",
            Self::Compressed(_) => "unpack it (`tar -xf`, then `gzip -d`) and import the disk, with its own format",
            _ => "export the appliance again as OVF 1.0 or 2.0 in one file, or unpack it and import its disk with its own format",
        }
    }
}

/// A member of the archive.
struct Member {
    name: String,
    start: u64,
    size: u64,
}

/// Where the one disk of an appliance is in its file: start and length in bytes. Every digest of the manifest has been checked.
pub(super) fn find_disk(archive: &mut File) -> Result<(u64, u64), InvalidOva> {
    let members = members(archive)?;
    let described = members.iter().find(|member| has_ending(&member.name, "ovf")).ok_or(InvalidOva::NoDescription)?;
    let description = text(archive, described, "description")?;
    let wanted = decide_disk(&description)?;
    let disk = members.iter().find(|member| member.name == wanted).ok_or_else(|| InvalidOva::Missing(wanted.clone()))?;
    if let Some(manifest) = members.iter().find(|member| has_ending(&member.name, "mf")) {
        for (name, algorithm, digest) in read_manifest(&text(archive, manifest, "manifest")?)? {
            let Some(member) = members.iter().find(|member| member.name == name) else { continue };
            if digest_of(archive, member, algorithm).map_err(InvalidOva::Archive)?.as_ref() != digest {
                return Err(InvalidOva::Digest(name));
            }
        }
    }
    Ok((disk.start, disk.size))
}

fn members(archive: &mut File) -> Result<Vec<Member>, InvalidOva> {
    archive.rewind().map_err(InvalidOva::Archive)?;
    let length = archive.metadata().map_err(InvalidOva::Archive)?.len();
    let mut members = Vec::new();
    let mut tar = tar::Archive::new(&*archive);
    for entry in tar.entries_with_seek().map_err(InvalidOva::Archive)? {
        let entry = entry.map_err(InvalidOva::Archive)?;
        if members.len() >= MAX_MEMBERS {
            return Err(InvalidOva::Members);
        }
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).trim_start_matches("./").to_owned();
        let (start, size) = (entry.raw_file_position(), entry.size());
        if start.checked_add(size).is_none_or(|end| end > length) {
            return Err(InvalidOva::Archive(io::ErrorKind::UnexpectedEof.into()));
        }
        members.push(Member { name, start, size });
    }
    Ok(members)
}

fn has_ending(name: &str, ending: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, found)| found.eq_ignore_ascii_case(ending))
}

fn text(archive: &mut File, member: &Member, what: &'static str) -> Result<String, InvalidOva> {
    if member.size > MAX_TEXT {
        return Err(InvalidOva::TooLong(what));
    }
    let mut bytes = Vec::new();
    archive.seek(SeekFrom::Start(member.start)).map_err(InvalidOva::Archive)?;
    archive.take(member.size).read_to_end(&mut bytes).map_err(InvalidOva::Archive)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The name of the file with the one disk that a description lists.
fn decide_disk(description: &str) -> Result<String, InvalidOva> {
    let document = roxmltree::Document::parse(description).map_err(|error| InvalidOva::Description(error.to_string()))?;
    let named = |name: &'static str| document.descendants().filter(move |node| node.is_element() && node.tag_name().name() == name);
    let attribute = |node: roxmltree::Node<'_, '_>, name: &str| {
        node.attributes().find(|attribute| attribute.name() == name).map(|attribute| attribute.value().to_owned())
    };
    let disks: Vec<_> = named("Disk").filter(|disk| attribute(*disk, "fileRef").is_some()).collect();
    let [disk] = disks.as_slice() else { return Err(InvalidOva::Disks(disks.len())) };
    if let Some(format) = attribute(*disk, "format").filter(|format| !format.to_ascii_lowercase().contains("vmdk")) {
        return Err(InvalidOva::Format(format));
    }
    let reference = attribute(*disk, "fileRef").unwrap_or_default();
    let file = named("File").find(|file| attribute(*file, "id").as_ref() == Some(&reference));
    let file = file.ok_or_else(|| InvalidOva::Description(format!("no file has the id {reference}")))?;
    if let Some(compression) =
        attribute(file, "compression").filter(|compression| compression != "identity" && !compression.is_empty())
    {
        return Err(InvalidOva::Compressed(compression));
    }
    attribute(file, "href").ok_or_else(|| InvalidOva::Description("a file has no name".into()))
}

type Listed = (String, &'static aws_lc_rs::digest::Algorithm, Vec<u8>);

/// Lines of the form `SHA256(name)= digits`.
fn read_manifest(text: &str) -> Result<Vec<Listed>, InvalidOva> {
    let read = |line: &str| -> Option<Listed> {
        let (algorithm, rest) = line.split_once('(')?;
        let (name, digits) = rest.rsplit_once(")")?;
        let algorithm = match algorithm.trim().to_ascii_uppercase().as_str() {
            "SHA1" => &SHA1_FOR_LEGACY_USE_ONLY,
            "SHA256" => &SHA256,
            "SHA512" => &SHA512,
            _ => return None,
        };
        Some((name.to_owned(), algorithm, read_hex(digits.trim_start().strip_prefix('=')?.trim())?))
    };
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.map(|line| read(line).ok_or_else(|| InvalidOva::Manifest(line.chars().take(80).collect()))).collect()
}

/// Bytes from hexadecimal digits.
pub(super) fn read_hex(digits: &str) -> Option<Vec<u8>> {
    if !digits.len().is_multiple_of(2) || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok()).collect()
}

fn digest_of(archive: &mut File, member: &Member, algorithm: &'static aws_lc_rs::digest::Algorithm) -> io::Result<Digest> {
    archive.seek(SeekFrom::Start(member.start))?;
    let (mut context, mut left, mut buffer) = (Context::new(algorithm), member.size, vec![0; CHUNK]);
    while left > 0 {
        let part = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let part = buffer.get_mut(..part).ok_or(io::ErrorKind::Other)?;
        archive.read_exact(part)?;
        context.update(part);
        left -= part.len() as u64;
    }
    Ok(context.finish())
}

/// Writes an appliance around a stream-optimised VMDK with `capacity` for a guest.
pub(super) fn write(out: impl Write, name: &str, vmdk: &mut File, capacity: Bytes) -> io::Result<()> {
    let (ovf_name, disk_name, manifest_name) = (format!("{name}.ovf"), format!("{name}-disk1.vmdk"), format!("{name}.mf"));
    let length = vmdk.metadata()?.len();
    let description = describe(name, &disk_name, length, capacity);
    let disk_digest = digest_of(vmdk, &Member { name: disk_name.clone(), start: 0, size: length }, &SHA256)?;
    let description_digest = aws_lc_rs::digest::digest(&SHA256, description.as_bytes());
    let manifest = format!(
        "SHA256({ovf_name})= {}\nSHA256({disk_name})= {}\n",
        write_hex(description_digest.as_ref()),
        write_hex(disk_digest.as_ref())
    );
    let mut archive = tar::Builder::new(out);
    // The description is the first member: DSP0243 wants it so.
    for (name, content) in [(&ovf_name, description.as_bytes()), (&manifest_name, manifest.as_bytes())] {
        archive.append_data(&mut header(content.len() as u64), name, content)?;
    }
    vmdk.rewind()?;
    archive.append_data(&mut header(length), &disk_name, vmdk)?;
    archive.into_inner()?.flush()
}

fn write_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_size(size);
    header.set_mode(0o644);
    header
}

/// `name` is a name: it needs no escaping.
fn describe(name: &str, disk: &str, length: u64, capacity: Bytes) -> String {
    let capacity = capacity.get();
    format!(
        r#"<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
    xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
    xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData">
  <References>
    <File ovf:id="file1" ovf:href="{disk}" ovf:size="{length}"/>
  </References>
  <DiskSection>
    <Info>Disks</Info>
    <Disk ovf:diskId="vmdisk1" ovf:fileRef="file1" ovf:capacity="{capacity}" ovf:capacityAllocationUnits="byte"
        ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
  </DiskSection>
  <VirtualSystem ovf:id="{name}">
    <Info>A virtual machine</Info>
    <Name>{name}</Name>
    <OperatingSystemSection ovf:id="101">
      <Info>The guest's operating system</Info>
    </OperatingSystemSection>
    <VirtualHardwareSection>
      <Info>What the machine is made of</Info>
      <Item>
        <rasd:ElementName>1 vCPU</rasd:ElementName>
        <rasd:InstanceID>1</rasd:InstanceID>
        <rasd:ResourceType>3</rasd:ResourceType>
        <rasd:VirtualQuantity>1</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits>
        <rasd:ElementName>1024 MiB of memory</rasd:ElementName>
        <rasd:InstanceID>2</rasd:InstanceID>
        <rasd:ResourceType>4</rasd:ResourceType>
        <rasd:VirtualQuantity>1024</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:Address>0</rasd:Address>
        <rasd:ElementName>SATA controller</rasd:ElementName>
        <rasd:InstanceID>3</rasd:InstanceID>
        <rasd:ResourceSubType>AHCI</rasd:ResourceSubType>
        <rasd:ResourceType>20</rasd:ResourceType>
      </Item>
      <Item>
        <rasd:AddressOnParent>0</rasd:AddressOnParent>
        <rasd:ElementName>Disk 1</rasd:ElementName>
        <rasd:HostResource>ovf:/disk/vmdisk1</rasd:HostResource>
        <rasd:InstanceID>4</rasd:InstanceID>
        <rasd:Parent>3</rasd:Parent>
        <rasd:ResourceType>17</rasd:ResourceType>
      </Item>
    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An archive of `members`.
    fn archive(members: &[(&str, &[u8])]) -> File {
        let mut tar = tar::Builder::new(tempfile::tempfile().expect("file"));
        for (name, content) in members {
            tar.append_data(&mut header(content.len() as u64), name, *content).expect("appended");
        }
        tar.into_inner().expect("archive")
    }

    fn written() -> File {
        let mut vmdk = tempfile::tempfile().expect("file");
        vmdk.write_all(b"KDMV and the rest").expect("written");
        let mut ova = tempfile::tempfile().expect("file");
        write(&mut ova, "web", &mut vmdk, Bytes::mib(64)).expect("appliance");
        ova
    }

    #[test]
    fn what_is_written_is_read_again() {
        let mut ova = written();
        let (start, size) = find_disk(&mut ova).expect("disk");
        let mut disk = String::new();
        ova.seek(SeekFrom::Start(start)).expect("seek");
        ova.take(size).read_to_string(&mut disk).expect("read");
        assert_eq!(disk, "KDMV and the rest");
    }

    #[test]
    fn an_appliance_that_was_changed_or_cut_is_refused() {
        let mut ova = written();
        let (start, _) = find_disk(&mut ova).expect("disk");
        ova.seek(SeekFrom::Start(start)).expect("seek");
        ova.write_all(b"k").expect("changed");
        assert!(matches!(find_disk(&mut ova), Err(InvalidOva::Digest(name)) if name == "web-disk1.vmdk"));
        let cut = written();
        cut.set_len(start + 4).expect("cut");
        assert!(matches!(find_disk(&mut { cut }), Err(InvalidOva::Archive(_))));
        assert!(find_disk(&mut archive(&[])).is_err());
    }

    #[test]
    fn what_is_no_plain_appliance_of_one_disk_is_refused_with_its_reason() {
        let envelope = |inner: &str| format!("<Envelope xmlns:ovf='o'>{inner}</Envelope>");
        let file = "<File ovf:id='f' ovf:href='d.vmdk'/>";
        let disk = "<Disk ovf:fileRef='f' ovf:format='http://x/vmdk.html'/>";
        let with = |inner: &str| find_disk(&mut archive(&[("a.ovf", envelope(inner).as_bytes()), ("d.vmdk", b"KDMV")]));
        assert!(with(&format!("{file}{disk}")).is_ok());
        assert!(matches!(with(file), Err(InvalidOva::Disks(0))));
        assert!(matches!(with(&format!("{file}{disk}{disk}")), Err(InvalidOva::Disks(2))));
        assert!(matches!(with(&format!("{file}<Disk ovf:fileRef='f' ovf:format='vhd'/>")), Err(InvalidOva::Format(_))));
        assert!(matches!(with(&format!("<File ovf:id='f' ovf:href='../etc/x'/>{disk}")), Err(InvalidOva::Missing(_))));
        let gzip = "<File ovf:id='f' ovf:href='d.vmdk' ovf:compression='gzip'/>";
        assert!(matches!(with(&format!("{gzip}{disk}")), Err(InvalidOva::Compressed(_))));
        assert!(matches!(find_disk(&mut archive(&[("d.vmdk", b"KDMV")])), Err(InvalidOva::NoDescription)));
        let bomb = "<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>";
        assert!(matches!(find_disk(&mut archive(&[("a.ovf", bomb.as_bytes())])), Err(InvalidOva::Description(_))));
        let many: Vec<(String, &[u8])> = (0..=MAX_MEMBERS).map(|number| (format!("f{number}"), b"".as_slice())).collect();
        let many: Vec<(&str, &[u8])> = many.iter().map(|(name, content)| (name.as_str(), *content)).collect();
        assert!(matches!(find_disk(&mut archive(&many)), Err(InvalidOva::Members)));
        assert!(matches!(read_manifest("MD5(x)= 00"), Err(InvalidOva::Manifest(_))));
    }
}
