//! A repository in memory for tests that look inside, and packs as a hostile writer makes them.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mainstay_core::{
    BlobStore, Capabilities, Id16, ItemPath, Listed, Next, Put, Result, Silent, Source as _, Target as _,
    Time, WorkloadKind, WorkloadRef,
};
use mainstay_testkit::{MemoryStore, Part, ScriptedClock, TestItem, VecSource, read_body};

use crate::fetch::wrap_info;
use crate::format::pack::{BlockKind, GroupHeader, PackBuilder, PackId, Trailer};
use crate::keys::{KeyRing, Powers};
use crate::log::random_id;
use crate::log::record::{Change, PackEntry};
use crate::log::state::{PackState, PackStatus};
use crate::seal::SealKey;
use crate::write::store_pack;
use crate::{
    Compression, GcOptions, Options, Parent, Repository, Role, Tuning, Unlock, VerifyReport, VerifyScope,
    WriteRequest,
};

pub(crate) struct Bench {
    pub(crate) store: MemoryStore,
    pub(crate) clock: ScriptedClock,
    pub(crate) ring: KeyRing,
    pub(crate) owner: Repository,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let clock = ScriptedClock::at(Time::from_seconds(1));
        let (store, ring) = (MemoryStore::new(), KeyRing::create().unwrap());
        let owner = Repository::create(Arc::new(store.clone()), ring.clone(), &[], &options(&clock)).unwrap();
        Self { store, clock, ring, owner }
    }

    /// As another process opens it.
    pub(crate) fn open(&self) -> Repository {
        self.open_with(Arc::new(self.store.clone()), &self.ring)
    }

    pub(crate) fn open_with(&self, store: Arc<dyn BlobStore>, ring: &KeyRing) -> Repository {
        Repository::open(store, &Unlock::Ring(Box::new(ring.clone())), &options(&self.clock)).unwrap()
    }

    /// A writer of its own, and what it opens the repository with.
    pub(crate) fn writer(&self, name: &str) -> (Repository, KeyRing) {
        let ring = self.owner.add_writer(name, Role::WriteOnly).unwrap();
        (self.open_with(Arc::new(self.store.clone()), &ring), ring)
    }

    /// Collects as often as it takes until everything that is going to go is gone.
    pub(crate) fn collect_all(&self) {
        for _ in 0..3 {
            let owner = self.open();
            let plan = owner.plan_gc(&GcOptions::default(), &Silent).unwrap();
            owner.gc(&plan, &Silent).unwrap();
            self.clock.advance(Duration::from_secs(3 * 24 * 3600));
        }
    }

    pub(crate) fn live_packs(&self) -> Vec<PackState> {
        let owner = self.open();
        let state = owner.shared.state();
        state.packs().filter(|pack| pack.status == PackStatus::Live).cloned().collect()
    }

    pub(crate) fn is_stored(&self, pack: &PackId) -> bool {
        self.store.size(&crate::names::pack(pack)).is_ok()
    }

    /// Changes a byte in the middle of a pack, where its segments are.
    pub(crate) fn damage(&self, pack: &PackId, at: usize) {
        let name = crate::names::pack(pack);
        let mut bytes = self.store.snapshot()[&name].to_vec();
        bytes[at] ^= 1;
        self.store.delete(&name).unwrap();
        self.store.put_new(&name, &[&bytes]).unwrap();
    }
}

pub(crate) fn options(clock: &ScriptedClock) -> Options {
    Options {
        clock: Arc::new(clock.clone()),
        state: None,
        tuning: Tuning { parity: false, ..Tuning::default() },
    }
}

pub(crate) fn verify(repository: &Repository) -> VerifyReport {
    repository.verify(&VerifyScope { read_data: true, ..VerifyScope::default() }, &Silent).unwrap()
}

/// A record without points.
pub(crate) fn register(repository: &Repository, packs: Vec<PackEntry>) {
    let change = Change::Commit { packs, runs: Vec::new(), point: None };
    repository.shared.append(Powers::WRITE, &mut |_| Ok(change.clone())).unwrap();
}

pub(crate) fn backup(repository: &Repository, content: &[u8]) -> Id16 {
    try_backup(repository, content).unwrap()
}

