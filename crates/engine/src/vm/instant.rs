//! A machine run straight from its recovery point: its disks are served from the repository, what it writes goes into
//! files of its own, and it can be copied home while it runs.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Blocks, Clock, Code, Error, ItemPath, Kind, Piece, Progress, Result};
use mainstay_nbd::{Address, Export, Server, ServerOptions};
use mainstay_repository::{Note, PointReader, Repository, StoredBlocks};
use mainstay_workloads::vm::{
    DISKS, Emulator, EmulatorPlan, MACHINE, Machine, MachineDisk, MachineId, Place, Run, is_home,
};

use super::boot::{Boot, ReadAhead, Recorder, record};

/// The longest description of a machine, in bytes.
const DOCUMENT_MAX: usize = 16 << 20;

/// A machine that runs from its point. Dropped, it is switched off; what it wrote stays in the directory.
pub struct Instant {
    // Before the server, which it reads from.
    pub emulator: Emulator,
    /// `None` when everything is where it runs.
    served: Option<Served>,
}

/// Disks offered from the repository.
struct Served {
    /// Before the server, whose reads it follows.
    _ahead: Option<ReadAhead>,
    server: Server,
    disks: Vec<String>,
    recorder: Arc<Recorder>,
    reader: PointReader,
    fetched_before: u64,
}

/// What a machine has cost the repository so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// What the machine has read.
    pub bytes_read: u64,
    /// What was fetched for it: stored bytes, mostly compressed.
    pub bytes_fetched: u64,
}

impl Instant {
    /// Starts the machine of a point, or goes on with the one that a run which died has left in the directory. `asked` is
    /// how the person named the point.
    ///
    /// Errors: those of the repository and of QEMU; [`Code::NotFound`] for a point without disks; [`Code::Conflict`] when
    /// somebody else runs a machine there; [`Code::Refused`] when the directory is of another point.
    pub fn start(
        repository: &Repository,
        reader: &PointReader,
        plan: &EmulatorPlan,
        asked: &str,
    ) -> Result<Self> {
        let run = Run { point: reader.info().id.to_string(), asked: asked.into(), machine: machine(reader)? };
        let place = Place::take(&plan.directory)?;
        place.hold(&run)?;
        let socket = plan.directory.join("nbd");
        let served = match is_whole(&run, &plan.directory)? {
            true => None,
            false => Some(Served::start(repository, reader, &run.machine, &socket)?),
        };
        Ok(Self { emulator: begin(&run, &socket, plan, place)?, served })
    }

    /// Starts a machine that was copied home, or goes on with it. No repository is needed.
    pub fn start_at_home(run: &Run, plan: &EmulatorPlan) -> Result<Self> {
        let place = Place::take(&plan.directory)?;
        let emulator = begin(run, &plan.directory.join("nbd"), plan, place)?;
        Ok(Self { emulator, served: None })
    }

    pub fn cost(&self) -> Cost {
        let Some(served) = &self.served else { return Cost::default() };
        let counters = served.disks.iter().filter_map(|disk| served.server.counters(disk));
        Cost {
            bytes_read: counters.map(|one| one.bytes_read).sum(),
            bytes_fetched: served.reader.bytes_fetched().saturating_sub(served.fetched_before),
        }
    }

    /// What the machine has read so far.
    pub fn boot(&self) -> Boot {
        self.served.as_ref().map(|served| served.recorder.boot()).unwrap_or_default()
    }

    /// Lets the machine run on. Unless it has everything at home, it stands still where it needs more, until another run
    /// in the same directory serves it again.
    pub fn leave(self) {
        self.emulator.leave();
    }
}

/// Whether a machine has all of its disks where it runs.
pub fn is_whole(run: &Run, directory: &Path) -> Result<bool> {
    let disks = run.machine.disks.iter().map(|disk| is_home(directory, &disk.name));
    disks.into_iter().try_fold(true, |all, home| Ok(all && home?))
}

fn begin(run: &Run, socket: &Path, plan: &EmulatorPlan, place: Place) -> Result<Emulator> {
    match Emulator::join(&run.machine, place)? {
        Ok(emulator) => Ok(emulator),
        Err(place) => Emulator::start(&run.machine, socket, plan, place),
    }
}

