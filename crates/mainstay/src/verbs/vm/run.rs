//! `mainstay vm run` and `vm prove`.

use std::path::PathBuf;

use mainstay_core::{Code, Counts, Error, Event, Progress as _, Result};
use mainstay_engine::vm::{Instant, KIND, ProofRequest, prove as carry_out};
use mainstay_repository::{PointReader, Repository};
use mainstay_workloads::vm::{Accelerator, EmulatorPlan};

use super::super::{Done, duration, number};
use crate::args::{Accel, Shape, VmProve, VmRun};
use crate::report::lines::Line;
use crate::report::machines::{MachineHome, MachineRunning, Proven};
use crate::session::Session;

pub(super) fn run(arguments: &VmRun, session: &mut Session) -> Done {
    let limit = duration(&arguments.wait)?;
    let directory = session.doors.directory.join(&arguments.dir);
    let request = request(&arguments.shape, directory.clone(), arguments.network);
    let (_repository, reader) = open(session, &arguments.point)?;
    let began = session.doors.clock.monotonic();
    let mut running = Instant::start(&reader, &request)?;
    let progress = session.progress();
    let answered = running.emulator.wait_for_agent(limit, progress.as_ref())?;
    let point = reader.info();
    session.report.line(&Line::MachineRunning(MachineRunning {
        point: point.id.to_string(),
        workload: point.workload.name.clone(),
        seconds: answered.then(|| session.seconds_since(began)),
        bytes_read: running.read().bytes_read,
        directory: directory.display().to_string(),
        process: running.emulator.pid(),
    }));
    if arguments.home {
        let began = session.doors.clock.monotonic();
        running.emulator.stream_home(progress.as_ref(), &mut |bytes, all| {
            progress.event(&Event::Expect { items: 0, bytes: all, complete: true });
            progress.event(&Event::Done(Counts { bytes, ..Counts::default() }));
        })?;
        session.report.line(&Line::MachineHome(MachineHome {
            point: point.id.to_string(),
            directory: directory.display().to_string(),
            seconds: session.seconds_since(began),
        }));
    }
    drop(progress);
    session.report.say("it runs until it is shut down; Ctrl-C switches it off");
    running.emulator.wait(session.progress().as_ref())?;
    Ok(None)
}

pub(super) fn prove(arguments: &VmProve, session: &mut Session) -> Done {
    let limit = duration(&arguments.wait)?;
    let place = tempdir()?;
    let request = ProofRequest {
        run: request(&arguments.shape, place.0.clone(), false),
        limit,
        checks: arguments.check.clone(),
        screenshot: arguments.screenshot.as_ref().map(|path| session.doors.directory.join(path)),
    };
    let (repository, reader) = open(session, &arguments.point)?;
    let progress = session.progress();
    let proof = carry_out(&repository, &reader, &request, &session.doors.clock, progress.as_ref());
    drop(progress);
    let proof = proof?;
    if let Some(why) = &proof.no_screenshot {
        session.report.say(&format!("there is no screenshot: {why}"));
    }
    session.report.line(&Line::Proven(Proven {
        point: reader.info().id.to_string(),
        workload: reader.info().workload.name.clone(),
        boot_seconds: proof.booted.as_secs_f64(),
        seconds: proof.seconds,
        checks: number(proof.checks),
        bytes_read: proof.bytes_read,
    }));
    Ok(None)
}

fn open(session: &mut Session, text: &str) -> Result<(Repository, PointReader)> {
    let repository = session.open()?;
    let point = session.point(text, &repository.points()?)?;
    if point.workload.kind.0 != KIND {
        let what = format!("point {} of {} is not of a machine", point.id, point.workload.name);
        return Err(Error::new(Code::Usage, what).hint("points of machines are made by mainstay vm backup"));
    }
    let reader = repository.read(&point.id)?;
    Ok((repository, reader))
}

fn request(shape: &Shape, directory: PathBuf, network: bool) -> EmulatorPlan {
    EmulatorPlan {
        directory,
        memory: shape.memory.map(|mebibytes| mebibytes << 20),
        cpus: shape.cpus,
        bus: shape.bus.clone(),
        network,
        accelerator: match shape.accel {
            Accel::Auto => Accelerator::Auto,
            Accel::Kvm => Accelerator::Kvm,
            Accel::Tcg => Accelerator::Tcg,
        },
        options: shape.qemu.clone(),
    }
}

/// A directory of this run's own, short enough for the paths of sockets. Removed in the end.
struct Scratch(PathBuf);

fn tempdir() -> Result<Scratch> {
    let mut last = None;
    for number in 0..1000 {
        let path = std::env::temp_dir().join(format!("mainstay-prove-{}-{number}", std::process::id()));
        match std::fs::create_dir(&path) {
            Ok(()) => return Ok(Scratch(path)),
            Err(error) => last = Some(error),
        }
    }
    let error = last.unwrap_or_else(|| std::io::ErrorKind::Other.into());
    Err(Error::io("cannot make a directory to run the machine in", error))
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _left = std::fs::remove_dir_all(&self.0);
    }
}
