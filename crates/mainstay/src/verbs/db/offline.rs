//! `mainstay db backup --offline`.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Code, Error, Progress};
use mainstay_engine::postgres::{OfflineBackup, backup_cluster_offline};

use super::super::{Done, backup as files, duration};
use super::{backup, moment};
use crate::args::DbBackup;
use crate::session::Session;

/// What stopping and starting may each take.
const LIMIT: Duration = Duration::from_secs(600);

pub(super) fn run(arguments: &DbBackup, data: &Path, name: String, session: &mut Session) -> Done {
    let places = session.places()?;
    let lines = arguments.offline.stop.clone().zip(arguments.offline.start.clone());
    let (stop, start) = lines.ok_or_else(|| Error::new(Code::Usage, "--offline needs --stop and --start"))?;
    let max_downtime = arguments.offline.max_downtime.as_deref().map(duration).transpose()?;
    let repository = files::open(session, &places, false)?;
    let request = OfflineBackup {
        host: session.doors.host.clone(),
        name,
        tags: arguments.tag.clone(),
        data: session.doors.directory.join(data),
        stop,
        start,
        limit: LIMIT,
        max_downtime,
        programs: None,
        path: session.doors.environment.path.clone(),
        jobs: std::thread::available_parallelism().map_or(2, std::num::NonZero::get),
        guard: Some(moment::guard("start-guard")?),
    };
    let began = session.doors.clock.monotonic();
    let progress: Arc<dyn Progress> = session.progress();
    let done = backup_cluster_offline(&repository, &request, &session.doors.clock, &progress);
    drop(progress);
    let (point, away) = done?;
    session.report.say(&format!("the server was away for {:.1} s", away.as_secs_f64()));
    backup::tell(point, Some(away), request.tags, began, session)
}
