//! Journals: what goes in comes out, what is acknowledged survives, what is missing is named.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod common;

use std::sync::Arc;

use common::{Bench, open, open_store, options, workload};
use mainstay_core::{BlobStore as _, Change, Code, Position, Silent, StreamRef, Time};
use mainstay_repository::{GcOptions, Journal, JournalWriter, Repository, Role, Unlock, VerifyScope};
use mainstay_testkit::{CrashStates, MemoryStore, Rng, TracingStore};

fn stream() -> StreamRef {
    StreamRef {
        workload: workload(1),
        name: "wal 42 timeline 2".into(),
        parent: Some(("wal 42 timeline 1".into(), at(7))),
    }
}

fn at(offset: u64) -> Position {
    Position(offset.to_be_bytes().to_vec())
}

/// Changes of random lengths, one after the other from `from` on.
fn changes(seed: u64, count: usize, mut from: u64) -> Vec<Change> {
    let mut rng = Rng::new(seed);
    let change = |number: usize| {
        let bytes = match number % 5 {
            0 => rng.bytes(200_000),
            1 => Vec::new(),
            _ => vec![number as u8; 3000],
        };
        let (start, end) = (from, from + bytes.len().max(1) as u64);
        from = end;
        let time = (!number.is_multiple_of(3)).then(|| Time::from_seconds(1_800_000_000 + number as i64));
        Change { start: at(start), end: at(end), time, bytes }
    };
    (0..count).map(change).collect()
}

fn write(writer: &mut JournalWriter, changes: &[Change]) {
    for some in changes.chunks(7) {
        some.iter().for_each(|change| writer.append(change).unwrap());
        let end = writer.close().unwrap().cloned();
        assert_eq!(end, some.last().map(|change| change.end.clone()));
    }
}

fn only(repository: &Repository) -> Journal {
    let mut journals = repository.journals().unwrap();
    assert_eq!(journals.len(), 1);
    journals.pop().unwrap()
}

fn read(journal: &Journal, from: &Position) -> Vec<Change> {
    journal.read(from).unwrap().map(|change| change.unwrap()).collect()
}

#[test]
fn what_goes_in_comes_out_from_any_position() {
    let bench = Bench::new(1);
    let wanted = changes(1, 40, 100);
    let mut writer = bench.repository.append_journal(stream()).unwrap();
    write(&mut writer, &wanted[..20]);
    // Another process goes on.
    let mut writer = open(&bench).append_journal(stream()).unwrap();
    assert_eq!(writer.end(), Some(&wanted[19].end));
    write(&mut writer, &wanted[20..]);
    let journal = only(&open(&bench));
    assert_eq!(*journal.stream(), stream());
    assert_eq!(bench.repository.journal(&stream()).unwrap().unwrap().stretches(), journal.stretches());
    let other = StreamRef { name: "another".into(), ..stream() };
    assert!(bench.repository.journal(&other).unwrap().is_none());
    for (index, change) in wanted.iter().enumerate() {
        assert_eq!(read(&journal, &change.start), wanted[index..], "from change {index}");
    }
    assert_eq!(read(&journal, &wanted[39].end), []);
    assert_eq!(journal.read(&at(99)).err().map(|error| error.code()), Some(Code::NotFound));
    let stretches = journal.stretches();
    assert_eq!(stretches.len(), 1);
    assert_eq!((&stretches[0].start, &stretches[0].end), (&wanted[0].start, &wanted[39].end));
    let times = || wanted.iter().filter_map(|change| change.time);
    assert_eq!((stretches[0].first, stretches[0].last), (times().min(), times().max()));
    assert_eq!(journal.holes(), []);
    assert_eq!(journal.since(times().max().unwrap()), None);
    assert_eq!(journal.since(Time::from_seconds(0)), Some(wanted[0].start.clone()));
    assert_eq!(
        (journal.bytes_before(&wanted[0].end), journal.bytes_before(&wanted[39].end)),
        (0, stretches[0].bytes)
    );
}

#[test]
fn of_two_that_follow_one_stream_the_slower_is_refused() {
    let bench = Bench::new(2);
    let wanted = changes(2, 3, 0);
    let (one, two) = (open(&bench), open(&bench));
    let (mut first, mut second) =
        (one.append_journal(stream()).unwrap(), two.append_journal(stream()).unwrap());
    first.append(&wanted[0]).unwrap();
    second.append(&wanted[0]).unwrap();
    first.close().unwrap();
    assert_eq!(second.close().unwrap_err().code(), Code::Conflict);
    assert_eq!(first.append(&wanted[2]).unwrap_err().code(), Code::Conflict, "it does not follow");
    write(&mut first, &wanted[1..]);
    assert_eq!(read(&only(&bench.repository), &at(0)), wanted);
}

