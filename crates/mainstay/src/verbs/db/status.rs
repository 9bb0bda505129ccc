//! `mainstay db status`.

use mainstay_core::{Code, Error, Position, Result, Time, WorkloadRef};
use mainstay_engine::postgres::{aside, holes, intervals};
use mainstay_repository::{PointInfo, Repository};
use mainstay_workloads::postgres::{Lsn, Sql};

use super::super::Done;
use super::engine::Engine;
use super::server::Known;
use super::{mariadb, sqlite};
use crate::args::{DbStatus, Server};
use crate::report::databases::{Hole, Recoverable, Slot};
use crate::report::lines::{Line, stamp};
use crate::session::Session;

/// Physical slots; what they keep is not known of those that were given up.
const SLOTS: &str = "SELECT slot_name, active, wal_status, greatest(0, pg_catalog.pg_wal_lsn_diff(CASE \
    WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn() \
    ELSE pg_catalog.pg_current_wal_lsn() END, restart_lsn))::bigint, safe_wal_size \
    FROM pg_catalog.pg_replication_slots WHERE slot_type = 'physical' ORDER BY slot_name";

pub(super) fn run(arguments: &DbStatus, session: &mut Session) -> Done {
    let repository = session.open()?;
    let points = repository.points()?;
    let only = |workload: &WorkloadRef| arguments.workload.as_ref().is_none_or(|name| *name == workload.name);
    let found = spans(session, &repository, &points, &only)?;
    if let (Some(name), 0) = (&arguments.workload, found) {
        return Err(Error::new(Code::NotFound, format!("there is no database {name:?} in this repository")));
    }
    if let Some(server) = &arguments.server {
        slots(arguments, server, session)?;
    }
    Ok(None)
}

/// What a server keeps in its slots, and how that stands.
fn slots(arguments: &DbStatus, server: &str, session: &Session) -> Result<()> {
    let server = Server {
        server: server.to_owned(),
        password_file: arguments.password_file.clone(),
        name: arguments.workload.clone(),
        slot: None,
    };
    let mut sql = Sql::new(Known::of(&server, session)?.dial(false)?);
    for row in sql.query(SLOTS, &[])? {
        let mut column = row.into_iter();
        let mut next = || column.next().flatten();
        session.report.line(&Line::Slot(Slot {
            slot: next().unwrap_or_default(),
            active: next().is_some_and(|active| active == "t"),
            state: next().unwrap_or_else(|| "new".into()),
            kept_bytes: next().and_then(|bytes| bytes.parse().ok()),
            left_bytes: next().and_then(|bytes| bytes.parse().ok()),
        }));
    }
    Ok(())
}

/// Tells within which spans databases can be recovered, and of the holes between them; how many there are.
pub(in crate::verbs) fn spans(
    session: &Session,
    repository: &Repository,
    points: &[PointInfo],
    only: &dyn Fn(&WorkloadRef) -> bool,
) -> Result<usize> {
    let journals = repository.journals()?;
    let mut workloads: Vec<_> = journals.iter().map(|journal| journal.stream().workload.clone()).collect();
    workloads.extend(points.iter().map(|point| point.workload.clone()));
    workloads.retain(|workload| Engine::of_kind(&workload.kind.0).is_some() && only(workload));
    workloads.sort_by(|one, other| (&one.name, one.id).cmp(&(&other.name, other.id)));
    workloads.dedup();
    for workload in &workloads {
        match Engine::of_kind(&workload.kind.0) {
            Some(Engine::Sqlite) => {
                sqlite::status(workload, &journals, repository, session)?;
                continue;
            }
            Some(Engine::MariaDb) => {
                mariadb::status(workload, &journals, repository, session)?;
                continue;
            }
            _ => {}
        }
        for (log, span) in intervals(repository, points, &journals, &workload.id) {
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
        for file in aside(&journals, workload) {
            session.report.note(&format!(
                "{}: the segment {file} was pushed with other bytes than were stored before; both are kept",
                workload.name
            ));
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
    Ok(workloads.len())
}

fn place(position: &Position) -> String {
    Lsn::from_position(position).unwrap_or_default().to_string()
}

fn time(time: Option<Time>) -> Option<String> {
    time.map(stamp)
}
