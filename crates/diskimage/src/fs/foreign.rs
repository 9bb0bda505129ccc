//! What the file systems that other crates parse have in common. Those crates move fast and were not written for
//! hostile images, so a panic in one is an error here, and what they return is checked again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use mainstay_core::{Error, Result};

use super::pages::Pages;
use super::{DirEntry, Node, Page, check_name};

/// Extents that one file may have: they are held in memory while it is read, 32 bytes each.
pub(crate) const EXTENTS_MAX: u64 = 1 << 21;

/// Calls into a foreign parser.
pub(crate) fn guarded<T, E>(
    what: &str,
    call: impl FnOnce() -> std::result::Result<T, E>,
    translate: impl FnOnce(E) -> Error,
) -> Result<T> {
    // What it leaves behind is only read again, and read with the same checks.
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(done) => done.map_err(translate),
        Err(_panic) => Err(Error::integrity(format!("the parser of {what} stumbled over this file system"))),
    }
}

/// A volume as those crates want it.
pub(crate) struct Device(pub(crate) Arc<Pages>);

impl fs_core::BlockRead for Device {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> fs_core::Result<()> {
        self.0.read(offset, buffer).map_err(|error| fs_core::Error::Io(std::io::Error::other(error)))
    }

    fn size_bytes(&self) -> u64 {
        self.0.size()
    }
}

/// The directory that was listed last: such crates list whole directories, and callers ask page by page.
#[derive(Default)]
pub(crate) struct Listings(Mutex<Option<(Node, Arc<Vec<DirEntry>>)>>);

impl Listings {
    pub(crate) fn page(
        &self,
        directory: Node,
        from: u64,
        limit: usize,
        list: impl FnOnce() -> Result<Vec<DirEntry>>,
    ) -> Result<Page> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let entries = match held {
            Some((node, entries)) if node == directory && from > 0 => entries,
            _ => {
                let entries = list()?;
                entries.iter().try_for_each(|entry| check_name(&entry.name))?;
                let entries = Arc::new(entries);
                *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((directory, entries.clone()));
                entries
            }
        };
        let from = usize::try_from(from).unwrap_or(usize::MAX);
        let page: Vec<DirEntry> = entries.iter().skip(from).take(limit.max(1)).cloned().collect();
        let after = from.saturating_add(page.len());
        let next = (after < entries.len()).then_some(after as u64);
        Ok(Page { entries: page, next })
    }
}
