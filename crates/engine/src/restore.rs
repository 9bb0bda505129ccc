//! Putting items of a recovery point back: plan, look at the plan, carry it out, take it back.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{
    Captured, Clock, Code, Error, Event, ItemPath, Kind, Metadata, Next, Phase, PointId, Progress, Receipt,
    Result, Skip, SkipReason, Source,
};
use mainstay_repository::{PointInfo, Repository};
use mainstay_workloads::files::{
    self, Action, Change, Changes, Existing as _, FilesPlan, FilesTarget, LeftOut, OwnerRule, PathSet, Place,
    RestoreMode, RestoreRules, Restored, Trace,
};

use crate::copy::copy;
use crate::view::{PointView, not_found};
use crate::{mirror, undo};

/// Where items go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placing {
    /// Where they were.
    Original,
    /// Below a directory, under their full paths.
    Below(PathBuf),
    /// What is in the one selected directory, or the one selected file, directly in a directory.
    Stripped(PathBuf),
}

/// What to restore, where to, and what may happen to that which is there.
#[derive(Clone, Debug)]
pub struct RestoreRequest {
    /// Everything when empty.
    pub selection: Vec<ItemPath>,
    pub placing: Placing,
    pub mode: RestoreMode,
    pub owners: OwnerRule,
    /// Never deleted by a mirror: the repository, the keys, what is remembered between runs.
    pub keep: Vec<PathBuf>,
}

/// What a restore would do. Made by [`plan_restore`] and [`undo::plan_undo`], carried out by [`restore`].
#[derive(Clone)]
pub struct RestorePlan {
    pub point: PointInfo,
    /// The directory that all paths of the plan lie below.
    pub root: PathBuf,
    /// What happens, in the order of the paths; paths that stay as they are only in the totals.
    pub changes: Vec<Change>,
    pub totals: Changes,
    /// Content bytes to write.
    pub bytes: u64,
    /// Content bytes of all items, those that stay as they are included.
    pub(crate) all_bytes: u64,
    /// What the point cannot yield, damaged parts of its tree above all. A mirror deletes nothing there.
    pub lost: Vec<Skip>,
    pub(crate) mode: RestoreMode,
    pub(crate) owners: OwnerRule,
    pub(crate) view: View,
    pub(crate) rules: RestoreRules,
    /// Deleted before anything is written.
    pub(crate) removals: Vec<ItemPath>,
}

/// What [`restore`] did.
#[derive(Debug)]
pub struct Outcome {
    pub restored: Restored,
    /// Takes it back.
    pub undo_point: Option<PointId>,
}

/// Which items of a point are meant, and under which paths.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) selection: BTreeSet<ItemPath>,
    /// Selected by themselves: what is below them is not, unless it is selected too.
    pub(crate) alone: BTreeSet<ItemPath>,
    /// Links that led to what is selected: where a directory stands instead, it stays.
    pub(crate) links: BTreeSet<ItemPath>,
    /// What is taken off the front of every path.
    pub(crate) strip: ItemPath,
    /// The top of the target is a place of its own, whose owner and mode are not the point's to change.
    pub(crate) keep_top: bool,
}

impl RestorePlan {
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Whether a way back is worth a point: something changes in a place that was there before.
    pub fn wants_undo(&self) -> bool {
        self.mode != RestoreMode::New && self.changes.iter().any(|change| acts(&change))
    }

    /// Whether anything that exists is overwritten, altered or deleted.
    pub fn touches_existing(&self) -> bool {
        self.changes.iter().filter(acts).any(|change| change.action != Action::Create)
    }
}

