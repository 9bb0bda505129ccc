//! Images that were damaged or made to do damage: whatever they hold, there is an answer or an error, soon, and in
//! little memory.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use mainstay_core::{Blocks, Code, Error, Extent, Piece, Result};
use mainstay_diskimage::FileBlocks;
use mainstay_diskimage::fs::{self as image_fs, FileSystem, Opened};
use mainstay_testkit::{Rng, for_each_seed};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::lab::{Image, run};
use crate::trees;

const PAGE: u64 = 4096;

/// Bytes that one look at an image may read: many times what the small trees here hold.
const READ_MAX: u64 = 1 << 30;

/// An image with some bytes changed. Remembers which pages were read.
struct Mutated {
    base: Arc<FileBlocks>,
    size: u64,
    changed: BTreeMap<u64, u8>,
    read: AtomicU64,
    pages: Mutex<BTreeSet<u64>>,
}

impl Mutated {
    fn new(base: Arc<FileBlocks>) -> Self {
        let size = base.size();
        Self { base, size, changed: BTreeMap::new(), read: AtomicU64::new(0), pages: Mutex::default() }
    }

    fn bytes(&self, range: Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
        self.base.read_at(range.start, &mut bytes).unwrap();
        for (at, byte) in self.changed.range(range.clone()) {
            bytes[usize::try_from(at - range.start).unwrap()] = *byte;
        }
        bytes
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.changed.extend(bytes.iter().enumerate().map(|(index, byte)| (at + index as u64, *byte)));
    }
}

impl Blocks for Mutated {
    fn size(&self) -> u64 {
        self.size
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        self.base.extents(range)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        mainstay_diskimage::compose::check_read(self, offset, buffer.len())?;
        let end = offset + buffer.len() as u64;
        if self.read.fetch_add(buffer.len() as u64, Ordering::Relaxed) > READ_MAX {
            return Err(Error::bug("the reader does not stop"));
        }
        self.pages.lock().unwrap().extend(offset / PAGE..end.div_ceil(PAGE));
        self.base.read_at(offset, buffer)?;
        for (at, byte) in self.changed.range(offset..end) {
            buffer[usize::try_from(at - offset).unwrap()] = *byte;
        }
        Ok(())
    }
}

/// Asks a file system everything there is to ask, whatever the answers. Fails if it does not stop.
fn explore(blocks: Arc<Mutated>) -> Result<()> {
    let opened = image_fs::open(blocks.clone())?;
    let Opened::FileSystem(file_system) = opened else { return Ok(()) };
    let mut seen = HashSet::new();
    let mut waiting = vec![file_system.root()];
    let mut items = 0;
    while let Some(node) = waiting.pop() {
        if !seen.insert(node) || items > 3000 {
            continue;
        }
        items += 1;
        let _metadata = file_system.metadata(node);
        let _extents = file_system.extents(node);
        read_some(&*file_system, node);
        let mut from = Some(0);
        let mut pages = 0;
        while let Some(start) = from {
            let page = file_system.read_dir(node, start, 50);
            from = page.as_ref().ok().and_then(|page| page.next);
            waiting.extend(page.unwrap_or_default().entries.into_iter().map(|entry| entry.node));
            pages += 1;
            assert!(pages < 2000, "a directory goes on and on");
        }
    }
    let mut free = 0;
    let _told = file_system.free(&mut |range| {
        assert!(range.start < range.end && range.end <= blocks.size, "{range:?}");
        free += range.end - range.start;
        Ok(())
    });
    assert!(free <= blocks.size);
    let mut extents = 0;
    let _walked = file_system.files(&mut |_, batch| {
        extents += batch.len();
        if extents > 1 << 20 { Err(Error::new(Code::Cancelled, "enough")) } else { Ok(()) }
    });
    assert!(blocks.read.load(Ordering::Relaxed) <= READ_MAX, "the reader does not stop");
    Ok(())
}

/// The first pieces of a file; what is told fits the size.
fn read_some(file_system: &dyn FileSystem, node: image_fs::Node) {
    let Ok(content) = file_system.content(node) else { return };
    let mut buffer = vec![0; 64 << 10];
    let mut offset = 0;
    for _ in 0..40 {
        offset += match content.read(offset, &mut buffer) {
            Ok(Piece::Data(length)) => {
                assert!(length > 0 && length <= buffer.len());
                length as u64
            }
            Ok(Piece::Hole(length)) => {
                assert!(length > 0);
                length
            }
            Ok(Piece::End) | Err(_) => return,
        };
        assert!(offset <= content.size(), "more than the size");
    }
}

