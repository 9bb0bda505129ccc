//! What a collection makes of mistakes, damage and lies of others.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use mainstay_core::{BlobStore as _, Code, PointId, Silent};
use mainstay_testkit::Rng;

use crate::bench::{Bench, Forgery, Watched, backup, forge, register, restore, stage, try_backup, verify};
use crate::format::pack::PackId;
use crate::format::segment::Class;
use crate::keys::Powers;
use crate::log::record::Change;
use crate::log::state::PackState;
use crate::{GcOptions, Repository, names};

fn content(seed: u64) -> Vec<u8> {
    Rng::new(seed).bytes(200_000)
}

fn condemn(repository: &Repository, packs: &[PackId]) {
    let change = Change::Condemn { packs: packs.to_vec(), moved: Vec::new() };
    repository.shared.append(Powers::COLLECT, &mut |_| Ok(change.clone())).unwrap();
}

fn ids(packs: &[PackState]) -> Vec<PackId> {
    packs.iter().map(|pack| pack.entry.id).collect()
}

fn data_pack(packs: &[PackState]) -> PackId {
    let holds = |pack: &&PackState| pack.entry.groups.iter().any(|group| group.class == Class::Data);
    packs.iter().find(holds).unwrap().entry.id
}

#[test]
fn what_a_point_needs_is_copied_out_of_packs_that_somebody_condemned_by_mistake() {
    let bench = Bench::new();
    let point = backup(&bench.owner, &content(1));
    let packs = ids(&bench.live_packs());
    condemn(&bench.owner, &packs);
    bench.clock.advance(Duration::from_secs(3 * 24 * 3600));
    let plan = bench.open().plan_gc(&GcOptions::default(), &Silent).unwrap();
    assert_eq!((plan.rescued(), plan.delete.len()), (packs.len(), packs.len()));
    bench.collect_all();
    assert!(!packs.iter().any(|pack| bench.is_stored(pack)), "copied, and yet not deleted");
    assert_eq!(restore(&bench.open(), &point), content(1));
    assert!(verify(&bench.open()).is_sound());
}

#[test]
fn a_backup_after_a_verification_stores_again_what_was_damaged() {
    let bench = Bench::new();
    let first = backup(&bench.owner, &content(1));
    let damaged = data_pack(&bench.live_packs());
    bench.damage(&damaged, 5000);
    let owner = bench.open();
    let report = verify(&owner);
    assert!(!report.is_sound());
    assert_eq!(owner.set_aside(&report, &Silent).unwrap(), 1);
    // The content and its time did not change, so nothing but the log says that it must be stored again.
    let second = backup(&bench.open(), &content(1));
    assert_eq!(restore(&bench.open(), &second), content(1));
    let report = verify(&bench.open());
    assert_eq!(report.sound, [second]);
    // What is damaged is kept as long as a point reaches it.
    bench.collect_all();
    assert!(bench.is_stored(&damaged));
    bench.open().expire(&[first], "test").unwrap();
    bench.collect_all();
    assert!(!bench.is_stored(&damaged));
    assert_eq!(restore(&bench.open(), &second), content(1));
    assert!(verify(&bench.open()).is_sound());
}

#[test]
fn a_lost_pack_is_stored_again() {
    let bench = Bench::new();
    backup(&bench.owner, &content(1));
    for pack in ids(&bench.live_packs()) {
        bench.store.delete(&names::pack(&pack)).unwrap();
        let owner = bench.open();
        assert_eq!(owner.set_aside(&verify(&owner), &Silent).unwrap(), 1);
        let point = backup(&bench.open(), &content(1));
        assert_eq!(restore(&bench.open(), &point), content(1));
    }
}

#[test]
fn a_medium_that_failed_for_a_moment_has_damaged_nothing() {
    let bench = Bench::new();
    backup(&bench.owner, &content(1));
    let pack = data_pack(&bench.live_packs());
    bench.damage(&pack, 5000);
    let report = verify(&bench.open());
    bench.damage(&pack, 5000);
    assert_eq!(bench.open().set_aside(&report, &Silent).unwrap(), 0);
    assert!(verify(&bench.open()).is_sound());
}

