//! What a restore does to each path: one pure decision, shared by the preview and the execution.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

use mainstay_core::{ItemPath, Kind, Metadata, Result};

use super::left_out::LeftOut;
use super::paths::PathSet;

/// What may happen to that which is there already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RestoreMode {
    /// Nothing is there: the target must be empty or absent.
    #[default]
    New,
    /// What exists stays as it is; what is missing is added.
    Add,
    /// What differs in type, size, time, target or device is replaced; other metadata is put right; the rest stays.
    Overwrite,
    /// As [`RestoreMode::Overwrite`], and what the point does not hold is deleted inside the selected paths.
    Mirror,
}

/// What is done about one path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    Create,
    Replace,
    /// The content is right; owner, mode, times or attributes are not.
    Metadata,
    Delete,
    /// Nothing: it is as it should be, or must be kept.
    Same,
    /// Nothing, and the item is skipped: a directory stands there that holds something, or for a mirror something
    /// that must be kept.
    Blocked,
}

/// One line of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub path: ItemPath,
    pub action: Action,
    /// Content bytes that will be written; for [`Action::Delete`] 0.
    pub bytes: u64,
    /// What stood there; `None` when nothing did.
    pub found: Option<Trace>,
}

/// By what something that exists is known again later, unless it has changed: a hash of all but its content and its
/// number of names, which a restore changes where it replaces another name of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trace(u64);

impl Trace {
    pub fn of(metadata: &Metadata) -> Self {
        let Metadata { kind, size, mode, uid, gid, modified, link_target, device, xattrs, .. } = metadata;
        let mut hasher = DefaultHasher::new();
        (kind, size, mode, uid, gid, modified, link_target, device, xattrs).hash(&mut hasher);
        Self(hasher.finish())
    }
}

/// The rules of one restore.
#[derive(Clone, Debug, Default)]
pub struct RestoreRules {
    pub mode: RestoreMode,
    /// [`RestoreMode::Mirror`] deletes only inside these, so with none it deletes nothing. Not derived from the
    /// items: the ancestors of what was protected are items too, and what lies beside it was never captured.
    pub selected: Vec<ItemPath>,
    /// Never deleted, nor what is below them: paths that the point knows it could not capture.
    pub keep: PathSet,
    /// What the point left out on purpose; a mirror keeps it.
    pub left_out: Option<Arc<LeftOut>>,
    /// What was taken off the front of every path.
    pub front: ItemPath,
    /// What existed and was to change when the plan was made: nothing else that exists is touched, and what has
    /// changed since is not either. Everything may be when there was no plan.
    pub planned: Option<Arc<HashMap<ItemPath, Trace>>>,
}

/// The metadata to restore and the numbers of the owner on this machine; no owner means that it is left alone.
pub(super) struct Wanted<'a> {
    pub(super) metadata: &'a Metadata,
    pub(super) owner: Option<(u32, u32)>,
}

/// What is known of the place that is restored into.
pub trait Existing {
    /// The metadata of what stands at `path`; `None` when there is nothing, or no directory that could hold it.
    fn look(&mut self, path: &ItemPath) -> Result<Option<Metadata>>;

    /// The names in a directory.
    fn names(&mut self, directory: &ItemPath) -> Result<Vec<Vec<u8>>>;

    /// The owner that an item gets on this machine.
    fn owner(&self, metadata: &Metadata) -> Option<(u32, u32)>;
}

impl RestoreRules {
    /// Whether a mirror looks for things to delete directly in `directory`.
    pub(super) fn mirrors(&self, directory: &ItemPath) -> bool {
        self.mode == RestoreMode::Mirror
            && self.selected.iter().any(|path| directory.is_within(path))
            && !self.keep.covers(directory)
    }

    /// Whether a mirror deletes `path`, which the point does not hold and whose directory it mirrors.
    pub(super) fn deletes(&self, path: &ItemPath) -> bool {
        !self.keep.touches(path)
            && !self.left_out.as_ref().is_some_and(|left| left.keeps(&self.original(path)))
    }

    /// Whether a directory of which the point holds `seen` was captured without what is in it.
    pub(super) fn is_cache(&self, seen: &HashSet<Vec<u8>>) -> bool {
        self.left_out.as_ref().is_some_and(|left| left.is_cache(|tag| seen.contains(tag)))
    }

    /// Whether what exists at `path` was to change when the plan was made, and is still what it was then.
    pub fn is_planned(&self, path: &ItemPath, existing: &Metadata) -> bool {
        let Some(planned) = &self.planned else { return true };
        // Outside a mirror only an empty directory is ever replaced, and undoing a restore is what empties it.
        let any_time = existing.kind == Kind::Directory && self.mode != RestoreMode::Mirror;
        planned.get(path).is_some_and(|found| any_time || *found == Trace::of(existing))
    }

    /// The path as the point has it.
    fn original(&self, path: &ItemPath) -> ItemPath {
        path.components().try_fold(self.front.clone(), |at, name| at.join(name)).unwrap_or_default()
    }
}

