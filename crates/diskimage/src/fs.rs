//! File systems read from a device, without mounting, booting or privileges.
//!
//! [`open`] says what lies on a volume; what is a file system that can be read comes back as a [`FileSystem`]. A
//! journal that was not written back is replayed in memory or refused in words. Nothing is ever returned shorter than
//! its metadata says, and content that cannot be read as its owner would (encrypted, compressed in an unknown way) is
//! refused with [`mainstay_core::Code::Unsupported`].

mod acl;
mod btrfs;
mod bytes;
mod ext4;
mod fat;
mod foreign;
mod ntfs;
mod pages;
mod probe;
mod stream;
mod xfs;

use std::ops::Range;
use std::sync::Arc;

use mainstay_core::{Blocks, Code, Error, ItemPath, Kind, Metadata, Piece, Result, StreamReader};

pub use stream::Stream;

/// What lies on a volume.
pub enum Opened {
    FileSystem(Arc<dyn FileSystem>),
    Other(Other),
}

/// What a volume holds when it is not a file system that can be read here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Other {
    /// Nothing but zeros where anything would begin.
    Empty,
    Swap,
    LvmPhysicalVolume,
    Luks,
    Zfs,
    RaidMember,
    ExFat,
    F2fs,
    Bcachefs,
    Reiserfs,
    Squashfs,
    Erofs,
    Iso9660,
    ReFs,
    BitLocker,
    Apfs,
    /// Something, but nothing with a name that is known here.
    Unknown,
}

impl Other {
    /// Whether it is something that a kernel may know how to mount.
    pub const fn may_be_mounted(self) -> bool {
        match self {
            Self::Empty
            | Self::Swap
            | Self::LvmPhysicalVolume
            | Self::Luks
            | Self::Zfs
            | Self::RaidMember
            | Self::BitLocker => false,
            Self::ExFat
            | Self::F2fs
            | Self::Bcachefs
            | Self::Reiserfs
            | Self::Squashfs
            | Self::Erofs
            | Self::Iso9660
            | Self::ReFs
            | Self::Apfs
            | Self::Unknown => true,
        }
    }

    pub const ALL: &'static [Self] = &[
        Self::Empty,
        Self::Swap,
        Self::LvmPhysicalVolume,
        Self::Luks,
        Self::Zfs,
        Self::RaidMember,
        Self::ExFat,
        Self::F2fs,
        Self::Bcachefs,
        Self::Reiserfs,
        Self::Squashfs,
        Self::Erofs,
        Self::Iso9660,
        Self::ReFs,
        Self::BitLocker,
        Self::Apfs,
        Self::Unknown,
    ];

    /// For people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Swap => "swap space",
            Self::LvmPhysicalVolume => "an LVM physical volume",
            Self::Luks => "a LUKS container",
            Self::Zfs => "a member of a ZFS pool",
            Self::RaidMember => "a member of a RAID array",
            Self::ExFat => "exFAT",
            Self::F2fs => "F2FS",
            Self::Bcachefs => "bcachefs",
            Self::Reiserfs => "ReiserFS",
            Self::Squashfs => "SquashFS",
            Self::Erofs => "EROFS",
            Self::Iso9660 => "ISO 9660",
            Self::ReFs => "ReFS",
            Self::BitLocker => "a BitLocker volume",
            Self::Apfs => "APFS",
            Self::Unknown => "of an unknown kind",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FsKind {
    Ext2,
    Ext3,
    Ext4,
    Xfs,
    Btrfs,
    Ntfs,
    Fat,
    /// One that no reader here knows, and the kernel does.
    Kernel,
}

impl FsKind {
    pub const ALL: &'static [Self] =
        &[Self::Ext2, Self::Ext3, Self::Ext4, Self::Xfs, Self::Btrfs, Self::Ntfs, Self::Fat, Self::Kernel];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Ext2 => "ext2",
            Self::Ext3 => "ext3",
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Ntfs => "ntfs",
            Self::Fat => "fat",
            Self::Kernel => "mounted by the kernel",
        }
    }
}

/// What a file system says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    pub kind: FsKind,
    pub label: Vec<u8>,
    /// As the tools of the system print it; empty when it has none.
    pub uuid: String,
    /// Bytes that the file system spans, at most those of the volume.
    pub size: u64,
    /// Bytes of the unit in which it gives out space.
    pub block_size: u64,
    /// What a person should know: that a journal was replayed.
    pub notes: Vec<String>,
}

/// A file or directory of one file system, as that file system names it. Worthless for any other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Node {
    /// What inode numbers are counted within (a subvolume), or what finds the item again (its directory).
    pub space: u64,
    pub number: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// Never empty, `.`, `..`, and without `/` and NUL.
    pub name: Vec<u8>,
    pub node: Node,
    /// Where the directory itself says so.
    pub kind: Option<Kind>,
}

