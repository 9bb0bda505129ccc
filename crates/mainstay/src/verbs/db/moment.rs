//! Which database somebody means, at which moment, and how a private copy of it is brought up.

use std::path::PathBuf;

use mainstay_core::{Code, Error, Result};
use mainstay_engine::address::{find_point, of_workload, parse_time};
use mainstay_engine::postgres::{ClusterPlan, Fill, InstanceRequest, KIND, Until, plan_cluster};
use mainstay_repository::{PointInfo, Repository};
use mainstay_workloads::postgres::Lsn;
use mainstay_workloads::vm::GuardProgram;

use crate::args::{Moment, Private};
use crate::session::Session;

/// The way to the moment that somebody means.
pub(super) fn plan(asked: &Moment, repository: &Repository, session: &Session) -> Result<ClusterPlan> {
    let points = repository.points()?;
    let (name, until) = match asked.target.rsplit_once('@') {
        None => (asked.target.as_str(), None),
        Some((name, "latest")) => (name, Some(Until::End)),
        Some((name, when)) => (name, Some(moment(&asked.target, when, &points, session)?)),
    };
    let points = of_workload(name, &points)?;
    let Some(known) = points.iter().rev().find(|point| point.workload.kind.0 == KIND) else {
        let what = format!("{name:?} is no cluster of PostgreSQL");
        return Err(Error::new(Code::Usage, what).hint("mainstay points shows what there is"));
    };
    let flag = match asked.before {
        Some(transaction) => Some(Until::Transaction(transaction)),
        None => asked.consistent.then_some(Until::Consistent),
    };
    let until = match (until, flag) {
        (Some(_), Some(_)) => {
            return Err(Error::new(Code::Usage, "two moments are named").hint("leave out one of them"));
        }
        (until, flag) => until.or(flag).unwrap_or(Until::End),
    };
    plan_cluster(repository, &known.workload.id, until)
}

/// A time, a place in the log, or the moment at which a point was complete.
fn moment(target: &str, when: &str, points: &[PointInfo], session: &Session) -> Result<Until> {
    if let Ok(lsn) = when.parse::<Lsn>() {
        return Ok(Until::Lsn(lsn));
    }
    if let Some(time) = parse_time(when, &session.zone) {
        return Ok(Until::Time(time));
    }
    let point = find_point(target, points, &session.zone)?;
    let end = Lsn::from_position(&point.position);
    end.map(Until::Lsn).ok_or_else(|| Error::new(Code::Usage, "that point is of no cluster"))
}

/// How a private copy is brought up.
pub(super) fn private(private: &Private, session: &Session) -> Result<InstanceRequest> {
    Ok(InstanceRequest {
        fill: if private.full { Fill::Full } else { Fill::Lazy },
        scratch: session.doors.directory.join(&private.scratch),
        programs: private.programs.as_ref().map(|path| session.doors.directory.join(path)),
        path: session.doors.environment.path.clone(),
        user: Some(private.user.clone()),
        role: private.role.clone(),
        preload: private.preload.clone(),
        guard: Some(guard("guard")?),
        evidence: None,
    })
}

/// This program, standing by a run.
pub(super) fn guard(verb: &str) -> Result<GuardProgram> {
    let program: PathBuf =
        std::env::current_exe().map_err(|error| Error::io("cannot find this program's own file", error))?;
    Ok(GuardProgram { program, arguments: vec!["db".into(), verb.into()] })
}
