//! The log of a VHDX file that was not closed: writes to its tables, which belong there before anything is read.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use mainstay_core::{Blocks, Code, Error, Extent, ExtentKind, Result};

use super::{Header, sums};
use crate::bytes::{self, Fields};
use crate::compose::{check_range, check_read, extent};

/// Everything in the log is counted in these.
const UNIT: u64 = 4096;
/// The longest log that is read; Hyper-V and QEMU make them of 1 MiB.
const LOG_MAX: u64 = 16 << 20;
/// How often the bytes of a log may be summed up in search of entries.
const SUMS_MAX: u64 = 8;

/// The file as it would be had it been closed.
pub(super) fn replay(base: &Arc<dyn Blocks>, header: &Header) -> Result<Arc<dyn Blocks>> {
    if header.log_id == [0; 16] {
        return Ok(Arc::clone(base));
    }
    let length = header.log.end - header.log.start;
    if length == 0 || length > LOG_MAX || !length.is_multiple_of(UNIT) {
        return Err(Error::new(Code::Unsupported, format!("a VHDX log of {length} bytes is not read")));
    }
    let log =
        Log { bytes: bytes::read(&**base, header.log.start, bytes::index(length)?)?, id: header.log_id };
    let entries = log.entries()?;
    let active = active(&entries, length).ok_or_else(|| {
        Error::integrity("the image was not closed, and its log is damaged")
            .hint("Open it once on the host that wrote it, which may repair it.")
    })?;
    let mut patched = Patched { base: Arc::clone(base), patches: BTreeMap::new(), size: base.size() };
    for start in active {
        log.apply(&entries[&start], start, &mut patched)?;
    }
    Ok(Arc::new(patched))
}

struct Log {
    bytes: Vec<u8>,
    id: [u8; 16],
}

struct Entry {
    length: u64,
    sequence: u64,
    /// Where the oldest entry lay that was still needed when this one was written.
    tail: u64,
    descriptors: u64,
    /// How long the file was, at least, when this was written.
    file: u64,
}

impl Log {
    /// Bytes of the log, which goes on at its start when it ends.
    fn read(&self, at: u64, length: u64) -> Result<Vec<u8>> {
        let (at, length) = (bytes::index(at)? % self.bytes.len(), bytes::index(length)?);
        if length > self.bytes.len() {
            return Err(Error::integrity("a log entry longer than the log"));
        }
        let first = length.min(self.bytes.len() - at);
        Ok([&self.bytes[at..at + first], &self.bytes[..length - first]].concat())
    }

    /// The entries that are whole, by where they begin.
    fn entries(&self) -> Result<BTreeMap<u64, Entry>> {
        let length = self.bytes.len() as u64;
        let (mut entries, mut at, mut summed) = (BTreeMap::new(), 0, 0);
        while at < length {
            let entry = self.entry(at, &mut summed)?;
            if summed > length * SUMS_MAX {
                return Err(Error::integrity("the log is full of entries that overlap"));
            }
            at += entry.as_ref().map_or(UNIT, |entry| entry.length);
            if let Some(entry) = entry {
                entries.insert(at - entry.length, entry);
            }
        }
        Ok(entries)
    }

    fn entry(&self, at: u64, summed: &mut u64) -> Result<Option<Entry>> {
        let head = self.read(at, 64)?;
        let fields = Fields::new("a log entry", &head);
        let log = self.bytes.len() as u64;
        let (length, tail) = (u64::from(fields.le32(8)?), u64::from(fields.le32(12)?));
        let entry = Entry {
            length,
            sequence: fields.le64(16)?,
            tail,
            descriptors: u64::from(fields.le32(24)?),
            file: fields.le64(48)?,
        };
        let fits = |place: u64| place.is_multiple_of(UNIT) && place <= log;
        let possible = fields.take(0, 4)? == b"loge"
            && fields.take(32, 16)? == self.id
            && fits(length)
            && length != 0
            && fits(tail)
            && entry.sequence != 0
            && 64 + entry.descriptors * 32 <= length;
        if !possible {
            return Ok(None);
        }
        *summed += length;
        Ok(sums(&self.read(at, length)?)?.then_some(entry))
    }

    /// Carries out the writes of the entry that begins at `start`.
    fn apply(&self, entry: &Entry, start: u64, patched: &mut Patched) -> Result<()> {
        if patched.base.size() < entry.file {
            return Err(Error::integrity(format!(
                "the image has {} bytes and should have {}",
                patched.base.size(),
                entry.file
            ))
            .hint("The image may be cut short."));
        }
        let whole = self.read(start, entry.length)?;
        let fields = Fields::new("a log entry", &whole);
        let mut data = bytes::index((64 + entry.descriptors * 32).next_multiple_of(UNIT))?;
        for number in 0..entry.descriptors {
            let at = bytes::index(64 + number * 32)?;
            let (place, sequence) = (fields.le64(at + 16)?, fields.le64(at + 24)?);
            if sequence != entry.sequence || !place.is_multiple_of(UNIT) {
                return Err(Error::integrity("a log entry that does not belong together"));
            }
            match fields.take(at, 4)? {
                b"zero" => patched.put(place, fields.le64(at + 8)?, None)?,
                b"desc" => {
                    let signed = fields.take(data, 4)? == b"data";
                    let halves = (fields.le32(data + 4)?, fields.le32(data + 4092)?);
                    if !signed || u64::from(halves.0) << 32 | u64::from(halves.1) != sequence {
                        return Err(Error::integrity("a log entry whose data is of another"));
                    }
                    // The first eight and the last four bytes made room for the marks.
                    let page =
                        [fields.take(at + 8, 8)?, fields.take(data + 8, 4084)?, fields.take(at + 4, 4)?]
                            .concat();
                    patched.put(place, UNIT, Some(page))?;
                    data += bytes::index(UNIT)?;
                }
                _ => return Err(Error::integrity("a log entry with a write of no known kind")),
            }
        }
        Ok(())
    }
}

