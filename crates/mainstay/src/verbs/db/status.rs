//! `mainstay db status`.

use mainstay_core::{Code, Error, Position, Time};
use mainstay_engine::postgres::{KIND, holes, intervals};
use mainstay_workloads::postgres::Lsn;

use super::super::Done;
use super::engine::Engine;
use super::sqlite;
use crate::args::DbStatus;
use crate::report::databases::{Hole, Recoverable};
use crate::report::lines::{Line, stamp};
use crate::session::Session;

pub(super) fn run(arguments: &DbStatus, session: &mut Session) -> Done {
    let repository = session.open()?;
    let mut points = repository.points()?;
    points.retain(|point| Engine::of_kind(&point.workload.kind.0).is_some());
    let journals = repository.journals()?;
    let mut workloads: Vec<_> = journals.iter().map(|journal| journal.stream().workload.clone()).collect();
    workloads.extend(points.iter().map(|point| point.workload.clone()));
    workloads.sort_by(|one, other| (&one.name, one.id).cmp(&(&other.name, other.id)));
    workloads.dedup();
    workloads.retain(|workload| arguments.workload.as_ref().is_none_or(|name| *name == workload.name));
    if let (Some(name), true) = (&arguments.workload, workloads.is_empty()) {
        return Err(Error::new(Code::NotFound, format!("there is no database {name:?} in this repository")));
    }
    for workload in workloads {
        if Engine::of_kind(&workload.kind.0) == Some(Engine::Sqlite) {
            sqlite::status(&workload, &journals, &repository, session)?;
            continue;
        }
        for (log, span) in intervals(&repository, &points, &journals, &workload.id) {
            session.report.line(&Line::Recoverable(Recoverable {
                workload: workload.name.clone(),
                log,
                start: place(&span.start),
                end: place(&span.end),
                from: time(span.first),
                until: time(span.last),
                log_bytes: span.bytes,
            }));
        }
        for (log, hole) in holes(&journals, &workload.id) {
            session.report.line(&Line::Hole(Hole {
                workload: workload.name.clone(),
                log,
                start: place(&hole.start),
                end: place(&hole.end),
                after: time(hole.after),
                before: time(hole.before),
                why: hole.why,
            }));
        }
    }
    Ok(None)
}

fn place(position: &Position) -> String {
    Lsn::from_position(position).unwrap_or_default().to_string()
}

fn time(time: Option<Time>) -> Option<String> {
    time.map(stamp)
}
