//! A machine put back over its present disks. Only blocks that differ are written, and what they held goes into a point
//! of its own first, which takes the restore back.
//!
//! The beginning of each disk is replaced by a note as long as its disks are neither the old nor the new state: a machine
//! whose restore was killed has no partition table, no boot sector and no superblock, and cannot come up half restored.
//! The note names the point that takes the restore back, so that the next run does not capture the half-written state.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mainstay_core::{
    Blocks, Clock, Code, Counts, Error, Event, Extent, ExtentKind, ItemPath, Kind, Phase, PointId, Progress,
    Result,
};
use mainstay_diskimage::container::{self, Directories, Format};
use mainstay_diskimage::partition::refit;
use mainstay_nbd::WritableBlocks;
use mainstay_repository::{Note, PointInfo, PointReader, Repository};
use mainstay_workloads::vm::{
    DISKS, Hypervisor, KIND, Machine, MachineDisk, MachineId, MachineState, Overwrite,
};

use super::apply::{Applied, Newer, WrittenDisk, sole};
use super::backup::root_of;
use super::disks::{Shifted, write_disk};
use super::instant::machine;
use super::recover::{is_running, state_of};

/// The tag of points that take a restore back.
pub const UNDO_TAG: &str = "undo";

/// As much of each disk is taken away first and put back last: every boot sector, partition table and first superblock.
const HEAD: u64 = 1 << 20;
/// The note, in the very first block.
const NOTE_BYTES: usize = 4096;
const NOTE: &str = "MAINSTAY RESTORE 1";

/// Compared and written at once.
const GRAIN: u64 = 64 << 10;
/// Extents are asked for in windows of this length.
const WINDOW_BYTES: u64 = 1 << 30;

/// For so long a restore that nobody finishes keeps its undo point.
const HELD: Duration = Duration::from_secs(90 * 24 * 3600);

/// How often the end of a machine is looked for.
const LOOK: Duration = Duration::from_millis(500);

/// What [`restore_in_place`] will do.
#[derive(Clone, Debug)]
pub struct InPlacePlan {
    pub point: PointInfo,
    /// As the host has it now.
    pub machine: Machine,
    pub runs: bool,
    pub disks: Vec<PresentDisk>,
    /// Disks of the machine that the point does not have; they stay as they are.
    pub left: Vec<String>,
    /// An earlier restore was interrupted: the point that takes it back.
    pub interrupted: Option<PointId>,
}

/// A disk that is written over.
#[derive(Clone, Debug)]
pub struct PresentDisk {
    pub item: ItemPath,
    /// As the host calls it.
    pub name: String,
    pub path: PathBuf,
    pub format: String,
    /// Bytes the guest sees.
    pub size: u64,
}

/// What [`restore_in_place`] did.
#[derive(Clone, Debug)]
pub struct RestoredInPlace {
    /// The point that takes it back.
    pub undo: PointId,
    /// Content bytes of the disks, and those of them that differed and were written.
    pub counts: Counts,
    /// What came of its newer files.
    pub applied: Applied,
}

