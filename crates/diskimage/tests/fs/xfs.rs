//! XFS of every shape that mkfs.xfs makes.

use std::path::Path;

use mainstay_core::Metadata;
use mainstay_diskimage::fs::FsKind;
use mainstay_testkit::tree::hostile_tree;

use crate::lab::{Image, run};
use crate::{changes, oracle, trees};

/// The smallest that mkfs.xfs makes without being told that it is for tests.
const MEBIBYTES: u64 = 320;

fn make(arguments: &[&str]) -> Image {
    Image::make("mkfs.xfs", &[&["-q", "-f"], arguments].concat(), MEBIBYTES)
}

fn nothing_else(_metadata: &Metadata) -> bool {
    false
}

#[test]
fn a_large_tree_is_read_as_planted_and_as_the_kernel_reads_it() {
    let files = trees::large();
    let image = make(&["-L", "large tree"]);
    {
        let mounted = image.mount("noatime");
        trees::write(&mounted.0, &files);
        trees::oddities(&mounted.0);
    }
    let file_system = image.open();
    assert_eq!(file_system.about().kind, FsKind::Xfs);
    assert_eq!(file_system.about().label, b"large tree");
    assert_eq!(file_system.about().size, MEBIBYTES << 20);
    assert_eq!(file_system.about().notes, [""; 0]);
    oracle::holds(&*file_system, &files);
    let items = {
        let mounted = image.mount_read_only();
        oracle::agrees_with_kernel(&*file_system, &mounted.0)
    };
    oracle::extents_hold_content(&*file_system, &*image.blocks(), &items, &nothing_else);
    oracle::walk_agrees(&*file_system, &items);
    let free = oracle::free_is_free(&*file_system, &items, &image.path);
    assert!(free > 120 << 20, "{free} bytes are free");
    run("xfs_repair", &["-n", "-f"], &[&image.path]);
    oracle::holds(&*image.open(), &files);
}

#[test]
fn every_kind_of_item_and_attribute_comes_out_of_every_shape_of_xfs() {
    let shapes: &[&[&str]] = &[
        &[],
        &["-b", "size=1024", "-n", "size=8192", "-i", "size=512"],
        &["-m", "rmapbt=1,reflink=1,bigtime=1,inobtcount=1", "-d", "agcount=2"],
    ];
    for arguments in shapes {
        println!("mkfs.xfs {arguments:?}");
        let files = trees::small();
        let image = make(arguments);
        {
            let mounted = image.mount("noatime");
            trees::write(&mounted.0, &files);
            trees::oddities(&mounted.0);
            match hostile_tree(&mounted.0.join("hostile")) {
                Ok(missing) => println!("not made: {missing:?}"),
                Err(error) => println!("not made to its end: {error}"),
            }
            trees::long_attributes(&mounted.0);
        }
        let file_system = image.open();
        oracle::holds(&*file_system, &files);
        let items = {
            let mounted = image.mount_read_only();
            oracle::agrees_with_kernel(&*file_system, &mounted.0)
        };
        oracle::extents_hold_content(&*file_system, &*image.blocks(), &items, &nothing_else);
        oracle::walk_agrees(&*file_system, &items);
        oracle::free_is_free(&*file_system, &items, &image.path);
        check(&image.path);
    }
}

fn check(image: &Path) {
    run("xfs_repair", &["-n", "-f"], &[image]);
}

#[test]
fn a_file_system_in_use_is_read_as_its_log_says() {
    for arguments in [&[][..], &["-m", "rmapbt=1"]] {
        println!("mkfs.xfs {arguments:?}");
        let image = make(arguments);
        let copy = changes::copy_in_use(&image, "noatime");
        let before = copy.copy();
        let file_system = copy.open();
        let notes = &file_system.about().notes;
        assert!(matches!(&notes[..], [note] if note.contains("replayed")), "{arguments:?}: {notes:?}");
        // Mounted for writing, since the kernel replays a log only then.
        let mounted = before.mount("noatime,nouuid");
        oracle::agrees_with_kernel(&*file_system, &mounted.0);
    }
}

#[test]
fn a_cut_short_image_is_refused() {
    let image = make(&[]);
    std::fs::File::options().write(true).open(&image.path).unwrap().set_len(200 << 20).unwrap();
    let error = mainstay_diskimage::fs::open(image.blocks()).err().unwrap();
    println!("{error:?}");
    assert_eq!(error.code(), mainstay_core::Code::Integrity);
}
