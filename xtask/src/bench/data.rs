//! The four data sets, each with a second state that differs a little.

pub(super) mod make;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::compare::files_below;
use crate::say;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Set {
    Tree,
    Random,
    Images,
    Database,
}

impl Set {
    pub(super) const ALL: [Self; 4] = [Self::Tree, Self::Random, Self::Images, Self::Database];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Tree => "a",
            Self::Random => "b",
            Self::Images => "c",
            Self::Database => "d",
        }
    }

    pub(super) const fn what(self) -> &'static str {
        match self {
            Self::Tree => "many small files; 1 % edited, 0.5 % removed, 0.5 % new",
            Self::Random => "one large random file; 1000 bytes inserted, 16 MiB overwritten",
            Self::Images => "three similar ext4 images; 40 new files and one removed in each",
            Self::Database => "8 KiB pages with rows; 2 % of the pages touched, 1 % appended",
        }
    }
}

/// Sizes in bytes.
struct Sizes {
    tree: u64,
    random: u64,
    image: u64,
    image_content: u64,
    database: u64,
}

const fn mib(count: u64) -> u64 {
    count << 20
}

const SMALL: Sizes =
    Sizes { tree: mib(256), random: mib(512), image: mib(512), image_content: mib(300), database: mib(256) };
const FULL: Sizes = Sizes {
    tree: mib(700),
    random: mib(1024),
    image: mib(1024),
    image_content: mib(600),
    database: mib(512),
};

/// The data sets on disk: `now/` is what gets backed up, `other/` the second state, `kept/` what a change of the
/// tree has put aside.
pub(super) struct Data {
    directory: PathBuf,
}

impl Data {
    /// Makes the data sets, or takes those that an earlier run left whole.
    pub(super) fn prepare(directory: &Path, full: bool) -> Result<Self> {
        let data = Self { directory: directory.to_owned() };
        if data.mark().is_file() {
            return Ok(data);
        }
        say::step(&format!("making the data sets in {}", directory.display()));
        if directory.exists() {
            fs::remove_dir_all(directory)
                .with_context(|| format!("cannot remove {}", directory.display()))?;
        }
        make::all(directory, if full { &FULL } else { &SMALL })?;
        fs::write(data.mark(), "")?;
        Ok(data)
    }

    /// Stands only while everything is in its first state.
    fn mark(&self) -> PathBuf {
        self.directory.join("whole")
    }

    pub(super) fn path(&self, set: Set) -> PathBuf {
        self.directory.join("now").join(set.name())
    }

    pub(super) fn bytes(&self, set: Set) -> Result<u64> {
        bytes_below(&self.path(set))
    }

    pub(super) fn count(&self, set: Set) -> Result<usize> {
        Ok(files_below(&self.path(set))?.len())
    }

    /// Reads everything, so that every phase finds the same page cache.
    pub(super) fn warm(&self, set: Set) -> Result<()> {
        for path in files_below(&self.path(set))?.keys() {
            let mut file = fs::File::open(self.path(set).join(path))?;
            std::io::copy(&mut file, &mut std::io::sink())?;
        }
        Ok(())
    }

    /// From the first state to the second, under the same path. In the tree, what does not change keeps its inode
    /// and times.
    pub(super) fn change(&self, set: Set) -> Result<()> {
        fs::remove_file(self.mark())?;
        match set {
            Set::Tree => make::change_tree(&self.path(set), &self.directory.join("kept")),
            Set::Random | Set::Images | Set::Database => self.swap(set),
        }
    }

    pub(super) fn reset(&self, set: Set) -> Result<()> {
        match set {
            Set::Tree => make::reset_tree(&self.path(set), &self.directory.join("kept"))?,
            Set::Random | Set::Images | Set::Database => self.swap(set)?,
        }
        Ok(fs::write(self.mark(), "")?)
    }

    fn swap(&self, set: Set) -> Result<()> {
        let (now, other) = (self.path(set), self.directory.join("other").join(set.name()));
        let aside = self.directory.join("aside");
        rename(&now, &aside)?;
        rename(&other, &now)?;
        rename(&aside, &other)
    }
}

#[expect(clippy::disallowed_methods, reason = "moves scratch data; no recovery data is renamed here")]
fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).with_context(|| format!("cannot move {} to {}", from.display(), to.display()))
}

/// The lengths of all files below a directory, or of the file itself.
pub(super) fn bytes_below(path: &Path) -> Result<u64> {
    if path.is_file() {
        return Ok(fs::metadata(path)?.len());
    }
    Ok(files_below(path)?.values().sum())
}
