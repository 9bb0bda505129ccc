//! What the log says, read from its first record to its last: plain values, no I/O.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};

use mainstay_core::{Id16, PointId, Time, WriterId};

use super::record::{
    Change, GroupEntry, PackEntry, PointEntry, Record, RunEntry, Signer, StoredNote, WriterEntry,
};
use super::text::SealedText;
use crate::config::Features;
use crate::format::pack::{GroupDigest, PackId};
use crate::format::segment::{Class, GroupId};
use crate::keys::KeyRing;
use crate::points::Hold;
use crate::ranges::Ranges;
use crate::sign::VerifyingKey;

#[derive(Clone, Default)]
pub(crate) struct State {
    /// By number: the hash of the last chained record up to it, and the latest moment that one up to it claims.
    heads: Vec<([u8; 32], Time)>,
    /// Of the configuration, and with what the log adds.
    configured: Features,
    features: Features,
    writers: BTreeMap<WriterId, WriterEntry>,
    points: BTreeMap<PointId, PointState>,
    packs: HashMap<PackId, PackState>,
    groups: HashMap<GroupId, GroupState>,
    runs: Vec<RunState>,
    /// Which run tells what a group holds.
    told_by: HashMap<GroupId, usize>,
    /// By stream of a journal: the first number that is still needed.
    trimmed: BTreeMap<Id16, u64>,
    /// When, by whom and in which words something was decided last.
    decisions: BTreeMap<Id16, (Time, WriterId, SealedText)>,
    /// The latest moment that any record claims.
    newest: Time,
    /// Numbers of records before which one is missing from the chain.
    damage: Vec<u64>,
    /// Numbers that hold no record of anybody's.
    voids: Vec<u64>,
    /// Those of them that nobody has taken yet.
    open: Vec<u64>,
}

/// An index run, and how many of its groups still lie somewhere.
#[derive(Clone, Debug)]
struct RunState {
    entry: RunEntry,
    groups: usize,
    /// All of its groups are gone, and it may go too.
    freed: bool,
}

/// A group, and where its segments lie.
#[derive(Clone, Debug)]
struct GroupState {
    digest: GroupDigest,
    /// Who named it first.
    writer: WriterId,
    /// Another writer named it too, and not as a collector.
    contested: bool,
    places: Vec<Location>,
}

/// Whose a group is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Writer(WriterId),
    /// Several writers registered packs of it: its header says which of them it is; see [`crate::fetch::Fetch::owner`].
    Contested,
}

#[derive(Clone, Debug)]
pub(crate) struct PointState {
    pub(crate) entry: PointEntry,
    /// Place in the log, and the time its commit record claims.
    pub(crate) sequence: u64,
    pub(crate) committed: Time,
    /// Who committed it.
    pub(crate) by: WriterId,
    pub(crate) expired: bool,
    /// When its expiry was claimed to be.
    pub(crate) expired_at: Time,
    pub(crate) notes: Vec<(Time, StoredNote)>,
}

#[derive(Clone, Debug)]
pub(crate) struct PackState {
    pub(crate) entry: PackEntry,
    pub(crate) status: PackStatus,
    /// Who registered it; `None` for a collector.
    pub(crate) by: Option<WriterId>,
    /// When the record that registered it claims to have been written.
    pub(crate) since: Time,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PackStatus {
    Live,
    /// Nobody may rely on it any more; when its condemnation was claimed to be.
    Condemned(Time),
    Deleted,
}

/// Where some segments of a group lie.
#[derive(Clone, Debug)]
pub(crate) struct Location {
    pub(crate) pack: PackId,
    pub(crate) segments: Ranges,
    /// Who says so; `None` for a collector.
    by: Option<WriterId>,
}

/// Whose the contested groups are that were asked about; `None` where nobody can tell.
pub(crate) type Owners = HashMap<GroupId, Option<WriterId>>;

impl State {
    /// Before the first record. `features` are those of the configuration.
    pub(crate) fn starting_with(features: Features) -> Self {
        Self { configured: features, features, ..Self::default() }
    }

    /// Before the first record again.
    pub(super) fn restart(&mut self) {
        *self = Self::starting_with(self.configured);
    }

    pub(crate) fn next_sequence(&self) -> u64 {
        self.heads.len() as u64
    }

    pub(crate) fn head_hash(&self) -> [u8; 32] {
        self.heads.last().map(|(hash, _)| *hash).unwrap_or_default()
    }

    /// The head as it was when `next` was the number of the next record; `None` when there are fewer.
    pub(crate) fn head_hash_at(&self, next: u64) -> Option<[u8; 32]> {
        match usize::try_from(next).ok()?.checked_sub(1) {
            Some(last) => self.heads.get(last).map(|(hash, _)| *hash),
            None => Some([0; 32]),
        }
    }

