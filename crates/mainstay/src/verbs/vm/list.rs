//! `mainstay vm list` and `vm ignore`: what is on the hosts, and what is to become of it.

use std::collections::BTreeMap;

use mainstay_core::{Code, Error, Id16, Result, Time};
use mainstay_engine::address::parse_time;
use mainstay_engine::vm::{KIND, UNDO_TAG, machine_of, repository_mark};
use mainstay_repository::{PointInfo, Repository};
use mainstay_workloads::vm::sprawl::{
    Decided, Finding, Inventory, Pattern, PointsSeen, Protect, Row, Rules, Standing, Subject, sprawl,
};
use mainstay_workloads::vm::{Hypervisor, MachineId, MachineState, MachineSummary, Marks, marks_of};

use super::super::{Done, duration, would};
use super::hosts;
use crate::args::{VmIgnore, VmList};
use crate::report::lines::{Line, stamp};
use crate::report::{machines, sprawl as found};
use crate::session::Session;

pub(super) fn run(arguments: &VmList, session: &mut Session) -> Done {
    let scratch = std::env::temp_dir();
    let hosts = arguments.host.iter().map(|host| hosts::open(host, &scratch, session));
    let hosts: Vec<Box<dyn Hypervisor>> = hosts.collect::<Result<_>>()?;
    let repository = session.open()?;
    let points = repository.points()?;
    let mut inventory = Inventory { points: points_seen(&points), ..Inventory::default() };
    for host in &hosts {
        inventory.add_host(host.as_ref())?;
    }
    for directory in &arguments.image_dir {
        inventory.add_folder(&session.doors.directory.join(directory))?;
    }
    let rows = sprawl(&inventory, &rules(arguments, &repository)?, session.now());
    let machines = inventory.machines.iter();
    let machines: Vec<Line> =
        machines.filter_map(|(host, seen)| machine(host, seen, &rows, &points)).map(Line::Machine).collect();
    session.report.table(&machines);
    let findings: Vec<Line> = rows.iter().filter_map(finding).map(Line::Finding).collect();
    if !machines.is_empty() && !findings.is_empty() && !session.report.json() {
        session.report.raw(b"\n");
    }
    session.report.table(&findings);
    let undecided = rows.iter().any(|row| row.standing == Standing::Undecided);
    Ok((arguments.check && undecided).then_some(Code::Overdue))
}

/// What the repository has of each machine: the newest point of each workload.
fn points_seen(points: &[PointInfo]) -> Vec<PointsSeen> {
    let mut newest: BTreeMap<Id16, &PointInfo> = BTreeMap::new();
    let captured =
        |point: &&PointInfo| point.workload.kind.0 == KIND && !point.tags.iter().any(|tag| tag == UNDO_TAG);
    for point in points.iter().filter(captured) {
        newest.insert(point.workload.id, point);
    }
    let seen = |point: &&PointInfo| {
        let marks = Marks::from_position(&point.position);
        let bitmaps =
            marks.iter().flat_map(|marks| marks.disks.values()).filter_map(|disk| disk.bitmap.clone());
        Some(PointsSeen {
            workload: point.workload.name.clone(),
            machine: MachineId(machine_of(point)?.to_owned()),
            newest: point.moment,
            marks: bitmaps.collect(),
        })
    };
    newest.values().filter_map(seen).collect()
}

fn rules(arguments: &VmList, repository: &Repository) -> Result<Rules> {
    let every = arguments.max_age.as_deref().map(duration).transpose()?;
    let everything = |at_least_every| Ok(Protect { which: Pattern::new("*")?, at_least_every });
    let decided = repository.decisions();
    let decided = decided.iter().filter_map(|decision| Decided::from_text(&decision.text)?.ignore());
    Ok(Rules {
        protect: every.map(everything).transpose()?.into_iter().collect(),
        ignore: decided.collect(),
        stale_after: duration(&arguments.stale_after)?,
        ours: marks_of(&repository_mark(repository)),
    })
}

fn machine(
    host: &str,
    seen: &MachineSummary,
    rows: &[Row],
    points: &[PointInfo],
) -> Option<machines::Machine> {
    let is_it = |row: &&Row| match &row.subject {
        Subject::Machine { host: on, id, name } => on == host && *id == seen.id && *name == seen.name,
        _ => false,
    };
    let protection = rows.iter().filter(is_it).find_map(|row| Some((protection(&row.finding)?, row)));
    let (protection, row) = protection?;
    let is_of = |point: &&PointInfo| point.workload.kind.0 == KIND && machine_of(point) == Some(&*seen.id.0);
    let last = points.iter().rfind(is_of);
    Some(machines::Machine {
        id: seen.id.0.clone(),
        name: seen.name.clone(),
        host: host.to_owned(),
        state: state(seen.state).to_owned(),
        bytes: seen.disks.iter().filter_map(|disk| disk.size).sum(),
        disks: seen.disks.iter().map(|disk| disk.name.clone()).collect(),
        workload: last.map(|point| point.workload.name.clone()),
        last_point: last.map(|point| point.id.to_string()),
        last_backed_up: last.map(|point| stamp(point.moment)),
        protection: protection.to_owned(),
        standing: standing(&row.standing),
    })
}

/// What a finding says of a machine's protection, if it does.
fn protection(finding: &Finding) -> Option<&'static str> {
    match finding {
        Finding::Protected { .. } => Some("protected"),
        Finding::Unprotected => Some("unprotected"),
        Finding::Overdue { .. } => Some("overdue"),
        _ => None,
    }
}