/// Compares the selected items with what is there.
///
/// Errors: [`Code::NotFound`] for a selected path that the point does not have, [`Code::AlreadyExists`] when
/// [`RestoreMode::New`] finds something in the directory, [`Code::Refused`] for a mirror of a point that does not
/// tell what it left out, [`Code::Cancelled`].
pub fn plan_restore(
    reader: &dyn PointView,
    request: &RestoreRequest,
    progress: &dyn Progress,
) -> Result<RestorePlan> {
    let RestoreRequest { selection, placing, mode, owners, keep } = request;
    let left_out = mirror::left_out(reader.info());
    let (mut selection, links) = selected(reader, selection, left_out.as_ref())?;
    let root = match placing {
        Placing::Original => PathBuf::from("/"),
        Placing::Below(directory) | Placing::Stripped(directory) => real(directory),
    };
    if *mode == RestoreMode::New && !is_empty(&root)? {
        let what = format!("{} is not empty", root.display());
        return Err(Error::new(Code::AlreadyExists, what).hint(
            "choose another directory, or say what may happen to what is there: --mode add, overwrite or mirror; \
             a restore that was stopped goes on with --mode overwrite",
        ));
    }
    let (strip, keep_top) = match placing {
        Placing::Stripped(_) => front(reader, &selection)?,
        Placing::Original | Placing::Below(_) => (ItemPath::root(), true),
    };
    let mirrored = selection.clone();
    if !matches!(placing, Placing::Stripped(_)) {
        selection.extend(links.iter().cloned());
    }
    let (selection, alone) = (selection.into_iter().collect(), BTreeSet::new());
    let view = View { selection, alone, links, strip, keep_top };
    let rules = match mode {
        RestoreMode::Mirror => mirror::rules(reader, &view, &root, &mirrored, left_out, keep)?,
        mode => RestoreRules { mode: *mode, ..RestoreRules::default() },
    };
    let (mode, owners) = (*mode, *owners);
    let plan = RestorePlan {
        point: reader.info().clone(),
        root,
        changes: Vec::new(),
        totals: Changes::default(),
        bytes: 0,
        all_bytes: 0,
        lost: Vec::new(),
        mode,
        owners,
        view,
        rules,
        removals: Vec::new(),
    };
    plan.compare(reader, progress)
}

impl RestorePlan {
    /// Fills in the changes.
    pub(crate) fn compare(mut self, reader: &dyn PointView, progress: &dyn Progress) -> Result<Self> {
        progress.event(&Event::Phase(Phase::Scanning));
        let mut place = Place::open(&self.root, self.owners)?;
        let mut source = Placed::new(reader, &self)?;
        let mut lost: Vec<Skip> = Vec::new();
        let mut changes = Vec::new();
        for path in &self.removals {
            progress.check()?;
            if let Some(existing) = place.look(path)? {
                let found = Some(Trace::of(&existing));
                changes.push(Change { path: path.clone(), action: Action::Delete, bytes: 0, found });
            }
        }
        let all_bytes = &mut self.all_bytes;
        let items = std::iter::from_fn(|| {
            let item = progress.check().and_then(|()| source.next_metadata(&mut lost));
            item.inspect(|item| *all_bytes += item.as_ref().map_or(0, |(_, metadata)| metadata.size))
                .transpose()
        });
        let mut place = Without { place, removed: self.removals.iter().cloned().collect() };
        let mut found = files::diff(&mut place, items, &self.rules)?;
        let kept: PathSet = lost.iter().map(|lost| lost.path.clone()).collect();
        found.retain(|change| change.action != Action::Delete || !kept.touches(&change.path));
        self.rules.keep.extend(lost.iter().map(|lost| lost.path.clone()));
        changes.append(&mut found);
        for change in &changes {
            let total = match change.action {
                Action::Create => &mut self.totals.created,
                Action::Replace => &mut self.totals.replaced,
                Action::Metadata => &mut self.totals.metadata,
                Action::Delete => &mut self.totals.deleted,
                Action::Same => &mut self.totals.same,
                Action::Blocked => &mut self.totals.blocked,
            };
            *total += 1;
            self.bytes += change.bytes;
        }
        changes.retain(|change| change.action != Action::Same);
        let planned: HashMap<ItemPath, Trace> = changes
            .iter()
            .filter(acts)
            .filter_map(|change| Some((change.path.clone(), change.found?)))
            .collect();
        self.rules.planned = Some(Arc::new(planned));
        self.changes = changes;
        self.lost = lost;
        Ok(self)
    }
}

