//! What every [`Target`] must do.
#![expect(clippy::unwrap_used, reason = "checks fail by panicking")]

use mainstay_core::{Captured, Consistency, ItemPath, Kind, Position, Skip, SkipReason, Target, Time};

use crate::{Part, TestItem, random_items};

/// Makes one test of each check. `$make` is a closure that returns a guard, kept until the test is over, a closure
/// that opens the same empty place again and again as a boxed [`Target`], and one that shows what can be seen in
/// that place: a path and its content for every item, in any order.
#[macro_export]
macro_rules! target_suite {
    ($name:ident, $make:expr) => {
        $crate::target_suite! { @tests $name, $make;
            what_was_put_is_there_and_counted
            nothing_put_is_nothing_there
            skips_are_counted_by_their_weight
            items_out_of_order_are_refused_or_handled
            without_finish_nothing_is_left
            a_body_that_fails_is_never_a_success
        }
    };
    (@tests $name:ident, $make:expr; $($check:ident)*) => {
        mod $name {
            use super::*;
            $(
                #[test]
                fn $check() {
                    let (_guard, mut make, observe) = ($make)();
                    $crate::suite::target::$check(&mut make, &observe);
                }
            )*
        }
    };
}

/// What can be seen: path and content, in any order.
pub type Seen = Vec<(ItemPath, Vec<u8>)>;

pub fn what_was_put_is_there_and_counted<D>(
    make: &mut dyn FnMut() -> Box<dyn Target<Done = D>>,
    observe: &dyn Fn() -> Seen,
) {
    let items = random_items(7, 80);
    let mut target = make();
    items.iter().for_each(|item| target.put(item.to_item()).unwrap());
    let (receipt, _) = target.finish(&captured()).unwrap();
    assert_eq!(receipt.counts.items, items.len() as u64);
    assert_eq!(receipt.counts.bytes, items.iter().map(|item| item.metadata.size).sum::<u64>());
    assert_eq!((receipt.counts.skipped, receipt.counts.noticed), (0, 0));
    assert_same(observe(), &items);
}

pub fn nothing_put_is_nothing_there<D>(
    make: &mut dyn FnMut() -> Box<dyn Target<Done = D>>,
    observe: &dyn Fn() -> Seen,
) {
    let (receipt, _) = make().finish(&captured()).unwrap();
    assert_eq!((receipt.counts.items, receipt.counts.bytes, receipt.counts.skipped), (0, 0, 0));
    assert_same(observe(), &[]);
}

pub fn skips_are_counted_by_their_weight<D>(
    make: &mut dyn FnMut() -> Box<dyn Target<Done = D>>,
    observe: &dyn Fn() -> Seen,
) {
    let kept = file("kept", b"1");
    let mut target = make();
    target.skip(skip("gone", SkipReason::Unreadable)).unwrap();
    target.put(kept.to_item()).unwrap();
    target.skip(skip("kept", SkipReason::Changed)).unwrap();
    target.skip(skip("odd", SkipReason::Unsupported)).unwrap();
    let (receipt, _) = target.finish(&captured()).unwrap();
    let counts = receipt.counts;
    assert_eq!((counts.items, counts.skipped, counts.noticed), (1, 2, 1));
    assert_same(observe(), &[kept]);
}

pub fn items_out_of_order_are_refused_or_handled<D>(
    make: &mut dyn FnMut() -> Box<dyn Target<Done = D>>,
    observe: &dyn Fn() -> Seen,
) {
    let (first, second) = (file("b", b"1"), file("a", b"2"));
    let mut target = make();
    target.put(first.to_item()).unwrap();
    let finished = target.put(second.to_item()).and_then(|()| target.finish(&captured()).map(|_| ()));
    match finished {
        Ok(()) => assert_same(observe(), &[first, second]),
        Err(_) => assert_same(observe(), &[]),
    }
}

pub fn without_finish_nothing_is_left<D>(
    make: &mut dyn FnMut() -> Box<dyn Target<Done = D>>,
    observe: &dyn Fn() -> Seen,
) {
    let items = random_items(8, 40);
    for stop_after in [0, 1, items.len()] {
        let mut target = make();
        items[..stop_after].iter().for_each(|item| target.put(item.to_item()).unwrap());
        drop(target);
        assert_same(observe(), &[]);
    }
}

pub fn a_body_that_fails_is_never_a_success<D>(
    make: &mut dyn FnMut() -> Box<dyn Target<Done = D>>,
    observe: &dyn Fn() -> Seen,
) {
    let path = ItemPath::new("broken").unwrap();
    let mut broken = TestItem::file(path, vec![Part::Bytes(vec![7; 100_000]), Part::Fails]);
    broken.metadata.size = 200_000;
    let mut target = make();
    let finished = target.put(broken.to_item()).and_then(|()| target.finish(&captured()));
    match finished {
        Ok((receipt, _)) => assert!(receipt.counts.skipped > 0, "half an item was called a whole one"),
        Err(_) => assert_same(observe(), &[]),
    }
}

fn assert_same(seen: Seen, expected: &[TestItem]) {
    let is_special = |path: &ItemPath| {
        expected
            .iter()
            .any(|item| item.path == *path && !matches!(item.metadata.kind, Kind::File | Kind::Disk))
    };
    // Content only of what has content: a target may show the target of a link, or nothing.
    let show =
        |path: ItemPath, bytes: Vec<u8>| if is_special(&path) { (path, Vec::new()) } else { (path, bytes) };
    let mut seen: Seen = seen.into_iter().map(|(path, bytes)| show(path, bytes)).collect();
    let mut expected: Seen = expected.iter().map(|item| (item.path.clone(), item.bytes())).collect();
    seen.sort();
    expected.sort();
    let paths = |items: &Seen| items.iter().map(|(path, _)| path.clone()).collect::<Vec<_>>();
    assert_eq!(paths(&seen), paths(&expected));
    for ((path, seen), (_, expected)) in seen.iter().zip(&expected) {
        assert!(
            seen == expected,
            "{path:?}: {} bytes are not the {} that were put",
            seen.len(),
            expected.len()
        );
    }
}

fn file(path: &str, bytes: &[u8]) -> TestItem {
    TestItem::file(ItemPath::new(path).unwrap(), vec![Part::Bytes(bytes.to_vec())])
}

fn skip(path: &str, reason: SkipReason) -> Skip {
    Skip { path: ItemPath::new(path).unwrap(), reason, detail: "scripted".into() }
}

fn captured() -> Captured {
    Captured { position: Position(vec![1]), consistency: Consistency::Crash, moment: Time::from_seconds(1) }
}
