//! The medium under a repository.

use std::ops::Range;

use crate::Result;

/// A medium that holds blobs: written once, never changed, never half visible.
///
/// Names are relative paths of `[a-z0-9._-]` components joined by `/`, at most 200 bytes, none of them starting
/// with a dot; a store refuses any other name with [`crate::Code::Bug`] ([`check_blob_name`]). No blob's name is a
/// directory of another's: on a file system both cannot be.
///
/// Every implementation passes the conformance suite in `mainstay-testkit`.
pub trait BlobStore: Send + Sync {
    /// Stores the concatenation of `parts` under `name` unless the name is taken. For one name exactly one caller
    /// ever gets [`Put::Created`]. A crash leaves either the whole blob or none, never a torn one. Durable after
    /// the next [`BlobStore::flush`].
    ///
    /// Errors: [`crate::Code::Full`] when the medium is full; then nothing is left behind.
    fn put_new(&self, name: &str, parts: &[&[u8]]) -> Result<Put>;

    /// Exactly the bytes of `range`; [`crate::Code::NotFound`] when the blob is absent,
    /// [`crate::Code::Integrity`] when it is shorter than the range asks.
    fn get(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>>;

    /// Length in bytes; [`crate::Code::NotFound`] when absent.
    fn size(&self, name: &str) -> Result<u64>;

    /// Calls `each` for every blob whose name starts with `prefix` (a whole number of components, or empty), in
    /// no particular order. Blobs that come or go meanwhile may or may not be listed.
    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()>;

    /// Removes a blob; an absent one is no error.
    fn delete(&self, name: &str) -> Result<()>;

    /// Makes every earlier `put_new` and `delete` of this value durable, and with them whatever anyone else had put
    /// into the same directories by then: a record that was built upon another one never outlives it.
    fn flush(&self) -> Result<()>;

    fn capabilities(&self) -> Capabilities;

    /// Where this is, for people: never contains a secret.
    fn location(&self) -> String;

    /// Gives the space back that was set aside for a full medium; whether there was any.
    fn release_reserve(&self) -> Result<bool> {
        Ok(false)
    }

    /// Sets the reserve aside again, if there is room for it.
    fn restore_reserve(&self) -> Result<()> {
        Ok(())
    }

    /// Bytes that are set aside for a full medium; `None` for a store that sets nothing aside.
    fn reserve(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Removes what processes that died in the middle of a `put_new` left outside the names, if it was written
    /// before `before`; the number of bytes freed. A live process that is hit fails its put, and nothing else.
    fn sweep_temporary(&self, before: crate::Time) -> Result<u64> {
        let _nothing_is_left = before;
        Ok(0)
    }

    /// The whole blob, refusing one that is longer than `limit` bytes with [`crate::Code::Integrity`].
    fn get_whole(&self, name: &str, limit: u64) -> Result<Vec<u8>> {
        let size = self.size(name)?;
        if size > limit {
            let what = format!("{name} is {size} bytes long, more than the {limit} it may have");
            return Err(crate::Error::integrity(what));
        }
        self.get(name, 0..size)
    }
}

/// The longest name a blob may have, in bytes.
const NAME_BYTES_MAX: usize = 200;

/// Refuses, with [`crate::Code::Bug`], a name that no blob may have.
pub fn check_blob_name(name: &str) -> Result<()> {
    let letter = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-');
    let good = |part: &str| !part.is_empty() && !part.starts_with('.') && part.bytes().all(letter);
    if name.len() <= NAME_BYTES_MAX && name.split('/').all(good) {
        return Ok(());
    }
    Err(crate::Error::bug(format!("{name:?} cannot be the name of a blob")))
}

/// Whether the blob `name` lies under `prefix`, which is a whole number of components or empty.
pub fn blob_is_under(name: &str, prefix: &str) -> bool {
    match name.strip_prefix(prefix) {
        Some(rest) => prefix.is_empty() || rest.is_empty() || rest.starts_with('/'),
        None => false,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    Created,
    /// The name was taken; the stored bytes were not touched.
    Exists,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub name: String,
    /// Length in bytes.
    pub size: u64,
    /// When the medium says it was written; a hint for people and for comfort, never for correctness.
    pub modified: crate::Time,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// `put_new` is decided atomically by the medium. Without it nothing is ever deleted.
    pub create_if_absent: bool,
    /// Blobs can be made immutable until a date.
    pub retain_until: bool,
}

#[cfg(test)]
mod tests {
    use super::{blob_is_under, check_blob_name};

    #[test]
    fn names_that_could_leave_a_directory_or_hide_in_it_are_refused() {
        for good in ["a", "log/000001", "pack/d/0f/a-b_c.d", "a..b", &"x".repeat(200)] {
            check_blob_name(good).unwrap();
        }
        let long = "x".repeat(201);
        for bad in [
            "", "/", "/a", "a/", "a//b", ".", "..", "a/..", "a/../b", ".a", "a/.b", "A", "a b", "a\0", "ä",
            &long,
        ] {
            check_blob_name(bad).unwrap_err();
        }
    }

    #[test]
    fn a_prefix_is_whole_components() {
        assert!(["", "a", "a/b", "a/b/c"].iter().all(|prefix| blob_is_under("a/b/c", prefix)));
        assert!(!["a/b/c/d", "b", "a/bb", "aa"].iter().any(|prefix| blob_is_under("a/b/c", prefix)));
        assert!(!blob_is_under("ab", "a"));
    }
}
