//! Items: the smallest restorable things, named by a path inside their recovery point.

use std::cmp::Ordering;
use std::fmt;

use crate::{Blocks, Open, Time};

/// The longest path an item may have, in bytes. Far beyond PATH_MAX, short of an attack on memory.
const PATH_BYTES_MAX: usize = 1 << 20;

/// A relative path of raw bytes: components joined by `/`, none of them empty, `.` or `..`, none with a NUL.
/// The empty path is the root of the point.
///
/// Order is by component, so a directory is followed directly by all that is below it. This is the order of
/// items in a [`crate::Source`] and of entries in a stored tree.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct ItemPath(Vec<u8>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    #[error("a component of the path is empty, `.` or `..`")]
    Component,
    #[error("the path contains a NUL byte")]
    Nul,
    #[error("the path is longer than 1 MiB")]
    TooLong,
}

impl ItemPath {
    pub const fn root() -> Self {
        Self(Vec::new())
    }

    /// Checks every rule of [`ItemPath`]. Leading and trailing slashes are errors.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self, PathError> {
        let bytes = bytes.into();
        if bytes.len() > PATH_BYTES_MAX {
            return Err(PathError::TooLong);
        }
        if bytes.contains(&0) {
            return Err(PathError::Nul);
        }
        let bad = |component: &[u8]| matches!(component, b"" | b"." | b"..");
        if !bytes.is_empty() && bytes.split(|&byte| byte == b'/').any(bad) {
            return Err(PathError::Component);
        }
        Ok(Self(bytes))
    }

    /// The path of `name` inside this directory.
    pub fn join(&self, name: &[u8]) -> Result<Self, PathError> {
        let mut bytes = Vec::with_capacity(self.0.len() + 1 + name.len());
        bytes.extend_from_slice(&self.0);
        if !self.0.is_empty() {
            bytes.push(b'/');
        }
        bytes.extend_from_slice(name);
        if name.contains(&b'/') {
            return Err(PathError::Component);
        }
        Self::new(bytes)
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    pub fn components(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.0.split(|&byte| byte == b'/').filter(|component| !component.is_empty())
    }

    /// The last component; empty for the root.
    pub fn name(&self) -> &[u8] {
        self.components().next_back().unwrap_or_default()
    }

    /// The directory that holds this path; `None` for the root.
    pub fn parent(&self) -> Option<Self> {
        if self.is_root() {
            return None;
        }
        let end = self.0.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
        Some(Self(self.0.get(..end).unwrap_or_default().to_vec()))
    }

    /// Whether this path is `ancestor` or lies below it.
    pub fn is_within(&self, ancestor: &Self) -> bool {
        match self.0.strip_prefix(ancestor.0.as_slice()) {
            Some(rest) => ancestor.is_root() || rest.is_empty() || rest.first() == Some(&b'/'),
            None => false,
        }
    }
}

impl Ord for ItemPath {
    fn cmp(&self, other: &Self) -> Ordering {
        // `/` sorts before every other byte, which is the order by component.
        let rank = |byte: &u8| if *byte == b'/' { 0u16 } else { u16::from(*byte) + 1 };
        self.0.iter().map(rank).cmp(other.0.iter().map(rank))
    }
}

impl PartialOrd for ItemPath {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for ItemPath {
    /// For people: control characters and bytes that are not UTF-8 are escaped, so a hostile name cannot drive
    /// a terminal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_root() {
            return f.write_str("/");
        }
        for chunk in self.0.utf8_chunks() {
            for character in chunk.valid().chars() {
                if character.is_control() {
                    write!(f, "{}", character.escape_default())?;
                } else {
                    write!(f, "{character}")?;
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for ItemPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// What an item is. The numbers are part of the repository format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    File = 1,
    Directory = 2,
    Symlink = 3,
    Fifo = 4,
    Socket = 5,
    CharDevice = 6,
    BlockDevice = 7,
    /// A virtual or physical disk, with a body of blocks.
    Disk = 8,
    /// A logical thing of a workload: a message, a page, a configuration document.
    Record = 9,
}

impl Kind {
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::File,
            2 => Self::Directory,
            3 => Self::Symlink,
            4 => Self::Fifo,
            5 => Self::Socket,
            6 => Self::CharDevice,
            7 => Self::BlockDevice,
            8 => Self::Disk,
            9 => Self::Record,
            _ => return None,
        })
    }
}

/// Names the set of paths that are one inode: (device, inode) on the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HardLink {
    pub device: u64,
    pub inode: u64,
}

/// What is known of an item beside its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    pub kind: Kind,
    /// Bytes of content; 0 for what has none.
    pub size: u64,
    /// Permission bits, set-id and sticky bits: the low 12 bits of `st_mode`.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Owner by name, where the source could tell.
    pub user: Option<Vec<u8>>,
    pub group: Option<Vec<u8>>,
    pub modified: Time,
    /// Set when several paths share the inode; each carries the same body.
    pub hard_link: Option<HardLink>,
    /// Target of a symbolic link.
    pub link_target: Option<Vec<u8>>,
    /// Major and minor number of a device.
    pub device: Option<(u32, u32)>,
    /// Extended attributes by full name, sorted: POSIX ACLs (`system.posix_acl_access`), capabilities
    /// (`security.capability`) and the user's own.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// What only the workload understands, by name, sorted.
    pub attributes: Vec<(String, Vec<u8>)>,
}

