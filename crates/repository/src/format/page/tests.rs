use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use mainstay_core::{Error, Id16, Result};
use proptest::prelude::*;

use super::{
    Cursor, MapBuilder, Page, PageKind, PageRef, PageSink, PageSource, Span, Visit, for_each_page,
    visit_pages,
};
use crate::codec::Encode as _;
use crate::seal::Secret;

#[derive(Default)]
struct Pages(HashMap<[u8; 32], Arc<[u8]>>);

impl PageSink for Pages {
    fn store(&mut self, page: Vec<u8>) -> Result<PageRef> {
        let id = *blake3::hash(&page).as_bytes();
        self.0.insert(id, page.into());
        Ok(PageRef { group: Id16::default(), segment: 0, slot: 0, id })
    }
}

impl PageSource for Pages {
    fn load(&self, page: &PageRef) -> Result<Arc<[u8]>> {
        self.0.get(&page.id).cloned().ok_or_else(|| Error::integrity("no such page"))
    }
}

fn build(map: &BTreeMap<Vec<u8>, Vec<u8>>, pages: &mut Pages) -> Option<PageRef> {
    let mut builder = MapBuilder::new(PageKind::Items, &Secret::new([7; 32]));
    for (key, value) in map {
        builder.push(key, &|out, _| out.fixed(value), pages).unwrap();
    }
    builder.finish(pages).unwrap()
}

fn read_from(pages: &Pages, root: &PageRef, from: &[u8]) -> Vec<Vec<u8>> {
    let mut cursor = Cursor::seek(pages, PageKind::Items, root, from).unwrap();
    let mut keys = Vec::new();
    while let Some((page, index)) = cursor.next().unwrap() {
        keys.push(page.key(index).to_vec());
    }
    keys
}

fn large_map(entries: u32) -> BTreeMap<Vec<u8>, Vec<u8>> {
    (0..entries)
        .map(|n| (format!("usr/share/{:06}/file", n * 7 % entries).into_bytes(), vec![n as u8; 60]))
        .collect()
}

proptest! {
    #[test]
    fn reads_back_what_was_built(
        map in prop::collection::btree_map(prop::collection::vec(any::<u8>(), 0..40), prop::collection::vec(any::<u8>(), 0..3000), 0..200),
        from in prop::collection::vec(any::<u8>(), 0..4),
    ) {
        let mut pages = Pages::default();
        let Some(root) = build(&map, &mut pages) else { prop_assert!(map.is_empty()); return Ok(()) };
        let wanted: Vec<_> = map.range(from.clone()..).map(|(key, _)| key.clone()).collect();
        prop_assert_eq!(read_from(&pages, &root, &from), wanted);
        let mut cursor = Cursor::seek(&pages, PageKind::Items, &root, &[]).unwrap();
        cursor.skip_to(&from);
        let next = cursor.next().unwrap().map(|(page, index)| page.key(index).to_vec());
        prop_assert_eq!(next, map.range(from..).next().map(|(key, _)| key.clone()));
    }

    #[test]
    fn hostile_bytes_are_errors(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut page = vec![b'P', 1, 1, 0];
        page.extend(bytes);
        let _either = Page::parse(PageKind::Items, page.into());
    }
}

#[test]
fn skips_forward_from_anywhere_without_going_back() {
    let map = large_map(5000);
    let mut pages = Pages::default();
    let root = build(&map, &mut pages).unwrap();
    let keys: Vec<_> = map.keys().cloned().collect();
    for (start, target) in [(0, 1), (10, 4000), (700, 700), (4999, 4999), (3000, 100)] {
        let mut cursor = Cursor::seek(&pages, PageKind::Items, &root, &keys[start]).unwrap();
        let (page, index) = cursor.next().unwrap().unwrap();
        assert_eq!(page.key(index), keys[start]);
        cursor.skip_to(&keys[target]);
        let next = cursor.next().unwrap().map(|(page, index)| page.key(index).to_vec());
        assert_eq!(next.as_ref(), keys.get(target.max(start + 1)));
        let after = cursor.next().unwrap().map(|(page, index)| page.key(index).to_vec());
        assert_eq!(after.as_ref(), keys.get(target.max(start + 1) + 1));
    }
}

