//! Checks stored bytes: that they are there, that they are what was written, and that points and what they
//! reach agree. Goes on past damage and names it as items × points.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use mainstay_core::{Code, Counts, Error, Event, ItemPath, Phase, PointId, Progress, Result};

use crate::fetch::{MetaPages, StructurePages};
use crate::format::item::{Recipe, StoredItem, path_of_key};
use crate::format::pack::{
    BlockKind, Footer, HEADER_BYTES, PackId, TRAILER_BYTES, TRAILERS_BYTES, Trailer, block_digest,
    check_header,
};
use crate::format::page::{Page, PageKind, PageRef, Visit, for_each_page, visit_pages};
use crate::format::run::Run;
use crate::format::segment::{Class, GroupId};
use crate::log::record::PackEntry;
use crate::log::state::{PackStatus, PointState};
use crate::mend::Damage;
use crate::names;
use crate::points::Loaded;
use crate::ranges::Ranges;
use crate::read::Lost;
use crate::read::recipe::{Runs, check_run};
use crate::repository::Repository;

/// What is checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyScope {
    /// Only these points and what they reach; every live point and pack when empty.
    pub points: Vec<PointId>,
    /// Reads every stored byte, and with the power to read opens every segment and checks every chunk.
    pub read_data: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    pub points: u64,
    pub packs: u64,
    pub bytes_read: u64,
    pub chunks: u64,
    /// What is wrong, for people.
    pub problems: Vec<String>,
    /// Damage that a second copy makes good: nothing is lost, but nothing more may happen.
    pub degraded: Vec<String>,
    /// Items that cannot be restored whole, with the points they are in.
    pub lost: BTreeMap<ItemPath, BTreeSet<PointId>>,
    /// Points in which nothing is wrong.
    pub sound: Vec<PointId>,
    /// Damaged packs in whose place stands now what is whole of them: what [`Repository::set_aside`] said.
    pub rewritten: u64,
    /// For [`Repository::set_aside`].
    pub(crate) damage: Damage,
}

impl VerifyReport {
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }

    /// What is wrong with a pack that loses nothing by it, and should be written anew.
    fn mendable(&mut self, pack: &PackId, what: &str) {
        self.degraded.push(format!("pack {pack}: {what}"));
        self.damage.packs.insert(*pack);
    }
}

/// Named one by one up to this many.
const LOST_MAX: usize = 100_000;
/// Packs are read in pieces of this size.
const READ_BYTES: u64 = 4 << 20;

/// Segments, by group.
pub(crate) type Reached = BTreeMap<GroupId, Ranges>;

#[derive(Default)]
struct Findings {
    report: VerifyReport,
    /// Segments that cannot be had, and groups whose directory cannot.
    bad: Reached,
    damaged_points: BTreeSet<PointId>,
}

impl Findings {
    fn problem(&mut self, what: String) {
        if self.report.problems.last() != Some(&what) {
            self.report.problems.push(what);
        }
    }

    fn error(&mut self, what: &str, error: &Error) {
        self.problem(format!("{what}: {}", error.chain().join(": ")));
    }

    fn lose(&mut self, path: &ItemPath, point: PointId) {
        self.damaged_points.insert(point);
        if self.report.lost.len() < LOST_MAX {
            self.report.lost.entry(path.clone()).or_default().insert(point);
        }
    }

    fn is_bad(&self, group: &GroupId, first: u32, last: u32) -> bool {
        self.bad.get(group).is_some_and(|bad| (first..=last).any(|segment| bad.contains(segment)))
    }
}

fn reach(reached: &mut Reached, group: &GroupId, first: u32, last: u32) {
    reached.entry(*group).or_default().insert(first..last.saturating_add(1));
}

impl Repository {
    /// Errors only when checking is impossible; damage is in the report.
    pub fn verify(&self, scope: &VerifyScope, progress: &dyn Progress) -> Result<VerifyReport> {
        progress.event(&Event::Phase(Phase::Verifying));
        self.refresh_past_gaps()?;
        let mut findings = Findings::default();
        self.verify_log(&mut findings);
        if scope.points.is_empty() {
            self.verify_copies(&mut findings.report)?;
            self.verify_journals(scope.read_data, &mut findings.report, progress)?;
        }
        let state = self.shared.state().clone();
        let chosen = |point: &&&PointState| scope.points.is_empty() || scope.points.contains(&point.entry.id);
        let live = state.live_points();
        let points: Vec<_> = live.iter().filter(chosen).map(|point| point.entry.id).collect();
        let reached = self.verify_references(&points, &mut findings, progress)?;
        self.verify_packs(scope, &reached, &mut findings, progress)?;
        if scope.read_data && self.shared.ring.content_secret().is_ok() {
            self.verify_chunks(&reached, &mut findings, progress)?;
        }
        for point in &points {
            progress.check()?;
            self.verify_point(point, reached.get(point), &mut findings);
            findings.report.points += 1;
        }
        let Findings { mut report, damaged_points, .. } = findings;
        report.sound = points.into_iter().filter(|point| !damaged_points.contains(point)).collect();
        Ok(report)
    }

