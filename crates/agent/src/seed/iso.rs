//! A tiny ISO 9660 image: one directory, a few small files, the same bytes for the same content on every host and at any time.
//!
//! ```text
//!  0-15 zeros   16 primary descriptor   17 Joliet descriptor   18 end of descriptors   19-20 path tables   21-22 those of Joliet
//!  23 root directory   24 that of Joliet   25- files, each from a sector of its own
//! ```
//! ECMA-119 and the Joliet specification: numbers in both byte orders, one extent a file. Names are `NAME.;1` in the primary directory, which
//! Linux shows in lower case and without the end, and as they are in Joliet's.

/// A file of the image.
#[derive(Clone, Copy, Debug)]
pub(super) struct IsoFile<'a> {
    /// Its name: lower case letters, digits and `-`.
    pub(super) name: &'a str,
    /// Its content.
    pub(super) content: &'a [u8],
}

const SECTOR: usize = 2_048;
const PRIMARY: u32 = 16;
const PATH_TABLES: u32 = 19;
const ROOT: u32 = 23;
const FILES: u32 = 25;
/// A path table with nothing but the root.
const PATH_TABLE_SIZE: u32 = 10;
/// 2000-01-01 00:00 UTC, as directories and as volumes write it. Any moment will do as long as it is always the same.
const DIRECTORY_DATE: [u8; 7] = [100, 1, 1, 0, 0, 0, 0];
const VOLUME_DATE: &[u8; 17] = b"2000010100000000\0";
const NO_DATE: &[u8; 17] = b"0000000000000000\0";

/// Which of the two trees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tree {
    Primary,
    Joliet,
}

impl Tree {
    const fn path_table(self) -> u32 {
        match self {
            Self::Primary => PATH_TABLES,
            Self::Joliet => PATH_TABLES + 2,
        }
    }

    const fn root(self) -> u32 {
        match self {
            Self::Primary => ROOT,
            Self::Joliet => ROOT + 1,
        }
    }

    fn name(self, name: &str) -> Vec<u8> {
        match self {
            Self::Primary => format!("{}.;1", name.to_ascii_uppercase()).into_bytes(),
            Self::Joliet => wide(name),
        }
    }

    /// A text of a descriptor, filled up with blanks.
    fn text(self, text: &str, length: usize) -> Vec<u8> {
        match self {
            Self::Primary => text.bytes().chain(std::iter::repeat(b' ')).take(length).collect(),
            // An odd field ends with a zero.
            Self::Joliet => {
                let blanks = [0, b' '].into_iter().cycle();
                let mut bytes: Vec<u8> = wide(text).into_iter().chain(blanks).take(length / 2 * 2).collect();
                bytes.resize(length, 0);
                bytes
            }
        }
    }
}

fn wide(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_be_bytes).collect()
}

fn both16(number: u16) -> [u8; 4] {
    let ([a, b], [c, d]) = (number.to_le_bytes(), number.to_be_bytes());
    [a, b, c, d]
}

fn both32(number: u32) -> [u8; 8] {
    let ([a, b, c, d], [e, f, g, h]) = (number.to_le_bytes(), number.to_be_bytes());
    [a, b, c, d, e, f, g, h]
}

/// Sectors that `length` bytes fill.
fn sectors(length: usize) -> u32 {
    u32::try_from(length.div_ceil(SECTOR)).unwrap_or(u32::MAX)
}

