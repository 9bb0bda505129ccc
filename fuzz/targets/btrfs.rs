//! btrfs: the input is what follows the first superblock's place. Start it with a corpus of small images: checksums
//! keep noise out.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay_fuzz::{Disk, look_at_file_system, put};

fuzz_target!(|input: Vec<u8>| {
    let mut bytes = Vec::new();
    put(&mut bytes, 64 << 10, &input);
    put(&mut bytes, (64 << 10) + 64, b"_BHRfS_M");
    look_at_file_system(Disk::new(bytes, 32 << 20));
});
