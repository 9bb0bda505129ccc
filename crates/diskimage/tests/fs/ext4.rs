//! ext2, ext3 and ext4 of every shape that mke2fs makes.

use std::fs::{self, File};
use std::path::Path;

use mainstay_core::{Kind, Metadata};
use mainstay_diskimage::fs::FsKind;
use mainstay_testkit::tree::hostile_tree;

use crate::lab::{Image, run};
use crate::{changes, oracle, trees};

fn make(arguments: &[&str], mebibytes: u64) -> Image {
    Image::make("mke2fs", &[&["-q", "-F"], arguments].concat(), mebibytes)
}

/// Content of at most this many bytes may lie inside inodes.
fn may_be_inline(metadata: &Metadata) -> bool {
    metadata.size <= 1024
}

/// Everything there is to compare, on an image that is not mounted; `free` bytes at least must be known to be free.
fn compare(image: &Image, inline: bool) {
    let file_system = image.open();
    let other_form = |metadata: &Metadata| inline && may_be_inline(metadata);
    let items = {
        let mounted = image.mount_read_only();
        oracle::agrees_with_kernel(&*file_system, &mounted.0)
    };
    let volume = image.blocks();
    oracle::extents_hold_content(&*file_system, &*volume, &items, &other_form);
    oracle::walk_agrees(&*file_system, &items);
}

/// As the file system's own check counts them.
fn free_bytes_by_dumpe2fs(image: &Path) -> u64 {
    let output = crate::lab::output("dumpe2fs", &["-h"], &[image]);
    let number = |name: &str| -> u64 {
        let line = output.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().parse().unwrap()
    };
    number("Free blocks:") * number("Block size:")
}

#[test]
fn a_large_tree_is_read_as_planted_and_as_the_kernel_reads_it() {
    let files = trees::large();
    let image = make(&["-t", "ext4", "-b", "4096", "-L", "large tree", "-N", "40000"], 400);
    {
        let mounted = image.mount("noatime");
        trees::write(&mounted.0, &files);
        trees::oddities(&mounted.0);
    }
    let file_system = image.open();
    assert_eq!(file_system.about().kind, FsKind::Ext4);
    assert_eq!(file_system.about().label, b"large tree");
    assert_eq!(file_system.about().size, 400 << 20);
    oracle::holds(&*file_system, &files);
    compare(&image, false);

    let items = oracle::items(&*file_system);
    let free = oracle::free_is_free(&*file_system, &items, &image.path);
    assert_eq!(free, free_bytes_by_dumpe2fs(&image.path));
    run("e2fsck", &["-f", "-n"], &[&image.path]);
    oracle::holds(&*image.open(), &files);
}

#[test]
fn every_kind_of_item_and_attribute_comes_out_of_every_shape_of_ext() {
    let shapes: &[(FsKind, &[&str])] = &[
        (FsKind::Ext2, &["-t", "ext2", "-b", "1024"]),
        (FsKind::Ext3, &["-t", "ext3", "-b", "4096", "-I", "128"]),
        (FsKind::Ext4, &["-t", "ext4", "-b", "1024", "-O", "^64bit,^metadata_csum,uninit_bg"]),
        (FsKind::Ext4, &["-t", "ext4", "-O", "inline_data,ea_inode", "-I", "512", "-b", "4096"]),
        (FsKind::Ext4, &["-t", "ext4", "-O", "bigalloc,meta_bg,^resize_inode", "-C", "16384"]),
        (
            FsKind::Ext4,
            &["-t", "ext4", "-b", "4096", "-O", "metadata_csum_seed,orphan_file,large_dir,^flex_bg"],
        ),
    ];
    for (kind, arguments) in shapes {
        println!("mke2fs {arguments:?}");
        let files = trees::small();
        let image = make(arguments, 96);
        {
            let mounted = image.mount("noatime,user_xattr,acl");
            trees::write(&mounted.0, &files);
            trees::oddities(&mounted.0);
            // What is not made for want of room in small blocks (a long link) ends the tree there.
            match hostile_tree(&mounted.0.join("hostile")) {
                Ok(missing) => println!("not made: {missing:?}"),
                Err(error) => println!("not made to its end: {error}"),
            }
            trees::long_attributes(&mounted.0);
        }
        let file_system = image.open();
        assert_eq!(file_system.about().kind, *kind);
        oracle::holds(&*file_system, &files);
        compare(&image, arguments.iter().any(|argument| argument.contains("inline_data")));
        let items = oracle::items(&*file_system);
        let free = oracle::free_is_free(&*file_system, &items, &image.path);
        assert_eq!(free, free_bytes_by_dumpe2fs(&image.path), "{arguments:?}");
        run("e2fsck", &["-f", "-n"], &[&image.path]);
    }
}