/// The image of a volume called `label` with these files; few, and each far below 4 GiB.
pub(super) fn write_iso(label: &str, files: &[IsoFile<'_>]) -> Vec<u8> {
    let mut sorted = files.to_vec();
    // As readers expect them, and whatever order they were given in.
    sorted.sort_by_key(|file| file.name);
    let mut next = FILES;
    let placed: Vec<(u32, IsoFile<'_>)> = sorted
        .into_iter()
        .map(|file| {
            let at = next;
            next += sectors(file.content.len());
            (at, file)
        })
        .collect();
    let mut image = vec![0; PRIMARY as usize * SECTOR];
    push(&mut image, descriptor(Tree::Primary, label, next));
    push(&mut image, descriptor(Tree::Joliet, label, next));
    push(&mut image, b"\xffCD001\x01".to_vec());
    for tree in [Tree::Primary, Tree::Joliet] {
        let entry = |root: [u8; 4], parent: [u8; 2]| [&[1, 0][..], &root, &parent, &[0, 0]].concat();
        push(&mut image, entry(tree.root().to_le_bytes(), 1_u16.to_le_bytes()));
        push(&mut image, entry(tree.root().to_be_bytes(), 1_u16.to_be_bytes()));
    }
    for tree in [Tree::Primary, Tree::Joliet] {
        let mut directory = [root_record(tree, 0), root_record(tree, 1)].concat();
        for (at, file) in &placed {
            let length = u32::try_from(file.content.len()).unwrap_or(u32::MAX);
            directory.extend(record(*at, length, false, &tree.name(file.name)));
        }
        debug_assert!(directory.len() <= SECTOR, "one sector holds the directory");
        push(&mut image, directory);
    }
    for (_, file) in &placed {
        push(&mut image, file.content.to_vec());
    }
    image
}

/// Adds whole sectors.
fn push(image: &mut Vec<u8>, mut bytes: Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
    image.extend(bytes);
}

fn root_record(tree: Tree, name: u8) -> Vec<u8> {
    record(tree.root(), SECTOR as u32, true, &[name])
}

fn record(at: u32, length: u32, directory: bool, name: &[u8]) -> Vec<u8> {
    let name_length = u8::try_from(name.len()).unwrap_or(u8::MAX);
    let mut bytes = vec![0, 0];
    bytes.extend(both32(at));
    bytes.extend(both32(length));
    bytes.extend(DIRECTORY_DATE);
    bytes.extend([if directory { 2 } else { 0 }, 0, 0]);
    bytes.extend(both16(1));
    bytes.push(name_length);
    bytes.extend(name);
    bytes.resize(bytes.len().next_multiple_of(2), 0);
    let whole = u8::try_from(bytes.len()).unwrap_or(u8::MAX);
    if let Some(first) = bytes.first_mut() {
        *first = whole;
    }
    bytes
}

fn descriptor(tree: Tree, label: &str, sectors: u32) -> Vec<u8> {
    let (kind, escape): (u8, &[u8]) = match tree {
        Tree::Primary => (1, b""),
        // UCS-2, level 3.
        Tree::Joliet => (2, b"%/E"),
    };
    let mut bytes = vec![kind];
    bytes.extend(b"CD001\x01\0");
    bytes.extend(tree.text("", 32));
    bytes.extend(tree.text(label, 32));
    bytes.extend([0; 8]);
    bytes.extend(both32(sectors));
    bytes.extend(escape.iter().copied().chain(std::iter::repeat(0)).take(32));
    bytes.extend(both16(1));
    bytes.extend(both16(1));
    bytes.extend(both16(SECTOR as u16));
    bytes.extend(both32(PATH_TABLE_SIZE));
    bytes.extend(tree.path_table().to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend((tree.path_table() + 1).to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(root_record(tree, 0));
    // Set, publisher, preparer, application; then the three files that describe it.
    for length in [128, 128, 128, 128, 37, 37, 37] {
        bytes.extend(tree.text("", length));
    }
    for date in [VOLUME_DATE, VOLUME_DATE, NO_DATE, NO_DATE] {
        bytes.extend(date);
    }
    bytes.extend([1, 0]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_standard_has_them() {
        for tree in [Tree::Primary, Tree::Joliet] {
            let bytes = descriptor(tree, "cidata", 30);
            assert_eq!(bytes.len(), 883);
            assert_eq!(&bytes[80..88], &both32(30));
            assert_eq!(&bytes[128..132], &[0, 8, 8, 0]);
            assert_eq!(&bytes[156..158], &[34, 0]);
            assert_eq!(&bytes[158..162], &tree.root().to_le_bytes());
            assert_eq!(&bytes[813..829], b"2000010100000000");
            assert_eq!(bytes[881], 1);
        }
        assert_eq!(&descriptor(Tree::Primary, "cidata", 30)[40..48], b"cidata  ");
        assert_eq!(&descriptor(Tree::Joliet, "cidata", 30)[40..54], b"\0c\0i\0d\0a\0t\0a\0 ");
        let record = record(25, 3, false, b"A.;1");
        assert_eq!((record.len(), record[0], record[32]), (38, 38, 4));
        assert_eq!(&record[33..38], b"A.;1\0");
    }

    #[test]
    fn the_order_of_the_files_makes_no_difference() {
        let (a, b) = (IsoFile { name: "a", content: b"one" }, IsoFile { name: "b", content: &[7; 5_000] });
        let image = write_iso("x", &[a, b]);
        assert_eq!(image, write_iso("x", &[b, a]));
        assert_eq!(image.len(), (25 + 1 + 3) * SECTOR);
        assert_eq!(&image[25 * SECTOR..25 * SECTOR + 3], b"one");
    }
}
