//! What every [`BlobStore`] must do.
#![expect(clippy::unwrap_used, reason = "checks fail by panicking")]

use std::sync::Barrier;

use mainstay_core::{BlobStore, Code, Put, Result, Time};

use crate::Rng;

/// Makes one test of each check. `$make` is a closure that returns a guard, kept until the test is over, and an
/// empty store.
///
/// ```ignore
/// blob_store_suite!(conformance, || ((), MemoryStore::new()));
/// ```
#[macro_export]
macro_rules! blob_store_suite {
    ($name:ident, $make:expr) => {
        $crate::blob_store_suite! { @tests $name, $make;
            exactly_one_of_many_racing_puts_creates
            a_taken_name_keeps_its_bytes
            blobs_of_every_size_read_back
            a_large_blob_of_many_parts_reads_back
            ranges_are_exact_or_refused
            absent_blobs_are_not_found
            a_prefix_lists_whole_components
            an_error_of_the_listener_ends_the_listing
            deleting_is_idempotent
            names_that_are_no_names_are_refused
            flushing_and_sweeping_lose_nothing
            the_reserve_can_be_used_and_made_again
        }
    };
    (@tests $name:ident, $make:expr; $($check:ident)*) => {
        mod $name {
            use super::*;
            $(
                #[test]
                fn $check() {
                    let (_guard, store) = ($make)();
                    $crate::suite::blob_store::$check(&store);
                }
            )*
        }
    };
}

pub fn exactly_one_of_many_racing_puts_creates(store: &dyn BlobStore) {
    const RACERS: usize = 16;
    if !store.capabilities().create_if_absent {
        return;
    }
    for round in 0..20 {
        let name = format!("race/{round}");
        let start = Barrier::new(RACERS);
        let outcomes: Vec<Put> = std::thread::scope(|scope| {
            let race = |racer: usize| {
                let (name, start) = (&name, &start);
                scope.spawn(move || {
                    let bytes = [u8::try_from(racer).unwrap(); 5000];
                    start.wait();
                    store.put_new(name, &[&bytes]).unwrap()
                })
            };
            let racers: Vec<_> = (0..RACERS).map(race).collect();
            racers.into_iter().map(|racer| racer.join().unwrap()).collect()
        });
        let winners: Vec<usize> = (0..RACERS).filter(|&racer| outcomes[racer] == Put::Created).collect();
        assert_eq!(winners.len(), 1, "created by {winners:?}");
        assert_eq!(whole(store, &name), [u8::try_from(winners[0]).unwrap(); 5000]);
    }
}

pub fn a_taken_name_keeps_its_bytes(store: &dyn BlobStore) {
    assert_eq!(store.put_new("a/b", &[b"first"]).unwrap(), Put::Created);
    for other in [&b"second"[..], b"", b"first"] {
        assert_eq!(store.put_new("a/b", &[other]).unwrap(), Put::Exists);
        assert_eq!(whole(store, "a/b"), b"first");
    }
}

pub fn blobs_of_every_size_read_back(store: &dyn BlobStore) {
    let mut rng = Rng::new(1);
    for len in [0, 1, 4095, 4096, 4097, 70_000, 1_000_000] {
        let (name, bytes) = (format!("sizes/{len}"), rng.bytes(len));
        let (front, back) = bytes.split_at(len / 3);
        assert_eq!(store.put_new(&name, &[front, b"", back]).unwrap(), Put::Created);
        assert_eq!(whole(store, &name), bytes);
        assert_eq!(store.size(&name).unwrap(), len as u64);
    }
    assert_eq!(store.put_new("sizes/none", &[]).unwrap(), Put::Created);
    assert_eq!(whole(store, "sizes/none"), b"");
    let longest = format!("sizes/{}", "x".repeat(194));
    store.put_new(&longest, &[b"1"]).unwrap();
    assert_eq!(whole(store, &longest), b"1");
}

pub fn a_large_blob_of_many_parts_reads_back(store: &dyn BlobStore) {
    const MEBIBYTE: usize = 1 << 20;
    let block = Rng::new(2).bytes(MEBIBYTE);
    // Parts from one byte to 65 537, turned by one byte each round so that no two stretches are alike.
    let mut bytes = Vec::with_capacity(64 * MEBIBYTE);
    (0..64).for_each(|turn| {
        bytes.extend_from_slice(&block[turn..]);
        bytes.extend_from_slice(&block[..turn]);
    });
    let mut parts = Vec::new();
    let (mut rest, mut len) = (bytes.as_slice(), 1);
    while !rest.is_empty() {
        let (part, after) = rest.split_at(len.min(rest.len()));
        parts.push(part);
        (rest, len) = (after, len * 2 % 65_537);
    }
    assert_eq!(store.put_new("large", &parts).unwrap(), Put::Created);
    assert!(whole(store, "large") == bytes, "the large blob came back different");
    let middle = 40 * MEBIBYTE - 7;
    assert_eq!(store.get("large", middle as u64..middle as u64 + 20).unwrap(), bytes[middle..middle + 20]);
}

pub fn ranges_are_exact_or_refused(store: &dyn BlobStore) {
    store.put_new("digits", &[b"0123456789"]).unwrap();
    for (range, expected) in
        [(0..10, &b"0123456789"[..]), (3..7, b"3456"), (9..10, b"9"), (4..4, b""), (10..10, b"")]
    {
        assert_eq!(store.get("digits", range).unwrap(), expected);
    }
    for range in [0..11, 9..12, 10..11, 11..11, 20..30, 0..u64::MAX, u64::MAX - 1..u64::MAX] {
        assert_code(store.get("digits", range.clone()), Code::Integrity, &format!("{range:?}"));
    }
    #[expect(clippy::reversed_empty_ranges, reason = "such a range is what is being refused")]
    let backwards = 7..3;
    assert_code(store.get("digits", backwards), Code::Bug, "a range that ends before it starts");
    assert_code(store.get_whole("digits", 9), Code::Integrity, "more than the limit");
}

