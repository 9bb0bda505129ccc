//! NTFS, written and read again by ntfs-3g.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use mainstay_core::{Code, ItemPath, Kind, Metadata, Piece};
use mainstay_diskimage::fs::{FileSystem, FsKind};
use mainstay_testkit::Rng;
use rustix::fs::{XattrFlags, lgetxattr, llistxattr, setxattr};

use crate::lab::{Image, run};
use crate::oracle::{self, Items};
use crate::trees;

pub(crate) fn make(mebibytes: u64) -> Image {
    Image::make("mkntfs", &["-q", "-Q", "-F", "-L", "a volume", "-c", "4096"], mebibytes)
}

/// Unmounted, and all written, when dropped.
pub(crate) struct Mounted(pub(crate) PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &[], &[&self.0]);
        // The program that serves it writes on for a moment.
        let name = format!("{}/image", self.0.parent().unwrap().display());
        for _ in 0..600 {
            if !serves(&name) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        panic!("ntfs-3g does not let go of {name}");
    }
}

/// Whether a process has `image` as an argument.
fn serves(image: &str) -> bool {
    let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok()).any(|line| {
        line.starts_with(b"ntfs-3g\0") && line.split(|&byte| byte == 0).any(|word| word == image.as_bytes())
    })
}

pub(crate) fn mount(image: &Image) -> Mounted {
    let at = image.directory.path().join("mounted");
    fs::create_dir_all(&at).unwrap();
    run("ntfs-3g", &["-o", "compression,streams_interface=xattr,noatime"], &[&image.path, &at]);
    Mounted(at)
}

/// What NTFS has of its own: compressed files of every kind of content, several streams, names for old programs.
pub(crate) fn oddities(root: &Path) {
    let odd = root.join("odd");
    fs::create_dir(&odd).unwrap();
    fs::write(odd.join("tiny"), b"inline me\n").unwrap();
    fs::hard_link(odd.join("tiny"), odd.join("hard")).unwrap();
    let sparse = File::create(odd.join("sparse")).unwrap();
    sparse.write_all_at(b"middle", 5_000_003).unwrap();
    sparse.set_len(12_000_000).unwrap();
    for (name, length) in [("user.short", 10), ("user.long", 5000)] {
        setxattr(odd.join("tiny"), name, &vec![b'v'; length], XattrFlags::empty()).unwrap();
    }
    let packed = root.join("packed");
    fs::create_dir(&packed).unwrap();
    const COMPRESSED: u32 = 0x0800;
    setxattr(&packed, "system.ntfs_attrib", &COMPRESSED.to_le_bytes(), XattrFlags::empty()).unwrap();
    let mut rng = Rng::new(5);
    for length in [1usize, 700, 4096, 65_535, 65_536, 65_537, 1_000_003] {
        let line = b"the same line, over and over, with a number at its end: ";
        let content: Vec<u8> = line.iter().copied().cycle().take(length).collect();
        fs::write(packed.join(format!("text-{length}")), content).unwrap();
        fs::write(packed.join(format!("noise-{length}")), rng.bytes(length)).unwrap();
        fs::write(packed.join(format!("zeros-{length}")), vec![0; length]).unwrap();
    }
    let mut mixed = File::create(packed.join("mixed")).unwrap();
    for piece in 0..30 {
        let block = if piece % 3 == 0 { rng.bytes(70_000) } else { vec![piece; 90_001] };
        mixed.write_all(&block).unwrap();
    }
    // So many names and attributes that they do not fit one record.
    let crowded = odd.join("crowded");
    fs::write(&crowded, rng.bytes(50_000)).unwrap();
    for number in 0..40 {
        fs::hard_link(&crowded, odd.join(format!("another-name-of-the-crowded-file-{number:03}"))).unwrap();
    }
    let mut other = File::create(odd.join("other")).unwrap();
    let mut pieces = File::create(odd.join("pieces")).unwrap();
    for piece in 0..300u32 {
        pieces.write_all(&[piece as u8; 5000]).unwrap();
        other.write_all(&[0xee; 4096]).unwrap();
    }
}

