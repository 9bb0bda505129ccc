//! Goal: a key does what it is for and nothing else, and the store cannot make anyone believe anything.
//!
//! Method: each lesser ring does its work, then tries the rest through the interface and with the raw constructions; the
//! store is given forged and foreign objects.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::sample::{COST, PASSPHRASE, Sample};
use common::{
    Bench, backup, clock, compare, large_items, open, open_store, options, restore, try_backup, try_restore,
};
use mainstay_core::{Code, PointId, Result, Silent, Time};
use mainstay_repository::keys::kit::Kit;
use mainstay_repository::keys::slot::{self, About};
use mainstay_repository::keys::{KeyRing, Powers, credential};
use mainstay_repository::{GcOptions, GcReport, Note, Repository, Role, Unlock, VerifyScope, WriterInfo};
use mainstay_testkit::{Blobs, MemoryStore, Part, ScriptedClock, TestItem};

fn as_role(bench: &Bench, role: Role) -> (Repository, KeyRing) {
    let ring = bench.repository.add_writer("somebody", role).unwrap();
    // As it reaches another machine.
    let ring = credential::decode(&credential::encode(&ring)).unwrap();
    (open_store(Arc::new(bench.store.clone()), &ring, &bench.clock).unwrap(), ring)
}

fn code<T>(outcome: Result<T>) -> Code {
    outcome.map(drop).unwrap_err().code()
}

fn collect(repository: &Repository) -> Result<GcReport> {
    let options = GcOptions { grace: Duration::ZERO, ..GcOptions::default() };
    repository.gc(&repository.plan_gc(&options, &Silent)?, &Silent)
}

fn verify(repository: &Repository) -> Vec<String> {
    let scope = VerifyScope { read_data: true, ..VerifyScope::default() };
    repository.verify(&scope, &Silent).unwrap().problems
}

fn somebody(repository: &Repository) -> WriterInfo {
    repository.writers().into_iter().find(|writer| writer.name == "somebody").unwrap()
}

#[test]
fn a_write_only_client_backs_up_and_reads_nothing() {
    let bench = Bench::new(1);
    let items = large_items(1, 4, 50_000);
    let owners = backup(&bench.repository, items.clone());
    let (client, ring) = as_role(&bench, Role::WriteOnly);
    // Everything is there already, and a write-only client finds that out without reading content.
    let before = bench.store.total_bytes();
    let first = backup(&client, items.clone());
    let second = backup(&client, items.clone());
    assert!(bench.store.total_bytes() - before < 30_000, "content was stored again");
    for point in [owners, first, second] {
        assert_eq!(code(client.read(&point)), Code::NoPower);
        let info = client.points().unwrap().into_iter().find(|info| info.id == point).unwrap();
        assert!(!info.readable && info.host.is_empty() && info.roots.is_empty());
        assert!(!info.workload.name.contains("workload"), "{}", info.workload.name);
    }
    assert_eq!(code(client.expire(&[first], "test")), Code::NoPower);
    assert_eq!(code(client.note(&first, &Note::Release(first))), Code::NoPower);
    assert_eq!(code(client.decide(None, "nobody needs this machine")), Code::NoPower);
    assert_eq!(code(client.plan_gc(&GcOptions::default(), &Silent)), Code::NoPower);
    assert_eq!(code(client.add_writer("more", Role::WriteOnly)), Code::NoPower);
    assert_eq!(code(client.revoke_writer(&somebody(&client).id)), Code::NoPower);
    assert!(ring.content_secret().is_err() && ring.structure_secret().is_err() && ring.root().is_err());
    // The owner reads what it wrote.
    bench.repository.refresh().unwrap();
    for point in [first, second] {
        compare(&items, &restore(&bench.repository, &point));
    }
    assert_eq!(verify(&bench.repository), Vec::<String>::new());
}

#[test]
fn a_collector_frees_space_and_reads_nothing() {
    let bench = Bench::new(2);
    let gone = backup(&bench.repository, large_items(2, 3, 80_000));
    let items = large_items(3, 3, 80_000);
    let kept = backup(&bench.repository, items.clone());
    let (collector, ring) = as_role(&bench, Role::Collector);
    assert_eq!(code(collector.read(&kept)), Code::NoPower);
    assert_eq!(code(try_backup(&collector, 1, items.clone())), Code::NoPower);
    assert_eq!(code(collector.note(&kept, &Note::Tag("mine".into()))), Code::NoPower);
    assert_eq!(code(collector.add_writer("more", Role::Collector)), Code::NoPower);
    assert!(ring.content_secret().is_err());
    collector.expire(&[gone], "old").unwrap();
    let before = bench.store.total_bytes();
    for _condemn_then_delete in 0..3 {
        collect(&collector).unwrap();
    }
    assert!(bench.store.total_bytes() + 200_000 < before, "nothing was freed");
    let reader = open(&bench);
    compare(&items, &restore(&reader, &kept));
    assert_eq!(verify(&reader), Vec::<String>::new());
    assert_eq!(verify(&collector), Vec::<String>::new());
}