    /// The number of the first record that claims to be younger than `moment`, or that follows one which does.
    pub(crate) fn next_at(&self, moment: Time) -> u64 {
        self.heads.partition_point(|(_, latest)| *latest <= moment) as u64
    }

    /// What readers, writers and collectors must know.
    pub(crate) fn features(&self) -> &Features {
        &self.features
    }

    /// The first object of a journal that is still needed.
    pub(crate) fn trimmed(&self, stream: &Id16) -> u64 {
        self.trimmed.get(stream).copied().unwrap_or(0)
    }

    pub(crate) fn newest_time(&self) -> Time {
        self.newest
    }

    pub(crate) fn damage(&self) -> &[u64] {
        &self.damage
    }

    pub(crate) fn voids(&self) -> &[u64] {
        &self.voids
    }

    pub(crate) fn writers(&self) -> impl Iterator<Item = (&WriterId, &WriterEntry)> {
        self.writers.iter()
    }

    pub(crate) fn writer(&self, id: &WriterId) -> Option<&WriterEntry> {
        self.writers.get(id)
    }

    pub(crate) fn point(&self, id: &PointId) -> Option<&PointState> {
        self.points.get(id)
    }

    /// Points that are not expired, in the order of the log.
    pub(crate) fn live_points(&self) -> Vec<&PointState> {
        let mut points: Vec<_> = self.points.values().filter(|point| !point.expired).collect();
        points.sort_by_key(|point| point.sequence);
        points
    }

    pub(crate) fn all_points(&self) -> impl Iterator<Item = &PointState> {
        self.points.values()
    }

    /// Whether this writer committed a point in record `next` or later.
    pub(crate) fn has_point_since(&self, next: u64, writer: &WriterId) -> bool {
        self.points.values().any(|point| point.sequence >= next && point.by == *writer)
    }

    /// Each by its id, also those that were taken back.
    pub(crate) fn decisions(&self) -> impl Iterator<Item = (&Id16, &Time, &WriterId, &SealedText)> {
        self.decisions.iter().map(|(id, (time, writer, words))| (id, time, writer, words))
    }

    pub(crate) fn packs(&self) -> impl Iterator<Item = &PackState> {
        self.packs.values()
    }

    pub(crate) fn pack(&self, id: &PackId) -> Option<&PackState> {
        self.packs.get(id)
    }

    /// Index runs of which at least one group still lies somewhere.
    pub(crate) fn runs(&self) -> impl Iterator<Item = &RunEntry> {
        self.runs.iter().filter(|run| !run.freed).map(|run| &run.entry)
    }

    /// The names of all runs, and whether each may go.
    pub(crate) fn freed_runs(&self) -> HashMap<Id16, bool> {
        let mut runs = HashMap::new();
        for run in &self.runs {
            *runs.entry(run.entry.id).or_insert(true) &= run.freed;
        }
        runs
    }

    /// Every place where segments of the group lie, live ones first.
    pub(crate) fn locations(&self, group: &GroupId) -> Vec<&Location> {
        let mut places: Vec<_> = self.places(group).iter().collect();
        places.retain(|place| self.status(&place.pack) != Some(PackStatus::Deleted));
        places.sort_by_key(|place| self.status(&place.pack) != Some(PackStatus::Live));
        places
    }

    fn places(&self, group: &GroupId) -> &[Location] {
        self.groups.get(group).map(|group| group.places.as_slice()).unwrap_or_default()
    }

    /// What the group is.
    pub(crate) fn group(&self, group: &GroupId) -> Option<GroupDigest> {
        self.groups.get(group).map(|group| group.digest)
    }

    /// Whose the group is, as far as the log tells.
    pub(crate) fn owner(&self, group: &GroupId) -> Option<Owner> {
        let state = self.groups.get(group)?;
        Some(if state.contested { Owner::Contested } else { Owner::Writer(state.writer) })
    }

    /// Whose the group is, when `owners` knows that of the contested ones.
    pub(crate) fn owner_among(&self, group: &GroupId, owners: &Owners) -> Option<WriterId> {
        match self.owner(group)? {
            Owner::Writer(writer) => Some(writer),
            Owner::Contested => owners.get(group).copied().flatten(),
        }
    }

    pub(crate) fn contested(&self) -> impl Iterator<Item = &GroupId> {
        self.groups.iter().filter(|(_, group)| group.contested).map(|(id, _)| id)
    }

