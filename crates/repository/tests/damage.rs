//! Goal: whatever happens to stored bytes, no wrong data comes out, nothing panics, and `verify` says what is wrong.
//!
//! Method: every object of a small repository is lost, cut short, changed byte by byte, exchanged with others of its
//! kind; the whole store is rolled back. After each, another process opens it, restores everything and verifies. What
//! is restored equals what was stored, or an error says why not.

#![expect(clippy::panic, reason = "a test says which damage it was")]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use common::sample::{PASSPHRASE, Sample};
use common::{Bench, copy, open_store, options, try_restore};
use mainstay_core::{Code, ItemPath, PointId, Result, Silent};
use mainstay_repository::{Repository, Unlock, VerifyReport, VerifyScope};
use mainstay_testkit::{Arrived, Blobs, MemoryStore, Rng, TestItem, VecTarget, read_body};

type Lost = BTreeSet<(ItemPath, PointId)>;

/// What came of a damaged store.
struct Seen {
    /// Points that could not be read at all, and items of others.
    points: BTreeSet<PointId>,
    items: Lost,
    /// `None` when it could not even be opened.
    report: Option<VerifyReport>,
}

impl Seen {
    fn is_whole(&self) -> bool {
        self.report.is_some() && self.points.is_empty() && self.items.is_empty()
    }

    fn is_noticed(&self) -> bool {
        self.report.as_ref().is_none_or(|report| !report.problems.is_empty() || !report.degraded.is_empty())
    }
}

fn store(blobs: &Blobs) -> Arc<MemoryStore> {
    Arc::new(MemoryStore::from_blobs(blobs.clone()))
}

fn with(blobs: &Blobs, name: &str, bytes: Option<Vec<u8>>) -> Blobs {
    let mut changed = blobs.clone();
    match bytes {
        Some(bytes) => changed.insert(name.to_owned(), bytes.into()),
        None => changed.remove(name),
    };
    changed
}

fn open(sample: &Sample, blobs: &Blobs) -> Result<Repository> {
    open_store(store(blobs), &sample.ring, &sample.clock)
}

/// Restores everything there is. Panics when something comes back other than it went in.
fn restore_all(sample: &Sample, blobs: &Blobs, repository: &Repository, seen: &mut Seen, what: &str) {
    for (id, items) in &sample.points {
        match try_restore(repository, id) {
            Ok(got) => {
                let wanted = items.iter().map(Arrived::from);
                let (there, lost): (Vec<_>, Vec<_>) =
                    wanted.partition(|wanted| got.items.iter().any(|item| item.path == wanted.path));
                assert!(got.items == there, "{what}: point {id} came back other than it was");
                for Arrived { path, .. } in lost {
                    let said = got.skips.iter().any(|skip| path.is_within(&skip.path));
                    assert!(said, "{what}: {path} of point {id} is lost without a word");
                    seen.items.insert((path, *id));
                }
            }
            Err(error) => {
                assert!(!error.chain().join("").is_empty() && error.code() != Code::Bug, "{what}: {error:?}");
                restore_one_by_one(sample, blobs, *id, items, seen, what);
            }
        }
    }
}

fn restore_one_by_one(
    sample: &Sample,
    blobs: &Blobs,
    id: PointId,
    items: &[TestItem],
    seen: &mut Seen,
    what: &str,
) {
    let Ok(reader) = open(sample, blobs).and_then(|repository| repository.read(&id)) else {
        seen.points.insert(id);
        return;
    };
    let (entries, damaged): (Vec<_>, Vec<_>) = reader.walk(&ItemPath::root()).partition(Result::is_ok);
    let entries: Vec<_> = entries.into_iter().flatten().collect();
    for item in items {
        let Some(entry) = entries.iter().find(|entry| entry.path == item.path) else {
            assert!(!damaged.is_empty(), "{what}: {} of point {id} is lost without a word", item.path);
            seen.items.insert((item.path.clone(), id));
            continue;
        };
        assert!(entry.metadata == item.metadata, "{what}: {} came back as {entry:?}", item.path);
        let body = || {
            let mut source = reader.source(vec![entry.path.clone()])?;
            let mut found = Vec::new();
            while let mainstay_core::Next::Item(got) = mainstay_core::Source::next(&mut source)? {
                if got.path == entry.path {
                    found = read_body(&got.body)?.0;
                }
            }
            Ok::<_, mainstay_core::Error>(found)
        };
        match body() {
            Ok(bytes) => assert!(bytes == item.bytes(), "{what}: {} has other content", item.path),
            Err(_in_words) => {
                seen.items.insert((item.path.clone(), id));
            }
        }
    }
}

