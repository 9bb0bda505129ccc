//! What a reader makes of packs that a hostile writer registered.

use mainstay_core::{BlobStore as _, Silent};
use mainstay_testkit::Rng;

use crate::bench::{Bench, Forgery, backup, forge, register, restore};
use crate::format::pack::GroupHeader;
use crate::format::segment::Class;
use crate::keys::Powers;
use crate::log::record::{Change, PackEntry};
use crate::log::state::PackState;
use crate::repack::{self, Wanted};
use crate::seal::SealKey;
use crate::write::store_pack;

#[test]
fn anothers_pack_under_the_id_of_a_group_is_passed_over() {
    let bench = Bench::new();
    let store = &bench.store;
    let content = Rng::new(1).bytes(200_000);
    let point = backup(&bench.owner, &content);
    let (hostile, _) = bench.writer("hostile");
    let holds = |pack: &&PackState| pack.entry.groups.iter().all(|group| group.class != Class::Structure);
    let packs: Vec<PackState> = hostile.shared.state().packs().filter(holds).cloned().collect();
    assert!(packs.len() >= 2);
    let forged = |genuine: &PackState| {
        let entry = forge(&hostile, &genuine.entry.id, Forgery::Groups);
        // In the log it claims to be the same groups.
        PackEntry { groups: genuine.entry.groups.clone(), ..entry }
    };
    register(&hostile, packs.iter().map(forged).collect());
    assert_eq!(restore(&bench.open(), &point), content);
    // The genuine packs are repacked, so that the forged ones are now the oldest that live.
    let owner = bench.open();
    let group = |pack: &PackState| (pack.entry.groups[0].clone(), pack.entry.id);
    let wanted: Vec<_> = packs
        .iter()
        .map(group)
        .map(|(group, id)| Wanted { group: group.id, segments: group.segments, from: id })
        .collect();
    let mut moved = Vec::new();
    let mut emit = |pack| {
        store_pack(store, &pack)?;
        moved.push(PackEntry::of(&pack));
        Ok(())
    };
    repack::copy(&owner.fetch, &wanted, &mut emit, &mut Err).unwrap();
    let condemned: Vec<_> = packs.iter().map(|pack| pack.entry.id).collect();
    let change = Change::Condemn { packs: condemned.clone(), moved };
    owner.shared.append(Powers::COLLECT, &mut |_| Ok(change.clone())).unwrap();
    assert_eq!(restore(&bench.open(), &point), content);
    condemned.iter().for_each(|pack| store.delete(&crate::names::pack(pack)).unwrap());
    assert_eq!(restore(&bench.open(), &point), content);
    // Nobody deduplicates against what is not there.
    let again = backup(&bench.open(), &content);
    assert_eq!(restore(&bench.open(), &again), content);
    let plan = bench.open().plan_gc(&crate::GcOptions::default(), &Silent).unwrap();
    let others = hostile.shared.ring.writer(Powers::WRITE).unwrap().verifying_key().writer_id();
    let owner = bench.open();
    let state = owner.shared.state();
    let mut own = state.packs().filter(|pack| pack.by != Some(others));
    assert!(own.all(|pack| !plan.dead.contains(&pack.entry.id)), "a claim made packs superfluous");
}

#[test]
fn each_of_two_groups_under_one_id_has_its_own_key() {
    let bench = Bench::new();
    backup(&bench.owner, &Rng::new(1).bytes(1000));
    let (owner, packs) = (bench.open(), bench.live_packs());
    let header = owner.fetch.footer(&packs[0].entry.id).unwrap().groups[0].clone();
    let genuine = owner.fetch.group_key(&header).unwrap();
    let other = SealKey::random().unwrap();
    let secret = if header.class == Class::Structure {
        owner.ring().structure_public()
    } else {
        owner.ring().content_public()
    };
    let info = super::wrap_info(&owner.family(), &header);
    let wrapped_key = crate::wrap::wrap(secret, &info, other.as_bytes()).unwrap();
    let forged = owner.fetch.group_key(&GroupHeader { wrapped_key, ..header.clone() }).unwrap();
    assert_eq!(forged.as_bytes(), other.as_bytes());
    assert_eq!(owner.fetch.group_key(&header).unwrap().as_bytes(), genuine.as_bytes());
}
