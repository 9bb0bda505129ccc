//! `mainstay restore` and `mainstay undo`.

use std::sync::Arc;

use mainstay_core::{Code, Error, Progress, Result, SkipReason};
use mainstay_engine::address::of_workload;
use mainstay_engine::restore::{
    Outcome, Placing, RestorePlan, RestoreRequest, plan_restore, restore as carry_out,
};
use mainstay_engine::undo::{newest, plan_undo};
use mainstay_engine::view::PointView;
use mainstay_engine::vm;
use mainstay_repository::Repository;
use mainstay_workloads::files::{Action, OwnerRule, RestoreMode};

use super::db::engine::Engine;
use super::{Done, db, item_path};
use crate::args::{Mode, Owners, Restore, Undo};
use crate::report::lines::{self, Changes, Line, RestoreStep, Restored};
use crate::session::Session;

/// How far a plan goes.
struct Act {
    dry_run: bool,
    yes: bool,
    /// Take an undo point first.
    undo: bool,
}

pub(super) fn restore(arguments: &Restore, session: &mut Session) -> Done {
    let request = request(arguments, session)?;
    let repository = session.open()?;
    if let (Some(to), []) = (&arguments.to, arguments.paths.as_slice())
        && is_cluster(&arguments.point, &repository)?
    {
        return db::restore::to_directory(&arguments.point, to, arguments.dry_run, &repository, session);
    }
    let view = session.view(&repository, &arguments.point, arguments.image_only, &arguments.inside)?;
    let view = view.as_ref();
    if view.info().workload.kind.0 == vm::KIND {
        check_machine(&request)?;
    }
    let progress = session.progress();
    let plan = plan_restore(view, &request, progress.as_ref());
    drop(progress);
    let plan = plan?;
    let act = Act { dry_run: arguments.dry_run, yes: arguments.yes, undo: !arguments.no_undo };
    finish(session, &repository, view, &plan, &act)
}

/// Whether a workload of the kind that is recovered by its log is meant. Its files alone are restored by naming them.
fn is_cluster(target: &str, repository: &Repository) -> Result<bool> {
    let name = target.rsplit_once('@').map_or(target, |(name, _)| name);
    let points = repository.points()?;
    Ok(of_workload(name, &points).is_ok_and(|points| {
        points.last().is_some_and(|point| Engine::of_kind(&point.workload.kind.0) == Some(Engine::Postgres))
    }))
}

/// The files of a machine do not belong on this one.
fn check_machine(request: &RestoreRequest) -> Result<()> {
    if request.placing == Placing::Original {
        let what = "the point is of a machine, whose files have no place of their own here";
        return Err(Error::new(Code::Usage, what).hint("name a directory: --to DIR"));
    }
    if request.selection.is_empty() {
        let what = "the point is of a machine: say which of its files to restore";
        return Err(Error::new(Code::Usage, what).hint(
            "a path in the machine such as /etc, / for all files, or /@machine for its disks as image files",
        ));
    }
    Ok(())
}

fn request(arguments: &Restore, session: &Session) -> Result<RestoreRequest> {
    let selection = arguments.paths.iter().map(|path| item_path(path)).collect::<Result<_>>()?;
    let placing = match arguments.to.as_ref().map(|to| session.doors.directory.join(to)) {
        None => Placing::Original,
        Some(directory) if arguments.strip => Placing::Stripped(directory),
        Some(directory) => Placing::Below(directory),
    };
    let in_place = placing == Placing::Original;
    let mode = match arguments.mode.unwrap_or(if in_place { Mode::Overwrite } else { Mode::New }) {
        Mode::New if in_place => {
            let what = "--mode new needs a directory of its own";
            return Err(Error::new(Code::Usage, what).hint("name it with --to"));
        }
        Mode::New => RestoreMode::New,
        Mode::Add => RestoreMode::Add,
        Mode::Overwrite => RestoreMode::Overwrite,
        Mode::Mirror => RestoreMode::Mirror,
    };
    let owners = owners(arguments.owners, session);
    let places = session.places()?;
    let keep = places.own().chain(session.key_file()).collect();
    Ok(RestoreRequest { selection, placing, mode, owners, keep })
}

pub(super) fn undo(arguments: &Undo, session: &mut Session) -> Done {
    let repository = session.open()?;
    let points = repository.points()?;
    let point = match &arguments.point {
        Some(text) => session.point(text, &points)?,
        None => newest(&points, &session.doors.host).cloned().ok_or_else(|| {
            Error::new(Code::NotFound, "there is nothing to undo on this machine")
                .hint("undo points are taken when a restore writes over something: mainstay points --undo")
        })?,
    };
    let reader = repository.read(&point.id)?;
    let progress = session.progress();
    let plan = plan_undo(&reader, owners(None, session), progress.as_ref());
    drop(progress);
    let plan = plan?;
    let act = Act { dry_run: arguments.dry_run, yes: arguments.yes, undo: true };
    finish(session, &repository, &reader, &plan, &act)
}

