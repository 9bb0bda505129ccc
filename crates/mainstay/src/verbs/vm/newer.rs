//! Newer files for the disks of a machine that is restored as a whole.

use std::sync::Arc;

use mainstay_core::{Code, Error, PointId, Progress, Result};
use mainstay_engine::address::find_as_of;
use mainstay_engine::vm::{Applied, MachinePlan, Newer, newer_files};
use mainstay_repository::{PointInfo, Repository};

use super::super::Done;
use crate::args;
use crate::inside::Looking;
use crate::report::lines::{Changes, Line};
use crate::report::machines::FilesApplied;
use crate::session::Session;

/// The image that the text names, and the points of newer files that belong on it.
pub(super) fn find(
    text: &str,
    image_only: bool,
    points: &[PointInfo],
    session: &Session,
) -> Result<(PointInfo, Vec<PointInfo>)> {
    let (image, until) = find_as_of(text, points, &session.zone)?;
    let newer = until.filter(|_| !image_only).map(|until| newer_files(image, points, until));
    Ok((image.clone(), newer.unwrap_or_default().into_iter().cloned().collect()))
}

/// Calls `work` with what it takes to put the files on disks.
pub(super) fn with<T>(
    repository: &Repository,
    files: &[PointInfo],
    inside: &args::Inside,
    session: &mut Session,
    work: impl FnOnce(&Newer<'_>, &mut Session) -> Result<T>,
) -> Result<T> {
    let looking = Looking::new(inside, &mut session.doors)?;
    let (scratch, clock) = (std::env::temp_dir(), session.doors.clock.clone());
    looking.with(|inside| {
        let (inside, scratch, clock) = (*inside, scratch.as_path(), &clock);
        work(&Newer { repository, files, inside, scratch, clock }, session)
    })
}

/// Puts the files on disks that were just written.
pub(super) fn apply(newer: &Newer<'_>, plan: &MachinePlan, session: &Session) -> Result<Applied> {
    let progress: Arc<dyn Progress> = session.progress();
    newer.apply_to(plan, &progress).map_err(|error| {
        error.during("the disks are restored as the image has them, but not the newer files")
    })
}

/// Tells what came of the files, and says what that means for the run.
///
/// Errors: [`Code::Integrity`] when some are damaged in the repository.
pub(super) fn tell(image: &PointId, files: &[PointInfo], applied: &Applied, session: &Session) -> Done {
    if files.is_empty() {
        return Ok(None);
    }
    applied.skips.iter().for_each(|skip| session.report.skipped(skip));
    session.report.more_skips("--verbose lists all");
    let skipped = super::super::number(applied.skips.len());
    session.report.line(&Line::FilesApplied(FilesApplied {
        image: image.to_string(),
        files: files.iter().map(|point| point.id.to_string()).collect(),
        changes: Changes::from(&applied.changes),
        written_bytes: applied.bytes,
        skipped,
        damaged: applied.damaged,
        seconds: applied.took.as_secs_f64(),
    }));
    if applied.damaged > 0 {
        let what = format!("{} items or parts of the tree are damaged in the repository", applied.damaged);
        return Err(Error::integrity(what).hint("see what else is hurt: mainstay verify --read-data"));
    }
    Ok((skipped > 0).then_some(Code::Partial))
}
