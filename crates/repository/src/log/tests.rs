//! What a log makes of records that it should not believe.

use std::sync::Arc;

use mainstay_core::{BlobStore as _, Code, Id16, PointId, Time, WriterId};
use mainstay_testkit::{MemoryStore, ScriptedClock};

use super::record::{
    Change, Decoded, GroupEntry, LogId, PackEntry, PointEntry, Record, StoredNote, WriterEntry,
};
use super::state::{Owner, State};
use super::text::SealedText;
use super::{Log, random_id};
use crate::codec::Decoder;
use crate::config::Features;
use crate::format::pack::GroupDigest;
use crate::format::segment::Class;
use crate::hostile::feed;
use crate::keys::{DomainKeys, FamilyId, KeyRing, Powers};
use crate::names;
use crate::ranges::Ranges;
use crate::sign::SigningKey;

struct Bench {
    store: MemoryStore,
    log: Log,
    state: State,
    root: SigningKey,
    writer: SigningKey,
    expirer: SigningKey,
}

impl Bench {
    fn new() -> Self {
        let [root, writer, expirer] = [(); 3].map(|()| SigningKey::generate().unwrap());
        let store = MemoryStore::new();
        let log = Log {
            store: Arc::new(store.clone()),
            id: LogId([7; 32]),
            family: FamilyId::of(&root.verifying_key()),
            root: root.verifying_key(),
            clock: Arc::new(ScriptedClock::at(Time::from_seconds(1))),
        };
        let entry = |key: &SigningKey, powers, name: &str| WriterEntry {
            key: key.verifying_key(),
            powers,
            name: text(name),
        };
        let writers = vec![
            entry(&writer, Powers::WRITE, "writer"),
            entry(&expirer, Powers::EXPIRE.with(Powers::COLLECT), "expirer"),
        ];
        let mut bench = Self { store, log, state: State::default(), root, writer, expirer };
        bench.append(&bench.root.clone(), Change::Genesis { writers }).unwrap();
        bench
    }

    fn append(&mut self, signer: &SigningKey, change: Change) -> mainstay_core::Result<u64> {
        self.log.append(&mut self.state, signer, &mut |_| Ok(change.clone()))
    }

    fn record(&self, signer: &SigningKey, change: Change) -> Vec<u8> {
        let record = Record {
            sequence: self.state.next_sequence(),
            previous: self.state.head_hash(),
            commit: random_id().unwrap(),
            writer: signer.verifying_key().writer_id(),
            time: Time(5),
            change,
        };
        record.encode(&self.log.id, signer).unwrap()
    }

    /// Puts bytes under the next number, as anyone with access to the store can.
    fn plant(&mut self, bytes: &[u8]) {
        let name = names::log_record(self.state.next_sequence());
        self.store.put_new(&name, &[bytes]).unwrap();
        self.store.put_new(&names::copy_of(&name), &[bytes]).unwrap();
        self.log.read(&mut self.state).unwrap();
    }

    fn read_again(&self) -> State {
        let mut state = State::default();
        self.log.read_past_gaps(&mut state).unwrap();
        state
    }
}

fn text(words: &str) -> SealedText {
    SealedText::seal(&DomainKeys::generate().unwrap(), &FamilyId([0; 32]), words).unwrap()
}

fn point(id: u8) -> PointId {
    Id16([id; 16])
}

fn commit(id: u8) -> Change {
    let entry = PointEntry { id: point(id), hash: [id; 32], retain_until: Time(0) };
    Change::Commit { packs: Vec::new(), runs: Vec::new(), point: Some(entry) }
}

fn expire(id: u8) -> Change {
    Change::Expire { points: vec![point(id)], reason: text("test") }
}

fn pack(id: u8, group: u8, digest: u8) -> PackEntry {
    let mut segments = Ranges::default();
    segments.insert(0..4);
    let digest = GroupDigest([digest; 16]);
    let groups = vec![GroupEntry { id: Id16([group; 16]), class: Class::Data, digest, segments }];
    PackEntry { id: Id16([id; 16]), length: 1000, footer_hash: [id; 32], retain_until: Time(0), groups }
}

