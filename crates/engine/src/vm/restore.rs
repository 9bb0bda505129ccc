//! Writing a machine's disks out of its point: as image files beside its description, or over bare disks.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{
    Blocks as _, Body, Captured, Code, Counts, Error, Event, Item, ItemPath, Kind, Phase, Piece, Progress,
    Receipt, Result, Skip, Target,
};
use mainstay_diskimage::partition::refit;
use mainstay_repository::{Entry, PointInfo, PointReader};
use mainstay_workloads::vm::{DISKS, disk_path};

use super::disks::{ImageFormat, ImageTarget, RawTarget, Shifted, write_disk};
use crate::copy::copy;

/// The longest document of a machine, in bytes.
const DOCUMENT_MAX: usize = 16 << 20;

/// Where the disks of a machine go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskPlaces {
    /// As image files in a directory.
    Directory(ImageFolder),
    /// Over these devices, by the names of the disks.
    Devices(BTreeMap<String, PathBuf>),
}

/// A directory for image files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFolder {
    /// Made if it is not there.
    pub directory: PathBuf,
    pub format: ImageFormat,
    /// The documents that describe the machine, too.
    pub documents: bool,
    /// The disks wanted, by name; all when `None`.
    pub disks: Option<Vec<String>>,
    /// Bytes that a disk is to have, by name, when they are not those that it had.
    pub sizes: BTreeMap<String, u64>,
}

impl ImageFolder {
    /// For every disk as it was, and the documents.
    pub fn new(directory: PathBuf) -> Self {
        let (format, sizes) = (ImageFormat::Raw, BTreeMap::new());
        Self { directory, format, documents: true, disks: None, sizes }
    }

    /// The file of a disk.
    pub fn image(&self, disk: &str) -> PathBuf {
        self.directory.join(format!("{disk}.{}", self.format.name()))
    }
}

/// One file or device that will be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Goal {
    pub item: ItemPath,
    pub path: PathBuf,
    /// A device, which is written over.
    pub is_device: bool,
    /// Bytes of the item.
    pub size: u64,
    /// Of an image file.
    pub format: ImageFormat,
    /// Bytes that the disk will have; its own, unless others were asked for.
    pub length: u64,
}

/// What [`restore_machine`] will write.
#[derive(Clone, Debug)]
pub struct MachinePlan {
    pub point: PointInfo,
    pub goals: Vec<Goal>,
    /// To be made first.
    directory: Option<PathBuf>,
}

impl MachinePlan {
    /// Content bytes of all that is written.
    pub fn bytes(&self) -> u64 {
        self.goals.iter().map(|goal| goal.size).sum()
    }

    /// The goals that are disks, in the order of their names.
    pub fn disks(&self) -> impl Iterator<Item = &Goal> {
        let directory = ItemPath::new(DISKS).unwrap_or_default();
        self.goals.iter().filter(move |goal| goal.item.is_within(&directory))
    }

    pub fn writes_over_devices(&self) -> bool {
        self.goals.iter().any(|goal| goal.is_device)
    }
}

/// Finds the disks and says where each goes.
///
/// Errors: [`Code::NotFound`] for a disk that the point does not have, [`Code::AlreadyExists`] for a file that is there,
/// [`Code::Usage`] for what is no device.
pub fn plan_machine(reader: &PointReader, places: &DiskPlaces) -> Result<MachinePlan> {
    let disks = machine_disks(reader)?;
    let mut goals = Vec::new();
    let mut directory = None;
    match places {
        DiskPlaces::Directory(folder) => {
            directory = Some(folder.directory.clone());
            goals = new_files(reader, folder, &disks)?;
        }
        DiskPlaces::Devices(devices) => {
            for (name, path) in devices {
                let entry = find(&disks, name)?;
                let length = RawTarget::device(path)?.size();
                let (item, size) = (entry.path.clone(), entry.metadata.size);
                let (path, format) = (path.clone(), ImageFormat::Raw);
                goals.push(Goal { item, path, is_device: true, size, format, length });
            }
        }
    }
    goals.sort_by(|left, right| left.item.cmp(&right.item));
    Ok(MachinePlan { point: reader.info().clone(), goals, directory })
}

/// Finds a disk of the point.
fn find<'a>(disks: &'a [Entry], name: &str) -> Result<&'a Entry> {
    let item = disk_path(name)?;
    disks.iter().find(|entry| entry.path == item).ok_or_else(|| {
        let known: Vec<String> =
            disks.iter().map(|entry| String::from_utf8_lossy(entry.path.name()).into_owned()).collect();
        Error::new(Code::NotFound, format!("the point has no disk {name:?}"))
            .hint(format!("it has {}", known.join(", ")))
    })
}

fn new_files(reader: &PointReader, folder: &ImageFolder, disks: &[Entry]) -> Result<Vec<Goal>> {
    for name in folder.disks.iter().flatten().chain(folder.sizes.keys()) {
        find(disks, name)?;
    }
    let mut goals = Vec::new();
    let mut add = |entry: &Entry, path: PathBuf, format, length| {
        if path.symlink_metadata().is_ok() {
            return Err(Error::new(Code::AlreadyExists, format!("{} exists already", path.display()))
                .hint("choose another directory, or move it away"));
        }
        let (item, size) = (entry.path.clone(), entry.metadata.size);
        goals.push(Goal { item, path, is_device: false, size, format, length });
        Ok(())
    };
    if folder.documents {
        let documents = reader.list(&ItemPath::root())?;
        for entry in documents.iter().filter(|entry| entry.metadata.kind == Kind::Record) {
            let name = String::from_utf8_lossy(entry.path.name()).into_owned();
            add(entry, folder.directory.join(name), ImageFormat::Raw, entry.metadata.size)?;
        }
    }
    for entry in disks {
        let name = String::from_utf8_lossy(entry.path.name()).into_owned();
        if folder.disks.as_ref().is_some_and(|wanted| !wanted.contains(&name)) {
            continue;
        }
        let length = folder.sizes.get(&name).copied().unwrap_or(entry.metadata.size);
        if length != entry.metadata.size {
            // Says now that it does not fit.
            refit(reader.blocks(entry)?.as_ref(), length)
                .map_err(|error| error.during(format!("the disk {name} cannot have {length} bytes")))?;
        }
        add(entry, folder.image(&name), folder.format, length)?;
    }
    Ok(goals)
}