fn inspect(sample: &Sample, blobs: &Blobs, what: &str) -> Seen {
    let mut seen = Seen { points: BTreeSet::new(), items: Lost::new(), report: None };
    let Ok(repository) = open(sample, blobs) else { return seen };
    let _listed_or_said_why_not = repository.points();
    restore_all(sample, blobs, &repository, &mut seen, what);
    let scope = VerifyScope { read_data: true, ..VerifyScope::default() };
    let report = open(sample, blobs).and_then(|repository| repository.verify(&scope, &Silent));
    seen.report = Some(report.unwrap_or_else(|error| panic!("{what}: verify gave up: {error:?}")));
    seen
}

/// What every damage must meet.
fn check(sample: &Sample, blobs: &Blobs, what: &str) -> Seen {
    let seen = inspect(sample, blobs, what);
    assert!(seen.is_noticed(), "{what}: nobody noticed");
    if let Some(report) = &seen.report {
        let words = (&report.problems, &report.degraded);
        assert!(seen.is_whole() || !report.problems.is_empty(), "{what}: called whole: {words:?}");
        for point in &seen.points {
            assert!(!report.sound.contains(point), "{what}: lost point {point} is called sound");
        }
        let named: Lost = report
            .lost
            .iter()
            .flat_map(|(path, points)| points.iter().map(move |point| (path.clone(), *point)))
            .collect();
        let is_in = |(item, point): &(ItemPath, PointId), (named, within): &(ItemPath, PointId)| {
            point == within && item.is_within(named)
        };
        for item in &seen.items {
            assert!(
                named.iter().any(|named| is_in(item, named)),
                "{what}: {item:?} is lost, named are {named:?}"
            );
        }
        // Not a point that is back because the record of its expiry is lost.
        let restored = |point: &PointId| {
            !seen.points.contains(point) && sample.points.iter().any(|(known, _)| known == point)
        };
        for lost in named.iter().filter(|(_, point)| restored(point)) {
            let really = seen.items.iter().any(|item| is_in(item, lost));
            assert!(really, "{what}: named as lost but restored: {lost:?}; {words:?}");
        }
    }
    seen
}

fn kind_of(name: &str) -> String {
    name.trim_start_matches("copy/").split(['/', '.']).next().unwrap_or_default().to_owned()
}

#[test]
fn the_sample_is_whole_and_has_every_kind_of_object() {
    let sample = Sample::new(1);
    let kinds: BTreeSet<_> = sample.blobs.keys().map(|name| kind_of(name)).collect();
    let all = ["config", "index", "keys", "log", "pack", "points"].map(str::to_owned);
    assert_eq!(kinds, BTreeSet::from(all));
    let seen = inspect(&sample, &sample.blobs, "untouched");
    let report = seen.report.as_ref().unwrap();
    assert_eq!((&report.problems, &report.degraded), (&Vec::new(), &Vec::new()));
    assert!(seen.is_whole());
    assert_eq!(report.sound.len(), sample.points.len());
}

#[test]
fn every_object_lost_or_cut_short() {
    let sample = Sample::with_repacked_pack(2);
    for (name, bytes) in &sample.blobs {
        check(&sample, &with(&sample.blobs, name, None), &format!("{name} is lost"));
        let length = bytes.len();
        for cut in [0, 1, length / 3, length - length / 3, length - 65, length - 1] {
            let short = with(&sample.blobs, name, Some(bytes[..cut].to_vec()));
            check(&sample, &short, &format!("{name} of {length} bytes is cut to {cut}"));
        }
        let longer = [&bytes[..], b"x"].concat();
        check(&sample, &with(&sample.blobs, name, Some(longer)), &format!("{name} is longer"));
    }
}

