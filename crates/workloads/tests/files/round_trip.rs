//! What a Linux file system can hold comes back as it was.

use std::os::unix::fs::MetadataExt as _;

use mainstay_core::SkipReason;
use mainstay_testkit::tree::{compare, hostile_tree};
use mainstay_workloads::files::RestoreMode;

use crate::{as_ordinary_user, backup_and_restore, inside, shared_directory};

/// Makes the hostile tree, copies it, compares, then damages nothing and finds nothing to do.
fn round_trip(directory: &std::path::Path, who: &str) {
    let (tree, target) = (directory.join("tree"), directory.join("target"));
    let absent = hostile_tree(&tree).unwrap();
    for part in &absent {
        println!("NOT RUN as {who}: {part}");
    }
    let restored = backup_and_restore(&tree, &target, RestoreMode::New);
    // The ancestors of the tree may belong to someone whose directories this user cannot make.
    let within = |path: &mainstay_core::ItemPath| path.is_within(&crate::item_path(&tree));
    let losses: Vec<_> = restored.skips.iter().filter(|skip| within(&skip.path)).collect();
    assert!(losses.is_empty(), "{losses:?}");
    assert_eq!(compare(&tree, &inside(&target, &tree)).unwrap(), Vec::<String>::new());
    assert!(restored.changes.created > 60, "{restored:?}");

    let again = backup_and_restore(&tree, &target, RestoreMode::Overwrite);
    assert_eq!((again.changes.created, again.changes.replaced), (0, 0), "{:?}", again.changes);
    assert_eq!(compare(&tree, &inside(&target, &tree)).unwrap(), Vec::<String>::new());
}

#[test]
fn a_hostile_tree_comes_back_identical_as_root() {
    if !rustix::process::geteuid().is_root() {
        println!("NOT RUN: this part needs root; the part of an ordinary user runs beside it");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    round_trip(directory.path(), "root");
}

#[test]
fn a_hostile_tree_comes_back_identical_as_an_ordinary_user() {
    let directory = shared_directory();
    as_ordinary_user(|| round_trip(directory.path(), "an ordinary user"));
}

#[test]
fn what_an_ordinary_user_cannot_read_is_a_skip_and_the_rest_is_there() {
    use std::os::unix::fs::PermissionsExt;
    let directory = shared_directory();
    as_ordinary_user(|| {
        let tree = directory.path().join("tree");
        for name in ["open", "closed"] {
            std::fs::create_dir_all(tree.join(name)).unwrap();
            std::fs::write(tree.join(name).join("file"), name).unwrap();
        }
        std::fs::write(tree.join("secret"), "secret").unwrap();
        std::fs::set_permissions(tree.join("secret"), PermissionsExt::from_mode(0o000)).unwrap();
        std::fs::set_permissions(tree.join("closed"), PermissionsExt::from_mode(0o000)).unwrap();
        let target = directory.path().join("target");
        let restored = backup_and_restore(&tree, &target, RestoreMode::New);
        let unreadable: Vec<_> = restored
            .skips
            .iter()
            .filter(|skip| skip.reason == SkipReason::Unreadable)
            .map(|skip| (String::from_utf8_lossy(skip.path.name()).into_owned(), skip.detail.as_str()))
            .collect();
        assert_eq!(unreadable.len(), 2, "{unreadable:?}");
        assert!(unreadable.iter().all(|(_, detail)| detail.contains("ermission denied")), "{unreadable:?}");
        assert_eq!(restored.counts.skipped, restored.skips.len() as u64);
        let restored = inside(&target, &tree);
        assert_eq!(std::fs::read(restored.join("open/file")).unwrap(), b"open");
        assert_eq!(restored.join("closed").metadata().unwrap().mode() & 0o7777, 0);
        assert!(!restored.join("secret").exists());
        std::fs::set_permissions(tree.join("closed"), PermissionsExt::from_mode(0o700)).unwrap();
        std::fs::set_permissions(restored.join("closed"), PermissionsExt::from_mode(0o700)).unwrap();
    });
}

/// ext4 cannot hold a time before 1901, and bends it to its first one without an error.
#[test]
fn a_time_that_the_target_cannot_hold_is_a_loss_in_words() {
    use mainstay_core::{ItemPath, Target as _, Time};
    use mainstay_testkit::{Part, TestItem};
    let directory = tempfile::tempdir().unwrap();
    let mut target =
        mainstay_workloads::files::FilesTarget::new(crate::plan(directory.path(), RestoreMode::New)).unwrap();
    let mut item = TestItem::file(ItemPath::new("file").unwrap(), vec![Part::Bytes(b"old".to_vec())]);
    item.metadata.modified = Time::from_seconds(-4_000_000_000);
    target.put(item.to_item()).unwrap();
    let (_, restored) = Box::new(target).finish(&crate::captured()).unwrap();
    let kept = directory.path().join("file").metadata().unwrap().mtime() == -4_000_000_000;
    let told = restored.skips.iter().any(|skip| skip.reason == SkipReason::Metadata);
    assert_ne!(kept, told, "{restored:?}");
}

/// What is made in a directory with a default ACL gets an ACL that nobody asked for.
#[test]
fn a_target_with_a_default_acl_lends_it_to_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (tree, target) = (directory.path().join("tree"), directory.path().join("target"));
    hostile_tree(&tree).unwrap();
    std::fs::create_dir(&target).unwrap();
    // Version 2: the owner, user 7, the group, the mask and all others may do everything.
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, id) in [(1_u16, u32::MAX), (2, 7), (4, u32::MAX), (16, u32::MAX), (32, u32::MAX)] {
        acl.extend(tag.to_le_bytes());
        acl.extend(7_u16.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    let set =
        rustix::fs::setxattr(&target, "system.posix_acl_default", &acl, rustix::fs::XattrFlags::empty());
    if let Err(errno) = set {
        println!("NOT RUN: this file system has no ACLs: {errno}");
        return;
    }
    backup_and_restore(&tree, &target, RestoreMode::New);
    assert_eq!(compare(&tree, &inside(&target, &tree)).unwrap(), Vec::<String>::new());
}
