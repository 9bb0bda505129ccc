//! Devices made of other devices.

use std::ops::Range;
use std::sync::Arc;

use mainstay_core::{Blocks, ChangeState, Code, Error, Extent, ExtentKind, Result, Run};

/// A part of a device as a device of its own.
pub struct Window {
    base: Arc<dyn Blocks>,
    range: Range<u64>,
}

impl Window {
    /// `range` in bytes of `base`; fails when it does not lie within.
    pub fn new(base: Arc<dyn Blocks>, range: Range<u64>) -> Result<Self> {
        if range.start > range.end || range.end > base.size() {
            return Err(Error::integrity(format!(
                "bytes {} to {} do not lie on a device of {} bytes",
                range.start,
                range.end,
                base.size()
            )));
        }
        Ok(Self { base, range })
    }
}

impl Blocks for Window {
    fn size(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        check_range(self, &range)?;
        let mut extents = self.base.extents(range.start + self.range.start..range.end + self.range.start)?;
        for extent in &mut extents {
            extent.range = extent.range.start - self.range.start..extent.range.end - self.range.start;
        }
        Ok(extents)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        check_read(self, offset, buffer.len())?;
        self.base.read_at(self.range.start + offset, buffer)
    }

    fn cuts(&self, range: Range<u64>) -> Result<Vec<Run>> {
        check_range(self, &range)?;
        let base = range.start + self.range.start..range.end + self.range.start;
        let runs = self.base.cuts(base.clone())?;
        Ok(runs
            .into_iter()
            .filter_map(|run| clip(run, &base))
            .map(|run| shift(run, self.range.start, 0))
            .collect())
    }
}

/// Several devices behind each other.
pub struct Concat {
    /// Each with the byte that it begins at.
    parts: Vec<(u64, Arc<dyn Blocks>)>,
    size: u64,
}

impl Concat {
    /// Fails when the lengths add up to more than 64 bits hold.
    pub fn new(parts: Vec<Arc<dyn Blocks>>) -> Result<Self> {
        let mut size: u64 = 0;
        let mut placed = Vec::with_capacity(parts.len());
        for part in parts {
            let start = size;
            size = size
                .checked_add(part.size())
                .ok_or_else(|| Error::integrity("the parts of a device are longer than any device"))?;
            placed.push((start, part));
        }
        Ok(Self { parts: placed, size })
    }

    /// The parts that hold `range`: each with what it begins at here, and what it holds of the range, counted in it.
    fn parts(&self, range: Range<u64>) -> impl Iterator<Item = (u64, &Arc<dyn Blocks>, Range<u64>)> {
        let first = self.parts.partition_point(|(start, part)| start + part.size() <= range.start);
        self.parts[first..].iter().take_while(move |(start, _)| *start < range.end).filter_map(
            move |(start, part)| {
                let within = range.start.max(*start) - start..range.end.min(start + part.size()) - start;
                (!within.is_empty()).then_some((*start, part, within))
            },
        )
    }
}

impl Blocks for Concat {
    fn size(&self) -> u64 {
        self.size
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        check_range(self, &range)?;
        let mut extents = Vec::new();
        for (start, part, within) in self.parts(range) {
            for extent in part.extents(within)? {
                push(
                    &mut extents,
                    Extent { range: extent.range.start + start..extent.range.end + start, ..extent },
                );
            }
        }
        Ok(extents)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        check_read(self, offset, buffer.len())?;
        let mut rest = buffer;
        for (_, part, within) in self.parts(offset..offset + rest.len() as u64) {
            let (here, after) = rest.split_at_mut(crate::bytes::index(within.end - within.start)?);
            part.read_at(within.start, here)?;
            rest = after;
        }
        Ok(())
    }

    fn cuts(&self, range: Range<u64>) -> Result<Vec<Run>> {
        check_range(self, &range)?;
        let mut runs = Vec::new();
        for (start, part, within) in self.parts(range) {
            let below = part.cuts(within.clone())?;
            runs.extend(
                below.into_iter().filter_map(|run| clip(run, &within)).map(|run| shift(run, 0, start)),
            );
        }
        Ok(runs)
    }
}

/// The part of a run that lies in `range`.
fn clip(run: Run, range: &Range<u64>) -> Option<Run> {
    let image = run.image.start.max(range.start)..run.image.end.min(range.end);
    let file_offset = run.file_offset.checked_add(image.start.checked_sub(run.image.start)?)?;
    (!image.is_empty()).then_some(Run { image, file: run.file, file_offset })
}

/// The run on a device whose byte `less` is byte `more` of another.
fn shift(run: Run, less: u64, more: u64) -> Run {
    Run { image: run.image.start - less + more..run.image.end - less + more, ..run }
}

/// Appends an extent to those before it; what goes on in the same way becomes one.
pub(crate) fn push(extents: &mut Vec<Extent>, next: Extent) {
    match extents.last_mut() {
        _ if next.range.is_empty() => {}
        Some(last)
            if (last.kind, last.change, last.range.end) == (next.kind, next.change, next.range.start) =>
        {
            last.range.end = next.range.end;
        }
        _ => extents.push(next),
    }
}

/// An extent of which nobody knows whether it changed.
pub fn extent(range: Range<u64>, kind: ExtentKind) -> Extent {
    Extent { range, kind, change: ChangeState::Unknown }
}

/// Refuses a question about bytes that `blocks` does not have.
pub fn check_range(blocks: &dyn Blocks, range: &Range<u64>) -> Result<()> {
    if range.start <= range.end && range.end <= blocks.size() {
        return Ok(());
    }
    Err(Error::new(
        Code::Io,
        format!("bytes {} to {} lie beyond the end of a device of {}", range.start, range.end, blocks.size()),
    ))
}

/// As [`check_range`], for `length` bytes from `offset` on.
pub fn check_read(blocks: &dyn Blocks, offset: u64, length: usize) -> Result<()> {
    let end = u64::try_from(length).ok().and_then(|length| offset.checked_add(length)).unwrap_or(u64::MAX);
    check_range(blocks, &(offset..end))
}
