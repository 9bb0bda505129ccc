//! Three machines with one system and different sizes, their own names, logs and edits. Every choice has a fixed seed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::bench::data::make;
use crate::bench::pick::pick;
use crate::shell;

/// What the system of a machine amounts to, in bytes.
const CONTENT: u64 = 320 << 20;

/// The sizes of the disks, in MiB: file systems of different sizes put the same files elsewhere.
const DISKS: [u64; 3] = [512, 640, 576];

/// A fixed moment for the file systems, 2023-11-14.
const TIME: &str = "1700000000";

pub(super) struct Shapes {
    /// A folder with the three images.
    pub(super) images: PathBuf,
    /// The first image, after its machine has worked for a while.
    pub(super) changed: PathBuf,
    /// What lies on the first image.
    pub(super) tree: PathBuf,
}

impl Shapes {
    pub(super) fn make(work: &Path) -> Result<Self> {
        let shapes =
            Self { images: work.join("images"), changed: work.join("changed.raw"), tree: work.join("tree1") };
        fs::create_dir_all(&shapes.images)?;
        let base = work.join("base");
        pick(&base, CONTENT, "machine", 94)?;
        for (number, size) in (1_u64..).zip(DISKS) {
            let tree = work.join(format!("tree{number}"));
            make::individual(&base, &tree, number)?;
            let image = shapes.image(number);
            File::create(&image)?.set_len(size << 20)?;
            let uuid = format!("0000000{number}-0000-4000-8000-000000000000");
            let mut mke2fs = shell::command("mke2fs", ["-q", "-F", "-t", "ext4", "-m", "0", "-U", &uuid]);
            mke2fs.arg("-d").arg(&tree).arg(&image).env("SOURCE_DATE_EPOCH", TIME);
            shell::capture(&mut mke2fs)?;
            if number > 1 {
                fs::remove_dir_all(&tree)?;
            }
        }
        fs::remove_dir_all(&base)?;
        let mut copy = shell::command("cp", ["--sparse=always"]);
        shell::capture(copy.arg(shapes.image(1)).arg(&shapes.changed))?;
        make::add_files(&shapes.changed, &work.join("new"), 1)?;
        Ok(shapes)
    }

    pub(super) fn image(&self, number: u64) -> PathBuf {
        self.images.join(format!("vm{number}.raw"))
    }
}
