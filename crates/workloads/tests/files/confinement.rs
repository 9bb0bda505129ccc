//! Nothing that a point holds, and nobody who moves things about meanwhile, makes a restore touch anything outside
//! its target.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mainstay_core::{HardLink, Item, ItemPath, Kind, Metadata, Target as _, Time};
use mainstay_testkit::{Part, Rng, TestItem, for_each_seed};
use mainstay_workloads::files::{FilesPlan, FilesTarget, RestoreMode, RestoreRules};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::captured;

/// A directory outside the target with a file in it, and everything about them that a restore could change.
struct Sentinel {
    directory: PathBuf,
    before: Vec<String>,
}

impl Sentinel {
    fn new(directory: PathBuf) -> Self {
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("file"), "sentinel").unwrap();
        fs::create_dir(directory.join("inner")).unwrap();
        let before = Self::look(&directory);
        Self { directory, before }
    }

    fn look(directory: &Path) -> Vec<String> {
        let mut paths: Vec<_> = ["", "file", "inner"].iter().map(|name| directory.join(name)).collect();
        for directory in [directory.to_owned(), directory.join("inner")] {
            let names = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
            paths.extend(names);
        }
        paths.sort();
        let show = |path: &PathBuf| {
            let stat = path.symlink_metadata().unwrap();
            let content = if stat.is_file() { fs::read(path).unwrap() } else { Vec::new() };
            format!(
                "{} {:o} {}:{} {} {} {content:?}",
                path.display(),
                stat.mode(),
                stat.uid(),
                stat.gid(),
                stat.mtime(),
                stat.mtime_nsec()
            )
        };
        paths.iter().map(show).collect()
    }

    fn assert_untouched(&self, story: &dyn std::fmt::Debug) {
        assert_eq!(Self::look(&self.directory), self.before, "{story:?}");
    }
}

/// In memory, since each of thousands of restores makes what it wrote durable.
fn quick_directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn restore(root: &Path, mode: RestoreMode, items: Vec<Item>) {
    let rules = RestoreRules { mode, selected: vec![ItemPath::root()], ..RestoreRules::default() };
    let plan = FilesPlan { root: root.to_owned(), rules, writers: Some(2), ..FilesPlan::default() };
    let mut target = FilesTarget::new(plan).unwrap();
    if items.into_iter().all(|item| target.put(item).is_ok()) {
        let _some_were_refused = Box::new(target).finish(&captured());
    }
}

/// An item of any kind that points where it should not.
fn hostile_item(rng: &mut Rng, path: ItemPath, sentinel: &Path) -> Item {
    let mut item = match rng.range(0..10) {
        0..3 => TestItem::directory(path),
        3..6 => TestItem::file(path, vec![Part::Bytes(b"intruder".to_vec()), Part::Hole(9)]),
        _ => TestItem::directory(path),
    };
    if item.metadata.kind == Kind::Directory && rng.chance(60) {
        item.metadata = Metadata::new(*rng.pick(&[
            Kind::Symlink,
            Kind::Symlink,
            Kind::Symlink,
            Kind::Fifo,
            Kind::Socket,
            Kind::CharDevice,
            Kind::BlockDevice,
            Kind::Disk,
            Kind::Record,
        ]));
    }
    let metadata = &mut item.metadata;
    if metadata.kind == Kind::Symlink || rng.chance(5) {
        let inner = sentinel.join("inner");
        let file = sentinel.join("file");
        let targets: [&[u8]; 8] = [
            sentinel.as_os_str().as_encoded_bytes(),
            inner.as_os_str().as_encoded_bytes(),
            file.as_os_str().as_encoded_bytes(),
            b"../sentinel",
            b"../../sentinel",
            b"a",
            b"b",
            b"",
        ];
        metadata.link_target = Some(rng.pick(&targets).to_vec());
    }
    if rng.chance(40) {
        metadata.hard_link = Some(HardLink { device: 1, inode: rng.range(1..4) });
    }
    metadata.mode = *rng.pick(&[0o777, 0o4777, 0, 0o644, u32::MAX]);
    (metadata.uid, metadata.gid) = (rng.range(0..3) as u32, 1);
    metadata.modified = Time(rng.next_u64().cast_signed());
    metadata.device = Some((1, 3));
    metadata.xattrs =
        vec![(b"user.intruder".to_vec(), b"x".to_vec()), (b"no such space".to_vec(), Vec::new())];
    item.to_item()
}

/// Few names, so that items of all kinds meet at the same paths, within one stream and across several.
fn hostile_items(rng: &mut Rng, sentinel: &Path) -> Vec<Item> {
    let names: [&[u8]; 6] =
        [b"a", b"b", b"file", b"inner", b"sentinel", b".mainstay-restore-0000000000000000-0"];
    let mut paths = vec![];
    for _ in 0..rng.range(1..14) {
        let depth = rng.range(1..5);
        let parts: Vec<&[u8]> = (0..depth).map(|_| *rng.pick(&names)).collect();
        paths.push(ItemPath::new(parts.join(&b'/')).unwrap());
    }
    paths.sort();
    // A duplicate and a wrong order now and then: the run must end in words.
    if !rng.chance(10) {
        paths.dedup();
    }
    if rng.chance(5) {
        paths.reverse();
    }
    paths.into_iter().map(|path| hostile_item(rng, path, sentinel)).collect()
}