/// The decision for one path. Pure.
pub(super) fn decide(mode: RestoreMode, existing: Option<&Metadata>, wanted: &Wanted<'_>) -> Action {
    let Some(existing) = existing else { return Action::Create };
    match mode {
        // Nothing can be there; should something be, creating fails and says so.
        RestoreMode::New => Action::Create,
        RestoreMode::Add => Action::Same,
        RestoreMode::Overwrite | RestoreMode::Mirror => {
            if content_differs(existing, wanted.metadata) {
                Action::Replace
            } else if !metadata_differs(existing, wanted) {
                Action::Same
            } else if existing.hard_link.is_some() {
                // The inode may have another name outside the target, and must not change there.
                Action::Replace
            } else {
                Action::Metadata
            }
        }
    }
}

fn content_differs(existing: &Metadata, wanted: &Metadata) -> bool {
    existing.kind != wanted.kind
        || existing.link_target != wanted.link_target
        || existing.device != wanted.device
        || (wanted.kind == Kind::File
            && (existing.size != wanted.size || existing.modified != wanted.modified))
}

fn metadata_differs(existing: &Metadata, wanted: &Wanted<'_>) -> bool {
    let metadata = wanted.metadata;
    existing.modified != metadata.modified
        || (metadata.kind != Kind::Symlink && existing.mode != metadata.mode)
        || wanted.owner.is_some_and(|owner| owner != (existing.uid, existing.gid))
        || xattr_changes(existing, metadata).next().is_some()
}

/// An attribute to set, or with no value one to remove.
pub(super) type XattrChange<'a> = (&'a [u8], Option<&'a [u8]>);

/// What makes the attributes of `existing` those of `wanted`. Labels that a security module gives to everything
/// are set when the point has them, and never removed.
pub(super) fn xattr_changes<'a>(
    existing: &'a Metadata,
    wanted: &'a Metadata,
) -> impl Iterator<Item = XattrChange<'a>> {
    let removed = existing.xattrs.iter().filter_map(|(name, _)| {
        let label = name.starts_with(b"security.") && name != b"security.capability";
        let gone = !label && !wanted.xattrs.iter().any(|(other, _)| other == name);
        gone.then_some((name.as_slice(), None))
    });
    let set = wanted
        .xattrs
        .iter()
        .filter(|pair| !existing.xattrs.contains(pair))
        .map(|(name, value)| (name.as_slice(), Some(value.as_slice())));
    removed.chain(set)
}

/// The whole plan of a restore: what [`super::FilesTarget`] would do with these items, which come in order.
/// Deleted directories are one line, without what is in them.
pub fn diff(
    existing: &mut dyn Existing,
    items: impl IntoIterator<Item = Result<(ItemPath, Metadata)>>,
    rules: &RestoreRules,
) -> Result<Vec<Change>> {
    let mut plan = Plan { existing, rules, changes: Vec::new(), open: Vec::new() };
    if rules.mirrors(&ItemPath::root()) {
        plan.open.push((ItemPath::root(), HashSet::new()));
    }
    for item in items {
        let (path, metadata) = item?;
        plan.item(path, &metadata)?;
    }
    while let Some(directory) = plan.open.pop() {
        plan.close(directory)?;
    }
    Ok(plan.changes)
}

struct Plan<'a> {
    existing: &'a mut dyn Existing,
    rules: &'a RestoreRules,
    changes: Vec<Change>,
    /// The mirrored directories that the present item lies in, with what the point holds in each.
    open: Vec<(ItemPath, HashSet<Vec<u8>>)>,
}

impl Plan<'_> {
    fn item(&mut self, path: ItemPath, metadata: &Metadata) -> Result<()> {
        while let Some(directory) = self.open.pop_if(|(directory, _)| !path.is_within(directory)) {
            self.close(directory)?;
        }
        if let Some((directory, seen)) = self.open.last_mut()
            && path.parent().as_ref() == Some(directory)
        {
            seen.insert(path.name().to_vec());
        }
        let existing = self.existing.look(&path)?;
        let wanted = Wanted { metadata, owner: self.existing.owner(metadata) };
        let mut action = decide(self.rules.mode, existing.as_ref(), &wanted);
        let replaces = action == Action::Replace && metadata.kind != Kind::Directory;
        if replaces && existing.as_ref().is_some_and(|existing| existing.kind == Kind::Directory) {
            let free = match self.rules.mode {
                RestoreMode::Mirror => self.rules.mirrors(&path) && self.rules.deletes(&path),
                _ => self.existing.names(&path)?.is_empty(),
            };
            action = if free { action } else { Action::Blocked };
        }
        let writes = matches!(action, Action::Create | Action::Replace);
        if metadata.kind == Kind::Directory && !path.is_root() && self.rules.mirrors(&path) {
            self.open.push((path.clone(), HashSet::new()));
        }
        let bytes = if writes { metadata.size } else { 0 };
        self.changes.push(Change { path, action, bytes, found: existing.as_ref().map(Trace::of) });
        Ok(())
    }

    fn close(&mut self, (directory, seen): (ItemPath, HashSet<Vec<u8>>)) -> Result<()> {
        let existing = self.existing.look(&directory)?;
        if existing.is_none_or(|metadata| metadata.kind != Kind::Directory) || self.rules.is_cache(&seen) {
            return Ok(());
        }
        let mut names = self.existing.names(&directory)?;
        names.sort_unstable();
        for name in names.iter().filter(|name| !seen.contains(*name)) {
            let Ok(path) = directory.join(name) else { continue };
            if self.rules.deletes(&path) {
                let found = self.existing.look(&path)?.as_ref().map(Trace::of);
                self.changes.push(Change { path, action: Action::Delete, bytes: 0, found });
            }
        }
        Ok(())
    }
}
