//! A directory as it stands: what a plan looks at before anything is written, and what an undo takes things out of.
//! Goes down one name at a time and never through a symbolic link, as the target does.

use std::ffi::{CStr, CString};
use std::path::Path;
use std::sync::Arc;

use mainstay_core::{Error, ItemPath, Kind, Metadata, Result, Stamp, Time};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

use super::decide::Existing;
use super::dirs::Dir;
use super::inspect::{Inspector, kind, look, stamp};
use super::names::{ListingBuffer, NameList};
use super::owners::Owners;
use super::remove::remove_tree;
use super::run::{OwnerRule, is_temporary};

/// A directory that is or will be restored into. One that is not there yet is an empty one.
pub struct Place {
    top: Option<Arc<Dir>>,
    inspector: Inspector,
    owners: OwnerRule,
    buffer: ListingBuffer,
    /// The directories from the top's child down to the one that was used last.
    stack: Vec<(ItemPath, Arc<Dir>)>,
}

impl Place {
    pub fn open(root: &Path, owners: OwnerRule) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let top = match openat(CWD, root, flags, Mode::empty()).and_then(Dir::root) {
            Ok(top) => Some(top),
            Err(Errno::NOENT) => None,
            Err(errno) => return Err(Error::io(format!("cannot open {}", root.display()), errno.into())),
        };
        let inspector = Inspector::new(Owners::of_this_machine());
        Ok(Self { top, inspector, owners, buffer: ListingBuffer::default(), stack: Vec::new() })
    }

    /// Deletes what stands at `path` and everything below it; whether there was anything. Stops at mount points.
    pub fn remove(&mut self, path: &ItemPath) -> Result<bool> {
        let fail = |errno: Errno| Error::io(format!("cannot delete {path}"), errno.into());
        if self.look(path)?.is_none() {
            return Ok(false);
        }
        let Some(directory) = path.parent().and_then(|parent| self.directory(&parent).transpose()) else {
            return Ok(false);
        };
        let directory = directory.map_err(fail)?;
        self.stack.retain(|(known, _)| !known.is_within(path));
        remove_tree(&directory, &name(path).map_err(fail)?).map_err(fail)?;
        Ok(true)
    }

    /// The stamp that a backup of what stands at `path` would give it, on this file system or on a copy of all of it;
    /// `None` when there is nothing.
    pub fn stamp(&mut self, path: &ItemPath) -> Result<Option<Stamp>> {
        let fail = |errno: Errno| Error::io(format!("cannot look at {path}"), errno.into());
        let Some(parent) = path.parent() else { return Ok(None) };
        let Some(directory) = self.directory(&parent).map_err(fail)? else { return Ok(None) };
        let (fd, name) = (directory.fd().map_err(fail)?, name(path).map_err(fail)?);
        match look(&*fd, &name) {
            Ok(stat) => Ok(Some(stamp(&stat, Time(i64::MAX)))),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(fail(errno)),
        }
    }

    /// Whether a directory stands at `path` whose time this user may set.
    pub fn is_own_directory(&mut self, path: &ItemPath) -> Result<bool> {
        let me = rustix::process::geteuid();
        let own = |found: &Metadata| me.is_root() || found.uid == me.as_raw();
        Ok(self.look(path)?.is_some_and(|found| found.kind == Kind::Directory && own(&found)))
    }

    /// The open directory at `path`; `None` when there is none.
    fn directory(&mut self, path: &ItemPath) -> std::result::Result<Option<Arc<Dir>>, Errno> {
        while self.stack.pop_if(|(known, _)| !path.is_within(known)).is_some() {}
        let Some(top) = &self.top else { return Ok(None) };
        let (mut at, mut dir) = match self.stack.last() {
            Some((known, dir)) => (known.clone(), Arc::clone(dir)),
            None => (ItemPath::root(), Arc::clone(top)),
        };
        let depth = at.components().count();
        for name in path.components().skip(depth) {
            let next =
                CString::new(name).or(Err(Errno::INVAL)).and_then(|name| dir.enter(&name, OFlags::PATH));
            match next {
                Ok(next) => dir = next,
                // Nothing, something else, or a link, which is never followed.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::ACCESS) => return Ok(None),
                Err(errno) => return Err(errno),
            }
            at = at.join(name).or(Err(Errno::INVAL))?;
            self.stack.push((at.clone(), Arc::clone(&dir)));
        }
        Ok(Some(dir))
    }

    fn metadata(
        &mut self,
        directory: &Arc<Dir>,
        name: &CStr,
    ) -> std::result::Result<Option<Metadata>, Errno> {
        let fd = directory.fd()?;
        let stat = match look(&*fd, name) {
            Ok(stat) => stat,
            Err(Errno::NOENT | Errno::ACCESS) => return Ok(None),
            Err(errno) => return Err(errno),
        };
        let Some(kind) = kind(&stat) else { return Ok(None) };
        self.inspector.metadata(&*fd, name, &stat, kind).map(|(metadata, _trouble)| Some(metadata))
    }
}

