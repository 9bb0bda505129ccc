//! Gets stored bytes back: pack → footer → directory → segment → chunk. Every step checks what it got, tries the
//! next place when a group lies in several packs, and reads the log again when a pack is gone.

mod healed;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use mainstay_core::{Code, Error, Result, WriterId};

use crate::cache::SharedCache;
use crate::cut::{ChunkId, chunk_id};
use crate::format::directory::{Directory, open_directory};
use crate::format::pack::{Block, Footer, GroupHeader, PackId, Trailer, block_digest};
use crate::format::page::{PageRef, PageSource};
use crate::format::segment::{self, Binding, Class, GroupId};
use crate::log::record::PackEntry;
use crate::log::state::{Location, Owner};
use crate::names;
use crate::seal::{SealKey, Secret};
use crate::shared::Shared;
use crate::tree_copy::TreeCopy;
use crate::wrap;

/// Read at once from the end of a pack; mostly holds footer and directory.
const TAIL_BYTES: u64 = 64 << 10;
const DIRECTORIES_BYTES: usize = 48 << 20;
const FOOTERS_BYTES: usize = 16 << 20;
const SEGMENTS_BYTES: usize = 32 << 20;
/// Nobody moves a segment away under a reader more often in a row.
const MOVES_MAX: usize = 100;

/// An opened segment, shared by whoever reads from it.
pub(crate) type Opened = Arc<Vec<u8>>;