#[test]
fn a_client_that_only_writes_goes_on_and_reads_nothing() {
    let bench = Bench::new(3);
    let wanted = changes(3, 10, 0);
    let ring = bench.repository.add_writer("agent", Role::WriteOnly).unwrap();
    for some in wanted.chunks(5) {
        let unlock = Unlock::Ring(Box::new(ring.clone()));
        let client =
            Repository::open(Arc::new(bench.store.clone()), &unlock, &options(&bench.clock)).unwrap();
        write(&mut client.append_journal(stream()).unwrap(), some);
        let journal = only(&client);
        assert_eq!(journal.read(&at(0)).err().map(|error| error.code()), Some(Code::NoPower));
        assert_eq!(client.trim_journal(&journal, &at(u64::MAX)).unwrap_err().code(), Code::NoPower);
    }
    assert_eq!(read(&only(&open(&bench)), &at(0)), wanted);
}

#[test]
fn whoever_may_only_write_takes_nothing_away() {
    let bench = Bench::new(10);
    let wanted = changes(10, 8, 0);
    let ring = bench.repository.add_writer("agent", Role::WriteOnly).unwrap();
    let unlock = || Unlock::Ring(Box::new(ring.clone()));
    write(&mut bench.repository.append_journal(stream()).unwrap(), &wanted[..4]);
    // In an old state of the store the next number is torn, so that it takes the one behind, and names what comes before.
    let old = MemoryStore::from_blobs(bench.store.snapshot());
    let first = old.snapshot().into_keys().find(|name| name.starts_with("journal/")).unwrap();
    let name = |number: u8| format!("{}{number}", first.strip_suffix('0').unwrap());
    old.put_new(&name(1), &[b"torn"]).unwrap();
    write(&mut bench.repository.append_journal(stream()).unwrap(), &wanted[4..]);
    let hostile = Repository::open(Arc::new(old.clone()), &unlock(), &options(&bench.clock)).unwrap();
    let start = u64::from_be_bytes(wanted[3].end.0.clone().try_into().unwrap());
    write(&mut hostile.append_journal(stream()).unwrap(), &changes(99, 1, start));
    bench.store.put_new(&name(2), &[&old.snapshot()[&name(2)]]).unwrap();
    assert_eq!(read(&only(&open(&bench)), &at(0)), wanted);
    assert!(!open(&bench).verify(&VerifyScope::default(), &Silent).unwrap().is_sound());
}

#[test]
fn a_gap_and_its_reason_are_kept() {
    let bench = Bench::new(4);
    let (before, after) = (changes(4, 5, 0), changes(5, 5, 9_000_000));
    let mut writer = bench.repository.append_journal(stream()).unwrap();
    write(&mut writer, &before);
    writer.skip("the slot was removed").unwrap();
    write(&mut writer, &after);
    let journal = only(&bench.repository);
    let holes = journal.holes();
    assert_eq!(holes.len(), 1);
    assert_eq!((&holes[0].start, &holes[0].end), (&before[4].end, &after[0].start));
    assert_eq!(holes[0].why, "the slot was removed");
    assert_eq!(journal.stretches().len(), 2);
    let got: Vec<_> = journal.read(&at(0)).unwrap().collect();
    assert_eq!(got.len(), 6, "it ends at the hole");
    assert_eq!(got[5].as_ref().err().map(mainstay_core::Error::code), Some(Code::Integrity));
    assert_eq!(read(&journal, &after[0].start), after);
}

#[test]
fn what_is_trimmed_goes_and_the_rest_stays() {
    let bench = Bench::new(6);
    let wanted = changes(6, 35, 0);
    write(&mut bench.repository.append_journal(stream()).unwrap(), &wanted);
    let before = bench.store.total_bytes();
    let journal = only(&bench.repository);
    bench.repository.trim_journal(&journal, &wanted[16].start).unwrap();
    bench.clock.advance(std::time::Duration::from_secs(9 * 24 * 3600));
    let options = GcOptions::default();
    let plan = bench.repository.plan_gc(&options, &Silent).unwrap();
    bench.repository.gc(&plan, &Silent).unwrap();
    assert!(bench.store.total_bytes() < before);
    let journal = only(&open(&bench));
    // Objects hold seven changes each.
    assert_eq!(journal.stretches()[0].start, wanted[14].start);
    assert_eq!(read(&journal, &wanted[16].start), wanted[16..]);
    let mut writer = bench.repository.append_journal(stream()).unwrap();
    assert_eq!(writer.end(), Some(&wanted[34].end));
    let more = changes(7, 2, u64::from_be_bytes(wanted[34].end.0.clone().try_into().unwrap()));
    write(&mut writer, &more);
    assert!(open(&bench).verify(&VerifyScope::default(), &Silent).unwrap().is_sound());
}

