//! `mainstay db standby`.

use std::sync::Arc;

use mainstay_core::{Code, Progress};
use mainstay_engine::postgres::{StandbyRequest, create_standby};
use mainstay_workloads::postgres::Address;

use super::super::Done;
use super::moment;
use crate::args::{DbStandby, Moment};
use crate::report::databases::ClusterRestored;
use crate::report::lines::Line;
use crate::session::Session;

pub(super) fn run(arguments: &DbStandby, session: &mut Session) -> Done {
    // A password in it is refused, and so is what is no address.
    let _address: Address = arguments.primary.parse()?;
    let to = session.doors.directory.join(&arguments.to);
    let repository = session.open()?;
    let asked = Moment { target: arguments.workload.clone(), before: None, consistent: false };
    let plan = moment::plan(&asked, &repository, session)?;
    let request = StandbyRequest {
        primary: arguments.primary.clone(),
        slot: arguments.slot.clone(),
        restore_command: arguments.restore_command.clone(),
    };
    let began = session.doors.clock.monotonic();
    let progress: Arc<dyn Progress> = session.progress();
    let done = create_standby(&repository, &plan, &to, &request, &progress);
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
        aside: None,
        standby_of: Some(arguments.primary.clone()),
        items: restored.counts.items,
        bytes: restored.counts.bytes,
        skipped: restored.counts.skipped,
        seconds: session.seconds_since(began),
    }));
    Ok((restored.counts.skipped > 0).then_some(Code::Partial))
}