#[test]
fn a_reader_restores_and_verifies_and_changes_nothing() {
    let bench = Bench::new(3);
    let items = large_items(4, 3, 40_000);
    let point = backup(&bench.repository, items.clone());
    let reader =
        open_store(Arc::new(bench.store.clone()), &bench.ring.reader().unwrap(), &bench.clock).unwrap();
    compare(&items, &restore(&reader, &point));
    assert_eq!(code(try_backup(&reader, 1, items)), Code::NoPower);
    assert_eq!(code(reader.expire(&[point], "test")), Code::NoPower);
    let scope = VerifyScope { points: vec![point], read_data: true };
    let report = reader.verify(&scope, &Silent).unwrap();
    assert!(report.problems.is_empty() && report.packs > 0 && report.chunks > 0, "{report:?}");
    let mut blobs = bench.store.snapshot();
    let pack =
        blobs.iter().filter(|(name, _)| name.starts_with("pack/")).max_by_key(|(_, bytes)| bytes.len());
    let (name, mut bytes) = pack.map(|(name, bytes)| (name.clone(), bytes.to_vec())).unwrap();
    bytes[5000] ^= 1;
    blobs.insert(name, bytes.into());
    let reader =
        open_store(Arc::new(MemoryStore::from_blobs(blobs)), &bench.ring.reader().unwrap(), &bench.clock)
            .unwrap();
    let report = reader.verify(&scope, &Silent).unwrap();
    assert!(!report.lost.is_empty() && report.sound.is_empty(), "{report:?}");
}

#[test]
fn a_revoked_writer_is_told_so_and_what_it_wrote_stays() {
    let bench = Bench::new(5);
    let (client, _) = as_role(&bench, Role::WriteOnly);
    let items = large_items(5, 2, 30_000);
    let point = backup(&client, items.clone());
    bench.repository.refresh().unwrap();
    // It is in the middle of a backup when it is revoked.
    let late = {
        let source = mainstay_testkit::VecSource::new(items.clone());
        let target = client.write(common::request(1)).unwrap();
        bench.repository.revoke_writer(&somebody(&bench.repository).id).unwrap();
        common::copy(Box::new(source), Box::new(target))
    };
    assert_eq!(code(late), Code::NoPower);
    assert_eq!(code(try_backup(&client, 1, items.clone())), Code::NoPower);
    assert_eq!(code(client.note(&point, &Note::Tag("late".into()))), Code::NoPower);
    let other = open(&bench);
    assert_eq!(other.points().unwrap().len(), 1);
    compare(&items, &restore(&other, &point));
    assert_eq!(somebody(&other).powers, Powers::default());
}

/// A store of another repository, whose objects are to be put where they do not belong.
fn foreign(passphrase: &[u8], clock: &ScriptedClock) -> (Blobs, KeyRing, PointId) {
    let (store, ring) = (MemoryStore::new(), KeyRing::create().unwrap());
    let slot = slot::seal_with_passphrase(&ring, &about(), passphrase, COST).unwrap();
    let repository =
        Repository::create(Arc::new(store.clone()), ring.clone(), &[slot], &options(clock)).unwrap();
    let point = backup(&repository, large_items(6, 2, 20_000));
    (store.snapshot(), ring, point)
}

fn about() -> About {
    About { label: "test".into(), created: Time::default() }
}

fn opens(blobs: &Blobs, unlock: &Unlock<'_>, clock: &ScriptedClock) -> Result<Repository> {
    Repository::open(Arc::new(MemoryStore::from_blobs(blobs.clone())), unlock, &options(clock))
}

