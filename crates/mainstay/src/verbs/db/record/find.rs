//! `mainstay record find`.

use std::sync::Arc;

use mainstay_core::{Code, Error, Progress, Result};
use mainstay_engine::address::of_workload;
use mainstay_engine::postgres::{ClusterPlan, Instance, KIND};
use mainstay_engine::record::{History, HistoryAsk, history};
use mainstay_repository::{PointInfo, Repository};

use super::super::super::Done;
use super::super::moment;
use super::pairs;
use crate::args::{Private, RecordFind};
use crate::report::lines::{Line, stamp};
use crate::report::records::{RecordEvent, RecordHistory};
use crate::session::Session;

pub(super) fn run(arguments: &RecordFind, session: &mut Session) -> Done {
    let repository = session.open()?;
    let wanted = pairs(&arguments.row.key)?;
    let workload = workload(&arguments.workload, &repository.points()?)?;
    let ask = HistoryAsk {
        workload: &workload.workload.id,
        database: &arguments.database,
        table: &arguments.row.table,
        wanted: &wanted,
        all: arguments.all,
    };
    let found = look(&repository, &ask, &arguments.private, session)?;
    for event in &found.events {
        session.report.line(&Line::RecordEvent(RecordEvent {
            row: found.shown.clone(),
            what: event.what.name().into(),
            time: stamp(event.time),
            transaction: event.transaction,
            lsn: event.at.to_string(),
            committed: event.committed.to_string(),
        }));
    }
    found.notes.iter().for_each(|note| session.report.note(note));
    session.report.line(&Line::RecordHistory(RecordHistory {
        row: found.shown,
        point: found.point.id.to_string(),
        was_there: found.was_there,
        events: found.events.len() as u64,
        from: found.from.to_string(),
        to: found.to.to_string(),
    }));
    Ok(None)
}

/// The newest point of a cluster.
pub(super) fn workload(name: &str, points: &[PointInfo]) -> Result<PointInfo> {
    let points = of_workload(name, points)?;
    let found = points.iter().rev().find(|point| point.workload.kind.0 == KIND);
    found.map(|point| (*point).clone()).ok_or_else(|| {
        Error::new(Code::Usage, format!("{name:?} is no cluster of PostgreSQL"))
            .hint("mainstay points shows what there is")
    })
}

/// Looks in the log, with private copies to begin with.
pub(super) fn look(
    repository: &Repository,
    ask: &HistoryAsk<'_>,
    private: &Private,
    session: &Session,
) -> Result<History> {
    let request = moment::private(private, session)?;
    let progress: Arc<dyn Progress> = session.progress();
    let bring =
        |plan: &ClusterPlan| Instance::start(repository, plan, &request, &session.doors.clock, &progress);
    history(repository, &bring, ask, &progress)
}
