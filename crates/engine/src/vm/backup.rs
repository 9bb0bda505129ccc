//! Taking a recovery point of a virtual machine.

use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{
    Blocks, Clock, Code, Consistency, Error, Event, Id16, ItemPath, Phase, Progress, Result, WorkloadKind,
    WorkloadRef,
};
use mainstay_repository::{Compression, Parent, PointInfo, Repository, WriteRequest};
use mainstay_workloads::vm::{
    self, DiskSnapshot, Hypervisor, Machine, MachineId, MachineSnapshot, Marks, Owner, SnapshotRequest,
    VmSource, disk_path,
};

use super::along::{AlongFiles, Maps};
use super::in_place::check_finished;
use super::inside::Inside;
use super::lean::Leave;
use crate::backup::find;
use crate::copy::copy;
use crate::workload::derived_id;

/// How a machine is backed up.
#[derive(Clone, Debug)]
pub struct MachineBackup {
    /// The machine that does the work, for people.
    pub host: String,
    /// The workload's name, when the person gave one.
    pub name: Option<String>,
    pub tags: Vec<String>,
    /// The consistency asked for.
    pub want: Consistency,
    /// Less than that is an error and makes no point.
    pub require: bool,
    /// Reads everything, as if there were no earlier point.
    pub full: bool,
    /// The disks wanted, by name; all when empty.
    pub disks: Vec<String>,
    pub leave: Leave,
    /// Of so many stretches that are called unchanged one is compared. 0: none.
    pub reread_one_in: u32,
    /// A disk is read whole after so many increments. 0: never.
    pub scan_every: u32,
    /// The longest that a guest may stand still.
    pub freeze_limit: Duration,
    /// Has the guest say first which blocks it no longer uses.
    pub trim: bool,
    pub compression: Compression,
    /// Threads that compress and seal.
    pub jobs: usize,
}

/// What [`backup_machine`] did.
#[derive(Debug)]
pub struct MachinePoint {
    pub point: PointInfo,
    pub disks: Vec<DiskSnapshot>,
    pub frozen: Duration,
    /// What a person should know, in clauses.
    pub notes: Vec<String>,
}

/// Takes a recovery point of a machine, running or not. `inside` says how its disks are looked into, to cut along files;
/// what cannot be understood there costs room and nothing else.
///
/// Errors: those of the hypervisor and the repository; [`Code::Refused`] when less consistency was reached than is
/// required, or when a restore over the disks was interrupted. In all of them no point was made, unless the error says that everything is stored, and the guest runs.
pub fn backup_machine(
    repository: &Repository,
    hypervisor: &dyn Hypervisor,
    machine: &MachineId,
    request: &MachineBackup,
    inside: &Inside<'_>,
    clock: &Arc<dyn Clock>,
    progress: &Arc<dyn Progress>,
) -> Result<MachinePoint> {
    repository.refresh()?;
    let points = repository.points()?;
    let machine = hypervisor.config(machine)?;
    let workload = workload(&machine, hypervisor, request, &points);
    let parent =
        points.iter().rfind(|point| point.workload.id == workload.id && point.readable && !request.full);
    let writer = repository.write(WriteRequest {
        workload: workload.clone(),
        host: request.host.clone(),
        roots: vec![root_of(&machine.id)],
        tags: request.tags.clone(),
        reread_one_in: request.reread_one_in,
        any_order: false,
        parent: parent.map_or(Parent::None, |parent| Parent::Point(parent.id)),
        progress: Arc::clone(progress),
        compression: request.compression,
        jobs: request.jobs,
    })?;
    let owner = Owner { repository: repository_mark(repository), workload: workload.id };
    let wanted = SnapshotRequest {
        disks: request.disks.clone(),
        want: request.want,
        since: parent.and_then(|parent| Marks::from_position(&parent.position)),
        scan_every: request.scan_every,
        freeze_limit: request.freeze_limit,
        trim: request.trim,
        hooked: request.want == Consistency::Application,
        ..SnapshotRequest::new(owner, random_id()?)
    };
    progress.event(&Event::Phase(Phase::Scanning));
    let snapshot = hypervisor.snapshot(&machine.id, &wanted)?;
    let moment = snapshot.moment().unwrap_or_else(|| clock.now());
    check_reached(snapshot.as_ref(), request)?;
    let opened = open_disks(snapshot.as_ref())?;
    check_finished(&opened, &machine, &points)?;
    let bytes = opened.iter().map(|(_, disk)| disk.size()).sum();
    let maps = Maps::of(opened, inside);
    let (disks, frozen) = (snapshot.disks().to_vec(), snapshot.frozen());
    let notes: Vec<String> = snapshot.notes().iter().chain(&maps.notes).cloned().collect();
    progress.event(&Event::Phase(Phase::Copying));
    progress.event(&Event::Expect { items: disks.len() as u64, bytes, complete: true });
    let source = AlongFiles { inner: VmSource::new(snapshot, moment)?, maps, leave: request.leave };
    let point = copy(Box::new(source), Box::new(writer), progress.as_ref())?;
    Ok(MachinePoint { point: find(repository, &point)?, disks, frozen, notes })
}

fn open_disks(snapshot: &dyn MachineSnapshot) -> Result<Vec<(ItemPath, Arc<dyn Blocks>)>> {
    let disks = snapshot.disks().iter().enumerate();
    disks.map(|(number, disk)| Ok((disk_path(&disk.name)?, Arc::from(snapshot.open(number)?)))).collect()
}

fn check_reached(snapshot: &dyn MachineSnapshot, request: &MachineBackup) -> Result<()> {
    let reached = snapshot.reached();
    if !request.require || reached >= request.want {
        return Ok(());
    }
    let what = format!("the machine could be captured only {} consistent", reached.name());
    let why = snapshot.notes().join("; ");
    Err(Error::new(Code::Refused, what)
        .hint(format!("{why}; without --require the point is made all the same and says what was reached")))
}

/// What the bitmaps and checkpoints that a repository leaves on machines are known by: half of its id.
pub fn repository_mark(repository: &Repository) -> Id16 {
    Id16(*repository.family().0.first_chunk().unwrap_or(&[0; 16]))
}

/// What a point of a machine is of, in the words that find the machine again.
pub fn root_of(machine: &MachineId) -> String {
    format!("machine:{}", machine.0)
}

/// The workload of the machine: the one whose points are of this machine, or a new one by its name.
fn workload(
    machine: &Machine,
    hypervisor: &dyn Hypervisor,
    request: &MachineBackup,
    points: &[PointInfo],
) -> WorkloadRef {
    let of_machine =
        |point: &&PointInfo| point.workload.kind.0 == vm::KIND && point.roots == [root_of(&machine.id)];
    if let Some(known) = points.iter().rfind(of_machine) {
        return known.workload.clone();
    }
    let wanted = request.name.as_ref().unwrap_or(&machine.name).replace(['@', '~'], "_");
    let taken = |name: &String| points.iter().any(|point| point.workload.name == *name);
    let numbered = (2_u64..).map(|number| format!("{wanted}-{number}"));
    let name =
        std::iter::once(wanted.clone()).chain(numbered).find(|name| !taken(name)).unwrap_or(wanted.clone());
    let id = derived_id(&hypervisor.name(), &root_of(&machine.id));
    WorkloadRef { id, kind: WorkloadKind(vm::KIND.to_owned()), name }
}

/// An id that nobody else has.
pub fn random_id() -> Result<Id16> {
    let mut id = [0; 16];
    getrandom::fill(&mut id)
        .map_err(|error| Error::bug(format!("the system gives no random bytes: {error}")))?;
    Ok(Id16(id))
}
