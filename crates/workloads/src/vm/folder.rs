//! A folder of images as machines that are shut down. An image in the folder is a machine of one disk; a folder in it
//! with images is a machine of all of them, described by a document beside them if there is one: libvirt's, or ours. A
//! machine that is defined here gets a script that starts it. Images that others are built upon are no machines.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Clock, Code, Consistency, Error, Result, Time};
use mainstay_diskimage::container::{self, Directories, Format};
use serde_json::{Value, json};

use super::agent::Agent;
use super::channel::clean;
use super::domain_xml;
use super::hypervisor::{
    Caps, DiskPlace, DiskSummary, Hypervisor, MachineId, MachineSnapshot, MachineState, MachineSummary,
    SnapshotRequest, Swept,
};
use super::machine::{Machine, MachineDisk};
use super::offline::{self, Offline};
use super::qemu::script::{AGENT, MONITOR, SCRIPT, is_ours, script};
use super::qmp::Qmp;
use super::sprawl::ImageSeen;
use crate::process::Program;

/// The name of this driver in marks.
const DRIVER: &str = "folder";

/// The description of a machine in the folder of its own.
const DESCRIPTION: &str = "machine.json";

/// What a machine may take to start; it goes on in the background then.
const START: Duration = Duration::from_secs(60);

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

    /// The monitor of a machine that runs by its script.
    fn monitor(&self, machine: &MachineId) -> Result<Qmp> {
        Qmp::connect(&self.path.join(&machine.0).join(MONITOR).into())
    }

    /// The script that starts a machine.
    ///
    /// Errors: [`Code::Unsupported`] when it has none of ours.
    fn script(&self, machine: &MachineId) -> Result<PathBuf> {
        let path = self.path.join(&machine.0).join(SCRIPT);
        if std::fs::read_to_string(&path).is_ok_and(|text| is_ours(&text)) {
            return Ok(path);
        }
        let what = format!("the machine {} is images only: nothing here runs it", clean(&machine.0));
        Err(Error::new(Code::Unsupported, what)
            .hint("name its hypervisor, or restore it with --as, which writes a script that starts it"))
    }

    fn machine(&self, id: &MachineId) -> Result<Machine> {
        let found = self.machines()?.into_iter().find(|(name, _)| *name == id.0);
        let (name, images) = found.ok_or_else(|| {
            let what = format!("there is no machine {} in {}", clean(&id.0), self.path.display());
            Error::new(Code::NotFound, what)
        })?;
        let described = described(&self.path.join(&id.0));
        let document =
            described.or_else(|| images.first().and_then(|image| document(&self.path, &image.path)));
        let mut machine = document.unwrap_or_else(|| Machine::new(id.clone(), name));
        machine.id = id.clone();
        machine.disks = images.iter().map(disk).collect();
        Ok(machine)
    }
}

/// What [`Folder::define`] wrote down.
fn described(folder: &Path) -> Option<Machine> {
    let path = folder.join(DESCRIPTION);
    let size = std::fs::metadata(&path).ok()?.len();
    let text = (size <= domain_xml::DOCUMENT_MAX as u64).then(|| std::fs::read(&path).ok())??;
    Machine::from_json(&text).ok()
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
        Caps { offline: true, define: true, ..Caps::default() }
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
            let id = MachineId(name.clone());
            // Somebody who speaks to the monitor keeps others out.
            let runs = self.monitor(&id).map_or_else(|error| error.code() == Code::Conflict, |_| true);
            MachineSummary {
                id,
                name,
                state: if runs { MachineState::Running } else { MachineState::ShutOff },
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
        let offline = Offline {
            driver: DRIVER,
            machine,
            scratch: None,
            reached: Consistency::Offline,
            notes: Vec::new(),
        };
        offline::take(offline, request, self.clock.as_ref())
    }

    /// Writes a script that starts the machine, and its description, beside its disks.
    fn define(&self, machine: &Machine, disks: &[DiskPlace], start: bool) -> Result<MachineId> {
        let folder = self.path.join(&machine.name);
        if disks.iter().any(|disk| disk.path.parent() != Some(folder.as_path())) {
            let what = format!("the disks of {} do not lie in {}", clean(&machine.name), folder.display());
            return Err(Error::new(Code::Usage, what).hint("each machine has the directory of its name"));
        }
        let id = MachineId(machine.name.clone());
        let text = script(machine, disks, &folder)?;
        write_new(&folder.join(DESCRIPTION), &machine.to_json()?, 0o600)?;
        write_new(&folder.join(SCRIPT), text.as_bytes(), 0o700)?;
        if start {
            self.start(&id)?;
        }
        Ok(id)
    }

    fn start(&self, machine: &MachineId) -> Result<()> {
        let script = self.script(machine)?;
        Program::new(script, START).argument("-daemonize").run_well().map(drop)
    }

    fn stop(&self, machine: &MachineId) -> Result<()> {
        self.monitor(machine)?.run("system_powerdown", json!({})).map(drop)
    }

    fn destroy(&self, machine: &MachineId) -> Result<()> {
        let script = self.script(machine)?;
        if let Ok(mut monitor) = self.monitor(machine) {
            monitor.run("quit", json!({}))?;
        }
        for path in [&script, &script.with_file_name(DESCRIPTION)] {
            std::fs::remove_file(path)
                .map_err(|error| Error::io(format!("cannot remove {}", path.display()), error))?;
        }
        Ok(())
    }

    fn ask_guest(
        &self,
        machine: &MachineId,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value> {
        Agent::connect(&self.path.join(&machine.0).join(AGENT).into())?.run(command, arguments, limit)
    }

    fn sweep(&self) -> Result<Swept> {
        Ok(Swept::default())
    }
}

/// Leaves a file of earlier as it is when it says the same.
fn write_new(path: &Path, text: &[u8], mode: u32) -> Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    if std::fs::read(path).is_ok_and(|there| there == text) {
        return Ok(());
    }
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let written = file.and_then(|mut file| file.write_all(text).and_then(|()| file.sync_all()));
    written.map_err(|error| Error::io(format!("cannot write {}", path.display()), error))
}