/// Finds the machine that the point is of, and its disks.
///
/// Errors: [`Code::NotFound`] when the host has no such machine or an image is gone, [`Code::Refused`] when a disk no longer
/// fits or the machine's memory is saved, [`Code::Unsupported`] for images that are not written in place, and hosts whose
/// machines are not read while they are off.
pub fn plan_in_place(
    repository: &Repository,
    reader: &PointReader,
    host: &dyn Hypervisor,
) -> Result<InPlacePlan> {
    if !host.caps().offline {
        let what = format!("the disks of machines of {} are not written over from here", host.name());
        return Err(Error::new(Code::Unsupported, what).hint(
            "name the libvirt of this computer, or dir:DIRECTORY; or restore the disks --to a directory",
        ));
    }
    let id = machine(reader)?.id;
    let elsewhere = "bring it back as a new machine: --as NAME, with --same-identity if it is gone";
    let present = host.config(&id).map_err(|error| match error.code() {
        Code::NotFound => Error::new(Code::NotFound, format!("{} has no machine {}", host.name(), id.0))
            .because(error)
            .hint(elsewhere),
        _ => error,
    })?;
    let runs = still_runs(host, &present)?;
    let (mut disks, mut notes) = (Vec::new(), Vec::new());
    for entry in reader.list(&ItemPath::new(DISKS).unwrap_or_default())? {
        if entry.metadata.kind != Kind::Disk {
            continue;
        }
        let name = String::from_utf8_lossy(entry.path.name()).into_owned();
        let disk = present.disks.iter().find(|disk| disk.name == name).ok_or_else(|| {
            Error::new(Code::NotFound, format!("the machine has no disk {name} any more")).hint(elsewhere)
        })?;
        let (blocks, size) = look(disk)?;
        refit(reader.blocks(&entry)?.as_ref(), size)
            .map_err(|error| error.during(format!("the disk {name} cannot be put back")))?;
        notes.extend(note_of(blocks.as_ref())?);
        let (path, format) = (disk.source.clone().into(), disk.format.clone());
        disks.push(PresentDisk { item: entry.path.clone(), name, path, format, size });
    }
    let written = |disk: &&MachineDisk| !disk.read_only && !disks.iter().any(|known| known.name == disk.name);
    let left = present.disks.iter().filter(written).map(|disk| disk.name.clone()).collect();
    let interrupted = trusted(&repository.points()?, &present.id, &notes);
    Ok(InPlacePlan { point: reader.info().clone(), machine: present, runs, disks, left, interrupted })
}

fn look(disk: &MachineDisk) -> Result<(Arc<dyn Blocks>, u64)> {
    let format = match disk.format.as_str() {
        "raw" => Format::Raw,
        "qcow2" => Format::Qcow2,
        other => {
            let what = format!("the disk {} is a {other} image, which is not written in place", disk.name);
            return Err(Error::new(Code::Unsupported, what).hint("restore as a new machine: --as NAME"));
        }
    };
    let path = Path::new(&disk.source);
    let opened = container::open(path, Some(format), &Directories::of(path)?)
        .map_err(|error| error.during(format!("cannot open the disk {}", disk.name)))?;
    let size = opened.blocks.size();
    Ok((opened.blocks, size))
}

/// The undo point that the note on a disk names.
fn note_of(disk: &dyn Blocks) -> Result<Option<PointId>> {
    let mut start = vec![0; NOTE_BYTES.min(usize::try_from(disk.size()).unwrap_or(usize::MAX))];
    disk.read_at(0, &mut start)?;
    let text = String::from_utf8_lossy(&start);
    let mut lines = text.lines();
    let noted = lines.next() == Some(NOTE);
    Ok(lines.find_map(|line| line.strip_prefix("undo ")).filter(|_| noted).and_then(|id| id.parse().ok()))
}

/// Whether a point takes back a restore of a machine.
pub fn takes_back(point: &PointInfo) -> bool {
    point.workload.kind.0 == KIND && point.tags.iter().any(|tag| tag == UNDO_TAG)
}

/// The undo point that the notes on the disks of a machine name. A guest can write what it likes on its disks, but it does
/// not know the random name of a point that takes back a restore of it.
fn trusted(points: &[PointInfo], machine: &MachineId, notes: &[PointId]) -> Option<PointId> {
    let root = [root_of(machine)];
    let mut own = points.iter().filter(|point| takes_back(point) && point.roots == root);
    own.find(|point| notes.contains(&point.id)).map(|point| point.id)
}

