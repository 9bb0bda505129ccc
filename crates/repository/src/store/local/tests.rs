use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::UnshareFlags;

use mainstay_testkit::{Rng, blob_store_suite, snapshot_of};
use tempfile::TempDir;

use super::reserve::{RESERVE, RESERVE_BYTES};
use super::*;

mod crash;
mod full;
mod power;

blob_store_suite!(conformance, || {
    let directory = tempfile::tempdir().unwrap();
    let store = LocalStore::create(&directory.path().join("repository")).unwrap();
    (directory, store)
});
blob_store_suite!(conformance_of_links, || store_with(Publish::Link));
blob_store_suite!(conformance_of_renames, || store_with(Publish::Rename));
blob_store_suite!(conformance_without_atomic_names, || store_with(Publish::Replace));

/// A store that names its blobs in the given way, though this file system can do better.
fn store_with(publish: Publish) -> (TempDir, LocalStore) {
    let directory = tempfile::tempdir().unwrap();
    let store = publishing(LocalStore::create(directory.path()).unwrap(), publish);
    (directory, store)
}

fn publishing(store: LocalStore, publish: Publish) -> LocalStore {
    let staging = OnceLock::from(Staging::with(&store.root, publish).unwrap());
    LocalStore { staging, ..store }
}

/// Runs `test` on a thread whose mounts nobody else sees and which end with it. That takes a privilege; without it
/// the test says so, and nothing more can be done here.
fn with_own_mounts(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            #[expect(unsafe_code, reason = "a mount that only this thread sees needs this call")]
            // SAFETY: only the mount namespace and the working directory of this new thread part from the others'.
            // File descriptors stay shared.
            let parted = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) };
            if parted == Err(Errno::PERM) {
                println!("NOT RUN: mounting a small file system needs a privilege; run this test as root");
                return;
            }
            parted.unwrap();
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
            test();
        });
    });
}

fn new_store() -> (TempDir, LocalStore) {
    let directory = tempfile::tempdir().unwrap();
    let store = LocalStore::create(directory.path()).unwrap();
    (directory, store)
}

fn code<T>(result: Result<T>) -> Option<Code> {
    result.err().map(|error| error.code())
}

#[test]
fn this_file_system_needs_no_temporary_names_and_the_medium_decides() {
    let (_directory, store) = new_store();
    assert_eq!(store.staging().unwrap().publish, Publish::Unnamed);
    assert!(store.capabilities().create_if_absent);
    let (_directory, poor) = store_with(Publish::Replace);
    assert!(!poor.capabilities().create_if_absent);
}

#[test]
fn only_the_owner_reads_and_nobody_writes_again() {
    let (directory, store) = new_store();
    store.put_new("pack/d/1", &[b"x"]).unwrap();
    let mode = |name: &str| directory.path().join(name).metadata().unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("pack"), mode("pack/d"), mode("pack/d/1")), (0o700, 0o700, 0o400));
    let inside = directory.path().join("made");
    LocalStore::create(&inside).unwrap();
    assert_eq!(inside.metadata().unwrap().permissions().mode() & 0o7777, 0o700);
}

#[test]
fn only_an_empty_directory_or_a_store_becomes_a_store() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    assert_eq!(code(LocalStore::open(&at("absent"))), Some(Code::NoRepository));
    std::fs::write(at("file"), "mine").unwrap();
    assert_eq!(code(LocalStore::open(&at("file"))), Some(Code::NoRepository));
    assert_eq!(code(LocalStore::create(directory.path())), Some(Code::Refused));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "a refusal writes nothing");
    std::fs::create_dir_all(at("disk/lost+found")).unwrap();
    LocalStore::create(&at("disk")).unwrap().put_new("a", &[b"1"]).unwrap();
    let again = LocalStore::create(&at("disk")).unwrap();
    assert_eq!(snapshot_of(&again).unwrap().into_keys().collect::<Vec<_>>(), ["a"]);
    assert_eq!(code(LocalStore::create(&at("no/parent"))), Some(Code::NotFound));
}

