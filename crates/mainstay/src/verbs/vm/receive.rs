//! `mainstay vm receive`.

use mainstay_core::Consistency;
use mainstay_engine::vm::random_id;
use mainstay_workloads::vm::{MachineId, Owner, Received, SnapshotRequest, Stage};

use super::super::{Done, duration};
use super::{backup, hosts};
use crate::args::VmReceive;
use crate::report::lines::Line;
use crate::report::machines;
use crate::session::Session;

pub(super) fn run(arguments: &VmReceive, session: &mut Session) -> Done {
    let began = session.doors.clock.monotonic();
    let scratch = match &arguments.how.scratch {
        Some(directory) => session.doors.directory.join(directory),
        None => std::env::temp_dir(),
    };
    let host = hosts::open_qemu(&arguments.host, &scratch, session)?;
    let directory = session.doors.directory.join(&arguments.stage);
    let stage = Stage::new(directory.clone());
    let want = backup::wanted(arguments.how.consistency);
    let request = SnapshotRequest {
        want,
        hooked: want == Consistency::Application,
        scan_every: arguments.how.scan_every,
        freeze_limit: duration(&arguments.how.freeze_limit)?,
        trim: arguments.how.trim,
        // Of the first copy; the later ones know whose they are.
        ..SnapshotRequest::new(Owner { repository: random_id()?, workload: random_id()? }, random_id()?)
    };
    let listen = arguments.listen.parse()?;
    let progress = session.progress();
    let machine = MachineId(arguments.machine.clone());
    let received = host.push(&machine, &stage, &listen, &request, progress.as_ref());
    drop(progress);
    let Received { name, reached, frozen, disks, bytes, notes } = received?;
    for note in &notes {
        session.report.say(note);
    }
    session.report.line(&Line::MachineReceived(machines::MachineReceived {
        machine: name,
        stage: directory.to_string_lossy().into_owned(),
        consistency: reached.name().to_owned(),
        frozen_milliseconds: u64::try_from(frozen.as_millis()).unwrap_or(u64::MAX),
        disks: disks.into_iter().map(backup::shown).collect(),
        received_bytes: bytes,
        seconds: session.seconds_since(began),
        notes,
    }));
    Ok(None)
}
