//! What a file holds: what lies below it, as far as nobody has written over it, and what was written.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use mainstay_core::{Blocks, Error, Result};

/// What is written is kept in pages of so many bytes, as databases write.
const PAGE: u64 = 8192;

/// Where everything that is written goes: a file without a name, which is gone with the process.
pub(super) struct Scratch {
    file: File,
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    next: u64,
    free: Vec<u64>,
}

impl Scratch {
    pub(super) fn new(directory: &Path) -> Result<Self> {
        let path = directory.join("written");
        let fail = |error| Error::io(format!("cannot make {}", path.display()), error);
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(fail)?;
        std::fs::remove_file(&path).map_err(fail)?;
        Ok(Self { file, slots: Mutex::default() })
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> u64 {
        let mut slots = self.slots();
        slots.free.pop().unwrap_or_else(|| {
            slots.next += 1;
            slots.next - 1
        })
    }

    fn give_back(&self, freed: impl IntoIterator<Item = u64>) {
        self.slots().free.extend(freed);
    }

    /// Bytes in use.
    pub(super) fn bytes(&self) -> u64 {
        let slots = self.slots();
        (slots.next - slots.free.len() as u64) * PAGE
    }
}

/// Opens what lies below a file, when somebody reads it.
pub type Below = Box<dyn Fn() -> Result<Arc<dyn Blocks>> + Send + Sync>;

/// The content of one file.
pub(super) struct Content {
    size: AtomicU64,
    pages: RwLock<Pages>,
    below: Option<Below>,
    opened: OnceLock<Arc<dyn Blocks>>,
    /// Counts the bytes read from below.
    read: Arc<AtomicU64>,
    scratch: Arc<Scratch>,
}

#[derive(Default)]
struct Pages {
    /// What lies below counts up to here.
    below: u64,
    /// Pages that were written, and their slots.
    own: HashMap<u64, u64>,
}

impl Content {
    pub(super) fn new(
        size: u64,
        below: Option<Below>,
        read: &Arc<AtomicU64>,
        scratch: &Arc<Scratch>,
    ) -> Self {
        let pages = Pages { below: if below.is_some() { size } else { 0 }, own: HashMap::new() };
        Self {
            size: AtomicU64::new(size),
            pages: RwLock::new(pages),
            below,
            opened: OnceLock::new(),
            read: Arc::clone(read),
            scratch: Arc::clone(scratch),
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Up to `length` bytes; fewer at the end of the file.
    pub(super) fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let pages = self.pages.read().unwrap_or_else(PoisonError::into_inner);
        let length = (length as u64).min(self.size().saturating_sub(offset));
        let mut bytes = vec![0; length as usize];
        self.fill(&pages, offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `bytes`, which are zeros, with what stands at `offset`.
    fn fill(&self, pages: &Pages, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let end = offset + bytes.len() as u64;
        let mut at = offset;
        while at < end {
            let slot = pages.own.get(&(at / PAGE)).copied();
            let mut until = (at / PAGE + 1) * PAGE;
            // What lies below is read in one go.
            while slot.is_none() && until < end && !pages.own.contains_key(&(until / PAGE)) {
                until += PAGE;
            }
            let until = until.min(end);
            let part = bytes.get_mut((at - offset) as usize..(until - offset) as usize).unwrap_or_default();
            match slot {
                Some(slot) => self
                    .scratch
                    .file
                    .read_exact_at(part, slot * PAGE + at % PAGE)
                    .map_err(|error| Error::io("cannot read what was written", error))?,
                None => self.read_below(pages.below, at, part)?,
            }
            at = until;
        }
        Ok(())
    }

    fn read_below(&self, end: u64, at: u64, part: &mut [u8]) -> Result<()> {
        let there = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX).min(part.len());
        let (Some(below), Some(part)) = (&self.below, part.get_mut(..there).filter(|part| !part.is_empty()))
        else {
            return Ok(());
        };
        let blocks = match self.opened.get() {
            Some(blocks) => blocks,
            None => {
                let blocks = below()?;
                self.opened.get_or_init(|| blocks)
            }
        };
        self.read.fetch_add(part.len() as u64, Ordering::Relaxed);
        blocks.read_at(at, part)
    }

    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut pages = self.pages.write().unwrap_or_else(PoisonError::into_inner);
        let end = offset + bytes.len() as u64;
        let mut at = offset;
        while at < end {
            let until = ((at / PAGE + 1) * PAGE).min(end);
            let part = bytes.get((at - offset) as usize..(until - offset) as usize).unwrap_or_default();
            self.put(&mut pages, at, part)?;
            at = until;
        }
        self.size.fetch_max(end, Ordering::AcqRel);
        Ok(())
    }

    /// Writes within one page.
    fn put(&self, pages: &mut Pages, at: u64, part: &[u8]) -> Result<()> {
        let fail = |error| Error::io("cannot keep what is written", error);
        let number = at / PAGE;
        if let Some(slot) = pages.own.get(&number) {
            return self.scratch.file.write_all_at(part, slot * PAGE + at % PAGE).map_err(fail);
        }
        let mut page = vec![0; PAGE as usize];
        if (part.len() as u64) < PAGE {
            self.fill(pages, number * PAGE, &mut page)?;
        }
        let within = (at % PAGE) as usize;
        page.get_mut(within..within + part.len()).unwrap_or_default().copy_from_slice(part);
        let slot = self.scratch.take();
        self.scratch.file.write_all_at(&page, slot * PAGE).map_err(fail)?;
        pages.own.insert(number, slot);
        Ok(())
    }

    pub(super) fn set_size(&self, size: u64) -> Result<()> {
        let mut pages = self.pages.write().unwrap_or_else(PoisonError::into_inner);
        if size < self.size() {
            if let Some(slot) = pages.own.get(&(size / PAGE)).filter(|_| !size.is_multiple_of(PAGE)) {
                // What is behind the end must read as zeros, should the file grow again.
                let zeros = vec![0; (PAGE - size % PAGE) as usize];
                let cut = self.scratch.file.write_all_at(&zeros, slot * PAGE + size % PAGE);
                cut.map_err(|error| Error::io("cannot keep what is written", error))?;
            }
            let beyond = size.div_ceil(PAGE);
            let freed = pages.own.extract_if(|number, _| *number >= beyond).map(|(_, slot)| slot);
            self.scratch.give_back(freed.collect::<Vec<_>>());
            pages.below = pages.below.min(size);
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}

impl Drop for Content {
    fn drop(&mut self) {
        let pages = self.pages.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.scratch.give_back(std::mem::take(&mut pages.own).into_values());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;

    use mainstay_core::{Blocks, Extent, Result};
    use proptest::prelude::*;

    use super::{Content, Scratch};

    struct Bytes(Vec<u8>);

    impl Blocks for Bytes {
        fn size(&self) -> u64 {
            self.0.len() as u64
        }

        fn extents(&self, _: std::ops::Range<u64>) -> Result<Vec<Extent>> {
            Ok(Vec::new())
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
            buffer.copy_from_slice(&self.0[offset as usize..offset as usize + buffer.len()]);
            Ok(())
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(usize, usize, u8),
        Size(usize),
        Read(usize, usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        // Around the borders of pages, where mistakes are.
        let place =
            prop_oneof![0..40_000_usize, (0..5_usize, 0..3_usize).prop_map(|(page, off)| page * 8192 + off)];
        prop_oneof![
            (place.clone(), 0..20_000_usize, any::<u8>())
                .prop_map(|(at, length, byte)| Step::Write(at, length, byte)),
            place.clone().prop_map(Step::Size),
            (place, 0..20_000_usize).prop_map(|(at, length)| Step::Read(at, length)),
        ]
    }

    proptest! {
        #[test]
        fn what_is_written_and_what_lies_below_read_as_one_file(
            size in 0..30_000_usize,
            steps in proptest::collection::vec(step(), 1..30),
        ) {
            let directory = tempfile::tempdir().unwrap();
            let scratch = Arc::new(Scratch::new(directory.path()).unwrap());
            let mut model: Vec<u8> = (0..size).map(|at| (at / 3) as u8).collect();
            let below = model.clone();
            let below = Box::new(move || Ok(Arc::new(Bytes(below.clone())) as Arc<dyn Blocks>));
            let content = Content::new(size as u64, Some(below), &Arc::new(AtomicU64::new(0)), &scratch);
            for step in steps {
                match step {
                    Step::Write(at, length, byte) => {
                        content.write(at as u64, &vec![byte; length]).unwrap();
                        if length > 0 {
                            model.resize(model.len().max(at + length), 0);
                            model[at..at + length].fill(byte);
                        }
                    }
                    Step::Size(size) => {
                        content.set_size(size as u64).unwrap();
                        model.resize(size, 0);
                    }
                    Step::Read(at, length) => {
                        let end = (at + length).min(model.len());
                        prop_assert_eq!(content.read(at as u64, length).unwrap(), &model[at.min(end)..end]);
                    }
                }
                prop_assert_eq!(content.size(), model.len() as u64);
            }
            prop_assert_eq!(content.read(0, 1 << 20).unwrap(), model);
            drop(content);
            prop_assert_eq!(scratch.bytes(), 0);
        }
    }
}
