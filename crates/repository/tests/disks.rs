//! Disks: whatever the source says of extents, files and changes, what comes back is what was on the device.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod common;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Bench, backup, open, request, try_restore};
use mainstay_core::{
    Blocks, Body, Captured, ChangeState, Consistency, Extent, ExtentKind, Item, ItemPath, Kind, Metadata,
    Next, PointId, Position, Receipt, Result, Run, SkipReason, Source, Stamp, Time,
};
use mainstay_repository::{Parent, Repository, WriteRequest};
use mainstay_testkit::{Part, Rng, TestItem, for_each_seed};

const GRAIN: u64 = 64 << 10;

/// A device whose every byte is known.
#[derive(Clone, Default)]
struct Device {
    bytes: Arc<Vec<u8>>,
    /// By grain: whether it changed since the last point, and whether it is a hole.
    changed: Option<Arc<Vec<bool>>>,
    holes: Arc<Vec<bool>>,
    files: Arc<Vec<Run>>,
    read: Arc<AtomicU64>,
}

impl Blocks for Device {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        let mut extents = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let grain = (at / GRAIN) as usize;
            let end = ((grain as u64 + 1) * GRAIN).min(range.end);
            let change = match self.changed.as_ref().map(|changed| changed[grain]) {
                None => ChangeState::Unknown,
                Some(true) => ChangeState::Changed,
                Some(false) => ChangeState::Unchanged,
            };
            let kind = if self.holes[grain] { ExtentKind::Hole } else { ExtentKind::Data };
            extents.push(Extent { range: at..end, kind, change });
            at = end;
        }
        Ok(extents)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        buffer.copy_from_slice(&self.bytes[offset as usize..offset as usize + buffer.len()]);
        self.read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Deliberately unclipped.
    fn cuts(&self, _range: Range<u64>) -> Result<Vec<Run>> {
        Ok(self.files.to_vec())
    }
}

impl Device {
    /// Some grains random, some repeated, some zero, some holes; with a map of files that is often wrong.
    fn random(rng: &mut Rng, length: usize) -> Self {
        let mut bytes = vec![0; length];
        let grains = length.div_ceil(GRAIN as usize);
        let mut holes = vec![false; grains];
        for (grain, part) in bytes.chunks_mut(GRAIN as usize).enumerate() {
            match rng.below(4) {
                0 => holes[grain] = true,
                1 => part.fill(7),
                _ => rng.fill(part),
            }
        }
        let mut device = Self { bytes: Arc::new(bytes), holes: Arc::new(holes), ..Self::default() };
        device.files = Arc::new(device.random_files(rng));
        device
    }

    fn random_files(&self, rng: &mut Rng) -> Vec<Run> {
        let run = |rng: &mut Rng| {
            let start = rng.range(0..self.size() + 1000);
            let length = rng.range(0..300 << 10);
            Run { image: start..start + length, file: rng.range(0..3), file_offset: rng.range(0..9) << 12 }
        };
        (0..rng.below(40)).map(|_| run(rng)).collect()
    }

    /// Writes here and there, and knows where.
    fn change(&self, rng: &mut Rng) -> Self {
        let mut bytes = self.bytes.to_vec();
        let mut holes = self.holes.to_vec();
        let mut changed = vec![false; holes.len()];
        for _ in 0..rng.below(6) {
            let start = rng.range(0..self.size()) as usize;
            let end = (start + rng.below(100 << 10)).min(bytes.len());
            rng.fill(&mut bytes[start..end]);
            for grain in start / GRAIN as usize..end.div_ceil(GRAIN as usize) {
                (changed[grain], holes[grain]) = (true, false);
            }
        }
        let mut device = Self {
            bytes: Arc::new(bytes),
            holes: Arc::new(holes),
            changed: Some(Arc::new(changed)),
            files: Arc::clone(&self.files),
            read: Arc::default(),
        };
        if rng.below(3) == 0 {
            device.files = Arc::new(device.random_files(rng));
        }
        device
    }

    /// Bytes that an increment cannot avoid reading, grain by grain.
    fn changed_bytes(&self) -> u64 {
        let changed = self.changed.iter().flat_map(|changed| changed.iter());
        changed.filter(|changed| **changed).count() as u64 * GRAIN
    }
}

/// Yields one disk.
struct OneDisk(Option<Device>);

impl Source for OneDisk {
    fn next(&mut self) -> Result<Next> {
        Ok(self.0.take().map_or(Next::End, |device| {
            let metadata = Metadata { size: device.size(), ..Metadata::new(Kind::Disk) };
            let body = Body::Blocks(Box::new(device));
            Next::Item(Box::new(Item { path: disk(), metadata, stamp: Stamp::default(), body }))
        }))
    }

    fn seal(&mut self) -> Result<Captured> {
        let (position, consistency) = (Position(Vec::new()), Consistency::Crash);
        Ok(Captured { position, consistency, moment: Time::from_seconds(1_767_225_600) })
    }

    fn commit(self: Box<Self>, _receipt: &Receipt) -> Result<()> {
        Ok(())
    }
}

fn disk() -> ItemPath {
    ItemPath::new("disk").unwrap()
}