#[test]
fn one_change_leaves_the_other_pages_as_they_were() {
    let mut map = large_map(20_000);
    let mut pages = Pages::default();
    build(&map, &mut pages).unwrap();
    let before = pages.0.len();
    assert!(before > 40, "{before} pages");
    map.insert(b"usr/share/010000/file2".to_vec(), b"new".to_vec());
    map.remove(b"usr/share/015000/file".as_slice());
    let root = build(&map, &mut pages).unwrap();
    let grown = pages.0.len() - before;
    assert!(grown <= 6, "{grown} pages for two changes in {before}");
    let (mut leaves, mut entries) = (0, 0);
    for_each_page(&pages, PageKind::Items, &root, &mut |_, page| {
        leaves += usize::from(page.level == 0);
        entries += if page.level == 0 { page.len() } else { 0 };
        Ok(true)
    })
    .unwrap();
    assert_eq!(entries, map.len());
    assert!(leaves > 30);
}

#[test]
fn a_key_may_share_more_than_the_rest_of_its_page() {
    let map: BTreeMap<_, _> = (0..9_u8).map(|n| ([vec![b'x'; 200], vec![n]].concat(), vec![])).collect();
    let mut pages = Pages::default();
    let root = build(&map, &mut pages).unwrap();
    assert_eq!(read_from(&pages, &root, &[]), map.into_keys().collect::<Vec<_>>());
}

#[test]
fn keys_out_of_order_are_refused() {
    let mut pages = Pages::default();
    let mut builder = MapBuilder::new(PageKind::Items, &Secret::new([7; 32]));
    builder.push(b"b", &|_, _| (), &mut pages).unwrap();
    assert!(builder.push(b"a", &|_, _| (), &mut pages).is_err());
    assert!(builder.push(b"b", &|_, _| (), &mut pages).is_err());
}

#[test]
fn hostile_pages_are_errors() {
    use crate::format::item::{StoredItem, decode_skip, path_of_key};
    use crate::format::run::Run;
    use crate::ranges::Ranges;

    let item = |out: &mut Vec<u8>, size: u8| {
        out.fixed(&[1, size, 0, 0, 0]);
        out.i64(9);
        out.u8(8);
        out.bytes(&[0, 9, 1, 5]);
        out.u8(200);
        out.bytes(&[1, 2, 3]);
    };
    type Write<'a> = &'a dyn Fn(&mut Vec<u8>, u8);
    let values: [Write<'_>; 4] = [
        &item,
        &|out, number| out.fixed(&[0, number + 1]),
        &|out, number| out.fixed(&[1, number, 3]),
        &|out, number| out.fixed(&[1, 1, b'a', 1, number]),
    ];
    let kinds = [PageKind::Items, PageKind::Recipe, PageKind::References, PageKind::Skips];
    for (kind, value) in kinds.into_iter().zip(values) {
        let mut pages = Pages::default();
        let mut builder = MapBuilder::new(kind, &Secret::new([7; 32]));
        for number in 0..12 {
            builder.push(&[number; 16], &|out, _| value(out, number), &mut pages).unwrap();
        }
        let root = builder.finish(&mut pages).unwrap().unwrap();
        // Keys may share most of their bytes, so a page may be larger opened than stored.
        crate::hostile::feed(&pages.0[&root.id], 70 << 20, |bytes| {
            let Ok(page) = Page::parse(kind, bytes.into()) else { return };
            for index in 0..page.len() {
                let (mut input, _path) = (page.value(index), path_of_key(page.key(index)));
                match kind {
                    _ if page.level > 0 => drop(page.child(index)),
                    PageKind::Items => drop(StoredItem::decode(input, &page.groups)),
                    PageKind::Recipe => drop(Run::decode(&mut input, &page.groups)),
                    PageKind::References => drop(Ranges::decode(&mut input)),
                    PageKind::Skips => drop(decode_skip(input)),
                }
            }
        });
    }
}

