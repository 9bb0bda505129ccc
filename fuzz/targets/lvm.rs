//! LVM: the input is the metadata's text, behind a label and in an area that are right.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay_fuzz::{Disk, crc32, look_at_volumes, put};

const START: u32 = 0xF597_A6CF;
const AREA: usize = 4096;

fuzz_target!(|text: Vec<u8>| {
    let mut bytes = Vec::new();
    put(&mut bytes, 512, b"LABELONE");
    put(&mut bytes, 520, &1u64.to_le_bytes());
    put(&mut bytes, 532, &32u32.to_le_bytes());
    put(&mut bytes, 536, b"LVM2 001");
    put(&mut bytes, 544, b"00000000000000000000000000000000");
    // One data area, the end of that list, one metadata area, the end of that.
    let lists = [1 << 20, 0, 0, 0, AREA as u64, (1 << 20) - AREA as u64, 0, 0];
    put(&mut bytes, 584, &lists.map(u64::to_le_bytes).concat());
    put(&mut bytes, 1023, &[0]);
    let sum = crc32(START, &bytes[532..1024]);
    put(&mut bytes, 528, &sum.to_le_bytes());
    put(&mut bytes, AREA + 4, b" LVM2 x[5A%r0N*>");
    put(&mut bytes, AREA + 40, &[512, text.len() as u64].map(u64::to_le_bytes).concat());
    put(&mut bytes, AREA + 56, &crc32(START, &text).to_le_bytes());
    put(&mut bytes, AREA + 511, &[0]);
    let sum = crc32(START, &bytes[AREA + 4..AREA + 512]);
    put(&mut bytes, AREA, &sum.to_le_bytes());
    put(&mut bytes, AREA + 512, &text);
    look_at_volumes(Disk::new(bytes, 16 << 20));
});
