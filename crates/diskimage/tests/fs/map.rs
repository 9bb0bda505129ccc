//! Maps of whole disks: partitions with file systems and swap on them.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use mainstay_core::{Blocks, Kind};
use mainstay_diskimage::map::{CutMap, Mapped};
use mainstay_diskimage::volume::volumes;
use mainstay_diskimage::{FileBlocks, fs};
use tempfile::TempDir;

use crate::lab::{Image, run};
use crate::{oracle, trees};

const MIB: u64 = 1 << 20;

/// A partition of type 0x83 in a partition table of the old kind.
fn partition(index: u64, start: u64, length: u64) -> (u64, [u8; 16]) {
    let mut entry = [0; 16];
    entry[4] = 0x83;
    entry[8..12].copy_from_slice(&u32::try_from(start / 512).unwrap().to_le_bytes());
    entry[12..].copy_from_slice(&u32::try_from(length / 512).unwrap().to_le_bytes());
    (446 + 16 * index, entry)
}

#[test]
fn a_disk_is_cut_along_the_files_of_all_its_volumes() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("disk");
    let disk = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    disk.set_len(200 * MIB).unwrap();
    let starts = [MIB, 70 * MIB, 140 * MIB];
    let mut parts = Vec::new();
    for (number, block_size) in [(0, "1024"), (1, "4096")] {
        let image = Image::make("mke2fs", &["-q", "-F", "-t", "ext4", "-b", block_size], 64);
        {
            let mounted = image.mount("noatime");
            trees::write(&mounted.0, &trees::small()[number * 300..][..300]);
            trees::oddities(&mounted.0);
        }
        parts.push(image);
    }
    let swap = Image::make("mkswap", &[], 50);
    let images: Vec<_> = parts.iter().chain([&swap]).collect();
    for (number, image) in images.iter().enumerate() {
        let length = image.blocks().size();
        let (at, entry) = partition(number as u64, starts[number], length);
        disk.write_all_at(&entry, at).unwrap();
        let seek = format!("seek={}", starts[number] / MIB);
        let (from, to) = (format!("if={}", image.path.display()), format!("of={}", path.display()));
        run("dd", &["bs=1M", "conv=notrunc,sparse", "status=none", &seek, &from, &to], &[]);
    }
    disk.write_all_at(&[0x55, 0xaa], 510).unwrap();

    let blocks: Arc<dyn Blocks> = Arc::new(FileBlocks::open(&path).unwrap());
    let layout = volumes(&[Arc::clone(&blocks)], &|_| None).unwrap();
    let map = CutMap::of(&layout.volumes, 1, &fs::open);
    assert_eq!(map.notes, [""; 0]);
    let disk_map = map.disk(0).unwrap();
    let mapped = Mapped::new(Arc::clone(&blocks), Arc::clone(&disk_map));
    // Asked window by window, as a backup does.
    let mut runs = Vec::new();
    for start in (0..200).step_by(4) {
        runs.extend(mapped.cuts(start * MIB..(start + 4) * MIB).unwrap());
    }
    assert!(runs.windows(2).all(|pair| pair[0].image.end <= pair[1].image.start), "in order and apart");

    let mut expected = 0;
    for (number, image) in parts.iter().enumerate() {
        let file_system = image.open();
        let items = oracle::items(&*file_system);
        for (node, _) in items.values().filter(|(_, metadata)| metadata.kind == Kind::File) {
            for extent in file_system.extents(*node).unwrap() {
                let at = starts[number] + extent.volume_offset;
                let of_extent = mapped.cuts(at..at + extent.length).unwrap();
                // A window may have cut it, never another file.
                let covered: u64 = of_extent.iter().map(|run| run.image.end - run.image.start).sum();
                assert_eq!(covered, extent.length);
                assert_eq!(of_extent[0].file_offset, extent.file_offset);
                expected += extent.length;
            }
        }
    }
    let covered: u64 = runs.iter().map(|run| run.image.end - run.image.start).sum();
    // Hard links are one file under two names.
    assert_eq!(covered, expected - hard_linked(&parts), "nothing else is called a file");

    let swapped = starts[2] + (64 << 10)..starts[2] + 50 * MIB;
    assert_eq!(disk_map.swap(), std::slice::from_ref(&swapped));
    let free: u64 = disk_map.free().iter().map(|range| range.end - range.start).sum();
    assert!(free > 60 * MIB, "{free} bytes are free");
    for range in disk_map.free() {
        assert_eq!(mapped.cuts(range.clone()).unwrap(), [], "free space holds no file");
    }
}

/// Bytes of extents that a walk along names counts more than once.
fn hard_linked(parts: &[Image]) -> u64 {
    let mut bytes = 0;
    for image in parts {
        let file_system = image.open();
        let mut seen = std::collections::HashSet::new();
        for (node, metadata) in oracle::items(&*file_system).values() {
            if metadata.kind == Kind::File && !seen.insert(*node) {
                bytes += file_system.extents(*node).unwrap().iter().map(|extent| extent.length).sum::<u64>();
            }
        }
    }
    bytes
}

#[test]
fn what_cannot_be_understood_leaves_the_rest_of_the_map_alone() {
    let image = Image::make("mke2fs", &["-q", "-F", "-t", "ext4"], 64);
    File::options().write(true).open(&image.path).unwrap().write_all_at(&[0xff; 4], 1024).unwrap();
    let blocks: Arc<dyn Blocks> = image.blocks();
    let layout = volumes(&[blocks], &|_| None).unwrap();
    let map = CutMap::of(&layout.volumes, 1, &fs::open);
    assert!(matches!(&map.notes[..], [note] if note.starts_with("vda: ")), "{:?}", map.notes);
    assert!(map.disk(0).unwrap().is_empty());
    assert_eq!(map.disk(0).unwrap().free(), []);
}
