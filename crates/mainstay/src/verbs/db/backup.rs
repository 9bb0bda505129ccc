//! `mainstay db backup`.

use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Code, Progress};
use mainstay_engine::postgres::{ClusterBackup, ClusterPoint, backup_cluster};

use super::super::{Done, backup as files, check_tag};
use super::offline;
use super::server::Known;
use crate::args::DbBackup;
use crate::report::databases::ClusterCaptured;
use crate::report::lines::{BackedUp, Line, Roots, Totals};
use crate::session::Session;

pub(super) fn run(arguments: &DbBackup, session: &mut Session) -> Done {
    let places = session.places()?;
    arguments.tag.iter().try_for_each(|tag| check_tag(tag))?;
    let server = Known::of(&arguments.server, session)?;
    files::check_name(&server.name)?;
    if let Some(data) = &arguments.offline.offline {
        return offline::run(arguments, data, server.name, session);
    }
    let repository = files::open(session, &places, false)?;
    let request = ClusterBackup {
        host: session.doors.host.clone(),
        name: server.name.clone(),
        server: format!("postgres://{}", server.address.display()),
        tags: arguments.tag.clone(),
        slot: arguments.server.slot.clone(),
        fast: !arguments.spread,
        jobs: std::thread::available_parallelism().map_or(2, std::num::NonZero::get),
    };
    let began = session.doors.clock.monotonic();
    let progress: Arc<dyn Progress> = session.progress();
    let dial = |replication| server.dial(replication);
    let done = backup_cluster(&repository, &dial, &request, &session.doors.clock, &progress);
    drop(progress);
    tell(done?, None, request.tags, began, session)
}

/// Says what was made, and for how long the server was away for it.
pub(super) fn tell(
    made: ClusterPoint,
    away: Option<Duration>,
    tags: Vec<String>,
    began: Duration,
    session: &Session,
) -> Done {
    let ClusterPoint { point, version, start, end, timeline, notes } = made;
    notes.iter().for_each(|note| session.report.note(note));
    session.report.line(&Line::ClusterCaptured(ClusterCaptured {
        point: point.id.to_string(),
        workload: point.workload.name.clone(),
        version,
        timeline,
        start,
        end,
        away_seconds: away.map(|away| away.as_secs_f64()),
        notes,
    }));
    session.report.line(&Line::BackedUp(BackedUp {
        point: point.id.to_string(),
        workload: point.workload.name.clone(),
        host: point.host.clone(),
        roots: Roots::of(&point.roots),
        tags,
        counts: Totals::from(&point.counts),
        seconds: session.seconds_since(began),
    }));
    Ok((point.counts.skipped > 0).then_some(Code::Partial))
}
