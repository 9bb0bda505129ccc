//! FAT of every width. This kernel may not know it, so mtools is the second reader.

use std::fs;
use std::path::Path;

use mainstay_core::{ItemPath, Kind, Metadata};
use mainstay_diskimage::fs::FsKind;
use tempfile::TempDir;

use crate::lab::{Image, run};
use crate::oracle;
use crate::trees::{self, Planted};

fn nothing_else(_metadata: &Metadata) -> bool {
    false
}

/// Of the large tree, what a small FAT has room for; copying into large directories takes mtools very long.
fn files(count: usize) -> Vec<Planted> {
    let all = trees::large();
    let odd = all.len() - 4;
    [&all[..count], &all[10_000..10_100], &all[odd..odd + 1], &all[odd + 2..]].concat()
}

fn fill(image: &Image, files: &[Planted]) {
    let tree = TempDir::new().unwrap();
    trees::write(tree.path(), files);
    let mut names: Vec<_> = fs::read_dir(tree.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    let mut paths: Vec<&Path> = names.iter().map(AsRef::as_ref).collect();
    paths.push(Path::new("::/"));
    run("mcopy", &["-Q", "-s", "-m", "-i", image.path.to_str().unwrap()], &paths);
}

/// What mtools reads.
fn unpacked(image: &Image) -> TempDir {
    let out = TempDir::new().unwrap();
    run("mcopy", &["-Q", "-s", "-m", "-n", "-i", image.path.to_str().unwrap(), "::/"], &[out.path()]);
    out
}

#[test]
fn every_width_is_read_as_planted_and_as_mtools_reads_it() {
    for (arguments, mebibytes, count) in [
        (["-F", "12", "-s", "8"], 12, 150),
        (["-F", "16", "-s", "4"], 64, 1000),
        (["-F", "32", "-s", "1"], 96, 3000),
    ] {
        println!("mkfs.vfat {arguments:?}");
        let image = Image::make("mkfs.vfat", &[&arguments[..], &["-n", "LABEL"]].concat(), mebibytes);
        let files = files(count);
        fill(&image, &files);
        let file_system = image.open();
        assert_eq!(file_system.about().kind, FsKind::Fat);
        assert_eq!(file_system.about().label, b"LABEL");
        oracle::holds(&*file_system, &files);

        let items = oracle::items(&*file_system);
        let theirs = unpacked(&image);
        for (path, (_, metadata)) in items.iter().filter(|(path, _)| !path.is_empty()) {
            let path = theirs.path().join(std::str::from_utf8(path).unwrap());
            let expected = fs::symlink_metadata(&path).unwrap();
            assert_eq!(expected.is_dir(), metadata.kind == Kind::Directory, "{}", path.display());
            if metadata.kind == Kind::File {
                let modified = expected.modified().unwrap().duration_since(std::time::UNIX_EPOCH).unwrap();
                assert_eq!(metadata.modified.seconds(), modified.as_secs() as i64, "{}", path.display());
                assert_eq!(metadata.size, expected.len());
            }
        }
        assert_eq!(items.values().filter(|(_, metadata)| metadata.kind == Kind::File).count(), files.len());
        oracle::extents_hold_content(&*file_system, &*image.blocks(), &items, &nothing_else);
        oracle::walk_agrees(&*file_system, &items);
        oracle::free_is_free(&*file_system, &items, &image.path);
        run("fsck.vfat", &["-n"], &[&image.path]);
        oracle::holds(&*image.open(), &files);
    }
}

#[test]
fn names_are_found_in_any_case_and_deleted_ones_are_not() {
    let image = Image::make("mkfs.vfat", &["-F", "16"], 32);
    let plant = |path: &str, seed| Planted { path: path.to_owned(), size: 100, seed };
    let long = "x".repeat(250);
    let files = [plant("README.TXT", 1), plant("Mixed Case Name.text", 2), plant(&long, 3), plant("gone", 4)];
    fill(&image, &files);
    run("mdel", &["-i", image.path.to_str().unwrap(), "::/gone"], &[]);
    let file_system = image.open();
    let lookup = |path: &str| file_system.lookup(&ItemPath::new(path).unwrap());
    assert_eq!(lookup("readme.txt").unwrap(), lookup("README.TXT").unwrap());
    assert_eq!(lookup("MIXED case name.TEXT").unwrap(), lookup("Mixed Case Name.text").unwrap());
    assert_eq!(lookup("gone").unwrap_err().code(), mainstay_core::Code::NotFound);
    oracle::holds(&*file_system, &files[..3]);
}

#[test]
fn a_file_that_ends_before_its_size_is_refused() {
    use std::os::unix::fs::FileExt as _;
    let image = Image::make("mkfs.vfat", &["-F", "16", "-s", "4"], 32);
    let files = [Planted { path: "short".to_owned(), size: 100_000, seed: 1 }];
    fill(&image, &files);
    let file_system = image.open();
    let node = file_system.lookup(&ItemPath::new("short").unwrap()).unwrap();
    let disk = fs::File::options().read(true).write(true).open(&image.path).unwrap();
    let mut reserved = [0; 2];
    disk.read_exact_at(&mut reserved, 14).unwrap();
    let table = u64::from(u16::from_le_bytes(reserved)) * 512;
    // The file's second cluster is called its last.
    disk.write_all_at(&[0xff, 0xff], table + 2 * (node.number + 1)).unwrap();
    let error = image.open().open(node).err().unwrap();
    assert_eq!(error.code(), mainstay_core::Code::Integrity, "{error:?}");
}
