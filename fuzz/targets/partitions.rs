//! MBR and GPT: the first byte chooses whether the checksums of a GPT are mended.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay_fuzz::{Disk, crc32, look_at_volumes, put};

fuzz_target!(|input: (bool, Vec<u8>)| {
    let (mend, mut bytes) = input;
    put(&mut bytes, 510, &[0x55, 0xAA]);
    if mend {
        bytes.resize(bytes.len().max(1024 + 128), 0);
        put(&mut bytes, 512, b"EFI PART");
        put(&mut bytes, 512 + 12, &92u32.to_le_bytes());
        put(&mut bytes, 512 + 72, &2u64.to_le_bytes());
        let entries = ((bytes.len() - 1024) / 128).min(128);
        put(&mut bytes, 512 + 80, &[(entries as u32).to_le_bytes(), 128u32.to_le_bytes()].concat());
        let sum = !crc32(!0, &bytes[1024..1024 + entries * 128]);
        put(&mut bytes, 512 + 88, &sum.to_le_bytes());
        put(&mut bytes, 512 + 16, &[0; 4]);
        let sum = !crc32(!0, &bytes[512..512 + 92]);
        put(&mut bytes, 512 + 16, &sum.to_le_bytes());
    }
    look_at_volumes(Disk::new(bytes, 4 << 20));
});