#[test]
fn nothing_is_reached_through_symbolic_links_or_special_files() {
    let (directory, store) = new_store();
    let elsewhere = tempfile::tempdir().unwrap();
    std::fs::write(elsewhere.path().join("secret"), "secret").unwrap();
    symlink(elsewhere.path(), directory.path().join("dir")).unwrap();
    symlink(elsewhere.path().join("secret"), directory.path().join("link")).unwrap();
    symlink("nowhere", directory.path().join("dangling")).unwrap();
    rustix::fs::mknodat(CWD, directory.path().join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    for name in ["dir/secret", "link", "dangling", "fifo"] {
        assert_eq!(code(store.get(name, 0..1)), Some(Code::Integrity), "{name}");
        assert_eq!(code(store.put_new(name, &[b"x"])), Some(Code::Integrity), "{name}");
    }
    assert_eq!(code(store.delete("dir/secret")), Some(Code::Integrity));
    assert_eq!(std::fs::read(elsewhere.path().join("secret")).unwrap(), b"secret");
    assert!(snapshot_of(&store).unwrap().is_empty());
    store.delete("link").unwrap();
    assert!(elsewhere.path().join("secret").exists());
}

#[test]
fn a_name_is_a_blob_or_a_directory() {
    let (_directory, store) = new_store();
    store.put_new("a/b", &[]).unwrap();
    assert_eq!(code(store.put_new("a", &[])), Some(Code::Bug));
    assert_eq!(code(store.put_new("a/b/c", &[])), Some(Code::Bug));
}

#[test]
fn foreign_files_are_not_listed() {
    let (directory, store) = new_store();
    store.put_new("a", &[b"1"]).unwrap();
    for name in ["README.TXT", ".hidden", "a b"] {
        std::fs::write(directory.path().join(name), "x").unwrap();
    }
    std::fs::create_dir_all(directory.path().join("lost+found/deep")).unwrap();
    assert_eq!(snapshot_of(&store).unwrap().into_keys().collect::<Vec<_>>(), ["a"]);
}

#[test]
fn a_listing_dates_and_measures() {
    let (directory, store) = new_store();
    store.put_new("a", &[b"123"]).unwrap();
    let stat = directory.path().join("a").metadata().unwrap();
    let mut all = Vec::new();
    store
        .list("a", &mut |listed| {
            all.push(listed);
            Ok(())
        })
        .unwrap();
    let modified = Time::from_parts(stat.mtime(), stat.mtime_nsec());
    assert_eq!(all, [Listed { name: "a".into(), size: 3, modified }]);
}

#[test]
fn the_reserve_is_really_allocated_and_mended() {
    let (directory, store) = new_store();
    let reserve = directory.path().join(RESERVE);
    let allocated = || reserve.metadata().map_or(0, |stat| stat.blocks() * 512);
    assert!(allocated() >= RESERVE_BYTES);
    assert!(store.release_reserve().unwrap());
    assert_eq!(allocated(), 0);
    std::fs::write(&reserve, "the process died while it set this aside").unwrap();
    store.restore_reserve().unwrap();
    assert!(allocated() >= RESERVE_BYTES);
}

#[test]
fn flush_syncs_every_directory_that_a_new_name_hangs_on_once() {
    let (_directory, store) = new_store();
    let dirty = || store.directories.lock().unwrap().dirty.iter().cloned().collect::<Vec<_>>();
    assert_eq!(dirty(), [""; 0]);
    store.put_new("pack/d/1", &[]).unwrap();
    assert_eq!(dirty(), ["", "pack", "pack/d"]);
    store.flush().unwrap();
    assert_eq!(dirty(), [""; 0]);
    store.put_new("pack/d/2", &[]).unwrap();
    assert_eq!(dirty(), ["pack/d"]);
    store.flush().unwrap();
    assert_eq!(store.put_new("pack/d/2", &[]).unwrap(), Put::Exists);
    assert_eq!(dirty(), ["pack/d"], "whoever finds a name taken may build on it");
    store.flush().unwrap();
    store.delete("pack/d/2").unwrap();
    assert_eq!(dirty(), ["pack/d"]);
}

#[test]
fn after_a_failed_flush_no_flush_succeeds() {
    let (directory, store) = new_store();
    store.put_new("a/b", &[]).unwrap();
    std::fs::remove_file(directory.path().join("a/b")).unwrap();
    std::fs::remove_dir(directory.path().join("a")).unwrap();
    symlink("/", directory.path().join("a")).unwrap();
    assert_eq!(code(store.flush()), Some(Code::Integrity));
    std::fs::remove_file(directory.path().join("a")).unwrap();
    assert_eq!(code(store.flush()), Some(Code::Io));
}
