//! A small repository in which everything occurs: several points, holds and tags, an expired point, a repacked and
//! a condemned pack, key slots, a second writer.

use std::time::Duration;

use mainstay_core::{
    HardLink, ItemPath, Kind, Metadata, PointId, Result, Silent, Skip, SkipReason, Stamp, Time,
};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::keys::kit::Kit;
use mainstay_repository::keys::slot::{self, About, Cost};
use mainstay_repository::{GcOptions, Note, Repository};
use mainstay_testkit::{Blobs, MemoryStore, Part, Rng, ScriptedClock, TestItem, VecSource};

use super::{clock, copy, options, request, try_backup};

pub(crate) const PASSPHRASE: &[u8] = b"correct horse battery staple";
/// The least that Argon2 takes: tests open slots thousands of times.
pub(crate) const COST: Cost = Cost { memory_kib: 8, passes: 1, lanes: 1 };

pub(crate) struct Sample {
    pub(crate) blobs: Blobs,
    pub(crate) ring: KeyRing,
    pub(crate) kit: Kit,
    pub(crate) clock: ScriptedClock,
    /// Live points and what they hold.
    pub(crate) points: Vec<(PointId, Vec<TestItem>)>,
    pub(crate) expired: Vec<PointId>,
    /// The store as it was after each step.
    pub(crate) history: Vec<Blobs>,
}

fn path(text: &str) -> ItemPath {
    ItemPath::new(text).unwrap()
}

/// Every kind of item, small; `version` changes some of it.
pub(crate) fn items(seed: u64, version: u64) -> Vec<TestItem> {
    let mut fixed = Rng::new(seed);
    let mut fresh = Rng::new(seed ^ version << 32 ^ 0x5eed);
    let mut items = vec![
        TestItem::directory(path("dir")),
        TestItem::file(path("dir/empty"), Vec::new()),
        TestItem::file(path("dir/fresh"), vec![Part::Bytes(fresh.bytes(900))]),
        TestItem::file(path("dir/same"), vec![Part::Bytes(fixed.bytes(2500))]),
    ];
    let mut link = TestItem::directory(path("dir/symlink"));
    link.metadata = Metadata { link_target: Some(b"../elsewhere".to_vec()), ..Metadata::new(Kind::Symlink) };
    items.push(link);
    // More runs than stand in an item: they get pages of their own.
    let sparse = (0..20).flat_map(|_| [Part::Bytes(fixed.bytes(60)), Part::Hole(4096)]).collect();
    items.push(TestItem::file(path("dir/zsparse"), sparse));
    let disk = vec![
        Part::Bytes(fixed.bytes(1000)),
        Part::Hole(70_000),
        Part::Bytes(vec![0; 16 << 10]),
        Part::Bytes(fresh.bytes(300)),
    ];
    items.push(TestItem::disk(path("disk"), disk));
    let hard = fixed.bytes(500);
    for name in ["hard-1", "hard-2"] {
        let mut item = TestItem::file(path(name), vec![Part::Bytes(hard.clone())]);
        item.metadata.hard_link = Some(HardLink { device: 7, inode: 99 });
        items.push(item);
    }
    let mut odd = TestItem::file(path("odd"), vec![Part::Bytes(b"a text that repeats itself, ".repeat(40))]);
    odd.metadata.xattrs = vec![(b"user.note".to_vec(), b"value".to_vec())];
    odd.metadata.user = Some(b"some\xffbody".to_vec());
    odd.metadata.group = Some(b"wheel".to_vec());
    odd.metadata.modified = Time(-1);
    odd.stamp = Stamp(vec![version as u8; 24]);
    items.push(odd);
    let mut device = TestItem::directory(path("tty"));
    device.metadata = Metadata { device: Some((4, 64)), ..Metadata::new(Kind::CharDevice) };
    items.push(device);
    for item in &mut items {
        if item.stamp.0.is_empty()
            && !item.path.to_string().contains("fresh")
            && item.metadata.kind != Kind::Disk
        {
            item.stamp = Stamp(b"unchanged".to_vec());
        }
    }
    items
}

