//! Images that somebody damaged, or made to do harm: an error or an answer, never a panic, a hang or a flood of memory.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use mainstay_core::{Blocks, Error, Extent, Result};
use mainstay_diskimage::container::{Alone, Format, open_blocks};
use mainstay_testkit::{Rng, for_each_seed};

use crate::tools::{scribble, shell};

/// Bytes with some of them changed, and perhaps cut short.
pub(crate) struct Mutant {
    base: Arc<[u8]>,
    pub(crate) size: usize,
    pub(crate) patches: Vec<(usize, Vec<u8>)>,
}

impl Mutant {
    /// Changes what lies in `tempting` more often than the rest.
    pub(crate) fn of(base: &Arc<[u8]>, tempting: &[Range<usize>], random: &mut Rng) -> Self {
        let mut mutant = Self { base: Arc::clone(base), size: base.len(), patches: Vec::new() };
        for _ in 0..random.range(1..6) {
            let within = if random.chance(90) { random.pick(tempting).clone() } else { 0..base.len() };
            let at = within.start + random.below(within.len());
            let patch = match random.range(0..8) {
                0 => vec![random.next_u64() as u8],
                1 => (random.next_u64() as u32).to_le_bytes().to_vec(),
                2 => random
                    .pick(&[0u64, 1, u64::MAX, 1 << 63, i64::MAX as u64, 1 << 32, 512])
                    .to_be_bytes()
                    .to_vec(),
                3 => random
                    .pick(&[0u64, 1, u64::MAX, 1 << 63, i64::MAX as u64, 1 << 32, 512])
                    .to_le_bytes()
                    .to_vec(),
                4 => vec![*random.pick(&[0, 0xFF]); 1 + random.below(64)],
                5 => vec![base[at] ^ (1 << random.range(0..8))],
                6 => {
                    let length = 1 + random.below(512.min(base.len()));
                    let from = random.below(base.len() - length + 1);
                    base[from..from + length].to_vec()
                }
                _ => {
                    if random.chance(20) {
                        mutant.size = random.below(base.len());
                    }
                    vec![base[at].wrapping_add(1)]
                }
            };
            mutant.patches.push((at, patch));
        }
        mutant
    }

    pub(crate) fn bytes(&self, range: Range<usize>) -> Vec<u8> {
        let mut bytes = self.base[range.clone()].to_vec();
        for (at, patch) in &self.patches {
            for (place, byte) in (*at..).zip(patch) {
                if range.contains(&place) {
                    bytes[place - range.start] = *byte;
                }
            }
        }
        bytes
    }

    /// Mends a checksum, so that what it guards is looked at.
    pub(crate) fn put(&mut self, at: usize, bytes: Vec<u8>) {
        self.patches.push((at, bytes));
    }
}

impl Blocks for Mutant {
    fn size(&self) -> u64 {
        self.size as u64
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        assert!(range.end <= self.size(), "a reader asked for extents beyond the end: {range:?}");
        Ok(vec![mainstay_diskimage::compose::extent(range, mainstay_core::ExtentKind::Data)])
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let start = usize::try_from(offset).unwrap();
        if start.checked_add(buffer.len()).is_none_or(|end| end > self.size) {
            return Err(Error::integrity("beyond the end"));
        }
        buffer.copy_from_slice(&self.bytes(start..start + buffer.len()));
        Ok(())
    }
}

/// Looks at all that an honest reader would look at.
pub(crate) fn explore(blocks: &dyn Blocks, random: &mut Rng) -> Result<()> {
    let size = blocks.size();
    let places = [0, size / 2, size.saturating_sub(200_000), random.range(0..size.max(1))];
    for start in places {
        let end = start.saturating_add(200_000).min(size);
        let mut buffer = vec![0; usize::try_from(end - start).unwrap()];
        blocks.read_at(start, &mut buffer)?;
    }
    let extents = blocks.extents(0..size.min(1 << 30))?;
    let mut at = 0;
    for extent in &extents {
        assert_eq!(extent.range.start, at);
        assert!(extent.range.end > at);
        at = extent.range.end;
    }
    assert_eq!(at, size.min(1 << 30));
    Ok(())
}

/// In bytes, the most address space that this process ever had.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmPeak:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