impl Served {
    fn start(
        repository: &Repository,
        reader: &PointReader,
        machine: &Machine,
        socket: &Path,
    ) -> Result<Self> {
        let fetched_before = reader.bytes_fetched();
        let open = |disk: &MachineDisk| Ok((disk.name.clone(), Arc::new(disk_of(reader, &disk.name)?)));
        let disks: Vec<(String, Arc<StoredBlocks>)> =
            machine.disks.iter().map(open).collect::<Result<_>>()?;
        let names: Vec<String> = disks.iter().map(|(name, _)| name.clone()).collect();
        let recorder = Arc::new(Recorder::default());
        let recording = record(&recorder, &names);
        let ahead = known_boot(repository, reader)?.map(|boot| ReadAhead::start(&boot, &disks));
        let (ahead, ears) =
            ahead.transpose()?.map_or((None, Vec::new()), |(ahead, ears)| (Some(ahead), ears));
        let exports = disks.iter().enumerate().map(|(number, (name, blocks))| {
            let observers = [recording.get(number), ears.get(number)];
            let export = Export::read_only(name.clone(), Arc::clone(blocks) as Arc<dyn Blocks>);
            observers.into_iter().flatten().fold(export, |export, ear| export.observer(Arc::clone(ear)))
        });
        let exports = exports.collect();
        let server = Server::start(&Address::Unix(socket.to_owned()), exports, ServerOptions::default())?;
        Ok(Self { _ahead: ahead, server, disks: names, recorder, reader: reader.clone(), fetched_before })
    }
}

fn disk_of(reader: &PointReader, name: &str) -> Result<StoredBlocks> {
    let path = ItemPath::new(DISKS).and_then(|disks| disks.join(name.as_bytes()));
    let path = path.map_err(|error| Error::integrity("a disk has an impossible name").because(error))?;
    let entry = reader.lookup(&path)?.filter(|entry| entry.has_body);
    let entry = entry.ok_or_else(|| Error::integrity(format!("the disk {name} is not in the point")))?;
    reader.stored_blocks(&entry)
}

/// What a boot from this point read, or from the newest other point of the same machine: one boot is much like another.
fn known_boot(repository: &Repository, reader: &PointReader) -> Result<Option<Boot>> {
    let info = reader.info();
    let points = repository.points()?;
    let others = points.iter().rev().filter(|point| point.workload.id == info.workload.id);
    for id in std::iter::once(info.id).chain(others.map(|point| point.id)) {
        // What cannot be made sense of is only a hint, and nobody needs it.
        if let Some(boot) = repository.boot(&id)?.and_then(|words| Boot::parse(&words).ok()) {
            return Ok(Some(boot));
        }
    }
    Ok(None)
}

/// The machine that a point is of, with the disks that are in the point.
pub fn machine(reader: &PointReader) -> Result<Machine> {
    let path = ItemPath::new(MACHINE).unwrap_or_default();
    let mut machine = match reader.lookup(&path)? {
        Some(entry) => Machine::from_json(&document(reader, &entry)?)?,
        None => {
            Machine::new(MachineId(reader.info().workload.name.clone()), reader.info().workload.name.clone())
        }
    };
    let mut disks = Vec::new();
    for entry in reader.list(&ItemPath::new(DISKS).unwrap_or_default())? {
        if entry.metadata.kind != Kind::Disk {
            continue;
        }
        let name = String::from_utf8_lossy(entry.path.name()).into_owned();
        let known = machine.disks.iter().find(|disk| disk.name == name);
        let disk = known.cloned().unwrap_or_else(|| MachineDisk {
            name: name.clone(),
            bus: None,
            format: "raw".into(),
            serial: None,
            boot_order: None,
            size: None,
            source: String::new(),
            read_only: false,
        });
        disks.push(MachineDisk { size: Some(entry.content_bytes()), ..disk });
    }
    if disks.is_empty() {
        let what = format!("point {} has no disks", reader.info().id);
        return Err(
            Error::new(Code::NotFound, what).hint("choose a point of a virtual machine: mainstay points")
        );
    }
    disks.sort_by_key(|disk| disk.boot_order.unwrap_or(u32::MAX));
    machine.disks = disks;
    Ok(machine)
}

pub(super) fn document(reader: &PointReader, entry: &mainstay_repository::Entry) -> Result<Vec<u8>> {
    let (mut stream, mut text) = (reader.stream(entry)?, Vec::new());
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer)? {
            Piece::Data(length) => text.extend_from_slice(buffer.get(..length).unwrap_or_default()),
            Piece::Hole(_) => return Err(Error::integrity("the description of the machine has a hole")),
            Piece::End => return Ok(text),
        }
        if text.len() > DOCUMENT_MAX {
            return Err(Error::integrity("the description of the machine is too long"));
        }
    }
}

