//! `mainstay vm restore`.

use std::collections::BTreeMap;
use std::sync::Arc;

use mainstay_core::{Code, Error, Progress, Result};
use mainstay_engine::vm::{DiskPlaces, ImageFolder, KIND, MachinePlan, Newer, plan_machine, restore_machine};
use mainstay_repository::{PointInfo, PointReader, Repository};

use super::super::Done;
use super::{in_place, newer, recreate};
use crate::args::VmRestore;
use crate::report::human::bytes;
use crate::report::lines::{Line, WouldDo};
use crate::report::machines::{MachineRestored, Written};
use crate::session::Session;

pub(super) fn run(arguments: &VmRestore, session: &mut Session) -> Done {
    if arguments.in_place {
        return in_place::run(arguments, session);
    }
    if arguments.new_name.is_some() {
        return recreate::run(arguments, session);
    }
    let places = places(arguments, session)?;
    let Opened { repository, reader, files } = open(&arguments.point, arguments.image_only, session)?;
    newer::with(&repository, &files, &arguments.inside, session, |newer, session| {
        write(arguments, &reader, &places, newer, session)
    })
}

fn write(
    arguments: &VmRestore,
    reader: &PointReader,
    places: &DiskPlaces,
    newer: &Newer<'_>,
    session: &mut Session,
) -> Done {
    let plan = plan_machine(reader, places)?;
    newer.check(reader, Some(&plan))?;
    if arguments.dry_run {
        show(session, &plan);
        return Ok(None);
    }
    if plan.writes_over_devices() {
        let devices: Vec<String> = plan.goals.iter().map(|goal| goal.path.display().to_string()).collect();
        session.confirm(arguments.yes, &format!("Write over everything on {}", devices.join(", ")))?;
    }
    let began = session.doors.clock.monotonic();
    let progress: Arc<dyn Progress> = session.progress();
    let jobs = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let done = restore_machine(reader, &plan, jobs, &progress);
    drop(progress);
    let counts = done?;
    session.report.line(&Line::MachineRestored(MachineRestored {
        point: plan.point.id.to_string(),
        workload: plan.point.workload.name.clone(),
        written: written(&plan),
        bytes: counts.bytes,
        written_bytes: counts.written_bytes,
        seconds: session.seconds_since(began),
    }));
    let applied = newer::apply(newer, &plan, session)?;
    newer::tell(&plan.point.id, newer.files, &applied, session)
}

/// The point of a machine, and those of newer files that belong on its disks.
pub(super) struct Opened {
    pub(super) repository: Repository,
    pub(super) reader: PointReader,
    pub(super) files: Vec<PointInfo>,
}

pub(super) fn open(text: &str, image_only: bool, session: &mut Session) -> Result<Opened> {
    let repository = session.open()?;
    let points = repository.points()?;
    let (point, files) = find(text, image_only, &points, session)?;
    session.say_composed(&point, &files, &[]);
    let reader = repository.read(&point.id)?;
    Ok(Opened { repository, reader, files })
}

/// Finds the point of a machine, and those of newer files.
pub(super) fn find(
    text: &str,
    image_only: bool,
    points: &[PointInfo],
    session: &Session,
) -> Result<(PointInfo, Vec<PointInfo>)> {
    let (point, files) = newer::find(text, image_only, points, session)?;
    if point.workload.kind.0 != KIND {
        let what = format!("point {} of {} is not of a machine", point.id, point.workload.name);
        return Err(Error::new(Code::Usage, what).hint("mainstay restore brings files back"));
    }
    Ok((point, files))
}

fn places(arguments: &VmRestore, session: &Session) -> Result<DiskPlaces> {
    let directory = &session.doors.directory;
    if let Some(to) = &arguments.to {
        let folder = ImageFolder::new(directory.join(to));
        return Ok(DiskPlaces::Directory(ImageFolder { format: arguments.format.into(), ..folder }));
    }
    let mut devices = BTreeMap::new();
    for text in &arguments.disk {
        let Some((name, device)) = text.split_once('=') else {
            return Err(Error::new(Code::Usage, format!("{text:?} does not say which disk goes where"))
                .hint("write it as in --disk vda=/dev/sdb"));
        };
        devices.insert(name.to_owned(), directory.join(device));
    }
    Ok(DiskPlaces::Devices(devices))
}

fn written(plan: &MachinePlan) -> Vec<Written> {
    let goals = plan.goals.iter().map(|goal| Written {
        item: goal.item.to_string(),
        path: goal.path.display().to_string(),
        bytes: goal.size,
    });
    goals.collect()
}

fn show(session: &Session, plan: &MachinePlan) {
    for goal in &plan.goals {
        let over = if goal.is_device { "over the device " } else { "" };
        let what = format!("write {} ({}) to {over}{}", goal.item, bytes(goal.size), goal.path.display());
        session.report.line(&Line::WouldDo(WouldDo { what }));
    }
}
