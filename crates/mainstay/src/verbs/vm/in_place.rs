//! `mainstay vm restore --in-place`.

use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Consistency, Progress};
use mainstay_engine::vm::{
    InPlacePlan, Leave, MachineBackup, UNDO_TAG, backup_machine, plan_in_place, restore_in_place, shut_down,
};

use super::super::Done;
use super::{hosts, restore};
use crate::args::VmRestore;
use crate::inside::Looking;
use crate::report::human::bytes;
use crate::report::lines::{Line, WouldDo};
use crate::report::machines::{MachinePutBack, Written};
use crate::session::Session;

/// What a guest may take to shut down.
const SHUT_DOWN: Duration = Duration::from_secs(300);

pub(super) fn run(arguments: &VmRestore, session: &mut Session) -> Done {
    let scratch = std::env::temp_dir();
    let host = hosts::open(arguments.host.as_deref().unwrap_or_default(), &scratch, session)?;
    let (repository, reader) =
        restore::open(&arguments.point, arguments.image_only, session)?.without_files()?;
    let plan = plan_in_place(&repository, &reader, host.as_ref())?;
    let name = &plan.machine.name;
    if arguments.dry_run {
        show(arguments, session, &plan);
        return Ok(None);
    }
    for left in &plan.left {
        session.report.say(&format!("the disk {left} is not in the point and stays as it is"));
    }
    session.confirm(arguments.yes, &format!("Write over the disks of {name}"))?;
    let began = session.doors.clock.monotonic();
    let progress: Arc<dyn Progress> = session.progress();
    let clock = &session.doors.clock;
    if plan.runs && arguments.stop {
        session.report.say(&format!("{name} is asked to shut down"));
        shut_down(host.as_ref(), &plan.machine.id, SHUT_DOWN, clock.as_ref(), progress.as_ref())?;
    }
    if let Some(undo) = &plan.interrupted {
        session.report.say(&format!("an earlier restore was interrupted; point {undo} takes both back"));
    }
    let looking = Looking::new(&arguments.inside, &mut session.doors)?;
    let request = undo_request(session);
    let clock = &session.doors.clock;
    let take_undo = || {
        let taken = looking.with(|inside| {
            backup_machine(&repository, host.as_ref(), &plan.machine.id, &request, inside, clock, &progress)
        });
        Ok(taken?.point.id)
    };
    let done = restore_in_place(&reader, host.as_ref(), &plan, &take_undo, &progress);
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
        written: written(&plan),
        bytes: done.counts.bytes,
        written_bytes: done.counts.written_bytes,
        started: arguments.start,
        seconds: session.seconds_since(began),
    }));
    Ok(None)
}

/// A point of everything that is there, whatever it holds.
fn undo_request(session: &Session) -> MachineBackup {
    MachineBackup {
        host: session.doors.host.clone(),
        name: None,
        tags: vec![UNDO_TAG.into()],
        want: Consistency::Offline,
        require: true,
        full: false,
        disks: Vec::new(),
        leave: Leave::default(),
        reread_one_in: 0,
        scan_every: 0,
        freeze_limit: Duration::ZERO,
        trim: false,
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

fn show(arguments: &VmRestore, session: &Session, plan: &InPlacePlan) {
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
    for left in &plan.left {
        would(format!("leave the disk {left} as it is: the point does not have it"));
    }
    if arguments.start {
        would(format!("start {}", plan.machine.name));
    }
}
