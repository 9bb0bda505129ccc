//! `mainstay vm run` and `vm prove`.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::Duration;

use mainstay_core::{Code, Counts, Error, Event, Progress as _, Result};
use mainstay_engine::vm::{Instant, KIND, ProofRequest, is_whole, prove as carry_out};
use mainstay_repository::{PointReader, Repository};
use mainstay_workloads::vm::{Accelerator, Emulator, EmulatorPlan, Place};

use super::super::{Done, duration, number};
use crate::args::{Accel, Shape, VmProve, VmRun};
use crate::report::lines::Line;
use crate::report::machines::{MachineHome, MachineRunning, Proven};
use crate::session::Session;

/// How often somebody looks whether the machine still runs.
const LOOK: Duration = Duration::from_millis(200);

pub(super) fn run(arguments: &VmRun, session: &mut Session) -> Done {
    let limit = duration(&arguments.wait)?;
    let directory = session.doors.directory.join(&arguments.dir);
    let plan = request(&arguments.shape, directory.clone(), arguments.network);
    let began = session.doors.clock.monotonic();
    let (running, workload, point) = start(arguments, &plan, session)?;
    let progress = session.progress();
    let mut ended = match running.emulator.wait_for_agent(limit, progress.as_ref()) {
        Ok(answered) => {
            session.report.line(&Line::MachineRunning(MachineRunning {
                point: point.clone(),
                workload,
                seconds: answered.then(|| session.seconds_since(began)),
                bytes_read: running.cost().bytes_read,
                bytes_fetched: running.cost().bytes_fetched,
                directory: directory.display().to_string(),
                process: running.emulator.pid(),
                joined: running.emulator.is_joined(),
            }));
            Ok(())
        }
        Err(error) => Err(error),
    };
    if ended.is_ok() && arguments.home {
        let began = session.doors.clock.monotonic();
        ended = running.emulator.stream_home(progress.as_ref(), &mut |bytes, all| {
            progress.event(&Event::Expect { items: 0, bytes: all, complete: true });
            progress.event(&Event::Done(Counts { bytes, ..Counts::default() }));
        });
        if ended.is_ok() {
            session.report.line(&Line::MachineHome(MachineHome {
                point,
                directory: directory.display().to_string(),
                seconds: session.seconds_since(began),
            }));
        }
    }
    drop(progress);
    if ended.is_ok() && arguments.leave {
        running.leave();
        return Ok(None);
    }
    // A machine that works is not switched off because something beside it went wrong.
    if let Some(error) = ended.as_ref().err().filter(|error| error.code() != Code::Cancelled) {
        session.report.say(&format!("{}; the machine runs on", error.chain().join(": ")));
    }
    attend(&running, session)?;
    match ended {
        Err(error) if error.code() != Code::Cancelled => Err(error),
        _ => Ok(None),
    }
}

/// The machine, the name of its workload, and the id of the point.
fn start(arguments: &VmRun, plan: &EmulatorPlan, session: &mut Session) -> Result<(Instant, String, String)> {
    let earlier = Place::earlier(&plan.directory)?.filter(|run| run.asked == arguments.point);
    if let Some(run) = &earlier
        && is_whole(run, &plan.directory)?
    {
        let running = Instant::start_at_home(run, plan)?;
        return Ok((running, run.machine.name.clone(), run.point.clone()));
    }
    // The same words may mean another point by now.
    let point = earlier.as_ref().map_or(&arguments.point, |run| &run.point);
    let (repository, reader) = open(session, point)?;
    let running = Instant::start(&repository, &reader, plan, &arguments.point)?;
    Ok((running, reader.info().workload.name.clone(), reader.info().id.to_string()))
}

/// Stays with the machine until it has ended. The first signal presses its power button, the second one switches it off.
fn attend(running: &Instant, session: &Session) -> Result<()> {
    let cancel = &session.doors.cancel;
    let mut pressed = false;
    if !cancel.asked() {
        session
            .report
            .say("it runs until it is shut down; Ctrl-C presses its power button, twice switches it off");
    }
    while running.emulator.is_running() {
        if cancel.insisted() {
            return Err(Error::new(Code::Cancelled, "the machine was switched off"));
        }
        if cancel.asked() && !pressed {
            session.report.say("its power button was pressed; Ctrl-C switches it off");
            running.emulator.power_button().or_else(|error| match running.emulator.is_running() {
                true => Err(error),
                false => Ok(()),
            })?;
            pressed = true;
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

pub(super) fn prove(arguments: &VmProve, session: &mut Session) -> Done {
    let wanted = Proof {
        limit: duration(&arguments.wait)?,
        checks: arguments.check.clone(),
        screenshot: arguments.screenshot.as_ref().map(|path| session.doors.directory.join(path)),
    };
    let (repository, reader) = open(session, &arguments.point)?;
    prove_one(&repository, &reader, &arguments.shape, wanted, session)?;
    Ok(None)
}

/// What a point is asked for.
pub(super) struct Proof {
    pub(super) limit: Duration,
    pub(super) checks: Vec<String>,
    pub(super) screenshot: Option<PathBuf>,
}

/// Proves a point and says how it went.
pub(super) fn prove_one(
    repository: &Repository,
    reader: &PointReader,
    shape: &Shape,
    wanted: Proof,
    session: &Session,
) -> Result<()> {
    let place = tempdir()?;
    let id = reader.info().id.to_string();
    let evidence = session.places()?.state.unwrap_or_else(std::env::temp_dir).join("unproven").join(&id);
    let Proof { limit, checks, screenshot } = wanted;
    let run = request(shape, place.0.clone(), false);
    let request = ProofRequest { run, limit, checks, screenshot, evidence };
    let progress = session.progress();
    let proof = carry_out(repository, reader, &request, &session.doors.clock, progress.as_ref());
    drop(progress);
    let proof = proof?;
    if let Some(why) = &proof.no_screenshot {
        session.report.say(&format!("there is no screenshot: {why}"));
    }
    session.report.line(&Line::Proven(Proven {
        point: id,
        workload: reader.info().workload.name.clone(),
        boot_seconds: proof.booted.as_secs_f64(),
        seconds: proof.seconds,
        checks: number(proof.checks),
        bytes_read: proof.cost.bytes_read,
        bytes_fetched: proof.cost.bytes_fetched,
    }));
    Ok(())
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

/// How the names of directories begin in which points are proven.
const PROVE: &str = "mainstay-prove-";

/// Clears away what proofs that were killed have left: their machines, and their directories.
fn sweep() {
    let entries = std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(PROVE)) {
        // Only what this user has made, in a place where everybody may.
        let me = rustix::process::geteuid().as_raw();
        let ours = entry.metadata().is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == me);
        if !ours {
            continue;
        }
        // Without a record it is another run's that has just begun.
        let Ok(Some(_)) = Place::earlier(&entry.path()) else { continue };
        let Ok(place) = Place::take(&entry.path()) else { continue };
        Emulator::kill_left(&place);
        let _left = std::fs::remove_dir_all(entry.path());
    }
}

/// A directory of this run's own, short enough for the paths of sockets. Removed in the end.
struct Scratch(PathBuf);

fn tempdir() -> Result<Scratch> {
    sweep();
    let mut last = None;
    for number in 0..1000 {
        let path = std::env::temp_dir().join(format!("{PROVE}{}-{number}", std::process::id()));
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