#[test]
fn another_repository_with_the_same_passphrase_is_another_repository() {
    let clock = clock();
    let (own, own_ring, own_point) = foreign(PASSPHRASE, &clock);
    let (other, ..) = foreign(PASSPHRASE, &clock);
    let unlock = Unlock::Passphrase(PASSPHRASE);
    // Its slots beside ours, however they sort, do not open ours, and do not keep ours from opening.
    let mut mixed = own.clone();
    mixed
        .extend(other.iter().filter(|(name, _)| name.contains("keys/")).map(|(n, b)| (n.clone(), b.clone())));
    assert_eq!(opens(&mixed, &unlock, &clock).unwrap().family(), own_ring.family());
    // Its slots instead of ours.
    mixed.retain(|name, _| !(name.contains("keys/") && own.contains_key(name)));
    assert_eq!(code(opens(&mixed, &unlock, &clock)), Code::WrongKey);
    // Its configuration instead of ours: nobody who knows our key takes it for ours.
    let mut swapped = own.clone();
    swapped.extend(
        other.iter().filter(|(name, _)| name.starts_with("config")).map(|(n, b)| (n.clone(), b.clone())),
    );
    assert_eq!(code(opens(&swapped, &unlock, &clock)), Code::WrongKey);
    assert_eq!(code(opens(&swapped, &Unlock::Ring(Box::new(own_ring.clone())), &clock)), Code::WrongKey);
    let kit = Kit::generate(&own_ring.family()).unwrap();
    assert_eq!(code(opens(&other, &Unlock::Kit(&kit), &clock)), Code::WrongKey);
    // One copy of it changes nothing.
    let mut one = own.clone();
    one.insert("config.0".into(), Arc::clone(&other["config.0"]));
    opens(&one, &Unlock::Ring(Box::new(own_ring)), &clock).unwrap().read(&own_point).unwrap();
}

#[test]
fn objects_of_another_repository_are_refused_under_our_names() {
    let clock = clock();
    let (own, ring, point) = foreign(b"one", &clock);
    let (other, ..) = foreign(b"two", &clock);
    let kind = |name: &str| name.trim_start_matches("copy/").split('/').next().unwrap_or_default().to_owned();
    let ring = Unlock::Ring(Box::new(ring));
    let wanted = restore(&opens(&own, &ring, &clock).unwrap(), &point);
    for (name, _) in own.iter().filter(|(name, _)| !name.starts_with("config")) {
        for (_, bytes) in other.iter().filter(|(other, _)| kind(other) == kind(name)) {
            let mut mixed = own.clone();
            mixed.insert(name.clone(), Arc::clone(bytes));
            // Every copy of it, where there are two.
            if own.contains_key(&format!("copy/{name}")) {
                mixed.insert(format!("copy/{name}"), Arc::clone(bytes));
            }
            let Ok(repository) = opens(&mixed, &ring, &clock) else { continue };
            if let Ok(got) = try_restore(&repository, &point) {
                let damaged =
                    !got.skips.is_empty() && got.items.iter().all(|item| wanted.items.contains(item));
                assert!(got == wanted || damaged, "{name}: {got:?}");
            }
            let report = repository
                .verify(&VerifyScope { read_data: true, ..VerifyScope::default() }, &Silent)
                .unwrap();
            assert!(
                !report.problems.is_empty() || !report.degraded.is_empty(),
                "{name} is foreign, nobody noticed"
            );
        }
    }
}

#[test]
fn a_forged_repository_under_our_name_is_refused() {
    let clock = clock();
    let (own, ring, _) = foreign(b"one", &clock);
    // The family in the configuration is ours, the root key and the signature are the forger's.
    let forger = KeyRing::create().unwrap();
    let store = MemoryStore::new();
    Repository::create(Arc::new(store.clone()), forger, &[], &options(&clock)).unwrap();
    let mut forged = own["config.0"].to_vec();
    let theirs = &store.snapshot()["config.0"];
    // After magic, version, family and copy.
    forged[54..].copy_from_slice(&theirs[54..]);
    let mut blobs = own.clone();
    (0..3).for_each(|copy| drop(blobs.insert(format!("config.{copy}"), forged.clone().into())));
    assert_eq!(code(opens(&blobs, &Unlock::Ring(Box::new(ring)), &clock)), Code::Integrity);
    assert_eq!(code(opens(&blobs, &Unlock::Passphrase(b"one"), &clock)), Code::Integrity);
}