fn store(repository: &Repository, device: &Device, parent: Parent, reread_one_in: u32) -> PointId {
    let target = repository.write(WriteRequest { parent, reread_one_in, ..request(1) }).unwrap();
    common::copy(Box::new(OneDisk(Some(device.clone()))), Box::new(target)).unwrap()
}

fn check(repository: &Repository, point: &PointId, device: &Device, rng: &mut Rng) {
    let reader = repository.read(point).unwrap();
    let entry = reader.lookup(&disk()).unwrap().unwrap();
    assert!(entry.blocks);
    let stored = reader.blocks(&entry).unwrap();
    assert_eq!(stored.size(), device.size());
    for _ in 0..30 {
        let start = rng.range(0..device.size());
        let end = (start + rng.range(0..200 << 10)).min(device.size());
        let mut got = vec![0xaa; (end - start) as usize];
        stored.read_at(start, &mut got).unwrap();
        assert!(got == device.bytes[start as usize..end as usize], "{start}..{end} differs");
    }
    let mut at = 0;
    for extent in stored.extents(0..device.size()).unwrap() {
        assert_eq!(extent.range.start, at);
        at = extent.range.end;
        let bytes = &device.bytes[extent.range.start as usize..extent.range.end as usize];
        assert!(extent.kind == ExtentKind::Data || bytes.iter().all(|byte| *byte == 0));
    }
    assert_eq!(at, device.size());
    let got = try_restore(repository, point).unwrap();
    assert!(got.items[0].bytes == *device.bytes, "the whole differs");
}

#[test]
fn a_disk_comes_back_whatever_was_believed_of_its_files_and_increments_read_what_changed() {
    for_each_seed(30, |seed| {
        let bench = Bench::new(seed);
        let rng = &mut Rng::new(seed);
        let length = rng.below(6 << 20) + 1;
        let mut device = Device::random(rng, length);
        let mut point = store(&bench.repository, &device, Parent::None, 0);
        check(&bench.repository, &point, &device, rng);
        for _ in 0..4 {
            device = device.change(rng);
            point = store(&bench.repository, &device, Parent::Point(point), 0);
            let (read, changed) = (device.read.load(Ordering::Relaxed), device.changed_bytes());
            // Chunks at the edges of what changed are read too.
            assert!(read <= changed + 20 * GRAIN, "{read} bytes were read though {changed} had changed");
            check(&open(&bench), &point, &device, rng);
        }
    });
}

/// The word of a source counts for the point it was said of, and for no other.
#[test]
fn unchanged_since_an_unknown_point_is_read() {
    let bench = Bench::new(1);
    let rng = &mut Rng::new(1);
    let first = Device::random(rng, 3 << 20);
    store(&bench.repository, &first, Parent::None, 0);
    let other = Device::random(rng, 3 << 20);
    store(&bench.repository, &other, Parent::None, 0);
    let unchanged = Device { changed: Some(Arc::new(vec![false; first.holes.len()])), ..first.clone() };
    let point = store(&bench.repository, &unchanged, Parent::Latest, 0);
    check(&bench.repository, &point, &first, rng);
}

#[test]
fn a_source_that_is_wrong_about_what_changed_is_found_out() {
    let bench = Bench::new(2);
    let rng = &mut Rng::new(2);
    let device = Device::random(rng, 3 << 20);
    let point = store(&bench.repository, &device, Parent::None, 0);
    let mut bytes = device.bytes.to_vec();
    let at = device.holes.iter().position(|hole| !hole).unwrap() * GRAIN as usize + 5;
    bytes[at] ^= 1;
    let changed = Some(Arc::new(vec![false; device.holes.len()]));
    let lying = Device { bytes: Arc::new(bytes), changed, ..device };
    let point = store(&bench.repository, &lying, Parent::Point(point), 1);
    check(&bench.repository, &point, &lying, rng);
    let skips = bench.repository.read(&point).unwrap().skips().unwrap();
    assert!(skips.iter().any(|skip| skip.reason == SkipReason::SilentChange), "{skips:?}");
}

/// An image of a file system and a backup of its files have their chunks in common.
#[test]
fn an_image_shares_the_chunks_of_the_files_that_lie_on_it() {
    let bench = Bench::new(3);
    let rng = &mut Rng::new(3);
    let (mut bytes, mut files, mut items) = (vec![0; 1 << 20], Vec::new(), Vec::new());
    for file in 0..40_u64 {
        let mut content = vec![0; 1 + rng.below(200 << 10)];
        rng.fill(&mut content);
        let start = bytes.len() as u64;
        bytes.extend_from_slice(&content);
        // The file system rounds up to its blocks.
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
        files.push(Run { image: start..start + content.len() as u64, file, file_offset: 0 });
        let path = ItemPath::new(format!("f{file:03}")).unwrap();
        items.push(TestItem::file(path, vec![Part::Bytes(content)]));
    }
    backup(&bench.repository, items);
    let holes = Arc::new(vec![false; bytes.len().div_ceil(GRAIN as usize)]);
    let device = Device { bytes: Arc::new(bytes), holes, files: Arc::new(files), ..Device::default() };
    let point = store(&bench.repository, &device, Parent::None, 0);
    check(&bench.repository, &point, &device, rng);
    let added = bench.repository.read(&point).unwrap().info().counts.new_bytes;
    assert_eq!(added, 0, "the image brought {added} bytes that the files had not");
}
