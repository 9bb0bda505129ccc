//! A power cut, on a real ext4: what was flushed is there, what was not is there whole or not at all.

use std::fs::File;
use std::process::Command;

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

fn survives_a_power_cut(publish: Publish, image: &Path, mounted: &Path) {
    File::create(image).unwrap().set_len(64 << 20).unwrap();
    run("mkfs.ext4", &["-q", "-F"], &[image]);
    run("mount", &["-o", "loop"], &[image, mounted]);
    let store = publishing(LocalStore::create(mounted).unwrap(), publish);
    let bytes = Rng::new(4).bytes(300_000);
    for number in 0..20 {
        store.put_new(&format!("pack/{}/{number}", number % 3), &[&bytes]).unwrap();
    }
    store.flush().unwrap();
    store.put_new("log/1", &[b"a record"]).unwrap();
    store.flush().unwrap();
    store.delete("pack/0/0").unwrap();
    store.flush().unwrap();
    store.put_new("log/2", &[&bytes]).unwrap();
    cut_the_power(mounted);
    drop(store);
    unmount(mounted, UnmountFlags::empty()).unwrap();

    run("mount", &["-o", "loop"], &[image, mounted]);
    let blobs = snapshot_of(&LocalStore::open(mounted).unwrap()).unwrap();
    for number in 1..20 {
        assert!(*blobs[&format!("pack/{}/{number}", number % 3)] == bytes, "pack {number}");
    }
    assert_eq!(&*blobs["log/1"], b"a record");
    assert!(!blobs.contains_key("pack/0/0"), "what was deleted before a flush came back");
    assert!(blobs.get("log/2").is_none_or(|record| **record == bytes), "a torn record");
    unmount(mounted, UnmountFlags::empty()).unwrap();
}

#[test]
fn what_was_flushed_survives_a_power_cut() {
    let directory = tempfile::tempdir().unwrap();
    let (image, mounted) = (directory.path().join("image"), directory.path().join("mounted"));
    std::fs::create_dir(&mounted).unwrap();
    with_own_mounts(|| {
        for publish in [Publish::Unnamed, Publish::Link, Publish::Rename] {
            survives_a_power_cut(publish, &image, &mounted);
        }
    });
}