#[test]
fn nothing_recognisable_is_stored_in_the_clear() {
    const CANARY: &[u8] = b"canary-in-the-coal-mine";
    let text = |name: &str| format!("{}-{name}", String::from_utf8_lossy(CANARY));
    let bench = Bench::new(7);
    let path = mainstay_core::ItemPath::new(text("path")).unwrap();
    let mut item =
        TestItem::file(path.clone(), vec![Part::Bytes(CANARY.repeat(100)), Part::Bytes(CANARY.to_vec())]);
    item.metadata.xattrs = vec![(text("xattr").into_bytes(), CANARY.to_vec())];
    item.metadata.user = Some(CANARY.to_vec());
    item.stamp = mainstay_core::Stamp(CANARY.to_vec());
    let mut request = common::request(1);
    request.host = text("host");
    request.roots = vec![text("root")];
    request.tags = vec![text("tag")];
    request.workload.name = text("workload");
    let detail = text("detail");
    let skip = mainstay_core::Skip { path, reason: mainstay_core::SkipReason::Unreadable, detail };
    let source = mainstay_testkit::VecSource::new(vec![item]).skipping(1, skip);
    let point = common::copy(Box::new(source), Box::new(bench.repository.write(request).unwrap())).unwrap();
    let proven = Note::Proven { how: text("proof"), seconds: 1 };
    for note in [Note::Tag(text("tag")), Note::Hold { reason: text("hold"), until: Some(Time(1)) }, proven] {
        bench.repository.note(&point, &note).unwrap();
    }
    bench.repository.add_writer(&text("writer"), Role::Collector).unwrap();
    let info = open(&bench).points().unwrap().remove(0);
    assert_eq!((info.tags, &info.holds[0].reason), (vec![text("tag")], &text("hold")));
    bench.repository.expire(&[point], &text("reason")).unwrap();
    for (name, bytes) in bench.store.snapshot() {
        let seen = bytes.windows(CANARY.len()).any(|window| window == CANARY);
        assert!(!seen, "{name} shows it");
        assert!(!name.contains("canary"));
    }
}

#[test]
fn equal_content_in_two_repositories_has_nothing_in_common() {
    let sizes = [(); 2].map(|()| {
        let bench = Bench::new(8);
        backup(&bench.repository, large_items(8, 3, 30_000));
        bench.store.snapshot()
    });
    let [left, right] = &sizes;
    let windows = |blobs: &Blobs| {
        let packs = blobs.iter().filter(|(name, _)| name.starts_with("pack/") || name.starts_with("index/"));
        packs
            .flat_map(|(_, bytes)| bytes.windows(12).map(<[u8]>::to_vec).collect::<Vec<_>>())
            .collect::<std::collections::HashSet<_>>()
    };
    let (left, right) = (windows(left), windows(right));
    let shared: Vec<_> =
        left.intersection(&right).filter(|window| window.iter().any(|byte| *byte > 8)).collect();
    // Magic numbers with the lengths that follow them, nothing of the content.
    assert!(shared.len() < 400, "{} stretches of 12 bytes in common", shared.len());
}

#[test]
fn the_sample_opens_by_passphrase_and_by_kit() {
    let sample = Sample::new(12);
    let store: Arc<MemoryStore> = Arc::new(MemoryStore::from_blobs(sample.blobs.clone()));
    let options = options(&sample.clock);
    for unlock in [Unlock::Passphrase(PASSPHRASE), Unlock::Kit(&sample.kit)] {
        let repository = Repository::open(Arc::clone(&store) as _, &unlock, &options).unwrap();
        assert_eq!(repository.points().unwrap().len(), sample.points.len());
    }
    assert_eq!(code(Repository::open(store, &Unlock::Passphrase(b"wrong"), &options)), Code::WrongKey);
}

#[test]
fn decisions_stand_until_they_are_replaced_or_taken_back() {
    let bench = Bench::new(9);
    let texts = |repository: &Repository| {
        let mut texts: Vec<String> = repository.decisions().into_iter().map(|it| it.text).collect();
        texts.sort();
        texts
    };
    for text in ["one", "two"] {
        bench.repository.decide(None, text).unwrap();
    }
    assert_eq!(texts(&open(&bench)), ["one", "two"]);
    let one = bench.repository.decisions().into_iter().find(|decision| decision.text == "one").unwrap();
    bench.repository.decide(Some(one.id), "other").unwrap();
    assert_eq!(texts(&open(&bench)), ["other", "two"]);
    bench.repository.decide(Some(one.id), "").unwrap();
    assert_eq!(texts(&open(&bench)), ["two"]);
    let (client, _) = as_role(&bench, Role::WriteOnly);
    assert_eq!(code(client.decide(Some(one.id), "a client's")), Code::NoPower);
}
