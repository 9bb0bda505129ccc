//! What is offered under a name, what has been asked of it, and in which order.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mainstay_core::{Blocks, Code, Error, Result};

use crate::blocks::WritableBlocks;
use crate::wire::{STRING_MAX, flag};

/// Blocks under a name.
pub struct Export {
    name: String,
    text: String,
    hidden: bool,
    device: Device,
    observers: Vec<Arc<dyn ReadObserver>>,
    pub(super) tally: Tally,
}

enum Device {
    ReadOnly(Arc<dyn Blocks>),
    Writable(Arc<dyn WritableBlocks>),
}

/// Is told about every read before it is served: a recorder, or somebody who fetches what will be asked for next.
pub trait ReadObserver: Send + Sync {
    /// Runs on the thread that serves the read, so it must be quick: longer work belongs to a thread of its own.
    fn on_read(&self, range: &Range<u64>);
}

/// What has been asked of an export. Requests that were refused count as errors only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub connections: u64,
    pub reads: u64,
    pub bytes_read: u64,
    pub writes: u64,
    pub bytes_written: u64,
    pub flushes: u64,
    pub errors: u64,
}

#[derive(Default)]
pub(super) struct Tally {
    pub(super) connections: AtomicU64,
    pub(super) reads: AtomicU64,
    pub(super) bytes_read: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) bytes_written: AtomicU64,
    pub(super) flushes: AtomicU64,
    pub(super) errors: AtomicU64,
}

impl Export {
    pub fn read_only(name: impl Into<String>, blocks: Arc<dyn Blocks>) -> Self {
        Self::new(name.into(), Device::ReadOnly(blocks))
    }

    pub fn writable(name: impl Into<String>, blocks: Arc<dyn WritableBlocks>) -> Self {
        Self::new(name.into(), Device::Writable(blocks))
    }

    fn new(name: String, device: Device) -> Self {
        let (observers, tally) = (Vec::new(), Tally::default());
        Self { name, text: String::new(), hidden: false, device, observers, tally }
    }

    /// It is served to who knows its name, and to nobody else.
    #[must_use]
    pub fn hidden(mut self) -> Self {
        self.hidden = true;
        self
    }

    pub(super) fn is_hidden(&self) -> bool {
        self.hidden
    }

    /// A line for people who list the exports.
    #[must_use]
    pub fn text(mut self, text: impl Into<String>) -> Self {
        self.text = text.into();
        self
    }

    #[must_use]
    pub fn observer(mut self, observer: Arc<dyn ReadObserver>) -> Self {
        self.observers.push(observer);
        self
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn description(&self) -> &str {
        &self.text
    }

    pub(super) fn blocks(&self) -> &dyn Blocks {
        match &self.device {
            Device::ReadOnly(blocks) => &**blocks,
            Device::Writable(blocks) => &**blocks,
        }
    }

    pub(super) fn writable_blocks(&self) -> Option<&dyn WritableBlocks> {
        match &self.device {
            Device::ReadOnly(_) => None,
            Device::Writable(blocks) => Some(&**blocks),
        }
    }

    /// Transmission flags. All connections share the blocks, so a flush on one is a flush on all.
    pub(super) fn flags(&self, structured: bool) -> u16 {
        let access = match self.device {
            Device::ReadOnly(_) => flag::READ_ONLY,
            Device::Writable(_) => flag::FLUSH | flag::FUA | flag::TRIM | flag::WRITE_ZEROES,
        };
        let fragments = if structured { flag::DF } else { 0 };
        flag::HAS_FLAGS | flag::MULTI_CONN | fragments | access
    }

    pub(super) fn observe(&self, range: &Range<u64>) {
        self.observers.iter().for_each(|observer| observer.on_read(range));
    }

    pub(super) fn flush(&self) -> Result<()> {
        self.writable_blocks().map_or(Ok(()), WritableBlocks::flush)
    }

    pub(super) fn counters(&self) -> Counters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            connections: read(&self.tally.connections),
            reads: read(&self.tally.reads),
            bytes_read: read(&self.tally.bytes_read),
            writes: read(&self.tally.writes),
            bytes_written: read(&self.tally.bytes_written),
            flushes: read(&self.tally.flushes),
            errors: read(&self.tally.errors),
        }
    }
}

pub(super) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

pub(super) fn check_names(exports: &[Export]) -> Result<()> {
    for (index, Export { name, text, .. }) in exports.iter().enumerate() {
        let too_long = [name, text].iter().any(|text| text.len() > STRING_MAX || text.contains('\0'));
        if too_long || exports[..index].iter().any(|other| other.name == *name) {
            let what = format!("an export cannot be called {}", name.escape_debug());
            return Err(Error::new(Code::Usage, what).hint("use short names, and each only once"));
        }
    }
    Ok(())
}

/// The export of this name; for no name the first one that everybody may know of.
pub(super) fn find<'a>(exports: &'a [Export], name: &str) -> Option<(usize, &'a Export)> {
    let exact = exports.iter().enumerate().find(|(_, export)| export.name == name);
    let mut open = exports.iter().enumerate().filter(|(_, export)| name.is_empty() && !export.hidden);
    exact.or_else(|| open.next())
}

/// Records the reads of a boot, in the order in which they were asked for.
pub struct Trace {
    reads: Mutex<Vec<Range<u64>>>,
    reads_max: usize,
}

impl Trace {
    /// Keeps the first `reads_max`.
    pub fn new(reads_max: usize) -> Self {
        Self { reads: Mutex::new(Vec::new()), reads_max }
    }

    /// What was recorded so far.
    pub fn reads(&self) -> Vec<Range<u64>> {
        self.reads.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl ReadObserver for Trace {
    fn on_read(&self, range: &Range<u64>) {
        let mut reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        if reads.len() < self.reads_max {
            reads.push(range.clone());
        }
    }
}
