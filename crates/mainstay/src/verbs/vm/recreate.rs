//! `mainstay vm restore --as`.

use std::sync::Arc;
use std::time::Duration;

use mainstay_core::Progress;
use mainstay_engine::vm::ImageFolder;
use mainstay_engine::vm::recover::{Record, Recovered, Recovery, Wait, check_recovery, recover_machine};
use mainstay_workloads::vm::{Hypervisor, Identity, Shape};

use super::super::Done;
use super::{hosts, restore};
use crate::args::VmRestore;
use crate::report::lines::{Line, WouldDo};
use crate::report::machines::MachineRecovered;
use crate::session::Session;

pub(super) fn run(arguments: &VmRestore, session: &mut Session) -> Done {
    let scratch = std::env::temp_dir();
    let host = hosts::open(arguments.host.as_deref().unwrap_or_default(), &scratch, session)?;
    let directory = session.doors.directory.join(arguments.to.as_deref().unwrap_or_else(|| "".as_ref()));
    let (repository, mut reader) =
        restore::open(&arguments.point, arguments.image_only, session)?.without_files()?;
    let recovery = Recovery {
        asked: arguments.point.clone(),
        shape: Shape {
            name: arguments.new_name.clone(),
            identity: if arguments.same_identity { Identity::Same } else { Identity::New },
            ..Shape::default()
        },
        folder: ImageFolder { format: arguments.format.into(), ..ImageFolder::new(directory.clone()) },
        start: arguments.start,
        wait: Wait::Nothing,
        limit: Duration::ZERO,
        checks: Vec::new(),
    };
    // What was begun goes on with its own point, whatever `latest` is by now.
    let named = reader.info().id;
    if let Some(begun) = Record::begun(&directory, &recovery.asked, || Ok(named))? {
        reader = repository.read(&begun.point()?)?;
    } else {
        let machine = check_recovery(&reader, &recovery, host.as_ref())?;
        if arguments.dry_run {
            let disks: Vec<String> = machine
                .disks
                .iter()
                .map(|disk| recovery.folder.image(&disk.name).display().to_string())
                .collect();
            let what = format!("write {} and define {} on {}", disks.join(", "), machine.name, host.name());
            session.report.line(&Line::WouldDo(WouldDo { what }));
            return Ok(None);
        }
    }
    if arguments.dry_run {
        let what = format!("go on with the restore that was begun in {}", directory.display());
        session.report.line(&Line::WouldDo(WouldDo { what }));
        return Ok(None);
    }
    let progress: Arc<dyn Progress> = session.progress();
    let jobs = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let clock = session.doors.clock.as_ref();
    let done = recover_machine(&reader, &recovery, host.as_ref(), jobs, clock, &progress);
    drop(progress);
    session.report.line(&Line::MachineRecovered(line(&done?, host.as_ref())));
    Ok(None)
}

pub(super) fn line(done: &Recovered, host: &dyn Hypervisor) -> MachineRecovered {
    MachineRecovered {
        point: done.point.to_string(),
        workload: done.workload.clone(),
        machine: done.id.0.clone(),
        name: done.name.clone(),
        host: host.name(),
        directory: done.directory.display().to_string(),
        was_complete: done.was_complete,
        started: done.started,
        write_seconds: done.times.write,
        define_seconds: done.times.define,
        start_seconds: done.times.start,
        check_seconds: done.times.checks,
        seconds: done.times.total(),
        bytes: done.bytes,
        written_bytes: done.written_bytes,
    }
}
