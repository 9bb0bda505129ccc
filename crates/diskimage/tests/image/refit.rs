//! Disks moved to disks of another size, judged by sgdisk.

use mainstay_core::Code;
use mainstay_diskimage::FileBlocks;
use mainstay_diskimage::partition::{partitions, refit};

use crate::tools::shell;

#[test]
fn a_gpt_fits_a_larger_disk_and_a_smaller_one_that_holds_its_partitions() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::File::create(&path).unwrap().set_len(40 << 20).unwrap();
    shell(&format!("sgdisk -n 1:0:+1M -n 2:0:+16M -c 2:root {}", path.display()));
    let disk = FileBlocks::open(&path).unwrap();
    let (old, table) = (std::fs::read(&path).unwrap(), partitions(&disk).unwrap());
    for size in [100 << 20, 40 << 20, 20 << 20, (20 << 20) + 512] {
        let refit = refit(&disk, size).unwrap();
        let mut bytes = old[..refit.copied as usize].to_vec();
        bytes.resize(size as usize, 0);
        for (at, patch) in refit.patches {
            bytes[at as usize..at as usize + patch.len()].copy_from_slice(&patch);
        }
        let moved = folder.path().join("moved");
        std::fs::write(&moved, bytes).unwrap();
        let verdict = shell(&format!("sgdisk -v {}", moved.display()));
        assert!(verdict.contains("No problems found"), "{size}: {verdict}");
        let found = partitions(&FileBlocks::open(&moved).unwrap()).unwrap();
        assert_eq!((found.partitions, found.notes), (table.partitions.clone(), vec![]), "{size}");
    }
    let error = refit(&disk, 17 << 20).unwrap_err();
    assert_eq!(error.code(), Code::Refused, "{error}");
}