#[test]
fn a_page_that_repeats_below_itself_is_refused() {
    let mut pages = Pages::default();
    let leaf = build(&BTreeMap::from([(b"k".to_vec(), vec![0; 20])]), &mut pages).unwrap();
    // Forged: levels of pages that name the same page below over and over. Walked, they would never end.
    let forge = |level: u8, keys: &[&[u8]], below: &PageRef, pages: &mut Pages| {
        let mut page = vec![b'P', 1, PageKind::Items as u8, level, 0, keys.len() as u8];
        for key in keys {
            page.extend([0, key.len() as u8]);
            page.extend(*key);
            let mut value = Vec::new();
            below.encode(&mut value);
            page.bytes(&value);
        }
        pages.store(page).unwrap()
    };
    let read = |pages: &Pages, root: &PageRef| -> Result<usize> {
        let mut seen = 0;
        for_each_page(&pages, PageKind::Items, root, &mut |_, _| {
            seen += 1;
            Ok(true)
        })?;
        let mut cursor = Cursor::seek(pages, PageKind::Items, root, &[])?;
        while cursor.next()?.is_some() {}
        Ok(seen)
    };
    let good = forge(1, &[b"k"], &leaf, &mut pages);
    assert_eq!(read(&pages, &good).unwrap(), 2);
    for keys in [&[&b"a"[..], b"k"][..], &[b"k", b"z"], &[b"z"], &[b"a"]] {
        let bad = forge(1, keys, &leaf, &mut pages);
        assert!(read(&pages, &bad).is_err(), "{keys:?}");
    }
    let again = forge(2, &[b"k"], &leaf, &mut pages);
    assert!(read(&pages, &again).is_err(), "a leaf two levels below");
}

#[test]
fn behind_a_lost_page_everything_is_there() {
    let map = large_map(60_000);
    let mut pages = Pages::default();
    let root = build(&map, &mut pages).unwrap();
    let mut refs = Vec::new();
    for_each_page(&pages, PageKind::Items, &root, &mut |page_ref, page| {
        refs.push((*page_ref, page.level));
        Ok(true)
    })
    .unwrap();
    assert!(refs.iter().any(|(_, level)| *level == 2), "{} pages of two levels only", refs.len());
    // The root, the pages below it, some leaves, and two that follow each other.
    let leaves: Vec<_> = refs.iter().filter(|(_, level)| *level == 0).step_by(29).collect();
    let above = refs.iter().filter(|(_, level)| *level > 0);
    for (lost, _) in above.chain(leaves).chain(refs.last()) {
        let bytes = pages.0.remove(&lost.id).unwrap();
        let mut cursor = Cursor::starting(&pages, PageKind::Items, &root, &[]);
        let (mut keys, mut spans) = (Vec::new(), Vec::new());
        loop {
            match cursor.next() {
                Ok(Some((page, index))) => keys.push(page.key(index).to_vec()),
                Ok(None) => break,
                Err(_) => spans.push(cursor.lost().unwrap()),
            }
        }
        let [Span { after, last }] = &spans[..] else { panic!("{spans:?}") };
        let is_lost = |key: &Vec<u8>| {
            after.as_ref().is_none_or(|after| key > after) && last.as_ref().is_none_or(|last| key <= last)
        };
        assert!(map.keys().any(is_lost) && last.as_ref().is_none_or(|last| map.contains_key(last)));
        let wanted: Vec<_> = map.keys().filter(|key| !is_lost(key)).cloned().collect();
        assert!(keys == wanted, "{} keys of {}", keys.len(), wanted.len());
        let (mut entries, mut visited) = (0, Vec::new());
        visit_pages(&pages, PageKind::Items, &root, &mut |visit| {
            match visit {
                Visit::Page(_, page) => entries += if page.level == 0 { page.len() } else { 0 },
                Visit::Lost(span, _) => visited.push(span),
            }
            Ok(true)
        })
        .unwrap();
        assert_eq!((entries, visited), (wanted.len(), spans));
        pages.0.insert(lost.id, bytes);
    }
}

#[test]
fn no_page_is_made_that_would_be_refused() {
    // Keys that share nearly all of their bytes are a small page, and large when spelled out; or their pages have few
    // entries, and make a deep tree.
    for length in [40 << 10, 64 << 10] {
        let long = vec![b'x'; length];
        let map: BTreeMap<_, _> =
            (0..5000_u32).map(|n| ([&long[4..], &n.to_be_bytes()].concat(), vec![7; 3])).collect();
        let mut pages = Pages::default();
        let root = build(&map, &mut pages).unwrap();
        let mut known = map.keys();
        let mut cursor = Cursor::seek(&pages, PageKind::Items, &root, &[]).unwrap();
        while let Some((page, index)) = cursor.next().unwrap() {
            assert!(known.next().is_some_and(|key| key == page.key(index)));
        }
        assert!(known.next().is_none());
    }
}
