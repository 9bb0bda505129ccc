//! `mainstay vm backup`.

use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Code, Consistency, Error, Progress, Result};
use mainstay_engine::vm::{Leave, MachineBackup, MachinePoint, backup_machine, longest_unproven};
use mainstay_repository::{Compression, PointInfo, Repository};
use mainstay_workloads::vm::{DiskMode, DiskSnapshot, Hypervisor, MachineId};

use super::super::{Done, backup as files, check_tag, duration};
use super::hosts;
use super::run::{Proof, prove_one};
use crate::args::{Left, Level, Shape, VmBackup};
use crate::inside::Looking;
use crate::report::lines::{self, Line, Totals};
use crate::report::machines;
use crate::session::Session;

pub(super) fn run(arguments: &VmBackup, session: &mut Session) -> Done {
    let places = session.places()?;
    let share = arguments.prove.map(|percent| Ok((percent, duration(&arguments.prove_wait)?))).transpose()?;
    let request = request(arguments, session)?;
    let scratch = match &arguments.how.scratch {
        Some(directory) => session.doors.directory.join(directory),
        None => std::env::temp_dir(),
    };
    let hosts = arguments.host.iter().map(|host| hosts::open(host, &scratch, session));
    let hosts: Vec<Box<dyn Hypervisor>> = hosts.collect::<Result<_>>()?;
    let chosen = choose(arguments, &hosts)?;
    let repository = files::open(session, &places, false)?;
    let looking = Looking::new(&arguments.inside, &mut session.doors)?;
    let (mut failed, mut made) = (0, Vec::new());
    for (host, machine, name) in &chosen {
        session.check_cancelled()?;
        match one(&repository, *host, machine, &request, &looking, session) {
            Ok(point) => made.push(point),
            Err(error) if error.code() == Code::Cancelled || chosen.len() == 1 => return Err(error),
            Err(error) => {
                failed += 1;
                session.report.say(&format!("{name}: {}", error.chain().join(": ")));
            }
        }
    }
    let proven = share.map_or(Ok(()), |share| prove(&repository, made, share, session));
    if failed == 0 {
        return proven.map(|()| None);
    }
    let what = format!("{failed} of {} machines were not backed up", chosen.len());
    Err(Error::new(Code::Io, what).hint("the lines above say why; the others have their points"))
}

/// Starts a share of the new points and says how each of them did.
fn prove(
    repository: &Repository,
    made: Vec<PointInfo>,
    (percent, limit): (u8, Duration),
    session: &Session,
) -> Result<()> {
    let made = longest_unproven(made, &repository.points()?, percent);
    let mut failed = 0;
    for point in &made {
        session.check_cancelled()?;
        let reader = repository.read(&point.id)?;
        let wanted = Proof { limit, checks: Vec::new(), screenshot: None };
        match prove_one(repository, &reader, &Shape::default(), wanted, session) {
            Ok(()) => {}
            Err(error) if error.code() == Code::Cancelled => return Err(error),
            Err(error) => {
                failed += 1;
                session.report.line(&Line::Unproven(machines::Unproven {
                    point: point.id.to_string(),
                    workload: point.workload.name.clone(),
                    why: error.chain().join(": "),
                    hint: error.next_step().map(str::to_owned),
                }));
            }
        }
    }
    if failed == 0 {
        return Ok(());
    }
    let what = format!("{failed} of {} new points are not proven", made.len());
    Err(Error::new(Code::Refused, what).hint("they are there all the same; the lines above say why"))
}

