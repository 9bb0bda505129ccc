//! A writer that cannot read still writes increments, from its own sealed copy of the last tree.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod common;

use std::sync::Arc;

use common::{Bench, compare, options, request, restore};
use mainstay_core::{Code, PointId, Receipt, Source as _, Stamp, Target as _};
use mainstay_repository::{Options, Repository, Role, Unlock, VerifyScope};
use mainstay_testkit::{Part, Rng, TestItem, VecSource, random_items};

/// Backs up and returns the receipt too.
fn backup(repository: &Repository, items: Vec<TestItem>) -> (PointId, Receipt) {
    let mut source = Box::new(VecSource::new(items));
    let mut target = Box::new(repository.write(request(1)).unwrap());
    while let mainstay_core::Next::Item(item) = source.next().unwrap() {
        target.put(*item).unwrap();
    }
    let captured = source.seal().unwrap();
    let (receipt, point) = target.finish(&captured).unwrap();
    (point, receipt)
}

fn client(bench: &Bench, state: &std::path::Path) -> Repository {
    let ring = bench.repository.add_writer("laptop", Role::WriteOnly).unwrap();
    let options = Options { state: Some(state.to_owned()), ..options(&bench.clock) };
    Repository::open(Arc::new(bench.store.clone()), &Unlock::Ring(Box::new(ring)), &options).unwrap()
}

/// Items that all have stamps, and one whose recipe is long enough for pages of its own.
fn items() -> Vec<TestItem> {
    let mut items = random_items(7, 60);
    let mut rng = Rng::new(7);
    let parts = (0..60).flat_map(|_| [Part::Bytes(rng.bytes(30_000)), Part::Hole(4096)]).collect();
    items.push(TestItem::file(mainstay_core::ItemPath::new("~long").unwrap(), parts));
    items.sort_by(|one, other| one.path.cmp(&other.path));
    for (number, item) in items.iter_mut().enumerate() {
        item.stamp = Stamp(vec![number as u8; 9]);
    }
    items
}

fn with_content(items: &[TestItem]) -> u64 {
    items.iter().filter(|item| item.content != mainstay_testkit::Content::None).count() as u64
}

#[test]
fn increments_without_the_power_to_read() {
    let bench = Bench::new(0);
    let state = tempfile::tempdir().unwrap();
    let client = client(&bench, state.path());
    let mut items = items();
    let (first, all) = backup(&client, items.clone());
    if let Some(file) = items.iter_mut().rfind(|item| item.metadata.size > 0) {
        file.stamp = Stamp(b"changed".to_vec());
    }
    let (second, receipt) = backup(&client, items.clone());
    assert!(all.counts.read_bytes > 1_000_000);
    assert_eq!(receipt.counts.unchanged, with_content(&items) - 1);
    bench.repository.refresh().unwrap();
    for point in [first, second] {
        assert!(client.read(&point).is_err_and(|error| error.code() == Code::NoPower));
    }
    compare(&items, &restore(&bench.repository, &second));
    let verified = bench
        .repository
        .verify(&VerifyScope { read_data: true, ..VerifyScope::default() }, &mainstay_core::Silent);
    assert_eq!(verified.unwrap().problems, Vec::<String>::new());

    // Without its copy it reads everything again, and stores nothing again.
    std::fs::remove_dir_all(state.path()).unwrap();
    let (_, again) = backup(&client, items.clone());
    assert_eq!((again.counts.unchanged, again.counts.new_bytes), (0, 0));
}

#[test]
fn a_damaged_copy_is_no_copy() {
    let bench = Bench::new(0);
    let state = tempfile::tempdir().unwrap();
    let client = client(&bench, state.path());
    let items = items();
    backup(&client, items.clone());
    let folder = std::fs::read_dir(state.path()).unwrap().next().unwrap().unwrap().path();
    let copy_path = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let copy_path =
        copy_path.into_iter().find(|path| path.extension().is_some_and(|end| end == "tree")).unwrap();
    let bytes = std::fs::read(&copy_path).unwrap();
    for cut in [0, 10, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&copy_path, &bytes[..cut]).unwrap();
        let (point, _) = backup(&client, items.clone());
        bench.repository.refresh().unwrap();
        compare(&items, &restore(&bench.repository, &point));
    }
    let mut flipped = std::fs::read(&copy_path).unwrap();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    std::fs::write(&copy_path, &flipped).unwrap();
    let (point, _) = backup(&client, items.clone());
    bench.repository.refresh().unwrap();
    compare(&items, &restore(&bench.repository, &point));
}

#[test]
fn what_a_killed_run_left_of_its_copy_is_swept() {
    let bench = Bench::new(0);
    let state = tempfile::tempdir().unwrap();
    let client = client(&bench, state.path());
    backup(&client, items());
    let folder = std::fs::read_dir(state.path()).unwrap().next().unwrap().unwrap().path();
    let [left, held, other] =
        ["11111111111111111111111111111111", "22222222222222222222222222222222", "mine"]
            .map(|name| folder.join(format!("{}.{name}.tmp", "0".repeat(32))));
    let files = [&left, &held, &other].map(|path| std::fs::File::create(path).unwrap());
    files[1].lock().unwrap();
    backup(&client, items());
    assert_eq!([&left, &held, &other].map(|path| path.exists()), [false, true, true]);
}
