//! Items, sources and targets in memory.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use mainstay_core::{
    Blocks, Body, Captured, ChangeState, Code, Consistency, Counts, Error, Extent, ExtentKind, Item,
    ItemPath, Kind, Metadata, Next, Open, Piece, Position, Receipt, Result, Skip, Source, Stamp, StreamEnd,
    StreamReader, Target, Time,
};

use crate::Rng;

/// An item with its content, which can be sent any number of times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestItem {
    pub path: ItemPath,
    pub metadata: Metadata,
    pub stamp: Stamp,
    pub content: Content,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    None,
    Stream(Arc<[Part]>),
    Blocks(Arc<[Part]>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    Bytes(Vec<u8>),
    /// So many zero bytes that occupy no space; never 0.
    Hole(u64),
    /// Reading stops here with [`Code::Io`].
    Fails,
}

impl Part {
    fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Hole(len) => *len,
            Self::Fails => 0,
        }
    }
}

impl TestItem {
    pub fn directory(path: ItemPath) -> Self {
        Self {
            path,
            metadata: Metadata { mode: 0o755, ..Metadata::new(Kind::Directory) },
            stamp: Stamp::default(),
            content: Content::None,
        }
    }

    pub fn file(path: ItemPath, parts: Vec<Part>) -> Self {
        let size = parts.iter().map(Part::len).sum();
        let metadata = Metadata { size, mode: 0o644, ..Metadata::new(Kind::File) };
        Self { path, metadata, stamp: Stamp::default(), content: Content::Stream(parts.into()) }
    }

    /// A disk with random access; `parts` must not fail.
    pub fn disk(path: ItemPath, parts: Vec<Part>) -> Self {
        let size = parts.iter().map(Part::len).sum();
        let metadata = Metadata { size, ..Metadata::new(Kind::Disk) };
        Self { path, metadata, stamp: Stamp::default(), content: Content::Blocks(parts.into()) }
    }

    /// What a source would yield.
    pub fn to_item(&self) -> Item {
        let body = match &self.content {
            Content::None => Body::None,
            Content::Stream(parts) => Body::Stream(Box::new(Stream(Arc::clone(parts)))),
            Content::Blocks(parts) => Body::Blocks(Box::new(MemoryBlocks(Arc::clone(parts)))),
        };
        Item { path: self.path.clone(), metadata: self.metadata.clone(), stamp: self.stamp.clone(), body }
    }

    /// The content as a restore writes it, holes as zeros.
    pub fn bytes(&self) -> Vec<u8> {
        match &self.content {
            Content::None => Vec::new(),
            Content::Stream(parts) | Content::Blocks(parts) => flatten(parts),
        }
    }
}

fn flatten(parts: &[Part]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in parts {
        match part {
            Part::Bytes(some) => bytes.extend_from_slice(some),
            Part::Hole(len) => bytes.resize(bytes.len() + usize::try_from(*len).unwrap_or(0), 0),
            Part::Fails => {}
        }
    }
    bytes
}

/// Reads a body to its end, holes as zeros.
pub fn read_body(body: &Body) -> Result<(Vec<u8>, StreamEnd)> {
    let mut bytes = Vec::new();
    match body {
        Body::None => {}
        Body::Blocks(blocks) => {
            bytes.resize(usize::try_from(blocks.size()).unwrap_or(usize::MAX), 0);
            blocks.read_at(0, &mut bytes)?;
        }
        Body::Stream(open) | Body::Pages(open) => {
            let mut reader = open.open()?;
            let mut buffer = vec![0xaa; 64 << 10];
            loop {
                match reader.read(&mut buffer)? {
                    Piece::Data(0) | Piece::Hole(0) => {
                        return Err(Error::bug("a stream yielded nothing, but not its end"));
                    }
                    Piece::Data(len) => bytes.extend_from_slice(&buffer[..len]),
                    Piece::Hole(len) => {
                        bytes.resize(bytes.len() + usize::try_from(len).unwrap_or(usize::MAX), 0);
                    }
                    Piece::End => return Ok((bytes, reader.finish()?)),
                }
            }
        }
    }
    Ok((bytes, StreamEnd::Steady))
}

struct Stream(Arc<[Part]>);

impl Open for Stream {
    fn open(&self) -> Result<Box<dyn StreamReader>> {
        Ok(Box::new(PartReader { parts: Arc::clone(&self.0), part: 0, offset: 0 }))
    }
}

struct PartReader {
    parts: Arc<[Part]>,
    part: usize,
    offset: usize,
}

