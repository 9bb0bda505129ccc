//! The names of a draft: what the kernel knows by which number, and how often.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;

use fuser::Errno;

use super::content::Content;

/// The number of the directory that is mounted.
pub(super) const ROOT: u64 = 1;

/// What came of a request.
pub(super) type Answer<T> = Result<T, Errno>;

#[derive(Clone)]
pub(super) enum What {
    Directory(BTreeMap<Vec<u8>, u64>),
    File(Arc<Content>),
    Symlink(Vec<u8>),
}

pub(super) struct Node {
    pub(super) what: What,
    pub(super) mode: u16,
    /// Names that it has.
    pub(super) links: u32,
    /// So often the kernel was told of it and has not forgotten it.
    told: u64,
}

pub(super) struct Tree {
    nodes: HashMap<u64, Node>,
    last: u64,
}

impl Tree {
    pub(super) fn new() -> Self {
        let root = Node { what: What::Directory(BTreeMap::new()), mode: 0o700, links: 1, told: 1 };
        Self { nodes: HashMap::from([(ROOT, root)]), last: ROOT }
    }

    pub(super) fn get(&self, number: u64) -> Answer<&Node> {
        self.nodes.get(&number).ok_or(Errno::ESTALE)
    }

    pub(super) fn get_mut(&mut self, number: u64) -> Answer<&mut Node> {
        self.nodes.get_mut(&number).ok_or(Errno::ESTALE)
    }

    pub(super) fn file(&self, number: u64) -> Answer<Arc<Content>> {
        match &self.get(number)?.what {
            What::File(content) => Ok(Arc::clone(content)),
            What::Directory(_) => Err(Errno::EISDIR),
            What::Symlink(_) => Err(Errno::EINVAL),
        }
    }

    pub(super) fn names(&self, directory: u64) -> Answer<&BTreeMap<Vec<u8>, u64>> {
        match &self.get(directory)?.what {
            What::Directory(names) => Ok(names),
            _ => Err(Errno::ENOTDIR),
        }
    }

    fn names_mut(&mut self, directory: u64) -> Answer<&mut BTreeMap<Vec<u8>, u64>> {
        match &mut self.get_mut(directory)?.what {
            What::Directory(names) => Ok(names),
            _ => Err(Errno::ENOTDIR),
        }
    }

    pub(super) fn find(&self, directory: u64, name: &OsStr) -> Answer<u64> {
        self.names(directory)?.get(name.as_bytes()).copied().ok_or(Errno::ENOENT)
    }

    /// Puts something new under a name that is free.
    pub(super) fn add(&mut self, directory: u64, name: &OsStr, what: What, mode: u16) -> Answer<u64> {
        if self.names(directory)?.contains_key(name.as_bytes()) {
            return Err(Errno::EEXIST);
        }
        self.last += 1;
        let number = self.last;
        self.nodes.insert(number, Node { what, mode, links: 1, told: 0 });
        self.names_mut(directory)?.insert(name.as_bytes().to_vec(), number);
        Ok(number)
    }

    /// Gives a file one more name.
    pub(super) fn link(&mut self, number: u64, directory: u64, name: &OsStr) -> Answer<()> {
        self.file(number)?;
        if self.names(directory)?.contains_key(name.as_bytes()) {
            return Err(Errno::EEXIST);
        }
        self.names_mut(directory)?.insert(name.as_bytes().to_vec(), number);
        self.get_mut(number)?.links += 1;
        Ok(())
    }

    /// Takes a name away; what it named stays for as long as somebody has it open.
    pub(super) fn remove(&mut self, directory: u64, name: &OsStr, wants_directory: bool) -> Answer<()> {
        let number = self.find(directory, name)?;
        match (&self.get(number)?.what, wants_directory) {
            (What::Directory(names), true) if !names.is_empty() => return Err(Errno::ENOTEMPTY),
            (What::Directory(_), false) => return Err(Errno::EISDIR),
            (What::File(_) | What::Symlink(_), true) => return Err(Errno::ENOTDIR),
            _ => {}
        }
        self.names_mut(directory)?.remove(name.as_bytes());
        self.get_mut(number)?.links -= 1;
        self.let_go(number);
        Ok(())
    }

    pub(super) fn rename(&mut self, from: (u64, &OsStr), to: (u64, &OsStr)) -> Answer<()> {
        let number = self.find(from.0, from.1)?;
        match self.find(to.0, to.1) {
            // Both are names of one file.
            Ok(there) if there == number => return Ok(()),
            Ok(_) => {
                let is_directory = matches!(self.get(number)?.what, What::Directory(_));
                self.remove(to.0, to.1, is_directory)?;
            }
            Err(Errno::ENOENT) => {}
            Err(error) => return Err(error),
        }
        self.names_mut(to.0)?.insert(to.1.as_bytes().to_vec(), number);
        self.names_mut(from.0)?.remove(from.1.as_bytes());
        Ok(())
    }

    /// Counts that the kernel is told of something.
    pub(super) fn tell(&mut self, number: u64) {
        if let Some(node) = self.nodes.get_mut(&number) {
            node.told += 1;
        }
    }

    pub(super) fn forget(&mut self, number: u64, times: u64) {
        if let Some(node) = self.nodes.get_mut(&number) {
            node.told = node.told.saturating_sub(times);
        }
        self.let_go(number);
    }

    fn let_go(&mut self, number: u64) {
        if number != ROOT && self.nodes.get(&number).is_some_and(|node| node.links == 0 && node.told == 0) {
            self.nodes.remove(&number);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::ffi::OsStr;

    use super::{ROOT, Tree, What};

    #[test]
    fn what_has_no_name_goes_once_nobody_knows_it() {
        let mut tree = Tree::new();
        let name = OsStr::new;
        let directory = tree.add(ROOT, name("d"), What::Directory(BTreeMap::new()), 0o700).unwrap();
        let link = tree.add(directory, name("l"), What::Symlink(b"x".to_vec()), 0o777).unwrap();
        tree.remove(ROOT, name("d"), true).unwrap_err();
        tree.tell(link);
        tree.remove(directory, name("l"), false).unwrap();
        tree.get(link).unwrap();
        tree.forget(link, 1);
        assert!(tree.get(link).is_err());
        let other = tree.add(ROOT, name("e"), What::Directory(BTreeMap::new()), 0o700).unwrap();
        tree.rename((ROOT, name("d")), (ROOT, name("e"))).unwrap();
        assert_eq!(tree.find(ROOT, name("e")).unwrap(), directory);
        assert!(tree.get(other).is_err() && tree.find(ROOT, name("d")).is_err());
    }
}