/// The machines meant, each with its host and its name.
fn choose<'a>(
    arguments: &VmBackup,
    hosts: &'a [Box<dyn Hypervisor>],
) -> Result<Vec<(&'a dyn Hypervisor, MachineId, String)>> {
    let mut chosen = Vec::new();
    let mut known = Vec::new();
    for host in hosts {
        let host = host.as_ref();
        let machines = host.names()?;
        let wanted = arguments.machines.iter().filter_map(|name| hosts::find(name, &machines));
        let all = machines.iter().filter(|_| arguments.all);
        chosen.extend(all.chain(wanted).map(|(id, name)| (host, id.clone(), name.clone())));
        known.extend(machines.into_iter().map(|(_, name)| name));
    }
    let found = |wanted: &&String| {
        chosen.iter().any(|(_, id, name)| name == *wanted || id.0.eq_ignore_ascii_case(wanted))
    };
    if let Some(missing) = arguments.machines.iter().find(|name| !found(name)) {
        let error = Error::new(Code::NotFound, format!("there is no machine {missing:?}"));
        let hint = if known.is_empty() {
            "the host has none".to_owned()
        } else {
            format!("there is {}", known.join(", "))
        };
        return Err(error.hint(hint));
    }
    if chosen.is_empty() {
        return Err(Error::new(Code::NotFound, "the hosts have no machines"));
    }
    Ok(chosen)
}

fn request(arguments: &VmBackup, session: &Session) -> Result<MachineBackup> {
    arguments.tag.iter().try_for_each(|tag| check_tag(tag))?;
    if let Some(name) = &arguments.name {
        files::check_name(name)?;
    }
    Ok(MachineBackup {
        host: session.doors.host.clone(),
        name: arguments.name.clone(),
        tags: arguments.tag.clone(),
        want: wanted(arguments.how.consistency),
        require: arguments.require,
        full: arguments.full,
        disks: arguments.disk.clone(),
        leave: Leave {
            free: arguments.leave.contains(&Left::Free),
            swap: arguments.leave.contains(&Left::Swap),
        },
        reread_one_in: arguments.reread,
        scan_every: arguments.how.scan_every,
        freeze_limit: duration(&arguments.how.freeze_limit)?,
        trim: arguments.how.trim,
        compression: files::compression(arguments.compression, Compression::Fast),
        jobs: std::thread::available_parallelism().map_or(2, std::num::NonZero::get),
    })
}

pub(super) fn wanted(level: Level) -> Consistency {
    match level {
        Level::Crash => Consistency::Crash,
        Level::FileSystem => Consistency::FileSystem,
        Level::Application => Consistency::Application,
        Level::Offline => Consistency::Offline,
    }
}

/// As a line shows it.
pub(super) fn shown(disk: DiskSnapshot) -> machines::CapturedDisk {
    machines::CapturedDisk {
        why: match &disk.mode {
            DiskMode::Scan { why } => Some(why.clone()),
            _ => None,
        },
        mode: disk.mode.name().to_owned(),
        name: disk.name,
        bytes: disk.size,
        tracked: disk.tracked,
    }
}

fn one(
    repository: &Repository,
    host: &dyn Hypervisor,
    machine: &MachineId,
    request: &MachineBackup,
    looking: &Looking,
    session: &Session,
) -> Result<PointInfo> {
    let began = session.doors.clock.monotonic();
    let progress: Arc<dyn Progress> = session.progress();
    let clock = &session.doors.clock;
    let done =
        looking.with(|inside| backup_machine(repository, host, machine, request, inside, clock, &progress));
    drop(progress);
    let MachinePoint { point, disks, frozen, notes } = done?;
    for note in &notes {
        session.report.say(note);
    }
    let disks = disks.into_iter().map(shown);
    session.report.line(&Line::MachineCaptured(machines::MachineCaptured {
        point: point.id.to_string(),
        workload: point.workload.name.clone(),
        machine: machine.0.clone(),
        host: host.name(),
        consistency: point.consistency.name().to_owned(),
        frozen_milliseconds: u64::try_from(frozen.as_millis()).unwrap_or(u64::MAX),
        disks: disks.collect(),
        notes,
    }));
    session.report.line(&Line::BackedUp(lines::BackedUp {
        point: point.id.to_string(),
        workload: point.workload.name.clone(),
        host: point.host.clone(),
        roots: lines::Roots::of(&point.roots),
        tags: request.tags.clone(),
        counts: Totals::from(&point.counts),
        seconds: session.seconds_since(began),
    }));
    Ok(point)
}