/// Whether anything is done, and not only said.
pub(crate) fn acts(change: &&Change) -> bool {
    !matches!(change.action, Action::Same | Action::Blocked)
}

/// A place as it is going to be once some things are removed.
struct Without {
    place: Place,
    removed: PathSet,
}

impl files::Existing for Without {
    fn look(&mut self, path: &ItemPath) -> Result<Option<Metadata>> {
        if self.removed.covers(path) { Ok(None) } else { self.place.look(path) }
    }

    fn names(&mut self, directory: &ItemPath) -> Result<Vec<Vec<u8>>> {
        let mut names = self.place.names(directory)?;
        names.retain(|name| !directory.join(name).is_ok_and(|path| self.removed.covers(&path)));
        Ok(names)
    }

    fn owner(&self, metadata: &Metadata) -> Option<(u32, u32)> {
        self.place.owner(metadata)
    }
}

/// Carries a plan out. When `host` is given, an undo point is taken before anything existing is touched.
///
/// Items that cannot be restored are skipped and listed; damaged ones are counted, and so are damaged parts of the tree.
/// Errors: those that would meet every item.
pub fn restore(
    repository: &Repository,
    reader: &dyn PointView,
    plan: &RestorePlan,
    host: Option<&str>,
    clock: &Arc<dyn Clock>,
    progress: &Arc<dyn Progress>,
) -> Result<Outcome> {
    let undo_point = match host.filter(|_| plan.wants_undo()) {
        Some(host) => {
            let taken = undo::take(repository, plan, host, clock, progress);
            let hint = "nothing was restored; --no-undo restores without a way back";
            Some(taken.map_err(|error| error.during("cannot take the undo point").hint(hint))?)
        }
        None => None,
    };
    progress.event(&Event::Phase(Phase::Copying));
    let items = plan.totals.created + plan.totals.replaced + plan.totals.metadata + plan.totals.same;
    progress.event(&Event::Expect { items, bytes: plan.all_bytes, complete: true });
    let unremoved = remove(plan, progress.as_ref())?;
    let source = Placed::new(reader, plan)?;
    let target = FilesTarget::new(FilesPlan {
        root: plan.root.clone(),
        rules: plan.rules.clone(),
        owners: plan.owners,
        writers: None,
        progress: Some(Arc::clone(progress)),
    })?;
    let mut restored = copy(Box::new(source), Box::new(target), &WithoutSkips(progress.as_ref()))?;
    restored.changes.deleted += u64::try_from(plan.removals.len() - unremoved.len()).unwrap_or_default();
    restored.counts.skipped += u64::try_from(unremoved.len()).unwrap_or_default();
    restored.skips.extend(unremoved);
    Ok(Outcome { restored, undo_point })
}

/// Hears how a restore goes. What is skipped is told at the end, all of it.
struct WithoutSkips<'a>(&'a dyn Progress);

impl Progress for WithoutSkips<'_> {
    fn event(&self, event: &Event<'_>) {
        if !matches!(event, Event::Skipped(_)) {
            self.0.event(event);
        }
    }

    fn cancelled(&self) -> bool {
        self.0.cancelled()
    }
}

fn remove(plan: &RestorePlan, progress: &dyn Progress) -> Result<Vec<Skip>> {
    let mut place = Place::open(&plan.root, plan.owners)?;
    let mut failed = Vec::new();
    for path in &plan.removals {
        progress.check()?;
        let detail = match place.look(path)? {
            Some(existing) if !plan.rules.is_planned(path, &existing) => {
                "it has changed since the plan was made".to_owned()
            }
            _ => match place.remove(path) {
                Ok(_there) => continue,
                Err(error) => error.chain().join(": "),
            },
        };
        failed.push(Skip { path: path.clone(), reason: SkipReason::Unwritable, detail });
    }
    Ok(failed)
}

