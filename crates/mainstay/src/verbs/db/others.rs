//! `mainstay drill` for databases that have no throwaway instances: they are restored in full.

use std::sync::Arc;

use mainstay_core::{Clock, Code, Error, Result, Time, WorkloadRef};
use mainstay_engine::address::parse_time;
use mainstay_engine::{mariadb, sqlite};
use mainstay_repository::Repository;

use super::super::Done;
use super::engine::Engine;
use crate::args::Drill;
use crate::report::databases::DatabaseProven;
use crate::report::lines::Line;
use crate::session::Session;

/// The engine and the workload, if it is one of these.
pub(super) fn of(target: &str, repository: &Repository) -> Result<Option<(Engine, WorkloadRef)>> {
    let name = target.rsplit_once('@').map_or(target, |(name, _)| name);
    let found = Engine::of_workload(name, &repository.points()?, repository);
    Ok(found.ok().filter(|(engine, _)| *engine != Engine::Postgres))
}

pub(super) fn drill(
    arguments: &Drill,
    assertions: Vec<String>,
    known: &(Engine, WorkloadRef),
    repository: &Repository,
    session: &Session,
) -> Done {
    let (engine, workload) = known;
    let moment = moment(&arguments.moment.target, session)?;
    let scratch = session.doors.directory.join(&arguments.private.scratch);
    let clock: &Arc<dyn Clock> = &session.doors.clock;
    let progress = session.progress();
    let proof = if *engine == Engine::Sqlite {
        if !assertions.is_empty() {
            return Err(Error::new(
                Code::Usage,
                "queries cannot be asked of SQLite databases in a drill yet",
            ));
        }
        let until = moment.map_or(sqlite::Until::End, sqlite::Until::Time);
        let plan = sqlite::plan_databases(repository, &workload.id, until, None)?;
        let took = sqlite::drill_databases(repository, &plan, &scratch, &**clock, progress.as_ref())?;
        let checked = vec!["recovered with the log behind it".into(), "quick_check".into()];
        let seconds = took.as_secs_f64();
        let (point, place) = (plan.point.id.to_string(), None);
        DatabaseProven {
            point,
            workload: workload.name.clone(),
            place,
            recovery_seconds: seconds,
            seconds,
            checked,
        }
    } else {
        let until = moment.map_or(mariadb::Until::End, mariadb::Until::Time);
        let plan = mariadb::plan_server(repository, &workload.id, until)?;
        let request = mariadb::DrillServer { assertions, thorough: !arguments.quick };
        let proof = mariadb::drill_server(repository, &plan, &scratch, &request, clock, progress.as_ref())?;
        DatabaseProven {
            point: plan.point.id.to_string(),
            workload: workload.name.clone(),
            place: proof.place,
            recovery_seconds: proof.recovery.as_secs_f64(),
            seconds: proof.took.as_secs_f64(),
            checked: proof.levels,
        }
    };
    drop(progress);
    session.report.line(&Line::DatabaseProven(proof));
    Ok(None)
}

fn moment(target: &str, session: &Session) -> Result<Option<Time>> {
    match target.rsplit_once('@') {
        None | Some((_, "latest")) => Ok(None),
        Some((_, when)) => parse_time(when, &session.zone).map(Some).ok_or_else(|| {
            Error::new(Code::Usage, format!("{when:?} is not a moment"))
                .hint("write it as in shop@'2026-11-22 10:41:07'")
        }),
    }
}
