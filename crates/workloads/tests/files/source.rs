//! What the source yields, in which order, and what it leaves out.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;

use mainstay_core::{Body, Code, Item, Kind, Next, Piece, Source as _, StreamEnd, Time};
use mainstay_testkit::{ScriptedClock, tree::hostile_tree};
use mainstay_workloads::files::{FilesRequest, FilesSource};

use crate::{clock, inside, item_path, request, walk};

/// Makes a tree: names that end in `/` are directories, the others files that hold their own name.
fn make(root: &Path, names: &[&str]) {
    for name in names {
        let path = root.join(name);
        if name.ends_with('/') {
            fs::create_dir_all(path).unwrap();
        } else {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, name).unwrap();
        }
    }
}

/// The paths below `root`, in the order of the walk.
fn below(root: &Path, request: FilesRequest) -> Vec<String> {
    let (items, skips) = walk(request);
    assert!(skips.is_empty(), "{skips:?}");
    let root = format!("{}/", root.to_str().unwrap().trim_start_matches('/'));
    items.iter().filter_map(|item| item.path.to_string().strip_prefix(&root).map(str::to_owned)).collect()
}

fn only(items: Vec<Item>, path: &Path) -> Item {
    items.into_iter().find(|item| item.path == item_path(path)).unwrap()
}

#[test]
fn items_are_in_order_and_directories_come_first() {
    let directory = tempfile::tempdir().unwrap();
    hostile_tree(&directory.path().join("tree")).unwrap();
    let (items, skips) = walk(request(&directory.path().join("tree")));
    assert!(skips.is_empty(), "{skips:?}");
    assert!(items.is_sorted_by(|left, right| left.path < right.path));
    let directories: std::collections::HashSet<_> = items
        .iter()
        .filter(|item| item.metadata.kind == Kind::Directory)
        .map(|item| item.path.clone())
        .collect();
    for item in &items {
        let parent = item.path.parent().unwrap();
        assert!(parent.is_root() || directories.contains(&parent), "{}", item.path);
    }
    // The ancestors are there as plain directories, with nothing else of theirs.
    let tree = item_path(&directory.path().join("tree"));
    let outside: Vec<_> = items.iter().filter(|item| !item.path.is_within(&tree)).collect();
    assert!(outside.iter().all(|item| tree.is_within(&item.path) && item.metadata.kind == Kind::Directory));
    assert_eq!(outside.len(), tree.components().count() - 1);
    // A time to come is never trusted.
    let unstamped = |item: &&Item| item.metadata.kind == Kind::File && item.stamp.0.is_empty();
    let unstamped: Vec<_> = items.iter().filter(unstamped).map(|item| item.path.name()).collect();
    assert_eq!(unstamped, [b"2200"]);
}

#[test]
fn patterns_caches_and_forbidden_paths_are_left_out() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    make(root, &["a/keep.o", "a/b.o", "a/src/c", "build/x", "a/build/y", "z.o", "repository/pack", "log"]);
    make(root, &["cache/data", "fake/data"]);
    fs::write(root.join("cache/CACHEDIR.TAG"), "Signature: 8a477f597d28d172789f06886806bc55\nby a test\n")
        .unwrap();
    fs::write(root.join("fake/CACHEDIR.TAG"), "Signature: something else\n").unwrap();
    let patterns = tempfile::NamedTempFile::new().unwrap();
    writeln!(patterns.as_file(), "# a comment\n!keep.o\n/log").unwrap();
    let request = FilesRequest {
        exclude: vec!["*.o".into(), "/build/".into()],
        exclude_files: vec![patterns.path().to_owned()],
        never: vec![root.join("repository")],
        skip_caches: true,
        ..request(root)
    };
    assert_eq!(
        below(root, request.clone()),
        [
            "a",
            "a/build",
            "a/build/y",
            "a/keep.o",
            "a/src",
            "a/src/c",
            "cache",
            "cache/CACHEDIR.TAG",
            "fake",
            "fake/CACHEDIR.TAG",
            "fake/data",
        ]
    );
    // What is named outright is there, whatever the patterns and tags say.
    let named =
        FilesRequest { roots: vec![root.join("cache"), root.join("z.o"), root.to_owned()], ..request };
    let paths = below(root, named.clone());
    assert!(
        ["cache/data", "z.o", "a/keep.o"].iter().all(|path| paths.contains(&(*path).to_owned())),
        "{paths:?}"
    );
    let forbidden = FilesRequest { roots: vec![root.join("repository")], ..named };
    let mut source = FilesSource::new(forbidden, clock()).unwrap();
    let error = std::iter::from_fn(|| match source.next() {
        Ok(Next::End) => None,
        other => Some(other.err()),
    });
    assert_eq!(error.flatten().next().unwrap().code(), Code::Usage);
}