/// Names, sizes, times, streams, links and bytes are what ntfs-3g sees.
fn agrees_with_ntfs_3g(file_system: &dyn FileSystem, mounted: &Path) -> Items {
    let items = oracle::items(file_system);
    let mut theirs = BTreeMap::new();
    let mut waiting = vec![mounted.to_owned()];
    while let Some(path) = waiting.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        let name = path.strip_prefix(mounted).unwrap().to_str().unwrap().to_owned();
        theirs.insert(name.into_bytes(), (path, metadata));
    }
    let names = |paths: Vec<&Vec<u8>>| {
        paths.into_iter().map(|path| path.escape_ascii().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(names(items.keys().collect()), names(theirs.keys().collect()), "names");
    for (path, (node, metadata)) in &items {
        let shown = path.escape_ascii();
        let (place, expected) = &theirs[path];
        assert_eq!(metadata.kind == Kind::Directory, expected.is_dir(), "{shown}");
        let modified = (metadata.modified.seconds(), metadata.modified.subsecond_nanoseconds());
        assert_eq!(modified, (expected.mtime(), expected.mtime_nsec()), "the time of {shown}");
        if metadata.kind == Kind::File {
            assert_eq!(metadata.size, expected.len(), "the size of {shown}");
            assert_eq!(metadata.hard_link.is_some(), expected.nlink() > 1, "the links of {shown}");
            assert!(
                oracle::content(file_system, *node) == fs::read(place).unwrap(),
                "the content of {shown}"
            );
        }
        let mut list = vec![0; 1 << 16];
        let length = llistxattr(place, &mut list[..]).unwrap();
        let mut streams = Vec::new();
        for name in list[..length].split(|&byte| byte == 0).filter(|name| name.starts_with(b"user.")) {
            let mut value = vec![0; 1 << 16];
            let length = lgetxattr(place, name, &mut value[..]).unwrap();
            streams.push((name.to_vec(), value[..length].to_vec()));
        }
        streams.sort();
        assert_eq!(metadata.xattrs, streams, "the streams of {shown}");
    }
    items
}

/// Small content lies in file records, and what is compressed does not lie as it is.
fn other_form(metadata: &Metadata) -> bool {
    let compressed =
        metadata.attributes.iter().any(|(name, value)| name == "ntfs.attributes" && value[1] & 8 != 0);
    compressed || metadata.size <= 1024
}

#[test]
fn a_large_tree_is_read_as_planted_and_as_ntfs_3g_reads_it() {
    let image = make(256);
    let files = trees::large();
    {
        let mounted = mount(&image);
        trees::write(&mounted.0, &files);
        oddities(&mounted.0);
    }
    let file_system = image.open();
    assert_eq!(file_system.about().kind, FsKind::Ntfs);
    assert_eq!(file_system.about().label, b"a volume");
    oracle::holds(&*file_system, &files);
    let items = {
        let mounted = mount(&image);
        agrees_with_ntfs_3g(&*file_system, &mounted.0)
    };
    let file_system = image.open();
    oracle::extents_hold_content(&*file_system, &*image.blocks(), &items, &other_form);
    oracle::walk_agrees(&*file_system, &items);
    oracle::free_is_free(&*file_system, &items, &image.path);
    run("ntfsfix", &["-n"], &[&image.path]);
    oracle::holds(&*image.open(), &files);
    agrees_with_ntfs_3g(&*image.open(), &mount(&image).0);
}

#[test]
fn what_only_windows_can_read_is_refused_and_links_show_where_they_lead() {
    let image = make(32);
    {
        let mounted = mount(&image);
        let reparse = |name: &str, data: &[u8]| {
            let path = mounted.0.join(name);
            fs::write(&path, b"").unwrap();
            setxattr(&path, "system.ntfs_reparse_data", data, XattrFlags::empty()).unwrap();
        };
        // The Windows overlay filter: the content is packed in a stream beside it.
        let mut filtered = 0x8000_0017u32.to_le_bytes().to_vec();
        filtered.extend_from_slice(&[16, 0, 0, 0]);
        filtered.extend_from_slice(&[1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        reparse("filtered", &filtered);
        let target: Vec<u8> = "..\\there".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let length = target.len() as u16;
        let mut link = 0xa000_000cu32.to_le_bytes().to_vec();
        link.extend_from_slice(&(12 + 2 * length).to_le_bytes());
        link.extend_from_slice(&[0, 0]);
        for field in [0, length, length, length, 1, 0] {
            link.extend_from_slice(&field.to_le_bytes());
        }
        link.extend_from_slice(&[target.as_slice(), &target].concat());
        reparse("link", &link);
    }
    let file_system = image.open();
    let lookup = |name: &str| file_system.lookup(&ItemPath::new(name).unwrap()).unwrap();
    let error = file_system.open(lookup("filtered")).err().unwrap();
    assert_eq!(error.code(), Code::Unsupported);
    assert!(error.what().contains("0x80000017"), "{error:?}");
    let link = file_system.metadata(lookup("link")).unwrap();
    assert_eq!((link.kind, link.link_target.as_deref()), (Kind::Symlink, Some(&b"../there"[..])));
    // In any case, since that is how its system finds them.
    assert_eq!(lookup("LINK"), lookup("link"));
}

#[test]
fn compressed_content_can_be_read_from_anywhere() {
    let image = make(32);
    {
        let mounted = mount(&image);
        oddities(&mounted.0);
    }
    let file_system = image.open();
    let node = file_system.lookup(&ItemPath::new("packed/mixed").unwrap()).unwrap();
    let whole = oracle::content(&*file_system, node);
    let content = file_system.content(node).unwrap();
    mainstay_testkit::for_each_seed(500, |seed| {
        let mut rng = Rng::new(seed);
        let offset = rng.below(whole.len());
        let mut buffer = vec![0; 1 + rng.below(100_000)];
        match content.read(offset as u64, &mut buffer).unwrap() {
            Piece::Data(length) => assert!(buffer[..length] == whole[offset..offset + length]),
            Piece::Hole(length) => {
                let end = offset + usize::try_from(length).unwrap();
                assert!(whole[offset..end].iter().all(|&byte| byte == 0));
            }
            Piece::End => panic!("the file does not end at {offset}"),
        }
    });
}