    /// Places where the group lies by the word of its owner or of a collector. What anybody else says is a claim.
    pub(crate) fn trusted_places(
        &self,
        group: &GroupId,
        owner: Option<&WriterId>,
    ) -> impl Iterator<Item = &Location> {
        self.places(group).iter().filter(move |place| place.by.is_none() || place.by.as_ref() == owner)
    }

    /// The segments of the group that a new point may rely on.
    pub(crate) fn live_segments(&self, group: &GroupId, owner: Option<&WriterId>) -> Ranges {
        let mut live = Ranges::default();
        for place in self.trusted_places(group, owner) {
            if self.status(&place.pack) == Some(PackStatus::Live) {
                live.extend(&place.segments);
            }
        }
        live
    }

    pub(crate) fn status(&self, pack: &PackId) -> Option<PackStatus> {
        self.packs.get(pack).map(|pack| pack.status)
    }

    /// Who that is, if their records have a place in the chain: the root, and every writer there ever was.
    pub(crate) fn signer(&self, root: &VerifyingKey, id: &WriterId) -> Option<Signer> {
        if root.writer_id() == *id {
            return Some(Signer { key: *root, powers: None });
        }
        self.writers.get(id).map(|entry| Signer { key: entry.key, powers: Some(entry.powers) })
    }

    /// Passes over a number that holds no record of anybody's.
    pub(crate) fn pass_void(&mut self) {
        self.voids.push(self.next_sequence());
        self.heads.push((self.head_hash(), self.newest));
    }

    /// Passes over a number that holds nothing at all, though there are later records.
    pub(crate) fn pass_absent(&mut self) {
        self.open.push(self.next_sequence());
        self.pass_void();
    }

    /// Numbers that were passed over and that somebody could still take.
    pub(super) fn open_numbers(&self) -> &[u64] {
        &self.open
    }

    /// All of [`State::open_numbers`] are taken now.
    pub(super) fn close_numbers(&mut self) {
        self.open.clear();
    }

    /// Passes over a record that has a place in the chain, and does nothing.
    pub(crate) fn pass_idle(&mut self, previous: [u8; 32], hash: [u8; 32]) {
        self.check_chain(previous);
        self.heads.push((hash, self.newest));
    }

    fn check_chain(&mut self, previous: [u8; 32]) {
        if previous != self.head_hash() {
            // What its writer saw before it is not what is here: a record between was lost or replaced.
            self.damage.push(self.next_sequence());
        }
    }

    /// Applies the record of number [`State::next_sequence`], which must be valid.
    pub(crate) fn apply(&mut self, record: Record, hash: [u8; 32]) {
        self.check_chain(record.previous);
        let Record { sequence, time, writer, change, .. } = record;
        match change {
            Change::Genesis { writers } => writers.into_iter().for_each(|writer| self.set_writer(writer)),
            Change::Writer(writer) => self.set_writer(writer),
            Change::Commit { packs, runs, point } => {
                let groups = packs.iter().flat_map(|pack| &pack.groups);
                let groups: Vec<_> =
                    groups.filter(|group| group.class != Class::Structure).map(|group| group.id).collect();
                packs.into_iter().for_each(|pack| self.add_pack(pack, &writer, Some(writer), time));
                runs.into_iter().for_each(|run| self.add_run(run, &groups));
                if let Some(entry) = point {
                    let state = PointState {
                        entry,
                        sequence,
                        committed: time,
                        by: writer,
                        expired: false,
                        expired_at: Time::default(),
                        notes: Vec::new(),
                    };
                    self.points.entry(state.entry.id).or_insert(state);
                }
            }
            Change::Note { point, note } => {
                if let Some(point) = self.points.get_mut(&point) {
                    if matches!(note, StoredNote::Boot(_)) {
                        // The last one says it all, and they are long.
                        point.notes.retain(|(_, note)| !matches!(note, StoredNote::Boot(_)));
                    }
                    point.notes.push((time, note));
                }
            }
            Change::Expire { points, .. } => {
                for point in points {
                    if let Some(point) = self.points.get_mut(&point).filter(|point| !point.expired) {
                        (point.expired, point.expired_at) = (true, time);
                    }
                }
            }
            Change::Condemn { packs, moved } => {
                packs.iter().for_each(|pack| self.condemn(pack, time));
                moved.into_iter().for_each(|pack| self.add_pack(pack, &writer, None, time));
            }
            Change::Delete { packs } => packs.iter().for_each(|pack| self.delete(pack)),
            Change::Features(features) => self.features.add(&features),
            Change::Trim { stream, below } => {
                let trimmed = self.trimmed.entry(stream).or_default();
                *trimmed = below.max(*trimmed);
            }
            Change::Decision { id, words } => drop(self.decisions.insert(id, (time, writer, words))),
        }
        self.newest = self.newest.max(time);
        self.heads.push((hash, self.newest));
    }

