//! qcow2, behind a header that says so.
#![no_main]

use std::path::Path;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use mainstay_diskimage::container::{Alone, Format, open_blocks};
use mainstay_fuzz::{Disk, look, put};

fuzz_target!(|input: Vec<u8>| {
    let mut bytes = input;
    put(&mut bytes, 0, b"QFI\xFB\0\0\0");
    if let Ok(image) =
        open_blocks(Arc::new(Disk::new(bytes, 0)), Path::new("image"), Some(Format::Qcow2), &Alone)
    {
        look(&*image.blocks);
    }
});
