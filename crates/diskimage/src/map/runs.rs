//! Runs of files by their place on a disk: some in memory, more in a temporary file.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use mainstay_core::{Error, Result, Run};

/// Runs kept in memory for all disks of a machine: 32 MiB.
const IN_MEMORY: usize = 1 << 20;

/// Runs kept in memory for each of many disks: half a mebibyte.
const IN_MEMORY_MIN: usize = 1 << 14;

/// Bytes of a run in a file: start, length, file and offset in it.
const PACKED: usize = 32;

/// Runs that are read from a file at once: 8 KiB.
const PAGE: usize = 256;

/// Runs of one disk at most: 2 GiB of temporary file.
const MOST: u64 = 1 << 26;

/// Bytes of the buffer of one part that is merged.
const BUFFER: usize = 64 << 10;

/// Gathers runs in any order.
pub(super) struct RunsBuilder {
    in_memory: usize,
    waiting: Vec<Packed>,
    spilled: Option<Spilled>,
    count: u64,
}

/// Sorted parts behind each other in one file.
struct Spilled {
    file: File,
    /// Runs in each.
    parts: Vec<u64>,
}

/// A run whose image starts at `.0`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Packed {
    start: u64,
    length: u64,
    file: u64,
    file_offset: u64,
}

impl RunsBuilder {
    /// For one of `disks` disks.
    pub(super) fn new(disks: usize) -> Self {
        let in_memory = (IN_MEMORY / disks.max(1)).max(IN_MEMORY_MIN);
        Self { in_memory, waiting: Vec::new(), spilled: None, count: 0 }
    }

    pub(super) fn put(&mut self, run: Run) -> Result<()> {
        let Some(length) = run.image.end.checked_sub(run.image.start).filter(|&length| length > 0) else {
            return Ok(());
        };
        if self.count >= MOST {
            return Ok(());
        }
        self.count += 1;
        let packed = Packed { start: run.image.start, length, file: run.file, file_offset: run.file_offset };
        // Most file systems lay out a file's extents behind each other.
        if let Some(last) = self.waiting.last_mut()
            && last.goes_on_with(&packed)
        {
            last.length += packed.length;
            return Ok(());
        }
        if self.waiting.len() >= self.in_memory {
            self.spill()?;
        }
        self.waiting.push(packed);
        Ok(())
    }

    /// Sorts what waits and writes it behind the parts before.
    fn spill(&mut self) -> Result<()> {
        if self.spilled.is_none() {
            let file = tempfile::tempfile().map_err(|error| failed("make", error))?;
            self.spilled = Some(Spilled { file, parts: Vec::new() });
        }
        let Some(spilled) = &mut self.spilled else { return Ok(()) };
        self.waiting.sort_unstable();
        let mut writer = BufWriter::with_capacity(BUFFER, &spilled.file);
        for packed in &self.waiting {
            writer.write_all(&packed.to_bytes()).map_err(|error| failed("write", error))?;
        }
        writer.flush().map_err(|error| failed("write", error))?;
        drop(writer);
        spilled.parts.push(self.waiting.len() as u64);
        self.waiting.clear();
        Ok(())
    }

    pub(super) fn finish(mut self) -> Result<Runs> {
        if self.spilled.is_some() && !self.waiting.is_empty() {
            self.spill()?;
        }
        let Some(spilled) = self.spilled else {
            self.waiting.sort_unstable();
            let mut kept: Vec<Packed> = Vec::new();
            let mut last = None;
            for packed in self.waiting {
                last = joined(last, packed, &mut |done| {
                    kept.push(done);
                    Ok(())
                })?;
            }
            kept.extend(last);
            kept.shrink_to_fit();
            return Ok(Runs(Stored::Memory(kept)));
        };
        drop(self.waiting);
        spilled.merge()
    }
}

impl Spilled {
    /// One sorted file of all parts, and the start of each page of it.
    fn merge(self) -> Result<Runs> {
        let mut parts = Vec::new();
        let mut at = 0;
        for count in &self.parts {
            parts.push(Part { at, left: *count, buffer: Vec::new().into_iter() });
            at += count * PACKED as u64;
        }
        let mut heads = BinaryHeap::new();
        for (number, part) in parts.iter_mut().enumerate() {
            heads.extend(part.next(&self.file)?.map(|packed| Reverse((packed, number))));
        }
        let mut sorted = Sorted::new()?;
        let mut last = None;
        while let Some(Reverse((packed, number))) = heads.pop() {
            heads.extend(parts[number].next(&self.file)?.map(|packed| Reverse((packed, number))));
            last = joined(last, packed, &mut |done| sorted.put(done))?;
        }
        if let Some(done) = last {
            sorted.put(done)?;
        }
        sorted.finish()
    }
}

