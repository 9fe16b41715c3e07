//! The configuration: the machine's name, and subsections that the destination compares with its own.

use bytes::{BufMut, BytesMut};

use crate::cursor::{Cursor, Stop};
use crate::error::StreamError;
use crate::wire::{harmless, kind, put_name};

const MAX_MACHINE: u32 = 255;
const PAGE_BITS: u32 = 12;

const NAME_PAGE_BITS: &[u8] = b"configuration/target-page-bits";
const NAME_CAPABILITIES: &[u8] = b"configuration/capabilities";
const NAME_UUID: &[u8] = b"configuration/uuid";

/// Which machine the source runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// Its type: printable ASCII, 1 to 255 bytes, such as `pc-q35-7.2`.
    pub machine: String,
    /// In the order in which they came; each at most once.
    pub subsections: Vec<Subsection>,
}

/// A part of the configuration that not every source sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subsection {
    /// Pages have 2^12 bytes. Another size is refused.
    PageBits,
    /// The VM's UUID.
    Uuid([u8; 16]),
}

impl Configuration {
    /// Reads what follows the kind. Needs one byte more, to know that no subsection follows.
    pub(crate) fn read(cursor: &mut Cursor<'_>) -> Result<Self, Stop> {
        let length = cursor.u32()?;
        if !(1..=MAX_MACHINE).contains(&length) {
            return Err(StreamError::MachineName { length }.into());
        }
        let name = cursor.take(usize::try_from(length).unwrap_or(usize::MAX))?;
        let machine =
            std::str::from_utf8(name).ok().filter(|name| is_printable(name)).ok_or(StreamError::MachineName { length })?;
        let mut read = Self { machine: machine.to_owned(), subsections: Vec::new() };
        while cursor.peek()? == kind::SUBSECTION {
            cursor.u8()?;
            let subsection = Subsection::read(cursor, &read.subsections)?;
            read.subsections.push(subsection);
        }
        Ok(read)
    }

    /// Whether the reader would take it.
    pub(crate) fn check(&self) -> Result<(), StreamError> {
        let length = u32::try_from(self.machine.len()).unwrap_or(u32::MAX);
        if !(1..=MAX_MACHINE).contains(&length) || !is_printable(&self.machine) {
            return Err(StreamError::MachineName { length });
        }
        let mut before = self.subsections.iter().enumerate().map(|(at, one)| (one, self.subsections.iter().take(at)));
        match before.find_map(|(one, mut before)| before.find(|other| other.name() == one.name())) {
            Some(twice) => Err(StreamError::Subsection { name: harmless(twice.name()), version: 1 }),
            None => Ok(()),
        }
    }

    /// Writes it with its kind; it was checked.
    pub(crate) fn put(&self, out: &mut BytesMut) {
        out.put_u8(kind::CONFIGURATION);
        out.put_u32(u32::try_from(self.machine.len()).expect("the name was checked to be short"));
        out.put_slice(self.machine.as_bytes());
        for subsection in &self.subsections {
            out.put_u8(kind::SUBSECTION);
            put_name(out, subsection.name());
            out.put_u32(1);
            match subsection {
                Subsection::PageBits => out.put_u32(PAGE_BITS),
                Subsection::Uuid(uuid) => out.put_slice(uuid),
            }
        }
    }
}

impl Subsection {
    fn name(&self) -> &'static [u8] {
        match self {
            Self::PageBits => NAME_PAGE_BITS,
            Self::Uuid(_) => NAME_UUID,
        }
    }

    fn read(cursor: &mut Cursor<'_>, before: &[Self]) -> Result<Self, Stop> {
        let name = cursor.name()?;
        let version = cursor.u32()?;
        let refused = || StreamError::Subsection { name: harmless(name), version };
        if version != 1 || before.iter().any(|other| other.name() == name) {
            return Err(refused().into());
        }
        match name {
            NAME_PAGE_BITS => match cursor.u32()? {
                PAGE_BITS => Ok(Self::PageBits),
                bits => Err(StreamError::PageBits(bits).into()),
            },
            NAME_UUID => Ok(Self::Uuid(cursor.array()?)),
            // Listed are the capabilities that are on and change the format; none of them is known here.
            NAME_CAPABILITIES => match cursor.u32()? {
                0 => Err(refused().into()),
                _ => Err(StreamError::Capability(harmless(cursor.name()?)).into()),
            },
            _ => Err(refused().into()),
        }
    }
}

fn is_printable(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_graphic())
}
