//! Disk images: made, compared, and looked into with Debian's own tools.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use mainstay_core::{Code, Error, Result};

use super::{SETUP, io, process};

/// What is expected of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fsck {
    /// It was frozen or unmounted: nothing to be done.
    Clean,
    /// The power went: its journal is replayed, and then nothing is left to be done.
    AfterJournal,
}

/// Makes an empty qcow2 image of so many MiB.
pub fn blank(image: &Path, mebibytes: u64) -> Result<()> {
    let image = image.to_string_lossy();
    process::run("qemu-img", ["create", "-q", "-f", "qcow2", &image, &format!("{mebibytes}M")]).map(drop)
}

/// Makes a qcow2 image of so many MiB with an empty ext4 on the whole of it.
pub fn formatted(image: &Path, mebibytes: u64) -> Result<()> {
    let raw = image.with_extension("new");
    let file = std::fs::File::create(&raw).and_then(|file| file.set_len(mebibytes << 20));
    file.map_err(io("cannot make a disk"))?;
    let (raw, image) = (raw.to_string_lossy(), image.to_string_lossy());
    process::run(
        "mke2fs",
        ["-q", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", &raw],
    )?;
    process::run("qemu-img", ["convert", "-O", "qcow2", &raw, &image])?;
    std::fs::remove_file(&*raw).map_err(io("cannot remove a temporary disk"))
}

/// Writes what a machine sees of an image, whatever its format and backing files, as a raw file.
pub fn to_raw(image: &Path, raw: &Path) -> Result<()> {
    let (image, raw) = (image.to_string_lossy(), raw.to_string_lossy());
    process::run("qemu-img", ["convert", "-U", "-O", "raw", &image, &raw]).map(drop)
}

/// Lays an image over a raw one, whatever it lay over before; nothing is read or written but that name.
pub fn rebase_unseen(image: &Path, base: &Path) -> Result<()> {
    let words = ["rebase", "-u", "-F", "raw", "-b"].map(std::ffi::OsStr::new);
    let words = words.into_iter().chain([base.as_os_str(), image.as_os_str()]);
    process::run("qemu-img", words).map(drop)
}

/// Errors: [`Code::Integrity`] when a machine would see different bytes in the two images. One may be in use, as long as
/// nobody writes to it.
pub fn compare(one: &Path, other: &Path) -> Result<()> {
    let words = ["compare".as_ref(), "-U".as_ref(), one.as_os_str(), other.as_os_str()];
    match process::run_any("qemu-img", words)? {
        (Some(0), _) => Ok(()),
        (Some(1), text) => {
            Err(Error::integrity(format!("{} and {}: {text}", one.display(), other.display())))
        }
        (status, text) => {
            Err(Error::new(Code::Io, format!("qemu-img compare: {status:?} {text}")).hint(SETUP))
        }
    }
}

/// An ext4 taken out of an image, in a file of its own: e2fsck cannot replay the journal of one inside a disk.
#[derive(Debug)]
pub struct FileSystem {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

impl FileSystem {
    /// The one on the first partition of an image, or on the whole of it.
    pub fn of(image: &Path) -> Result<Self> {
        let directory = super::directory("fs")?;
        let (disk, path) = (directory.path().join("disk"), directory.path().join("ext4"));
        to_raw(image, &disk)?;
        let mut magic = [0; 2];
        let file = std::fs::File::open(&disk).map_err(io("cannot open the image"))?;
        // The superblock lies 1024 bytes into the file system, its magic 56 bytes into that.
        file.read_exact_at(&mut magic, 1024 + 56).map_err(io("cannot read the image"))?;
        if magic == [0x53, 0xef] {
            return Ok(Self { _directory: directory, path: disk });
        }
        let words = [format!("if={}", disk.display()), format!("of={}", path.display()), "bs=1M".into()];
        process::run(
            "dd",
            words.into_iter().chain(["skip=1".into(), "conv=sparse".into(), "status=none".into()]),
        )?;
        Ok(Self { _directory: directory, path })
    }

    /// Errors: [`Code::Integrity`] with what e2fsck says.
    pub fn fsck(&self, expected: Fsck) -> Result<()> {
        let run = |option: &str| process::run_any("e2fsck", [option.as_ref(), self.path.as_os_str()]);
        if expected == Fsck::AfterJournal {
            // What a boot does: replays the journal, frees what was deleted while open, and refuses to guess.
            let (status, text) = run("-fp")?;
            if !matches!(status, Some(0 | 1)) {
                return Err(Error::integrity(format!("{status:?} {text}")));
            }
        }
        match run("-fn")? {
            // It calls a journal that waits to be replayed no fault.
            (Some(0), text) if !text.contains("journal") => Ok(()),
            (status, text) => Err(Error::integrity(format!("{status:?} {text}"))),
        }
    }

    /// Takes a directory out of it, with all that is below, to `into`, which must exist; the copy's path.
    pub fn tree(&self, directory: &str, into: &Path) -> Result<PathBuf> {
        let request = format!("rdump {directory} {}", into.display());
        process::run("debugfs", ["-R".as_ref(), request.as_ref(), self.path.as_os_str()])?;
        Ok(into.join(directory.trim_start_matches('/')))
    }
}