impl Metadata {
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            size: 0,
            mode: 0,
            uid: 0,
            gid: 0,
            user: None,
            group: None,
            modified: Time::default(),
            hard_link: None,
            link_target: None,
            device: None,
            xattrs: Vec::new(),
            attributes: Vec::new(),
        }
    }
}

/// Opaque evidence of unchanged content: equal, non-empty stamps of one path mean that the content need not be
/// read again. A source leaves it empty when it cannot promise that (a file touched while the run began).
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Stamp(pub Vec<u8>);

/// One restorable thing on its way from a [`crate::Source`] to a [`crate::Target`].
pub struct Item {
    pub path: ItemPath,
    pub metadata: Metadata,
    pub stamp: Stamp,
    pub body: Body,
}

/// The content of an item, opened only when someone needs it.
pub enum Body {
    None,
    /// Read from front to back, cut along its content.
    Stream(Box<dyn Open>),
    /// Read from front to back, cut at fixed places: made of pages that change where they are.
    Pages(Box<dyn Open>),
    /// Random access and changed extents: a device or a page file.
    Blocks(Box<dyn Blocks>),
}

/// An item that was not captured. Counted, stored in the point, shown, and the reason for exit code 3.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skip {
    pub path: ItemPath,
    pub reason: SkipReason,
    /// For people: the clause that the operating system gave.
    pub detail: String,
}

/// The numbers are part of the repository format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SkipReason {
    /// It could not be read (permission, I/O error, vanished between listing and reading).
    Unreadable = 1,
    /// It exists, but this version cannot capture such a thing.
    Unsupported = 2,
    /// Captured in part: its metadata (an xattr, an ACL) could not be read.
    Metadata = 3,
    /// Captured, but it changed while it was read; what is stored may be a mixture of moments.
    Changed = 4,
    /// Captured again: the content had changed behind an unchanged time and size.
    SilentChange = 5,
    /// A restore could not put it where it belongs. Never part of a point.
    Unwritable = 6,
    /// What is stored of it is damaged; of a directory, perhaps only what is stored of some of what is in it. Never part of
    /// a point.
    Damaged = 7,
    /// Captured as it is, but by its own checksums it was damaged before.
    Corrupt = 8,
}

impl SkipReason {
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Unreadable,
            2 => Self::Unsupported,
            3 => Self::Metadata,
            4 => Self::Changed,
            5 => Self::SilentChange,
            6 => Self::Unwritable,
            7 => Self::Damaged,
            8 => Self::Corrupt,
            _ => return None,
        })
    }

    /// Whether something is missing from the point or the restored tree (exit code 3), or it is only worth saying.
    pub const fn is_loss(self) -> bool {
        !matches!(self, Self::Changed | Self::SilentChange)
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Unreadable => "unreadable",
            Self::Unsupported => "unsupported",
            Self::Metadata => "metadata",
            Self::Changed => "changed",
            Self::SilentChange => "silent-change",
            Self::Unwritable => "unwritable",
            Self::Damaged => "damaged",
            Self::Corrupt => "corrupt",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{ItemPath, PathError};

    fn path(text: &str) -> ItemPath {
        ItemPath::new(text).unwrap()
    }

    #[test]
    fn paths_that_could_leave_the_target_are_refused() {
        for bad in ["/etc", "a/", "a//b", "a/../b", "..", ".", "a/./b"] {
            assert_eq!(ItemPath::new(bad), Err(PathError::Component), "{bad}");
        }
        assert_eq!(ItemPath::new(b"a\0b".to_vec()), Err(PathError::Nul));
        assert_eq!(path("a").join(b"b/c"), Err(PathError::Component));
        assert_eq!(path("a").join(b".."), Err(PathError::Component));
    }

    #[test]
    fn a_directory_is_followed_by_what_is_below_it() {
        let mut paths = ["a.b", "a/b", "a", "a/b/c", "a b", ""].map(path);
        paths.sort();
        assert_eq!(paths.map(|path| path.to_string()), ["/", "a", "a/b", "a/b/c", "a b", "a.b"]);
    }

    #[test]
    fn within_is_by_component() {
        assert!(path("a/b").is_within(&path("a")));
        assert!(path("a").is_within(&path("a")));
        assert!(path("a").is_within(&ItemPath::root()));
        assert!(!path("ab").is_within(&path("a")));
        assert_eq!(path("a/b").parent(), Some(path("a")));
        assert_eq!(path("a").parent(), Some(ItemPath::root()));
        assert_eq!(path("a/b").name(), b"b");
    }

    #[test]
    fn hostile_names_cannot_drive_a_terminal() {
        let path = ItemPath::new(b"a\x1b[31m\xff".to_vec()).unwrap();
        assert_eq!(path.to_string(), "a\\u{1b}[31m\\xff");
    }
}