#[test]
fn a_crash_anywhere_loses_nothing_that_was_acknowledged() {
    let (medium, bench) = (MemoryStore::new(), Bench::new(8));
    let trace = TracingStore::new(medium.clone());
    let repository =
        Repository::create(Arc::new(trace.clone()), bench.ring.clone(), &[], &options(&bench.clock)).unwrap();
    let (base, skipped) = (medium.snapshot(), trace.ops().len());
    let wanted = changes(8, 12, 0);
    let mut acknowledged = Vec::new();
    for part in wanted.chunks(4) {
        let mut writer = repository.append_journal(stream()).unwrap();
        for some in part.chunks(2) {
            some.iter().for_each(|change| writer.append(change).unwrap());
            let end = writer.close().unwrap().cloned().unwrap();
            acknowledged.push((trace.ops().len() - skipped, end));
        }
    }
    let ops = trace.ops()[skipped..].to_vec();
    let states = CrashStates::new(base, ops).torn_last(true).for_each(|state| {
        let what = &state.what;
        let again = open_store(Arc::new(state.store.clone()), &bench.ring, &bench.clock).unwrap();
        let safe = acknowledged.iter().rfind(|(done, _)| *done <= state.done).map(|(_, end)| end.clone());
        let mut writer = again.append_journal(stream()).unwrap();
        assert!(writer.end() >= safe.as_ref(), "{what}: lost what was acknowledged");
        let at = wanted
            .iter()
            .position(|change| Some(&change.start) == writer.end())
            .unwrap_or_else(|| if writer.end().is_none() { 0 } else { wanted.len() });
        write(&mut writer, &wanted[at..]);
        assert_eq!(read(&only(&again), &wanted[0].start), wanted, "{what}");
    });
    assert!(states > 12, "only {states} states");
}

#[test]
fn whatever_happens_to_its_bytes_nothing_wrong_comes_out_and_it_is_noticed() {
    let bench = Bench::new(9);
    let wanted = changes(9, 6, 0);
    let mut writer = bench.repository.append_journal(stream()).unwrap();
    wanted.chunks(2).for_each(|some| write(&mut writer, some));
    let blobs = bench.store.snapshot();
    let names: Vec<_> = blobs.keys().filter(|name| name.starts_with("journal/")).cloned().collect();
    assert_eq!(names.len(), 3);
    let mut rng = Rng::new(9);
    for (index, name) in names.iter().enumerate() {
        let whole = blobs[name].to_vec();
        let mut damaged = vec![None, Some(Vec::new()), Some(whole[..whole.len() - 1].to_vec())];
        damaged.push(Some(blobs[&names[(index + 1) % 3]].to_vec()));
        for _ in 0..60 {
            let mut bytes = whole.clone();
            bytes[rng.below(whole.len())] ^= 1 << rng.below(8);
            damaged.push(Some(bytes));
        }
        // The head of an object is where most of its fields are.
        damaged.extend((0..whole.len().min(2200)).step_by(41).map(|at| {
            let mut bytes = whole.clone();
            bytes[at] = bytes[at].wrapping_add(1);
            Some(bytes)
        }));
        for bytes in damaged {
            let (mut changed, is_lost) = (blobs.clone(), bytes.is_none());
            match bytes {
                Some(bytes) => changed.insert(name.clone(), bytes.into()),
                None => changed.remove(name),
            };
            let again =
                open_store(Arc::new(MemoryStore::from_blobs(changed)), &bench.ring, &bench.clock).unwrap();
            let journals = again.journals().unwrap();
            for journal in &journals {
                for (at, change) in wanted.iter().enumerate() {
                    let Ok(got) = journal.read(&change.start) else { continue };
                    let whole: Vec<_> = got.map_while(Result::ok).collect();
                    assert_eq!(whole, wanted[at..at + whole.len()]);
                }
            }
            let scope = VerifyScope { read_data: true, ..VerifyScope::default() };
            let report = again.verify(&scope, &Silent).unwrap();
            // Nobody who only has what is there can know of more at the end.
            assert!(!report.is_sound() || (index == 2 && is_lost), "{name}");
            // One that seems to be of a newer version is not written behind.
            let code = again.append_journal(stream()).err().map(|error| error.code());
            assert!(matches!(code, None | Some(Code::TooNew)), "{name}: {code:?}");
        }
    }
}