#[test]
fn hostile_streams_never_leave_the_target() {
    for_each_seed(3000, |seed| {
        let mut rng = Rng::new(seed);
        let directory = quick_directory();
        let sentinel = Sentinel::new(directory.path().join("sentinel"));
        let root = directory.path().join("target");
        fs::create_dir(&root).unwrap();
        // What a user may have put there before.
        for name in ["a", "b"] {
            match rng.range(0..4) {
                0 => symlink(&sentinel.directory, root.join(name)).unwrap(),
                1 => symlink(sentinel.directory.join("file"), root.join(name)).unwrap(),
                2 => fs::hard_link(sentinel.directory.join("file"), root.join(name)).unwrap(),
                _ => {}
            }
        }
        for _ in 0..rng.range(1..4) {
            let mode = *rng.pick(&[RestoreMode::Add, RestoreMode::Overwrite, RestoreMode::Mirror]);
            restore(&root, mode, hostile_items(&mut rng, &sentinel.directory));
        }
        sentinel.assert_untouched(&seed);
    });
}

/// Someone who may write to the target swaps directories for links to the sentinel, all the time.
#[test]
fn a_racing_renamer_leads_nothing_outside() {
    let directory = quick_directory();
    let sentinel = Sentinel::new(directory.path().join("sentinel"));
    let root = directory.path().join("target");
    fs::create_dir(&root).unwrap();
    let (stop, swaps) = (AtomicBool::new(false), AtomicU64::new(0));
    let names = ["a", "b", "a/a", "b/a"];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let baits = names.map(|name| directory.path().join(name.replace('/', "-")));
            baits.iter().for_each(|bait| symlink(&sentinel.directory, bait).unwrap());
            while !stop.load(Ordering::Relaxed) {
                for (name, bait) in names.iter().zip(&baits) {
                    // The restore may have replaced the link by a directory, which the last swap brought here.
                    if !bait.is_symlink() && !root.join(name).is_symlink() {
                        // May fail while the restore still writes into it: then the next turn will do.
                        let _not_yet =
                            fs::remove_dir_all(bait).and_then(|()| symlink(&sentinel.directory, bait));
                    }
                    let swapped = renameat_with(CWD, root.join(name), CWD, bait, RenameFlags::EXCHANGE);
                    swaps.fetch_add(u64::from(swapped.is_ok()), Ordering::Relaxed);
                }
            }
        });
        for_each_seed(2000, |seed| {
            let mut rng = Rng::new(seed);
            let mode = *rng.pick(&[RestoreMode::Overwrite, RestoreMode::Mirror]);
            let mut items = Vec::new();
            for name in
                ["a", "a/a", "a/a/file", "a/a/inner", "a/file", "b", "b/a", "b/a/file", "b/file", "file"]
            {
                let path = ItemPath::new(name).unwrap();
                let mut item = match name.rsplit('/').next() {
                    Some("file") => TestItem::file(path, vec![Part::Bytes(rng.bytes(20))]),
                    _ => TestItem::directory(path),
                };
                item.metadata.modified = Time(rng.next_u64().cast_signed());
                item.metadata.mode = 0o751;
                items.push(item.to_item());
            }
            restore(&root, mode, items);
        });
        stop.store(true, Ordering::Relaxed);
    });
    println!("{} swaps", swaps.load(Ordering::Relaxed));
    assert!(swaps.load(Ordering::Relaxed) > 100, "the renamer never got its turn");
    sentinel.assert_untouched(&"racing");
}

#[test]
fn devices_and_owners_that_an_ordinary_user_may_not_make_are_skips() {
    use mainstay_core::SkipReason;
    let directory = crate::shared_directory();
    crate::as_ordinary_user(|| {
        let root = directory.path().join("target");
        let mut target = FilesTarget::new(FilesPlan { root: root.clone(), ..FilesPlan::default() }).unwrap();
        let path = |name: &str| ItemPath::new(name).unwrap();
        let mut device = TestItem::directory(path("device"));
        device.metadata = Metadata { device: Some((1, 3)), ..Metadata::new(Kind::CharDevice) };
        let mut file = TestItem::file(path("file"), vec![Part::Bytes(b"data".to_vec())]);
        file.metadata.mode = 0o4755;
        file.metadata.xattrs = vec![(b"security.capability".to_vec(), vec![1; 20])];
        for item in [device, file] {
            target.put(item.to_item()).unwrap();
        }
        let (receipt, restored) = Box::new(target).finish(&captured()).unwrap();
        assert_eq!(receipt.counts.skipped, 2);
        let reasons: Vec<_> = restored.skips.iter().map(|skip| skip.reason).collect();
        assert!(
            reasons.contains(&SkipReason::Unsupported) && reasons.contains(&SkipReason::Metadata),
            "{reasons:?}"
        );
        assert_eq!(fs::read(root.join("file")).unwrap(), b"data");
        // Root's program must not become one that runs with this user's powers.
        assert_eq!(root.join("file").metadata().unwrap().permissions().mode() & 0o7777, 0o755);
    });
}
