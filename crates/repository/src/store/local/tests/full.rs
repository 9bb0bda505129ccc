//! A full disk, and one that cannot be written to.

use std::process::Command;

use rustix::mount::{MountFlags, mount, mount_remount};

use super::*;

/// Runs `test` on a fresh file system of `mebibytes` that only this test sees.
fn on_small_medium(mebibytes: u64, test: impl FnOnce(&Path) + Send) {
    let directory = tempfile::tempdir().unwrap();
    with_own_mounts(|| {
        let size = std::ffi::CString::new(format!("size={mebibytes}m")).unwrap();
        mount("tmpfs", directory.path(), "tmpfs", MountFlags::empty(), size.as_c_str()).unwrap();
        test(directory.path());
    });
}

fn fill(store: &LocalStore) -> usize {
    let block = Rng::new(1).bytes(1 << 20);
    let put = |number| store.put_new(&format!("pack/{number}"), &[&block]);
    let full = (0..100).find_map(|number| Some((number, put(number).err()?)));
    let (blobs, error) = full.expect("the medium never filled");
    assert_eq!(error.code(), Code::Full, "{error:?}");
    assert!(error.next_step().unwrap().contains("mainstay expire"));
    blobs
}

fn survives_a_full_disk(publish: Publish, path: &Path) {
    let store = publishing(LocalStore::create(path).unwrap(), publish);
    let blobs = fill(&store);
    let kept = snapshot_of(&store).unwrap();
    assert_eq!(kept.len(), blobs, "the blob that did not fit is not there");
    assert_eq!(std::fs::read_dir(path.join(STAGING)).unwrap().count(), 0, "nothing is left behind");
    store.flush().unwrap();

    let again = publishing(LocalStore::open(path).unwrap(), publish);
    assert_eq!(snapshot_of(&again).unwrap(), kept);
    assert_eq!(again.reserve().unwrap(), Some(RESERVE_BYTES));
    assert!(again.release_reserve().unwrap());
    assert_eq!(again.reserve().unwrap(), Some(0));
    assert_eq!(again.put_new("log/1", &[&[7; 100_000]]).unwrap(), Put::Created);
    again.restore_reserve().unwrap();
    assert!(!path.join(RESERVE).exists(), "there is no room for a reserve yet");
    kept.keys().for_each(|name| again.delete(name).unwrap());
    again.restore_reserve().unwrap();
    assert!(path.join(RESERVE).exists());
    assert_eq!(snapshot_of(&again).unwrap().into_keys().collect::<Vec<_>>(), ["log/1"]);
}

#[test]
fn a_full_disk_takes_nothing_keeps_everything_and_can_be_emptied() {
    for publish in [Publish::Unnamed, Publish::Link, Publish::Rename, Publish::Replace] {
        on_small_medium(40, |path| survives_a_full_disk(publish, path));
    }
}

#[test]
fn a_small_medium_becomes_a_store_without_a_reserve() {
    on_small_medium(4, |path| {
        let store = LocalStore::create(path).unwrap();
        assert!(!path.join(RESERVE).exists());
        assert!(fill(&store) > 0);
    });
}

#[test]
fn a_read_only_medium_can_be_read() {
    on_small_medium(40, |path| {
        LocalStore::create(path).unwrap().put_new("a", &[b"123"]).unwrap();
        mount_remount(path, MountFlags::RDONLY, "").unwrap();
        let store = LocalStore::open(path).unwrap();
        assert_eq!(store.get_whole("a", 9).unwrap(), b"123");
        assert_eq!(snapshot_of(&store).unwrap().len(), 1);
        assert!(!store.capabilities().create_if_absent);
        assert_eq!(code(store.put_new("b", &[b"4"])), Some(Code::Io));
        store.flush().unwrap();
    });
}

/// What the limited process does. Its working directory tells it to; as an ordinary test it does nothing.
#[test]
fn child_that_may_not_write_more() {
    if !Path::new("Limited").exists() {
        return;
    }
    for publish in [Publish::Unnamed, Publish::Link, Publish::Rename] {
        let store = publishing(LocalStore::open(Path::new(".")).unwrap(), publish);
        let error = store.put_new("large", &[&[1; 400_000], &[2; 400_000]]).unwrap_err();
        assert_eq!(error.code(), Code::Full, "{error:?}");
        store.put_new(&format!("small/{publish:?}").to_lowercase(), &[&[3; 1000]]).unwrap();
    }
}

/// The full disk for those who are not root: a limit on the size of files stops a write just as abruptly.
#[test]
fn a_process_that_may_not_write_more_leaves_nothing() {
    let (directory, store) = new_store();
    std::fs::write(directory.path().join("Limited"), "").unwrap();
    #[expect(clippy::disallowed_methods, reason = "the test starts itself again under a limit")]
    let status = Command::new("sh")
        .args(["-c", r#"trap "" XFSZ; ulimit -f 512; exec "$0" "$@""#])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "store::local::tests::full::child_that_may_not_write_more"])
        .current_dir(directory.path())
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    let names: Vec<_> = snapshot_of(&store).unwrap().into_keys().collect();
    assert_eq!(names, ["small/link", "small/rename", "small/unnamed"]);
    assert_eq!(std::fs::read_dir(directory.path().join(STAGING)).unwrap().count(), 0);
}
