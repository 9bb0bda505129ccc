//! Partition tables as sgdisk and sfdisk write them.

use std::path::Path;
use std::sync::Arc;

use mainstay_diskimage::FileBlocks;
use mainstay_diskimage::partition::{PartitionKind, Table, TableKind, partitions};
use serde_json::Value;

use crate::tools::{feed, shell};

fn disk(folder: &Path, mebibytes: u64) -> std::path::PathBuf {
    let disk = folder.join("disk");
    std::fs::File::create(&disk).unwrap().set_len(mebibytes << 20).unwrap();
    disk
}

fn read(disk: &Path) -> Table {
    partitions(&FileBlocks::open(disk).unwrap()).unwrap()
}

/// What sfdisk says about the same disk, in our terms.
fn told(disk: &Path) -> Vec<(u32, std::ops::Range<u64>, String, Option<String>)> {
    let json: Value = serde_json::from_str(&shell(&format!("sfdisk --json {}", disk.display()))).unwrap();
    let sector = json["partitiontable"]["sectorsize"].as_u64().unwrap();
    let text = |value: &Value| value.as_str().map(str::to_lowercase);
    let partitions = json["partitiontable"]["partitions"].as_array().unwrap().iter();
    let told = partitions.map(|told| {
        let number = told["node"].as_str().unwrap().strip_prefix(disk.to_str().unwrap()).unwrap();
        let start = told["start"].as_u64().unwrap() * sector;
        let range = start..start + told["size"].as_u64().unwrap() * sector;
        (number.parse().unwrap(), range, text(&told["type"]).unwrap(), text(&told["uuid"]))
    });
    told.collect()
}

fn assert_agrees(table: &Table, disk: &Path) {
    let is_extended = |kind: &String| ["5", "f", "85"].contains(&kind.as_str());
    let told: Vec<_> = told(disk).into_iter().filter(|(_, _, kind, _)| !is_extended(kind)).collect();
    let ours = table.partitions.iter().map(|partition| {
        let kind = match &partition.kind {
            PartitionKind::Mbr(kind) => format!("{kind:x}"),
            PartitionKind::Gpt(kind) => kind.clone(),
        };
        let uuid = partition.uuid.clone().filter(|_| table.kind == TableKind::Gpt);
        (partition.number, partition.range.clone(), kind, uuid)
    });
    let ours: Vec<_> = ours.collect();
    assert_eq!(ours, told);
}

#[test]
fn a_gpt_reads_as_sfdisk_reads_it_and_from_its_backup() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk(folder.path(), 64);
    shell(&format!(
        "sgdisk -n 1:0:+1M -t 1:ef02 -n 2:0:+16M -c 2:root -n 7:0:+20M -t 7:8e00 -n 128:0:0 {}",
        disk.display()
    ));
    let table = read(&disk);
    assert_eq!((table.kind, table.notes.as_slice()), (TableKind::Gpt, [].as_slice()));
    assert_eq!(table.partitions[1].label.as_deref(), Some("root"));
    assert_agrees(&table, &disk);

    let mut bytes = std::fs::read(&disk).unwrap();
    bytes[1024 + 40] ^= 1;
    std::fs::write(&disk, &bytes).unwrap();
    let saved = read(&disk);
    assert_eq!(saved.partitions, table.partitions);
    assert!(saved.notes[0].contains("backup"), "{:?}", saved.notes);

    let end = bytes.len();
    bytes[end - 512 + 20] ^= 1;
    std::fs::write(&disk, &bytes).unwrap();
    let lost = read(&disk);
    assert_eq!((lost.partitions.len(), lost.kind), (0, TableKind::Whole));
    assert!(lost.notes.iter().any(|note| note.contains("neither")), "{:?}", lost.notes);
}

#[test]
fn an_mbr_with_logical_partitions_reads_as_sfdisk_reads_it() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk(folder.path(), 64);
    let script = "label: dos\n,8M,83,*\n,8M,82\n,40M,E\n,2M,7\n,4M,83\n,4M,83\n,10M,8e\n";
    feed("sfdisk", ["--quiet", disk.to_str().unwrap()], script.as_bytes());
    let table = read(&disk);
    assert_eq!((table.kind, table.notes.as_slice()), (TableKind::Mbr, [].as_slice()));
    assert_eq!(table.partitions.iter().map(|known| known.number).collect::<Vec<_>>(), [1, 2, 4, 5, 6, 7]);
    assert_agrees(&table, &disk);
}

#[test]
fn a_file_system_on_the_whole_disk_is_no_partition_table() {
    for program in ["mkfs.fat", "mkfs.ext4 -q -F"] {
        let folder = tempfile::tempdir().unwrap();
        let disk = disk(folder.path(), 8);
        shell(&format!("{program} {}", disk.display()));
        assert_eq!(read(&disk), Table::default(), "{program}");
    }
}

#[test]
fn volumes_are_windows_of_the_disks() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk(folder.path(), 16);
    shell(&format!("sgdisk -n 1:0:+1M -n 2:0:+4M {}", disk.display()));
    let blocks: Arc<dyn mainstay_core::Blocks> = Arc::new(FileBlocks::open(&disk).unwrap());
    let layout = mainstay_diskimage::volume::volumes(&[blocks.clone(), blocks], &|_| None).unwrap();
    let names: Vec<_> = layout.volumes.iter().map(|volume| volume.name.as_str()).collect();
    assert_eq!(names, ["vda1", "vda2", "vdb1", "vdb2"]);
    assert_eq!(layout.volumes[3].on_disk(4096..8192), [(1, (2 << 20) + 4096..(2 << 20) + 8192)]);
    assert_eq!(layout.volumes[3].blocks.size(), 4 << 20);
}

#[test]
fn sectors_of_four_kibibytes_and_what_is_only_told_about() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk(folder.path(), 64);
    let device = shell(&format!("losetup --find --show --sector-size 4096 {}", disk.display()));
    let loops = crate::lvm::Loops(vec![device.trim().to_owned()]);
    shell(&format!("sgdisk -n 1:0:+4M -n 2:0:+8M -t 2:4200 {}", loops.0[0]));
    drop(loops);
    let table = read(&disk);
    let ranges: Vec<_> = table.partitions.iter().map(|known| known.range.clone()).collect();
    assert_eq!(ranges, [1 << 20..5 << 20, 5 << 20..13 << 20]);
    let blocks: Arc<dyn mainstay_core::Blocks> = Arc::new(FileBlocks::open(&disk).unwrap());
    let mut layout = mainstay_diskimage::volume::volumes(&[blocks], &|_| None).unwrap();
    assert!(layout.notes.remove(0).contains("dynamic disk of Windows") && layout.notes.is_empty());

    // What stands at the start of a volume of BitLocker, and of a member of a RAID.
    let mut bytes = std::fs::read(&disk).unwrap();
    bytes[(1 << 20) + 3..(1 << 20) + 11].copy_from_slice(b"-FVE-FS-");
    bytes[(5 << 20) + 4096..(5 << 20) + 4100].copy_from_slice(&0xA92B_4EFC_u32.to_le_bytes());
    std::fs::write(&disk, bytes).unwrap();
    let blocks: Arc<dyn mainstay_core::Blocks> = Arc::new(FileBlocks::open(&disk).unwrap());
    let notes = mainstay_diskimage::volume::volumes(&[blocks], &|_| None).unwrap().notes;
    assert!(notes[1].contains("vda1 is encrypted with BitLocker"), "{notes:?}");
    assert!(notes[2].contains("vda2 is a part of a Linux RAID"), "{notes:?}");
}