impl StreamReader for PartReader {
    /// Gives less than asked for now and then, as files and sockets do.
    fn read(&mut self, buffer: &mut [u8]) -> Result<Piece> {
        loop {
            match self.parts.get(self.part) {
                None => return Ok(Piece::End),
                Some(Part::Fails) => {
                    return Err(Error::new(Code::Io, "scripted fault: the body cannot be read further"));
                }
                Some(Part::Hole(len)) => {
                    self.part += 1;
                    return Ok(Piece::Hole(*len));
                }
                Some(Part::Bytes(bytes)) if self.offset < bytes.len() => {
                    let rest = &bytes[self.offset..];
                    let len = rest.len().min(buffer.len()).min(1 + self.offset * 7 % 100_003);
                    buffer[..len].copy_from_slice(&rest[..len]);
                    self.offset += len;
                    return Ok(Piece::Data(len));
                }
                Some(Part::Bytes(_)) => (self.part, self.offset) = (self.part + 1, 0),
            }
        }
    }

    fn finish(self: Box<Self>) -> Result<StreamEnd> {
        Ok(StreamEnd::Steady)
    }
}

/// A disk in memory: holes are [`ExtentKind::Hole`], nothing is known about changes.
pub struct MemoryBlocks(Arc<[Part]>);

impl MemoryBlocks {
    pub fn new(parts: Vec<Part>) -> Self {
        Self(parts.into())
    }

    fn parts(&self) -> impl Iterator<Item = (Range<u64>, &Part)> {
        self.0.iter().scan(0, |start, part| {
            let range = *start..*start + part.len();
            *start = range.end;
            Some((range, part))
        })
    }
}

impl Blocks for MemoryBlocks {
    fn size(&self) -> u64 {
        self.0.iter().map(Part::len).sum()
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        if range.start > range.end || range.end > self.size() {
            return Err(Error::bug(format!("the disk has {} bytes, not {range:?}", self.size())));
        }
        let extents = self.parts().filter_map(|(at, part)| {
            let both = at.start.max(range.start)..at.end.min(range.end);
            let kind = if matches!(part, Part::Hole(_)) { ExtentKind::Hole } else { ExtentKind::Data };
            (both.start < both.end).then_some(Extent { range: both, kind, change: ChangeState::Unknown })
        });
        Ok(extents.collect())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.size()) {
            return Err(Error::bug(format!("{} bytes at {offset} are beyond the disk", buffer.len())));
        }
        let index = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        for extent in self.extents(offset..offset + buffer.len() as u64)? {
            let into = &mut buffer[index(extent.range.start - offset)..index(extent.range.end - offset)];
            match self.parts().find(|(at, _)| at.contains(&extent.range.start)) {
                Some((at, Part::Bytes(bytes))) => {
                    into.copy_from_slice(&bytes[index(extent.range.start - at.start)..][..into.len()]);
                }
                _ => into.fill(0),
            }
        }
        Ok(())
    }
}

/// Yields given items, skips in between, and a scripted error if wanted.
pub struct VecSource {
    steps: VecDeque<Step>,
    captured: Captured,
    committed: Arc<OnceLock<Receipt>>,
}

enum Step {
    Item(Box<TestItem>),
    Skip(Skip),
    Fail(Code),
}

impl VecSource {
    /// `items` must be in order already.
    pub fn new(items: Vec<TestItem>) -> Self {
        Self {
            steps: items.into_iter().map(|item| Step::Item(Box::new(item))).collect(),
            captured: Captured {
                position: Position(b"the end".to_vec()),
                consistency: Consistency::Application,
                moment: Time::from_seconds(1_767_225_600),
            },
            committed: Arc::default(),
        }
    }

    /// Yields `skip` after `after` items.
    #[must_use]
    pub fn skipping(mut self, after: usize, skip: Skip) -> Self {
        self.steps.insert(after, Step::Skip(skip));
        self
    }

    /// Fails after `after` items, and goes on if asked again.
    #[must_use]
    pub fn failing(mut self, after: usize, code: Code) -> Self {
        self.steps.insert(after, Step::Fail(code));
        self
    }

    #[must_use]
    pub fn captured(mut self, captured: Captured) -> Self {
        self.captured = captured;
        self
    }

    /// Holds the receipt once the source was committed.
    pub fn committed(&self) -> Arc<OnceLock<Receipt>> {
        Arc::clone(&self.committed)
    }
}

impl Source for VecSource {
    fn next(&mut self) -> Result<Next> {
        match self.steps.pop_front() {
            None => Ok(Next::End),
            Some(Step::Item(item)) => Ok(Next::Item(Box::new(item.to_item()))),
            Some(Step::Skip(skip)) => Ok(Next::Skipped(skip)),
            Some(Step::Fail(code)) => Err(Error::new(code, "scripted fault: the source cannot go on")),
        }
    }