#[test]
fn links_on_the_way_to_a_root_are_kept_beside_the_real_tree() {
    let directory = tempfile::tempdir().unwrap();
    let root = fs::canonicalize(directory.path()).unwrap();
    make(&root, &["real/home/documents/letter", "real/other"]);
    symlink("real/home", root.join("home")).unwrap();
    symlink(root.join("home/documents"), root.join("documents")).unwrap();
    let paths = below(&root, request(&root.join("documents")));
    assert_eq!(
        paths,
        ["documents", "home", "real", "real/home", "real/home/documents", "real/home/documents/letter"]
    );
    let alone = FilesRequest { keep_links: true, ..request(&root.join("documents")) };
    assert_eq!(below(&root, alone), ["documents"]);
    symlink("round", root.join("round")).unwrap();
    FilesSource::new(request(&root.join("round/x")), clock()).err().unwrap();
}

#[test]
fn a_root_that_is_not_there_is_an_error_and_not_an_empty_point() {
    let directory = tempfile::tempdir().unwrap();
    let missing = FilesSource::new(request(&directory.path().join("missing")), clock()).err().unwrap();
    assert_eq!(missing.code(), Code::NotFound);
    let relative = FilesSource::new(request(Path::new("relative")), clock()).err().unwrap();
    assert_eq!(relative.code(), Code::Usage);
    assert_eq!(FilesSource::new(FilesRequest::default(), clock()).err().unwrap().code(), Code::Usage);
    let pattern = FilesRequest { exclude: vec!["{a".into()], ..request(directory.path()) };
    assert_eq!(FilesSource::new(pattern, clock()).err().unwrap().code(), Code::Usage);
}

#[test]
fn stamps_move_with_the_file_and_are_withheld_from_one_just_touched() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "one").unwrap();
    let stamp = |now: Time| {
        let mut source = FilesSource::new(request(&file), Arc::new(ScriptedClock::at(now))).unwrap();
        let items = std::iter::from_fn(|| match source.next().unwrap() {
            Next::Item(item) => Some(*item),
            Next::Skipped(_) | Next::End => None,
        });
        only(items.collect(), &file).stamp
    };
    let changed = {
        use std::os::unix::fs::MetadataExt as _;
        let metadata = file.metadata().unwrap();
        Time::from_parts(metadata.ctime(), metadata.ctime_nsec())
    };
    let after = |milliseconds: i64| stamp(Time(changed.0 + milliseconds * 1_000_000));
    assert!(after(0).0.is_empty() && after(2_000).0.is_empty());
    assert!(!after(2_001).0.is_empty());
    let before = after(10_000);
    // Same size, same time of modification: only the time of change tells.
    let modified = file.metadata().unwrap().modified().unwrap();
    fs::write(&file, "two").unwrap();
    fs::File::options().write(true).open(&file).unwrap().set_modified(modified).unwrap();
    assert_ne!(after(10_000), before);
}

/// Reads a stream to its end.
fn read(item: &Item, mut between: impl FnMut()) -> mainstay_core::Result<(Vec<u8>, StreamEnd)> {
    let Body::Stream(open) = &item.body else { panic!("no stream") };
    let mut stream = open.open()?;
    let (mut content, mut buffer) = (Vec::new(), [0; 10]);
    loop {
        match stream.read(&mut buffer)? {
            Piece::Data(len) => content.extend_from_slice(&buffer[..len]),
            Piece::Hole(len) => content.resize(content.len() + usize::try_from(len).unwrap(), 0),
            Piece::End => return Ok((content, stream.finish()?)),
        }
        between();
    }
}

