//! btrfs: subvolumes, snapshots, shared extents, every compression.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use mainstay_core::{Code, ItemPath, Kind, Metadata};
use mainstay_diskimage::fs::FsKind;
use mainstay_testkit::tree::hostile_tree;

use crate::lab::{Image, Mounted, run};
use crate::{changes, oracle, trees};

fn make(arguments: &[&str], mebibytes: u64) -> Image {
    Image::make("mkfs.btrfs", &[&["-q", "-f"], arguments].concat(), mebibytes)
}

/// Small content lies in items of trees.
fn may_be_inline(metadata: &Metadata) -> bool {
    metadata.size <= 4096
}

fn anything(_metadata: &Metadata) -> bool {
    true
}

#[test]
fn a_large_tree_is_read_as_planted_and_as_the_kernel_reads_it() {
    let files = trees::large();
    let image = make(&["-L", "large tree"], 512);
    {
        let mounted = image.mount("noatime");
        trees::write(&mounted.0, &files);
        trees::oddities(&mounted.0);
    }
    let file_system = image.open();
    assert_eq!(file_system.about().kind, FsKind::Btrfs);
    assert_eq!(file_system.about().label, b"large tree");
    assert_eq!(file_system.about().size, 512 << 20);
    oracle::holds(&*file_system, &files);
    let items = {
        let mounted = image.mount_read_only();
        oracle::agrees_with_kernel(&*file_system, &mounted.0)
    };
    oracle::extents_hold_content(&*file_system, &*image.blocks(), &items, &may_be_inline);
    oracle::walk_agrees(&*file_system, &items);
}

#[test]
fn every_kind_of_item_and_attribute_comes_out_of_every_shape_of_btrfs() {
    let shapes: &[(&[&str], &str)] = &[
        (&["-m", "dup", "-d", "dup"], "noatime"),
        (&["--mixed", "-n", "4096"], "noatime"),
        (&["--csum", "xxhash"], "noatime,compress-force=zstd:3"),
        (&["--csum", "sha256"], "noatime,compress-force=zlib"),
        (&["--csum", "blake2", "-n", "65536"], "noatime,compress-force=lzo"),
    ];
    for (arguments, options) in shapes {
        println!("mkfs.btrfs {arguments:?}, mount {options}");
        let files = trees::small();
        let image = make(arguments, 256);
        {
            let mounted = image.mount(options);
            trees::write(&mounted.0, &files);
            trees::oddities(&mounted.0);
            match hostile_tree(&mounted.0.join("hostile")) {
                Ok(missing) => println!("not made: {missing:?}"),
                Err(error) => println!("not made to its end: {error}"),
            }
            compressible(&mounted.0);
        }
        let file_system = image.open();
        oracle::holds(&*file_system, &files);
        let items = {
            let mounted = image.mount_read_only();
            oracle::agrees_with_kernel(&*file_system, &mounted.0)
        };
        let compressed = options.contains("compress");
        let other_form = if compressed { anything } else { may_be_inline };
        oracle::extents_hold_content(&*file_system, &*image.blocks(), &items, &other_form);
        oracle::walk_agrees(&*file_system, &items);
    }
}

/// Content of all lengths that compresses, some of it with what does not in between.
fn compressible(root: &Path) {
    let line = b"the same line, over and over, with a number at its end: ";
    for length in [1usize, 1000, 2049, 4096, 5000, 131_072, 131_073, 1_000_003] {
        let content: Vec<u8> = line.iter().copied().cycle().take(length).collect();
        fs::write(root.join(format!("packed-{length}")), &content).unwrap();
    }
    let mut mixed = File::create(root.join("packed-mixed")).unwrap();
    let mut rng = mainstay_testkit::Rng::new(5);
    for piece in 0..40 {
        let block = if piece % 3 == 0 { rng.bytes(70_000) } else { vec![piece; 90_001] };
        mixed.write_all(&block).unwrap();
    }
}

#[test]
fn subvolumes_snapshots_and_shared_extents_are_what_the_top_level_shows() {
    let image = make(&[], 256);
    let files = trees::small();
    {
        let mounted = image.mount("noatime");
        let root = &mounted.0;
        let subvolume = |path: &str| run("btrfs", &["-q", "subvolume", "create"], &[&root.join(path)]);
        subvolume("@");
        subvolume("@/var");
        trees::write(&root.join("@"), &files);
        trees::write(&root.join("@/var"), &files[..50]);
        let (from, to) = (root.join("@").join(&files[0].path), root.join("@/var/shared"));
        run("cp", &["--reflink=always"], &[&from, &to]);
        run("btrfs", &["-q", "subvolume", "snapshot", "-r"], &[&root.join("@"), &root.join("@snapshot")]);
        fs::write(root.join("@").join(&files[1].path), b"changed since").unwrap();
        run("btrfs", &["-q", "subvolume", "set-default"], &[&root.join("@")]);
    }
    let file_system = image.open();
    let lookup = |path: &str| file_system.lookup(&ItemPath::new(path.as_bytes()).unwrap()).unwrap();
    let read = |path: &str| oracle::content(&*file_system, lookup(path));
    assert_eq!(read(&format!("@/{}", files[1].path)), b"changed since");
    assert_eq!(read(&format!("@snapshot/{}", files[1].path)), files[1].content());
    assert_eq!(read("@/var/shared"), files[0].content());
    // A snapshot holds no other subvolume, only the place where it was.
    let empty = file_system.read_dir(lookup("@snapshot/var"), 0, 10).unwrap();
    assert!(empty.entries.is_empty() && empty.next.is_none());

    let path = image.directory.path().join("mounted");
    for part in ["@", "@/var", "@snapshot"] {
        let mounted = Mounted::new(&image.path, &path, &format!("loop,ro,subvol=/{part}"));
        for (path, (node, metadata)) in oracle::items_below(&*file_system, lookup(part)) {
            let theirs = mounted.0.join(std::ffi::OsStr::from_bytes(&path));
            if metadata.kind == Kind::File && !path.starts_with(b"var/") {
                assert!(oracle::content(&*file_system, node) == fs::read(&theirs).unwrap(), "{theirs:?}");
            }
        }
    }
    let items = oracle::items(&*file_system);
    oracle::walk_agrees(&*file_system, &items);
}

#[test]
fn what_is_only_in_the_log_is_refused_and_never_left_out() {
    let image = make(&[], 256);
    let copy = {
        let mounted = image.mount("noatime,commit=300");
        trees::write(&mounted.0, &trees::small());
        rustix::fs::syncfs(File::open(&mounted.0).unwrap()).unwrap();
        let mut late = File::create(mounted.0.join("late")).unwrap();
        late.write_all(b"only in the log").unwrap();
        late.sync_all().unwrap();
        image.copy()
    };
    let error = mainstay_diskimage::fs::open(copy.blocks()).err().unwrap();
    assert_eq!(error.code(), Code::Unsupported, "{error:?}");
    assert!(error.next_step().is_some_and(|hint| hint.contains("freeze")), "{error:?}");
}

#[test]
fn a_file_system_in_use_is_read_as_of_its_last_commit() {
    let image = make(&[], 256);
    let copy = changes::copy_in_use(&image, "noatime,commit=300");
    let before = copy.copy();
    let file_system = copy.open();
    let mounted = before.mount_read_only();
    oracle::agrees_with_kernel(&*file_system, &mounted.0);
}