/// A part of a directory, in the directory's own order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// May be empty although the directory goes on.
    pub entries: Vec<DirEntry>,
    /// Where the next page begins; `None` at the end.
    pub next: Option<u64>,
}

/// A part of a directory, and what is known of its entries.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    pub page: Page,
    /// Of each entry, where it came along; otherwise it has to be asked for.
    pub metadata: Vec<Option<Metadata>>,
}

/// Bytes of a file that lie on the volume as they are: neither compressed nor encrypted nor holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileExtent {
    pub file_offset: u64,
    pub volume_offset: u64,
    pub length: u64,
}

/// Receives a file and some of its extents; a file of many is passed in several calls that follow each other.
pub type Visitor<'a> = dyn FnMut(Node, &[FileExtent]) -> Result<()> + 'a;

/// Random access to the content of a file.
pub trait Content: Send + Sync {
    /// Bytes, as the metadata says.
    fn size(&self) -> u64;

    /// The bytes at `offset`: some of them at the front of the buffer, or how many zeros lie there in a hole, or
    /// [`Piece::End`] from [`Content::size`] on. Never goes past the size.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Piece>;
}

/// A file system read from a volume. Every number in it is hostile; what does not fit is
/// [`Code::Integrity`], what this reader cannot do is [`Code::Unsupported`].
pub trait FileSystem: Send + Sync {
    fn about(&self) -> &About;

    fn root(&self) -> Node;

    /// The node that a directory holds under a name.
    fn child(&self, directory: Node, name: &[u8]) -> Result<Option<Node>>;

    /// At most `limit` entries of a directory (at least one is asked for), from a page's `next` on, from 0 at first.
    fn read_dir(&self, directory: Node, from: u64, limit: usize) -> Result<Page>;

    fn metadata(&self, node: Node) -> Result<Metadata>;

    /// As [`FileSystem::read_dir`], with metadata where each question would cost more than its answer.
    fn list(&self, directory: Node, from: u64, limit: usize) -> Result<Listing> {
        let page = self.read_dir(directory, from, limit)?;
        Ok(Listing { metadata: vec![None; page.entries.len()], page })
    }

    /// The content of a regular file; [`Code::Unsupported`] for content that cannot be read as its owner would.
    fn content(&self, file: Node) -> Result<Arc<dyn Content>>;

    /// Where the content of a file lies on the volume, by file offset, clipped to the file's size. Content that is
    /// stored in another form (inline, compressed) is not part of it.
    fn extents(&self, file: Node) -> Result<Vec<FileExtent>>;

    /// Ranges of the volume that hold nothing, ascending, as far as the file system tells; a hint.
    fn free(&self, visit: &mut dyn FnMut(Range<u64>) -> Result<()>) -> Result<()>;

    /// Every regular file with its extents, roughly in the order of the volume. A hint: files that cannot be
    /// understood are passed over.
    fn files(&self, visit: &mut Visitor<'_>) -> Result<()>;

    /// The node at a path; [`Code::NotFound`] when there is none. Symbolic links are not followed.
    fn lookup(&self, path: &ItemPath) -> Result<Node> {
        let mut node = self.root();
        for name in path.components() {
            let missing = || Error::new(Code::NotFound, format!("there is no {path} in this file system"));
            node = self.child(node, name)?.ok_or_else(missing)?;
        }
        Ok(node)
    }

    /// The content of a regular file from front to back, with holes.
    fn open(&self, file: Node) -> Result<Box<dyn StreamReader>> {
        Ok(Box::new(Stream::new(self.content(file)?)))
    }
}

/// Says what lies on `volume`, and opens it if it is a file system that can be read.
///
/// Errors: [`Code::Integrity`] for a damaged one, [`Code::Unsupported`] for one with a feature that is not known
/// here or a journal that cannot be replayed, and what reading the volume fails with.
pub fn open(volume: Arc<dyn Blocks>) -> Result<Opened> {
    let pages = pages::Pages::new(volume);
    let found = probe::probe(&pages)?;
    let file_system: Arc<dyn FileSystem> = match found {
        probe::Found::Ext => Arc::new(ext4::Ext4::open(pages)?),
        probe::Found::Xfs => Arc::new(xfs::Xfs::open(pages)?),
        probe::Found::Btrfs => Arc::new(btrfs::Btrfs::open(pages)?),
        probe::Found::Fat => Arc::new(fat::Fat::open(pages)?),
        probe::Found::Ntfs => Arc::new(ntfs::Ntfs::open(pages)?),
        probe::Found::Other(other) => return Ok(Opened::Other(other)),
    };
    Ok(Opened::FileSystem(file_system))
}

/// Refuses a name that no directory may hold.
pub(crate) fn check_name(name: &[u8]) -> Result<()> {
    if matches!(name, b"" | b"." | b"..") || name.iter().any(|byte| matches!(byte, 0 | b'/')) {
        let shown = name.escape_ascii();
        return Err(Error::integrity(format!("a directory holds the impossible name \"{shown}\"")));
    }
    Ok(())
}
