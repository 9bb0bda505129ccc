//! The medium under a repository.

use std::ops::Range;

use crate::Result;

/// A medium that holds blobs: written once, never changed, never half visible.
///
/// Names are relative paths of `[a-z0-9._-]` components joined by `/`, at most 200 bytes, none of them starting
/// with a dot; a store refuses any other name with [`crate::Code::Bug`].
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

    /// Makes every earlier `put_new` and `delete` of this value durable.
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