/// Only root can give files away.
fn owners(chosen: Option<Owners>, session: &Session) -> OwnerRule {
    match (chosen, session.doors.superuser) {
        (Some(Owners::Name), _) | (None, true) => OwnerRule::ByName,
        (Some(Owners::Number), _) => OwnerRule::ByNumber,
        (Some(Owners::Leave), _) | (None, false) => OwnerRule::Leave,
    }
}

fn finish(
    session: &mut Session,
    repository: &Repository,
    reader: &dyn PointView,
    plan: &RestorePlan,
    act: &Act,
) -> Done {
    let undo = act.undo && plan.wants_undo();
    if act.dry_run {
        show(session, plan);
        session.report.line(&summary(plan, undo));
        session.report.say("Nothing was changed. Run it again without --dry-run to do this.");
        return preview_of_skips(session, plan);
    }
    if plan.is_empty() && plan.lost.is_empty() {
        session.report.say(
            "Everything is as it is in the point, by kind, size, time, owner and mode; content was not compared.",
        );
    }
    if plan.touches_existing() {
        ask(session, plan, act.yes, undo)?;
    }
    let began = session.doors.clock.monotonic();
    let progress: Arc<dyn Progress> = session.progress();
    let host = undo.then_some(session.doors.host.as_str());
    let done = carry_out(repository, reader, plan, host, &session.doors.clock, &progress);
    drop(progress);
    let Outcome { restored, undo_point } = done?;
    restored.skips.iter().for_each(|skip| session.report.skipped(skip));
    session.report.more_skips("--verbose lists all");
    session.report.line(&Line::Restored(Restored {
        point: plan.point.id.to_string(),
        target: lines::Target::of(&plan.root),
        changes: Changes::from(&restored.changes),
        bytes: restored.counts.bytes,
        written_bytes: restored.counts.written_bytes,
        skipped: restored.counts.skipped,
        damaged: restored.damaged,
        undo_point: undo_point.map(|point| point.to_string()),
        seconds: session.seconds_since(began),
    }));
    if restored.damaged > 0 {
        let what = format!("{} items or parts of the tree are damaged in the repository", restored.damaged);
        return Err(Error::integrity(what)
            .hint("the rest was restored; see what else is hurt: mainstay verify --read-data"));
    }
    Ok((restored.counts.skipped > 0).then_some(Code::Partial))
}

/// What a restore cannot bring back, as far as that is known before it is tried.
fn preview_of_skips(session: &Session, plan: &RestorePlan) -> Done {
    plan.lost.iter().for_each(|skip| session.report.skipped(skip));
    session.report.more_skips("--verbose lists all");
    if plan.lost.iter().any(|skip| skip.reason == SkipReason::Damaged) {
        let what = "parts of the point's tree are damaged, and what is in them cannot be restored";
        return Err(Error::integrity(what)
            .hint("the rest can be; see what else is hurt: mainstay verify --read-data"));
    }
    Ok(None)
}

/// Asks before anything existing is touched, showing what is about to happen.
fn ask(session: &mut Session, plan: &RestorePlan, yes: bool, undo: bool) -> Result<()> {
    if !yes && session.doors.terminal.input && !session.report.json() {
        session.report.line(&summary(plan, undo));
    }
    let (touched, deleted) = (plan.totals.replaced + plan.totals.metadata, plan.totals.deleted);
    let what = match (touched, deleted) {
        (touched, 0) => format!("Change {touched} items"),
        (0, deleted) => format!("Delete {deleted} items"),
        (touched, deleted) => format!("Change {touched} and delete {deleted} items"),
    };
    session.confirm(yes, &format!("{what} below {}", plan.root.display()))
}

fn summary(plan: &RestorePlan, undo: bool) -> Line {
    Line::RestorePlan(lines::RestorePlan {
        point: plan.point.id.to_string(),
        target: lines::Target::of(&plan.root),
        changes: Changes::from(&plan.totals),
        bytes: plan.bytes,
        undo,
    })
}

fn show(session: &Session, plan: &RestorePlan) {
    for change in &plan.changes {
        let action = match change.action {
            Action::Create => "create",
            Action::Replace => "replace",
            Action::Metadata => "metadata",
            Action::Delete => "delete",
            Action::Same => "same",
            Action::Blocked => "blocked",
        };
        session.report.line(&Line::RestoreStep(RestoreStep {
            path: lines::Path::of(&change.path),
            action: action.to_owned(),
            bytes: change.bytes,
        }));
        if session.report.closed() {
            return;
        }
    }
}
