//! NTFS: the input is all but the boot sector, which puts the master file table at the second cluster.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay_fuzz::{Disk, look_at_file_system, put};

fuzz_target!(|bytes: Vec<u8>| {
    let mut bytes = bytes;
    put(&mut bytes, 3, b"NTFS    ");
    // Sectors of 512 bytes, clusters of 4 KiB, records and blocks of 1 KiB, 4 MiB in all.
    put(&mut bytes, 0x0B, &[0x00, 0x02, 8]);
    put(&mut bytes, 0x28, &[8192u64, 1, 2].map(u64::to_le_bytes).concat());
    put(&mut bytes, 0x40, &[0xF6, 0, 0, 0, 0xF6]);
    look_at_file_system(Disk::new(bytes, 4 << 20));
});
