//! Points go in and come out the same: random trees, unchanged items, increments, expiry and collection.

#![expect(clippy::unwrap_used, reason = "a listener that cannot go on says where")]

mod common;

use std::sync::{Arc, Mutex};

use common::{Bench, backup, compare, copy, large_items, open, options, request, restore, try_backup};
use mainstay_core::{
    BlobStore as _, Body, Code, Event, ItemPath, Next, Progress, Silent, SkipReason, Source as _, Stamp,
    Target as _,
};
use mainstay_repository::{GcOptions, Options, Repository, Tuning, Unlock, VerifyScope, WriteRequest};
use mainstay_testkit::{Part, Rng, TestItem, VecSource, for_each_seed, random_items};

#[test]
fn random_trees_come_back_as_they_went_in() {
    for_each_seed(20, |seed| {
        let bench = Bench::new(seed);
        let items = random_items(seed, 40);
        let point = backup(&bench.repository, items.clone());
        compare(&items, &restore(&bench.repository, &point));
        // Another process, knowing nothing but the store and the key.
        compare(&items, &restore(&open(&bench), &point));
        let report = bench
            .repository
            .verify(&VerifyScope { read_data: true, ..VerifyScope::default() }, &Silent)
            .unwrap();
        assert_eq!(report.problems, Vec::<String>::new());
    });
}

/// Small packs, registered often: what a backup of terabytes does.
#[test]
fn a_long_run_registers_its_packs_and_an_interrupted_one_need_not_store_them_again() {
    let mut bench = Bench::new(0);
    let tuning = Tuning { pack_bytes: 2 << 20, register_packs: 2, ..Tuning::default() };
    let small = Options { tuning, ..options(&bench.clock) };
    let unlock = Unlock::Ring(Box::new(bench.ring.clone()));
    bench.repository = Repository::open(Arc::new(bench.store.clone()), &unlock, &small).unwrap();
    let items = large_items(1, 12, 2 << 20);
    let broken = VecSource::new(items.clone()).failing(9, Code::Io);
    let target = bench.repository.write(request(1)).unwrap();
    copy(Box::new(broken), Box::new(target)).unwrap_err();
    let registered = bench.repository.stats();
    assert!(registered.packs >= 4 && registered.points == 0, "{registered:?}");

    let point = backup(&bench.repository, items.clone());
    let written = bench.repository.points().unwrap()[0].counts.written_bytes;
    assert!(written < 24 << 20, "{written} bytes were stored, though some were there");
    compare(&items, &restore(&open(&bench), &point));
    let report = bench.repository.verify(&VerifyScope { read_data: true, ..VerifyScope::default() }, &Silent);
    assert_eq!(report.unwrap().problems, Vec::<String>::new());
}

#[test]
fn expired_points_are_collected_and_the_others_stay_whole() {
    for_each_seed(10, |seed| {
        let bench = Bench::new(seed);
        let mut kept = Vec::new();
        let mut gone = Vec::new();
        for round in 0..6_u64 {
            let items = random_items(seed.wrapping_mul(31) + round / 2, 25);
            let point = backup(&bench.repository, items.clone());
            if round % 2 == 0 { gone.push(point) } else { kept.push((point, items)) }
        }
        let before = bench.repository.stats().pack_bytes;
        bench.repository.expire(&gone, "test").unwrap();
        bench.repository.expire(&[kept.remove(0).0], "test").unwrap();
        let options = GcOptions { grace: std::time::Duration::ZERO, ..GcOptions::default() };
        for _condemn_then_delete in 0..3 {
            let plan = bench.repository.plan_gc(&options, &Silent).unwrap();
            bench.repository.gc(&plan, &Silent).unwrap();
        }
        assert!(bench.repository.stats().pack_bytes < before, "nothing was freed");
        let other = open(&bench);
        assert_eq!(other.points().unwrap().len(), kept.len());
        for (point, items) in &kept {
            compare(items, &restore(&other, point));
        }
        let report =
            other.verify(&VerifyScope { read_data: true, ..VerifyScope::default() }, &Silent).unwrap();
        assert_eq!(report.problems, Vec::<String>::new());
    });
}

/// What was told of the way, as (bytes done, bytes expected).
#[derive(Default)]
struct Told(Mutex<(Vec<(u64, u64)>, u64)>);

