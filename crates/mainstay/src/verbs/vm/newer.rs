//! Newer files for the disks of a machine that is restored as a whole.

use std::path::PathBuf;
use std::sync::Arc;

use mainstay_core::{Code, Error, ItemPath, Progress, Result};
use mainstay_engine::address::find_as_of;
use mainstay_engine::vm::{
    FilesOnDisks, ImageFormat, MachinePlan, apply_files, check_apply, machine_disks, newer_files,
};
use mainstay_repository::{PointInfo, PointReader, Repository};

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

/// Whether the files can be put on the disks once those are written. Says which points belong together.
///
/// Errors: [`Code::Unsupported`], naming the alternative.
pub(super) fn check(
    reader: &PointReader,
    plan: &MachinePlan,
    files: &[PointInfo],
    session: &Session,
) -> Result<()> {
    if files.is_empty() {
        return Ok(());
    }
    session.say_composed(&plan.point, files, &[]);
    let alternative = "--image-only restores the image without newer files";
    if plan.goals.iter().any(|goal| goal.format != ImageFormat::Raw) {
        let what = "newer files can only be put on raw images and devices";
        return Err(Error::new(Code::Unsupported, what).hint(alternative));
    }
    if disks(plan).len() < machine_disks(reader)? {
        let what = "newer files can only be put on all disks of the machine together";
        return Err(Error::new(Code::Unsupported, what).hint(alternative));
    }
    check_apply()
}

/// The disks of the plan, in the order of their names.
fn disks(plan: &MachinePlan) -> Vec<PathBuf> {
    let directory = ItemPath::new(mainstay_workloads::vm::DISKS).unwrap_or_default();
    let disks = plan.goals.iter().filter(|goal| goal.item.is_within(&directory));
    disks.map(|goal| goal.path.clone()).collect()
}

/// Puts the files on the disks.
pub(super) fn apply(
    repository: &Repository,
    plan: &MachinePlan,
    files: Vec<PointInfo>,
    inside: &args::Inside,
    session: &mut Session,
) -> Done {
    if files.is_empty() {
        return Ok(None);
    }
    let points = files.iter().map(|point| point.id.to_string()).collect();
    let request = FilesOnDisks { files, disks: disks(plan), scratch: std::env::temp_dir() };
    let looking = Looking::new(inside, &mut session.doors)?;
    let began = session.doors.clock.monotonic();
    let progress: Arc<dyn Progress> = session.progress();
    let done = looking
        .with(|inside| apply_files(repository, &request, inside, &session.doors.clock, &progress))
        .map_err(|error| {
            error.during("the disks are restored as the image has them, but not the newer files")
        });
    drop(progress);
    let applied = done?;
    applied.skips.iter().for_each(|skip| session.report.skipped(skip));
    session.report.more_skips("--verbose lists all");
    let skipped = super::super::number(applied.skips.len());
    session.report.line(&Line::FilesApplied(FilesApplied {
        image: plan.point.id.to_string(),
        files: points,
        changes: Changes::from(&applied.changes),
        written_bytes: applied.bytes,
        skipped,
        damaged: applied.damaged,
        seconds: session.seconds_since(began),
    }));
    if applied.damaged > 0 {
        let what = format!("{} items or parts of the tree are damaged in the repository", applied.damaged);
        return Err(Error::integrity(what).hint("see what else is hurt: mainstay verify --read-data"));
    }
    Ok((skipped > 0).then_some(Code::Partial))
}