/// `None` when the point is damaged there.
pub(crate) fn unless_damaged<T>(outcome: Result<T>) -> Result<Option<T>> {
    match outcome {
        Err(error) if error.code() == Code::Integrity => Ok(None),
        other => other.map(Some),
    }
}

fn check_selected(reader: &dyn PointView, path: &ItemPath) -> Result<()> {
    // What may lie in a damaged part of the tree is asked for all the same, and then found to be lost.
    if path.is_root() || unless_damaged(reader.lookup(path))?.is_none_or(|found| found.is_some()) {
        return Ok(());
    }
    Err(not_found(reader, path))
}

/// What [`Placing::Stripped`] takes off, the selected directory or the directory of the selected file; and whether
/// the target is a place of its own then, which it is unless it stands for the selected directory.
fn front(reader: &dyn PointView, selection: &[ItemPath]) -> Result<(ItemPath, bool)> {
    let [path] = selection else {
        let what = "the contents of one path can be placed directly in a directory, not of several";
        return Err(Error::new(Code::Usage, what).hint("name exactly one PATH with --strip"));
    };
    let is_directory = path.is_root()
        || match unless_damaged(reader.lookup(path))? {
            Some(entry) => entry.is_some_and(|entry| entry.metadata.kind == Kind::Directory),
            // Only a directory has anything below it.
            None => reader.walk(path)?.flatten().any(|entry| entry.path != *path),
        };
    Ok(if is_directory { (path.clone(), false) } else { (path.parent().unwrap_or_default(), true) })
}

/// The paths to restore, and the links that led to them: what the point was asked to protect when nothing is
/// selected, the whole point when it does not tell. A root may be selected by the name it was protected under.
fn selected(
    reader: &dyn PointView,
    selection: &[ItemPath],
    left_out: Option<&LeftOut>,
) -> Result<(Vec<ItemPath>, BTreeSet<ItemPath>)> {
    let roots = left_out.map(|left| left.roots.as_slice()).unwrap_or_default();
    let links = || left_out.map(|left| left.links.iter().cloned().collect()).unwrap_or_default();
    if selection.is_empty() {
        let all: Vec<ItemPath> = roots.iter().map(|root| root.real.clone()).collect();
        return Ok((if all.is_empty() { vec![ItemPath::root()] } else { all }, links()));
    }
    let mut paths = Vec::new();
    let mut led = BTreeSet::new();
    for path in selection {
        match roots.iter().find(|root| root.named == *path && root.real != *path) {
            Some(root) => {
                paths.push(root.real.clone());
                led = links();
            }
            None => {
                check_selected(reader, path)?;
                paths.push(path.clone());
            }
        }
    }
    Ok((paths, led))
}

/// The directory without symbolic links on the way, as far as it exists.
fn real(directory: &Path) -> PathBuf {
    for ancestor in directory.ancestors() {
        if let (Ok(real), Ok(rest)) = (std::fs::canonicalize(ancestor), directory.strip_prefix(ancestor)) {
            return real.join(rest);
        }
    }
    directory.to_owned()
}