/// Whether disks are as a restore in place leaves them that did not come to its end.
///
/// Errors: [`Code::Refused`] when they are.
pub(super) fn check_finished(
    disks: &[(ItemPath, Arc<dyn Blocks>)],
    machine: &Machine,
    points: &[PointInfo],
) -> Result<()> {
    let mut notes = Vec::new();
    for (_, disk) in disks {
        notes.extend(note_of(disk.as_ref())?);
    }
    let Some(undo) = trusted(points, &machine.id, &notes) else { return Ok(()) };
    let what =
        format!("a restore over the disks of {} was interrupted: they are neither old nor new", machine.name);
    Err(Error::new(Code::Refused, what).hint(format!(
        "run it again to finish it, or take it back: mainstay vm restore {undo} --in-place --host …"
    )))
}

/// Errors: [`Code::Refused`] for a machine that would go on with old memory over new disks.
fn still_runs(host: &dyn Hypervisor, machine: &Machine) -> Result<bool> {
    let state = state_of(host, &machine.id)?;
    if state != MachineState::Saved {
        return Ok(state.runs());
    }
    let what = format!("the memory of {} is saved, and would go on over other disks", machine.name);
    Err(Error::new(Code::Refused, what)
        .hint(format!("let go of the memory first: virsh managedsave-remove {}", machine.name)))
}