/// What must hold of a machine that was started from its point.
#[derive(Clone, Debug)]
pub struct ProofRequest {
    /// Its directory is for this run alone.
    pub run: EmulatorPlan,
    /// For its agent to answer, and for each check.
    pub limit: Duration,
    /// Lines for the guest's shell that must end with status 0.
    pub checks: Vec<String>,
    /// Where the screen is kept.
    pub screenshot: Option<PathBuf>,
    /// The directory where console and screen are kept when the machine fails. What an earlier failure left is replaced.
    pub evidence: PathBuf,
}

/// What [`prove`] found out.
#[derive(Clone, Debug)]
pub struct Proof {
    /// From the start to the first answer of the agent.
    pub booted: Duration,
    /// From the start to the end of the last check: the measured recovery time.
    pub seconds: u64,
    pub checks: usize,
    pub cost: Cost,
    /// Why there is no screenshot though one was wanted.
    pub no_screenshot: Option<String>,
}

/// Starts the machine of a point with no network and nothing of it kept, waits for its agent, runs the checks, and records
/// in the point that it is proven, and what the boot has read unless that was known.
///
/// Errors: [`Code::Refused`] when the machine does not come up or a check fails: the point is not proven then, and
/// console and screen are in the directory for evidence.
pub fn prove(
    repository: &Repository,
    reader: &PointReader,
    request: &ProofRequest,
    clock: &Arc<dyn Clock>,
    progress: &dyn Progress,
) -> Result<Proof> {
    let began = clock.monotonic();
    let running = Instant::start(repository, reader, &request.run, &reader.info().id.to_string())?;
    let came_up = running.emulator.wait_for_agent(request.limit, progress);
    let (booted, boot) = (clock.monotonic().saturating_sub(began), running.boot());
    let passed = came_up.and_then(|answered| match answered {
        true => pass(&running, request, progress),
        false => {
            Err(Error::new(Code::Refused, format!("its agent did not answer within {:?}", request.limit)))
        }
    });
    if let Err(error) = passed {
        if error.code() == Code::Cancelled {
            return Err(error);
        }
        let kept = keep_evidence(&running, &request.evidence);
        let unproven = Error::new(Code::Refused, "the point is not proven").because(error);
        return Err(match kept {
            Ok(()) => unproven.hint(format!("its console and screen are in {}", request.evidence.display())),
            Err(error) => unproven.hint(format!("nothing of it could be kept: {}", error.chain().join(": "))),
        });
    }
    let screen = request.screenshot.as_ref().map(|path| running.emulator.screenshot(path));
    let seconds = clock.monotonic().saturating_sub(began).as_secs();
    let how = format!("booted without a network, agent answered, {} checks", request.checks.len());
    repository.note(&reader.info().id, &Note::Proven { how, seconds })?;
    if !known_boot(repository, reader)?.is_some_and(|known| known.foretells(&boot)) {
        repository.note(&reader.info().id, &Note::Boot(boot.words()))?;
    }
    Ok(Proof {
        booted,
        seconds,
        checks: request.checks.len(),
        cost: running.cost(),
        no_screenshot: screen.and_then(|screen| screen.err().map(|error| error.chain().join(": "))),
    })
}

fn pass(running: &Instant, request: &ProofRequest, progress: &dyn Progress) -> Result<()> {
    for line in &request.checks {
        progress.check()?;
        let status = running.emulator.check(line, request.limit)?;
        if status != 0 {
            return Err(Error::new(Code::Refused, format!("the check {line:?} ended with status {status}")));
        }
    }
    Ok(())
}

/// Keeps what a machine that failed shows. Its screen is there only as long as it runs.
fn keep_evidence(running: &Instant, directory: &Path) -> Result<()> {
    let fail = |error| Error::io(format!("cannot write in {}", directory.display()), error);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(fail)?;
    for name in ["console", "qemu.log", "screen.png"] {
        let _there_was_none = std::fs::remove_file(directory.join(name));
    }
    let _no_screen = running.emulator.screenshot(&directory.join("screen.png"));
    for name in ["console", "qemu.log"] {
        std::fs::copy(running.emulator.directory().join(name), directory.join(name)).map_err(fail)?;
    }
    Ok(())
}
