//! Processes that are killed in the middle of a put, and what they leave.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::*;

const METHODS: [Publish; 3] = [Publish::Unnamed, Publish::Link, Publish::Rename];

/// The content of a blob follows from its name.
fn content(name: &str) -> Vec<u8> {
    let seed = u64::from_str_radix(split(name).1, 16).unwrap();
    Rng::new(seed).bytes(usize::try_from(seed % 300_000).unwrap())
}

/// What the process does that is to be killed. Its working directory tells it to; as an ordinary test it does nothing.
#[test]
fn child_that_writes_until_it_is_killed() {
    let here = Path::new(".");
    let Some(publish) = METHODS.into_iter().find(|publish| here.join(format!("{publish:?}")).exists()) else {
        return;
    };
    let store = publishing(LocalStore::open(here).unwrap(), publish);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let mut seed = [0; 8];
                    getrandom::fill(&mut seed).unwrap();
                    let name = format!("pack/{:02x}/{:016x}", seed[0] % 4, u64::from_le_bytes(seed));
                    let bytes = content(&name);
                    let (front, back) = bytes.split_at(bytes.len() / 2);
                    store.put_new(&name, &[front, back]).unwrap();
                }
            });
        }
    });
}

#[expect(clippy::disallowed_methods, reason = "the test starts itself again, to kill it")]
fn start_child(directory: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "store::local::tests::crash::child_that_writes_until_it_is_killed"])
        .current_dir(directory)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn kill_writers(publish: Publish) {
    let (directory, store) = new_store();
    std::fs::write(directory.path().join(format!("{publish:?}")), "").unwrap();
    let count = || snapshot_of(&store).unwrap().len();
    let mut rng = Rng::new(9);
    for _ in 0..6 {
        let before = count();
        let mut child = start_child(directory.path());
        // However slow the machine is, each round gets beyond the start.
        let mut waits = std::iter::repeat_n(Duration::from_millis(5), 6000);
        while count() == before {
            std::thread::sleep(waits.next().expect("the child wrote nothing in half a minute"));
        }
        std::thread::sleep(Duration::from_micros(rng.range(0..20_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        for (name, bytes) in &snapshot_of(&store).unwrap() {
            assert!(content(name) == **bytes, "{name} is torn: {} bytes are there", bytes.len());
        }
    }
    let left = count();
    store.sweep_temporary(Time(i64::MAX)).unwrap();
    assert_eq!(std::fs::read_dir(directory.path().join(STAGING)).unwrap().count(), 0);
    assert_eq!(count(), left);
}

#[test]
fn killed_writers_leave_whole_blobs_or_none() {
    METHODS.into_iter().for_each(kill_writers);
}

#[test]
fn a_sweep_takes_what_is_old_and_a_live_writer_that_is_hit_fails_cleanly() {
    let (directory, store) = store_with(Publish::Link);
    let staging = store.staging().unwrap();
    let temporary = staging.write(&[b"12345"]).unwrap();
    let mut names = directory.path().join(STAGING).read_dir().unwrap();
    let written = names.next().unwrap().unwrap().metadata().unwrap();
    let moment = Time::from_parts(written.mtime(), written.mtime_nsec());
    assert_eq!(store.sweep_temporary(moment).unwrap(), 0);
    assert_eq!(store.sweep_temporary(moment.plus(Duration::from_nanos(1))).unwrap(), 5);
    assert_eq!(code(staging.publish(temporary, &store.root, "a")), Some(Code::Conflict));
    assert!(snapshot_of(&store).unwrap().is_empty());
}

#[test]
fn a_name_that_is_this_very_file_was_given_by_the_first_try() {
    let (directory, store) = store_with(Publish::Link);
    let staging = store.staging().unwrap();
    let temporary = staging.write(&[b"x"]).unwrap();
    let name = directory.path().join(STAGING).read_dir().unwrap().next().unwrap().unwrap().path();
    std::fs::hard_link(name, directory.path().join("a")).unwrap();
    assert_eq!(staging.publish(temporary, &store.root, "a").unwrap(), Put::Created);
    let other = staging.write(&[b"x"]).unwrap();
    assert_eq!(staging.publish(other, &store.root, "a").unwrap(), Put::Exists);
}

#[test]
fn many_threads_and_handles_share_one_directory() {
    let (directory, first) = new_store();
    let stores = [first, LocalStore::open(directory.path()).unwrap()];
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let stores = &stores;
            scope.spawn(move || {
                for number in 0..50 {
                    let store = &stores[thread % 2];
                    let name = format!("pack/{}/{thread}-{number}", number % 8);
                    store.put_new(&name, &[&[1; 100]]).unwrap();
                    if number % 10 == 0 {
                        store.flush().unwrap();
                        stores[1 - thread % 2].delete(&name).unwrap();
                    }
                }
            });
        }
    });
    assert_eq!(snapshot_of(&stores[0]).unwrap().len(), 4 * 45);
}