impl Existing for Place {
    fn look(&mut self, path: &ItemPath) -> Result<Option<Metadata>> {
        let fail = |errno: Errno| Error::io(format!("cannot look at {path}"), errno.into());
        let parent = path.parent().unwrap_or_default();
        let Some(directory) = self.directory(&parent).map_err(fail)? else { return Ok(None) };
        let name = if path.is_root() { Ok(c".".to_owned()) } else { name(path) };
        name.and_then(|name| self.metadata(&directory, &name)).map_err(fail)
    }

    fn names(&mut self, directory: &ItemPath) -> Result<Vec<Vec<u8>>> {
        let fail = |errno: Errno| Error::io(format!("cannot list {directory}"), errno.into());
        let Some(dir) = self.directory(directory).map_err(fail)? else { return Ok(Vec::new()) };
        let mut names = NameList::default();
        let open = dir.enter(c".", OFlags::RDONLY).map_err(fail)?;
        names.read(&*open.fd().map_err(fail)?, &mut self.buffer).map_err(fail)?;
        let names = std::iter::from_fn(|| names.take().map(|name| name.to_bytes().to_vec()));
        // What a killed restore left is swept away by the next one without a word.
        Ok(names.filter(|name| !is_temporary(name)).collect())
    }

    fn owner(&self, metadata: &Metadata) -> Option<(u32, u32)> {
        self.owners.owner(&self.inspector.owners, metadata)
    }
}

fn name(path: &ItemPath) -> std::result::Result<CString, Errno> {
    CString::new(path.name()).or(Err(Errno::INVAL))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use mainstay_core::{ItemPath, Kind};

    use super::Place;
    use crate::files::{Existing as _, OwnerRule};

    fn path(text: &str) -> ItemPath {
        ItemPath::new(text).unwrap()
    }

    #[test]
    fn looks_lists_and_removes_without_following_links() {
        let place = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(place.path().join("a/b")).unwrap();
        std::fs::write(place.path().join("a/b/file"), "12345").unwrap();
        std::fs::write(outside.path().join("sentinel"), "").unwrap();
        symlink(outside.path(), place.path().join("a/link")).unwrap();

        let mut here = Place::open(place.path(), OwnerRule::Leave).unwrap();
        assert_eq!(here.look(&path("a/b/file")).unwrap().unwrap().size, 5);
        assert_eq!(here.look(&path("")).unwrap().unwrap().kind, Kind::Directory);
        assert_eq!(here.look(&path("a/link")).unwrap().unwrap().kind, Kind::Symlink);
        for nothing in ["x", "x/y", "a/b/file/z", "a/link/sentinel"] {
            assert_eq!(here.look(&path(nothing)).unwrap(), None, "{nothing}");
        }
        let mut names = here.names(&path("a")).unwrap();
        names.sort();
        assert_eq!(names, [b"b".to_vec(), b"link".to_vec()]);

        assert!(!here.remove(&path("a/link/sentinel")).unwrap());
        assert!(here.remove(&path("a/link")).unwrap() && here.remove(&path("a/b")).unwrap());
        assert!(!here.remove(&path("a/b")).unwrap());
        assert_eq!(here.names(&path("a")).unwrap(), Vec::<Vec<u8>>::new());
        assert!(outside.path().join("sentinel").exists());
    }

    #[test]
    fn a_place_that_is_not_there_is_empty() {
        let place = tempfile::tempdir().unwrap();
        let mut nowhere = Place::open(&place.path().join("none"), OwnerRule::Leave).unwrap();
        assert_eq!(nowhere.look(&path("a")).unwrap(), None);
        assert!(nowhere.names(&path("")).unwrap().is_empty() && !nowhere.remove(&path("a")).unwrap());
    }
}
