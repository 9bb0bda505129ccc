//! ext4 without checksums: the input is all but the few numbers of the superblock that say it is one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay_fuzz::{Disk, look_at_file_system, put};

const SIZE: u64 = 4 << 20;

fuzz_target!(|bytes: Vec<u8>| {
    let mut bytes = bytes;
    // 64 inodes, 4096 blocks, the first is block 1; blocks of 1 KiB, one group of 8192; revision 1.
    put(&mut bytes, 1024, &[64u32, 4096].map(u32::to_le_bytes).concat());
    put(&mut bytes, 1024 + 0x14, &[1u32, 0, 0, 8192].map(u32::to_le_bytes).concat());
    put(&mut bytes, 1024 + 0x28, &64u32.to_le_bytes());
    put(&mut bytes, 1024 + 0x38, &[0x53, 0xEF]);
    put(&mut bytes, 1024 + 0x4C, &1u32.to_le_bytes());
    put(&mut bytes, 1024 + 0x58, &256u16.to_le_bytes());
    // No checksums of metadata.
    bytes.resize(bytes.len().max(2048), 0);
    bytes[1024 + 0x65] &= !0x04;
    look_at_file_system(Disk::new(bytes, SIZE));
});
