//! Looking for a name in all points: each state of each item once, with the points between which it stayed so. In points
//! of machines the files on their disks are looked through.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use globset::{GlobBuilder, GlobMatcher};
use mainstay_core::{Code, Counts, Error, Event, ItemPath, Phase, Progress, Result, WorkloadId};
use mainstay_repository::{ChangeKind, PointInfo, PointReader, Repository, diff};

use crate::undo::is_undo;
use crate::view::{PointView as _, Seen};
use crate::vm::{self, Inside, MachineView};

/// What to look for.
pub struct Pattern {
    glob: GlobMatcher,
    whole_path: bool,
    /// Nothing matches that is not within it.
    within: ItemPath,
}

impl Pattern {
    /// A name, or a pattern of `*`, `?`, `[…]` and `**`. With a `/` in it, it stands for the whole path when it
    /// begins with one, else for the end of the path.
    ///
    /// Errors: [`Code::Usage`].
    pub fn new(text: &OsStr, ignore_case: bool) -> Result<Self> {
        let usage =
            |what: &str| Error::new(Code::Usage, format!("cannot look for {}: {what}", text.display()));
        let pattern = text.to_str().ok_or_else(|| usage("a pattern must be UTF-8"))?;
        let whole_path = pattern.contains('/');
        let anchored = match pattern.strip_prefix('/') {
            Some(rest) => rest.to_owned(),
            None if whole_path => format!("**/{pattern}"),
            None => pattern.to_owned(),
        };
        let glob = GlobBuilder::new(&anchored).literal_separator(true).case_insensitive(ignore_case).build();
        let glob = glob.map_err(|error| usage("the pattern makes no sense").because(error))?;
        let is_anchored = pattern.starts_with('/') && !ignore_case;
        let within = if is_anchored { fixed_part(&anchored) } else { ItemPath::root() };
        Ok(Self { glob: glob.compile_matcher(), whole_path, within })
    }

    pub fn matches(&self, path: &ItemPath) -> bool {
        let bytes = if self.whole_path { path.as_bytes() } else { path.name() };
        !path.is_root() && self.glob.is_match(OsStr::from_bytes(bytes))
    }
}

/// The directories at the start of a pattern that have nothing of a pattern in them.
fn fixed_part(pattern: &str) -> ItemPath {
    let parts: Vec<&str> = pattern.split('/').collect();
    let directories = parts.split_last().map_or(&[][..], |(_name, directories)| directories);
    let fixed = directories.iter().take_while(|part| !part.contains(['*', '?', '[', '{', '\\', ']', '}']));
    ItemPath::new(fixed.copied().collect::<Vec<_>>().join("/")).unwrap_or_default()
}

/// How the disks of machines are looked through.
pub struct Disks<'a> {
    pub inside: &'a Inside<'a>,
    /// Told of what cannot be read, and of which point; the search goes on behind it.
    pub lost: &'a mut dyn FnMut(&PointInfo, &str),
}

/// One state of one item, and the points in which it is so.
#[derive(Clone, Debug)]
pub struct Found {
    pub item: Seen,
    pub newest: PointInfo,
    pub oldest: PointInfo,
    pub points: u64,
}

/// Calls `each` for every state of every matching item, newest first within a workload.
///
/// Errors: [`mainstay_core::Code::NoPower`] when the present key cannot read.
pub fn find(
    repository: &Repository,
    points: &[PointInfo],
    pattern: &Pattern,
    mut disks: Disks<'_>,
    progress: &dyn Progress,
    each: &mut dyn FnMut(Found) -> Result<()>,
) -> Result<()> {
    if !points.is_empty() {
        // Passing over every point would look like finding nothing.
        repository.ring().content_secret()?;
    }
    let mut workloads: Vec<WorkloadId> = Vec::new();
    let readable = |point: &&PointInfo| point.readable && !is_undo(point);
    for point in points.iter().rev().filter(readable) {
        if !workloads.contains(&point.workload.id) {
            workloads.push(point.workload.id);
        }
    }
    for workload in workloads {
        let own = points.iter().rev().filter(readable).filter(|point| point.workload.id == workload);
        let own: Vec<&PointInfo> = own.collect();
        if own.first().is_some_and(|point| point.workload.kind.0 == vm::KIND) {
            find_on_disks(repository, &own, pattern, &mut disks, progress, each)?;
        } else {
            find_in(repository, &own, pattern, progress, each)?;
        }
    }
    Ok(())
}

/// A state that may go on in the next older point.
struct Run {
    item: Seen,
    newest: usize,
}

/// Walks the newest point, and goes from each point to the one before it by what differs between them.
fn find_in(
    repository: &Repository,
    points: &[&PointInfo],
    pattern: &Pattern,
    progress: &dyn Progress,
    each: &mut dyn FnMut(Found) -> Result<()>,
) -> Result<()> {
    let mut runs: BTreeMap<ItemPath, Run> = BTreeMap::new();
    let mut newer: Option<PointReader> = None;
    for (index, point) in points.iter().enumerate() {
        progress.check()?;
        let reader = repository.read(&point.id)?;
        let Some(newer) = newer.replace(reader.clone()) else {
            for entry in reader.walk(&ItemPath::root()) {
                let entry = entry?;
                if pattern.matches(&entry.path) {
                    runs.insert(entry.path.clone(), Run { item: Seen::from(entry), newest: index });
                }
            }
            continue;
        };
        for change in diff(&reader, &newer, &ItemPath::root())? {
            let change = change?;
            // A stamp that moved without anything a person sees is no new state.
            if !pattern.matches(&change.path) || change.kind == ChangeKind::Metadata && looks_same(&change) {
                continue;
            }
            if let Some(run) = runs.remove(&change.path) {
                each(ended(points, run, index - 1)?)?;
            }
            if let Some(entry) = change.old {
                runs.insert(change.path, Run { item: Seen::from(entry), newest: index });
            }
        }
    }
    let last = points.len().saturating_sub(1);
    runs.into_values().try_for_each(|run| each(ended(points, run, last)?))
}