/// Asks the machine to shut down and waits until it has.
///
/// Errors: [`Code::Refused`] when it has not within `limit`.
pub fn shut_down(
    host: &dyn Hypervisor,
    machine: &MachineId,
    limit: Duration,
    clock: &dyn Clock,
    progress: &dyn Progress,
) -> Result<()> {
    let began = clock.monotonic();
    host.stop(machine)?;
    while is_running(host, machine)? {
        progress.check()?;
        if clock.monotonic().saturating_sub(began) > limit {
            let what = format!("the machine did not shut down within {} s", limit.as_secs());
            return Err(Error::new(Code::Refused, what)
                .hint("nothing was changed; shut it down from inside, or switch it off at its host"));
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// Writes over the present disks what differs, and puts `newer` files on them. `undo` takes a point of them first, tagged
/// [`UNDO_TAG`], after the machine was found shut down; when an earlier restore was interrupted its point stands, and none
/// is taken.
///
/// Errors: [`Code::Refused`] while the machine runs, [`Code::Unsupported`] when the files cannot be put there; those of
/// `undo`, when nothing has been changed; those of both sides: then the disks are partly written, the machine cannot boot,
/// and the next run finishes.
pub fn restore_in_place(
    reader: &PointReader,
    host: &dyn Hypervisor,
    plan: &InPlacePlan,
    newer: &Newer<'_>,
    undo: &dyn Fn() -> Result<PointId>,
    progress: &Arc<dyn Progress>,
) -> Result<RestoredInPlace> {
    if still_runs(host, &plan.machine)? {
        let what = format!("the machine {} is running", plan.machine.name);
        return Err(Error::new(Code::Refused, what).hint("shut it down first: --stop does it"));
    }
    newer.check(reader, None)?;
    let undo = match plan.interrupted {
        Some(point) => point,
        None => {
            undo().map_err(|error| error.during("no point could be taken that takes the restore back"))?
        }
    };
    let reason = format!("a restore over the disks of {} is not finished", plan.machine.name);
    hold(newer, &undo, &reason)?;
    let scratch = std::env::temp_dir();
    let open =
        |disk: &PresentDisk| Ok(Arc::new(Careful::new(Overwrite::open(&disk.path, &disk.format, &scratch)?)));
    let targets: Vec<Arc<Careful>> = plan.disks.iter().map(open).collect::<Result<_>>()?;
    let done = write_over(reader, plan, &targets, newer, &undo, progress).map_err(|error| {
        let state = format!("the disks of {} are neither old nor new and cannot boot", plan.machine.name);
        let without = if newer.files.is_empty() { "" } else { ", with --image-only without the newer files" };
        let hint = format!("the same command finishes{without}; point {undo} in place takes it back");
        error.during(state).hint(hint)
    })?;
    targets.into_iter().try_for_each(|target| sole(target)?.inner.close())?;
    let (counts, applied) = done;
    release(newer, &undo, &reason)?;
    Ok(RestoredInPlace { undo, counts, applied })
}

/// Keeps the point that takes a restore back from expiring while the disks name it.
fn hold(newer: &Newer<'_>, undo: &PointId, reason: &str) -> Result<()> {
    let until = Some(newer.clock.now().plus(HELD));
    newer.repository.note(undo, &Note::Hold { reason: reason.to_owned(), until })
}

/// A key without the power to release leaves the hold to its own end.
fn release(newer: &Newer<'_>, undo: &PointId, reason: &str) -> Result<()> {
    let points = newer.repository.points()?;
    let holds = points.iter().filter(|point| point.id == *undo).flat_map(|point| &point.holds);
    for hold in holds.filter(|hold| hold.reason == reason) {
        match newer.repository.note(undo, &Note::Release(hold.id)) {
            Err(error) if error.code() == Code::NoPower => return Ok(()),
            released => released?,
        }
    }
    Ok(())
}

fn write_over(
    reader: &PointReader,
    plan: &InPlacePlan,
    targets: &[Arc<Careful>],
    newer: &Newer<'_>,
    undo: &PointId,
    progress: &Arc<dyn Progress>,
) -> Result<(Counts, Applied)> {
    for target in targets {
        target.take_head(undo, &plan.point.id)?;
    }
    progress.event(&Event::Phase(Phase::Copying));
    let bytes = plan.disks.iter().map(|disk| disk.size).sum();
    progress.event(&Event::Expect { items: plan.disks.len() as u64, bytes, complete: true });
    let mut counts = Counts::default();
    for (disk, target) in plan.disks.iter().zip(targets) {
        let entry = reader.lookup(&disk.item)?;
        let entry =
            entry.ok_or_else(|| Error::integrity(format!("/{} is gone from the point", disk.item)))?;
        let shifted = Shifted { base: counts, inner: progress.as_ref() };
        write_disk(reader.blocks(&entry)?.as_ref(), target.as_ref(), false, jobs(), &shifted)
            .map_err(|error| error.during(format!("cannot write {}", disk.path.display())))?;
        counts.items += 1;
        counts.bytes += disk.size;
        counts.written_bytes += target.written.load(Ordering::Relaxed);
        progress.event(&Event::Done(counts));
    }
    let disks: Vec<WrittenDisk> =
        targets.iter().map(|target| WrittenDisk::Blocks(Arc::<Careful>::clone(target))).collect();
    let applied = newer.apply(&disks, progress)?;
    for target in targets {
        target.put_head(NOTE_BYTES..usize::MAX)?;
    }
    for target in targets {
        target.put_head(0..NOTE_BYTES)?;
    }
    Ok((counts, applied))
}

fn jobs() -> usize {
    std::thread::available_parallelism().map_or(2, std::num::NonZero::get)
}

/// Writes only what differs, and keeps the beginning of the disk back until the rest is there: whoever reads here finds
/// what it will be.
struct Careful {
    inner: Overwrite,
    head: Mutex<Vec<u8>>,
    written: AtomicU64,
}

impl Careful {
    fn new(inner: Overwrite) -> Self {
        let length = usize::try_from(HEAD.min(inner.size())).unwrap_or_default();
        Self { inner, head: Mutex::new(vec![0; length]), written: AtomicU64::new(0) }
    }

    fn head(&self) -> MutexGuard<'_, Vec<u8>> {
        self.head.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a note where the disk began.
    fn take_head(&self, undo: &PointId, point: &PointId) -> Result<()> {
        let length = self.head().len();
        let mut note = format!(
            "{NOTE}\nundo {undo}\npoint {point}\nThis disk is being restored by Mainstay and is neither old nor new.\n\
             Run the restore again to finish it, or restore the undo point.\n"
        )
        .into_bytes();
        note.resize(NOTE_BYTES.min(length), 0);
        self.inner.write_at(0, &note)?;
        self.inner.zero(note.len() as u64..length as u64)?;
        self.inner.flush()
    }

    /// Writes this part of what was kept back; durable when it returns.
    fn put_head(&self, part: Range<usize>) -> Result<()> {
        let head = self.head();
        let part = part.start.min(head.len())..part.end.min(head.len());
        self.inner.write_at(part.start as u64, head.get(part).unwrap_or_default())?;
        self.inner.flush()
    }

    /// Does `keep` with the part of `range` that is kept back; the rest.
    fn split(&self, range: Range<u64>, keep: impl FnOnce(&mut [u8])) -> Range<u64> {
        let mut head = self.head();
        let end = head.len() as u64;
        if range.start < end {
            let inside = range.start as usize..range.end.min(end) as usize;
            keep(head.get_mut(inside).unwrap_or_default());
        }
        range.start.max(end)..range.end.max(end)
    }

    /// Runs `act` on each stretch of `range` where the disk is not what `wanted` says: zeros, if it is `None`.
    fn differing(
        &self,
        range: Range<u64>,
        wanted: Option<&[u8]>,
        act: &mut dyn FnMut(Range<u64>) -> Result<()>,
    ) -> Result<()> {
        let mut present = vec![0; (range.end - range.start).min(2 << 20) as usize];
        let (mut at, mut run) = (range.start, range.start..range.start);
        while at < range.end {
            let piece = (range.end - at).min(present.len() as u64) as usize;
            let present = present.get_mut(..piece).unwrap_or_default();
            self.inner.read_at(at, present)?;
            let mut rest: &[u8] = present;
            while !rest.is_empty() {
                let grain = (GRAIN - at % GRAIN).min(rest.len() as u64) as usize;
                let (now, later) = rest.split_at(grain);
                let offset = (at - range.start) as usize;
                let same = match wanted {
                    Some(wanted) => wanted.get(offset..offset + grain) == Some(now),
                    None => now.iter().all(|byte| *byte == 0),
                };
                if same {
                    if !run.is_empty() {
                        act(run)?;
                    }
                    run = at + grain as u64..at + grain as u64;
                } else {
                    run.end = at + grain as u64;
                }
                at += grain as u64;
                rest = later;
            }
        }
        if run.is_empty() { Ok(()) } else { act(run) }
    }
}

impl Blocks for Careful {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        self.inner.extents(range)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let range = offset..offset + buffer.len() as u64;
        let rest = self.split(range.clone(), |head| {
            buffer.get_mut(..head.len()).unwrap_or_default().copy_from_slice(head);
        });
        let buffer = buffer.get_mut((rest.start - range.start) as usize..).unwrap_or_default();
        if buffer.is_empty() { Ok(()) } else { self.inner.read_at(rest.start, buffer) }
    }
}

impl WritableBlocks for Careful {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let range = offset..offset + data.len() as u64;
        let rest = self.split(range.clone(), |head| {
            let length = head.len();
            head.copy_from_slice(data.get(..length).unwrap_or_default());
        });
        if rest.is_empty() {
            return Ok(());
        }
        let data = data.get((rest.start - range.start) as usize..).unwrap_or_default();
        let start = rest.start;
        self.differing(rest, Some(data), &mut |run| {
            let part = (run.start - start) as usize..(run.end - start) as usize;
            self.written.fetch_add(run.end - run.start, Ordering::Relaxed);
            self.inner.write_at(run.start, data.get(part).unwrap_or_default())
        })
    }

    fn zero(&self, range: Range<u64>) -> Result<()> {
        let rest = self.split(range, |head| head.fill(0));
        let mut at = rest.start;
        while at < rest.end {
            let window = at..rest.end.min(at.saturating_add(WINDOW_BYTES));
            for extent in self.inner.extents(window.clone())? {
                // Whatever reads as zeros stays as it is.
                if extent.kind == ExtentKind::Data {
                    self.differing(extent.range, None, &mut |run| {
                        self.written.fetch_add(run.end - run.start, Ordering::Relaxed);
                        self.inner.zero(run)
                    })?;
                }
            }
            at = window.end;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }
}