/// A writer under the eyes of a hostile one, which registers what it makes of every pack before any record names it.
fn ambushed(bench: &Bench, forgery: Forgery) -> Repository {
    let (hostile, _) = bench.writer("hostile");
    let (_, ring) = bench.writer("victim");
    let store = Watched::new(&bench.store, move |name, bytes| {
        if let Some(id) = names::pack_id(name) {
            stage(&hostile, id, bytes);
            register(&hostile, vec![forge(&hostile, &id, forgery)]);
        }
    });
    bench.open_with(Arc::new(store), &ring)
}

#[test]
fn a_claim_made_before_its_owners_record_makes_nothing_superfluous() {
    let bench = Bench::new();
    let victim = ambushed(&bench, Forgery::Segments);
    let point = backup(&victim, &content(1));
    let hostile = bench.owner.writers().into_iter().find(|writer| writer.name == "hostile").unwrap().id;
    let is_genuine = |pack: &PackState| pack.by != Some(hostile);
    let genuine = bench.live_packs().into_iter().filter(is_genuine).count();
    assert_eq!(bench.live_packs().len(), 2 * genuine, "each pack has a forged twin");
    bench.clock.advance(Duration::from_secs(3 * 24 * 3600));
    bench.collect_all();
    assert_eq!(bench.live_packs().into_iter().filter(is_genuine).count(), genuine);
    assert_eq!(restore(&bench.open(), &point), content(1));
    assert!(verify(&bench.open()).is_sound());
}

#[test]
fn who_finds_another_group_under_its_id_is_told_and_promised_nothing() {
    let bench = Bench::new();
    let victim = ambushed(&bench, Forgery::Groups);
    let error = try_backup(&victim, &content(1)).unwrap_err();
    assert_eq!(error.code(), Code::Conflict);
    assert!(error.to_string().contains("another writer registered"), "{error}");
    let owner = bench.open();
    assert!(owner.points().unwrap().is_empty());
    backup(&owner, &content(1));
}

#[test]
fn nobody_relies_on_a_claim() {
    let bench = Bench::new();
    let gone = backup(&bench.owner, &content(1));
    let packs = ids(&bench.live_packs());
    let (hostile, _) = bench.writer("hostile");
    bench.owner.refresh().unwrap();
    // The genuine packs go, and only the claims live.
    condemn(&bench.owner, &packs);
    hostile.refresh().unwrap();
    register(&hostile, packs.iter().map(|pack| forge(&hostile, pack, Forgery::Segments)).collect());
    let point = backup(&bench.open(), &content(1));
    bench.open().expire(&[gone], "test").unwrap();
    bench.clock.advance(Duration::from_secs(3 * 24 * 3600));
    bench.collect_all();
    assert!(!packs.iter().any(|pack| bench.is_stored(pack)));
    assert_eq!(restore(&bench.open(), &point), content(1));
    assert!(verify(&bench.open()).is_sound());
}

#[test]
fn a_claim_does_not_become_a_collectors_word() {
    let bench = Bench::new();
    let point = backup(&bench.owner, &content(1));
    let live = bench.live_packs();
    let packs = ids(&live);
    let of_structure = |pack: &&PackState| pack.entry.groups[0].class == Class::Structure;
    let structure = live.iter().find(of_structure).unwrap().entry.id;
    let (hostile, _) = bench.writer("hostile");
    register(&hostile, packs.iter().map(|pack| forge(&hostile, pack, Forgery::Segments)).collect());
    bench.owner.refresh().unwrap();
    condemn(&bench.owner, &packs);
    bench.clock.advance(Duration::from_secs(3 * 24 * 3600));
    // The genuine packs cannot be read for a while, so that there is nothing but the claims to copy.
    let blobs = bench.store.snapshot();
    let names: Vec<_> = packs.iter().map(names::pack).collect();
    names.iter().for_each(|name| bench.store.delete(name).unwrap());
    // The list of what the point reaches must be readable, or nothing is collected.
    let structure = names::pack(&structure);
    bench.store.put_new(&structure, &[&blobs[&structure]]).unwrap();
    bench.collect_all();
    for name in names.iter().filter(|name| **name != structure) {
        bench.store.put_new(name, &[&blobs[name]]).unwrap();
    }
    bench.collect_all();
    assert_eq!(restore(&bench.open(), &point), content(1));
    assert!(verify(&bench.open()).is_sound());
}

