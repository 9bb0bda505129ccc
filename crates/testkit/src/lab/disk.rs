//! Disk images: made, compared, and looked into with Debian's own tools.

use std::path::Path;

use mainstay_core::{Code, Error, Result};

use super::{SETUP, process};

/// Where the first partition of the lab's guests starts, in bytes.
const PARTITION: u64 = 1 << 20;

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

/// Writes what a machine sees of an image, whatever its format and backing files, as a raw file.
pub fn to_raw(image: &Path, raw: &Path) -> Result<()> {
    let (image, raw) = (image.to_string_lossy(), raw.to_string_lossy());
    process::run("qemu-img", ["convert", "-O", "raw", &image, &raw]).map(drop)
}

/// Errors: [`Code::Integrity`] when a machine would see different bytes in the two images.
pub fn compare(one: &Path, other: &Path) -> Result<()> {
    let words = ["compare".as_ref(), one.as_os_str(), other.as_os_str()];
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

/// The ext4 on the first partition of a raw image, or on the whole of it.
fn file_system(raw: &Path) -> Result<String> {
    let mut magic = [0; 2];
    let file = std::fs::File::open(raw).map_err(super::io("cannot open the image"))?;
    let whole = std::os::unix::fs::FileExt::read_exact_at(&file, &mut magic, 1024 + 56).is_ok();
    let offset = if whole && magic == [0x53, 0xef] { 0 } else { PARTITION };
    Ok(format!("{}?offset={offset}", raw.display()))
}

/// Checks the ext4 on the first partition of a raw image, or on the whole of it. Replaying a journal changes the image.
///
/// Errors: [`Code::Integrity`] with what e2fsck says.
pub fn fsck(raw: &Path, expected: Fsck) -> Result<()> {
    let system = file_system(raw)?;
    if expected == Fsck::AfterJournal {
        // Its status tells of the replay, and of everything else that the next call finds.
        let (_, text) = process::run_any("e2fsck", ["-E", "journal_only", "-fy", &system])?;
        if !text.contains("journal") {
            return Err(Error::new(Code::Io, format!("e2fsck: {text}")).hint(SETUP));
        }
    }
    match process::run_any("e2fsck", ["-fn", &system])? {
        (Some(0), _) => Ok(()),
        (status, text) => Err(Error::integrity(format!("{}: {status:?} {text}", raw.display()))),
    }
}

/// Takes a directory out of the ext4 on a raw image, with all that is below it, to `into`, which must exist.
pub fn tree(raw: &Path, directory: &str, into: &Path) -> Result<()> {
    let request = format!("rdump {directory} {}", into.display());
    process::run("debugfs", ["-R", &request, &file_system(raw)?]).map(drop)
}
