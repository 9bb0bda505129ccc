//! Snapshots and mount points: file systems of the test's own, on loop devices. Asks for root.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mainstay_core::{Consistency, Next, Source as _};
use mainstay_testkit::tree::{compare, hostile_tree};
use mainstay_workloads::files::{FilesPlan, FilesRequest, FilesSource, FilesTarget, SnapshotRule};
use mainstay_workloads::process::Program;

use crate::{clock, copy, inside, item_path, request, walk};

const LIMIT: Duration = Duration::from_secs(100);

/// Unmounted when the test is over.
struct Mount(PathBuf);

impl Mount {
    fn new(at: &Path, arguments: &[&str]) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let mounted = Program::new("mount", LIMIT).arguments(arguments).argument(at).run_well();
        mounted.map_err(|error| println!("NOT RUN: {error:?}")).ok().map(|_| Self(at.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        Program::new("umount", LIMIT).argument("-l").argument(&self.0).run_well().unwrap();
    }
}

/// A small btrfs at `at`, or the words why this test did not run.
fn btrfs(directory: &Path, at: &Path) -> Option<Mount> {
    if !rustix::process::geteuid().is_root() {
        println!("NOT RUN: only root can mount a btrfs to take snapshots of");
        return None;
    }
    if !fs::read_to_string("/proc/filesystems").unwrap().contains("btrfs") {
        println!("NOT RUN: this kernel has no btrfs");
        return None;
    }
    let image = directory.join("image");
    fs::File::create(&image).unwrap().set_len(200 << 20).unwrap();
    Program::new("mkfs.btrfs", LIMIT).argument("-q").argument(&image).run_well().expect("cargo xtask setup");
    Mount::new(at, &["-o", "loop", image.to_str().unwrap()])
}

fn subvolume(path: &Path) {
    Program::new("btrfs", LIMIT).arguments(["subvolume", "create"]).argument(path).run_well().unwrap();
}

/// A snapshot made by hand.
fn take(top: &Path, path: &Path) {
    let program = Program::new("btrfs", LIMIT).arguments(["subvolume", "snapshot", "-r"]);
    program.argument(top).argument(path).run_well().unwrap();
}

fn leftovers(top: &Path) -> usize {
    let names = fs::read_dir(top).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_str().is_some_and(|name| name.starts_with(".mainstay-snapshot-"))).count()
}

#[test]
fn a_btrfs_root_is_read_at_one_moment_and_its_snapshot_goes_away() {
    let directory = tempfile::tempdir().unwrap();
    let top = directory.path().join("mount");
    let Some(_mount) = btrfs(directory.path(), &top) else { return };
    // Left by a run that was killed: it is not read, and swept away.
    let stale = top.join(".mainstay-snapshot-0123456789abcdef");
    take(&top, &stale);
    let tree = top.join("tree");
    hostile_tree(&tree).unwrap();
    let request = FilesRequest { snapshots: SnapshotRule::Always, ..request(&tree) };
    let source = FilesSource::new(request.clone(), clock()).unwrap();
    assert_eq!(leftovers(&top), 1);
    // What happens from now on is of a later moment.
    take(&top, &top.join("original"));
    fs::write(tree.join("names/plain"), "changed").unwrap();
    fs::remove_dir_all(tree.join("links")).unwrap();
    // On btrfs as well: not every file system can hold every time.
    let target = top.join("target");
    let plan = FilesPlan { root: target.clone(), ..FilesPlan::default() };
    let restored = copy(source, FilesTarget::new(plan).unwrap()).unwrap();
    assert!(restored.skips.is_empty(), "{:?}", restored.skips);
    let differences = compare(&top.join("original/tree"), &inside(&target, &tree)).unwrap();
    assert_eq!(differences, Vec::<String>::new());
    assert_eq!(leftovers(&top), 0);

    let mut source = FilesSource::new(request, clock()).unwrap();
    while !matches!(source.next().unwrap(), Next::End) {}
    assert_eq!(source.seal().unwrap().consistency, Consistency::FileSystem);
    drop(source);
    assert_eq!(leftovers(&top), 0);
}

#[test]
fn what_a_snapshot_does_not_show_is_read_from_the_live_tree() {
    let directory = tempfile::tempdir().unwrap();
    let top = directory.path().join("mount");
    let Some(_mount) = btrfs(directory.path(), &top) else { return };
    subvolume(&top.join("nested"));
    fs::write(top.join("nested/file"), "in a subvolume").unwrap();
    fs::write(top.join("file"), "plain").unwrap();
    let Some(_inner) = Mount::new(&top.join("mounted here"), &["-t", "tmpfs", "none"]) else { return };
    fs::write(top.join("mounted here/file"), "in memory").unwrap();
    let request = FilesRequest { snapshots: SnapshotRule::Always, ..request(&top) };
    let mut source = FilesSource::new(request.clone(), clock()).unwrap();
    let mut paths = Vec::new();
    while let Next::Item(item) = source.next().unwrap() {
        paths.push(item.path);
    }
    for name in ["file", "nested/file", "mounted here/file"] {
        assert!(paths.contains(&item_path(&top.join(name))), "{name}: {paths:?}");
    }
    assert_eq!(source.seal().unwrap().consistency, Consistency::Fuzzy);
    drop(source);
    let alone = FilesRequest { one_file_system: true, ..request };
    let paths: Vec<_> = walk(alone).0.into_iter().map(|item| item.path).collect();
    assert!(paths.contains(&item_path(&top.join("mounted here"))));
    assert!(!paths.contains(&item_path(&top.join("mounted here/file"))));
}

