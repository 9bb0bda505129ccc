//! LUKS: the first byte chooses the version. Of version 2 the input is the JSON, behind a checksum that is right.
#![no_main]

use aws_lc_rs::digest;
use libfuzzer_sys::fuzz_target;
use mainstay_fuzz::{Disk, look_at_volumes, put};

fuzz_target!(|input: (bool, Vec<u8>)| {
    let (second, rest) = input;
    let mut bytes = if second { Vec::new() } else { rest.clone() };
    put(&mut bytes, 0, b"LUKS\xBA\xBE\0");
    put(&mut bytes, 7, &[if second { 2 } else { 1 }]);
    if second {
        put(&mut bytes, 8, &0x4000u64.to_be_bytes());
        put(&mut bytes, 72, b"sha256");
        put(&mut bytes, 4096, &rest[..rest.len().min(0x3000)]);
        bytes.resize(0x4000, 0);
        let sum = digest::digest(&digest::SHA256, &bytes);
        put(&mut bytes, 448, sum.as_ref());
    }
    look_at_volumes(Disk::new(bytes, 4 << 20));
});