#[test]
fn a_file_system_in_use_is_read_as_its_journal_says() {
    let shapes: &[(&[&str], &str)] = &[
        (&["-t", "ext4", "-J", "size=16"], "commit=300"),
        (&["-t", "ext4", "-b", "1024", "-J", "size=8"], "commit=300,data=journal"),
        (&["-t", "ext3", "-b", "1024", "-J", "size=8"], "commit=300"),
        (&["-t", "ext4", "-O", "^64bit"], "commit=300,journal_checksum,data=journal"),
        (&["-t", "ext4"], "commit=300,data=writeback,journal_async_commit"),
    ];
    for (arguments, options) in shapes {
        println!("mke2fs {arguments:?}, mount {options}");
        let image = make(arguments, 128);
        let copy = changes::copy_in_use(&image, options);
        let before = copy.copy();
        let file_system = copy.open();
        let notes = &file_system.about().notes;
        assert!(matches!(&notes[..], [note] if note.contains("replayed")), "{arguments:?}: {notes:?}");
        {
            let mounted = before.mount("noatime");
            oracle::agrees_with_kernel(&*file_system, &mounted.0);
        }
        assert!(before.open().about().notes.is_empty(), "the kernel wrote its journal back");
    }
}

#[test]
fn a_cut_short_image_is_refused() {
    let image = make(&["-t", "ext4"], 32);
    File::options().write(true).open(&image.path).unwrap().set_len(20 << 20).unwrap();
    let error = mainstay_diskimage::fs::open(image.blocks()).err().unwrap();
    assert_eq!(error.code(), mainstay_core::Code::Integrity);
    assert!(error.next_step().is_some_and(|hint| hint.contains("cut short")), "{error:?}");
}

#[test]
fn damage_is_noticed_and_the_rest_is_still_there() {
    use std::os::unix::fs::FileExt as _;
    let image = make(&["-t", "ext4", "-b", "4096"], 64);
    let files = trees::small();
    {
        let mounted = image.mount("noatime");
        trees::write(&mounted.0, &files);
    }
    // The inode of one file gets a wrong size.
    let file_system = image.open();
    let victim = mainstay_core::ItemPath::new(files[0].path.as_bytes()).unwrap();
    let node = file_system.lookup(&victim).unwrap();
    assert_eq!(file_system.metadata(node).unwrap().kind, Kind::File);
    let place = crate::lab::output("debugfs", &["-R", &format!("imap <{}>", node.number)], &[&image.path]);
    let number = |name: &str| -> u64 {
        let rest = &place[place.find(name).unwrap() + name.len()..];
        let word = rest.trim_start().split([',', '\n']).next().unwrap().trim();
        word.strip_prefix("0x")
            .map_or_else(|| word.parse().unwrap(), |hex| u64::from_str_radix(hex, 16).unwrap())
    };
    let at = number("at block") * 4096 + number("offset");
    File::options().write(true).open(&image.path).unwrap().write_all_at(&[1], at + 4).unwrap();

    let file_system = image.open();
    let error = file_system.metadata(node).unwrap_err();
    assert_eq!(error.code(), mainstay_core::Code::Integrity);
    oracle::holds(&*file_system, &files[1..]);
}

#[test]
fn encrypted_content_is_refused_and_never_shown_as_it_lies() {
    let image = make(&["-t", "ext4", "-O", "encrypt"], 32);
    {
        let mounted = image.mount("noatime");
        fs::write(mounted.0.join("secret"), b"cipher text").unwrap();
    }
    // The flag alone makes the content what only a key can read.
    run("debugfs", &["-w", "-R", "set_inode_field secret flags 0x80800"], &[&image.path]);
    let file_system = image.open();
    let node = file_system.lookup(&mainstay_core::ItemPath::new("secret").unwrap()).unwrap();
    let error = file_system.open(node).err().unwrap();
    assert_eq!(error.code(), mainstay_core::Code::Unsupported);
    assert!(error.what().contains("encrypted"), "{error:?}");
}
