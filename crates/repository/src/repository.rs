//! An open repository: the one door to points.

use std::path::PathBuf;
use std::sync::Arc;

use mainstay_core::{BlobStore, Clock, Code, Error, Id16, PointId, Result, Time, WriterId};

use crate::config::Config;
use crate::fetch::Fetch;
use crate::keys::kit::Kit;
use crate::keys::slot::{self, Lock};
use crate::keys::{FamilyId, KeyRing, Powers};
use crate::log::record::{Change, StoredNote, WriterEntry};
use crate::log::state::{PackStatus, State};
use crate::log::{Log, random_id};
use crate::memory::{self, Head, Memory};
use crate::names;
use crate::points::{Note, PointInfo, Points, put_twice};
use crate::read::PointReader;
use crate::seal::Secret;
use crate::shared::{Shared, Tuning};
use crate::sign::SigningKey;
use crate::write::{PointWriter, WriteRequest};

pub(crate) const SLOT_BYTES_MAX: u64 = 1 << 20;
/// By then whoever wrote a record has made it durable, or died.
const SETTLES_NS: i64 = 60_000_000_000;

/// What opening a repository needs beside a key.
#[derive(Clone)]
pub struct Options {
    pub clock: Arc<dyn Clock>,
    /// A directory private to this user, for what is remembered between runs; none remembers nothing.
    pub state: Option<PathBuf>,
    pub tuning: Tuning,
}

/// What opens a repository.
pub enum Unlock<'a> {
    Passphrase(&'a [u8]),
    /// The high-entropy key of a generated key file.
    KeyFile(&'a Secret),
    Kit(&'a Kit),
    /// Powers carried in full, as a write-only client does.
    Ring(Box<KeyRing>),
}

/// An open repository. Shared freely between threads.
pub struct Repository {
    pub(crate) shared: Arc<Shared>,
    pub(crate) fetch: Arc<Fetch>,
    pub(crate) points: Arc<Points>,
    memory: Option<Memory>,
}

/// Figures about what is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes of all packs that are live or condemned.
    pub pack_bytes: u64,
    pub packs: u64,
    pub condemned_packs: u64,
    pub points: u64,
    pub expired_points: u64,
    /// Index runs that still tell of something.
    pub index_runs: u64,
    /// Number of the next log record.
    pub log_next: u64,
    /// The latest moment that any record claims.
    pub newest: Time,
    /// Numbers in the log that hold nothing valid, and breaks in its chain.
    pub log_damage: Vec<u64>,
    pub log_voids: u64,
    /// Bytes that the medium keeps free so that a full one can still be emptied; `None` where it keeps nothing or does
    /// not say.
    pub reserve: Option<u64>,
}

/// What a new holder of keys is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Writes points; reads nothing, deletes nothing.
    WriteOnly,
    /// Expires points and collects garbage; reads no content.
    Collector,
}

/// Somebody who may sign.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriterInfo {
    pub id: WriterId,
    pub name: String,
    pub powers: Powers,
}

impl Repository {
    /// Writes configuration, key slots and the first record of the log into an empty store.
    ///
    /// Errors: [`Code::AlreadyExists`] when there is a repository already; [`Code::NoPower`] when `ring` is not an
    /// owner's.
    pub fn create(
        store: Arc<dyn BlobStore>,
        ring: KeyRing,
        slots: &[Vec<u8>],
        options: &Options,
    ) -> Result<Self> {
        let root = ring.root()?.signing_key();
        ring.writer(Powers::WRITE)?;
        let config = Config::new(ring.family(), root.verifying_key(), options.tuning.parity)?;
        for bytes in slots {
            put_twice(store.as_ref(), &names::key_slot(&slot::read_header(bytes)?.slot), bytes)?;
        }
        // Without a slot nobody could open what the configuration promises.
        store.flush()?;
        config.store(store.as_ref(), root)?;
        let this = Self::assemble(store, ring.clone(), &config, options);
        this.begin_log()?;
        Ok(this)
    }

