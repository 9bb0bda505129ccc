//! What a mirror may delete: only what lies where the point captured, and nothing that it never captured.

use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{Code, Error, ItemPath, Result};
use mainstay_repository::PointInfo;
use mainstay_workloads::files::{KIND, LeftOut, PathSet, RestoreMode, RestoreRules, mount_points};

use crate::restore::View;
use crate::view::PointView;

/// What the point tells of its roots and of what it left out.
pub(crate) fn left_out(point: &PointInfo) -> Option<LeftOut> {
    (point.workload.kind.0 == KIND).then(|| LeftOut::parse(&point.position.0)).flatten()
}

/// The rules of a mirror of `mirrored`, paths of the point, below `target`.
///
/// Errors: [`Code::Refused`] when it is not known what the point never captured.
pub(crate) fn rules(
    reader: &dyn PointView,
    view: &View,
    target: &Path,
    mirrored: &[ItemPath],
    left_out: Option<LeftOut>,
    keep: &[PathBuf],
) -> Result<RestoreRules> {
    let refuse = |why: &str| {
        let what = format!("cannot mirror point {}: {why}", reader.info().id);
        Error::new(Code::Refused, what).hint(
            "--mode overwrite restores it and deletes nothing; a mirror would delete what was never captured",
        )
    };
    if keep.iter().any(|kept| target.starts_with(kept)) {
        return Err(refuse("the directory belongs to the repository or its keys"));
    }
    let left_out = left_out.ok_or_else(|| refuse("it does not tell what it left out"))?;
    let lost: Vec<ItemPath> =
        reader.skips()?.into_iter().filter(|skip| skip.reason.is_loss()).map(|skip| skip.path).collect();
    if u64::try_from(lost.len()).unwrap_or_default() < reader.info().counts.skipped {
        return Err(refuse("it does not list all that it could not read"));
    }
    let mut captured = Vec::new();
    for path in mirrored {
        for root in &left_out.roots {
            if path.is_within(&root.real) {
                captured.push(path.clone());
            } else if root.real.is_within(path) {
                captured.push(root.real.clone());
            }
        }
    }
    let selected: Vec<ItemPath> = captured.iter().filter_map(|path| view.place(path)).collect();
    let mut kept: PathSet = lost.iter().filter_map(|path| view.place(path)).collect();
    kept.extend(
        keep.iter()
            .flat_map(|path| [below(target, path), real(path).and_then(|path| below(target, &path))])
            .flatten(),
    );
    let mounted =
        mount_points().into_iter().filter_map(|point| below(target, &Path::new("/").join(path_of(&point))));
    // A selected path that is itself a mount point was asked for by name.
    let inside = |point: &ItemPath| selected.iter().any(|path| point.is_within(path) && point != path);
    kept.extend(mounted.filter(|point| inside(point) && !selected.contains(point)));
    Ok(RestoreRules {
        mode: RestoreMode::Mirror,
        selected,
        keep: kept,
        left_out: Some(Arc::new(left_out)),
        front: view.strip.clone(),
        planned: None,
    })
}

fn path_of(path: &ItemPath) -> &Path {
    Path::new(std::ffi::OsStr::from_bytes(path.as_bytes()))
}

/// The path relative to the target, when it lies in it.
fn below(target: &Path, path: &Path) -> Option<ItemPath> {
    let rest = path.strip_prefix(target).ok()?;
    ItemPath::new(rest.as_os_str().as_bytes()).ok()
}

fn real(path: &Path) -> Option<PathBuf> {
    std::fs::canonicalize(path).ok()
}