    fn verify_log(&self, findings: &mut Findings) {
        let state = self.shared.state();
        for sequence in state.damage() {
            findings.problem(format!(
                "the log is broken before record {sequence}: a record was lost or replaced"
            ));
        }
        for sequence in state.voids() {
            findings.problem(format!("number {sequence} of the log holds no record of anybody's"));
        }
    }

    /// What each point reaches: as its list says or, without the collector's power, as its tree does.
    fn verify_references(
        &self,
        points: &[PointId],
        findings: &mut Findings,
        progress: &dyn Progress,
    ) -> Result<BTreeMap<PointId, Reached>> {
        let mut reached = BTreeMap::new();
        for id in points {
            progress.check()?;
            let loaded = match self.points.load(id) {
                Ok(loaded) => loaded,
                Err(error) => {
                    findings.error(&format!("point {id}"), &error);
                    findings.damaged_points.insert(*id);
                    continue;
                }
            };
            let list = if self.shared.ring.structure_secret().is_ok() {
                self.listed(&loaded)
            } else {
                self.reached_by_tree(&loaded)
            };
            match list {
                Ok(list) => {
                    reached.insert(*id, list);
                }
                Err(error) => {
                    findings.error(&format!("the list of what point {id} reaches"), &error);
                    findings.damaged_points.insert(*id);
                }
            }
        }
        Ok(reached)
    }

    fn listed(&self, point: &Loaded) -> Result<Reached> {
        let mut list = Reached::new();
        let Some(root) = point.header.references else { return Ok(list) };
        let pages = StructurePages(Arc::clone(&self.fetch));
        for_each_page(&pages, PageKind::References, &root, &mut |page_ref, page| {
            reach(&mut list, &page_ref.group, page_ref.segment, page_ref.segment);
            for index in 0..if page.level == 0 { page.len() } else { 0 } {
                let (group, segments) = crate::collect::reference(page, index)?;
                list.entry(group).or_default().extend(&segments);
            }
            Ok(true)
        })?;
        Ok(list)
    }

    fn reached_by_tree(&self, point: &Loaded) -> Result<Reached> {
        let mut reached = Reached::new();
        let Some(body) = &point.body else { return Ok(reached) };
        let pages = MetaPages::new(&self.fetch);
        if let Some(root) = &body.skips {
            for_each_page(&pages, PageKind::Skips, root, &mut |page_ref, _| {
                reach(&mut reached, &page_ref.group, page_ref.segment, page_ref.segment);
                Ok(true)
            })?;
        }
        let Some(root) = &body.items else { return Ok(reached) };
        for_each_page(&pages, PageKind::Items, root, &mut |page_ref, page| {
            reach(&mut reached, &page_ref.group, page_ref.segment, page_ref.segment);
            for index in 0..if page.level == 0 { page.len() } else { 0 } {
                let item = StoredItem::decode(page.value(index), &page.groups)?;
                if let Recipe::Pages { root, .. } = &item.recipe {
                    for_each_page(&pages, PageKind::Recipe, root, &mut |page_ref, _| {
                        reach(&mut reached, &page_ref.group, page_ref.segment, page_ref.segment);
                        Ok(true)
                    })?;
                }
                let mut runs = Runs::of(&pages, &item.recipe)?;
                while let Some(run) = runs.next()? {
                    if let Run::Chunks { group, segment, last_segment, .. } = run {
                        reach(&mut reached, &group, segment, last_segment);
                    }
                }
            }
            Ok(true)
        })?;
        Ok(reached)
    }