/// The next run after `last`: what goes on where the last ended becomes one with it, and what overlaps it (files may
/// share extents) loses what they have in common. Finished ones go to `done`.
fn joined(
    last: Option<Packed>,
    next: Packed,
    done: &mut dyn FnMut(Packed) -> Result<()>,
) -> Result<Option<Packed>> {
    match last {
        Some(mut last) if last.goes_on_with(&next) => {
            last.length += next.length;
            Ok(Some(last))
        }
        Some(last) if next.end() <= last.end() => Ok(Some(last)),
        Some(last) if next.start < last.end() => {
            let common = last.end() - next.start;
            done(last)?;
            let (start, length) = (last.end(), next.length - common);
            Ok(Some(Packed { start, length, file_offset: next.file_offset.saturating_add(common), ..next }))
        }
        Some(last) => {
            done(last)?;
            Ok(Some(next))
        }
        None => Ok(Some(next)),
    }
}

/// A sorted part of the temporary file.
struct Part {
    at: u64,
    left: u64,
    buffer: std::vec::IntoIter<Packed>,
}

impl Part {
    fn next(&mut self, file: &File) -> Result<Option<Packed>> {
        if let Some(packed) = self.buffer.next() {
            return Ok(Some(packed));
        }
        let count = self.left.min((BUFFER / PACKED) as u64);
        let mut bytes = vec![0; count as usize * PACKED];
        file.read_exact_at(&mut bytes, self.at).map_err(|error| failed("read", error))?;
        self.at += bytes.len() as u64;
        self.left -= count;
        self.buffer = unpack(&bytes).into_iter();
        Ok(self.buffer.next())
    }
}

/// The merged file while it is written.
struct Sorted {
    writer: BufWriter<File>,
    pages: Vec<u64>,
    count: u64,
}

impl Sorted {
    fn new() -> Result<Self> {
        let file = tempfile::tempfile().map_err(|error| failed("make", error))?;
        Ok(Self { writer: BufWriter::with_capacity(BUFFER, file), pages: Vec::new(), count: 0 })
    }

    fn put(&mut self, packed: Packed) -> Result<()> {
        if self.count.is_multiple_of(PAGE as u64) {
            self.pages.push(packed.start);
        }
        self.count += 1;
        self.writer.write_all(&packed.to_bytes()).map_err(|error| failed("write", error))
    }

    fn finish(self) -> Result<Runs> {
        let file = self.writer.into_inner().map_err(|error| failed("write", error.into_error()))?;
        Ok(Runs(Stored::File { file, pages: self.pages, count: self.count }))
    }
}

/// Runs that are sorted and apart.
#[derive(Default)]
pub(super) struct Runs(Stored);

enum Stored {
    Memory(Vec<Packed>),
    File {
        file: File,
        /// Where the first run of each page starts.
        pages: Vec<u64>,
        count: u64,
    },
}

impl Default for Stored {
    fn default() -> Self {
        Self::Memory(Vec::new())
    }
}

impl Runs {
    pub(super) fn len(&self) -> u64 {
        match &self.0 {
            Stored::Memory(runs) => runs.len() as u64,
            Stored::File { count, .. } => *count,
        }
    }

    pub(super) fn within(&self, range: Range<u64>) -> Result<Vec<Run>> {
        let mut found = Vec::new();
        match &self.0 {
            Stored::Memory(runs) => {
                let first = runs.partition_point(|run| run.end() <= range.start);
                found.extend(runs[first..].iter().map_while(|run| run.clipped(&range)));
            }
            Stored::File { file, pages, count } => {
                let first = pages.partition_point(|start| *start <= range.start).saturating_sub(1);
                for (page, _) in
                    pages.iter().enumerate().skip(first).take_while(|(_, start)| **start < range.end)
                {
                    let at = (page * PAGE) as u64;
                    let mut bytes = vec![0; (count - at).min(PAGE as u64) as usize * PACKED];
                    file.read_exact_at(&mut bytes, at * PACKED as u64)
                        .map_err(|error| failed("read", error))?;
                    found.extend(unpack(&bytes).iter().filter_map(|run| run.clipped(&range)));
                }
            }
        }
        Ok(found)
    }
}

