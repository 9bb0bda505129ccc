//! What is read, held against what was planted and against the kernel's view of the same image.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use mainstay_core::{Blocks, ItemPath, Kind, Metadata, Piece};
use mainstay_diskimage::fs::{FileSystem, Node};
use mainstay_testkit::tree;

use crate::trees::Planted;

/// Every item of a file system by its path, the root being the empty one.
pub(crate) type Items = BTreeMap<Vec<u8>, (Node, Metadata)>;

pub(crate) fn items(file_system: &dyn FileSystem) -> Items {
    items_below(file_system, file_system.root())
}

/// As [`items`], of a part of it.
pub(crate) fn items_below(file_system: &dyn FileSystem, root: Node) -> Items {
    let mut items = Items::new();
    items.insert(Vec::new(), (root, file_system.metadata(root).unwrap()));
    let mut directories = vec![(ItemPath::root(), root)];
    while let Some((path, directory)) = directories.pop() {
        let mut from = Some(0);
        while let Some(start) = from {
            // A limit that divides nothing, so that pages end everywhere.
            let page = file_system.read_dir(directory, start, 97).unwrap();
            for entry in page.entries {
                let path = path.join(&entry.name).unwrap();
                let metadata = file_system.metadata(entry.node).unwrap();
                if let Some(kind) = entry.kind {
                    assert_eq!(kind, metadata.kind, "{path}");
                }
                if metadata.kind == Kind::Directory {
                    directories.push((path.clone(), entry.node));
                }
                let twice = items.insert(path.as_bytes().to_vec(), (entry.node, metadata));
                assert!(twice.is_none(), "{path} is listed twice");
            }
            from = page.next;
        }
    }
    items
}

/// The content of a file, read with a buffer that divides nothing.
pub(crate) fn content(file_system: &dyn FileSystem, node: Node) -> Vec<u8> {
    let mut reader = file_system.open(node).unwrap();
    let mut bytes = Vec::new();
    let mut buffer = vec![0xaa; 100_003];
    loop {
        match reader.read(&mut buffer).unwrap() {
            Piece::Data(length) => bytes.extend_from_slice(&buffer[..length]),
            Piece::Hole(length) => bytes.resize(bytes.len() + usize::try_from(length).unwrap(), 0),
            Piece::End => return bytes,
        }
    }
}

/// Every planted file is there with its bytes.
pub(crate) fn holds(file_system: &dyn FileSystem, files: &[Planted]) {
    for planted in files {
        let path = ItemPath::new(planted.path.as_bytes()).unwrap();
        let node = file_system.lookup(&path).unwrap();
        assert!(content(file_system, node) == planted.content(), "{path} differs from what was written");
    }
}

/// Names, kinds, sizes, owners, modes, times, attributes, links, devices and bytes are what the kernel sees.
pub(crate) fn agrees_with_kernel(file_system: &dyn FileSystem, mounted: &Path) -> Items {
    let ours = items(file_system);
    let theirs = tree::manifest(mounted).unwrap();
    let names = |paths: Vec<&Vec<u8>>| -> Vec<String> {
        paths.into_iter().map(|path| path.escape_ascii().to_string()).collect()
    };
    assert_eq!(names(ours.keys().collect()), names(theirs.keys().collect()), "names");
    let mut first_names = HashMap::new();
    for (path, (node, metadata)) in &ours {
        let shown = path.escape_ascii();
        let expected = &theirs[path];
        assert_eq!(st_mode(metadata), expected.mode, "the mode of {shown}");
        assert_eq!((metadata.uid, metadata.gid), (expected.uid, expected.gid), "the owners of {shown}");
        let modified = (metadata.modified.seconds(), metadata.modified.subsecond_nanoseconds());
        assert_eq!(modified, expected.modified, "the time of {shown}");
        assert_eq!(metadata.size, expected.size, "the size of {shown}");
        assert_eq!(metadata.link_target, expected.target, "the target of {shown}");
        let device = metadata.device.map_or(0, |(major, minor)| rustix::fs::makedev(major, minor));
        assert_eq!(device, expected.device, "the device number of {shown}");
        let xattrs: BTreeMap<_, _> = metadata.xattrs.iter().cloned().collect();
        let mut expected_xattrs = expected.xattrs.clone();
        // XFS shows access control lists a second time, as it stores them.
        expected_xattrs.retain(|name, _| !name.starts_with(b"trusted.SGI_ACL_"));
        assert_eq!(xattrs, expected_xattrs, "the attributes of {shown}");
        if metadata.kind != Kind::Directory {
            let first = match metadata.hard_link {
                Some(link) => first_names.entry(link).or_insert_with(|| path.clone()).clone(),
                None => path.clone(),
            };
            assert_eq!(Some(first), expected.same_as, "the hard links of {shown}");
        }
        if metadata.kind == Kind::File {
            // The kernel takes no longer path at once.
            if path.len() < 4000 {
                let theirs = std::fs::read(mounted.join(OsStr::from_bytes(path))).unwrap();
                assert!(content(file_system, *node) == theirs, "the content of {shown}");
            }
        }
    }
    ours
}