/// Where the entries begin that must be applied, in order: those from the newest one's tail to itself. When one of
/// them is damaged, no older state will do, for the newest one says that they had all been written.
fn active(entries: &BTreeMap<u64, Entry>, length: u64) -> Option<Vec<u64>> {
    let (head, newest) = entries.iter().max_by_key(|(_, entry)| entry.sequence)?;
    let (mut order, mut at) = (Vec::new(), newest.tail % length);
    let mut previous: Option<u64> = None;
    while order.len() < entries.len() {
        let entry = entries.get(&at)?;
        if previous.is_some_and(|previous| previous.checked_add(1) != Some(entry.sequence)) {
            return None;
        }
        previous = Some(entry.sequence);
        order.push(at);
        if at == *head {
            return Some(order);
        }
        at = (at + entry.length) % length;
    }
    None
}

/// A file with writes that it has not seen yet.
struct Patched {
    base: Arc<dyn Blocks>,
    /// By where they begin, each with its end and its bytes; without bytes they are zeros. None overlap.
    patches: BTreeMap<u64, (u64, Option<Vec<u8>>)>,
    size: u64,
}

impl Patched {
    fn put(&mut self, start: u64, length: u64, content: Option<Vec<u8>>) -> Result<()> {
        let end = start.checked_add(length).filter(|_| length.is_multiple_of(UNIT));
        let end = end.ok_or_else(|| Error::integrity("a log entry writes where no file reaches"))?;
        if length == 0 {
            return Ok(());
        }
        // Contents are one unit long, so only stretches of zeros can stick out.
        let touched: Vec<u64> = self
            .patches
            .range(..end)
            .rev()
            .take_while(|(_, (until, _))| *until > start)
            .map(|(at, _)| *at)
            .collect();
        for at in touched {
            if let Some((until, None)) = self.patches.remove(&at) {
                if at < start {
                    self.patches.insert(at, (start, None));
                }
                if until > end {
                    self.patches.insert(end, (until, None));
                }
            }
        }
        self.patches.insert(start, (end, content));
        self.size = self.size.max(end);
        Ok(())
    }
}

impl Blocks for Patched {
    fn size(&self) -> u64 {
        self.size
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        check_range(self, &range)?;
        Ok(vec![extent(range, ExtentKind::Data)])
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        check_read(self, offset, buffer.len())?;
        let there = bytes::index(self.base.size().saturating_sub(offset).min(buffer.len() as u64))?;
        let (below, beyond) = buffer.split_at_mut(there);
        if !below.is_empty() {
            self.base.read_at(offset, below)?;
        }
        beyond.fill(0);
        let end = offset + buffer.len() as u64;
        for (start, (until, content)) in self.patches.range(..end).rev() {
            if *until <= offset {
                break;
            }
            let here = offset.max(*start)..end.min(*until);
            let to = &mut buffer[bytes::index(here.start - offset)?..bytes::index(here.end - offset)?];
            match content {
                None => to.fill(0),
                Some(page) => {
                    to.copy_from_slice(
                        &page[bytes::index(here.start - start)?..bytes::index(here.end - start)?],
                    );
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use mainstay_core::Blocks as _;
    use mainstay_testkit::{MemoryBlocks, Part, Rng, for_each_seed};

    use super::{Patched, UNIT};

    #[test]
    fn writes_over_writes_are_as_if_they_had_been_made() {
        for_each_seed(300, |seed| {
            let mut random = Rng::new(seed);
            let unit = usize::try_from(UNIT).unwrap();
            let mut model = random.bytes(6 * unit - 100);
            let base = Arc::new(MemoryBlocks::new(vec![Part::Bytes(model.clone())]));
            let mut patched = Patched { size: base.size(), base, patches: BTreeMap::new() };
            for _ in 0..random.range(1..8) {
                let at = random.below(8);
                let page = random.chance(50).then(|| random.bytes(unit));
                let length = if page.is_some() { unit } else { random.below(5) * unit };
                model.resize(model.len().max(at * unit + length), 0);
                let content = page.clone().unwrap_or_else(|| vec![0; length]);
                model[at * unit..at * unit + length].copy_from_slice(&content);
                patched.put((at * unit) as u64, length as u64, page).unwrap();
            }
            // Writing nothing lengthens nothing.
            model.truncate(usize::try_from(patched.size()).unwrap());
            for _ in 0..20 {
                let start = random.below(model.len());
                let end = start + random.below(model.len() - start + 1);
                let mut read = vec![1; end - start];
                patched.read_at(start as u64, &mut read).unwrap();
                assert!(read == model[start..end]);
            }
        });
    }
}