fn is_empty(directory: &Path) -> Result<bool> {
    match std::fs::read_dir(directory) {
        Ok(mut names) => Ok(names.next().is_none()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(Error::io(format!("cannot look into {}", directory.display()), error)),
    }
}

impl View {
    /// The path below the target's root; `None` for what is above all that is placed.
    pub(crate) fn place(&self, path: &ItemPath) -> Option<ItemPath> {
        if !path.is_within(&self.strip) {
            return None;
        }
        let skip = self.strip.as_bytes().len();
        let rest = path.as_bytes().get(skip..).unwrap_or_default();
        ItemPath::new(rest.strip_prefix(b"/").unwrap_or(rest)).ok()
    }

    /// Whether `path` was not asked for itself, only something below it.
    fn is_on_the_way(&self, path: &ItemPath) -> bool {
        let mut up = std::iter::successors(Some(path.clone()), ItemPath::parent);
        !up.any(|above| self.selection.contains(&above) && (above == *path || !self.alone.contains(&above)))
    }
}

/// The selected items of a point under the paths they get. Directories on the way to them are left alone where they
/// exist.
struct Placed {
    inner: Box<dyn Source>,
    view: View,
    root: PathBuf,
    /// The directories on the way, with what has been found out about them.
    on_the_way: BTreeSet<ItemPath>,
}

impl Placed {
    fn new(reader: &dyn PointView, plan: &RestorePlan) -> Result<Self> {
        // A point that holds nothing of the selection itself (an undo that only removes) yields nothing.
        let inner = reader.source(plan.view.selection.iter().cloned().collect())?;
        let mut on_the_way = BTreeSet::new();
        for selected in &plan.view.selection {
            let above = std::iter::successors(selected.parent(), ItemPath::parent);
            on_the_way.extend(above.filter(|path| plan.view.is_on_the_way(path)));
        }
        let (view, root) = (plan.view.clone(), plan.root.clone());
        Ok(Self { inner, view, root, on_the_way })
    }

    fn next_metadata(&mut self, lost: &mut Vec<Skip>) -> Result<Option<(ItemPath, Metadata)>> {
        loop {
            match self.next()? {
                Next::Item(item) => return Ok(Some((item.path, item.metadata))),
                Next::Skipped(skip) => lost.push(skip),
                Next::End => return Ok(None),
            }
        }
    }

    /// Whether the item at `path`, to be placed at `placed`, is left alone.
    fn stays(&self, path: &ItemPath, placed: &ItemPath) -> bool {
        if placed.is_root() {
            return self.view.keep_top;
        }
        let there = || std::fs::symlink_metadata(self.root.join(OsStr::from_bytes(placed.as_bytes())));
        let led = self.view.links.contains(path);
        (led || self.on_the_way.contains(path)) && there().is_ok_and(|there| !led || there.is_dir())
    }
}

impl Source for Placed {
    fn next(&mut self) -> Result<Next> {
        if self.view.selection.is_empty() {
            return Ok(Next::End);
        }
        loop {
            let mut item = match self.inner.next()? {
                Next::Item(item) => item,
                Next::Skipped(mut skip) => {
                    // A directory above all that is placed stands for the whole of it.
                    skip.path = self.view.place(&skip.path).unwrap_or_default();
                    return Ok(Next::Skipped(skip));
                }
                Next::End => return Ok(Next::End),
            };
            let Some(placed) = self.view.place(&item.path) else { continue };
            if self.stays(&item.path, &placed) {
                continue;
            }
            item.path = placed;
            return Ok(Next::Item(item));
        }
    }

    fn seal(&mut self) -> Result<Captured> {
        self.inner.seal()
    }

    fn commit(self: Box<Self>, receipt: &Receipt) -> Result<()> {
        Box::new(self.inner).commit(receipt)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use mainstay_core::ItemPath;

    use super::View;

    fn path(text: &str) -> ItemPath {
        ItemPath::new(text).unwrap()
    }

    #[test]
    fn paths_lose_their_front_and_what_is_above_it_has_no_place() {
        let view = View {
            selection: [path("etc/nginx")].into(),
            alone: BTreeSet::new(),
            links: BTreeSet::new(),
            strip: path("etc/nginx"),
            keep_top: false,
        };
        assert_eq!(view.place(&path("etc/nginx/a/b")), Some(path("a/b")));
        assert_eq!(view.place(&path("etc/nginx")), Some(ItemPath::root()));
        assert_eq!(view.place(&path("etc")), None);
        assert_eq!(view.place(&path("etc/nginx-old")), None);
        assert!(view.is_on_the_way(&path("etc")) && !view.is_on_the_way(&path("etc/nginx/a")));
        let whole = View {
            selection: [ItemPath::root()].into(),
            alone: BTreeSet::new(),
            links: BTreeSet::new(),
            strip: ItemPath::root(),
            keep_top: true,
        };
        assert_eq!(whole.place(&path("etc")), Some(path("etc")));
    }
}
