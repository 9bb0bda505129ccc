//! A plan looked at against a repository and a host, and carried out: what fails stops those machines that come after it,
//! and no others.

use std::collections::BTreeMap;
use std::sync::Arc;

use mainstay_core::{Blocks, Code, Error, ExtentKind, Kind, Progress, Result};
use mainstay_repository::{PointInfo, PointReader};
use mainstay_workloads::vm::{Hypervisor, Machine, disk_path};

use super::super::apply::Newer;
use super::machine::{Record, Recovered, Stage, Wait, check_recovery, recover_machine};
use super::plan::{PlannedMachine, RecoveryPlan};

/// What a medium is taken to write in a second, for estimates.
const BYTES_PER_SECOND: f64 = 150e6;
/// What a guest is taken to need until its agent answers, in seconds.
const BOOT_SECONDS: f64 = 30.0;
/// Extents are asked for in windows of this length.
const WINDOW_BYTES: u64 = 1 << 30;

/// A machine of a plan, and how it stands.
pub struct Step {
    pub planned: PlannedMachine,
    /// What to do, or why it cannot be done.
    pub ready: Result<Ready>,
}

pub struct Ready {
    pub point: PointInfo,
    /// The points whose newer files are put on its disks.
    pub files: Vec<PointInfo>,
    pub machine: Machine,
    /// How far an earlier run came.
    pub stage: Option<Stage>,
    /// Bytes that its disks will have, and bytes of data in them.
    pub bytes: u64,
    pub data_bytes: u64,
    /// An estimate; 0 for what is complete.
    pub seconds: f64,
    reader: PointReader,
}

/// What became of a machine of a plan.
pub enum Outcome {
    Done(Box<Recovered>),
    Failed(Error),
    /// Not tried, since this machine, which comes before it, failed.
    Waits(String),
}

/// Finds the image that a text means, and the points of newer files that belong on it.
pub type Find<'a> = &'a dyn Fn(&str) -> Result<(PointInfo, Vec<PointInfo>)>;

/// Looks at every machine of a plan; changes nothing. `find` knows how people name points; of `newer` the files are
/// found for each machine.
///
/// Errors: [`Code::Cancelled`]; whatever is wrong with one machine is in its [`Step::ready`].
pub fn look(
    plan: &RecoveryPlan,
    host: &dyn Hypervisor,
    find: Find<'_>,
    newer: &Newer<'_>,
    progress: &dyn Progress,
) -> Result<Vec<Step>> {
    let points = newer.repository.points()?;
    let mut steps = Vec::new();
    for planned in &plan.machines {
        progress.check()?;
        let ready = ready(planned, host, find, newer, &points);
        steps.push(Step { planned: planned.clone(), ready });
    }
    Ok(steps)
}

fn ready(
    planned: &PlannedMachine,
    host: &dyn Hypervisor,
    find: Find<'_>,
    newer: &Newer<'_>,
    points: &[PointInfo],
) -> Result<Ready> {
    // What was begun goes on with its own point, whatever `latest` means by now.
    let named = || Ok(find(&planned.point)?.0.id);
    let record = Record::begun(&planned.recovery.folder.directory, &planned.point, named)?;
    let (id, files) = match &record {
        Some(record) => (record.point()?, record.files(points)?),
        None => {
            let (point, files) = find(&planned.point)?;
            (point.id, if planned.image_only { Vec::new() } else { files })
        }
    };
    let reader = newer.repository.read(&id)?;
    let newer = Newer { files: &files, ..*newer };
    let machine = match &record {
        Some(record) => record.machine.clone(),
        None => check_recovery(&reader, &planned.recovery, host, &newer)?,
    };
    let (mut bytes, mut data_bytes) = (0, 0);
    for disk in &machine.disks {
        let entry = reader.lookup(&disk_path(&disk.name)?)?.filter(|entry| entry.metadata.kind == Kind::Disk);
        let Some(entry) = entry else { continue };
        let sizes = &planned.recovery.folder.sizes;
        bytes += sizes.get(&disk.name).copied().unwrap_or(entry.metadata.size);
        data_bytes += data(reader.blocks(&entry)?.as_ref())?;
    }
    let stage = record.map(|record| record.stage(planned.recovery.start));
    let mut seconds = if stage.is_none_or(|stage| stage == Stage::Begun) {
        data_bytes as f64 / BYTES_PER_SECOND
    } else {
        0.0
    };
    if planned.recovery.start && stage.is_none_or(|stage| stage < Stage::Started) {
        seconds += match planned.recovery.wait {
            Wait::Nothing => 0.0,
            Wait::Agent => BOOT_SECONDS,
            Wait::Time(time) => time.as_secs_f64(),
        };
    }
    Ok(Ready { point: reader.info().clone(), files, machine, stage, bytes, data_bytes, seconds, reader })
}

/// Bytes that are no holes.
fn data(disk: &dyn Blocks) -> Result<u64> {
    let (mut at, mut bytes) = (0, 0);
    while at < disk.size() {
        let window = at..disk.size().min(at + WINDOW_BYTES);
        let extents = disk.extents(window.clone())?;
        let data = extents.iter().filter(|extent| extent.kind == ExtentKind::Data);
        bytes += data.map(|extent| extent.range.end - extent.range.start).sum::<u64>();
        at = window.end;
    }
    Ok(bytes)
}

/// Carries the steps out in their order. `told` hears of each machine when it is done or given up.
///
/// Errors: [`Code::Cancelled`] alone: what was done stays, and the next run goes on.
pub fn recover(
    steps: Vec<Step>,
    host: &dyn Hypervisor,
    newer: &Newer<'_>,
    jobs: usize,
    progress: &Arc<dyn Progress>,
    told: &mut dyn FnMut(&PlannedMachine, &Outcome),
) -> Result<()> {
    // The machine that failed, by each that is not there for it.
    let mut missing: BTreeMap<String, String> = BTreeMap::new();
    for Step { planned, ready } in steps {
        progress.check()?;
        let before = planned.after.iter().find_map(|name| missing.get(name));
        let outcome = match (before, ready) {
            (Some(failed), _) => Outcome::Waits(failed.clone()),
            (None, Err(error)) => Outcome::Failed(error),
            (None, Ok(ready)) => {
                let newer = Newer { files: &ready.files, ..*newer };
                match recover_machine(&ready.reader, &planned.recovery, host, &newer, jobs, progress) {
                    Ok(done) => Outcome::Done(Box::new(done)),
                    Err(error) if error.code() == Code::Cancelled => return Err(error),
                    Err(error) => Outcome::Failed(error),
                }
            }
        };
        match &outcome {
            Outcome::Done(_) => {}
            Outcome::Failed(_) => drop(missing.insert(planned.name.clone(), planned.name.clone())),
            Outcome::Waits(failed) => drop(missing.insert(planned.name.clone(), failed.clone())),
        }
        told(&planned, &outcome);
    }
    Ok(())
}
