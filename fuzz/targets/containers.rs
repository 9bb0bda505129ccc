//! Image files of any format, by their content.
#![no_main]

use std::path::Path;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use mainstay_diskimage::container::{Alone, open_blocks};
use mainstay_fuzz::{Disk, look};

fuzz_target!(|bytes: Vec<u8>| {
    let disk = Disk::new(bytes, 0);
    if let Ok(image) = open_blocks(Arc::new(disk), Path::new("image"), None, &Alone) {
        look(&*image.blocks);
    }
});