/// Content of about a segment a file, that compresses well.
fn bulky(files: &[u8]) -> Vec<TestItem> {
    let phrase = |file: u8| format!("file {file} says the same thing over and over; ").repeat(40);
    let text = |file| (0..600).map(|number| format!("{number} {}", phrase(file))).collect::<String>();
    let file = |file: &u8| {
        TestItem::file(path(&format!("bulky-{file}")), vec![Part::Bytes(text(*file).into_bytes())])
    };
    files.iter().map(file).collect()
}

fn back_up(repository: &Repository, items: &[TestItem]) -> Result<PointId> {
    let skip = Skip { path: path("dir/locked"), reason: SkipReason::Unreadable, detail: "denied".into() };
    let source = VecSource::new(items.to_vec()).skipping(3, skip);
    copy(Box::new(source), Box::new(repository.write(request(1))?))
}

/// Returns how many packs were repacked.
fn collect(repository: &Repository, grace: Duration) -> u64 {
    let options = GcOptions { grace, ..GcOptions::default() };
    let plan = repository.plan_gc(&options, &Silent).unwrap();
    repository.gc(&plan, &Silent).unwrap().repacked
}

impl Sample {
    pub(crate) fn new(seed: u64) -> Self {
        Self::make(seed, false, false)
    }

    /// With a pack that was repacked; larger.
    pub(crate) fn with_repacked_pack(seed: u64) -> Self {
        Self::make(seed, true, false)
    }

    /// As [`Sample::with_repacked_pack`], with parity.
    pub(crate) fn with_parity(seed: u64) -> Self {
        Self::make(seed, true, true)
    }

    fn make(seed: u64, repacked: bool, parity: bool) -> Self {
        let (store, clock, ring) = (MemoryStore::new(), clock(), KeyRing::create().unwrap());
        let kit = Kit::generate(&ring.family()).unwrap();
        let about = |label: &str| About { label: label.into(), created: Time::default() };
        let slots = [
            slot::seal_with_passphrase(&ring, &about("passphrase"), PASSPHRASE, COST).unwrap(),
            kit.seal_slot(&ring, &about("kit")).unwrap(),
        ];
        let shared = std::sync::Arc::new(store.clone());
        let mut options = options(&clock);
        options.tuning.parity = parity;
        let repository = Repository::create(shared, ring.clone(), &slots, &options).unwrap();
        let mut history = vec![store.snapshot()];
        let mut made = Vec::new();
        for version in 0..4 {
            let items = items(seed, version);
            made.push((back_up(&repository, &items).unwrap(), items));
            clock.advance(Duration::from_secs(3600));
            history.push(store.snapshot());
        }
        let other = items(seed ^ 1, 0);
        made.push((try_backup(&repository, 2, other.clone()).unwrap(), other));
        let mut expired = Vec::new();
        if repacked {
            expired.push(try_backup(&repository, 3, bulky(&[1, 2, 3, 4, 5])).unwrap());
            made.push((try_backup(&repository, 3, bulky(&[2])).unwrap(), bulky(&[2])));
        }
        let held = made[2].0;
        repository.note(&held, &Note::Tag("quarterly".into())).unwrap();
        repository.note(&held, &Note::Hold { reason: "court".into(), until: None }).unwrap();
        repository.note(&held, &Note::Verified { read_data: true }).unwrap();
        history.push(store.snapshot());
        expired.push(made.remove(0).0);
        repository.expire(&expired, "test").unwrap();
        history.push(store.snapshot());
        assert_eq!(collect(&repository, Duration::ZERO) > 0, repacked);
        collect(&repository, Duration::from_secs(1));
        clock.advance(Duration::from_secs(3600));
        collect(&repository, Duration::from_secs(1));
        history.push(store.snapshot());
        Self { blobs: store.snapshot(), ring, kit, clock, points: made, expired, history }
    }
}