/// A volume group on a loop device. Taken apart when the test is over.
struct Group {
    name: String,
    device: String,
}

impl Group {
    fn new(directory: &Path) -> Self {
        let image = directory.join("physical");
        fs::File::create(&image).unwrap().set_len(300 << 20).unwrap();
        let device = run("losetup", &["--find", "--show", image.to_str().unwrap()]);
        let group =
            Self { name: format!("mainstay-test-{}", std::process::id()), device: device.trim().into() };
        run("vgcreate", &[&group.name, &group.device]);
        run("lvcreate", &["--name", "origin", "--size", "100M", &group.name]);
        group
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        run("vgremove", &["--force", "--yes", &self.name]);
        run("losetup", &["--detach", &self.device]);
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Program::new(program, LIMIT).arguments(arguments.iter().copied()).run_well();
    String::from_utf8(output.expect("cargo xtask setup")).unwrap()
}

#[test]
fn a_root_on_lvm_is_read_at_one_moment_and_its_snapshot_goes_away() {
    let has_mapper = fs::read_to_string("/proc/misc").is_ok_and(|text| text.contains("device-mapper"));
    if !rustix::process::geteuid().is_root() || !has_mapper {
        println!(
            "NOT RUN: snapshots of logical volumes ask for root and for a kernel with the device mapper"
        );
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let group = Group::new(directory.path());
    let device = format!("/dev/{}/origin", group.name);
    run("mkfs.ext4", &["-q", &device]);
    let _mount = Mount::new(&directory.path().join("mount"), &[&device]).unwrap();
    let tree = directory.path().join("mount/tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), "before").unwrap();
    let request = FilesRequest { snapshots: SnapshotRule::Always, ..request(&tree) };
    let mut source = FilesSource::new(request, clock()).unwrap();
    fs::write(tree.join("file"), "after").unwrap();
    let mut content = Vec::new();
    while let Next::Item(item) = source.next().unwrap() {
        if item.path.name() == b"file" {
            content = mainstay_testkit::read_body(&item.body).unwrap().0;
        }
    }
    assert_eq!(content, b"before");
    assert_eq!(source.seal().unwrap().consistency, Consistency::FileSystem);
    drop(source);
    assert!(!run("lvs", &["--noheadings", "-o", "lv_name", &group.name]).contains("mainstay-snapshot"));
}

#[test]
fn always_refuses_where_there_is_nothing_to_take_a_snapshot_with() {
    if Path::new("/dev/shm").is_dir() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let request = FilesRequest { snapshots: SnapshotRule::Always, ..request(directory.path()) };
        let error = FilesSource::new(request.clone(), clock()).err().unwrap();
        assert_eq!(error.code(), mainstay_core::Code::Unsupported, "{error:?}");
        let possible = FilesRequest { snapshots: SnapshotRule::WherePossible, ..request };
        FilesSource::new(possible, clock()).unwrap();
    }
}

#[test]
fn one_file_system_keeps_mount_points_empty_and_pseudo_file_systems_are_never_entered() {
    if !rustix::process::geteuid().is_root() {
        println!("NOT RUN: only root can mount");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mounts = [("memory", ["-t", "tmpfs", "none"]), ("proc", ["-t", "proc", "none"])];
    let mounted: Vec<_> = mounts
        .iter()
        .filter_map(|(name, arguments)| Mount::new(&directory.path().join(name), arguments))
        .collect();
    if mounted.len() < 2 {
        return;
    }
    fs::write(directory.path().join("memory/file"), "in memory").unwrap();
    let names = |request: FilesRequest| {
        let root = item_path(directory.path());
        let items =
            walk(request).0.into_iter().filter(|item| item.path.is_within(&root) && item.path != root);
        items.map(|item| String::from_utf8_lossy(item.path.name()).into_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names(request(directory.path())), ["memory", "file", "proc"]);
    let alone = FilesRequest { one_file_system: true, ..request(directory.path()) };
    assert_eq!(names(alone.clone()), ["memory", "proc"]);
    // Named outright it is read, as a root of its own.
    let both =
        FilesRequest { roots: vec![directory.path().to_owned(), directory.path().join("memory")], ..alone };
    assert_eq!(names(both), ["memory", "file", "proc"]);
}
