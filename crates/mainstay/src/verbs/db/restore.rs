//! `mainstay db restore`.

use std::sync::Arc;

use mainstay_core::{Code, Error, Progress, Result};
use mainstay_engine::address::parse_time;
use mainstay_engine::postgres::{KIND, Until, plan_cluster_on, restore_cluster};
use mainstay_repository::Repository;

use super::super::Done;
use crate::args::DbRestore;
use crate::report::databases::ClusterRestored;
use crate::report::lines::{Line, WouldDo};
use crate::session::Session;

pub(super) fn run(arguments: &DbRestore, repository: &Repository, session: &mut Session) -> Done {
    let until = until(arguments, session)?;
    let to = session.doors.directory.join(&arguments.to);
    let points = repository.points()?;
    let mut clusters = points.iter().filter(|point| point.workload.kind.0 == KIND);
    let Some(known) = clusters.rfind(|point| point.workload.name == arguments.workload) else {
        let what = format!("there is no point of a cluster {:?}", arguments.workload);
        return Err(Error::new(Code::NotFound, what).hint("mainstay points shows what there is"));
    };
    let plan = plan_cluster_on(repository, &known.workload.id, until, arguments.timeline)?;
    if arguments.dry_run {
        let what = format!(
            "restore point {} of {}, PostgreSQL {}, to {}, with its log from {}",
            plan.point.id,
            plan.point.workload.name,
            plan.cluster.version,
            to.display(),
            plan.cluster.start
        );
        session.report.line(&Line::WouldDo(WouldDo { what }));
        return Ok(None);
    }
    let began = session.doors.clock.monotonic();
    let progress: Arc<dyn Progress> = session.progress();
    let done = restore_cluster(repository, &plan, &to, &progress);
    drop(progress);
    let restored = done?;
    for skip in &restored.skips {
        session.report.say(&format!("/{}: {}", skip.path, skip.detail));
    }
    session.report.line(&Line::ClusterRestored(ClusterRestored {
        point: plan.point.id.to_string(),
        workload: plan.point.workload.name.clone(),
        version: plan.cluster.version.clone(),
        directory: to.display().to_string(),
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