    fn seal(&mut self) -> Result<Captured> {
        if self.steps.is_empty() {
            Ok(self.captured.clone())
        } else {
            Err(Error::bug("sealed before the end"))
        }
    }

    fn commit(self: Box<Self>, receipt: &Receipt) -> Result<()> {
        self.committed.set(receipt.clone()).map_err(|_second| Error::bug("committed twice"))
    }
}

/// What a [`VecTarget`] was given, once it has finished.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Finished {
    pub items: Vec<Arrived>,
    pub skips: Vec<Skip>,
    pub captured: Option<Captured>,
}

/// An item with its content read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrived {
    pub path: ItemPath,
    pub metadata: Metadata,
    pub stamp: Stamp,
    pub bytes: Vec<u8>,
}

impl From<&TestItem> for Arrived {
    fn from(item: &TestItem) -> Self {
        Self {
            path: item.path.clone(),
            metadata: item.metadata.clone(),
            stamp: item.stamp.clone(),
            bytes: item.bytes(),
        }
    }
}

/// Keeps what it is given; the shared end shows it only after `finish`.
#[derive(Default)]
pub struct VecTarget {
    staged: Finished,
    counts: Counts,
    shared: Arc<Mutex<Finished>>,
}

impl VecTarget {
    pub fn new() -> Self {
        Self::default()
    }

    /// A target that shows what it kept in `shared`.
    pub fn into_shared(shared: &Arc<Mutex<Finished>>) -> Self {
        Self { shared: Arc::clone(shared), ..Self::default() }
    }
}

impl Target for VecTarget {
    type Done = Finished;

    fn put(&mut self, item: Item) -> Result<()> {
        if self.staged.items.last().is_some_and(|last| last.path >= item.path) {
            return Err(Error::bug(format!("{} comes out of order", item.path)));
        }
        let (bytes, end) = read_body(&item.body)?;
        self.counts.items += 1;
        self.counts.bytes += bytes.len() as u64;
        self.counts.read_bytes += bytes.len() as u64;
        self.counts.noticed += u64::from(end == StreamEnd::Changed);
        let Item { path, metadata, stamp, .. } = item;
        self.staged.items.push(Arrived { path, metadata, stamp, bytes });
        Ok(())
    }

    fn skip(&mut self, skip: Skip) -> Result<()> {
        let count = if skip.reason.is_loss() { &mut self.counts.skipped } else { &mut self.counts.noticed };
        *count += 1;
        self.staged.skips.push(skip);
        Ok(())
    }

    fn finish(mut self: Box<Self>, captured: &Captured) -> Result<(Receipt, Finished)> {
        self.staged.captured = Some(captured.clone());
        *self.shared.lock().unwrap_or_else(PoisonError::into_inner) = self.staged.clone();
        Ok((Receipt { point: None, counts: self.counts }, self.staged))
    }
}

/// A tree of about `count` items in order: nested directories, awkward names, files with repeated, compressible,
/// random and sparse content, links, FIFOs, odd times and attributes. The same for the same seed.
pub fn random_items(seed: u64, count: usize) -> Vec<TestItem> {
    let mut rng = Rng::new(seed);
    let mut directories = vec![ItemPath::root()];
    let mut items: BTreeMap<ItemPath, TestItem> = BTreeMap::new();
    let mut contents: Vec<Vec<Part>> = Vec::new();
    for number in 0..count {
        let Ok(path) = rng.pick(&directories).join(&random_name(&mut rng, number)) else { continue };
        let mut item = match rng.range(0..20) {
            0..4 => TestItem::directory(path.clone()),
            4..6 => random_special(&mut rng, path.clone()),
            _ => {
                let again = !contents.is_empty() && rng.chance(20);
                let parts = if again { rng.pick(&contents).clone() } else { random_parts(&mut rng) };
                contents.push(parts.clone());
                TestItem::file(path.clone(), parts)
            }
        };
        if item.metadata.kind == Kind::Directory {
            directories.push(path.clone());
        }
        random_metadata(&mut rng, &mut item.metadata);
        if rng.chance(80) {
            item.stamp = Stamp(rng.bytes(24));
        }
        items.insert(path, item);
    }
    items.into_values().collect()
}

