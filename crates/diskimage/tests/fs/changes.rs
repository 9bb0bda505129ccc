//! A file system in use: changes of every kind that are in its journal and not yet where they belong.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use crate::lab::Image;
use crate::trees;

/// Changes of every kind, some of them to blocks that an earlier round wrote.
pub(crate) fn change(root: &Path, round: u8) {
    for number in 0..200 {
        let path = root.join(format!("d{:03}/file-{number:06}.dat", number % 100));
        match number % 4 {
            0 => fs::remove_file(path).unwrap_or_default(),
            1 => fs::write(path, vec![round; 5000]).unwrap(),
            2 => rustix::fs::rename(&path, root.join(format!("moved-{round}-{number}"))).unwrap_or_default(),
            _ => File::options().append(true).open(path).unwrap().write_all(&[round; 3000]).unwrap(),
        }
    }
    fs::create_dir(root.join(format!("new-{round}"))).unwrap();
    for number in 0..300 {
        fs::write(root.join(format!("new-{round}/{number}")), [round; 100]).unwrap();
    }
    if round > 0 {
        // Blocks of directories that become content: the journal must not put the names back.
        fs::remove_dir_all(root.join(format!("new-{}", round - 1))).unwrap();
        fs::write(root.join(format!("reuse-{round}")), vec![round; 300_000]).unwrap();
    }
}

/// Mounts, writes and changes, and takes a copy before anything is put in order.
pub(crate) fn copy_in_use(image: &Image, options: &str) -> Image {
    let mounted = image.mount(options);
    trees::write(&mounted.0, &trees::small());
    let root = File::open(&mounted.0).unwrap();
    for round in 0..4 {
        change(&mounted.0, round);
        // Content is written now; what describes it only to the journal.
        rustix::fs::syncfs(&root).unwrap();
    }
    image.copy()
}
