//! `mainstay vm restore --in-place`.

use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Consistency, Progress};
use mainstay_engine::vm::{
    InPlacePlan, Leave, MachineBackup, Newer, UNDO_TAG, backup_machine, plan_in_place, put_tag,
    restore_in_place, shut_down,
};
use mainstay_repository::{Compression, PointInfo, PointReader};
use mainstay_workloads::vm::Hypervisor;

use super::super::Done;
use super::restore::{self, Opened};
use super::{hosts, newer};
use crate::args::VmRestore;
use crate::report::human::bytes;
use crate::report::lines::{Line, WouldDo};
use crate::report::machines::{MachinePutBack, Written};
use crate::session::Session;

/// What a guest may take to shut down.
const SHUT_DOWN: Duration = Duration::from_secs(300);

pub(super) fn run(arguments: &VmRestore, session: &mut Session) -> Done {
    let scratch = std::env::temp_dir();
    let host = hosts::open(arguments.host.as_deref().unwrap_or_default(), &scratch, session)?;
    let Opened { repository, reader, mut files } =
        restore::open(&arguments.point, arguments.image_only, session)?;
    let plan = plan_in_place(&repository, &reader, host.as_ref())?;
    if let Some(undo) = plan.interrupted.filter(|undo| *undo != plan.point.id) {
        // The interrupted run gave nothing up yet: what it meant counts.
        let points: Vec<_> = repository.points()?.into_iter().filter(|point| point.id != undo).collect();
        files = newer::find(&arguments.point, arguments.image_only, &points, session)?.1;
    }
    session.say_composed(&plan.point, &files, &[]);
    newer::with(&repository, &files, &arguments.inside, session, |newer, session| {
        put_back(arguments, &reader, host.as_ref(), &plan, newer, session)
    })
}

fn put_back(
    arguments: &VmRestore,
    reader: &PointReader,
    host: &dyn Hypervisor,
    plan: &InPlacePlan,
    newer: &Newer<'_>,
    session: &mut Session,
) -> Done {
    let name = &plan.machine.name;
    newer.check(reader, None)?;
    if arguments.dry_run {
        show(arguments, session, plan, newer.files);
        return Ok(None);
    }
    for left in &plan.left {
        session.report.say(&format!("the disk {left} is not in the point and stays as it is"));
    }
    session.confirm(arguments.yes, &format!("Write over the disks of {name}"))?;
    let began = session.doors.clock.monotonic();
    let progress: Arc<dyn Progress> = session.progress();
    if plan.runs && arguments.stop {
        session.report.say(&format!("{name} is asked to shut down"));
        shut_down(host, &plan.machine.id, SHUT_DOWN, newer.clock.as_ref(), progress.as_ref())?;
    }
    if let Some(undo) = &plan.interrupted {
        session.report.say(&format!("an earlier restore was interrupted; point {undo} takes both back"));
    }
    let request = undo_request(session, newer.files);
    let take_undo = || {
        let Newer { repository, inside, clock, .. } = newer;
        let taken = backup_machine(repository, host, &plan.machine.id, &request, inside, clock, &progress);
        Ok(taken?.point.id)
    };
    let done = restore_in_place(reader, host, plan, newer, &take_undo, &progress);
    drop(progress);
    let done = done?;
    if arguments.start {
        host.start(&plan.machine.id)?;
    }
    session.report.line(&Line::MachinePutBack(MachinePutBack {
        point: plan.point.id.to_string(),
        workload: plan.point.workload.name.clone(),
        machine: plan.machine.id.0.clone(),
        host: host.name(),
        undo: done.undo.to_string(),
        written: written(plan),
        bytes: done.counts.bytes,
        written_bytes: done.counts.written_bytes,
        started: arguments.start,
        seconds: session.seconds_since(began),
    }));
    newer::tell(&plan.point.id, newer.files, &done.applied, session)
}

/// A point of everything that is there, whatever it holds. It says which files came in its place.
fn undo_request(session: &Session, files: &[PointInfo]) -> MachineBackup {
    let put = files.iter().map(|point| put_tag(&point.id));
    MachineBackup {
        host: session.doors.host.clone(),
        name: None,
        tags: std::iter::once(UNDO_TAG.to_owned()).chain(put).collect(),
        want: Consistency::Offline,
        require: true,
        full: false,
        disks: Vec::new(),
        leave: Leave::default(),
        reread_one_in: 0,
        scan_every: 0,
        freeze_limit: Duration::ZERO,
        trim: false,
        compression: Compression::Fast,
        jobs: std::thread::available_parallelism().map_or(2, std::num::NonZero::get),
    }
}

fn written(plan: &InPlacePlan) -> Vec<Written> {
    let disks = plan.disks.iter().map(|disk| Written {
        item: disk.item.to_string(),
        path: disk.path.display().to_string(),
        bytes: disk.size,
    });
    disks.collect()
}

fn show(arguments: &VmRestore, session: &Session, plan: &InPlacePlan, files: &[PointInfo]) {
    let would = |what: String| session.report.line(&Line::WouldDo(WouldDo { what }));
    if plan.runs && arguments.stop {
        would(format!("shut {} down", plan.machine.name));
    } else if plan.runs {
        would(format!("refuse, because {} is running: --stop shuts it down first", plan.machine.name));
    }
    if plan.interrupted.is_none() {
        would(format!("take a point of its present disks, tagged {UNDO_TAG}"));
    }
    for disk in &plan.disks {
        let over = disk.path.display();
        would(format!("write what differs of {} ({}) over {over}", disk.item, bytes(disk.size)));
    }
    for point in files {
        would(format!("put the newer files of point {} of {} on them", point.id, point.workload.name));
    }
    for left in &plan.left {
        would(format!("leave the disk {left} as it is: the point does not have it"));
    }
    if arguments.start {
        would(format!("start {}", plan.machine.name));
    }
}
