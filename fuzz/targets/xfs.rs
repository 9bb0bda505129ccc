//! XFS: the input is all but the mark. Start it with a corpus of small images: checksums keep noise out.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay_fuzz::{Disk, look_at_file_system, put};

fuzz_target!(|bytes: Vec<u8>| {
    let mut bytes = bytes;
    put(&mut bytes, 0, b"XFSB");
    look_at_file_system(Disk::new(bytes, 16 << 20));
});