    /// A run tells of the groups that its record registers. It is not needed any longer than they are; losing one that
    /// tells of more would only mean that some chunks are stored again.
    fn add_run(&mut self, entry: RunEntry, groups: &[GroupId]) {
        let number = self.runs.len();
        let mut told = 0;
        for group in groups {
            if self.places(group).is_empty() {
                continue;
            }
            if let Entry::Vacant(new) = self.told_by.entry(*group) {
                new.insert(number);
                told += 1;
            }
        }
        self.runs.push(RunState { entry, groups: told, freed: false });
    }

    fn set_writer(&mut self, writer: WriterEntry) {
        self.writers.insert(writer.key.writer_id(), writer);
    }

    /// `by` is `None` when a collector says so.
    fn add_pack(&mut self, entry: PackEntry, writer: &WriterId, by: Option<WriterId>, since: Time) {
        // A name that is known stays what it is: condemned packs do not come back under their old name.
        if self.packs.contains_key(&entry.id) {
            return;
        }
        for group in &entry.groups {
            let first =
                || GroupState { digest: group.digest, writer: *writer, contested: false, places: Vec::new() };
            let known = self.groups.entry(group.id).or_insert_with(first);
            // Another group under a known id is nobody's.
            if known.digest == group.digest {
                known.contested |= by.is_some() && known.writer != *writer;
                known.places.push(Location { pack: entry.id, segments: group.segments.clone(), by });
            }
        }
        self.packs.insert(entry.id, PackState { entry, status: PackStatus::Live, by, since });
    }

    /// A pack may be condemned before any commit named it: then no commit can any more.
    fn condemn(&mut self, id: &PackId, time: Time) {
        let entry = || PackEntry {
            id: *id,
            length: 0,
            footer_hash: [0; 32],
            retain_until: Time(0),
            groups: Vec::new(),
        };
        let nameless = || PackState { entry: entry(), status: PackStatus::Live, by: None, since: time };
        let pack = self.packs.entry(*id).or_insert_with(nameless);
        if pack.status == PackStatus::Live {
            pack.status = PackStatus::Condemned(time);
        }
    }

    fn delete(&mut self, id: &PackId) {
        let Some(pack) = self.packs.get_mut(id) else { return };
        // Only what was condemned before may go, whatever a record says.
        if matches!(pack.status, PackStatus::Condemned(_)) {
            pack.status = PackStatus::Deleted;
            for GroupEntry { id: group, .. } in &pack.entry.groups {
                let Some(known) = self.groups.get_mut(group) else { continue };
                known.places.retain(|place| place.pack != *id);
                let last = known.places.is_empty();
                if let Some(run) =
                    self.told_by.get(group).filter(|_| last).and_then(|run| self.runs.get_mut(*run))
                {
                    self.told_by.remove(group);
                    run.groups -= 1;
                    run.freed = run.groups == 0;
                }
            }
        }
    }
}

impl PointState {
    /// Adds and takes away what was tagged after the point was made. Tags that the holder of `ring` cannot read do
    /// not count.
    pub(crate) fn apply_tags(&self, ring: &KeyRing, tags: &mut Vec<String>) {
        for (_, note) in &self.notes {
            match note {
                StoredNote::Tag(tag) => {
                    let tag = tag.open(ring).ok().filter(|tag| !tags.contains(tag));
                    tags.extend(tag);
                }
                StoredNote::Untag(tag) => {
                    let tag = tag.open(ring).ok();
                    tags.retain(|known| tag.as_ref() != Some(known));
                }
                _ => {}
            }
        }
    }

    /// Holds that were not released, and when they were placed.
    pub(crate) fn holds(&self) -> Vec<StoredHold<'_>> {
        let mut holds: Vec<StoredHold<'_>> = Vec::new();
        for (placed, note) in &self.notes {
            match note {
                StoredNote::Hold { id, reason, until } => {
                    holds.push(StoredHold { id: *id, reason, until: *until, placed: *placed });
                }
                StoredNote::Release(released) => holds.retain(|hold| hold.id != *released),
                _ => {}
            }
        }
        holds
    }
}

/// A hold as the log has it.
pub(crate) struct StoredHold<'a> {
    pub(crate) id: Id16,
    reason: &'a SealedText,
    pub(crate) until: Option<Time>,
    placed: Time,
}

impl StoredHold<'_> {
    pub(crate) fn open(&self, ring: &KeyRing) -> Hold {
        let reason = self.reason.open(ring).unwrap_or_else(|_| "a reason that this key cannot read".into());
        Hold { id: self.id, reason, until: self.until, placed: self.placed }
    }
}