/// Everything but the protection of machines.
fn finding(row: &Row) -> Option<found::Finding> {
    let (mut ours, mut bytes, mut since, mut with) = (None, None, None, Vec::new());
    let finding = match &row.finding {
        Finding::Protected { .. } | Finding::Unprotected | Finding::Overdue { .. } => return None,
        Finding::OrphanedImage { bytes: occupied } => {
            bytes = Some(*occupied);
            "orphaned-image"
        }
        Finding::BrokenChain => "broken-chain",
        Finding::StaleSnapshot { taken } => {
            since = Some(*taken);
            "stale-snapshot"
        }
        Finding::StaleBitmap { ours: own } => {
            ours = Some(*own);
            "stale-bitmap"
        }
        Finding::Clone { with: others } => {
            with.clone_from(others);
            "clone"
        }
        Finding::Gone { newest } => {
            since = Some(*newest);
            "gone"
        }
    };
    let (subject, name, host, machine) = match row.subject.clone() {
        Subject::Machine { host, name, .. } => ("machine", name, Some(host), None),
        Subject::Image { path } => ("image", path.to_string_lossy().into_owned(), None, None),
        Subject::Snapshot { host, machine, name } => ("snapshot", name, Some(host), Some(machine)),
        Subject::Points { workload, machine } => ("points", workload, None, Some(machine.0)),
    };
    Some(found::Finding {
        finding: finding.to_owned(),
        subject: subject.to_owned(),
        name,
        host,
        machine,
        ours,
        bytes,
        since: since.map(|since| stamp(Time::from_seconds(since))),
        with,
        standing: standing(&row.standing),
    })
}

fn standing(standing: &Standing) -> found::Standing {
    let (word, decided) = match standing {
        Standing::Protected => ("protected", None),
        Standing::Undecided => ("undecided", None),
        Standing::Ignored { who, why, until } => ("ignored", Some((who, why, until))),
    };
    found::Standing {
        standing: word.to_owned(),
        who: decided.map(|(who, ..)| who.clone()),
        why: decided.map(|(_, why, _)| why.clone()),
        until: decided.and_then(|(.., until)| until.map(|until| stamp(Time::from_seconds(until)))),
    }
}

fn state(state: MachineState) -> &'static str {
    match state {
        MachineState::Running => "running",
        MachineState::Paused => "paused",
        MachineState::ShutOff => "shut off",
        MachineState::Saved => "saved",
        MachineState::Crashed => "crashed",
        MachineState::Unknown => "unknown",
    }
}

pub(super) fn ignore(arguments: &VmIgnore, session: &mut Session) -> Done {
    let host = match &arguments.host {
        Some(host) => Some(hosts::open(host, &std::env::temp_dir(), session)?.name()),
        None => None,
    };
    Pattern::new(&arguments.name)?;
    let repository = session.open()?;
    let decisions = repository.decisions();
    let same = decisions.iter().find_map(|decision| {
        let decided = Decided::from_text(&decision.text)?;
        let Decided::Ignore { which, host: on, .. } = &decided;
        (*which == arguments.name && *on == host).then_some((decision.id, decided))
    });
    let (instead, text, decided) = match (arguments.again, same) {
        (true, None) => return Err(nothing_to_take_back(&arguments.name, &repository)),
        (true, Some((id, decided))) => (Some(id), String::new(), decided),
        (false, same) => {
            let decided = decide(arguments, host, session)?;
            (same.map(|(id, _)| id), decided.to_text()?, decided)
        }
    };
    let Decided::Ignore { which, host, who, why, until } = decided;
    if arguments.dry_run {
        let what = if arguments.again { "take back that" } else { "decide that" };
        return would(session, &format!("{what} {which} is ignored: {why}"));
    }
    repository.decide(instead, &text)?;
    session.report.line(&Line::Decision(found::Decision {
        name: which,
        host,
        who,
        why,
        until: until.map(|until| stamp(Time::from_seconds(until))),
        again: arguments.again,
    }));
    Ok(None)
}

fn decide(arguments: &VmIgnore, host: Option<String>, session: &Session) -> Result<Decided> {
    let why = arguments.why.clone().unwrap_or_default();
    if why.trim().is_empty() {
        return Err(Error::new(Code::Usage, "a decision needs a reason").hint("say it with --why"));
    }
    let until = arguments.until.as_deref().map(|text| {
        parse_time(text, &session.zone).ok_or_else(|| {
            Error::new(Code::Usage, format!("{text:?} is not a time"))
                .hint("write it as in 2027-06-30 or 2027-06-30T18:00")
        })
    });
    let who = arguments.by.clone().or_else(|| session.doors.environment.user.clone());
    let who = who.unwrap_or_else(|| format!("somebody on {}", session.doors.host));
    let until = until.transpose()?.map(Time::seconds);
    Ok(Decided::Ignore { which: arguments.name.clone(), host, who, why, until })
}

fn nothing_to_take_back(name: &str, repository: &Repository) -> Error {
    let known = repository.decisions();
    let known = known.iter().filter_map(|decision| Decided::from_text(&decision.text));
    let known: Vec<String> = known
        .map(|Decided::Ignore { which, host, .. }| match host {
            Some(host) => format!("{which} on {host}"),
            None => which,
        })
        .collect();
    let error = Error::new(Code::NotFound, format!("nobody decided to ignore {name:?} there"));
    match known.as_slice() {
        [] => error.hint("nothing is ignored"),
        known => error.hint(format!("what is ignored: {}", known.join(", "))),
    }
}