pub(crate) struct Fetch {
    shared: Arc<Shared>,
    footers: SharedCache<PackId, Arc<Footer>>,
    directories: SharedCache<GroupId, Arc<Directory>>,
    /// By what each was wrapped in: of two groups under one id each has its own.
    keys: SharedCache<[u8; 32], SealKey>,
    segments: SharedCache<(GroupId, u32), Opened>,
    healed: SharedCache<PackId, healed::Healed>,
    /// Packs of this process that the log does not name yet.
    staged: Mutex<HashMap<PackId, (u64, [u8; 32])>>,
    /// Whom the headers of contested groups name.
    owners: Mutex<HashMap<GroupId, WriterId>>,
    /// Of blocks, as they are stored.
    bytes_fetched: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Bytes of a group as they lie in a pack.
pub(crate) struct Sealed {
    pub(crate) header: GroupHeader,
    pub(crate) bytes: Vec<u8>,
}

impl Fetch {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            footers: SharedCache::new(FOOTERS_BYTES),
            directories: SharedCache::new(DIRECTORIES_BYTES),
            keys: SharedCache::new(1 << 20),
            segments: SharedCache::new(SEGMENTS_BYTES),
            healed: SharedCache::new(healed::HEALED_BYTES),
            staged: Mutex::default(),
            owners: Mutex::default(),
            bytes_fetched: AtomicU64::new(0),
        }
    }

    pub(crate) fn bytes_fetched(&self) -> u64 {
        self.bytes_fetched.load(Ordering::Relaxed)
    }

    /// Makes a pack readable before the log names it.
    pub(crate) fn stage(&self, entry: &PackEntry) {
        lock(&self.staged).insert(entry.id, (entry.length, entry.footer_hash));
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Tries every place where `wanted` of the group may lie. When all fail, the log is read again: the collector may
    /// have moved them. As long as it goes on, so do we.
    fn try_places<T>(
        &self,
        group: &GroupId,
        wanted: &dyn Fn(&Location) -> bool,
        attempt: &dyn Fn(&PackId) -> Result<T>,
    ) -> Result<T> {
        let mut failed = None;
        for _moved in 0..MOVES_MAX {
            let state = self.shared.state();
            let head = state.next_sequence();
            let places: Vec<_> =
                state.locations(group).into_iter().filter(|place| wanted(place)).cloned().collect();
            drop(state);
            for place in places {
                match attempt(&place.pack) {
                    Ok(found) => return Ok(found),
                    Err(error) if matches!(error.code(), Code::Integrity | Code::NotFound) => {
                        failed = Some(error.during(format!("cannot use pack {}", place.pack)));
                    }
                    Err(error) => return Err(error),
                }
            }
            self.shared.refresh()?;
            // Another thread may have read what is new.
            if self.shared.state().next_sequence() == head {
                break;
            }
        }
        let error = failed
            .unwrap_or_else(|| Error::integrity(format!("no pack holds what is needed of group {group}")));
        // Absence of something that a point reaches is damage, whatever the store calls it.
        Err(Error::integrity(format!("group {group} cannot be read")).because(error))
    }

    pub(crate) fn footer(&self, pack: &PackId) -> Result<Arc<Footer>> {
        self.footers.get_or(pack, || self.load_footer(pack))
    }

    /// The footer and its weight.
    fn load_footer(&self, pack: &PackId) -> Result<(Arc<Footer>, usize)> {
        let Some((length, hash)) = self.entry(pack) else {
            return Err(Error::new(Code::NotFound, format!("pack {pack} is not in the log")));
        };
        let found = self.stored_footer(pack, length, &hash).or_else(|error| match error.code() {
            Code::Integrity => self.searched_footer(pack, error),
            _ => Err(error),
        });
        let (trailer, footer) = found?;
        Ok((Arc::new(footer), trailer.footer_length as usize * 2))
    }

    /// Length and hash of the footer of a pack, as the log says or whoever staged it.
    fn entry(&self, pack: &PackId) -> Option<(u64, [u8; 32])> {
        let staged = lock(&self.staged).get(pack).copied();
        staged.or_else(|| {
            self.shared.state().pack(pack).map(|pack| (pack.entry.length, pack.entry.footer_hash))
        })
    }

    /// The footer from the end of a pack.
    fn stored_footer(&self, pack: &PackId, length: u64, hash: &[u8; 32]) -> Result<(Trailer, Footer)> {
        let name = names::pack(pack);
        let tail = self.shared.store.get(&name, length.saturating_sub(TAIL_BYTES)..length)?;
        let trailer = Trailer::find(&tail, length, hash)?;
        let tail_start = length - tail.len() as u64;
        let read = |at: Range<u64>| {
            let bytes = match at.start.checked_sub(tail_start) {
                Some(start) => tail.get(start as usize..(at.end - tail_start) as usize).map(<[u8]>::to_vec),
                None => None,
            };
            trailer.footer(&bytes.map_or_else(|| self.shared.store.get(&name, at), Ok)?)
        };
        let [first, second] = trailer.footers();
        let footer = read(second).or_else(|_damaged| read(first))?;
        Ok((trailer, footer))
    }

    /// The directory of a group as stored, with the group's header.
    pub(crate) fn sealed_directory(&self, group: &GroupId) -> Result<Sealed> {
        self.try_places(group, &|_| true, &|pack| self.sealed_directory_in(pack, group))
    }

    pub(crate) fn sealed_directory_in(&self, pack: &PackId, group: &GroupId) -> Result<Sealed> {
        let footer = self.footer(pack)?;
        let (index, header) = self.find_group(&footer, group)?;
        let Some(block) = footer.directory(index) else {
            return Err(Error::integrity(format!("group {group} has no directory")));
        };
        Ok(Sealed { header, bytes: self.block(pack, block)? })
    }

    /// The bytes of a block, checked against the pack's footer, or made good by the pack's parity.
    fn block(&self, pack: &PackId, block: &Block) -> Result<Vec<u8>> {
        self.stored_block(pack, block).or_else(|error| match error.code() {
            Code::Integrity => self.healed_block(pack, block, error),
            _ => Err(error),
        })
    }

    fn stored_block(&self, pack: &PackId, block: &Block) -> Result<Vec<u8>> {
        let range = block.offset..block.offset + u64::from(block.length);
        let bytes = self.shared.store.get(&names::pack(pack), range)?;
        self.bytes_fetched.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if block_digest(&bytes) == block.digest {
            Ok(bytes)
        } else {
            Err(Error::integrity(format!("pack {pack} is damaged at byte {}", block.offset)))
        }
    }

    pub(crate) fn directory(&self, group: &GroupId) -> Result<Arc<Directory>> {
        self.directories.get_or(group, || {
            let sealed = self.sealed_directory(group)?;
            let domain = &sealed.header.domain;
            let keys = self.shared.ring.domain(*domain)?;
            let directory =
                open_directory(&keys.index_key, self.shared.family(), domain, group, &sealed.bytes)?;
            let weight = directory.weight();
            Ok((Arc::new(directory), weight))
        })
    }

    /// A segment as stored: what the collector and a rescuing writer copy. Checked against the pack's footer.
    pub(crate) fn sealed_segment(&self, group: &GroupId, ordinal: u32) -> Result<Sealed> {
        self.try_places(group, &|place| place.segments.contains(ordinal), &|pack| {
            self.sealed_segment_in(pack, group, ordinal)
        })
    }

    pub(crate) fn sealed_segment_in(&self, pack: &PackId, group: &GroupId, ordinal: u32) -> Result<Sealed> {
        let footer = self.footer(pack)?;
        let (index, header) = self.find_group(&footer, group)?;
        let Some(block) = footer.segment(index, ordinal) else {
            return Err(Error::integrity(format!(
                "segment {ordinal} of group {group} is not where the log says"
            )));
        };
        Ok(Sealed { header, bytes: self.block(pack, block)? })
    }

    fn group_key(&self, header: &GroupHeader) -> Result<SealKey> {
        let mut wrapped = blake3::Hasher::new();
        wrapped.update(&wrap_info(self.shared.family(), header)).update(&header.wrapped_key);
        self.keys.get_or(wrapped.finalize().as_bytes(), || Ok((self.unwrap_key(header)?, 64)))
    }

    fn unwrap_key(&self, header: &GroupHeader) -> Result<SealKey> {
        let secret = match header.class {
            Class::Data | Class::Meta => self.shared.ring.content_secret()?,
            Class::Structure => self.shared.ring.structure_secret()?,
        };
        let key = wrap::unwrap(secret, &wrap_info(self.shared.family(), header), &header.wrapped_key)
            .map_err(|error| error.during(format!("cannot unwrap the key of group {}", header.id)))?;
        let key =
            Secret::from_slice(&key).ok_or_else(|| Error::integrity("a group key has another length"))?;
        Ok(SealKey::from_secret(key))
    }

    pub(crate) fn open_sealed(&self, sealed: &Sealed, ordinal: u32) -> Result<Vec<u8>> {
        let key = self.group_key(&sealed.header)?;
        let GroupHeader { id, class, domain, .. } = &sealed.header;
        let binding = Binding { family: *self.shared.family(), domain: *domain, group: *id, class: *class };
        segment::open(&key, &binding, ordinal, &sealed.bytes)
    }

    /// The chunks of a segment, back to back.
    pub(crate) fn segment(&self, group: &GroupId, ordinal: u32) -> Result<Opened> {
        self.segments.get_or(&(*group, ordinal), || {
            let opened = self.try_places(group, &|place| place.segments.contains(ordinal), &|pack| {
                let sealed = self.sealed_segment_in(pack, group, ordinal)?;
                self.open_sealed(&sealed, ordinal)
            })?;
            let weight = opened.len() + 64;
            Ok((Arc::new(opened), weight))
        })
    }

    /// Whether a segment is in memory.
    pub(crate) fn has_segment(&self, group: &GroupId, ordinal: u32) -> bool {
        self.segments.has(&(*group, ordinal))
    }

    /// Checks the bytes of a chunk against its id, in whichever domain it was cut.
    pub(crate) fn check_chunk(&self, id: &ChunkId, bytes: &[u8]) -> Result<()> {
        let domains = self.shared.ring.domains();
        if domains.iter().any(|keys| chunk_id(&keys.id_key, bytes) == *id) {
            Ok(())
        } else {
            Err(Error::integrity("a chunk is not what its id says"))
        }
    }

    /// The group in a pack, if it is the one that the log knows by this id.
    fn find_group(&self, footer: &Footer, group: &GroupId) -> Result<(usize, GroupHeader)> {
        let index = footer.group(group);
        let found = index.and_then(|index| Some((index, footer.groups.get(index)?.clone())));
        let (index, header) =
            found.ok_or_else(|| Error::integrity(format!("group {group} is not where the log says")))?;
        match self.shared.state().group(group) {
            Some(digest) if footer.group_digest(index) != Some(digest) => {
                Err(Error::integrity(format!("another group stands under the id {group}")))
            }
            _ => Ok((index, header)),
        }
    }

    /// Whose the group is. When several writers registered packs of it, its header is asked: the group's digest, which
    /// was fixed when the group was first named, covers it. `None` when nobody knows.
    pub(crate) fn owner(&self, group: &GroupId) -> Result<Option<WriterId>> {
        let owner = self.shared.state().owner(group);
        match owner {
            Some(Owner::Writer(writer)) => return Ok(Some(writer)),
            None => return Ok(None),
            Some(Owner::Contested) => {}
        }
        if let Some(owner) = lock(&self.owners).get(group) {
            return Ok(Some(*owner));
        }
        let header = |pack: &PackId| self.find_group(&*self.footer(pack)?, group).map(|(_, header)| header);
        match self.try_places(group, &|_| true, &header) {
            Ok(header) => {
                lock(&self.owners).insert(*group, header.writer);
                Ok(Some(header.writer))
            }
            Err(error) if error.code() == Code::Integrity => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn load_meta(&self, page: &PageRef) -> Result<Arc<[u8]>> {
        let directory = self.directory(&page.group)?;
        let place = directory.place(page.slot).filter(|place| place.ordinal == page.segment);
        let place = place.ok_or_else(|| Error::integrity("a page is not where its reference says"))?;
        let segment = self.segment(&page.group, place.ordinal)?;
        let start = place.offset as usize;
        let bytes = segment.get(start..start + place.length as usize);
        let bytes = bytes.ok_or_else(|| Error::integrity("a segment is shorter than its directory says"))?;
        self.check_page(&page.id, bytes)?;
        Ok(bytes.into())
    }

    /// Checks the bytes of a page against its id, in whichever domain it was made.
    pub(crate) fn check_page(&self, id: &[u8; 32], bytes: &[u8]) -> Result<()> {
        let domains = self.shared.ring.domains();
        if domains.iter().any(|keys| blake3::keyed_hash(&keys.page_key, bytes).as_bytes() == id) {
            Ok(())
        } else {
            Err(Error::integrity("a page is not what its id says"))
        }
    }
}

/// What the wrapped key of a group is bound to.
pub(crate) fn wrap_info(family: &crate::keys::FamilyId, header: &GroupHeader) -> Vec<u8> {
    let mut info = b"mainstay group key 1".to_vec();
    info.extend_from_slice(&family.0);
    info.extend_from_slice(&header.domain.0);
    info.extend_from_slice(&header.id.0);
    info.push(header.class as u8);
    info
}

/// The id of a structure page: not keyed, so that the collector, who has no domain keys, can check it.
pub(crate) fn structure_page_id(bytes: &[u8]) -> [u8; 32] {
    blake3::derive_key("mainstay structure page 1", bytes)
}

/// Tree, recipe and skip pages.
#[derive(Clone)]
pub(crate) struct MetaPages {
    pub(crate) fetch: Arc<Fetch>,
    /// Where a writer that cannot read looks instead.
    copy: Option<Arc<TreeCopy>>,
}

impl MetaPages {
    pub(crate) fn new(fetch: &Arc<Fetch>) -> Self {
        Self { fetch: Arc::clone(fetch), copy: None }
    }

    pub(crate) fn of_copy(fetch: &Arc<Fetch>, copy: TreeCopy) -> Self {
        Self { fetch: Arc::clone(fetch), copy: Some(Arc::new(copy)) }
    }
}

impl PageSource for MetaPages {
    fn load(&self, page: &PageRef) -> Result<Arc<[u8]>> {
        match &self.copy {
            Some(copy) => copy.load(page),
            None => self.fetch.load_meta(page),
        }
    }
}

/// Reference pages: each is a segment by itself.
#[derive(Clone)]
pub(crate) struct StructurePages(pub(crate) Arc<Fetch>);

impl PageSource for StructurePages {
    fn load(&self, page: &PageRef) -> Result<Arc<[u8]>> {
        let bytes = self.0.segment(&page.group, page.segment)?;
        if structure_page_id(&bytes) == page.id {
            Ok(bytes.as_slice().into())
        } else {
            Err(Error::integrity("a reference page is not what its reference says"))
        }
    }
}

#[cfg(test)]
mod tests;