#[test]
fn a_file_that_changes_while_it_is_read_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    let reset = || fs::write(&file, "thirty bytes and not one more.").unwrap();
    let item = || only(walk(request(&file)).0, &file);
    reset();
    assert_eq!(
        read(&item(), || {}).unwrap(),
        (b"thirty bytes and not one more.".to_vec(), StreamEnd::Steady)
    );
    let append = || fs::File::options().append(true).open(&file).unwrap().write_all(b"more").unwrap();
    let (content, end) = read(&item(), append).unwrap();
    assert_eq!((content.len(), end), (30, StreamEnd::Changed));
    reset();
    let (_, end) = read(&item(), || fs::write(&file, "short").unwrap()).unwrap();
    assert_eq!(end, StreamEnd::Changed);
    // Between the walk and the reading counts too: content and metadata would be of two moments.
    reset();
    let late = item();
    append();
    assert_eq!(read(&late, || {}).unwrap().1, StreamEnd::Changed);
    // Another file under the same name is not read for the one that was listed.
    let replaced = item();
    let other = directory.path().join("other");
    fs::write(&other, "other").unwrap();
    fs::remove_file(&file).unwrap();
    assert_eq!(read(&replaced, || {}).unwrap_err().code(), Code::NotFound);
    fs::hard_link(&other, &file).unwrap();
    assert_eq!(read(&replaced, || {}).unwrap_err().code(), Code::NotFound);
    fs::remove_file(&file).unwrap();
    symlink("/etc/passwd", &file).unwrap();
    read(&replaced, || {}).unwrap_err();
}

#[test]
fn queued_items_of_a_deep_tree_open_long_after_the_walk() {
    let directory = tempfile::tempdir().unwrap();
    hostile_tree(&directory.path().join("tree")).unwrap();
    let (items, _) = walk(request(&directory.path().join("tree")));
    let files: Vec<_> =
        items.iter().filter(|item| item.path.name() == b"file" && item.metadata.size < 20).collect();
    assert!(files.len() >= 4);
    for item in files.iter().rev() {
        let (content, end) = read(item, || {}).unwrap();
        assert_eq!((content.len() as u64, end), (item.metadata.size, StreamEnd::Steady), "{}", item.path);
    }
    assert!(inside(directory.path(), Path::new("/tree")).exists());
}

#[test]
fn a_directory_with_very_many_names_is_walked_in_order() {
    let count: u32 = if std::env::var_os("MAINSTAY_TEST_MILLION").is_some() { 1_000_000 } else { 100_000 };
    let directory = tempfile::tempdir().unwrap();
    let first = directory.path().join("0");
    fs::write(&first, "").unwrap();
    // Links are made faster than files; ext4 allows 65 000 of one inode.
    for number in 1..count {
        let path = directory.path().join(number.to_string());
        if number % 60_000 == 0 {
            fs::write(&path, "").unwrap();
        } else {
            fs::hard_link(directory.path().join((number / 60_000 * 60_000).to_string()), &path).unwrap();
        }
    }
    let mut source = FilesSource::new(request(directory.path()), clock()).unwrap();
    let (mut last, mut seen) = (None, 0);
    while let Next::Item(item) = source.next().unwrap() {
        seen += u32::from(item.metadata.kind == Kind::File);
        assert!(last.as_ref() < Some(&item.path));
        last = Some(item.path);
    }
    assert_eq!(seen, count);
}

#[test]
fn the_root_directory_is_a_root_like_any_other() {
    let mut source =
        FilesSource::new(FilesRequest { one_file_system: true, ..request(Path::new("/")) }, clock()).unwrap();
    let mut items = Vec::new();
    while items.len() < 500 {
        match source.next().unwrap() {
            Next::Item(item) => items.push(item),
            Next::Skipped(_) => {}
            Next::End => break,
        }
    }
    assert!(items[0].path.is_root() && items[0].metadata.kind == Kind::Directory);
    assert!(items.is_sorted_by(|left, right| left.path < right.path));
    assert!(items.iter().any(|item| item.path.components().count() > 1));
}

/// They say that they are empty, and lie in a file system that a run from further up passes by.
#[test]
fn files_of_the_kernel_are_captured_with_their_content_when_they_are_asked_for() {
    let version = fs::read("/proc/version").unwrap();
    let roots = vec!["/proc/version".into(), "/proc/sys/kernel/random".into()];
    let (items, skips) = walk(FilesRequest { roots, ..FilesRequest::default() });
    let names: Vec<String> = items.iter().map(|item| item.path.to_string()).collect();
    assert!(names.contains(&"proc/sys/kernel/random/uuid".to_owned()), "{names:?} {skips:?}");
    let item = items.into_iter().find(|item| item.path.as_bytes() == b"proc/version").unwrap();
    let Body::Stream(open) = item.body else { panic!("no content") };
    let mut buffer = vec![0; 1 << 16];
    let piece = open.open().unwrap().read(&mut buffer).unwrap();
    assert_eq!(piece, Piece::Data(version.len()));
    assert_eq!(buffer[..version.len()], version);
}
