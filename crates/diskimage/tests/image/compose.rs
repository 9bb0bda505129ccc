//! Devices made of devices behave like the bytes they stand for, whatever the parts.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use mainstay_core::{Blocks, Extent, ExtentKind, Result, Run};
use mainstay_diskimage::FileBlocks;
use mainstay_diskimage::compose::{Concat, Window};
use mainstay_testkit::{MemoryBlocks, Part, Rng, for_each_seed};

use crate::lvm::Loops;
use crate::tools::{assert_extents, assert_reads};

/// A device in memory that has files on it: every thousand bytes another.
struct Filed(MemoryBlocks);

impl Blocks for Filed {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        self.0.extents(range)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.0.read_at(offset, buffer)
    }

    /// Whole files, though only part of them was asked about.
    fn cuts(&self, range: Range<u64>) -> Result<Vec<Run>> {
        let files = range.start / 1000..range.end.div_ceil(1000);
        let run = |file: u64| Run {
            image: file * 1000..((file + 1) * 1000).min(self.size()),
            file,
            file_offset: 5,
        };
        Ok(files.map(run).collect())
    }
}

/// A random device, its bytes, and for each byte its file and place there.
type Model = (Arc<dyn Blocks>, Vec<u8>, Vec<(u64, u64)>);

fn random_device(random: &mut Rng, depth: u32) -> Model {
    match if depth == 0 { 0 } else { random.range(0..3) } {
        0 => {
            let mut parts = Vec::new();
            let mut bytes = Vec::new();
            for _ in 0..random.range(0..4) {
                let length = 1 + random.below(3000);
                if random.chance(50) {
                    bytes.resize(bytes.len() + length, 0);
                    parts.push(Part::Hole(length as u64));
                } else {
                    let data = random.bytes(length);
                    bytes.extend_from_slice(&data);
                    parts.push(Part::Bytes(data));
                }
            }
            let files = (0..bytes.len() as u64).map(|at| (at / 1000, 5 + at % 1000)).collect();
            (Arc::new(Filed(MemoryBlocks::new(parts))), bytes, files)
        }
        1 => {
            let (base, bytes, files) = random_device(random, depth - 1);
            let start = random.below(bytes.len() + 1);
            let end = start + random.below(bytes.len() - start + 1);
            let window = Window::new(base, start as u64..end as u64).unwrap();
            (Arc::new(window), bytes[start..end].to_vec(), files[start..end].to_vec())
        }
        _ => {
            let parts: Vec<Model> =
                (0..random.range(0..4)).map(|_| random_device(random, depth - 1)).collect();
            let bytes = parts.iter().flat_map(|(_, bytes, _)| bytes.clone()).collect();
            let files = parts.iter().flat_map(|(_, _, files)| files.clone()).collect();
            (Arc::new(Concat::new(parts.into_iter().map(|(part, ..)| part).collect()).unwrap()), bytes, files)
        }
    }
}

#[test]
fn windows_and_concatenations_are_the_bytes_they_stand_for() {
    for_each_seed(500, |seed| {
        let mut random = Rng::new(seed);
        let (device, bytes, files) = random_device(&mut random, 4);
        assert_eq!(device.size(), bytes.len() as u64);
        let device: Arc<dyn Blocks> = Arc::new(Window::new(device, 0..bytes.len() as u64).unwrap());
        for _ in 0..10 {
            let start = random.below(bytes.len() + 1);
            let end = start + random.below(bytes.len() - start + 1);
            let range = start as u64..end as u64;
            let mut read = vec![1; end - start];
            device.read_at(range.start, &mut read).unwrap();
            assert!(read == bytes[start..end]);

            let mut at = range.start;
            for extent in device.extents(range.clone()).unwrap() {
                assert!(extent.range.start == at && extent.range.end > at, "{extent:?} at {at}");
                let part = &bytes[usize::try_from(at).unwrap()..usize::try_from(extent.range.end).unwrap()];
                assert!(extent.kind == ExtentKind::Data || part.iter().all(|byte| *byte == 0));
                at = extent.range.end;
            }
            assert_eq!(at, range.end);

            let mut at = range.start;
            for run in device.cuts(range.clone()).unwrap() {
                assert!(run.image.start == at && run.image.end <= range.end, "{run:?} at {at} of {range:?}");
                for place in run.image.clone() {
                    let told = (run.file, run.file_offset + place - run.image.start);
                    assert_eq!(told, files[usize::try_from(place).unwrap()]);
                }
                at = run.image.end;
            }
            assert_eq!(at, range.end);
        }
        let end = device.size();
        assert!(device.read_at(end, &mut [0]).is_err() && device.extents(0..end + 1).is_err());
        assert!(device.cuts(0..end + 1).is_err() && Window::new(device, 1..end + 1).is_err());
    });
}

#[test]
fn sparse_files_show_their_holes() {
    for_each_seed(20, |seed| {
        let mut random = Rng::new(seed);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let file = File::create(&path).unwrap();
        let size = random.range(1..2000) * 4096 + random.range(0..4096);
        file.set_len(size).unwrap();
        for _ in 0..random.range(0..20) {
            let length = random.below(100_000);
            let offset = random.range(0..size);
            let length = length.min(usize::try_from(size - offset).unwrap());
            file.write_all_at(&random.bytes(length), offset).unwrap();
        }
        let blocks = FileBlocks::open(&path).unwrap();
        let expected = std::fs::read(&path).unwrap();
        assert_reads(&blocks, &expected, &mut random);
        assert_extents(&blocks, &path, "raw", &expected);
        let holes = blocks.extents(0..size).unwrap();
        let untouched = holes.iter().filter(|extent| extent.kind == ExtentKind::Hole).count();
        assert!(untouched > 0 || size < 4_000_000, "large files keep holes");
    });
}

#[test]
fn a_block_device_is_as_long_as_it_is() {
    let mut random = Rng::new(1);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let expected = random.bytes(3 << 20);
    std::fs::write(&path, &expected).unwrap();
    let loops = Loops::of(&[path]);
    let blocks = FileBlocks::open(loops.0[0].as_ref()).unwrap();
    assert_reads(&blocks, &expected, &mut random);
    let extents = blocks.extents(0..3 << 20).unwrap();
    assert!(extents.iter().all(|extent| extent.kind == ExtentKind::Data), "{extents:?}");
}