impl Progress for Told {
    fn event(&self, event: &Event<'_>) {
        let (told, expected) = &mut *self.0.lock().unwrap();
        match event {
            Event::Expect { bytes, .. } => *expected = *bytes,
            Event::Done(counts) => told.push((counts.bytes, *expected)),
            _ => {}
        }
    }
}

/// One large file and one large pack: the bar must move inside them, never back, and end where it was to end.
#[test]
fn progress_moves_inside_large_things_and_ends_at_what_was_expected() {
    const LARGE: u64 = 24 << 20;
    let ends_well = |told: &[(u64, u64)], at: u64| {
        assert!(told.windows(2).all(|pair| pair[0].0 <= pair[1].0), "{told:?}");
        assert!(told.iter().any(|(done, _)| (1..at).contains(done)), "{told:?}");
        assert_eq!(told.last().map(|(done, _)| *done), Some(at));
    };
    let (bench, told) = (Bench::new(0), Arc::new(Told::default()));
    let progress = Arc::clone(&told) as Arc<dyn Progress>;
    let target = bench.repository.write(WriteRequest { progress, ..request(1) }).unwrap();
    let source = VecSource::new(large_items(1, 1, LARGE as usize));
    copy(Box::new(source), Box::new(target)).unwrap();
    ends_well(&told.0.lock().unwrap().0, LARGE);

    let told = Told::default();
    let scope = VerifyScope { read_data: true, ..VerifyScope::default() };
    assert!(bench.repository.verify(&scope, &told).unwrap().is_sound());
    let mut told = told.0.into_inner().unwrap().0;
    // The second pass, over what the packs hold, counts segments and no bytes.
    told.retain(|(_, expected)| *expected > 0);
    let expected = told[0].1;
    assert!(expected > LARGE);
    ends_well(&told, expected);
}

/// What would make a page that nobody could read: attributes beyond measure, and paths that are long when spelled out.
#[test]
fn what_there_is_no_place_for_is_skipped_and_the_point_can_be_read() {
    let bench = Bench::new(0);
    let mut heavy = TestItem::directory(ItemPath::new("heavy").unwrap());
    heavy.metadata.xattrs = (10..50).map(|n| (format!("user.{n}").into_bytes(), vec![n; 60 << 10])).collect();
    let mut items = vec![heavy];
    let deep = vec!["x".repeat(200); 200].join("/");
    items.extend((0..2000).map(|n| TestItem::directory(ItemPath::new(format!("{deep}/{n:04}")).unwrap())));
    let too_deep = ItemPath::new(vec!["y".repeat(200); 400].join("/")).unwrap();
    items.push(TestItem::directory(too_deep.clone()));
    let mut known = TestItem::directory(ItemPath::new("z").unwrap());
    known.metadata.attributes = vec![("x".to_owned(), vec![1; 1 << 20])];
    items.push(known.clone());
    let point = backup(&bench.repository, items.clone());
    let reader = open(&bench).read(&point).unwrap();
    let skips = reader.skips().unwrap();
    assert_eq!(reader.info().counts.skipped, 3);
    assert_eq!(
        skips.iter().map(|skip| skip.reason).collect::<Vec<_>>(),
        [SkipReason::Metadata, SkipReason::Unsupported, SkipReason::Unsupported]
    );
    assert!(skips[0].path == items[0].path && skips[0].detail.contains("user.18"), "{}", skips[0].detail);
    assert!(too_deep.is_within(&skips[1].path) && skips[2].path == known.path);
    items.truncate(2001);
    items[0].metadata.xattrs.truncate(8);
    compare(&items, &restore(&open(&bench), &point));
    let report = open(&bench).verify(&VerifyScope::default(), &Silent).unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
}

