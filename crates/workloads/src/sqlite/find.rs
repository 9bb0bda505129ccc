//! Databases under a directory, told by what they begin with.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use globset::{GlobBuilder, GlobMatcher};
use mainstay_core::{Code, Error, ItemPath, Result};

use super::kept::There;

const MAGIC: &[u8; 16] = b"SQLite format 3\0";
/// More directories below each other are a loop, or an attack.
const DEPTH_MAX: usize = 128;

/// A database, and what it is called in points.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Found {
    pub name: ItemPath,
    pub path: PathBuf,
}

/// What an address names: one database, those below a directory, or those that fit a pattern such as `/srv/*/app.db` or
/// `/var/lib/app/**`. Sorted by name. Links are not followed, but for those in the directory that is named; paths come
/// without any.
///
/// Errors: [`Code::NotFound`] when there is none; [`Code::Unsupported`] for a file that is none; [`Code::Refused`] for a
/// link to one.
pub fn find(pattern: &Path) -> Result<Vec<Found>> {
    let text = pattern.to_str().unwrap_or_default();
    let (top, matcher) = match text.find(['*', '?', '[']) {
        Some(at) => {
            let top = text.get(..at).and_then(|start| start.rfind('/')).map_or("", |slash| &text[..slash]);
            (Path::new(if top.is_empty() { "/" } else { top }), Some(matcher(text)?))
        }
        None => (pattern, None),
    };
    let failed = |error| Error::io(format!("cannot find {}", top.display()), error);
    if !std::fs::metadata(top).map_err(failed)?.is_dir() {
        let above = top.parent().unwrap_or(Path::new("/"));
        let above = std::fs::canonicalize(above).map_err(failed)?;
        return one(&above.join(top.file_name().unwrap_or_default())).map(|found| vec![found]);
    }
    let real = std::fs::canonicalize(top).map_err(failed)?;
    let fits = |name: &Path| matcher.as_ref().is_none_or(|matcher| matcher.is_match(top.join(name)));
    let mut found = Vec::new();
    walk(&real, &real, &fits, 0, &mut found)?;
    found.sort();
    if found.is_empty() {
        let what = format!("there is no SQLite database at {}", pattern.display());
        return Err(Error::new(Code::NotFound, what)
            .hint("databases are told by their first bytes; encrypted ones cannot be told"));
    }
    Ok(found)
}

fn matcher(pattern: &str) -> Result<GlobMatcher> {
    let glob = GlobBuilder::new(pattern).literal_separator(true).build();
    let glob = glob.map_err(|error| Error::new(Code::Usage, "that pattern makes no sense").because(error))?;
    Ok(glob.compile_matcher())
}

fn one(path: &Path) -> Result<Found> {
    use std::os::unix::ffi::OsStrExt as _;
    if !is_database(path)? {
        let what = format!("{} is no SQLite database, or it is encrypted", path.display());
        return Err(Error::new(Code::Unsupported, what)
            .hint("an encrypted database is protected as a file, with its application at rest: mainstay backup --quiesce"));
    }
    let name = ItemPath::new(path.file_name().unwrap_or_default().as_bytes())
        .map_err(|error| Error::bug("the name of a file is no path").because(error))?;
    Ok(Found { name, path: path.to_owned() })
}

fn walk(
    directory: &Path,
    top: &Path,
    fits: &dyn Fn(&Path) -> bool,
    depth: usize,
    found: &mut Vec<Found>,
) -> Result<()> {
    use std::os::unix::ffi::OsStrExt as _;
    let failed = |error| Error::io(format!("cannot read {}", directory.display()), error);
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let (path, kind) = (entry.path(), entry.file_type().map_err(failed)?);
        if kind.is_dir() && depth < DEPTH_MAX {
            walk(&path, top, fits, depth + 1, found)?;
        }
        let name = path.strip_prefix(top).unwrap_or(&path);
        if !kind.is_file() || !fits(name) {
            continue;
        }
        match is_database(&path) {
            Ok(true) => {}
            // It has become something else meanwhile.
            Err(error) if error.code() != Code::Refused => return Err(error),
            Ok(false) | Err(_) => continue,
        }
        let name = ItemPath::new(name.as_os_str().as_bytes())
            .map_err(|error| Error::bug("a path below a directory is no path").because(error))?;
        found.push(Found { name, path });
    }
    Ok(())
}

fn is_database(path: &Path) -> Result<bool> {
    let Some(there) = There::find(path)? else { return Ok(false) };
    if there.is_kept() {
        return Ok(true);
    }
    let mut start = [0; MAGIC.len()];
    let read = there.open().and_then(|mut file| file.read_exact(&mut start));
    match read {
        Ok(()) => Ok(start == *MAGIC),
        Err(error)
            if matches!(error.kind(), std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::NotFound) =>
        {
            Ok(false)
        }
        Err(error) => Err(Error::io(format!("cannot read {}", path.display()), error)),
    }
}
