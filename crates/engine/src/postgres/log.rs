//! The log that a recovery reads, as the files that a server has it in, made when they are read.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use mainstay_core::{Blocks, Error, Extent, ExtentKind, Position, Result};
use mainstay_repository::Journal;
use mainstay_workloads::postgres::Lsn;

use super::plan::ClusterPlan;

/// So many bytes of the log are kept from one read to the next: recovery reads from front to back.
const WINDOW: usize = 8 << 20;

/// The log of a plan on one timeline.
pub(super) struct Log {
    journals: Arc<Vec<Journal>>,
    journal: usize,
    timeline: u32,
    segment_bytes: u64,
    /// From the start of a segment to where the log ends.
    range: Range<u64>,
    window: Mutex<(u64, Vec<u8>)>,
}

/// One file of it.
pub(super) struct Segment {
    log: Arc<Log>,
    start: u64,
}

impl Log {
    /// One for each timeline that recovery goes through.
    pub(super) fn of(plan: &ClusterPlan) -> Result<Vec<Arc<Self>>> {
        let place = |position: &Position| {
            Lsn::from_position(position).ok_or_else(|| Error::integrity("a journal of another kind"))
        };
        let (start, segment_bytes) = (plan.start()?, plan.cluster.segment_bytes);
        let mut logs = Vec::new();
        for leg in &plan.legs {
            // The other legs begin where a segment does.
            let start = start.max(place(&leg.stretch.start)?);
            logs.push(Arc::new(Self {
                journals: Arc::clone(&plan.journals),
                journal: leg.journal,
                timeline: leg.timeline,
                segment_bytes,
                range: start.0..place(&leg.stretch.end)?.0,
                window: Mutex::default(),
            }));
        }
        Ok(logs)
    }

    /// Its files by name.
    pub(super) fn segments(self: &Arc<Self>) -> impl Iterator<Item = (String, Segment)> {
        let log = Arc::clone(self);
        let step = usize::try_from(self.segment_bytes).unwrap_or(usize::MAX);
        self.range.clone().step_by(step).map(move |start| {
            let name = Lsn(start).file_name(log.timeline, log.segment_bytes);
            (name, Segment { log: Arc::clone(&log), start })
        })
    }

    /// Fills `buffer`, which lies within the range, with the log from `at` on.
    fn read(&self, mut at: u64, mut buffer: &mut [u8]) -> Result<()> {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        while !buffer.is_empty() {
            let (start, bytes) = &*window;
            let skip = at.checked_sub(*start).and_then(|skip| usize::try_from(skip).ok());
            let there = skip.and_then(|skip| bytes.get(skip..)).filter(|there| !there.is_empty());
            let Some(there) = there else {
                *window = self.load(at)?;
                continue;
            };
            let length = there.len().min(buffer.len());
            let (now, later) = buffer.split_at_mut(length);
            now.copy_from_slice(there.get(..length).unwrap_or_default());
            (at, buffer) = (at + length as u64, later);
        }
        Ok(())
    }

    fn load(&self, at: u64) -> Result<(u64, Vec<u8>)> {
        let mut window: Option<(u64, Vec<u8>)> = None;
        let journal = self.journals.get(self.journal).ok_or_else(|| Error::bug("a journal has gone"))?;
        for change in journal.read(&Lsn(at).position())? {
            let change = change?;
            let start = Lsn::from_position(&change.start)
                .ok_or_else(|| Error::integrity("a journal of another kind"))?;
            let (_, bytes) = window.get_or_insert((start.0, Vec::new()));
            bytes.extend_from_slice(&change.bytes);
            if bytes.len() >= WINDOW {
                break;
            }
        }
        window
            .filter(|(start, bytes)| (*start..start + bytes.len() as u64).contains(&at))
            .ok_or_else(|| Error::integrity(format!("the log at {} is missing", Lsn(at))))
    }
}

impl Blocks for Segment {
    fn size(&self) -> u64 {
        self.log.segment_bytes
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        let change = mainstay_core::ChangeState::Unknown;
        Ok(vec![Extent { range, kind: ExtentKind::Data, change }])
    }

    /// What the segment lacks at its end is zeros, as in one that the server had only begun.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let at = self.start + offset;
        let there = usize::try_from(self.log.range.end.saturating_sub(at)).unwrap_or(usize::MAX);
        let (log, beyond) = buffer.split_at_mut(there.min(buffer.len()));
        beyond.fill(0);
        self.log.read(at, log)
    }
}

/// A small file.
pub(super) struct Small(pub(super) Vec<u8>);

impl Blocks for Small {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        let change = mainstay_core::ChangeState::Unknown;
        Ok(vec![Extent { range, kind: ExtentKind::Data, change }])
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(buffer.len());
        let bytes = self.0.get(start..end).ok_or_else(|| Error::bug("a file is read beyond its end"))?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}