/// Makes checksums fit again after a change near `at`, so that the parsers behind them are reached.
type Mend = fn(&mut Mutated, u64);

fn as_it_is(_image: &mut Mutated, _at: u64) {}

/// A block of a tree begins with the checksum of what follows.
fn mend_btrfs(image: &mut Mutated, at: u64) {
    let start = at / 16_384 * 16_384;
    let block = image.bytes(start..start + 16_384);
    image.put(start, &crc32c(&block[32..]).to_le_bytes());
}

/// An inode has its own at byte 100, taken with zeros there.
fn mend_xfs(image: &mut Mutated, at: u64) {
    let start = at / 512 * 512;
    let mut inode = image.bytes(start..start + 512);
    if inode.starts_with(b"IN") {
        inode[100..104].fill(0);
        image.put(start + 100, &crc32c(&inode).to_le_bytes());
    }
}

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 * (crc & 1)))
    })
}

/// Numbers that stand at the edge of what fits.
const EDGES: &[u64] =
    &[0, 1, 0x7f, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 40, u64::MAX / 2, u64::MAX];

/// Explores images with a few bytes changed among those that a healthy look reads.
fn mutants(image: &Image, count: u64, mend: Mend) {
    let base = image.blocks();
    let healthy = Arc::new(Mutated::new(base.clone()));
    explore(healthy.clone()).unwrap();
    let pages: Vec<u64> = healthy.pages.lock().unwrap().iter().copied().collect();
    let places: Vec<u64> = pages.iter().flat_map(|page| used(&base, *page)).collect();
    limit_memory();
    let mut refused = 0;
    for_each_seed(count, |seed| {
        let mut rng = Rng::new(seed);
        let mut mutated = Mutated::new(base.clone());
        for _ in 0..rng.range(1..5) {
            let at = *rng.pick(&places);
            let bytes = match rng.below(4) {
                0 => vec![rng.next_u64() as u8],
                1 => rng.pick(EDGES).to_le_bytes()[..1 << rng.below(4)].to_vec(),
                2 => rng.pick(EDGES).to_be_bytes()[8 - (1 << rng.below(4))..].to_vec(),
                // Something that has meaning elsewhere.
                _ => base_bytes(&base, *rng.pick(&places) / 4 * 4, 16),
            };
            let at = at.min(mutated.size - bytes.len() as u64);
            mutated.put(at, &bytes);
            mend(&mut mutated, at);
        }
        if rng.chance(3) {
            mutated.size = rng.range(0..mutated.size);
            mutated.changed.retain(|at, _| *at < mutated.size);
        }
        refused += u64::from(explore(Arc::new(mutated)).is_err());
    });
    println!("{refused} of {count} were refused when they were opened");
}

fn base_bytes(base: &FileBlocks, at: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    base.read_at(at.min(base.size() - length as u64), &mut bytes).unwrap();
    bytes
}

/// Bytes of a page that are not the middle of zeros.
fn used(base: &FileBlocks, page: u64) -> Vec<u64> {
    let start = page * PAGE;
    let bytes = base_bytes(base, start, usize::try_from(PAGE).unwrap());
    (0..PAGE)
        .filter(|at| bytes[usize::try_from(*at / 8 * 8).unwrap()..][..8] != [0; 8])
        .map(|at| start + at)
        .collect()
}

/// More than the caches and a small tree need, far less than a number from an image can ask for.
fn limit_memory() {
    let resource = Resource::As;
    let most = 3 << 30;
    setrlimit(resource, Rlimit { current: Some(most), ..getrlimit(resource) }).unwrap();
}

/// A tree with something of everything, and few large files.
fn plant(root: &Path) {
    trees::write(root, &trees::small()[..150]);
    fs::create_dir(root.join("large")).unwrap();
    for number in 0..300 {
        File::create(root.join(format!("large/{number:050}"))).unwrap();
    }
    trees::oddities(root);
    trees::long_attributes(root);
}