/// Walks the files of every point of a machine: nothing tells which of them differ from one image to the next.
fn find_on_disks(
    repository: &Repository,
    points: &[&PointInfo],
    pattern: &Pattern,
    disks: &mut Disks<'_>,
    progress: &dyn Progress,
    each: &mut dyn FnMut(Found) -> Result<()>,
) -> Result<()> {
    let mut runs: BTreeMap<ItemPath, Run> = BTreeMap::new();
    for (index, point) in points.iter().enumerate() {
        progress.event(&Event::Phase(Phase::Scanning));
        let mut found = matches_on_disks(repository, point, pattern, disks, progress)?;
        let mut going_on = BTreeMap::new();
        for (path, run) in runs {
            match found.remove(&path) {
                Some(item) if item.metadata == run.item.metadata => {
                    going_on.insert(path, run);
                }
                other => {
                    each(ended(points, run, index - 1)?)?;
                    going_on.extend(other.map(|item| (path, Run { item, newest: index })));
                }
            }
        }
        going_on.extend(found.into_iter().map(|(path, item)| (path, Run { item, newest: index })));
        runs = going_on;
    }
    let last = points.len().saturating_sub(1);
    runs.into_values().try_for_each(|run| each(ended(points, run, last)?))
}

/// What matches among the files of one point of a machine, and among its disks as files.
fn matches_on_disks(
    repository: &Repository,
    point: &PointInfo,
    pattern: &Pattern,
    disks: &mut Disks<'_>,
    progress: &dyn Progress,
) -> Result<BTreeMap<ItemPath, Seen>> {
    let mut found = BTreeMap::new();
    let view = MachineView::open(repository.read(&point.id)?, disks.inside)?;
    view.notes().iter().for_each(|note| (disks.lost)(point, note));
    let mut walked: u64 = 0;
    for start in view.tops() {
        let start = if pattern.within.is_within(&start) { pattern.within.clone() } else { start };
        if !start.is_within(&pattern.within) || view.lookup(&start).ok().flatten().is_none() {
            continue;
        }
        for seen in view.walk(&start)? {
            progress.check()?;
            walked += 1;
            if walked.is_multiple_of(4096) {
                progress.event(&Event::Done(Counts { items: walked, ..Counts::default() }));
            }
            match seen {
                Ok(seen) if pattern.matches(&seen.path) => {
                    found.insert(seen.path.clone(), seen);
                }
                Ok(_) => {}
                Err(error) if error.code() == Code::Cancelled => return Err(error),
                Err(error) => (disks.lost)(point, &error.chain().join(": ")),
            }
        }
    }
    Ok(found)
}

fn looks_same(change: &mainstay_repository::Change) -> bool {
    let (Some(old), Some(new)) = (&change.old, &change.new) else { return false };
    old.metadata == new.metadata
}

fn ended(points: &[&PointInfo], run: Run, oldest: usize) -> Result<Found> {
    let info = |index: usize| {
        let point = points.get(index).map(|point| (*point).clone());
        point.ok_or_else(|| Error::bug("a state begins or ends at no point"))
    };
    let count = u64::try_from(oldest + 1 - run.newest).unwrap_or(u64::MAX);
    Ok(Found { item: run.item, newest: info(run.newest)?, oldest: info(oldest)?, points: count })
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use mainstay_core::ItemPath;

    use super::Pattern;

    #[test]
    fn names_ends_of_paths_and_whole_paths_match() {
        for (pattern, path, expected) in [
            ("hosts", "etc/hosts", true),
            ("hosts", "etc/hosts.allow", false),
            ("*.conf", "etc/nginx/nginx.conf", true),
            ("nginx/*.conf", "etc/nginx/nginx.conf", true),
            ("nginx/*.conf", "etc/nginx/conf.d/a.conf", false),
            ("/nginx/*.conf", "etc/nginx/nginx.conf", false),
            ("/etc/**/*.conf", "etc/nginx/conf.d/a.conf", true),
            ("/home/*/.ssh", "home/ann/.ssh", true),
            ("HOSTS", "etc/hosts", false),
        ] {
            let matches = Pattern::new(OsStr::new(pattern), false).unwrap();
            assert_eq!(matches.matches(&ItemPath::new(path).unwrap()), expected, "{pattern} {path}");
        }
        for (pattern, within) in [
            ("/etc/nginx/*.conf", "etc/nginx"),
            ("/etc/**/x", "etc"),
            ("/a[b]/c", "/"),
            ("etc/x", "/"),
            ("/x", "/"),
        ] {
            assert_eq!(
                Pattern::new(OsStr::new(pattern), false).unwrap().within.to_string(),
                within,
                "{pattern}"
            );
        }
        let any_case = Pattern::new(OsStr::new("HOSTS"), true).unwrap();
        assert!(any_case.matches(&ItemPath::new("etc/hosts").unwrap()));
        assert!(Pattern::new(OsStr::new("[a"), false).is_err());
    }
}
