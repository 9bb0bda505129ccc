//! A machine run straight from its recovery point: its disks are served from the repository, what it writes goes into
//! files of its own, and it can be copied home while it runs.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Blocks, Clock, Code, Error, ItemPath, Kind, Piece, Progress, Result};
use mainstay_nbd::{Address, Counters, Export, Server, ServerOptions};
use mainstay_repository::{Note, PointReader, Repository};
use mainstay_workloads::vm::{DISKS, Emulator, EmulatorPlan, MACHINE, Machine, MachineDisk, MachineId};

/// The longest description of a machine, in bytes.
const DOCUMENT_MAX: usize = 16 << 20;

/// A machine that runs from its point. Dropped, it is switched off; what it wrote stays in the directory.
pub struct Instant {
    // Before the server, which it reads from.
    pub emulator: Emulator,
    server: Server,
    disks: Vec<String>,
}

impl Instant {
    /// Starts the machine of a point.
    ///
    /// Errors: those of the repository and of QEMU; [`Code::NotFound`] for a point without disks.
    pub fn start(reader: &PointReader, plan: &EmulatorPlan) -> Result<Self> {
        let machine = machine(reader)?;
        let failed = |error| Error::io(format!("cannot make {}", plan.directory.display()), error);
        std::fs::create_dir_all(&plan.directory).map_err(failed)?;
        let mut exports = Vec::new();
        for disk in &machine.disks {
            let path = ItemPath::new(DISKS).and_then(|disks| disks.join(disk.name.as_bytes()));
            let path =
                path.map_err(|error| Error::integrity("a disk has an impossible name").because(error))?;
            let entry = reader.lookup(&path)?.filter(|entry| entry.has_body);
            let entry = entry
                .ok_or_else(|| Error::integrity(format!("the disk {} is not in the point", disk.name)))?;
            let blocks: Arc<dyn Blocks> = Arc::from(reader.blocks(&entry)?);
            exports.push(Export::read_only(disk.name.clone(), blocks));
        }
        let socket = plan.directory.join("nbd");
        let server = Server::start(&Address::Unix(socket.clone()), exports, ServerOptions::default())?;
        let disks = machine.disks.iter().map(|disk| disk.name.clone()).collect();
        Ok(Self { emulator: Emulator::start(&machine, &socket, plan)?, server, disks })
    }

    /// What the machine has read from the repository so far, of all disks.
    pub fn read(&self) -> Counters {
        let counters = self.disks.iter().filter_map(|disk| self.server.counters(disk));
        counters.fold(Counters::default(), |sum, one| Counters {
            connections: sum.connections + one.connections,
            reads: sum.reads + one.reads,
            bytes_read: sum.bytes_read + one.bytes_read,
            errors: sum.errors + one.errors,
            ..sum
        })
    }
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
    pub run: EmulatorPlan,
    /// For its agent to answer.
    pub limit: Duration,
    /// Lines for the guest's shell that must end with status 0.
    pub checks: Vec<String>,
    /// Where the screen is kept.
    pub screenshot: Option<PathBuf>,
}

/// What [`prove`] found out.
#[derive(Clone, Debug)]
pub struct Proof {
    /// From the start to the first answer of the agent.
    pub booted: Duration,
    /// From the start to the end of the last check: the measured recovery time.
    pub seconds: u64,
    pub checks: usize,
    /// What was read from the repository for it.
    pub bytes_read: u64,
    /// Why there is no screenshot though one was wanted.
    pub no_screenshot: Option<String>,
}

/// Starts the machine of a point with no network and nothing of it kept, waits for its agent, runs the checks, and records
/// in the point that it is proven.
///
/// Errors: [`Code::Refused`] when the machine does not come up or a check fails: the point is not proven then.
pub fn prove(
    repository: &Repository,
    reader: &PointReader,
    request: &ProofRequest,
    clock: &Arc<dyn Clock>,
    progress: &dyn Progress,
) -> Result<Proof> {
    let began = clock.monotonic();
    let mut running = Instant::start(reader, &request.run)?;
    let answered = running.emulator.wait_for_agent(request.limit, progress);
    let booted = clock.monotonic().saturating_sub(began);
    let screen = request.screenshot.as_ref().map(|path| running.emulator.screenshot(path));
    let unproven = |what: String| {
        Error::new(Code::Refused, what).hint("the point is not proven; see its console and screenshot")
    };
    if !answered.map_err(|error| unproven("the machine did not come up".into()).because(error))? {
        return Err(unproven(format!("its agent did not answer within {} s", request.limit.as_secs())));
    }
    for line in &request.checks {
        progress.check()?;
        let status = running.emulator.check(line, request.limit)?;
        if status != 0 {
            return Err(unproven(format!("the check {line:?} ended with status {status}")));
        }
    }
    let seconds = clock.monotonic().saturating_sub(began).as_secs();
    let how = format!("booted without a network, agent answered, {} checks", request.checks.len());
    repository.note(&reader.info().id, &Note::Proven { how, seconds })?;
    Ok(Proof {
        booted,
        seconds,
        checks: request.checks.len(),
        bytes_read: running.read().bytes_read,
        no_screenshot: screen.and_then(|screen| screen.err().map(|error| error.chain().join(": "))),
    })
}
