//! What can be wrong with a stream that is read, and with an element that is to be written.

use crate::PAGE_SIZE;
use crate::ram::MAX_BLOCKS;

/// Bytes that are not a stream, or one that this crate does not take. There is no way back into step: the migration must fail.
///
/// Names in it come from the stream; they are cut and made printable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The first four bytes are not QEMU's.
    #[error("not a migration stream: it begins with {0:#010x}")]
    Magic(u32),
    /// A version of the stream other than 3.
    #[error("the migration stream has version {0}, only 3 is known")]
    Version(u32),
    /// Something else stands where the machine's name is due.
    #[error("the stream names no machine, but goes on with a part of kind {0:#04x}")]
    NoConfiguration(u8),
    /// A machine's name that is empty, too long or not printable ASCII.
    #[error("a machine's name of {length} bytes is too long, empty or not printable")]
    MachineName {
        /// Length that was claimed.
        length: u32,
    },
    /// A subsection of the configuration that is unknown, repeated or of an unknown version.
    #[error("the configuration's subsection `{name}` of version {version} is unknown or repeated")]
    Subsection {
        /// Its name.
        name: String,
        /// Its version.
        version: u32,
    },
    /// Pages of another size than [`PAGE_SIZE`].
    #[error("pages of 2^{0} bytes, only {PAGE_SIZE} are known")]
    PageBits(u32),
    /// A capability that changes the format, such as `x-ignore-shared` or `mapped-ram`.
    #[error("the source migrates with the capability `{0}`, which changes the stream")]
    Capability(String),
    /// A command that belongs to post-copy, which is not supported.
    #[error("command {command} belongs to post-copy, which is not supported")]
    PostCopy {
        /// The command's number.
        command: u16,
    },
    /// The command that starts continuous replication.
    #[error("the source wants continuous replication (COLO), which is not supported")]
    Colo,
    /// A kind of part that does not exist, or not at this place.
    #[error("a part of unknown kind {0:#04x}")]
    Kind(u8),
    /// The stream ends before the RAM does.
    #[error("the stream says that it ends, before the RAM's end")]
    EarlyEnd,
    /// A section of a kind that is not known, after pages were taken out of the stream.
    #[error("unknown section `{0}` after RAM pages")]
    UnknownSection(String),
    /// A section's part, end or footer bears another number than it should.
    #[error("section {expected} is expected, but {found} comes")]
    SectionNumber {
        /// Number of the section that is open.
        expected: u32,
        /// Number that came.
        found: u32,
    },
    /// A part or the end of RAM without its start, or after its end.
    #[error("a part of a section that is not open (section {0})")]
    NotOpen(u32),
    /// The footer is not there.
    #[error("a section is followed by {0:#04x} instead of its footer")]
    NoFooter(u8),
    /// RAM starts twice.
    #[error("the RAM section starts twice")]
    SecondStart,
    /// A version of the RAM section other than 4.
    #[error("the RAM section has version {0}, only 4 is known")]
    RamVersion(u32),
    /// The list of RAM blocks is not one.
    #[error("the list of RAM blocks is wrong")]
    Blocks(#[from] BlocksError),
    /// Flags that no record of ours has: compression, XBZRLE, RDMA, multifd, or none at all.
    #[error("a RAM record with the flags {0:#05x}, which are not supported")]
    RecordFlags(u64),
    /// A page filled with another value than zero.
    #[error("a page filled with {0:#04x}; QEMU fills with zero only")]
    Fill(u8),
    /// A record of the same block as the one before, but none was before.
    #[error("the first RAM record names no block")]
    NoBlock,
    /// A page of a block that the list does not have.
    #[error("a page of the RAM block `{0}`, which is not in the list")]
    UnknownBlock(String),
    /// A page behind the end of its block.
    #[error("page {page} is not within RAM block {block}")]
    OutsideBlock {
        /// Place of the block in the list.
        block: u16,
        /// The page's number.
        page: u64,
    },
    /// An early section of `virtio-mem` with impossible sizes, or of another version.
    #[error("the early section of a virtio-mem device is malformed")]
    Early,
}

/// What is wrong with a list of RAM blocks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlocksError {
    /// No block.
    #[error("it is empty")]
    Empty,
    /// More than [`MAX_BLOCKS`].
    #[error("it has more than {MAX_BLOCKS} blocks")]
    TooMany,
    /// A block without a name.
    #[error("a block has no name")]
    Nameless,
    /// A name twice.
    #[error("block `{0}` is listed twice")]
    Twice(String),
    /// A length of zero, or no multiple of [`PAGE_SIZE`].
    #[error("a block of {0} bytes")]
    Length(u64),
    /// The lengths do not add up to the total.
    #[error("the blocks' lengths are not {total} bytes in total")]
    Total {
        /// What the list claims.
        total: u64,
    },
}

/// An element that cannot be written; nothing was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// An element that may not follow those before it.
    #[error("{element} cannot be written at this place of the stream")]
    Order {
        /// The element's name.
        element: &'static str,
    },
    /// A payload longer than the format can say.
    #[error("a payload of {length} bytes is too long")]
    TooLong {
        /// Its length.
        length: usize,
    },
    /// A page whose content is not [`PAGE_SIZE`] bytes.
    #[error("a page with {length} bytes")]
    PageLength {
        /// Its length.
        length: usize,
    },
    /// A page of a block that the list does not have.
    #[error("RAM block {block} is not in the list")]
    UnknownBlock {
        /// Place of the block in the list.
        block: u16,
    },
    /// A page behind the end of its block.
    #[error("page {page} is not within RAM block {block}")]
    OutsideBlock {
        /// Place of the block in the list.
        block: u16,
        /// The page's number.
        page: u64,
    },
    /// What the reader on the other side would refuse.
    #[error("the stream would not be one")]
    Refused(#[source] StreamError),
}