/// Contents of more runs than stand in an item, changed behind a time and a size that did not.
#[test]
fn a_silent_change_is_found_however_long_the_recipe() {
    let bench = Bench::new(0);
    let block = |n: u64| Part::Bytes(Rng::new(n).bytes(16 << 10));
    let hole = || Part::Hole(16 << 10);
    let zeros = || Part::Bytes(vec![0; 16 << 10]);
    let files = |version: u64| {
        let pairs = |last: u64| (0..40).flat_map(move |n| [block(if n == 39 { last } else { n }), hole()]);
        let ends = if version == 1 { [block(98), block(99), hole()] } else { [block(98), hole(), block(99)] };
        let zero = if version == 1 { hole() } else { zeros() };
        let disk = |name, parts| TestItem::disk(ItemPath::new(name).unwrap(), parts);
        let mut items = vec![
            disk("changed", pairs(100 + version).collect()),
            disk("moved", pairs(39).chain(ends).collect()),
            disk("same", pairs(39).chain([zero, block(50)]).collect()),
            TestItem::file(ItemPath::new("stream").unwrap(), pairs(200 + version).collect()),
        ];
        items.iter_mut().for_each(|item| item.stamp = Stamp(vec![1; 8]));
        items
    };
    backup(&bench.repository, files(1));
    let write = |version| {
        let target = open(&bench).write(WriteRequest { reread_one_in: 1, ..request(1) }).unwrap();
        let point = copy(Box::new(VecSource::new(files(version))), Box::new(target)).unwrap();
        open(&bench).read(&point).unwrap().skips().unwrap()
    };
    let found = write(2);
    assert!(found.iter().all(|skip| skip.reason == SkipReason::SilentChange), "{found:?}");
    let paths: Vec<_> = found.iter().map(|skip| skip.path.to_string()).collect();
    assert_eq!(paths, ["changed", "moved", "stream"]);
    assert_eq!(write(2), []);
}

#[test]
fn the_end_of_a_backup_looks_at_no_other_point() {
    let bench = Bench::new(0);
    let items = || large_items(1, 2, 1000);
    for workload in [1, 2, 2, 2, 1, 2, 2, 2] {
        try_backup(&bench.repository, workload, items()).unwrap();
    }
    let repository = open(&bench);
    let last = repository.points().unwrap().into_iter().rfind(|point| point.workload.name == "workload-1");
    let target = Box::new(repository.write(request(1)).unwrap());
    // Points that cannot be had any more cost no work that is done, and the chain goes on.
    for name in bench.store.snapshot().keys().filter(|name| name.contains("points/")) {
        bench.store.delete(name).unwrap();
    }
    let point = copy(Box::new(VecSource::new(items())), target).unwrap();
    let made = repository.points().unwrap().into_iter().find(|made| made.id == point).unwrap();
    assert_eq!((made.sequence, made.parent), (3, last.map(|last| last.id)));
}

#[test]
fn items_in_any_order_make_the_point_that_sorted_ones_make() {
    for_each_seed(10, |seed| {
        let bench = Bench::new(seed);
        let items = random_items(seed, 60);
        let mut shuffled = items.clone();
        let mut rng = Rng::new(seed);
        for last in (1..shuffled.len()).rev() {
            shuffled.swap(last, rng.below(last + 1));
        }
        let write = |items: Vec<TestItem>, any_order| {
            let request = WriteRequest { any_order, ..request(1) };
            copy(Box::new(VecSource::new(items)), Box::new(bench.repository.write(request)?))
        };
        let point = write(shuffled.clone(), true).unwrap();
        compare(&items, &restore(&open(&bench), &point));
        let report =
            bench.repository.verify(&VerifyScope { read_data: true, ..VerifyScope::default() }, &Silent);
        assert_eq!(report.unwrap().problems, Vec::<String>::new());
        // Unless it is asked for, nothing is put where a reader would not find it.
        assert_eq!(write(shuffled.clone(), false).unwrap_err().code(), Code::Bug);
        shuffled.push(items[0].clone());
        assert_eq!(write(shuffled, true).unwrap_err().code(), Code::Bug);
    });
}

#[test]
fn a_page_that_changes_where_it_is_costs_little_more_than_itself() {
    let bench = Bench::new(5);
    let mut bytes = Rng::new(5).bytes(4 << 20);
    let new_bytes = |bytes: &[u8]| {
        let item = TestItem::file(ItemPath::new("base/1/2").unwrap(), vec![Part::Bytes(bytes.to_vec())]);
        let mut target = Box::new(bench.repository.write(request(1)).unwrap());
        let mut source = VecSource::new(vec![item.clone()]);
        while let Next::Item(mut item) = source.next().unwrap() {
            let Body::Stream(open) = item.body else { unreachable!() };
            item.body = Body::Pages(open);
            target.put(*item).unwrap();
        }
        let (receipt, point) = target.finish(&source.seal().unwrap()).unwrap();
        compare(&[item], &restore(&open(&bench), &point));
        receipt.counts.new_bytes
    };
    assert_eq!(new_bytes(&bytes), 4 << 20);
    for page in [3, 100, 511] {
        bytes[page * 8192 + 77] ^= 1;
    }
    assert_eq!(new_bytes(&bytes), 3 * (16 << 10));
}
