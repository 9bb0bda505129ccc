//! A blob store in memory.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mainstay_core::{
    BlobStore, Capabilities, Code, Error, Listed, Put, Result, Time, blob_is_under, check_blob_name,
};

/// What a store holds: bytes by name. Cloning it copies no bytes.
pub type Blobs = BTreeMap<String, Arc<[u8]>>;

/// Clones are the same store; [`MemoryStore::snapshot`] and [`MemoryStore::from_blobs`] fork one.
#[derive(Clone, Default)]
pub struct MemoryStore(Arc<Mutex<Blobs>>);

impl MemoryStore {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn from_blobs(blobs: Blobs) -> Self {
        Self(Arc::new(Mutex::new(blobs)))
    }

    /// The contents at this moment, independent of what comes later.
    pub fn snapshot(&self) -> Blobs {
        self.blobs().clone()
    }

    /// A store of its own with the same contents.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self::from_blobs(self.snapshot())
    }

    /// The length of all blobs together.
    pub fn total_bytes(&self) -> u64 {
        self.blobs().values().map(|bytes| bytes.len() as u64).sum()
    }

    pub(crate) fn blobs(&self) -> MutexGuard<'_, Blobs> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, name: &str) -> Result<Arc<[u8]>> {
        check_blob_name(name)?;
        let found = self.blobs().get(name).cloned();
        found.ok_or_else(|| Error::new(Code::NotFound, format!("there is no blob {name}")))
    }
}

/// The contents of any store, read blob by blob.
pub fn snapshot_of(store: &dyn BlobStore) -> Result<Blobs> {
    let mut names = Vec::new();
    store.list("", &mut |listed| {
        names.push(listed.name);
        Ok(())
    })?;
    names.into_iter().map(|name| Ok((name.clone(), store.get_whole(&name, u64::MAX)?.into()))).collect()
}

impl BlobStore for MemoryStore {
    fn put_new(&self, name: &str, parts: &[&[u8]]) -> Result<Put> {
        check_blob_name(name)?;
        let mut blobs = self.blobs();
        if blobs.contains_key(name) {
            return Ok(Put::Exists);
        }
        // As strict as a file system, so that a mistake shows in every test.
        let inside_a_blob = name.match_indices('/').any(|(end, _)| blobs.contains_key(&name[..end]));
        let below = format!("{name}/");
        let is_directory =
            blobs.range(below.clone()..).next().is_some_and(|(next, _)| next.starts_with(&below));
        if inside_a_blob || is_directory {
            return Err(Error::bug(format!("the blob {name} would be both a file and a directory")));
        }
        blobs.insert(name.to_owned(), parts.concat().into());
        Ok(Put::Created)
    }

    fn get(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>> {
        let bytes = self.find(name)?;
        if range.start > range.end {
            return Err(Error::bug(format!("the range {range:?} of {name} ends before it starts")));
        }
        let slice = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
        match slice.and_then(|(start, end)| bytes.get(start..end)) {
            Some(slice) => Ok(slice.to_vec()),
            None => Err(Error::integrity(format!("{name} has {} bytes, not {range:?}", bytes.len()))),
        }
    }

    fn size(&self, name: &str) -> Result<u64> {
        Ok(self.find(name)?.len() as u64)
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        if !prefix.is_empty() {
            check_blob_name(prefix)?;
        }
        // From a copy: `each` may use the store.
        let blobs = self.snapshot();
        for (name, bytes) in blobs.into_iter().filter(|(name, _)| blob_is_under(name, prefix)) {
            each(Listed { name, size: bytes.len() as u64, modified: Time::default() })?;
        }
        Ok(())
    }

    fn delete(&self, name: &str) -> Result<()> {
        check_blob_name(name)?;
        self.blobs().remove(name);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { create_if_absent: true, retain_until: false }
    }

    fn location(&self) -> String {
        "memory".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    crate::blob_store_suite!(conformance, || ((), MemoryStore::new()));

    #[test]
    fn a_clone_is_the_same_store_and_a_fork_is_not() {
        let store = MemoryStore::new();
        let (clone, fork) = (store.clone(), store.fork());
        store.put_new("a", &[b"12", b"3"]).unwrap();
        assert_eq!((clone.total_bytes(), fork.total_bytes()), (3, 0));
        assert_eq!(snapshot_of(&store).unwrap(), clone.snapshot());
    }

    #[test]
    fn a_name_is_a_file_or_a_directory() {
        let store = MemoryStore::new();
        store.put_new("a/b", &[]).unwrap();
        store.put_new("a-b", &[]).unwrap();
        assert_eq!(store.put_new("a", &[]).unwrap_err().code(), Code::Bug);
        assert_eq!(store.put_new("a/b/c", &[]).unwrap_err().code(), Code::Bug);
    }
}