/// The disks of the machine of a point, in the order of their names.
pub(super) fn machine_disks(reader: &PointReader) -> Result<Vec<Entry>> {
    let entries = reader.list(&ItemPath::new(DISKS).unwrap_or_default())?;
    Ok(entries.into_iter().filter(|entry| entry.metadata.kind == Kind::Disk).collect())
}

/// Carries a plan out. New files are removed again when it fails; a device is then half written.
pub fn restore_machine(
    reader: &PointReader,
    plan: &MachinePlan,
    jobs: usize,
    progress: &Arc<dyn Progress>,
) -> Result<Counts> {
    if let Some(directory) = &plan.directory {
        std::fs::create_dir_all(directory)
            .map_err(|error| Error::io(format!("cannot make {}", directory.display()), error))?;
    }
    progress.event(&Event::Phase(Phase::Copying));
    progress.event(&Event::Expect { items: plan.goals.len() as u64, bytes: plan.bytes(), complete: true });
    let source = reader.source(plan.goals.iter().map(|goal| goal.item.clone()).collect())?;
    let target = MachineTarget {
        goals: plan.goals.clone(),
        made: Vec::new(),
        counts: Counts::default(),
        jobs,
        progress: Arc::clone(progress),
    };
    copy(Box::new(source), Box::new(target), progress.as_ref())
}

/// Writes disks and documents. Dropped before it has finished, it removes the files it made.
struct MachineTarget {
    goals: Vec<Goal>,
    made: Vec<PathBuf>,
    counts: Counts,
    jobs: usize,
    progress: Arc<dyn Progress>,
}

impl MachineTarget {
    fn write_disk(&mut self, item: &Item, goal: &Goal) -> Result<()> {
        let Body::Blocks(disk) = &item.body else {
            return Err(Error::integrity(format!("/{} is a disk without blocks", item.path)));
        };
        let target = if goal.is_device {
            ImageTarget::Raw(RawTarget::device(&goal.path)?)
        } else {
            let target = ImageTarget::create(&goal.path, goal.length, goal.format)?;
            self.made.push(goal.path.clone());
            target
        };
        let shifted = Shifted { base: self.counts, inner: self.progress.as_ref() };
        let written = write_disk(disk.as_ref(), &target, !goal.is_device, self.jobs, &shifted);
        self.counts.written_bytes +=
            written.map_err(|error| error.during(format!("cannot write {}", goal.path.display())))?;
        Ok(())
    }

    fn write_document(&mut self, item: &Item, goal: &Goal) -> Result<()> {
        let failed = |error| Error::io(format!("cannot write {}", goal.path.display()), error);
        let (Body::Stream(open) | Body::Pages(open)) = &item.body else { return Ok(()) };
        let mut stream = open.open()?;
        let mut text = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            match stream.read(&mut buffer)? {
                Piece::Data(length) => text.extend_from_slice(buffer.get(..length).unwrap_or_default()),
                Piece::Hole(_) => return Err(Error::integrity(format!("/{} is no document", item.path))),
                Piece::End => break,
            }
            if text.len() > DOCUMENT_MAX {
                return Err(Error::integrity(format!("/{} is too long for a document", item.path)));
            }
        }
        let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&goal.path);
        let mut file = file.map_err(failed)?;
        self.made.push(goal.path.clone());
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(failed)
    }
}

impl Target for MachineTarget {
    type Done = Counts;

    fn put(&mut self, item: Item) -> Result<()> {
        let Some(goal) = self.goals.iter().find(|goal| goal.item == item.path).cloned() else {
            return Ok(());
        };
        match item.metadata.kind {
            Kind::Disk => self.write_disk(&item, &goal)?,
            _ => self.write_document(&item, &goal)?,
        }
        self.counts.items += 1;
        self.counts.bytes += goal.size;
        self.progress.event(&Event::Done(self.counts));
        Ok(())
    }

    fn skip(&mut self, _skip: Skip) -> Result<()> {
        self.counts.skipped += 1;
        Ok(())
    }

    fn finish(mut self: Box<Self>, _captured: &Captured) -> Result<(Receipt, Counts)> {
        for directory in self.made.iter().filter_map(|path| path.parent()) {
            sync_directory(directory)?;
        }
        self.made.clear();
        let counts = self.counts;
        Ok((Receipt { point: None, counts }, counts))
    }
}

impl Drop for MachineTarget {
    fn drop(&mut self) {
        for path in &self.made {
            // Whatever stays is at worst in the way of the next try, which then says so.
            let _stays = std::fs::remove_file(path);
        }
    }
}

pub(super) fn sync_directory(path: &Path) -> Result<()> {
    let synced = std::fs::File::open(path).and_then(|directory| directory.sync_all());
    synced.map_err(|error| Error::io(format!("cannot make {} durable", path.display()), error))
}
