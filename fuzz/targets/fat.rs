//! FAT: the input is all but the mark and the jump of the boot sector.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay_fuzz::{Disk, look_at_file_system, put};

fuzz_target!(|bytes: Vec<u8>| {
    let mut bytes = bytes;
    put(&mut bytes, 0, &[0xEB]);
    put(&mut bytes, 510, &[0x55, 0xAA]);
    look_at_file_system(Disk::new(bytes, 4 << 20));
});
