//! How the disks of a machine are looked into: with which keys, and where their file systems are parsed.

use mainstay_diskimage::fs;
use mainstay_diskimage::map::Opener;
use mainstay_diskimage::volume::{Secret, VolumeId};

/// Keys for encrypted volumes.
pub type Keys<'a> = &'a dyn Fn(&VolumeId) -> Option<Secret>;

/// How the disks of a machine are looked into.
#[derive(Clone, Copy)]
pub struct Inside<'a> {
    /// Asked for each encrypted volume.
    pub keys: Keys<'a>,
    /// Opens what lies on a volume; in a process of its own, unless the image is trusted.
    pub open: Opener<'a>,
}

impl Inside<'static> {
    /// Without keys, and parsed by this process: for images that are trusted.
    pub const TRUSTED: Self = Self { keys: &|_| None, open: &fs::open };
}