pub fn absent_blobs_are_not_found(store: &dyn BlobStore) {
    store.put_new("a/b/c", &[b"1"]).unwrap();
    for absent in ["x", "a/x", "x/y/z", "a", "a/b", "a/b/c/d"] {
        assert_code(store.get(absent, 0..0), Code::NotFound, absent);
        assert_code(store.size(absent), Code::NotFound, absent);
    }
    assert_eq!(names(store, "x"), [""; 0]);
    assert_eq!(names(store, "x/y"), [""; 0]);
}

pub fn a_prefix_lists_whole_components(store: &dyn BlobStore) {
    let all = ["a/b/1", "a/b/2", "a/bb/3", "a-b/4", "ab/5", "b"];
    for (len, name) in all.iter().enumerate() {
        store.put_new(name, &[&vec![0; len]]).unwrap();
    }
    let mut sorted = all;
    sorted.sort_unstable();
    assert_eq!(names(store, ""), sorted);
    assert_eq!(names(store, "a"), ["a/b/1", "a/b/2", "a/bb/3"]);
    assert_eq!(names(store, "a/b"), ["a/b/1", "a/b/2"]);
    assert_eq!(names(store, "a/b/1"), ["a/b/1"]);
    assert_eq!(names(store, "b"), ["b"]);
    assert_eq!(names(store, "a/b/1/x"), [""; 0]);
    let mut sizes = 0;
    store
        .list("", &mut |listed| {
            assert_eq!(listed.size, store.size(&listed.name)?);
            sizes += listed.size;
            Ok(())
        })
        .unwrap();
    assert_eq!(sizes, 15);
}

pub fn an_error_of_the_listener_ends_the_listing(store: &dyn BlobStore) {
    store.put_new("a", &[]).unwrap();
    store.put_new("b/c", &[]).unwrap();
    let mut calls = 0;
    let listing = store.list("", &mut |_| {
        calls += 1;
        Err(mainstay_core::Error::new(Code::Cancelled, "enough"))
    });
    assert_code(listing, Code::Cancelled, "list");
    assert_eq!(calls, 1);
}

pub fn deleting_is_idempotent(store: &dyn BlobStore) {
    store.put_new("a/1", &[b"1"]).unwrap();
    store.put_new("a/2", &[b"2"]).unwrap();
    for _ in 0..2 {
        store.delete("a/1").unwrap();
        assert_code(store.size("a/1"), Code::NotFound, "a/1");
    }
    store.delete("never/was").unwrap();
    store.delete("a").unwrap();
    assert_eq!(names(store, ""), ["a/2"]);
    store.delete("a/2").unwrap();
    store.flush().unwrap();
    assert_eq!(store.put_new("a/3", &[b"3"]).unwrap(), Put::Created);
    assert_eq!(names(store, "a"), ["a/3"]);
}

pub fn names_that_are_no_names_are_refused(store: &dyn BlobStore) {
    let long = "x".repeat(201);
    for bad in [
        "", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/..", "a/../b", "./a", ".a", "a/.b", "A", "a b",
        "a\0b", "a\nb", "a\\b", "ä", &long,
    ] {
        assert_code(store.put_new(bad, &[b"x"]), Code::Bug, bad);
        assert_code(store.get(bad, 0..0), Code::Bug, bad);
        assert_code(store.size(bad), Code::Bug, bad);
        assert_code(store.delete(bad), Code::Bug, bad);
        if !bad.is_empty() {
            assert_code(store.list(bad, &mut |_| Ok(())), Code::Bug, bad);
        }
    }
    assert_eq!(names(store, ""), [""; 0]);
}

pub fn flushing_and_sweeping_lose_nothing(store: &dyn BlobStore) {
    store.flush().unwrap();
    store.put_new("a/b/c", &[b"1"]).unwrap();
    store.flush().unwrap();
    store.flush().unwrap();
    store.put_new("a/b/d", &[b"2"]).unwrap();
    store.sweep_temporary(Time(i64::MAX)).unwrap();
    assert_eq!(names(store, ""), ["a/b/c", "a/b/d"]);
    assert_eq!(whole(store, "a/b/d"), b"2");
}

pub fn the_reserve_can_be_used_and_made_again(store: &dyn BlobStore) {
    store.put_new("a", &[b"1"]).unwrap();
    store.release_reserve().unwrap();
    assert!(!store.release_reserve().unwrap(), "a reserve can be used once");
    assert!(store.reserve().unwrap().is_none_or(|bytes| bytes == 0), "a used reserve is said to be there");
    store.restore_reserve().unwrap();
    store.restore_reserve().unwrap();
    assert_eq!(names(store, ""), ["a"]);
}

fn whole(store: &dyn BlobStore, name: &str) -> Vec<u8> {
    store.get_whole(name, u64::MAX).unwrap()
}

fn names(store: &dyn BlobStore, prefix: &str) -> Vec<String> {
    let mut names = Vec::new();
    store
        .list(prefix, &mut |listed| {
            names.push(listed.name);
            Ok(())
        })
        .unwrap();
    names.sort_unstable();
    names
}

fn assert_code<T>(result: Result<T>, code: Code, what: &str) {
    assert_eq!(result.err().map(|error| error.code()), Some(code), "{what}");
}
