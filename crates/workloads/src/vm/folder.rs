//! A folder of images as machines that are shut down. An image in the folder is a machine of one disk; a folder in it
//! with images is a machine of all of them, described by a libvirt document beside them if there is one. Images that
//! others are built upon are no machines.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{Clock, Code, Error, Result, Time};
use mainstay_diskimage::container::{self, Directories, Format};

use super::channel::clean;
use super::domain_xml;
use super::hypervisor::{
    Caps, DiskPlace, DiskSummary, Hypervisor, MachineId, MachineSnapshot, MachineState, MachineSummary,
    SnapshotRequest, Swept,
};
use super::machine::{Machine, MachineDisk};
use super::offline::{self, Offline};
use super::sprawl::ImageSeen;

/// The name of this driver in marks.
const DRIVER: &str = "folder";

/// How the names of image files end.
const ENDINGS: [&str; 6] = ["qcow2", "raw", "img", "vmdk", "vhdx", "qcow"];

/// Machines that are looked for in one folder.
pub struct Folder {
    path: PathBuf,
    clock: Arc<dyn Clock>,
}

/// An image file and what it is built upon.
struct Image {
    path: PathBuf,
    format: &'static str,
    size: u64,
    backing: Vec<PathBuf>,
}

impl Folder {
    pub fn new(path: PathBuf, clock: Arc<dyn Clock>) -> Self {
        Self { path, clock }
    }

    /// The machines with their images; what cannot be read as an image has no machine.
    fn machines(&self) -> Result<Vec<(String, Vec<Image>)>> {
        let (files, folders) = entries(&self.path)?;
        let mut machines: Vec<(String, Vec<Image>)> =
            images(&files).into_iter().filter_map(|image| Some((name(&image.path)?, vec![image]))).collect();
        for folder in folders {
            let (files, _) = entries(&folder)?;
            let found = images(&files);
            if let (Some(name), false) = (name(&folder), found.is_empty()) {
                machines.push((name, found));
            }
        }
        machines.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(machines)
    }

    fn machine(&self, id: &MachineId) -> Result<Machine> {
        let found = self.machines()?.into_iter().find(|(name, _)| *name == id.0);
        let (name, images) = found.ok_or_else(|| {
            let what = format!("there is no machine {} in {}", clean(&id.0), self.path.display());
            Error::new(Code::NotFound, what)
        })?;
        let document = images.first().and_then(|image| document(&self.path, &image.path));
        let mut machine = document.unwrap_or_else(|| Machine::new(id.clone(), name));
        machine.id = id.clone();
        machine.disks = images.iter().map(disk).collect();
        Ok(machine)
    }
}

fn disk(image: &Image) -> MachineDisk {
    MachineDisk {
        name: name(&image.path).unwrap_or_default(),
        bus: None,
        format: image.format.into(),
        serial: None,
        boot_order: None,
        size: Some(image.size),
        source: image.path.to_string_lossy().into_owned(),
        read_only: false,
    }
}

/// The name of a file or folder, if it can be an item.
fn name(path: &Path) -> Option<String> {
    path.file_name().and_then(|name| name.to_str()).map(str::to_owned)
}

/// The libvirt document beside an image in a folder of its own, if there is exactly one.
fn document(top: &Path, image: &Path) -> Option<Machine> {
    let folder = image.parent().filter(|folder| *folder != top)?;
    let (files, _) = entries(folder).ok()?;
    let mut documents = files.iter().filter(|path| path.extension().is_some_and(|ending| ending == "xml"));
    let (only, None) = (documents.next()?, documents.next()) else { return None };
    let size = std::fs::metadata(only).ok()?.len();
    if size > domain_xml::DOCUMENT_MAX as u64 {
        return None;
    }
    domain_xml::parse(&std::fs::read_to_string(only).ok()?).ok()
}

/// Files and folders, each in order of their names.
fn entries(folder: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let fail = |error| Error::io(format!("cannot list {}", folder.display()), error);
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        paths.push(entry.map_err(fail)?.path());
    }
    paths.sort();
    Ok(paths.into_iter().partition(|path| !path.is_dir()))
}