    /// Admits the owner with the first record.
    fn begin_log(&self) -> Result<()> {
        let ring = &self.shared.ring;
        let key = ring.writer(Powers::WRITE)?.verifying_key();
        let entry = WriterEntry { key, powers: ring.powers(), name: self.shared.seal_text("owner")? };
        self.shared.append_signed_by(ring.root()?.signing_key(), &mut |state| {
            if state.next_sequence() > 0 {
                return Err(Error::new(Code::AlreadyExists, "the store already has a log"));
            }
            Ok(Change::Genesis { writers: vec![entry.clone()] })
        })?;
        self.remember();
        Ok(())
    }

    /// The id of the repository in a store, without any key.
    ///
    /// Errors: [`Code::NoRepository`].
    pub fn identify(store: &dyn BlobStore) -> Result<FamilyId> {
        Config::load(store, None).map(|config| config.family)
    }

    /// Errors: [`Code::NoRepository`], [`Code::WrongKey`] when nothing opens with `unlock`, [`Code::Integrity`]
    /// when the store was rolled back.
    pub fn open(store: Arc<dyn BlobStore>, unlock: &Unlock<'_>, options: &Options) -> Result<Self> {
        let (config, ring) = match unlock {
            Unlock::Ring(ring) => (Config::load(store.as_ref(), Some(&ring.family()))?, KeyRing::clone(ring)),
            _ => {
                let config = Config::load(store.as_ref(), None)?;
                let ring = open_slots(store.as_ref(), &config, unlock)?;
                (config, ring)
            }
        };
        let this = Self::assemble(store, ring, &config, options);
        this.refresh_past_gaps()?;
        if this.shared.state().next_sequence() == 0 && this.shared.ring.root().is_ok() {
            // Its making was interrupted just before the end.
            match this.begin_log() {
                Err(error) if error.code() != Code::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        Ok(this)
    }

    fn assemble(store: Arc<dyn BlobStore>, ring: KeyRing, config: &Config, options: &Options) -> Self {
        let log = Log {
            store,
            id: config.log_id(),
            family: config.family,
            root: config.root,
            clock: Arc::clone(&options.clock),
        };
        let folder = options.state.as_ref().map(|state| memory::folder(state, &config.family));
        let memory = folder.as_deref().map(Memory::new);
        let shared = Arc::new(Shared::new(
            ring,
            log,
            config.features,
            folder,
            Tuning { parity: config.parity, ..options.tuning },
        ));
        Self {
            fetch: Arc::new(Fetch::new(Arc::clone(&shared))),
            points: Arc::new(Points::new(Arc::clone(&shared))),
            memory,
            shared,
        }
    }

    /// The repository's id: the hash of its root key.
    pub fn family(&self) -> FamilyId {
        *self.shared.family()
    }

    pub fn location(&self) -> String {
        self.shared.store.location()
    }

    pub fn ring(&self) -> &KeyRing {
        &self.shared.ring
    }

    /// Reads what was appended to the log since.
    pub fn refresh(&self) -> Result<()> {
        // What is remembered is read first: another process may append, and remember, while the log is read.
        let seen = self.memory.as_ref().and_then(Memory::remembered);
        self.shared.refresh()?;
        self.check_memory(seen)
    }

    pub(crate) fn refresh_past_gaps(&self) -> Result<()> {
        let seen = self.memory.as_ref().and_then(Memory::remembered);
        self.shared.refresh_past_gaps()?;
        self.check_memory(seen)
    }

    fn check_memory(&self, seen: Option<Head>) -> Result<()> {
        if let (Some(memory), Some(seen)) = (&self.memory, seen) {
            memory.check(seen, &self.shared.state())?;
        }
        // What others wrote just now may not be durable yet, and a power cut is not a rollback.
        if let Some(memory) = &self.memory {
            let state = self.shared.state();
            let settled = self.shared.clock.now().0.saturating_sub(SETTLES_NS);
            memory.remember(state.next_at(Time(settled)), &state);
        }
        Ok(())
    }

    /// After a record of our own, which made itself and all before it durable.
    fn remember(&self) {
        if let Some(memory) = &self.memory {
            let state = self.shared.state();
            memory.remember(state.next_sequence(), &state);
        }
    }

    /// Points that are not expired, in the order of the log. Those that [`Repository::damaged_points`] names are not
    /// among them: one lost object must not keep anyone from the others.
    pub fn points(&self) -> Result<Vec<PointInfo>> {
        let mut points = Vec::new();
        for (_, info) in self.live_points() {
            match info {
                Ok(info) => points.push(info),
                Err(error) if is_damage(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(points)
    }

    /// Points of the log that are not expired and cannot be read, with what is wrong.
    pub fn damaged_points(&self) -> Vec<(PointId, Error)> {
        let damaged =
            |(id, info): (PointId, Result<_>)| info.err().filter(is_damage).map(|error| (id, error));
        self.live_points().into_iter().filter_map(damaged).collect()
    }

    fn live_points(&self) -> Vec<(PointId, Result<PointInfo>)> {
        let live: Vec<_> = self.shared.state().live_points().into_iter().cloned().collect();
        live.iter().map(|point| (point.entry.id, self.points.info(point))).collect()
    }

    fn point(&self, id: &PointId) -> Result<PointInfo> {
        let point = self.shared.state().point(id).filter(|point| !point.expired).cloned();
        let missing = || Error::new(Code::NotFound, format!("there is no point {id}"));
        self.points.info(&point.ok_or_else(missing)?)
    }

    /// Opens a point for reading. Needs the power to read.
    pub fn read(&self, id: &PointId) -> Result<PointReader> {
        let info = self.point(id)?;
        let loaded = self.points.load(id)?;
        self.shared.ring.content_secret()?;
        let body = loaded.body.as_ref().ok_or_else(|| Error::bug("a readable point has no body"))?;
        Ok(PointReader::new(Arc::clone(&self.fetch), info, body.items, body.skips))
    }

    /// Starts a new point. Needs the power to write.
    pub fn write(&self, request: WriteRequest) -> Result<PointWriter> {
        self.refresh()?;
        PointWriter::new(Arc::clone(&self.fetch), Arc::clone(&self.points), request)
    }

    /// What a boot from the point read, if one was noted.
    pub fn boot(&self, point: &PointId) -> Result<Option<String>> {
        let state = self.shared.state();
        let notes = state.point(point).map(|point| point.notes.as_slice()).unwrap_or_default();
        let reads = notes.iter().find_map(|(_, note)| match note {
            StoredNote::Boot(reads) => Some(reads),
            _ => None,
        });
        reads.map(|reads| reads.open(&self.shared.ring)).transpose()
    }

    /// Appends a fact about a point.
    pub fn note(&self, point: &PointId, note: &Note) -> Result<()> {
        let hold = random_id()?;
        let note = match note.clone() {
            Note::Tag(tag) => StoredNote::Tag(self.shared.seal_text(&tag)?),
            Note::Untag(tag) => StoredNote::Untag(self.shared.seal_text(&tag)?),
            Note::Hold { reason, until } => {
                StoredNote::Hold { id: hold, reason: self.shared.seal_text(&reason)?, until }
            }
            Note::Release(id) => StoredNote::Release(id),
            Note::Verified { read_data } => StoredNote::Verified { read_data },
            Note::Proven { how, seconds } => {
                StoredNote::Proven { how: self.shared.seal_text(&how)?, seconds }
            }
            Note::Boot(reads) => StoredNote::Boot(self.shared.seal_text(&reads)?),
        };
        let power = if matches!(note, StoredNote::Release(_)) { Powers::EXPIRE } else { Powers::WRITE };
        self.append(power, &mut |state| match state.point(point) {
            Some(found) if !found.expired => Ok(Change::Note { point: *point, note: note.clone() }),
            _ => Err(Error::new(Code::NotFound, format!("there is no point {point}"))),
        })
    }

    /// Stops keeping points. Their bytes go with the next garbage collection.
    ///
    /// Errors: [`Code::Refused`] when one of them is held, and then nothing happens.
    pub fn expire(&self, points: &[PointId], reason: &str) -> Result<()> {
        if points.is_empty() {
            return Ok(());
        }
        let now = self.shared.clock.now();
        let sealed = self.shared.seal_text(reason)?;
        self.append(Powers::EXPIRE, &mut |state| {
            // A hold ends by the later of both clocks, so that a clock set forward releases nothing early
            // unless the log agrees.
            let moment = now.min(state.newest_time().max(Time(0)));
            for id in points {
                let Some(point) = state.point(id).filter(|point| !point.expired) else {
                    return Err(Error::new(Code::NotFound, format!("there is no point {id}")));
                };
                if point.entry.retain_until > moment {
                    let what =
                        format!("point {id} is retained until {} s", point.entry.retain_until.seconds());
                    return Err(Error::new(Code::Refused, what));
                }
                let held =
                    point.holds().into_iter().find(|hold| hold.until.is_none_or(|until| until > moment));
                if let Some(hold) = held {
                    let what = format!("point {id} is held: {}", hold.open(&self.shared.ring).reason);
                    return Err(Error::new(Code::Refused, what).hint("release the hold first"));
                }
            }
            Ok(Change::Expire { points: points.to_vec(), reason: sealed.clone() })
        })
    }

    pub(crate) fn append(
        &self,
        power: Powers,
        decide: &mut dyn FnMut(&State) -> Result<Change>,
    ) -> Result<()> {
        self.shared.append(power, decide)?;
        self.remember();
        Ok(())
    }

    pub fn stats(&self) -> Stats {
        let state = self.shared.state();
        let mut stats = Stats {
            points: state.live_points().len() as u64,
            expired_points: state.all_points().filter(|point| point.expired).count() as u64,
            index_runs: state.runs().count() as u64,
            log_next: state.next_sequence(),
            newest: state.newest_time(),
            log_damage: state.damage().to_vec(),
            log_voids: state.voids().len() as u64,
            reserve: self.shared.store.reserve().ok().flatten(),
            ..Stats::default()
        };
        for pack in state.packs().filter(|pack| pack.status != PackStatus::Deleted) {
            stats.packs += 1;
            stats.pack_bytes += pack.entry.length;
            stats.condemned_packs += u64::from(pack.status != PackStatus::Live);
        }
        stats
    }

    /// The key slots: what can open this repository.
    pub fn slots(&self) -> Result<Vec<slot::Header>> {
        let slots = read_slots(self.shared.store.as_ref())?;
        slots.iter().map(|bytes| slot::read_header(bytes)).collect()
    }

    pub fn add_slot(&self, bytes: &[u8]) -> Result<()> {
        let name = names::key_slot(&slot::read_header(bytes)?.slot);
        put_twice(self.shared.store.as_ref(), &name, bytes)?;
        self.shared.store.flush()
    }

    /// Errors: [`Code::Refused`] for the last slot, without which nobody could open the repository.
    pub fn remove_slot(&self, id: &Id16) -> Result<()> {
        let slots = self.slots()?;
        if !slots.iter().any(|slot| slot.slot == *id) {
            return Err(Error::new(Code::NotFound, format!("there is no key slot {id}")));
        }
        if slots.len() == 1 {
            return Err(Error::new(Code::Refused, "the last key slot cannot be removed")
                .hint("add another one first"));
        }
        let name = names::key_slot(id);
        self.shared.store.delete(&names::copy_of(&name))?;
        self.shared.store.delete(&name)?;
        self.shared.store.flush()
    }

    pub fn writers(&self) -> Vec<WriterInfo> {
        let state = self.shared.state();
        let info = |(id, entry): (&WriterId, &WriterEntry)| WriterInfo {
            id: *id,
            name: entry.name.open(&self.shared.ring).unwrap_or_else(|_| id.to_string()),
            powers: entry.powers,
        };
        state.writers().map(info).collect()
    }

    /// Lets a new holder write or collect, and returns its keys. Needs the root key.
    pub fn add_writer(&self, name: &str, role: Role) -> Result<KeyRing> {
        let root = self.shared.ring.root()?.signing_key();
        let signing = SigningKey::generate()?;
        let key = signing.verifying_key();
        let ring = match role {
            Role::WriteOnly => self.shared.ring.write_only(signing),
            Role::Collector => self.shared.ring.collector(signing)?,
        };
        let powers = ring.powers();
        let entry = WriterEntry { key, powers, name: self.shared.seal_text(name)? };
        self.shared.append_signed_by(root, &mut |_| Ok(Change::Writer(entry.clone())))?;
        self.remember();
        Ok(ring)
    }

    /// Takes every power from a writer. What it wrote stays. Needs the root key.
    pub fn revoke_writer(&self, id: &WriterId) -> Result<()> {
        let root = self.shared.ring.root()?.signing_key();
        self.shared.append_signed_by(root, &mut |state| match state.writer(id) {
            Some(entry) => Ok(Change::Writer(WriterEntry { powers: Powers::default(), ..entry.clone() })),
            None => Err(Error::new(Code::NotFound, format!("there is no writer {id}"))),
        })?;
        self.remember();
        Ok(())
    }
}

fn is_damage(error: &Error) -> bool {
    matches!(error.code(), Code::Integrity | Code::TooNew)
}

fn read_slots(store: &dyn BlobStore) -> Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    store.list(names::KEYS, &mut |listed| {
        names.push(listed.name);
        Ok(())
    })?;
    names.sort();
    let mut slots = Vec::new();
    for name in names {
        let copy = || store.get_whole(&names::copy_of(&name), SLOT_BYTES_MAX);
        let whole = |bytes: Vec<u8>| slot::read_header(&bytes).map(|_| bytes);
        match store.get_whole(&name, SLOT_BYTES_MAX).and_then(whole).or_else(|_damaged| copy()) {
            Ok(bytes) => slots.push(bytes),
            Err(error) if matches!(error.code(), Code::Integrity | Code::NotFound) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(slots)
}

/// Whether another slot may open where this one did not.
fn passed_over(code: Code) -> bool {
    matches!(code, Code::WrongKey | Code::Integrity | Code::TooNew | Code::Unsupported)
}

fn open_slots(store: &dyn BlobStore, config: &Config, unlock: &Unlock<'_>) -> Result<KeyRing> {
    if let Unlock::Kit(kit) = unlock
        && !kit.belongs_to(&config.family)
    {
        let what = format!("this recovery kit belongs to another repository than {}", config.family.short());
        return Err(Error::new(Code::WrongKey, what)
            .hint("look for the kit on which this repository's id is printed"));
    }
    let slots = read_slots(store)?;
    for bytes in &slots {
        // One for a newer version, or damaged.
        let Ok(header) = slot::read_header(bytes) else { continue };
        let opened = match (header.lock, unlock) {
            (Lock::Passphrase { .. }, Unlock::Passphrase(passphrase)) => {
                slot::open_with_passphrase(bytes, passphrase)
            }
            (Lock::Key, Unlock::KeyFile(key)) => slot::open_with_key(bytes, key),
            (Lock::Key, Unlock::Kit(kit)) => kit.open_slot(bytes),
            _ => continue,
        };
        match opened {
            Ok(ring) if ring.family() == config.family => return Ok(ring),
            // Another repository's slot, another passphrase's, or one that this machine cannot stretch.
            Ok(_) => {}
            Err(error) if passed_over(error.code()) => {}
            Err(error) => return Err(error),
        }
    }
    let what =
        format!("none of the {} key slots of repository {} opens with this", slots.len(), config.family);
    Err(Error::new(Code::WrongKey, what)
        .hint("check the passphrase or key file; the recovery kit opens it too"))
}
