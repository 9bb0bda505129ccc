//! Proving that a server can be recovered: a private copy is brought up, and its own checks and the user's assertions are
//! asked of it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Clock, Code, Error, Event, Phase, Progress, Result};
use mainstay_repository::{Note, Repository};
use mainstay_workloads::mariadb::PrivateServer;

use super::restore::{ServerPlan, restore_server};

/// What must hold of the copy.
#[derive(Clone, Debug, Default)]
pub struct DrillServer {
    /// Queries that must answer with one value, 1.
    pub assertions: Vec<String>,
    /// Has every table checked.
    pub thorough: bool,
}

/// What a drill has shown.
#[derive(Clone, Debug)]
pub struct ServerProof {
    pub place: Option<String>,
    /// Until it answered at that moment, and until the last check had passed.
    pub recovery: Duration,
    pub took: Duration,
    /// What was checked.
    pub levels: Vec<String>,
}

/// Recovers a copy in `scratch`, checks it, and notes in its point that it is proven.
///
/// Errors: [`Code::Refused`] when a check fails: the point is not proven then.
pub fn drill_server(
    repository: &Repository,
    plan: &ServerPlan,
    scratch: &Path,
    request: &DrillServer,
    clock: &Arc<dyn Clock>,
    progress: &dyn Progress,
) -> Result<ServerProof> {
    let began = clock.monotonic();
    let directory = crate::written::private_directory(scratch)?;
    let data = directory.path().join("data");
    let restored = restore_server(repository, plan, &data, clock, progress)?;
    let server = PrivateServer::start(&data, true, clock, progress)?;
    let recovery = clock.monotonic().saturating_sub(began);
    progress.event(&Event::Phase(Phase::Verifying));
    let mut levels = vec!["recovered with the log behind it".to_owned()];
    let refused =
        |what: String| Error::new(Code::Refused, format!("point {} is not proven: {what}", plan.point.id));
    if request.thorough {
        if let Some(complaint) = server.check_tables(progress)?.into_iter().next() {
            return Err(refused(complaint));
        }
        levels.push("CHECK TABLE of every table".into());
    }
    for assertion in &request.assertions {
        let answer = server.connect()?.value(assertion)?;
        if answer != "1" {
            return Err(refused(format!("{assertion:?} answers {answer:?}, and not 1")));
        }
    }
    if !request.assertions.is_empty() {
        levels.push(format!("{} of the user's queries", request.assertions.len()));
    }
    server.stop(progress)?;
    let took = clock.monotonic().saturating_sub(began);
    let seconds = recovery.as_secs_f64().ceil() as u64;
    repository.note(&plan.point.id, &Note::Proven { how: levels.join(", "), seconds })?;
    Ok(ServerProof { place: restored.place, recovery, took, levels })
}