fn torment(image: &Path, format: Format, tempting: &[Range<usize>], count: u64, mend: fn(&mut Mutant)) {
    let base: Arc<[u8]> = std::fs::read(image).unwrap().into();
    let before = peak();
    let (mut opened, mut read) = (0, 0);
    for_each_seed(count, |seed| {
        let mut random = Rng::new(seed);
        let mut mutant = Mutant::of(&base, tempting, &mut random);
        mend(&mut mutant);
        if let Ok(image) = open_blocks(Arc::new(mutant), image, Some(format), &Alone) {
            opened += 1;
            read += u64::from(explore(&*image.blocks, &mut random).is_ok());
        }
    });
    println!("{format}: of {count} mutants {opened} open and {read} read to the end");
    assert!(peak() - before < 512 << 20, "{} MiB were asked for", (peak() - before) >> 20);
    // Where nothing or everything opens, nothing was tried.
    assert!(count < 1000 || (opened > count / 20 && read < count));
}

#[test]
fn qcow2_mutants() {
    for shape in
        ["cluster_size=512", "extended_l2=on,cluster_size=16k,compression_type=zstd", "cluster_size=64k"]
    {
        let mut random = Rng::new(1);
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.qcow2");
        let size = 6 << 20;
        shell(&format!("qemu-img create -q -f qcow2 -o {shape} {} {size}", image.display()));
        scribble(&image, "qcow2", size, true, &mut random);
        let length = std::fs::metadata(&image).unwrap().len();
        let header = 0..112;
        torment(
            &image,
            Format::Qcow2,
            &[header, 0..usize::try_from(length.min(512 << 10)).unwrap()],
            2000,
            |_| {},
        );
    }
}

#[test]
fn vmdk_mutants() {
    for shape in ["monolithicSparse", "streamOptimized"] {
        let mut random = Rng::new(1);
        let folder = tempfile::tempdir().unwrap();
        let (plain, image) = (folder.path().join("plain"), folder.path().join("disk.vmdk"));
        shell(&format!("qemu-img create -q -f qcow2 {} 6M", plain.display()));
        scribble(&plain, "qcow2", 6 << 20, false, &mut random);
        shell(&format!(
            "qemu-img convert -O vmdk -o subformat={shape} {} {}",
            plain.display(),
            image.display()
        ));
        let length = usize::try_from(std::fs::metadata(&image).unwrap().len()).unwrap();
        let tempting = [0..80, 512..1024, length - 1024..length - 944, 10_000..length.min(140_000)];
        torment(&image, Format::Vmdk, &tempting, 2000, |_| {});
    }
}

#[test]
fn vhdx_mutants() {
    let mut random = Rng::new(1);
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.vhdx");
    shell(&format!("qemu-img create -q -f vhdx -o block_size=1M {} 6M", image.display()));
    crate::containers::write_only(&image, 6 << 20, &mut random);
    let bytes = std::fs::read(&image).unwrap();
    let region = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let (first, second) = (region((192 << 10) + 32), region((192 << 10) + 64));
    let tempting = [
        64 << 10..(64 << 10) + 80,
        128 << 10..(128 << 10) + 80,
        192 << 10..(192 << 10) + 80,
        first..first + 80,
        second..second + 80,
        first + (64 << 10)..first + (64 << 10) + 64,
        second + (64 << 10)..second + (64 << 10) + 64,
    ];
    torment(&image, Format::Vhdx, &tempting, 2000, |mutant| {
        for (at, length) in [(64 << 10, 4096), (128 << 10, 4096), (192 << 10, 64 << 10)] {
            let mut summed = mutant.bytes(at..at + length);
            summed[4..8].fill(0);
            mutant.put(at + 4, crate::vhdx_log::crc32c(&summed).to_le_bytes().to_vec());
        }
    });
}

#[test]
fn random_bytes_behind_every_magic() {
    for_each_seed(2000, |seed| {
        let mut random = Rng::new(seed);
        let length = random.below(100_000) + 600;
        let mut bytes = random.bytes(length);
        let magics: [&[u8]; 4] =
            [b"QFI\xFB\0\0\0\x03", b"KDMV\x01\0\0\0", b"vhdxfile", b"# Disk DescriptorFile\n"];
        let magic = magics[random.below(4)];
        bytes[..magic.len()].copy_from_slice(magic);
        let size = bytes.len();
        let mutant = Mutant { base: bytes.into(), size, patches: Vec::new() };
        if let Ok(image) = open_blocks(Arc::new(mutant), Path::new("x"), None, &Alone) {
            explore(&*image.blocks, &mut random).unwrap_or_default();
        }
    });
}
