//! `mainstay vm restore --as`.

use std::sync::Arc;
use std::time::Duration;

use mainstay_core::Progress;
use mainstay_engine::vm::ImageFolder;
use mainstay_engine::vm::recover::{Record, Recovered, Recovery, Wait, check_recovery, recover_machine};
use mainstay_workloads::vm::{Hypervisor, Identity, Machine, MachineDisk, Shape};

use super::super::Done;
use super::restore::{self, Opened};
use super::{hosts, newer};
use crate::args::VmRestore;
use crate::report::lines::{Line, WouldDo};
use crate::report::machines::MachineRecovered;
use crate::session::Session;

pub(super) fn run(arguments: &VmRestore, session: &mut Session) -> Done {
    let scratch = std::env::temp_dir();
    let host = hosts::open(arguments.host.as_deref().unwrap_or_default(), &scratch, session)?;
    let directory = session.doors.directory.join(arguments.to.as_deref().unwrap_or_else(|| "".as_ref()));
    let Opened { repository, mut reader, mut files } =
        restore::open(&arguments.point, arguments.image_only, session)?;
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
    // What was begun goes on with its own points, whatever `latest` is by now.
    let named = reader.info().id;
    let begun = Record::begun(&directory, &recovery.asked, || Ok(named))?;
    if let Some(begun) = &begun {
        reader = repository.read(&begun.point()?)?;
        files = begun.files(&repository.points()?)?;
    }
    session.say_composed(reader.info(), &files, &[]);
    newer::with(&repository, &files, &arguments.inside, session, |newer, session| {
        if arguments.dry_run {
            let what = match begun {
                Some(_) => format!("go on with the restore that was begun in {}", directory.display()),
                None => {
                    let machine = check_recovery(&reader, &recovery, host.as_ref(), newer)?;
                    would(&machine, &recovery, host.as_ref())
                }
            };
            session.report.line(&Line::WouldDo(WouldDo { what }));
            return Ok(None);
        }
        let progress: Arc<dyn Progress> = session.progress();
        let jobs = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let done = recover_machine(&reader, &recovery, host.as_ref(), newer, jobs, &progress);
        drop(progress);
        let done = done?;
        session.report.line(&Line::MachineRecovered(line(&done, host.as_ref())));
        tell_files(&done, session)
    })
}

/// Tells what came of newer files, if this run put them on the disks.
pub(super) fn tell_files(done: &Recovered, session: &Session) -> Done {
    let Some(applied) = &done.applied else { return Ok(None) };
    newer::tell(&done.point, &done.files, applied, session)
}

fn would(machine: &Machine, recovery: &Recovery, host: &dyn Hypervisor) -> String {
    let image = |disk: &MachineDisk| recovery.folder.image(&disk.name).display().to_string();
    let disks: Vec<String> = machine.disks.iter().map(image).collect();
    format!("write {} and define {} on {}", disks.join(", "), machine.name, host.name())
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