/// Every image file in a folder and in those in it, by its real path.
pub(super) fn images_below(folder: &Path) -> Result<Vec<ImageSeen>> {
    let (mut files, folders) = entries(folder)?;
    for folder in folders {
        // One that may not be listed has nothing to say.
        files.extend(entries(&folder).map(|(files, _)| files).unwrap_or_default());
    }
    let seen = |path: &PathBuf| {
        let metadata = std::fs::metadata(path).ok()?;
        let opened = look(path, ending(path).as_deref());
        Some(ImageSeen {
            path: path.canonicalize().ok()?,
            bytes: metadata.blocks().saturating_mul(512),
            modified: Time::from_parts(metadata.mtime(), metadata.mtime_nsec()),
            whole: opened.is_some(),
            backing: opened.map(|image| image.backing).unwrap_or_default(),
        })
    };
    Ok(files.iter().filter(|path| is_image(path)).filter_map(seen).collect())
}

fn ending(path: &Path) -> Option<String> {
    path.extension().and_then(|ending| ending.to_str()).map(str::to_lowercase)
}

fn is_image(path: &Path) -> bool {
    ending(path).is_some_and(|ending| ENDINGS.contains(&ending.as_str()))
}

/// The images among files that nothing else is built upon.
fn images(files: &[PathBuf]) -> Vec<Image> {
    let named = files.iter().filter(|path| is_image(path));
    let opened: Vec<Image> = named.filter_map(|path| look(path, ending(path).as_deref())).collect();
    let below: BTreeSet<_> = opened.iter().flat_map(|image| image.backing.clone()).collect();
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    opened.into_iter().filter(|image| !below.contains(&real(&image.path))).collect()
}

fn look(path: &Path, ending: Option<&str>) -> Option<Image> {
    // A guest can write any header on a raw disk, so a name that says raw is believed.
    let format = (ending == Some("raw")).then_some(Format::Raw);
    let opened = container::open(path, format, &Directories::of(path).ok()?).ok()?;
    let format = match opened.format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
        Format::Vmdk => "vmdk",
        Format::Vhdx => "vhdx",
    };
    let real = |path: &PathBuf| path.canonicalize().unwrap_or_else(|_| path.clone());
    let backing = opened.files.iter().skip(1).map(real).collect();
    Some(Image { path: path.to_owned(), format, size: opened.blocks.size(), backing })
}

impl Hypervisor for Folder {
    fn name(&self) -> String {
        format!("the folder {}", self.path.display())
    }

    fn caps(&self) -> Caps {
        Caps { offline: true, ..Caps::default() }
    }

    fn list(&self) -> Result<Vec<MachineSummary>> {
        let summary = |(name, images): (String, Vec<Image>)| {
            let disk = |image: Image| DiskSummary {
                name: self::name(&image.path).unwrap_or_default(),
                format: image.format.into(),
                size: Some(image.size),
                backing: image.backing,
                path: image.path,
                bitmaps: Vec::new(),
            };
            MachineSummary {
                id: MachineId(name.clone()),
                name,
                state: MachineState::ShutOff,
                disks: images.into_iter().map(disk).collect(),
                snapshots: Vec::new(),
            }
        };
        Ok(self.machines()?.into_iter().map(summary).collect())
    }

    fn config(&self, machine: &MachineId) -> Result<Machine> {
        self.machine(machine)
    }

    fn snapshot(&self, machine: &MachineId, request: &SnapshotRequest) -> Result<Box<dyn MachineSnapshot>> {
        let machine = self.machine(machine)?;
        let offline = Offline { driver: DRIVER, machine, scratch: None, notes: Vec::new() };
        offline::take(offline, request, self.clock.as_ref())
    }

    fn define(&self, _machine: &Machine, _disks: &[DiskPlace], _start: bool) -> Result<MachineId> {
        Err(nothing_runs())
    }

    fn start(&self, _machine: &MachineId) -> Result<()> {
        Err(nothing_runs())
    }

    fn stop(&self, _machine: &MachineId) -> Result<()> {
        Err(nothing_runs())
    }

    fn destroy(&self, _machine: &MachineId) -> Result<()> {
        Err(nothing_runs())
    }

    fn sweep(&self) -> Result<Swept> {
        Ok(Swept::default())
    }
}

fn nothing_runs() -> Error {
    Error::new(Code::Unsupported, "nothing runs in a folder of images").hint("name a hypervisor")
}