    /// Checks that packs are there and, with `read_data`, every block against the digest in the footer. Needs no key.
    fn verify_packs(
        &self,
        scope: &VerifyScope,
        reached: &BTreeMap<PointId, Reached>,
        findings: &mut Findings,
        progress: &dyn Progress,
    ) -> Result<()> {
        let groups: HashSet<_> = reached.values().flat_map(BTreeMap::keys).collect();
        let state = self.shared.state().clone();
        let mut packs: Vec<_> = state.packs().filter(|pack| pack.status == PackStatus::Live).collect();
        packs.retain(|pack| {
            scope.points.is_empty() || pack.entry.groups.iter().any(|group| groups.contains(&group.id))
        });
        packs.sort_by_key(|pack| pack.entry.id);
        let bytes_of = |entry: &PackEntry| if scope.read_data { entry.length } else { 0 };
        let mut done = Counts::default();
        let bytes = packs.iter().map(|pack| bytes_of(&pack.entry)).sum();
        progress.event(&Event::Expect { items: packs.len() as u64, bytes, complete: true });
        for pack in packs {
            progress.check()?;
            let entry = &pack.entry;
            let mut tell = |at: u64| {
                progress.event(&Event::Done(Counts { bytes: done.bytes + at, ..done }));
                progress.check()
            };
            if let Err(error) = self.verify_pack(entry, scope.read_data, findings, &mut tell) {
                if !matches!(error.code(), Code::Integrity | Code::NotFound) {
                    return Err(error);
                }
                findings.error(&format!("pack {}", entry.id), &error);
                findings.report.damage.packs.insert(entry.id);
                for group in &entry.groups {
                    findings.bad.entry(group.id).or_default().extend(&group.segments);
                }
            }
            findings.report.packs += 1;
            done.items += 1;
            done.bytes += bytes_of(entry);
            done.read_bytes = findings.report.bytes_read;
            progress.event(&Event::Done(done));
        }
        self.forgive_copies(findings);
        Ok(())
    }

    /// Checks header, footers and trailers of a pack; the footer.
    fn verify_ends(&self, entry: &PackEntry, findings: &mut Findings) -> Result<Footer> {
        let (id, length, name) = (&entry.id, entry.length, names::pack(&entry.id));
        let store = self.shared.store.as_ref();
        let size = store.size(&name)?;
        if size < length {
            return Err(Error::integrity(format!("it is {size} bytes long and was {length}")));
        }
        let mut degraded = |what: &str| findings.report.degraded.push(format!("pack {id}: {what}"));
        if size > length {
            degraded("bytes follow its end");
        }
        if check_header(&store.get(&name, 0..HEADER_BYTES as u64)?, id).is_err() {
            degraded("its header is damaged; reading does not need it");
        }
        let tail = store.get(&name, length.saturating_sub(TRAILERS_BYTES as u64)..length)?;
        let trailer = Trailer::find(&tail, length, &entry.footer_hash)?;
        if Trailer::decode_both(&tail, length).iter().any(|found| found.as_ref().ok() != Some(&trailer)) {
            degraded("one of its two trailers is damaged");
        }
        let [first, second] = trailer.footers().map(|at| trailer.footer(&store.get(&name, at)?));
        if first.is_ok() != second.is_ok() {
            degraded("one of its two footers is damaged");
        }
        let footer = first.or(second)?;
        if let Some(parity) = &footer.parity {
            let at = parity.covered()..parity.covered() + trailer.footer_length + TRAILER_BYTES as u64;
            let third = store.get(&name, at)?;
            if Trailer::search(&third, length, &entry.footer_hash).is_none_or(|(found, _)| found != trailer) {
                findings.report.mendable(id, "the footer before its parity is damaged");
            }
        }
        Ok(footer)
    }

    /// `tell` hears how far into the pack the check has come, in bytes, and may end it.
    fn verify_pack(
        &self,
        entry: &PackEntry,
        read_data: bool,
        findings: &mut Findings,
        tell: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let (id, length, name) = (&entry.id, entry.length, names::pack(&entry.id));
        let footer = match self.verify_ends(entry, findings) {
            Err(error) if error.code() == Code::Integrity => {
                let footer = self.fetch.footer(id).map_err(|_lost| error)?;
                findings.report.mendable(id, "its end is damaged; the footer before its parity is whole");
                Footer::clone(&footer)
            }
            other => other?,
        };
        if !read_data {
            return Ok(());
        }
        // A pack may have been cut short, and yet be whole for who knows where its footer is.
        let stored = self.shared.store.size(&name)?.min(length);
        let mut window: (u64, Vec<u8>) = (0, Vec::new());
        for block in &footer.blocks {
            let (start, end) = (block.offset, block.offset + u64::from(block.length));
            if start < window.0 || end > window.0 + window.1.len() as u64 {
                let until = (start + READ_BYTES).max(end).min(stored).max(start);
                window = (start, self.shared.store.get(&name, start..until)?);
                findings.report.bytes_read += until - start;
                tell(start)?;
            }
            let from = (start - window.0) as usize;
            let bytes = window.1.get(from..from + block.length as usize).unwrap_or_default();
            if block_digest(bytes) == block.digest {
                continue;
            }
            let Some(group) = footer.groups.get(block.group) else { continue };
            if self.fetch.healed(id)?.is_some() {
                let what = format!("it is damaged between bytes {start} and {end}, and parity makes it good");
                findings.report.mendable(id, &what);
                continue;
            }
            findings.problem(format!("pack {id} is damaged between bytes {start} and {end}"));
            findings.report.damage.packs.insert(*id);
            let bad = findings.bad.entry(group.id).or_default();
            match block.kind {
                BlockKind::Segment => bad.insert(block.ordinal..block.ordinal + 1),
                BlockKind::Directory => bad.insert(0..u32::MAX),
            }
        }
        self.verify_parity(entry, &footer, findings)
    }

