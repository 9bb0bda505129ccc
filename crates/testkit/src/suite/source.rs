//! What every [`Source`] must do.
#![expect(clippy::unwrap_used, clippy::panic, reason = "checks fail by panicking")]

use std::collections::BTreeSet;

use mainstay_core::{Blocks, Body, Counts, Item, ItemPath, Kind, Next, Receipt, Source, StreamEnd};

use crate::read_body;

/// Makes one test of each check. `$make` is a closure that returns a guard, kept until the test is over, and a
/// closure that opens the same unchanging workload again and again as `Box<dyn Source>`.
///
/// ```ignore
/// source_suite!(conformance, || ((), || Box::new(VecSource::new(random_items(1, 50))) as Box<dyn Source>));
/// ```
#[macro_export]
macro_rules! source_suite {
    ($name:ident, $make:expr) => {
        $crate::source_suite! { @tests $name, $make;
            items_ascend_and_parents_come_first
            the_end_stays_the_end_and_can_be_sealed_and_committed
            bodies_fit_their_items
            bodies_open_late_and_twice
            a_dropped_source_harms_nothing
        }
    };
    (@tests $name:ident, $make:expr; $($check:ident)*) => {
        mod $name {
            use super::*;
            $(
                #[test]
                fn $check() {
                    let (_guard, mut make) = ($make)();
                    $crate::suite::source::$check(&mut make);
                }
            )*
        }
    };
}

/// Opens the workload.
pub type Make<'a> = &'a mut dyn FnMut() -> Box<dyn Source>;

pub fn items_ascend_and_parents_come_first(make: Make<'_>) {
    let mut directories = BTreeSet::from([ItemPath::root()]);
    let mut last: Option<ItemPath> = None;
    let items = all_items(&mut *make());
    assert!(!items.is_empty(), "a source without items shows nothing");
    for Item { path, metadata, .. } in items {
        assert!(last.is_none_or(|last| last < path), "{path:?} does not come after the item before it");
        if let Some(parent) = path.parent() {
            assert!(directories.contains(&parent), "{path:?} comes without its directory");
        }
        if metadata.kind == Kind::Directory {
            directories.insert(path.clone());
        }
        last = Some(path);
    }
}

pub fn the_end_stays_the_end_and_can_be_sealed_and_committed(make: Make<'_>) {
    let mut source = make();
    let items = all_items(&mut *source).len() as u64;
    for _ in 0..3 {
        assert!(matches!(source.next().unwrap(), Next::End), "something came after the end");
    }
    source.seal().unwrap();
    let counts = Counts { items, ..Counts::default() };
    source.commit(&Receipt { point: None, counts }).unwrap();
}

pub fn bodies_fit_their_items(make: Make<'_>) {
    let mut source = make();
    while let Some(item) = next_item(&mut *source) {
        let Item { path, metadata, body, .. } = &item;
        let sorted = |names: &[&[u8]]| names.is_sorted_by(|one, other| one < other);
        assert!(
            sorted(&metadata.xattrs.iter().map(|(name, _)| &name[..]).collect::<Vec<_>>()),
            "{path:?}: xattrs"
        );
        let attributes: Vec<_> = metadata.attributes.iter().map(|(name, _)| name.as_bytes()).collect();
        assert!(sorted(&attributes), "{path:?}: attributes");
        assert_eq!(metadata.link_target.is_some(), metadata.kind == Kind::Symlink, "{path:?}: link target");
        let fits = match metadata.kind {
            Kind::File | Kind::Record => !matches!(body, Body::Blocks(_)) || metadata.size > 0,
            Kind::Disk => matches!(body, Body::Blocks(_)),
            _ => matches!(body, Body::None),
        };
        assert!(fits, "{path:?}: a {:?} with such a body", metadata.kind);
        if let Body::Blocks(blocks) = body {
            extents_cover(&**blocks, path);
        }
        let (bytes, end) = read_body(body).unwrap();
        if end == StreamEnd::Steady {
            assert_eq!(bytes.len() as u64, metadata.size, "{path:?}: the size is not the content's");
        }
    }
}

pub fn bodies_open_late_and_twice(make: Make<'_>) {
    let mut source = make();
    let items = all_items(&mut *source);
    for Item { path, body, .. } in &items {
        let (first, second) = (read_body(body).unwrap(), read_body(body).unwrap());
        assert!(first == second, "{path:?} reads differently the second time");
    }
}

pub fn a_dropped_source_harms_nothing(make: Make<'_>) {
    let paths =
        |source: &mut dyn Source| all_items(source).into_iter().map(|item| item.path).collect::<Vec<_>>();
    let expected = paths(&mut *make());
    for stop_after in [0, 1, expected.len() / 2, expected.len()] {
        let mut source = make();
        (0..stop_after).for_each(|_| drop(next_item(&mut *source)));
        drop(source);
        assert_eq!(paths(&mut *make()), expected, "after a run that stopped at {stop_after}");
    }
    let mut source = make();
    all_items(&mut *source);
    source.seal().unwrap();
    drop(source);
    assert_eq!(paths(&mut *make()), expected, "after a run that was sealed, not committed");
}

fn extents_cover(blocks: &dyn Blocks, path: &ItemPath) {
    let mut at = 0;
    for extent in blocks.extents(0..blocks.size()).unwrap() {
        assert!(extent.range.start == at && extent.range.end > at, "{path:?}: extents leave a gap at {at}");
        at = extent.range.end;
    }
    assert_eq!(at, blocks.size(), "{path:?}: extents end early");
}

fn next_item(source: &mut dyn Source) -> Option<Item> {
    loop {
        match source.next() {
            Ok(Next::Item(item)) => return Some(*item),
            Ok(Next::Skipped(_)) => {}
            Ok(Next::End) => return None,
            Err(error) => panic!("the source failed: {error:?}"),
        }
    }
}

fn all_items(source: &mut dyn Source) -> Vec<Item> {
    std::iter::from_fn(|| next_item(source)).collect()
}
