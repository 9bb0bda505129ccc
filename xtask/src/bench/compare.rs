//! Whether a restore gave back every byte. Tools differ in how deep they nest what they restore.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

/// Fails unless the files below `source` stand somewhere below `restored` with the same names and content, and no
/// others with them.
pub(super) fn same_files(source: &Path, restored: &Path) -> Result<()> {
    let wanted = files_below(source)?;
    let Some(first) = wanted.keys().next() else { bail!("{} holds no files", source.display()) };
    let given = files_below(restored)?;
    let base = given.keys().find(|path| path.ends_with(first)).context("nothing was restored")?;
    let nested: PathBuf =
        base.components().take(base.components().count() - first.components().count()).collect();
    if given.len() != wanted.len() {
        bail!("{} files were restored instead of {}", given.len(), wanted.len());
    }
    for (path, length) in &wanted {
        let twin = nested.join(path);
        if given.get(&twin) != Some(length) || !same_bytes(&source.join(path), &restored.join(&twin))? {
            bail!("{} is missing or differs", path.display());
        }
    }
    Ok(())
}

/// The regular files below a directory, by path relative to it, with their lengths.
pub(super) fn files_below(directory: &Path) -> Result<BTreeMap<PathBuf, u64>> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![directory.to_owned()];
    while let Some(here) = waiting.pop() {
        for entry in std::fs::read_dir(&here).with_context(|| format!("cannot read {}", here.display()))? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                waiting.push(entry.path());
            } else if kind.is_file() {
                let path = entry.path();
                found.insert(path.strip_prefix(directory)?.to_owned(), entry.metadata()?.len());
            }
        }
    }
    Ok(found)
}

fn same_bytes(left: &Path, right: &Path) -> Result<bool> {
    let (mut left, mut right) = (File::open(left)?, File::open(right)?);
    let (mut one, mut other) = (vec![0; 1 << 18], vec![0; 1 << 18]);
    loop {
        let count = left.read(&mut one)?;
        if count == 0 {
            return Ok(right.read(&mut other)? == 0);
        }
        if right.read_exact(&mut other[..count]).is_err() || one[..count] != other[..count] {
            return Ok(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::same_files;

    #[test]
    fn nested_restores_are_found_and_differences_are_not_forgiven() {
        let place = std::env::temp_dir().join(format!("mainstay-compare-{}", std::process::id()));
        let (source, restored) = (place.join("source"), place.join("restored"));
        let nested = restored.join("deep/down");
        for (directory, text) in [(&source, "same"), (&nested, "same")] {
            std::fs::create_dir_all(directory.join("x")).unwrap();
            std::fs::write(directory.join("x/file"), text).unwrap();
        }
        same_files(&source, &restored).unwrap();
        std::fs::write(nested.join("x/file"), "samE").unwrap();
        assert!(same_files(&source, &restored).is_err());
        std::fs::write(nested.join("x/file"), "same").unwrap();
        std::fs::write(nested.join("x/more"), "").unwrap();
        assert!(same_files(&source, &restored).is_err());
        std::fs::remove_dir_all(place).unwrap();
    }
}