    /// Checks the shards of parity themselves.
    fn verify_parity(&self, entry: &PackEntry, footer: &Footer, findings: &mut Findings) -> Result<()> {
        let (id, name, store) = (&entry.id, names::pack(&entry.id), self.shared.store.as_ref());
        let Some(parity) = &footer.parity else { return Ok(()) };
        let tail = store.get(&name, entry.length.saturating_sub(TRAILERS_BYTES as u64)..entry.length);
        // A damaged end was told of already.
        let Ok(trailer) = tail.and_then(|tail| Trailer::find(&tail, entry.length, &entry.footer_hash)) else {
            return Ok(());
        };
        let shards = parity.shards(trailer.footer_offset);
        findings.report.bytes_read += shards.end - shards.start;
        let damaged = parity.damaged_parity(&store.get(&name, shards)?);
        if damaged > 0 {
            findings.report.mendable(id, &format!("{damaged} of its shards of parity are damaged"));
        }
        Ok(())
    }

    /// What is damaged in one pack but whole in another is not lost.
    fn forgive_copies(&self, findings: &mut Findings) {
        let bad = std::mem::take(&mut findings.bad);
        for (group, segments) in bad {
            let copies = self.shared.state().locations(&group).len();
            let mut lost = Ranges::default();
            if copies < 2 {
                lost = segments;
            } else if self.fetch.directory(&group).is_err() {
                lost.insert(0..u32::MAX);
            } else {
                for segment in segments.iter().take_while(|segment| *segment < 1 << 20) {
                    if self.fetch.sealed_segment(&group, segment).is_err() {
                        lost.insert(segment..segment + 1);
                    }
                }
            }
            if !lost.is_empty() {
                findings.bad.insert(group, lost);
            }
        }
    }