#[test]
fn runs_of_which_nothing_is_left_and_expired_points_are_freed() {
    let bench = Bench::new();
    let is_there = |point: &PointId| {
        let name = names::point(point);
        [names::copy_of(&name), name].map(|name| bench.store.size(&name).is_ok())
    };
    let runs = || bench.store.snapshot().keys().filter(|name| name.starts_with("index/")).count();
    let points = [1, 2, 3].map(|seed| backup(&bench.owner, &content(seed)));
    assert_eq!(runs(), 3);
    bench.open().expire(&points[..2], "test").unwrap();
    let plan = bench.open().plan_gc(&GcOptions::default(), &Silent).unwrap();
    assert!(plan.points.is_empty() && plan.runs.is_empty(), "readers have the grace");
    bench.clock.advance(Duration::from_secs(3 * 24 * 3600));
    let plan = bench.open().plan_gc(&GcOptions::default(), &Silent).unwrap();
    assert_eq!((plan.points.len(), plan.runs.len()), (2, 0), "a run is needed as long as what it tells of");
    bench.collect_all();
    assert_eq!((runs(), bench.open().stats().index_runs), (1, 1));
    assert_eq!(points.map(|point| is_there(&point)), [[false; 2], [false; 2], [true; 2]]);
    let report = verify(&bench.open());
    assert_eq!((report.problems, report.degraded), (Vec::new(), Vec::new()));
    // What is left still tells where everything is.
    let bytes = bench.store.total_bytes();
    let again = backup(&bench.open(), &content(3));
    assert!(bench.store.total_bytes() - bytes < 30_000, "content was stored again");
    // The newest point of a chain stays, expired or not: the next one goes on from it.
    bench.open().expire(&[points[2], again], "test").unwrap();
    bench.clock.advance(Duration::from_secs(3 * 24 * 3600));
    bench.collect_all();
    assert_eq!([points[2], again].map(|point| is_there(&point)), [[false; 2], [true; 2]]);
    let last = backup(&bench.open(), &content(4));
    let owner = bench.open();
    let header = |point: &PointId| owner.points.load(point).unwrap();
    assert_eq!((header(&last).header.sequence, header(&last).header.previous), (5, header(&again).hash));
}

#[test]
fn two_writers_with_one_key_make_one_chain() {
    let bench = Bench::new();
    let other = Mutex::new(Some(bench.open()));
    let hook = move |name: &str, _: &[u8]| {
        // A clone of this machine commits while this one has just stored its point.
        let clone = if name.starts_with("points/") { other.lock().unwrap().take() } else { None };
        if let Some(clone) = clone {
            backup(&clone, &content(1));
        }
    };
    let store = Watched::new(&bench.store, hook);
    backup(&bench.open_with(Arc::new(store), &bench.ring), &content(2));
    let owner = bench.open();
    let points = owner.points().unwrap();
    assert_eq!(points.iter().map(|point| point.sequence).collect::<Vec<_>>(), [1, 2]);
    let loaded = |number: usize| owner.points.load(&points[number].id).unwrap();
    assert_eq!(loaded(1).header.previous, loaded(0).hash);
    let stored = bench.store.snapshot().into_keys().filter(|name| name.contains("points/")).count();
    assert_eq!(stored, 4, "what nobody names is left over");
}
