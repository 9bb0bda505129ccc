//! Groups that are being filled, and the packs they end in.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Error, Result, Time};

use super::pool::{Job, SealPool, SealedSegment, Uploader};
use crate::cut::ChunkId;
use crate::fetch::wrap_info;
use crate::format::directory::{Directory, seal_directory};
use crate::format::pack::{BlockKind, BuiltPack, GroupHeader, PackBuilder};
use crate::format::segment::{Binding, Class, Compression, GroupId, SEGMENT_BYTES};
use crate::index::{GroupTags, tag};
use crate::keys::{DomainKeys, Powers};
use crate::log::random_id;
use crate::log::record::PackEntry;
use crate::seal::SealKey;
use crate::shared::Shared;
use crate::wrap;

/// Pages are sought one by one, so their segments are smaller.
const META_SEGMENT_BYTES: usize = 256 << 10;

/// Stored packs are registered after this time, however few they are: a collector takes what no record names, and
/// deletes what it condemned, once its grace is over.
const REGISTER_AFTER: Duration = Duration::from_secs(6 * 3600);

/// Where something was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spot {
    pub(crate) group: GroupId,
    pub(crate) segment: u32,
    pub(crate) slot: u32,
}

/// The group of one class that takes new chunks.
struct Filling {
    header: GroupHeader,
    key: Arc<SealKey>,
    directory: Arc<Directory>,
    raw: Vec<u8>,
    /// Raw bytes handed to the pool and not yet back.
    sealing_bytes: u64,
    builder: PackBuilder,
    /// Segments that are sealed, of all that were handed over.
    sealed: u32,
}

/// A group that takes no more chunks but waits for its last segments to be sealed.
type Waiting = HashMap<GroupId, Filling>;

pub(crate) struct Groups {
    shared: Arc<Shared>,
    domain: Arc<DomainKeys>,
    pool: SealPool,
    uploader: Uploader,
    filling: HashMap<Class, Filling>,
    waiting: Waiting,
    /// Directories of all groups of this run, for looking up what is new in it.
    directories: HashMap<GroupId, Arc<Directory>>,
    /// Packs stored but not yet registered in the log, with what the index must know of them.
    stored: Vec<PackEntry>,
    tags: HashMap<GroupId, GroupTags>,
    /// When they were last taken.
    since: Time,
    written_bytes: u64,
}

impl Groups {
    pub(crate) fn new(
        shared: Arc<Shared>,
        domain: Arc<DomainKeys>,
        jobs: usize,
        compression: Compression,
    ) -> Result<Self> {
        Ok(Self {
            pool: SealPool::start(jobs, compression)?,
            uploader: Uploader::start(Arc::clone(&shared.store), jobs)?,
            domain,
            filling: HashMap::new(),
            waiting: HashMap::new(),
            directories: HashMap::new(),
            stored: Vec::new(),
            tags: HashMap::new(),
            since: shared.clock.now(),
            written_bytes: 0,
            shared,
        })
    }

    /// Bytes of packs made so far.
    pub(crate) fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    /// The directory of a group that this run wrote.
    pub(crate) fn directory(&self, group: &GroupId) -> Option<&Directory> {
        let open = self.filling.values().find(|filling| filling.header.id == *group);
        open.map(|filling| &*filling.directory).or_else(|| self.directories.get(group).map(|found| &**found))
    }

    /// The same, to keep.
    pub(crate) fn shared_directory(&self, group: &GroupId) -> Option<Arc<Directory>> {
        let open = self.filling.values().find(|filling| filling.header.id == *group);
        open.map(|filling| &filling.directory).or_else(|| self.directories.get(group)).cloned()
    }

    /// Adds a chunk to the open segment of its class.
    pub(crate) fn append(&mut self, class: Class, id: ChunkId, bytes: &[u8]) -> Result<Spot> {
        let normal = if class == Class::Data { SEGMENT_BYTES } else { META_SEGMENT_BYTES };
        // Small packs, as in tests, have several segments too.
        let limit = normal.min(self.shared.tuning.pack_bytes as usize / 8);
        if self
            .filling
            .get(&class)
            .is_some_and(|filling| filling.raw.len() + bytes.len() > limit && !filling.raw.is_empty())
        {
            self.end_segment(class)?;
        }
        if !self.filling.contains_key(&class) {
            let filling = self.open(class)?;
            self.filling.insert(class, filling);
        }
        let Some(filling) = self.filling.get_mut(&class) else { return Err(Error::bug("no group is open")) };
        let segment = filling.directory.segments();
        let slot = Arc::make_mut(&mut filling.directory).push(id, bytes.len() as u32);
        filling.raw.extend_from_slice(bytes);
        let spot = Spot { group: filling.header.id, segment, slot };
        // A reference page is a segment by itself.
        if class == Class::Structure {
            self.end_segment(class)?;
        }
        Ok(spot)
    }

    fn open(&self, class: Class) -> Result<Filling> {
        let ring = &self.shared.ring;
        let recipient = match class {
            Class::Data | Class::Meta => ring.content_public(),
            Class::Structure => ring.structure_public(),
        };
        let key = SealKey::random()?;
        let writer = ring.writer(Powers::WRITE)?.verifying_key().writer_id();
        let id = random_id()?;
        let mut header =
            GroupHeader { id, class, domain: self.domain.domain, writer, wrapped_key: Vec::new() };
        let info = wrap_info(self.shared.family(), &header);
        header.wrapped_key = wrap::wrap(recipient, &info, key.as_bytes())?;
        let mut builder = PackBuilder::new(random_id()?);
        builder.add_group(header.clone());
        Ok(Filling {
            header,
            key: Arc::new(key),
            directory: Arc::default(),
            raw: Vec::with_capacity(SEGMENT_BYTES),
            sealing_bytes: 0,
            builder,
            sealed: 0,
        })
    }

