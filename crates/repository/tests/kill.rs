//! Processes that write, expire and collect in a directory, and are killed: a hundred times in a row, on one
//! repository.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on says where")]
#![allow(clippy::allow_attributes, reason = "as in the harness")]

mod common;
mod harness;

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io::Write as _;
use std::ops::Range;
use std::panic::catch_unwind;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use common::{clock, compare, restore, try_backup};
use harness::{check_packs, collect, collect_all, files, open, small, verify};
use mainstay_core::{BlobStore, Capabilities, Listed, PointId, Put, Result, Time};
use mainstay_repository::Repository;
use mainstay_repository::keys::KeyRing;
use mainstay_repository::store::LocalStore;
use mainstay_testkit::{Rng, TestItem};

/// In the working directory of the child: the medium, what opens it, and what the child knows to be done.
const MEDIUM: &str = "medium";
const KEY: &str = "key";
const TOLD: &str = "told";
/// There when the child's medium is to forget.
const FORGETFUL: &str = "forgetful";

fn items(seed: u64) -> Vec<TestItem> {
    let mut rng = Rng::new(seed);
    let versions = (0..5).map(|_| if rng.chance(25) { 1000 + seed } else { rng.range(1..6) });
    files(&versions.collect::<Vec<_>>(), 12_000)
}

fn medium(directory: &Path) -> Arc<dyn BlobStore> {
    Arc::new(LocalStore::open(&directory.join(MEDIUM)).unwrap())
}

fn ring_in(directory: &Path) -> KeyRing {
    KeyRing::decode(&std::fs::read(directory.join(KEY)).unwrap()).unwrap()
}

fn open_in(directory: &Path) -> Repository {
    open(medium(directory), &ring_in(directory), &clock()).unwrap()
}

/// One line, durable when this returns.
fn tell(told: &mut File, line: &str) {
    told.write_all(format!("{line}\n").as_bytes()).unwrap();
    told.sync_data().unwrap();
}

/// A medium that keeps the last few packs in memory and says that they are stored: killing the process loses them.
struct Forgetful {
    inner: Arc<dyn BlobStore>,
    packs: Mutex<VecDeque<(String, Vec<u8>)>>,
}

impl Forgetful {
    fn packs(&self) -> MutexGuard<'_, VecDeque<(String, Vec<u8>)>> {
        self.packs.lock().unwrap()
    }

    fn kept(&self, name: &str) -> Option<Vec<u8>> {
        self.packs().iter().find(|(kept, _)| kept == name).map(|(_, bytes)| bytes.clone())
    }
}

impl BlobStore for Forgetful {
    fn put_new(&self, name: &str, parts: &[&[u8]]) -> Result<Put> {
        if !name.starts_with("pack/") {
            return self.inner.put_new(name, parts);
        }
        let mut packs = self.packs();
        packs.push_back((name.to_owned(), parts.concat()));
        while packs.len() > 4 {
            let (name, bytes) = packs.pop_front().unwrap();
            self.inner.put_new(&name, &[&bytes])?;
        }
        Ok(Put::Created)
    }

