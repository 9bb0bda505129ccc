//! `mainstay status`.

use mainstay_core::{Code, Result, WorkloadRef};
use mainstay_engine::address::of_workload;
use mainstay_engine::postgres::KIND;
use mainstay_engine::status::{WorkloadStatus, status};

use super::db::status::spans;
use super::{Done, duration};
use crate::args::Status;
use crate::report::lines::{Line, Repository, Workload, stamp};
use crate::session::Session;

pub(super) fn run(arguments: &Status, session: &mut Session) -> Done {
    let max_age = arguments.max_age.as_deref().map(duration).transpose()?;
    let repository = session.open()?;
    let points = repository.points()?;
    let mut workloads = status(&points, max_age, session.now());
    if !arguments.workloads.is_empty() {
        let of = |name: &String| of_workload(name, &points);
        let chosen = arguments.workloads.iter().map(of).collect::<Result<Vec<_>>>()?.concat();
        workloads.retain(|status| chosen.iter().any(|point| point.workload.id == status.last.workload.id));
    }
    let stats = repository.stats();
    session.report.line(&Line::Repository(Repository {
        repository: repository.family().to_string(),
        location: repository.location(),
        points: stats.points,
        stored_bytes: stats.pack_bytes,
    }));
    let rows: Vec<Line> = workloads.iter().map(|status| Line::Workload(row(status))).collect();
    session.report.table(&rows);
    let shown =
        |workload: &WorkloadRef| workloads.iter().any(|status| status.last.workload.id == workload.id);
    if workloads.iter().any(|status| status.last.workload.kind.0 == KIND && status.last.readable) {
        spans(session, &repository, &points, &shown)?;
    }
    if stats.reserve == Some(0) {
        session.report.say("Nothing is set aside for a full disk: make room, then mainstay gc");
    }
    if let Some(advice) = advice(&workloads) {
        session.report.say(&advice);
    }
    Ok(workloads.iter().any(|status| status.overdue).then_some(Code::Overdue))
}

fn row(status: &WorkloadStatus<'_>) -> Workload {
    let last = status.last;
    Workload {
        workload: last.workload.name.clone(),
        kind: last.workload.kind.0.clone(),
        host: last.host.clone(),
        points: status.points,
        last_point: last.id.to_string(),
        last_backed_up: stamp(last.moment),
        age_seconds: status.age.as_secs(),
        last_verified: status.last_verified.map(stamp),
        last_proven: status.last_proven.map(stamp),
        items: last.counts.items,
        bytes: last.counts.bytes,
        skipped: last.counts.skipped,
        overdue: status.overdue,
    }
}

/// What to do next: the most pressing thing only.
fn advice(workloads: &[WorkloadStatus<'_>]) -> Option<String> {
    let name = |status: &WorkloadStatus<'_>| status.last.workload.name.clone();
    if workloads.is_empty() {
        return Some("Nothing is protected yet: mainstay backup PATH".to_owned());
    }
    if let Some(late) = workloads.iter().find(|status| status.overdue) {
        return Some(format!("{} is overdue: mainstay backup {}", name(late), late.last.roots.join(" ")));
    }
    if let Some(unsure) = workloads.iter().find(|status| status.last_verified.is_none()) {
        return Some(format!("{} was never verified: mainstay verify --read-data", name(unsure)));
    }
    let partial = workloads.iter().find(|status| status.last.counts.skipped > 0)?;
    Some(format!("{} has skipped items: mainstay points show {}", name(partial), partial.last.id))
}
