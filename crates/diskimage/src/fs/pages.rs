//! A volume behind a small cache: file systems read the same few blocks of metadata over and over.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mainstay_core::{Blocks, Error, Result};

/// Bytes read at once for metadata: more than a block, since neighbours are wanted next.
const PAGE: usize = 32 << 10;

/// Pages kept: 8 MiB.
const SLOTS: usize = 256;

struct Slot {
    page: u64,
    bytes: Arc<[u8]>,
}

pub(crate) struct Pages {
    volume: Arc<dyn Blocks>,
    slots: Mutex<Vec<Option<Slot>>>,
}

impl Pages {
    pub(crate) fn new(volume: Arc<dyn Blocks>) -> Self {
        Self { volume, slots: Mutex::new((0..SLOTS).map(|_| None).collect()) }
    }

    /// Bytes of the volume.
    pub(crate) fn size(&self) -> u64 {
        self.volume.size()
    }

    /// Fills the buffer, small reads from the cache, large ones past it; fails beyond the end.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(buffer.len() as u64).filter(|&end| end <= self.size());
        if end.is_none() {
            let length = buffer.len();
            let what = format!("the file system points at {length} bytes at {offset}, beyond its volume");
            return Err(Error::integrity(what));
        }
        if buffer.len() >= PAGE {
            return self.volume.read_at(offset, buffer);
        }
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let (page, within) = (at / PAGE as u64, (at % PAGE as u64) as usize);
            let bytes = self.page(page)?;
            let from = bytes.get(within..).unwrap_or_default();
            let length = from.len().min(buffer.len() - done);
            buffer[done..done + length].copy_from_slice(&from[..length]);
            done += length;
        }
        Ok(())
    }

    /// `length` bytes at `offset`. The caller has bounded the length.
    pub(crate) fn take(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.read(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// The page of that number, never empty; shorter at the end of the volume.
    fn page(&self, page: u64) -> Result<Arc<[u8]>> {
        let slot = (page.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize % SLOTS;
        if let Some(held) = &self.slots()[slot]
            && held.page == page
        {
            return Ok(held.bytes.clone());
        }
        let start = page * PAGE as u64;
        let mut bytes = vec![0; (self.size() - start).min(PAGE as u64) as usize];
        self.volume.read_at(start, &mut bytes)?;
        let bytes: Arc<[u8]> = bytes.into();
        self.slots()[slot] = Some(Slot { page, bytes: bytes.clone() });
        Ok(bytes)
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Option<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