#[test]
fn a_record_without_the_power_for_it_does_nothing() {
    let mut bench = Bench::new();
    let (writer, stranger) = (bench.writer.clone(), SigningKey::generate().unwrap());
    bench.append(&writer, commit(1)).unwrap();
    // Through the door, it is told so.
    for change in [expire(1), Change::Features(Features::with_bits([1, 0, 0]))] {
        assert_eq!(bench.append(&writer, change).unwrap_err().code(), Code::NoPower);
    }
    assert_eq!(bench.append(&stranger, commit(2)).unwrap_err().code(), Code::NoPower);
    // Past the door, nobody listens.
    let release = Change::Note { point: point(1), note: StoredNote::Release(Id16::default()) };
    let admit = Change::Writer(WriterEntry {
        key: stranger.verifying_key(),
        powers: Powers(u32::MAX),
        name: text("me"),
    });
    let packs = || vec![Id16([9; 16])];
    let condemn = Change::Condemn { packs: packs(), moved: Vec::new() };
    let features = Change::Features(Features::with_bits([1; 3]));
    let decision = Change::Decision { id: Id16([4; 16]), words: text("nobody needs this") };
    let delete = Change::Delete { packs: packs() };
    for change in [expire(1), release, admit, condemn, delete, features, decision] {
        bench.plant(&bench.record(&writer, change));
    }
    bench.plant(&bench.record(&stranger, commit(3)));
    bench.append(&writer, commit(4)).unwrap();
    let state = bench.read_again();
    let live: Vec<_> = state.live_points().iter().map(|point| point.entry.id).collect();
    assert_eq!(live, [point(1), point(4)]);
    assert!(state.point(&point(1)).unwrap().notes.is_empty());
    assert_eq!(state.writers().count(), 2);
    assert_eq!((state.packs().count(), state.decisions().count()), (0, 0));
    // Those of a known writer have their place in the chain; the stranger's has none.
    assert_eq!((state.damage(), state.voids()), (&[][..], &[9][..]));
    assert_eq!(state.head_hash(), bench.state.head_hash());
}

#[test]
fn a_revoked_writers_records_do_nothing() {
    let mut bench = Bench::new();
    let (root, writer) = (bench.root.clone(), bench.writer.clone());
    bench.append(&writer, commit(1)).unwrap();
    let none = WriterEntry { key: writer.verifying_key(), powers: Powers::default(), name: text("writer") };
    bench.append(&root, Change::Writer(none)).unwrap();
    assert_eq!(bench.append(&writer, commit(2)).unwrap_err().code(), Code::NoPower);
    bench.plant(&bench.record(&writer, commit(3)));
    let state = bench.read_again();
    assert_eq!(state.live_points().len(), 1);
    assert_eq!((state.damage().len(), state.voids().len()), (0, 0));
}

#[test]
fn kinds_of_later_versions_are_passed_over_in_their_place() {
    let mut bench = Bench::new();
    let (writer, expirer) = (bench.writer.clone(), bench.expirer.clone());
    bench.append(&writer, commit(1)).unwrap();
    for kind in [1000_u16, 0, u16::MAX] {
        let mut bytes = bench.record(&writer, expire(1));
        bytes[6..8].copy_from_slice(&kind.to_le_bytes());
        let signed = bytes.len() - 64;
        let signature = writer.sign("mainstay log record 1", &bytes[..signed]);
        bytes[signed..].copy_from_slice(&signature);
        bench.plant(&bytes);
    }
    bench.append(&writer, commit(2)).unwrap();
    let state = bench.read_again();
    assert_eq!((state.damage().len(), state.voids().len(), state.live_points().len()), (0, 0, 2));
    bench.append(&expirer, expire(1)).unwrap();
}

#[test]
fn the_root_says_what_a_duty_must_know() {
    for (bits, reads, writes, collects) in [
        ([0, 0, 0], true, true, true),
        ([0, 0, 2], true, true, false),
        ([0, 4, 0], true, false, true),
        ([8, 0, 0], false, false, false),
    ] {
        let mut bench = Bench::new();
        let (root, writer, expirer) = (bench.root.clone(), bench.writer.clone(), bench.expirer.clone());
        bench.append(&writer, commit(1)).unwrap();
        bench.append(&root, Change::Features(Features::with_bits(bits))).unwrap();
        let too_new = |outcome: mainstay_core::Result<u64>| match outcome {
            Ok(_) => true,
            Err(error) => {
                assert_eq!(error.code(), Code::TooNew, "{bits:?}: {error:?}");
                false
            }
        };
        assert_eq!(too_new(bench.log.read(&mut State::default())), reads, "{bits:?}");
        assert_eq!(too_new(bench.append(&writer, commit(2))), writes, "{bits:?}");
        assert_eq!(too_new(bench.append(&expirer, expire(1))), collects, "{bits:?}");
    }
}

