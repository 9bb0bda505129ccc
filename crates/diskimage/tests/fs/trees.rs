//! Trees whose content a seed tells, so that what is read can be checked without asking any file system.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;

use mainstay_testkit::Rng;

/// A file by its path and what its content is made from.
#[derive(Clone, Debug)]
pub(crate) struct Planted {
    pub(crate) path: String,
    pub(crate) size: usize,
    pub(crate) seed: u64,
}

impl Planted {
    pub(crate) fn content(&self) -> Vec<u8> {
        Rng::new(self.seed).bytes(self.size)
    }
}

/// About 15,000 files: many small ones, a large directory, a deep one, an empty file, a large file.
pub(crate) fn large() -> Vec<Planted> {
    let mut rng = Rng::new(7);
    let mut files = Vec::new();
    let mut plant = |path: String, size| files.push(Planted { path, size, seed: rng.next_u64() });
    let mut sizes = Rng::new(8);
    for number in 0..10_000 {
        let size = *sizes.pick(&[100, 900, 3000, 9000]);
        plant(format!("d{:03}/file-{number:06}.dat", number % 100), size);
    }
    for number in 0..5_000 {
        plant(format!("many/entry-with-a-longer-name-{number:05}"), number % 7);
    }
    let deep: Vec<String> = (0..20).map(|level| format!("l{level}")).collect();
    plant(format!("deep/{}/leaf.txt", deep.join("/")), 5);
    plant("large.bin".to_owned(), (24 << 20) + 1);
    plant("\u{fc}nic\u{f6}de-\u{6587}\u{4ef6}.txt".to_owned(), 8);
    plant("empty".to_owned(), 0);
    files
}

/// The first thousand of [`large`] and its odd ones.
pub(crate) fn small() -> Vec<Planted> {
    let all = large();
    let odd = all.len() - 4;
    [&all[..700], &all[10_000..10_300], &all[odd..odd + 1], &all[odd + 2..]].concat()
}

pub(crate) fn write(root: &Path, files: &[Planted]) {
    for planted in files {
        let path = root.join(&planted.path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, planted.content()).unwrap();
    }
}

/// What a POSIX file system has beside plain files: holes at the start, in the middle and at the end, links short and
/// long, a file in pieces, space that was set aside and never written.
pub(crate) fn oddities(root: &Path) {
    let odd = root.join("odd");
    fs::create_dir(&odd).unwrap();
    fs::write(odd.join("tiny"), b"inline me\n").unwrap();
    fs::hard_link(odd.join("tiny"), odd.join("hard")).unwrap();
    symlink("tiny", odd.join("short")).unwrap();
    symlink("x".repeat(59), odd.join("link59")).unwrap();
    symlink("x".repeat(60), odd.join("link60")).unwrap();
    symlink("y".repeat(1000), odd.join("link1000")).unwrap();
    let sparse = File::create(odd.join("sparse")).unwrap();
    sparse.write_all_at(b"middle", 5_000_003).unwrap();
    sparse.set_len(12_000_000).unwrap();
    let holes = File::create(odd.join("holes")).unwrap();
    for piece in 0..600u64 {
        holes.write_all_at(&[(piece % 255) as u8 + 1; 4096], piece * 12_288).unwrap();
    }
    holes.sync_all().unwrap();
    let mut other = File::create(odd.join("other")).unwrap();
    let mut pieces = File::create(odd.join("pieces")).unwrap();
    for piece in 0..300u32 {
        pieces.write_all(&[piece as u8; 5000]).unwrap();
        pieces.sync_data().unwrap();
        other.write_all(&[0xee; 4096]).unwrap();
        other.sync_data().unwrap();
    }
    let set_aside = File::create(odd.join("set-aside")).unwrap();
    let flags = rustix::fs::FallocateFlags::empty();
    match rustix::fs::fallocate(&set_aside, flags, 0, 3 << 20) {
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
        Err(error) => panic!("fallocate: {error}"),
    }
    set_aside.write_all_at(b"written", 1_000_000).unwrap();
}

/// Values that need a block and, where the file system has them, inodes of their own.
pub(crate) fn long_attributes(root: &Path) {
    let path = root.join("odd/attributes");
    fs::write(&path, b"x").unwrap();
    for (name, length) in [("user.a", 10), ("user.bb", 700), ("user.ccc", 3000), ("user.dddd", 20_000)] {
        let value = vec![b'v'; length];
        match rustix::fs::setxattr(&path, name, &value, rustix::fs::XattrFlags::empty()) {
            Ok(()) => {}
            Err(error) => println!("{name} of {length} bytes: {error}"),
        }
    }
}
