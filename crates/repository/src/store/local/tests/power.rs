//! A power cut, on a real ext4: what was flushed is there, what was not is there whole or not at all.

use std::fs::File;
use std::process::Command;

use mainstay_testkit::Blobs;
use rustix::mount::{UnmountFlags, unmount};

use super::*;

/// `FS_IOC_SHUTDOWN` of ext4, XFS and others: the file system stops at once.
const SHUTDOWN: rustix::ioctl::Opcode = rustix::ioctl::opcode::read::<u32>(b'X', 125);
/// What the journal has not written yet is lost.
const WITHOUT_FLUSHING_THE_JOURNAL: u32 = 2;

fn cut_the_power(mounted: &Path) {
    let directory = File::open(mounted).unwrap();
    #[expect(unsafe_code, reason = "no safe wrapper knows this call")]
    // SAFETY: the call reads one u32 through the pointer, and that is what it is given.
    unsafe {
        let cut = rustix::ioctl::Setter::<SHUTDOWN, u32>::new(WITHOUT_FLUSHING_THE_JOURNAL);
        rustix::ioctl::ioctl(&directory, cut).unwrap();
    }
}

#[expect(clippy::disallowed_methods, reason = "the test makes and mounts a file system")]
fn run(program: &str, arguments: &[&str], paths: &[&Path]) {
    let needed = "this needs mkfs.ext4, mount and a free loop device; `cargo xtask setup` tells more";
    let status = Command::new(program).args(arguments).args(paths).status().expect(needed);
    assert!(status.success(), "{program} failed; {needed}");
}

/// What is there after `work` was done and the power was cut.
fn after_a_power_cut(
    publish: Publish,
    image: &Path,
    mounted: &Path,
    work: impl FnOnce(&LocalStore),
) -> Blobs {
    run("mount", &["-o", "loop"], &[image, mounted]);
    let store = publishing(LocalStore::open(mounted).unwrap(), publish);
    work(&store);
    cut_the_power(mounted);
    drop(store);
    unmount(mounted, UnmountFlags::empty()).unwrap();
    run("mount", &["-o", "loop"], &[image, mounted]);
    let blobs = snapshot_of(&LocalStore::open(mounted).unwrap()).unwrap();
    unmount(mounted, UnmountFlags::empty()).unwrap();
    blobs
}

/// A cut comes right after the last call of each step: any later sync would make the earlier ones durable too.
fn survives_power_cuts(publish: Publish, image: &Path, mounted: &Path) {
    File::create(image).unwrap().set_len(64 << 20).unwrap();
    run("mkfs.ext4", &["-q", "-F"], &[image]);
    let bytes = Rng::new(4).bytes(300_000);
    let after = |work: &dyn Fn(&LocalStore)| after_a_power_cut(publish, image, mounted, work);
    let blobs = after(&|store| {
        for number in 0..20 {
            store.put_new(&format!("pack/{}/{number}", number % 3), &[&bytes]).unwrap();
        }
        store.flush().unwrap();
    });
    assert_eq!(blobs.len(), 20, "{publish:?}: a flushed blob is gone");
    assert!(blobs.values().all(|blob| **blob == bytes), "{publish:?}: a flushed blob is torn");
    let blobs = after(&|store| {
        store.delete("pack/0/0").unwrap();
        store.flush().unwrap();
    });
    assert!(!blobs.contains_key("pack/0/0"), "{publish:?}: what was deleted before the flush came back");
    let blobs = after(&|store| assert_eq!(store.put_new("log/1", &[&bytes]).unwrap(), Put::Created));
    assert!(blobs.get("log/1").is_none_or(|blob| **blob == bytes), "{publish:?}: an unflushed blob is torn");
    assert_eq!(blobs.len() - usize::from(blobs.contains_key("log/1")), 19);
}

#[test]
fn what_was_flushed_survives_power_cuts() {
    let directory = tempfile::tempdir().unwrap();
    let (image, mounted) = (directory.path().join("image"), directory.path().join("mounted"));
    std::fs::create_dir(&mounted).unwrap();
    with_own_mounts(|| {
        for publish in [Publish::Unnamed, Publish::Link, Publish::Rename] {
            survives_power_cuts(publish, &image, &mounted);
        }
    });
}