/// One damaged page of a large tree.
#[test]
fn what_is_behind_a_damaged_page_comes_back() {
    let bench = Bench::new(0);
    let mut items = Vec::new();
    for directory in 0..20 {
        let path = |rest: String| ItemPath::new(format!("directory-{directory:02}{rest}")).unwrap();
        items.push(TestItem::directory(path(String::new())));
        items.extend((0..500).map(|number| {
            let mut item = TestItem::directory(path(format!("/{number:03}")));
            // Does not compress, so that each page has bytes of its own to damage.
            item.metadata.xattrs = vec![(b"user.x".to_vec(), Rng::new(directory * 1000 + number).bytes(90))];
            item
        }));
    }
    let point = common::backup(&bench.repository, items.clone());
    let wanted: Vec<_> = items.iter().map(Arrived::from).collect();
    let blobs = bench.store.snapshot();
    let (pack, bytes) = blobs
        .iter()
        .filter(|(name, _)| name.starts_with("pack/"))
        .max_by_key(|(_, bytes)| bytes.len())
        .unwrap();
    for at in [bytes.len() / 8, bytes.len() / 2] {
        let mut changed = bytes.to_vec();
        changed[at] ^= 1;
        let damaged = store(&with(&blobs, pack, Some(changed)));
        let open = || open_store(damaged.clone(), &bench.ring, &bench.clock).unwrap();
        let got = try_restore(&open(), &point).unwrap();
        assert!(got.items.len() > wanted.len() / 2 && got.items.len() < wanted.len(), "{}", got.items.len());
        assert!(!got.skips.is_empty());
        let lost = |path: &ItemPath| got.skips.iter().any(|skip| path.is_within(&skip.path));
        let mut there = got.items.iter();
        for item in &wanted {
            if there.as_slice().first() == Some(item) {
                there.next();
            } else {
                assert!(lost(&item.path), "{} is lost without a word", item.path);
            }
        }
        assert_eq!(there.next(), None, "something came back other than it was");
        // One selected item that is lost does not cost another one.
        let whole = &got.items.last().unwrap().path;
        let missing = wanted.iter().find(|item| !got.items.contains(item)).unwrap();
        let source = open().read(&point).unwrap().source(vec![missing.path.clone(), whole.clone()]).unwrap();
        let some = copy(Box::new(source), Box::new(VecTarget::new())).unwrap();
        assert!(some.items.iter().any(|item| item.path == *whole), "{:?}", some.items);
        assert!(some.skips.iter().any(|skip| missing.path == skip.path), "{:?}", some.skips);
        let report = open().verify(&VerifyScope::default(), &Silent).unwrap();
        assert!(report.sound.is_empty() && !report.problems.is_empty());
        let named: Vec<_> = report.lost.keys().collect();
        assert!(got.skips.iter().all(|skip| named.contains(&&skip.path)), "{named:?}");
    }
}

#[test]
fn every_object_and_its_copies_lost() {
    let sample = Sample::with_repacked_pack(3);
    for name in sample.blobs.keys().filter(|name| !name.starts_with("copy/")) {
        let mut blobs = sample.blobs.clone();
        let base = name.trim_end_matches(['0', '1', '2']);
        blobs.retain(|other, _| match base {
            "config." => !other.starts_with("config."),
            _ => other != name && *other != format!("copy/{name}"),
        });
        let what = format!("{name} and its copies are lost");
        let newest = sample.blobs.keys().rfind(|name| name.starts_with("log/"));
        if kind_of(name) == "keys" || Some(name) == newest {
            // As if the slot had been removed, or the record never written; only who remembers can tell.
            inspect(&sample, &blobs, &what);
            continue;
        }
        let seen = check(&sample, &blobs, &what);
        let live = |(id, _): &(PointId, Vec<TestItem>)| name.ends_with(&id.to_string());
        let needed = base == "config." || sample.points.iter().any(live);
        assert!(!needed || !seen.is_whole(), "{what}, and nothing is missing");
    }
}

/// Opens and verifies, without restoring.
fn check_noticed(sample: &Sample, blobs: &Blobs, read_data: bool, what: &str) {
    let Ok(repository) = open(sample, blobs) else { return };
    let scope = VerifyScope { read_data, ..VerifyScope::default() };
    let report = repository.verify(&scope, &Silent).unwrap_or_else(|error| panic!("{what}: {error:?}"));
    assert!(!report.problems.is_empty() || !report.degraded.is_empty(), "{what}: nobody noticed");
}