fn planted(image: Image) -> Image {
    let mounted = image.mount("noatime");
    plant(&mounted.0);
    drop(mounted);
    image
}

#[test]
fn mutants_of_ext4_are_answered_or_refused() {
    let plain = ["-q", "-F", "-t", "ext4", "-b", "1024", "-O", "^metadata_csum,inline_data", "-I", "256"];
    mutants(&planted(Image::make("mke2fs", &plain, 24)), 1000, as_it_is);
}

#[test]
fn mutants_of_ext2_and_of_a_journal_are_answered_or_refused() {
    let old = ["-q", "-F", "-t", "ext2", "-b", "1024"];
    mutants(&planted(Image::make("mke2fs", &old, 24)), 300, as_it_is);
    let journal = ["-q", "-F", "-t", "ext4", "-b", "1024", "-O", "^metadata_csum", "-J", "size=4"];
    let image = Image::make("mke2fs", &journal, 24);
    let mounted = image.mount("commit=300");
    plant(&mounted.0);
    rustix::fs::syncfs(File::open(&mounted.0).unwrap()).unwrap();
    let copy = image.copy();
    drop(mounted);
    mutants(&copy, 600, as_it_is);
}

#[test]
fn mutants_of_xfs_are_answered_or_refused() {
    mutants(&planted(Image::make("mkfs.xfs", &["-q", "-f"], 320)), 500, mend_xfs);
}

#[test]
fn mutants_of_btrfs_are_answered_or_refused() {
    mutants(&planted(Image::make("mkfs.btrfs", &["-q", "-f"], 128)), 500, mend_btrfs);
}

/// Each 512 bytes of a record or a block of a directory end with the mark at its start.
fn mend_ntfs(image: &mut Mutated, at: u64) {
    let start = at / 1024 * 1024;
    let record = image.bytes(start..start + 1024);
    if record.starts_with(b"FILE") {
        let marks = usize::from(u16::from_le_bytes([record[4], record[5]])).min(1000);
        let mark = [record[marks], record[marks + 1]];
        image.put(start + 510, &mark);
        image.put(start + 1022, &mark);
    }
}

#[test]
fn mutants_of_ntfs_are_answered_or_refused() {
    let image = crate::ntfs::make(48);
    {
        let mounted = crate::ntfs::mount(&image);
        trees::write(&mounted.0, &trees::small()[..150]);
        crate::ntfs::oddities(&mounted.0);
    }
    mutants(&image, 250, mend_ntfs);
}

#[test]
fn mutants_of_fat_are_answered_or_refused() {
    for (width, size) in [("12", 1), ("16", 8), ("32", 40)] {
        let image = Image::make("mkfs.vfat", &["-F", width, "-s", "1", "-f", "1"][..], size);
        let tree = tempfile::TempDir::new().unwrap();
        trees::write(tree.path(), &trees::small()[..60]);
        let mut names: Vec<_> =
            fs::read_dir(tree.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        names.sort();
        let mut paths: Vec<&Path> = names.iter().map(AsRef::as_ref).collect();
        paths.push(Path::new("::/"));
        run("mcopy", &["-Q", "-s", "-i", image.path.to_str().unwrap()], &paths);
        mutants(&image, 400, as_it_is);
    }
}

#[test]
fn noise_is_nothing() {
    let directory = tempfile::TempDir::new().unwrap();
    let path = directory.path().join("noise");
    fs::write(&path, Rng::new(1).bytes(1 << 20)).unwrap();
    let base = Arc::new(FileBlocks::open(&path).unwrap());
    for_each_seed(300, |seed| {
        let mut rng = Rng::new(seed);
        let mut mutated = Mutated::new(base.clone());
        mutated.size = rng.range(0..mutated.size);
        // With the mark of each kind in its place, and nothing that fits it.
        let marks: [(u64, &[u8]); 5] =
            [(1080, b"\x53\xef"), (0, b"XFSB"), (0x10040, b"_BHRfS_M"), (3, b"NTFS    "), (510, b"\x55\xaa")];
        let (at, mark) = *rng.pick(&marks);
        mutated.put(at, mark);
        mutated.changed.retain(|at, _| *at < mutated.size);
        let _whatever = explore(Arc::new(mutated));
    });
}
