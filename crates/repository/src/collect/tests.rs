//! What a collection makes of mistakes, damage and lies of others.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mainstay_core::{BlobStore, Capabilities, Code, Listed, Put, Result, Silent};
use mainstay_testkit::{MemoryStore, Rng};

use crate::bench::{Bench, Forgery, backup, forge, register, restore, stage, try_backup, verify};
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

/// A hostile writer that sees every pack as soon as it is stored, before any record names it.
struct Ambush {
    inner: MemoryStore,
    hostile: Mutex<(Repository, Forgery)>,
}

impl BlobStore for Ambush {
    fn put_new(&self, name: &str, parts: &[&[u8]]) -> Result<Put> {
        let put = self.inner.put_new(name, parts)?;
        if let Some(id) = names::pack_id(name) {
            let hostile = self.hostile.lock().unwrap();
            stage(&hostile.0, id, &parts.concat());
            register(&hostile.0, vec![forge(&hostile.0, &id, hostile.1)]);
        }
        Ok(put)
    }

    fn get(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>> {
        self.inner.get(name, range)
    }

    fn size(&self, name: &str) -> Result<u64> {
        self.inner.size(name)
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        self.inner.list(prefix, each)
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.inner.delete(name)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn location(&self) -> String {
        self.inner.location()
    }
}

/// Somebody else's writer, under whose eyes everything is stored.
fn ambushed(bench: &Bench, forgery: Forgery) -> Repository {
    let (hostile, _) = bench.writer("hostile");
    let (_, ring) = bench.writer("victim");
    let store = Ambush { inner: bench.store.clone(), hostile: Mutex::new((hostile, forgery)) };
    bench.open_with(Arc::new(store), &ring)
}

#[test]
fn a_claim_made_before_its_owners_record_makes_nothing_superfluous() {
    let bench = Bench::new();
    let victim = ambushed(&bench, Forgery::Segments);
    let point = backup(&victim, &content(1));
    assert!(bench.live_packs().len() >= 6, "each pack has a forged twin");
    bench.clock.advance(Duration::from_secs(3 * 24 * 3600));
    bench.collect_all();
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
