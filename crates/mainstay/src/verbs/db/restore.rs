//! `mainstay db restore`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{Code, Error, Progress, Result};
use mainstay_engine::address::parse_time;
use mainstay_engine::postgres::{
    ClusterPlan, KIND, Until, check_stopped, plan_cluster_on, restore_cluster, restore_cluster_in_place,
};
use mainstay_repository::Repository;

use super::super::Done;
use crate::args::{DbRestore, Moment};
use crate::report::databases::ClusterRestored;
use crate::report::lines::{Line, WouldDo};
use crate::session::Session;

pub(super) fn run(arguments: &DbRestore, repository: &Repository, session: &mut Session) -> Done {
    let until = until(arguments, session)?;
    let points = repository.points()?;
    let mut clusters = points.iter().filter(|point| point.workload.kind.0 == KIND);
    let Some(known) = clusters.rfind(|point| point.workload.name == arguments.workload) else {
        let what = format!("there is no point of a cluster {:?}", arguments.workload);
        return Err(Error::new(Code::NotFound, what).hint("mainstay points shows what there is"));
    };
    let plan = plan_cluster_on(repository, &known.workload.id, until, arguments.timeline)?;
    let (to, in_place) = match (&arguments.to, &arguments.in_place) {
        (_, Some(directory)) => (directory, true),
        (Some(directory), None) => (directory, false),
        (None, None) => return Err(Error::new(Code::Usage, "it is not said where to").hint("--to DIR")),
    };
    let act = Act {
        to: session.doors.directory.join(to),
        in_place,
        dry_run: arguments.dry_run,
        yes: arguments.yes,
    };
    carry_out(repository, &plan, &act, session)
}

/// `mainstay restore` of a cluster.
pub(in super::super) fn to_directory(
    target: &str,
    to: &Path,
    dry_run: bool,
    repository: &Repository,
    session: &mut Session,
) -> Done {
    let moment = Moment { target: target.to_owned(), before: None, consistent: false };
    let plan = super::moment::plan(&moment, repository, session)?;
    let act = Act { to: session.doors.directory.join(to), in_place: false, dry_run, yes: true };
    carry_out(repository, &plan, &act, session)
}

/// Where to, and how far.
struct Act {
    to: PathBuf,
    in_place: bool,
    dry_run: bool,
    yes: bool,
}

fn carry_out(repository: &Repository, plan: &ClusterPlan, act: &Act, session: &mut Session) -> Done {
    let to = &act.to;
    if act.in_place {
        check_stopped(to)?;
    }
    if act.dry_run {
        let what = format!(
            "restore point {} of {}, PostgreSQL {}, to {}{}, with its log from {}",
            plan.point.id,
            plan.point.workload.name,
            plan.cluster.version,
            to.display(),
            if act.in_place { ", after moving aside what is there" } else { "" },
            plan.cluster.start
        );
        session.report.line(&Line::WouldDo(WouldDo { what }));
        return Ok(None);
    }
    if act.in_place {
        session.confirm(act.yes, &format!("Move aside {} and restore in its place", to.display()))?;
    }
    let began = session.doors.clock.monotonic();
    let progress: Arc<dyn Progress> = session.progress();
    let done = match act.in_place {
        true => restore_cluster_in_place(repository, plan, to, &*session.doors.clock, &progress)
            .map(|done| (done.restored, Some(done.aside))),
        false => restore_cluster(repository, plan, to, &progress).map(|restored| (restored, None)),
    };
    drop(progress);
    let (restored, aside) = done?;
    for skip in &restored.skips {
        session.report.say(&format!("/{}: {}", skip.path, skip.detail));
    }
    if let Some(aside) = &aside {
        session.report.say(&format!(
            "what was there is {} now; to take this back, stop the server and move it where it was",
            aside.display()
        ));
    }
    session.report.line(&Line::ClusterRestored(ClusterRestored {
        point: plan.point.id.to_string(),
        workload: plan.point.workload.name.clone(),
        version: plan.cluster.version.clone(),
        directory: to.display().to_string(),
        standby_of: None,
        aside: aside.map(|path| path.display().to_string()),
        items: restored.counts.items,
        bytes: restored.counts.bytes,
        skipped: restored.counts.skipped,
        seconds: session.seconds_since(began),
    }));
    Ok((restored.counts.skipped > 0).then_some(Code::Partial))
}

fn until(arguments: &DbRestore, session: &Session) -> Result<Until> {
    if let Some(text) = &arguments.at {
        let time = parse_time(text, &session.zone);
        let wrong = || {
            Error::new(Code::Usage, format!("{text:?} is not a moment"))
                .hint("write it as in '2026-11-22 10:41:07' or '2026-11-22 10:41:07+01:00'")
        };
        return Ok(Until::Time(time.ok_or_else(wrong)?));
    }
    if let Some(text) = &arguments.lsn {
        let wrong = |()| {
            Error::new(Code::Usage, format!("{text:?} is not a place in a log"))
                .hint("write it as in 1A/2B3C4D5E")
        };
        return Ok(Until::Lsn(text.parse().map_err(wrong)?));
    }
    Ok(match arguments.before {
        Some(transaction) => Until::Transaction(transaction),
        None if arguments.consistent => Until::Consistent,
        None => Until::End,
    })
}