fn st_mode(metadata: &Metadata) -> u32 {
    let kind = match metadata.kind {
        Kind::File => 0o100_000,
        Kind::Directory => 0o040_000,
        Kind::Symlink => 0o120_000,
        Kind::Fifo => 0o010_000,
        Kind::Socket => 0o140_000,
        Kind::CharDevice => 0o020_000,
        Kind::BlockDevice => 0o060_000,
        other => panic!("{other:?} does not belong on a file system"),
    };
    kind | metadata.mode
}

/// The extents of every file hold its bytes on the volume, and what they leave out reads as zeros (or is stored in
/// another form, for the files that `other_form` names). Returns how many bytes they cover.
pub(crate) fn extents_hold_content(
    file_system: &dyn FileSystem,
    volume: &dyn Blocks,
    items: &Items,
    other_form: &dyn Fn(&Metadata) -> bool,
) -> u64 {
    let mut covered = 0;
    for (path, (node, metadata)) in items.iter().filter(|(_, (_, metadata))| metadata.kind == Kind::File) {
        let shown = path.escape_ascii();
        let mut expected = content(file_system, *node);
        let mut end = 0;
        for extent in file_system.extents(*node).unwrap() {
            assert!(extent.file_offset >= end && extent.length > 0, "{shown}: extents in order");
            end = extent.file_offset + extent.length;
            assert!(end <= metadata.size, "{shown}: extents end with the file");
            let mut bytes = vec![0; usize::try_from(extent.length).unwrap()];
            volume.read_at(extent.volume_offset, &mut bytes).unwrap();
            let from = usize::try_from(extent.file_offset).unwrap();
            let part = &mut expected[from..from + bytes.len()];
            assert!(part == bytes, "{shown}: {extent:?} holds something else");
            part.fill(0);
            covered += extent.length;
        }
        assert!(
            other_form(metadata) || expected.iter().all(|&byte| byte == 0),
            "{shown}: a part has no extent"
        );
    }
    covered
}

/// The walk of all files shows the same extents as asking file by file.
pub(crate) fn walk_agrees(file_system: &dyn FileSystem, items: &Items) {
    let mut walked: BTreeMap<Node, Vec<_>> = BTreeMap::new();
    file_system
        .files(&mut |node, extents| {
            walked.entry(node).or_default().extend_from_slice(extents);
            Ok(())
        })
        .unwrap();
    let files = items.values().filter(|(_, metadata)| metadata.kind == Kind::File);
    let asked: BTreeMap<_, _> = files
        .map(|(node, _)| (*node, file_system.extents(*node).unwrap()))
        .filter(|(_, extents)| !extents.is_empty())
        .collect();
    for (node, extents) in &asked {
        assert_eq!(walked.get(node), Some(extents), "{node:?}");
    }
    assert_eq!(walked.len(), asked.len(), "files that have no name");
}

/// Free space overlaps no file, and overwriting it changes nothing that the kernel can see: `check` is run on the
/// image afterwards. Returns the free bytes.
pub(crate) fn free_is_free(file_system: &dyn FileSystem, items: &Items, image: &Path) -> u64 {
    use std::os::unix::fs::FileExt as _;
    let mut free = Vec::new();
    file_system
        .free(&mut |range| {
            free.push(range);
            Ok(())
        })
        .unwrap();
    assert!(free.windows(2).all(|pair| pair[0].end < pair[1].start), "ascending and apart");
    for (path, (node, _)) in items.iter().filter(|(_, (_, metadata))| metadata.kind == Kind::File) {
        for extent in file_system.extents(*node).unwrap() {
            let after = free.partition_point(|range| range.end <= extent.volume_offset);
            let clear =
                free.get(after).is_none_or(|range| range.start >= extent.volume_offset + extent.length);
            assert!(clear, "{} lies in free space", path.escape_ascii());
        }
    }
    let file = File::options().write(true).open(image).unwrap();
    let junk = vec![0xa5; 1 << 20];
    let mut bytes = 0;
    for range in free {
        bytes += range.end - range.start;
        for at in range.clone().step_by(junk.len()) {
            let length = usize::try_from(range.end - at).unwrap().min(junk.len());
            file.write_all_at(&junk[..length], at).unwrap();
        }
    }
    bytes
}
