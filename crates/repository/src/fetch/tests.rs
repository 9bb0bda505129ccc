//! What a reader makes of packs that a hostile writer registered.

use std::sync::Arc;

use mainstay_core::{
    BlobStore as _, Id16, ItemPath, Next, Silent, Source as _, Target as _, Time, WorkloadKind, WorkloadRef,
};
use mainstay_testkit::{MemoryStore, Part, Rng, ScriptedClock, TestItem, VecSource, read_body};

use crate::format::pack::{BlockKind, PackBuilder};
use crate::format::segment::Class;
use crate::keys::{KeyRing, Powers};
use crate::log::random_id;
use crate::log::record::{Change, PackEntry};
use crate::log::state::PackState;
use crate::repack::{self, Wanted};
use crate::write::store_pack;
use crate::{Options, Parent, Repository, Role, Tuning, Unlock, WriteRequest};

fn options() -> Options {
    let clock = Arc::new(ScriptedClock::at(Time::from_seconds(1)));
    Options { clock, state: None, tuning: Tuning::default() }
}

fn backup(repository: &Repository, content: &[u8]) -> Id16 {
    let request = WriteRequest {
        workload: WorkloadRef { id: Id16([1; 16]), kind: WorkloadKind("test".into()), name: "test".into() },
        host: String::new(),
        roots: Vec::new(),
        tags: Vec::new(),
        reread_one_in: 0,
        parent: Parent::None,
        progress: Arc::new(Silent),
        jobs: 1,
    };
    let item = TestItem::file(ItemPath::new("file").unwrap(), vec![Part::Bytes(content.to_vec())]);
    let (mut source, mut target) = (VecSource::new(vec![item]), repository.write(request).unwrap());
    while let Next::Item(item) = source.next().unwrap() {
        target.put(*item).unwrap();
    }
    Box::new(target).finish(&source.seal().unwrap()).unwrap().1
}

fn restore(repository: &Repository, point: &Id16) -> Vec<u8> {
    let mut source = repository.read(point).unwrap().source(Vec::new()).unwrap();
    let Next::Item(item) = source.next().unwrap() else { panic!("the point is empty") };
    read_body(&item.body).unwrap().0
}

/// A pack with another key and other segments under the ids of the groups of `genuine`.
fn forge(hostile: &Repository, genuine: &PackState) -> PackEntry {
    let footer = hostile.fetch.footer(&genuine.entry.id).unwrap();
    let mut builder = PackBuilder::new(random_id().unwrap());
    for header in &footer.groups {
        let key = crate::seal::SealKey::random().unwrap();
        let info = super::wrap_info(&hostile.family(), header);
        let public = hostile.ring().content_public();
        let wrapped_key = crate::wrap::wrap(public, &info, key.as_bytes()).unwrap();
        builder.add_group(crate::format::pack::GroupHeader { wrapped_key, ..header.clone() });
    }
    for block in &footer.blocks {
        let bytes = vec![0x55; block.length as usize];
        builder.push(block.group, block.kind, block.ordinal, bytes);
    }
    assert!(footer.blocks.iter().any(|block| block.kind == BlockKind::Directory));
    let pack = builder.finish();
    store_pack(hostile.shared.store.as_ref(), &pack).unwrap();
    let mut entry = PackEntry::of(&pack);
    // In the log it claims to be the same groups.
    entry.groups.clone_from(&genuine.entry.groups);
    entry
}

#[test]
fn anothers_pack_under_the_id_of_a_group_is_passed_over() {
    let (store, ring) = (MemoryStore::new(), KeyRing::create().unwrap());
    let owner = Repository::create(Arc::new(store.clone()), ring.clone(), &[], &options()).unwrap();
    let content = Rng::new(1).bytes(200_000);
    let point = backup(&owner, &content);
    let key = owner.add_writer("hostile", Role::WriteOnly).unwrap();
    let open = |ring: &KeyRing| {
        let unlock = Unlock::Ring(Box::new(ring.clone()));
        Repository::open(Arc::new(store.clone()), &unlock, &options()).unwrap()
    };
    let hostile = open(&key);
    let holds = |pack: &&PackState| pack.entry.groups.iter().all(|group| group.class != Class::Structure);
    let packs: Vec<PackState> = hostile.shared.state().packs().filter(holds).cloned().collect();
    assert!(packs.len() >= 2);
    let forged: Vec<_> = packs.iter().map(|pack| forge(&hostile, pack)).collect();
    let change = Change::Commit { packs: forged, runs: Vec::new(), point: None };
    hostile.shared.append(Powers::WRITE, &mut |_| Ok(change.clone())).unwrap();
    assert_eq!(restore(&open(&ring), &point), content);
    // The genuine packs are repacked, so that the forged ones are now the oldest that live.
    let owner = open(&ring);
    let group = |pack: &PackState| (pack.entry.groups[0].clone(), pack.entry.id);
    let wanted: Vec<_> = packs
        .iter()
        .map(group)
        .map(|(group, id)| Wanted { group: group.id, segments: group.segments, from: Some(id) })
        .collect();
    let mut moved = Vec::new();
    let mut emit = |pack| {
        store_pack(&store, &pack)?;
        moved.push(PackEntry::of(&pack));
        Ok(())
    };
    repack::copy(&owner.fetch, &wanted, &mut emit, &mut Err).unwrap();
    let condemned: Vec<_> = packs.iter().map(|pack| pack.entry.id).collect();
    let change = Change::Condemn { packs: condemned.clone(), moved };
    owner.shared.append(Powers::COLLECT, &mut |_| Ok(change.clone())).unwrap();
    assert_eq!(restore(&open(&ring), &point), content);
    condemned.iter().for_each(|pack| store.delete(&crate::names::pack(pack)).unwrap());
    assert_eq!(restore(&open(&ring), &point), content);
    // Nobody deduplicates against what is not there.
    let again = backup(&open(&ring), &content);
    assert_eq!(restore(&open(&ring), &again), content);
    let plan = open(&ring).plan_gc(&crate::GcOptions::default(), &Silent).unwrap();
    let live: Vec<_> = open(&ring).shared.state().packs().filter(|pack| pack.trusted).cloned().collect();
    assert!(live.iter().all(|pack| !plan.dead.contains(&pack.entry.id)), "a claim made packs superfluous");
}