#[test]
fn a_lost_record_is_not_the_end_of_the_log() {
    let mut bench = Bench::new();
    let writer = bench.writer.clone();
    for id in 1..6 {
        bench.append(&writer, commit(id)).unwrap();
    }
    for name in [names::log_record(3), names::copy_of(&names::log_record(3))] {
        bench.store.delete(&name).unwrap();
    }
    // A blob of a number that cannot be is not of this log.
    bench.store.put_new(&names::log_record(u64::MAX), &[b"x"]).unwrap();
    let state = bench.read_again();
    assert_eq!(state.live_points().len(), 4);
    assert_eq!((state.damage(), state.voids()), (&[4][..], &[3][..]));
    assert_eq!(state.next_sequence(), 6);
}

#[test]
fn a_record_that_does_nothing_still_shows_that_one_before_it_is_lost() {
    let mut bench = Bench::new();
    let writer = bench.writer.clone();
    for id in 1..3 {
        bench.append(&writer, commit(id)).unwrap();
    }
    bench.plant(&bench.record(&writer, expire(1)));
    bench.append(&writer, commit(3)).unwrap();
    assert_eq!(bench.read_again().damage(), &[] as &[u64]);
    for name in [names::log_record(2), names::copy_of(&names::log_record(2))] {
        bench.store.delete(&name).unwrap();
    }
    assert_eq!(bench.read_again().damage(), [3]);
}

/// Puts a record of `writer` so many numbers beyond the end.
fn plant_far_off(bench: &Bench, writer: &SigningKey, beyond: u64) {
    let record = Record {
        sequence: bench.state.next_sequence() + beyond,
        previous: bench.state.head_hash(),
        commit: random_id().unwrap(),
        writer: writer.verifying_key().writer_id(),
        time: Time(5),
        change: commit(99),
    };
    let bytes = record.encode(&bench.log.id, writer).unwrap();
    bench.store.put_new(&names::log_record(record.sequence), &[&bytes]).unwrap();
}

#[test]
fn bytes_beyond_the_end_do_not_move_it() {
    let mut bench = Bench::new();
    let writer = bench.writer.clone();
    bench.append(&writer, commit(1)).unwrap();
    bench.store.put_new(&names::log_record(40), &[b"not a record"]).unwrap();
    bench.log.id = LogId([8; 32]);
    plant_far_off(&bench, &writer, 60);
    bench.log.id = LogId([7; 32]);
    assert_eq!(bench.read_again().next_sequence(), 2);
}

#[test]
fn a_record_planted_beyond_the_end_does_not_split_the_log() {
    let mut bench = Bench::new();
    let writer = bench.writer.clone();
    bench.append(&writer, commit(1)).unwrap();
    plant_far_off(&bench, &writer, 50);
    // One has seen it and goes on behind it; the other one has not, and comes later.
    let mut seen = bench.read_again();
    assert_eq!(seen.next_sequence(), 53);
    assert_eq!(bench.log.append(&mut seen, &writer, &mut |_| Ok(commit(2))).unwrap(), 53);
    assert_eq!(bench.append(&writer, commit(3)).unwrap(), 54);
    let state = bench.read_again();
    assert_eq!((state.live_points().len(), state.head_hash()), (4, bench.state.head_hash()));
    assert!(state.damage().is_empty());
}

#[test]
fn whoever_passed_over_a_record_begins_again() {
    let mut bench = Bench::new();
    let writer = bench.writer.clone();
    bench.append(&writer, commit(1)).unwrap();
    plant_far_off(&bench, &writer, 50);
    let mut seen = bench.read_again();
    assert_eq!(bench.append(&writer, commit(2)).unwrap(), 2);
    let outcome = bench.log.append(&mut seen, &writer, &mut |_| Ok(commit(3)));
    assert_eq!(outcome.unwrap_err().code(), Code::Conflict);
    assert_eq!(bench.log.append(&mut seen, &writer, &mut |_| Ok(commit(3))).unwrap(), 53);
    assert!(seen.point(&point(2)).is_some(), "a record that was there was never seen");
    assert_eq!(seen.damage(), [52]);
}