    /// Opens every reached segment of content and pages, and checks every chunk against its id.
    fn verify_chunks(
        &self,
        reached: &BTreeMap<PointId, Reached>,
        findings: &mut Findings,
        progress: &dyn Progress,
    ) -> Result<()> {
        let mut all = Reached::new();
        for (group, segments) in reached.values().flatten() {
            all.entry(*group).or_default().extend(segments);
        }
        let mut done = Counts::default();
        let items = all.values().map(Ranges::count).sum();
        progress.event(&Event::Expect { items, bytes: 0, complete: true });
        for (group, segments) in &all {
            for segment in segments.iter() {
                progress.check()?;
                progress.event(&Event::Done(done));
                done.items += 1;
                if findings.is_bad(group, segment, segment) {
                    continue;
                }
                match self.verify_segment(group, segment) {
                    Ok(chunks) => findings.report.chunks += chunks,
                    Err(error) if error.code() == Code::Integrity => {
                        findings.error(&format!("segment {segment} of group {group}"), &error);
                        reach(&mut findings.report.damage.segments, group, segment, segment);
                        findings.bad.entry(*group).or_default().insert(segment..segment + 1);
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    fn verify_segment(&self, group: &GroupId, segment: u32) -> Result<u64> {
        let sealed = self.fetch.sealed_segment(group, segment)?;
        let opened = self.fetch.open_sealed(&sealed, segment)?;
        if sealed.header.class == Class::Structure {
            return Ok(0);
        }
        let directory = self.fetch.directory(group)?;
        let missing = || Error::integrity("the directory does not know this segment");
        let slots = directory.slots_of(segment).ok_or_else(missing)?;
        let mut rest = opened.as_slice();
        for slot in slots.clone() {
            let (id, length) = directory.chunk(slot).ok_or_else(missing)?;
            let Some((chunk, after)) = rest.split_at_checked(*length as usize) else { return Err(missing()) };
            match sealed.header.class {
                Class::Meta => self.fetch.check_page(&id.0, chunk)?,
                _ => self.fetch.check_chunk(id, chunk)?,
            }
            rest = after;
        }
        if rest.is_empty() { Ok(u64::from(slots.end - slots.start)) } else { Err(missing()) }
    }

    /// Walks the tree of a point: every recipe must fit the directories and lie within what the point reaches.
    fn verify_point(&self, id: &PointId, reached: Option<&Reached>, findings: &mut Findings) {
        let Ok(loaded) = self.points.load(id) else { return };
        let Some(items) = loaded.body.as_ref().and_then(|body| body.items) else { return };
        let mut walk =
            PointWalk { repository: self, reached, findings, lost: Vec::new(), damage: Vec::new() };
        if let Err(error) = walk.items(&items) {
            walk.damage.push(error);
        }
        let PointWalk { lost, damage, .. } = walk;
        for error in damage {
            findings.error(&format!("point {id}"), &error);
            findings.damaged_points.insert(*id);
        }
        lost.iter().for_each(|path| findings.lose(path, *id));
    }
}

struct PointWalk<'a> {
    repository: &'a Repository,
    reached: Option<&'a Reached>,
    findings: &'a Findings,
    /// Items that cannot be restored whole, and directories of which a part is lost.
    lost: Vec<ItemPath>,
    /// What is wrong with the tree itself.
    damage: Vec<Error>,
}

impl PointWalk<'_> {
    fn items(&mut self, root: &PageRef) -> Result<()> {
        let pages = MetaPages::new(&self.repository.fetch);
        visit_pages(&pages, PageKind::Items, root, &mut |visit| {
            match visit {
                Visit::Page(page_ref, page) => self.page(page_ref, page)?,
                Visit::Lost(_, error) if error.code() != Code::Integrity => return Err(error),
                Visit::Lost(span, error) => {
                    let Lost { directory, words } = Lost::of(&span);
                    self.lost.push(directory);
                    self.damage.push(error.during(words));
                }
            }
            Ok(true)
        })
    }

    fn page(&mut self, page_ref: &PageRef, page: &Page) -> Result<()> {
        if let Err(error) = self.check_reached(&page_ref.group, page_ref.segment, page_ref.segment) {
            self.damage.push(error);
        }
        for index in 0..if page.level == 0 { page.len() } else { 0 } {
            let item = StoredItem::decode(page.value(index), &page.groups);
            match item.and_then(|item| self.recipe(&item.recipe)) {
                Ok(true) => {}
                Err(error) if error.code() != Code::Integrity => return Err(error),
                Ok(false) | Err(_) => match path_of_key(page.key(index)) {
                    Ok(path) => self.lost.push(path),
                    Err(error) => self.damage.push(error),
                },
            }
        }
        Ok(())
    }

    /// Whether everything that the recipe names is there.
    fn recipe(&self, recipe: &Recipe) -> Result<bool> {
        match recipe {
            Recipe::None => Ok(true),
            Recipe::Inline(runs) => runs.iter().try_fold(true, |whole, run| Ok(whole & self.run(run)?)),
            Recipe::Pages { root, .. } => {
                let pages = MetaPages::new(&self.repository.fetch);
                let mut whole = true;
                for_each_page(&pages, PageKind::Recipe, root, &mut |page_ref, page: &Page| {
                    self.check_reached(&page_ref.group, page_ref.segment, page_ref.segment)?;
                    for index in 0..if page.level == 0 { page.len() } else { 0 } {
                        whole &= self.run(&Run::decode(&mut page.value(index), &page.groups)?)?;
                    }
                    Ok(true)
                })?;
                Ok(whole)
            }
        }
    }

    fn run(&self, run: &Run) -> Result<bool> {
        let Run::Chunks { group, first, count, segment, last_segment, digest, .. } = run else {
            return Ok(true);
        };
        self.check_reached(group, *segment, *last_segment)?;
        if self.findings.is_bad(group, *segment, *last_segment) {
            return Ok(false);
        }
        let directory = self.repository.fetch.directory(group)?;
        check_run(&directory, group, *first, *count, digest)?;
        let spans = (directory.ordinal_of(*first), directory.ordinal_of(first + count - 1));
        Ok(spans == (*segment, *last_segment))
    }

    /// What a tree names and its list does not would be collected.
    fn check_reached(&self, group: &GroupId, first: u32, last: u32) -> Result<()> {
        let Some(reached) = self.reached else { return Ok(()) };
        let listed =
            reached.get(group).is_some_and(|listed| (first..=last).all(|segment| listed.contains(segment)));
        if listed {
            Ok(())
        } else {
            Err(Error::integrity(format!("the point does not list what it needs of group {group}")))
        }
    }
}