    fn get(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>> {
        match self.kept(name) {
            Some(bytes) => Ok(bytes[range.start as usize..range.end as usize].to_vec()),
            None => self.inner.get(name, range),
        }
    }

    fn size(&self, name: &str) -> Result<u64> {
        self.kept(name).map_or_else(|| self.inner.size(name), |bytes| Ok(bytes.len() as u64))
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        self.inner.list(prefix, each)
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.packs().retain(|(kept, _)| kept != name);
        self.inner.delete(name)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn location(&self) -> String {
        self.inner.location()
    }
}

/// What the process does that is to be killed. Its working directory tells it to; as an ordinary test it does nothing.
#[test]
fn child_that_works_until_it_is_killed() {
    let here = Path::new(".");
    if !here.join(TOLD).exists() {
        return;
    }
    let mut told = File::options().append(true).open(here.join(TOLD)).unwrap();
    // Whoever was killed before may have left half a line.
    tell(&mut told, "");
    let mut store = medium(here);
    if here.join(FORGETFUL).exists() {
        store = Arc::new(Forgetful { inner: store, packs: Mutex::default() });
    }
    let repository = open(store, &ring_in(here), &clock()).unwrap();
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).unwrap();
    let mut rng = Rng::new(u64::from_le_bytes(seed));
    loop {
        let live = repository.points().unwrap();
        match rng.range(0..10) {
            0..2 if live.len() > 6 => {
                let point = rng.pick(&live[..live.len() - 3]).id;
                tell(&mut told, &format!("expiring {point}"));
                repository.expire(&[point], "test").unwrap();
            }
            2..5 => collect(&repository).unwrap(),
            _ => {
                let seed = rng.range(0..1 << 30);
                let point = try_backup(&repository, 1, items(seed)).unwrap();
                tell(&mut told, &format!("made {point} {seed}"));
            }
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the test starts itself again, to kill it")]
fn start_child(directory: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_works_until_it_is_killed"])
        .current_dir(directory)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// The points that must be there, oldest first, with the seeds of their items.
fn acknowledged(directory: &Path) -> Vec<(PointId, u64)> {
    let told = std::fs::read_to_string(directory.join(TOLD)).unwrap();
    let mut points: Vec<(PointId, u64)> = Vec::new();
    let mut expiring = BTreeSet::new();
    // Half a line at the end was never acknowledged.
    for line in told.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["made", point, seed] => points.push((point.parse().unwrap(), seed.parse().unwrap())),
            ["expiring", point] => drop(expiring.insert(point.parse::<PointId>().unwrap())),
            _ => {}
        }
    }
    points.retain(|(point, _)| !expiring.contains(point));
    points
}

fn kill_often(here: &Path, kills: usize) {
    let ring = KeyRing::create().unwrap();
    let store = Arc::new(LocalStore::create(&here.join(MEDIUM)).unwrap());
    Repository::create(store, ring.clone(), &[], &small(&clock())).unwrap();
    std::fs::write(here.join(KEY), ring.encode()).unwrap();
    File::create(here.join(TOLD)).unwrap();
    let told = || std::fs::metadata(here.join(TOLD)).unwrap().len();
    let mut rng = Rng::new(1);
    for kill in 0..kills {
        let before = told();
        let mut child = start_child(here);
        // However slow the machine is, each one gets beyond the start.
        let mut waits = std::iter::repeat_n(Duration::from_millis(2), 30_000);
        while told() < before + 40 {
            std::thread::sleep(waits.next().expect("the child did nothing in a minute"));
        }
        std::thread::sleep(Duration::from_micros(rng.range(0..60_000)));
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success(), "the child ended by itself");
        let repository = open_in(here);
        let points = acknowledged(here);
        for (point, seed) in points.iter().rev().take(2) {
            compare(&items(*seed), &restore(&repository, point));
        }
        let listed: Vec<_> = repository.points().unwrap().iter().map(|point| point.id).collect();
        let lost = points.iter().find(|(point, _)| !listed.contains(point));
        assert_eq!(lost, None, "after kill {kill}");
    }
    let repository = open_in(here);
    collect_all(&repository).unwrap();
    let points = acknowledged(here);
    assert!(points.len() > 5, "only {} points", points.len());
    points.iter().for_each(|(point, seed)| compare(&items(*seed), &restore(&repository, point)));
    assert_eq!(verify(&repository).problems, Vec::<String>::new());
    medium(here).sweep_temporary(Time(i64::MAX)).unwrap();
    check_packs(&repository, medium(here).as_ref(), "after all kills");
}

#[test]
fn a_hundred_kills_lose_nothing() {
    let directory = tempfile::tempdir().unwrap();
    kill_often(directory.path(), 100);
}

/// The harness is shown what it must catch.
#[test]
fn a_medium_that_forgets_is_found_out() {
    let directory = tempfile::tempdir().unwrap();
    File::create(directory.path().join(FORGETFUL)).unwrap();
    assert!(catch_unwind(|| kill_often(directory.path(), 10)).is_err());
}
