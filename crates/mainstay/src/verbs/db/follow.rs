//! `mainstay db follow`.

use std::sync::Arc;

use mainstay_core::Progress;
use mainstay_engine::follow::Closing;
use mainstay_engine::postgres::{FollowCluster, follow_cluster, workload};

use super::super::{Done, backup as files, duration, size};
use super::server::Known;
use crate::args::DbFollow;
use crate::report::databases::Following;
use crate::report::lines::Line;
use crate::session::Session;

pub(super) fn run(arguments: &DbFollow, session: &mut Session) -> Done {
    let places = session.places()?;
    let closing = Closing { after: duration(&arguments.every)?, ..Closing::default() };
    let max_lag = arguments.max_slot_lag.as_deref().map(size).transpose()?;
    let server = Known::of(&arguments.server, session)?;
    files::check_name(&server.name)?;
    let repository = files::open(session, &places, false)?;
    let dial = |replication| server.dial(replication);
    let workload = workload(&server.name, &dial)?;
    if arguments.server.slot.is_some() && max_lag.is_none() {
        let most = dial(true)?.value("SHOW max_slot_wal_keep_size")?;
        if most == "-1" {
            session.report.note(
                "the slot may keep log until the server's disk is full, should nobody follow: \
                 ALTER SYSTEM SET max_slot_wal_keep_size = '10GB', or --max-slot-lag",
            );
        }
    }
    session.report.line(&Line::Following(Following {
        workload: server.name.clone(),
        server: server.address.display(),
    }));
    let request = FollowCluster { workload, slot: arguments.server.slot.clone(), max_lag, closing };
    let progress: Arc<dyn Progress> = session.progress();
    follow_cluster(&repository, &dial, &request, &session.doors.clock, progress.as_ref())?;
    Ok(None)
}