#[test]
fn nobody_says_anything_about_anothers_group() {
    let mut bench = Bench::new();
    let (writer, root, expirer) = (bench.writer.clone(), bench.root.clone(), bench.expirer.clone());
    let other = SigningKey::generate().unwrap();
    let entry = WriterEntry { key: other.verifying_key(), powers: Powers::WRITE, name: text("other") };
    bench.append(&root, Change::Writer(entry)).unwrap();
    let register = |pack| Change::Commit { packs: vec![pack], runs: Vec::new(), point: None };
    bench.append(&writer, register(pack(1, 7, 1))).unwrap();
    bench.append(&other, register(pack(2, 7, 1))).unwrap();
    bench.append(&other, register(pack(3, 7, 2))).unwrap();
    bench.append(&writer, register(pack(4, 7, 1))).unwrap();
    bench.append(&expirer, Change::Condemn { packs: Vec::new(), moved: vec![pack(5, 7, 1)] }).unwrap();
    let group = Id16([7; 16]);
    let places: Vec<_> = bench.state.locations(&group).iter().map(|place| place.pack.0[0]).collect();
    assert_eq!(places, [1, 2, 4, 5], "another group under the same id is nowhere");
    let [first, second] = [&writer, &other].map(|key| key.verifying_key().writer_id());
    let by = |id: u8| bench.state.pack(&Id16([id; 16])).unwrap().by;
    assert_eq!([1, 2, 4, 5].map(by), [Some(first), Some(second), Some(first), None]);
    // Whose it is, the first record does not decide.
    assert_eq!(bench.state.owner(&group), Some(Owner::Contested));
    let trusted = |owner: Option<WriterId>| -> Vec<u8> {
        let places = bench.state.trusted_places(&group, owner.as_ref());
        places.map(|place| place.pack.0[0]).collect()
    };
    assert_eq!([Some(first), Some(second), None].map(trusted), [vec![1, 4, 5], vec![2, 5], vec![5]]);
    assert_eq!(bench.state.group(&group), Some(GroupDigest([1; 16])));
}

fn every_change() -> Vec<Change> {
    let key = SigningKey::generate().unwrap().verifying_key();
    let writer = || WriterEntry { key, powers: Powers::WRITE, name: text("name") };
    let run = super::record::RunEntry { id: point(1), domain: point(2), length: 5, hash: [6; 32] };
    let (id, reason) = (point(3), || text("why"));
    let notes = [
        StoredNote::Tag(text("tag")),
        StoredNote::Untag(text("tag")),
        StoredNote::Hold { id, reason: reason(), until: None },
        StoredNote::Hold { id, reason: reason(), until: Some(Time(7)) },
        StoredNote::Release(id),
        StoredNote::Verified { read_data: true },
        StoredNote::Proven { how: reason(), seconds: 9 },
        StoredNote::Boot(text("@766461 0+3")),
    ];
    let Change::Commit { point: entry, .. } = commit(1) else { unreachable!() };
    let mut changes = vec![
        Change::Genesis { writers: vec![writer(), writer()] },
        Change::Writer(writer()),
        Change::Commit { packs: vec![pack(1, 2, 3), pack(2, 3, 4)], runs: vec![run], point: entry },
        expire(1),
        Change::Condemn { packs: vec![point(1)], moved: vec![pack(5, 6, 7)] },
        Change::Delete { packs: vec![point(1), point(2)] },
        Change::Features(Features::with_bits([1, 2, 3])),
        Change::Decision { id, words: reason() },
    ];
    changes.extend(notes.map(|note| Change::Note { point: id, note }));
    changes
}

#[test]
fn every_change_comes_back_and_hostile_ones_are_errors() {
    let bench = Bench::new();
    for change in every_change() {
        let signer = &bench.root;
        let bytes = bench.record(signer, change.clone());
        let number = bench.state.next_sequence();
        let all = super::record::Signer { key: signer.verifying_key(), powers: change.needs() };
        match Record::decode(&bench.log.id, number, &bytes, |_| Some(all)).unwrap() {
            Decoded::Effective(record) => assert_eq!(record.change, change),
            Decoded::Idle { .. } => panic!("{change:?} does nothing"),
        }
        assert!(Record::decode(&LogId([8; 32]), number, &bytes, |_| Some(all)).is_err());
        feed(&bytes, 1 << 20, |other| {
            let decoded = Record::decode(&bench.log.id, number, other, |_| Some(all));
            assert_eq!(decoded.is_ok(), other == bytes, "a changed record was believed");
        });
        // Behind the signature nothing is trusted either.
        feed(&change.encode(), 1 << 20, |body| {
            let mut body = Decoder::new("log record", body);
            let _either = Change::decode(change.kind(), &mut body);
        });
    }
}

#[test]
fn words_of_the_log_are_for_the_domain_only() {
    let (ring, other) = (KeyRing::create().unwrap(), KeyRing::create().unwrap());
    let seal = |words: &str| SealedText::seal(&ring.domains()[0], &ring.family(), words).unwrap();
    for words in ["", "weekly", &"long ".repeat(300)] {
        assert_eq!(seal(words).open(&ring).unwrap(), words);
        assert_eq!(seal(words).open(&other).unwrap_err().code(), Code::NoPower);
    }
    let bytes = |words: &str| {
        let mut bytes = Vec::new();
        seal(words).encode(&mut bytes);
        bytes
    };
    assert_ne!(bytes("weekly"), bytes("weekly"));
    assert_eq!(bytes("weekly").len(), bytes("a lawsuit, whose name nobody is to know").len());
}
