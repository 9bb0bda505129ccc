//! `mainstay expire`.

use mainstay_core::{Code, Error, PointId, Result};
use mainstay_engine::address::of_workload;
use mainstay_engine::postgres::{KIND, Trim, plan_trims, trim};
use mainstay_engine::retention::{ExpirePlan, Policy, Verdict, plan_expire};
use mainstay_repository::{PointInfo, Repository};
use mainstay_workloads::postgres::Lsn;

use super::{Done, duration, number};
use crate::args::{Expire, Keep};
use crate::report::databases::Trimmed;
use crate::report::lines::{self, Expired, Line, stamp};
use crate::session::Session;

pub(super) fn run(arguments: &Expire, session: &mut Session) -> Done {
    let repository = session.open()?;
    let points = repository.points()?;
    if !arguments.points.is_empty() {
        return named(arguments, session, &repository, &points);
    }
    let policy = policy(&arguments.keep)?;
    let mut plan = plan_expire(&points, &policy, &session.zone, session.now())?;
    if let Some(name) = &arguments.workload {
        let own: Vec<PointId> = of_workload(name, &points)?.iter().map(|point| point.id).collect();
        plan.verdicts.retain(|verdict| own.contains(&verdict.point.id));
        let verdicts = &plan.verdicts;
        plan.never_verified
            .retain(|workload| verdicts.iter().any(|verdict| verdict.point.workload.id == workload.id));
    }
    session.report.table(&verdicts(&plan));
    for workload in &plan.never_verified {
        session.report.note(&format!(
            "{} loses points though none of its points was ever verified; check them first: \
             mainstay verify --read-data",
            workload.name
        ));
    }
    let expired = plan.expired();
    let kept = plan.verdicts.len() - expired.len();
    if !arguments.dry_run && !expired.is_empty() {
        let question = format!("Expire {} of {} points", expired.len(), plan.verdicts.len());
        session.confirm(arguments.yes, &question)?;
        repository.expire(&expired, "retention")?;
    }
    let never = plan.never_verified.iter().map(|workload| workload.name.clone()).collect();
    finish(session, &expired, kept, arguments.dry_run, never);
    trim_logs(session, &repository, &points, &expired, arguments.dry_run)
}

/// Points that the person named, whatever the rules say; holds still count.
fn named(arguments: &Expire, session: &mut Session, repository: &Repository, points: &[PointInfo]) -> Done {
    let find = |text: &String| session.point(text, points);
    let mut chosen: Vec<PointInfo> = arguments.points.iter().map(find).collect::<Result<_>>()?;
    chosen.sort_by_key(|point| point.id);
    chosen.dedup_by_key(|point| point.id);
    let ids: Vec<PointId> = chosen.iter().map(|point| point.id).collect();
    let now = session.now();
    for point in &chosen {
        if let Some(hold) = point.holds.iter().find(|hold| hold.until.is_none_or(|until| until > now)) {
            let what = format!("point {} is held: {}", point.id, hold.reason);
            return Err(
                Error::new(Code::Refused, what).hint("release the hold first: mainstay points release")
            );
        }
    }
    if !arguments.dry_run {
        let name = |point: &PointInfo| format!("{} of {}", point.id, point.workload.name);
        let names: Vec<String> = chosen.iter().map(name).collect();
        session.confirm(arguments.yes, &format!("Expire {}", names.join(", ")))?;
        repository.expire(&ids, "asked for by name")?;
    }
    finish(session, &ids, points.len() - ids.len(), arguments.dry_run, Vec::new());
    trim_logs(session, repository, points, &ids, arguments.dry_run)
}

/// The log that only expired points needed goes with them.
fn trim_logs(
    session: &Session,
    repository: &Repository,
    points: &[PointInfo],
    expired: &[PointId],
    dry_run: bool,
) -> Done {
    let mut kept = points.to_vec();
    kept.retain(|point| !expired.contains(&point.id));
    if kept.iter().all(|point| point.workload.kind.0 != KIND) {
        return Ok(None);
    }
    let journals = repository.journals()?;
    let (trims, unsure) = plan_trims(repository, &kept, &journals)?;
    for name in unsure {
        session.report.note(&format!("the log of {name} stays as it is: this key cannot read its points"));
    }
    if !dry_run {
        trim(repository, &journals, &trims)?;
    }
    for Trim { workload, log, before, bytes, .. } in trims {
        let before = Lsn::from_position(&before).unwrap_or_default().to_string();
        session.report.line(&Line::Trimmed(Trimmed {
            workload: workload.name,
            log,
            before,
            log_bytes: bytes,
            dry_run,
        }));
    }
    Ok(None)
}

fn finish(session: &Session, expired: &[PointId], kept: usize, dry_run: bool, never_verified: Vec<String>) {
    session.report.line(&Line::Expired(Expired {
        points: expired.iter().map(ToString::to_string).collect(),
        kept: number(kept),
        dry_run,
        never_verified,
    }));
    if !dry_run && !expired.is_empty() {
        session.report.say("Their bytes are freed by: mainstay gc");
    }
}

fn verdicts(plan: &ExpirePlan<'_>) -> Vec<Line> {
    let line = |verdict: &Verdict<'_>| {
        Line::Verdict(lines::Verdict {
            point: verdict.point.id.to_string(),
            workload: verdict.point.workload.name.clone(),
            moment: stamp(verdict.point.moment),
            keep: !verdict.why.is_empty(),
            why: verdict.why.iter().map(ToString::to_string).collect(),
        })
    };
    plan.verdicts.iter().map(line).collect()
}

fn policy(keep: &Keep) -> Result<Policy> {
    Ok(Policy {
        last: keep.keep_last,
        hourly: keep.keep_hourly,
        daily: keep.keep_daily,
        weekly: keep.keep_weekly,
        monthly: keep.keep_monthly,
        yearly: keep.keep_yearly,
        within: keep.keep_within.as_deref().map(duration).transpose()?,
        interval: keep.keep_interval.as_deref().map(duration).transpose()?,
        undo: duration(&keep.keep_undo)?,
    })
}