/// Changes bytes of every object of a kind: all of them where that is what `every` says, else some. Each change must
/// be noticed; after some of them everything is restored too.
fn flips(seed: u64, kind: &str, every: usize) {
    let sample = Sample::new(seed);
    let mut rng = Rng::new(seed);
    for (name, bytes) in sample.blobs.iter().filter(|(name, _)| kind_of(name) == kind) {
        let mut at = rng.below(every);
        while at < bytes.len() {
            let mut changed = bytes.to_vec();
            changed[at] ^= 1 << rng.below(8);
            let blobs = with(&sample.blobs, name, Some(changed));
            let what = format!("seed {seed}: {name} is changed at {at}");
            if rng.chance(4) {
                check(&sample, &blobs, &what);
            } else {
                check_noticed(&sample, &blobs, kind == "pack", &what);
            }
            at += 1 + rng.below(2 * every - 1);
        }
    }
}

#[expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]
/// Damages a pack so that its parity can make it good; then everything comes back, the damage is told of, and a pack
/// without damage stands in its place after that.
fn check_made_good(sample: &Sample, name: &str, bytes: Vec<u8>, what: &str) {
    let blobs = with(&sample.blobs, name, Some(bytes));
    let seen = check(sample, &blobs, what);
    let report = seen.report.as_ref().unwrap();
    assert!(seen.is_whole() && report.problems.is_empty(), "{what}: {:?}", report.problems);
    let medium = store(&blobs);
    let open = || open_store(medium.clone(), &sample.ring, &sample.clock).unwrap();
    let all = VerifyScope { read_data: true, ..VerifyScope::default() };
    let report = open().verify(&all, &Silent).unwrap();
    let redundant =
        report.degraded.iter().all(|what| what.contains("one of its") || what.contains("its header"));
    assert_eq!(open().set_aside(&report, &Silent).unwrap() == 0, redundant, "{what}: {:?}", report.degraded);
    if !redundant {
        let report = open().verify(&all, &Silent).unwrap();
        assert_eq!((&report.problems, &report.degraded), (&Vec::new(), &Vec::new()), "{what}");
    }
}

#[test]
fn what_parity_covers_is_made_good_wherever_it_is_damaged() {
    let sample = Sample::with_parity(13);
    let mut rng = Rng::new(13);
    for (name, bytes) in sample.blobs.iter().filter(|(name, _)| kind_of(name) == "pack") {
        let length = bytes.len();
        let mut at = rng.below(700);
        while at < length {
            let mut changed = bytes.to_vec();
            changed[at] ^= 1 << rng.below(8);
            check_made_good(&sample, name, changed, &format!("{name} is changed at {at} of {length}"));
            at += 1 + rng.below(1400);
        }
        // What a bad sector takes.
        for sector in (0..length).step_by(4096).filter(|_| length > 3 * 4096) {
            let mut changed = bytes.to_vec();
            changed[sector..(sector + 4096).min(length)].fill(0);
            let what = format!("{name} has lost the sector at {sector} of {length}");
            check_made_good(&sample, name, changed, &what);
        }
    }
}

#[test]
fn what_is_beyond_parity_is_lost_and_named() {
    let sample = Sample::with_parity(14);
    for (name, bytes) in sample.blobs.iter().filter(|(name, _)| kind_of(name) == "pack") {
        for lost in [0..bytes.len() / 2, bytes.len() / 4..bytes.len(), 0..bytes.len()] {
            let mut changed = bytes.to_vec();
            changed[lost.clone()].fill(0x5a);
            let what = format!("{name} of {} bytes has lost {lost:?}", bytes.len());
            let blobs = with(&sample.blobs, name, Some(changed));
            check(&sample, &blobs, &what);
        }
    }
}

#[test]
fn bytes_of_the_configuration_changed() {
    flips(4, "config", 1);
}

#[test]
fn bytes_of_the_log_changed() {
    flips(5, "log", 8);
}

#[test]
fn bytes_of_points_changed() {
    flips(6, "points", 16);
}

#[test]
fn bytes_of_packs_changed() {
    flips(7, "pack", 60);
}

#[test]
fn bytes_of_index_runs_changed() {
    flips(8, "index", 2);
}