impl Packed {
    /// Never wraps: the map of a volume lies on a disk.
    fn end(&self) -> u64 {
        self.start.saturating_add(self.length)
    }

    fn goes_on_with(&self, next: &Self) -> bool {
        self.file == next.file
            && self.end() == next.start
            && self.file_offset.checked_add(self.length) == Some(next.file_offset)
    }

    /// The part that lies in `range`.
    fn clipped(&self, range: &Range<u64>) -> Option<Run> {
        let image = self.start.max(range.start)..self.end().min(range.end);
        let file_offset = self.file_offset.saturating_add(image.start.saturating_sub(self.start));
        (image.start < image.end).then_some(Run { image, file: self.file, file_offset })
    }

    fn to_bytes(self) -> [u8; PACKED] {
        let mut bytes = [0; PACKED];
        let fields = [self.start, self.length, self.file, self.file_offset];
        for (place, field) in bytes.chunks_exact_mut(8).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }
}

fn unpack(bytes: &[u8]) -> Vec<Packed> {
    let (packed, _) = bytes.as_chunks::<PACKED>();
    let field = |bytes: &[u8; PACKED], index: usize| {
        u64::from_le_bytes(std::array::from_fn(|byte| bytes[index * 8 + byte]))
    };
    let unpack = |bytes| Packed {
        start: field(bytes, 0),
        length: field(bytes, 1),
        file: field(bytes, 2),
        file_offset: field(bytes, 3),
    };
    packed.iter().map(unpack).collect()
}

fn failed(what: &str, error: std::io::Error) -> Error {
    Error::io(format!("cannot {what} the temporary file for the places of files"), error)
}

#[cfg(test)]
mod tests {
    use mainstay_testkit::Rng;

    use super::{IN_MEMORY, Run, Runs, RunsBuilder};

    /// Files whose extents lie apart on the disk by `gap`, put in random order.
    fn built(count: u64, gap: u64) -> Runs {
        let mut order: Vec<u64> = (0..count).collect();
        Rng::new(3).shuffle(&mut order);
        let mut builder = RunsBuilder::new(1);
        for number in order {
            let start = number * (4096 + gap);
            builder
                .put(Run { image: start..start + 4096, file: number / 3, file_offset: number % 3 * 4096 })
                .unwrap();
        }
        builder.finish().unwrap()
    }

    #[test]
    fn millions_of_runs_are_found_again_whether_in_memory_or_not() {
        for count in [3000, IN_MEMORY as u64 * 2 + 12_345] {
            let runs = built(count, 512);
            assert_eq!(runs.len(), count);
            let stride = 4096 + 512;
            let end = count * stride;
            for start in (0..end).step_by(end as usize / 50) {
                let range = start..(start + 10 * stride + 7).min(end);
                let expected: Vec<Run> = (0..count)
                    .skip((start / stride) as usize)
                    .take(12)
                    .filter_map(|number| {
                        let image =
                            (number * stride).max(range.start)..(number * stride + 4096).min(range.end);
                        let skipped = image.start.saturating_sub(number * stride);
                        let file_offset = number % 3 * 4096 + skipped;
                        (image.start < image.end).then_some(Run { image, file: number / 3, file_offset })
                    })
                    .collect();
                assert_eq!(runs.within(range.clone()).unwrap(), expected, "{range:?} of {count}");
            }
        }
    }

    #[test]
    fn what_follows_itself_becomes_one_run_and_what_overlaps_is_clipped() {
        assert_eq!(built(3000, 0).len(), 1000);
        let mut builder = RunsBuilder::new(1);
        for (start, end, file) in [(100, 200, 1), (50, 150, 2), (150, 160, 3), (0, 50, 4), (7, 7, 5)] {
            builder.put(Run { image: start..end, file, file_offset: 0 }).unwrap();
        }
        let runs = builder.finish().unwrap();
        let kept: Vec<_> =
            runs.within(0..u64::MAX).unwrap().into_iter().map(|run| (run.image.start, run.file)).collect();
        assert_eq!(kept, [(0, 4), (50, 2), (150, 1)]);
    }
}