    /// Hands the open segment of a class to the pool.
    pub(crate) fn end_segment(&mut self, class: Class) -> Result<()> {
        self.make_room()?;
        let family = *self.shared.family();
        let Some(filling) = self.filling.get_mut(&class) else { return Ok(()) };
        if filling.raw.is_empty() {
            return Ok(());
        }
        let raw = std::mem::replace(&mut filling.raw, Vec::with_capacity(SEGMENT_BYTES));
        let ordinal = filling.directory.segments();
        Arc::make_mut(&mut filling.directory).end_segment();
        filling.sealing_bytes += raw.len() as u64;
        let GroupHeader { id, domain, .. } = filling.header;
        let binding = Binding { family, domain, group: id, class };
        self.pool.submit(Job { key: Arc::clone(&filling.key), binding, ordinal, raw })?;
        let pack_bytes = self.shared.tuning.pack_bytes;
        let limit = if class == Class::Data { pack_bytes } else { pack_bytes / 4 };
        if filling.builder.length() + filling.sealing_bytes >= limit {
            self.close(class)?;
        }
        Ok(())
    }

    /// Collects sealed segments until the pool takes another.
    fn make_room(&mut self) -> Result<()> {
        while let Some(sealed) = self.pool.try_collect()? {
            self.place(sealed)?;
        }
        while !self.pool.has_room() {
            if let Some(sealed) = self.pool.collect()? {
                self.place(sealed)?;
            }
        }
        Ok(())
    }

    fn close(&mut self, class: Class) -> Result<()> {
        let Some(filling) = self.filling.remove(&class) else { return Ok(()) };
        let (group, complete) = (filling.header.id, filling.sealed == filling.directory.segments());
        self.directories.insert(group, Arc::clone(&filling.directory));
        self.waiting.insert(group, filling);
        if complete { self.send(&group) } else { Ok(()) }
    }

    /// Puts a sealed segment into its pack, and the pack on its way when that was the last one it waited for.
    fn place(&mut self, sealed: SealedSegment) -> Result<()> {
        let SealedSegment { group, ordinal, raw_bytes, stored } = sealed;
        let open = self.filling.values_mut().find(|filling| filling.header.id == group);
        let is_open = open.is_some();
        let Some(filling) = open.or_else(|| self.waiting.get_mut(&group)) else {
            return Err(Error::bug("a segment of a group that nobody fills"));
        };
        filling.builder.push(0, BlockKind::Segment, ordinal, stored);
        filling.sealing_bytes -= raw_bytes as u64;
        filling.sealed += 1;
        if !is_open && filling.sealed == filling.directory.segments() {
            self.send(&group)?;
        }
        Ok(())
    }

    fn send(&mut self, group: &GroupId) -> Result<()> {
        let Some(mut filling) = self.waiting.remove(group) else { return Ok(()) };
        let header = &filling.header;
        if header.class != Class::Structure {
            let key = &self.domain.index_key;
            let block = seal_directory(key, self.shared.family(), &header.domain, group, &filling.directory)?;
            filling.builder.push(0, BlockKind::Directory, 0, block);
            let tags = filling.directory.chunks().iter().map(|(id, _)| tag(&id.0)).collect();
            self.tags.insert(*group, GroupTags { group: *group, class: header.class, tags });
        }
        let pack = filling.builder.finish(self.shared.tuning.parity)?;
        self.upload(pack)
    }

    /// Stores a pack; it is registered with the next commit.
    fn upload(&mut self, pack: BuiltPack) -> Result<()> {
        let entry = PackEntry::of(&pack);
        self.written_bytes += pack.length;
        self.uploader.submit(pack, entry)?;
        self.collect(false)
    }

    fn collect(&mut self, all: bool) -> Result<()> {
        self.stored.extend(self.uploader.collect(all)?);
        Ok(())
    }

    /// Closes every group and waits until all packs are stored.
    pub(crate) fn finish(&mut self) -> Result<()> {
        for class in [Class::Data, Class::Meta, Class::Structure] {
            self.end_segment(class)?;
            self.close(class)?;
        }
        while let Some(sealed) = self.pool.collect()? {
            self.place(sealed)?;
        }
        self.collect(true)?;
        if self.waiting.is_empty() { Ok(()) } else { Err(Error::bug("a group lost a segment")) }
    }

    /// Whether it is time to register packs, or to look whether something that the run relies on was condemned.
    pub(crate) fn should_register(&mut self) -> Result<bool> {
        self.collect(false)?;
        let waited = self.shared.clock.now().since(self.since);
        Ok(self.stored.len() >= self.shared.tuning.register_packs || waited >= REGISTER_AFTER)
    }

    /// Takes stored packs, and what the index must know of them, for a commit. A pack whose store is still under way
    /// comes with a later one.
    pub(crate) fn take_unregistered(&mut self) -> (Vec<PackEntry>, Vec<GroupTags>) {
        self.since = self.shared.clock.now();
        let packs = std::mem::take(&mut self.stored);
        let groups = packs.iter().flat_map(|pack| &pack.groups);
        let tags = groups.filter_map(|group| self.tags.remove(&group.id)).collect();
        (packs, tags)
    }

    /// Forgets the directories of packs that the log now names: they can be read back like any other.
    pub(crate) fn forget(&mut self, packs: &[PackEntry]) {
        for group in packs.iter().flat_map(|pack| &pack.groups) {
            self.directories.remove(&group.id);
        }
    }
}
