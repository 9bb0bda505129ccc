//! A tree of real files of this machine, the same choice every time.

use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::random::hash;
use crate::shell;

/// Larger files would make the tree one of large files.
const FILE_BYTES_MAX: u64 = 32 << 20;

/// Copies files into `to` until they amount to `limit` bytes; of all candidates, `percent` of a hundred stand a chance.
pub(super) fn pick(to: &Path, limit: u64, salt: &str, percent: u64) -> Result<()> {
    let mut candidates = Vec::new();
    for root in roots() {
        collect(&root, &mut candidates);
    }
    candidates.retain(|(path, _)| hash(salt, path.as_os_str().as_bytes()) % 100 < percent);
    // Whole directories stay together, as in life, but in no particular order of directories.
    let order = |path: &Path| hash("", path.parent().unwrap_or(path).as_os_str().as_bytes());
    candidates.sort_by_cached_key(|(path, _)| (order(path), path.clone()));
    let mut total = 0;
    for (path, size) in candidates {
        if total + size > limit {
            continue;
        }
        let copy = to.join(path.strip_prefix("/").unwrap_or(&path));
        if let Some(parent) = copy.parent() {
            std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        }
        // A file that this user may not read, or that is gone by now, is left out.
        if std::fs::copy(&path, &copy).is_ok() {
            std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o644))?;
            total += size;
        }
    }
    Ok(())
}

fn roots() -> Vec<PathBuf> {
    let home = shell::variable("HOME").map(PathBuf::from).unwrap_or_default();
    let cargo = shell::variable("CARGO_HOME").map_or_else(|| home.join(".cargo"), PathBuf::from);
    vec![cargo.join("registry/src"), PathBuf::from("/usr/share"), PathBuf::from("/usr/lib")]
}

/// Adds the regular files below `directory`; what cannot be read is passed over.
fn collect(directory: &Path, candidates: &mut Vec<(PathBuf, u64)>) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            collect(&entry.path(), candidates);
        } else if kind.is_file() {
            let size = entry.metadata().map_or(0, |metadata| metadata.len());
            if size <= FILE_BYTES_MAX {
                candidates.push((entry.path(), size));
            }
        }
    }
}