/// Unique through its number, and sometimes hard to handle.
fn random_name(rng: &mut Rng, number: usize) -> Vec<u8> {
    let start: &[&[u8]] = &[
        b"file",
        b"a",
        b"A",
        b".hidden",
        b"with space",
        b"-rf",
        b"\xff\xfe not text",
        b"new\nline",
        "größe".as_bytes(),
        b"...",
    ];
    let mut name = rng.pick(start).to_vec();
    name.extend_from_slice(format!("{number}").as_bytes());
    if rng.chance(3) {
        name.resize(255, b'x');
    }
    name
}

fn random_special(rng: &mut Rng, path: ItemPath) -> TestItem {
    let mut item = TestItem::directory(path);
    item.metadata = Metadata::new(Kind::Fifo);
    if rng.chance(70) {
        item.metadata = Metadata::new(Kind::Symlink);
        item.metadata.link_target = Some(b"../somewhere/else".to_vec());
    }
    item
}

fn random_parts(rng: &mut Rng) -> Vec<Part> {
    let mut parts = Vec::new();
    for _ in 0..rng.range(0..4) {
        let len = *rng.pick(&[0, 1, 100, 4096, 20_000, 300_000]);
        let len = len + rng.below(len + 1);
        parts.push(match rng.range(0..4) {
            0 => Part::Hole(len as u64 + 1),
            1 => Part::Bytes(b"the same line over and over\n".iter().copied().cycle().take(len).collect()),
            _ => Part::Bytes(rng.bytes(len)),
        });
    }
    parts
}

fn random_metadata(rng: &mut Rng, metadata: &mut Metadata) {
    // Owners and special bits need privileges to restore, so they are left to tests that have them.
    if metadata.kind != Kind::Symlink {
        metadata.mode = *rng.pick(&[0o644, 0o600, 0o755, 0o700]);
    }
    if metadata.kind == Kind::Directory {
        // Looking into one that its owner may not enter needs a privilege as well.
        metadata.mode |= 0o700;
    }
    let seconds = *rng.pick(&[-1, 0, 1, 1_700_000_000, 4_102_444_800]);
    metadata.modified = Time::from_parts(seconds, *rng.pick(&[0, 1, 999_999_999]));
    if metadata.kind == Kind::File && rng.chance(20) {
        metadata.xattrs =
            vec![(b"user.first".to_vec(), rng.bytes(10)), (b"user.second".to_vec(), Vec::new())];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    crate::source_suite!(source_conformance, || ((), || {
        let mut items = random_items(3, 60);
        let disk = vec![Part::Bytes(vec![1; 5000]), Part::Hole(70_000), Part::Bytes(vec![2; 10])];
        items.push(TestItem::disk(ItemPath::new(b"\xff\xff\xff".to_vec()).unwrap(), disk));
        Box::new(VecSource::new(items)) as Box<dyn Source>
    }));

    crate::target_suite!(target_conformance, || {
        let shared = Arc::new(Mutex::new(Finished::default()));
        let opened = Arc::clone(&shared);
        let make = move || Box::new(VecTarget::into_shared(&opened)) as Box<dyn Target<Done = Finished>>;
        let observe = move || {
            let finished = shared.lock().unwrap();
            finished.items.iter().map(|item| (item.path.clone(), item.bytes.clone())).collect()
        };
        ((), make, observe)
    });

    #[test]
    fn random_items_repeat_and_have_every_kind_of_content() {
        let items = random_items(5, 300);
        assert_eq!(items, random_items(5, 300));
        assert_ne!(items, random_items(6, 300));
        for kind in [Kind::File, Kind::Directory, Kind::Symlink, Kind::Fifo] {
            assert!(items.iter().any(|item| item.metadata.kind == kind), "{kind:?}");
        }
        assert!(items.iter().any(|item| item.path.components().count() > 3));
        assert!(items.iter().any(
            |item| matches!(&item.content, Content::Stream(parts) if matches!(parts[..], [Part::Hole(_), ..]))
        ));
    }

    #[test]
    fn a_disk_reads_the_same_in_any_stretch() {
        let parts =
            vec![Part::Bytes((1..=100).collect()), Part::Hole(50), Part::Bytes((101..=200).collect())];
        let (whole, blocks) = (flatten(&parts), MemoryBlocks::new(parts));
        for (start, end) in [(0, 250), (99, 101), (100, 150), (120, 130), (149, 151), (250, 250)] {
            let mut stretch = vec![0xaa; end - start];
            blocks.read_at(start as u64, &mut stretch).unwrap();
            assert_eq!(stretch, whole[start..end]);
        }
        assert!(blocks.read_at(249, &mut [0; 2]).is_err());
        assert!(blocks.extents(0..251).is_err());
    }
}