#[test]
fn bytes_of_key_slots_changed() {
    let sample = Sample::new(9);
    let mut rng = Rng::new(9);
    flips(9, "keys", 8);
    let slots: Vec<_> = sample.blobs.iter().filter(|(name, _)| name.starts_with("keys/")).collect();
    for (name, bytes) in slots {
        for at in (0..bytes.len()).step_by(3) {
            let mut changed = bytes.to_vec();
            changed[at] ^= 1 << rng.below(8);
            let one = with(&sample.blobs, name, Some(changed.clone()));
            let both = with(&one, &format!("copy/{name}"), Some(changed));
            let unlocks = [Unlock::Passphrase(PASSPHRASE), Unlock::Kit(&sample.kit)];
            for unlock in &unlocks {
                Repository::open(store(&one), unlock, &options(&sample.clock))
                    .unwrap_or_else(|error| panic!("{name} at {at}: its copy is whole: {error:?}"));
            }
            // One of the two still opens.
            let opened = unlocks
                .iter()
                .filter(|unlock| Repository::open(store(&both), unlock, &options(&sample.clock)).is_ok());
            assert_eq!(opened.count(), 1, "{name} at {at}");
        }
    }
}

#[test]
fn every_object_in_the_place_of_every_other_of_its_kind() {
    let sample = Sample::new(10);
    for (name, bytes) in &sample.blobs {
        for (other, other_bytes) in &sample.blobs {
            if name < other && kind_of(name) == kind_of(other) && bytes != other_bytes {
                let swapped = with(&sample.blobs, name, Some(other_bytes.to_vec()));
                let what = format!("{name} is {other}");
                check(&sample, &swapped, &what);
                let swapped = with(&swapped, other, Some(bytes.to_vec()));
                check(&sample, &swapped, &format!("{what} and the other way round"));
            }
        }
    }
}

#[test]
fn a_store_that_was_rolled_back_is_refused_by_whoever_saw_more() {
    let sample = Sample::new(11);
    // What was written a moment ago might be lost in a power cut.
    sample.clock.advance(Duration::from_secs(120));
    let state = tempfile::tempdir().unwrap();
    let mut options = options(&sample.clock);
    options.state = Some(state.path().to_owned());
    let ring = Unlock::Ring(Box::new(sample.ring.clone()));
    Repository::open(store(&sample.blobs), &ring, &options).unwrap();
    for (step, old) in sample.history.iter().enumerate() {
        let opened = Repository::open(store(old), &ring, &options).map(drop);
        if old == &sample.blobs {
            opened.unwrap();
            continue;
        }
        let error = opened.unwrap_err();
        assert_eq!(error.code(), Code::Integrity, "step {step}: {error:?}");
        assert!(error.to_string().contains("rolled back"), "{error}");
        // An old log that went on elsewhere, beyond what was seen here, is another log.
        let fork = store(old);
        let elsewhere = open_store(Arc::clone(&fork) as _, &sample.ring, &sample.clock).unwrap();
        for _ in 0..30 {
            elsewhere.revoke_writer(&mainstay_core::Id16::default()).unwrap_err();
            elsewhere.add_writer("somebody", mainstay_repository::Role::WriteOnly).unwrap();
        }
        let error = Repository::open(fork, &ring, &options).map(drop).unwrap_err();
        assert!(error.to_string().contains("rolled back"), "step {step}: {error}");
    }
    Repository::open(store(&sample.blobs), &ring, &options).unwrap();
}

#[test]
fn a_record_that_a_power_cut_took_is_no_rollback() {
    let sample = Sample::new(12);
    sample.clock.advance(Duration::from_secs(120));
    let state = tempfile::tempdir().unwrap();
    let mut options = options(&sample.clock);
    options.state = Some(state.path().to_owned());
    let ring = Unlock::Ring(Box::new(sample.ring.clone()));
    let medium = store(&sample.blobs);
    let open = |medium: Arc<MemoryStore>| Repository::open(medium, &ring, &options).map(drop);
    let other = open_store(Arc::clone(&medium) as _, &sample.ring, &sample.clock).unwrap();
    other.note(&sample.points[0].0, &mainstay_repository::Note::Tag("late".into())).unwrap();
    // It was seen before its writer had made it durable.
    open(Arc::clone(&medium)).unwrap();
    open(store(&sample.blobs)).unwrap();
    // Later it counts.
    sample.clock.advance(Duration::from_secs(120));
    open(medium).unwrap();
    assert_eq!(open(store(&sample.blobs)).unwrap_err().code(), Code::Integrity);
}