pub(crate) fn try_backup(repository: &Repository, content: &[u8]) -> Result<Id16> {
    let request = WriteRequest {
        workload: WorkloadRef { id: Id16([1; 16]), kind: WorkloadKind("test".into()), name: "test".into() },
        host: String::new(),
        roots: Vec::new(),
        tags: Vec::new(),
        reread_one_in: 0,
        any_order: false,
        parent: Parent::Latest,
        progress: Arc::new(Silent),
        compression: Compression::default(),
        jobs: 1,
    };
    let mut item = TestItem::file(ItemPath::new("file").unwrap(), vec![Part::Bytes(content.to_vec())]);
    item.stamp = mainstay_core::Stamp(blake3::hash(content).as_bytes().to_vec());
    let (mut source, mut target) = (VecSource::new(vec![item]), repository.write(request)?);
    while let Next::Item(item) = source.next()? {
        target.put(*item)?;
    }
    Ok(Box::new(target).finish(&source.seal()?)?.1)
}

pub(crate) fn restore(repository: &Repository, point: &Id16) -> Vec<u8> {
    let mut source = repository.read(point).unwrap().source(Vec::new()).unwrap();
    let Next::Item(item) = source.next().unwrap() else { panic!("the point is empty") };
    read_body(&item.body).unwrap().0
}

/// How a pack differs from the one that it claims to be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Forgery {
    /// Other groups under the same ids.
    Groups,
    /// The same groups with the same directories, and nothing behind them; and so much else that repacking looks worth it.
    Segments,
}

/// Makes a stored pack known to who has read no record of it.
pub(crate) fn stage(repository: &Repository, id: PackId, bytes: &[u8]) {
    let length = bytes.len() as u64;
    let trailer = Trailer::decode_both(bytes, length).remove(0).unwrap();
    let footer_hash = trailer.footer_hash;
    let entry = PackEntry { id, length, footer_hash, retain_until: Time(0), groups: Vec::new() };
    repository.fetch.stage(&entry);
}

/// Stores a pack that pretends to be another one, and is longer.
pub(crate) fn forge(hostile: &Repository, genuine: &PackId, forgery: Forgery) -> PackEntry {
    let footer = hostile.fetch.footer(genuine).unwrap();
    let store = hostile.shared.store.as_ref();
    let mut builder = PackBuilder::new(random_id().unwrap());
    for header in &footer.groups {
        let key = SealKey::random().unwrap();
        let info = wrap_info(&hostile.family(), header);
        let wrapped_key = crate::wrap::wrap(hostile.ring().content_public(), &info, key.as_bytes()).unwrap();
        builder.add_group(match forgery {
            Forgery::Groups => GroupHeader { wrapped_key, ..header.clone() },
            Forgery::Segments => header.clone(),
        });
    }
    for block in &footer.blocks {
        let range = block.offset..block.offset + u64::from(block.length);
        let bytes = match (forgery, block.kind) {
            (Forgery::Segments, BlockKind::Directory) => {
                store.get(&crate::names::pack(genuine), range).unwrap()
            }
            _ => vec![0x55; block.length as usize + 100],
        };
        builder.push(block.group, block.kind, block.ordinal, bytes);
    }
    if forgery == Forgery::Segments {
        let header = GroupHeader { id: random_id().unwrap(), ..footer.groups[0].clone() };
        let own = builder.add_group(header);
        (0..30).for_each(|ordinal| builder.push(own, BlockKind::Segment, ordinal, vec![0x55; 100]));
    }
    let pack = builder.finish(false).unwrap();
    store_pack(store, &pack).unwrap();
    PackEntry::of(&pack)
}

/// Called with the name and the bytes of every blob that is put.
type Hook = Box<dyn FnMut(&str, &[u8]) + Send>;

/// A store under somebody's eyes.
pub(crate) struct Watched {
    inner: MemoryStore,
    hook: Mutex<Hook>,
}

impl Watched {
    pub(crate) fn new(inner: &MemoryStore, hook: impl FnMut(&str, &[u8]) + Send + 'static) -> Self {
        Self { inner: inner.clone(), hook: Mutex::new(Box::new(hook)) }
    }
}

impl BlobStore for Watched {
    fn put_new(&self, name: &str, parts: &[&[u8]]) -> Result<Put> {
        let put = self.inner.put_new(name, parts)?;
        (self.hook.lock().unwrap())(name, &parts.concat());
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
