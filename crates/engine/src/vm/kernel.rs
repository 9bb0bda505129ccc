//! Volumes that no reader of ours knows, read through the kernel when somebody asks for that: shown to it as a file,
//! mounted where nobody else sees it, and read from there. What the kernel writes, such as a journal that it replays, goes
//! into a file of this run and never reaches the volume.
//!
//! The kernel's parsers are not confined: an image that was made to hurt them can.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mainstay_core::{Blocks, Code, Error, ItemPath, Metadata, Piece, Result};
use mainstay_diskimage::fs::{
    About, Content, DirEntry, FileExtent, FileSystem, FsKind, Node, Opened, Page, Visitor,
};
use mainstay_nbd::{Overlay, WritableBlocks};
use mainstay_workloads::files::OpenTree;
use mainstay_workloads::process::Program;
use rustix::fs::{Mode, OFlags};

use super::mounted::Place;
use super::private::with_own_mounts;
use crate::mount::DiskFiles;

/// How long a program of these may take: a long journal is replayed.
const LIMIT: Duration = Duration::from_secs(600);

/// So many files of one volume are told from each other.
const NODES_MAX: usize = 4 << 20;

/// Descriptors from here on are closed last when a process ends: whoever answers the kernel for the disk is gone by then,
/// and nobody waits for him.
const LATE: i32 = 900;

/// Opens by the kernel what `opened`, which a reader of ours said of `volume`, leaves unread. `scratch` is where it is
/// mounted, and where what the kernel writes is kept.
///
/// Errors: those of the reader, and why the kernel did not read it either.
pub fn or_by_kernel(opened: Result<Opened>, volume: Arc<dyn Blocks>, scratch: &Path) -> Result<Opened> {
    let by_kernel =
        |volume| -> Result<Opened> { Ok(Opened::FileSystem(Arc::new(Volume::mount(volume, scratch)?))) };
    match opened {
        Ok(Opened::Other(other)) if other.may_be_mounted() => by_kernel(volume).map_err(|error| {
            error.during(format!("what lies there ({}) cannot be read by the kernel", other.name()))
        }),
        Err(error) if error.code() == Code::Unsupported => {
            by_kernel(volume).map_err(|kernel| kernel.during(error.chain().join(": ")))
        }
        opened => opened,
    }
}

/// A file system that the kernel reads.
struct Volume {
    about: About,
    /// Goes before what it lies on.
    tree: OpenTree,
    nodes: Mutex<Nodes>,
    /// The last directory that was listed: pages of it are asked for one after the other.
    listed: Mutex<Option<Listed>>,
    _shown: DiskFiles,
    _place: Place,
}

type Listed = (Node, Arc<[Vec<u8>]>);

impl Volume {
    fn mount(volume: Arc<dyn Blocks>, scratch: &Path) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            return Err(Error::new(Code::Unsupported, "only root may have the kernel mount a volume")
                .hint("run as root, or do without --kernel-mount"));
        }
        let place = Place::new(scratch)?;
        let size = volume.size();
        let disk = discarding(volume, &place)?;
        let (about, root, shown) = with_own_mounts(|| {
            let shown = DiskFiles::new(vec![disk], &place.disks())?;
            let about = mount(&shown.path(0), &place.tree(), size)?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let root = rustix::fs::open(place.tree(), flags, Mode::empty());
            let root = root
                .and_then(late)
                .map_err(|errno| Error::io("cannot open what was mounted", errno.into()))?;
            // The mount itself ends with this thread; what is open keeps what is behind it.
            Ok((about, root, shown))
        })?;
        let nodes = Mutex::new(Nodes::default());
        Ok(Self {
            about,
            tree: OpenTree::new(root),
            nodes,
            listed: Mutex::default(),
            _shown: shown,
            _place: place,
        })
    }

    fn nodes(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, node: Node) -> Result<ItemPath> {
        self.nodes().path(node).ok_or_else(|| Error::bug("a file of another volume is asked for"))
    }

    fn names(&self, directory: Node) -> Result<Arc<[Vec<u8>]>> {
        let mut listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, names)) = listed.as_ref().filter(|(known, _)| *known == directory) {
            return Ok(Arc::clone(names));
        }
        let names: Arc<[Vec<u8>]> = self.tree.names(&self.path(directory)?)?.into();
        *listed = Some((directory, Arc::clone(&names)));
        Ok(names)
    }
}

/// The volume, and over it what the kernel writes: in files without a name, which go with this process.
fn discarding(volume: Arc<dyn Blocks>, place: &Place) -> Result<Arc<dyn WritableBlocks>> {
    let written = place.disks().join("written");
    let overlay = Overlay::open(&written, volume, &[0; 32])?;
    for name in [written.clone(), written.with_extension("map")] {
        std::fs::remove_file(&name)
            .map_err(|error| Error::io("cannot hide what the kernel writes", error))?;
    }
    Ok(Arc::new(overlay))
}

/// Mounts what lies in a file, and says what it is.
fn mount(file: &Path, at: &Path, size: u64) -> Result<About> {
    let probed = Program::new("blkid", LIMIT).arguments(["-p", "-o", "export", "--"]).argument(file).run()?;
    let said = String::from_utf8_lossy(&probed.output).into_owned();
    let value = |key: &str| said.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let Some(kind) = value("TYPE").filter(|_| value("USAGE") == Some("filesystem")) else {
        return Err(Error::new(Code::Unsupported, "no file system is known by its marks there"));
    };
    let device =
        Program::new("losetup", LIMIT).arguments(["--find", "--show", "--"]).argument(file).run_well()?;
    let device = String::from_utf8_lossy(&device).trim().to_owned();
    // What it says it wants to happen when it is damaged is not asked for here: the machine's end, perhaps.
    let calm = if kind.starts_with("ext") { ",errors=continue" } else { "" };
    let options = format!("ro,nosuid,nodev,noexec,noatime{calm}");
    let mounted = Program::new("mount", LIMIT)
        .arguments(["-t", kind, "-o", &options, "--", &device])
        .argument(at)
        .run_well();
    // It goes when the mount goes.
    let detached = Program::new("losetup", LIMIT).arguments(["--detach", &device]).run_well();
    mounted?;
    detached?;
    Ok(About {
        kind: FsKind::Kernel,
        label: value("LABEL").unwrap_or_default().into(),
        uuid: value("UUID").unwrap_or_default().to_owned(),
        size,
        block_size: 4096,
        notes: vec![format!("{kind}, read by the kernel")],
    })
}

fn late(root: OwnedFd) -> rustix::io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(&root, LATE).unwrap_or(root))
}

/// Files by their numbers: each a name in a directory that has a number.
#[derive(Default)]
struct Nodes {
    /// From number 1 on; the root is 0.
    names: Vec<(u64, Arc<[u8]>)>,
    numbers: HashMap<(u64, Arc<[u8]>), u64>,
}

impl Nodes {
    fn number(&mut self, directory: Node, name: &[u8]) -> Result<Node> {
        let key = (directory.number, Arc::from(name));
        if let Some(number) = self.numbers.get(&key) {
            return Ok(Node { space: 0, number: *number });
        }
        if self.names.len() >= NODES_MAX {
            let what = format!("a volume that the kernel reads has more than {NODES_MAX} files");
            return Err(Error::new(Code::Unsupported, what).hint("look at a part of it at a time"));
        }
        self.names.push(key.clone());
        let number = self.names.len() as u64;
        self.numbers.insert(key, number);
        Ok(Node { space: 0, number })
    }

    fn path(&self, node: Node) -> Option<ItemPath> {
        let (mut names, mut at) = (Vec::new(), node.number);
        while at > 0 {
            let (directory, name) = self.names.get(usize::try_from(at - 1).ok()?)?;
            names.push(name.as_ref());
            at = *directory;
        }
        names.reverse();
        ItemPath::new(names.join(&b'/')).ok()
    }
}

impl FileSystem for Volume {
    fn about(&self) -> &About {
        &self.about
    }

    fn root(&self) -> Node {
        Node { space: 0, number: 0 }
    }

    fn child(&self, directory: Node, name: &[u8]) -> Result<Option<Node>> {
        let Ok(path) = self.path(directory)?.join(name) else { return Ok(None) };
        let found = self.tree.metadata(&path)?;
        found.map(|_metadata| self.nodes().number(directory, name)).transpose()
    }

    fn read_dir(&self, directory: Node, from: u64, limit: usize) -> Result<Page> {
        let names = self.names(directory)?;
        let from = usize::try_from(from).unwrap_or(usize::MAX).min(names.len());
        let end = names.len().min(from.saturating_add(limit));
        let mut nodes = self.nodes();
        let entry = |name: &Vec<u8>| {
            Ok(DirEntry { name: name.clone(), node: nodes.number(directory, name)?, kind: None })
        };
        let entries = names.get(from..end).unwrap_or_default().iter().map(entry).collect::<Result<_>>()?;
        Ok(Page { entries, next: (end < names.len()).then_some(end as u64) })
    }

    fn metadata(&self, node: Node) -> Result<Metadata> {
        let path = self.path(node)?;
        self.tree.metadata(&path)?.ok_or_else(|| Error::new(Code::NotFound, format!("there is no {path}")))
    }

    fn content(&self, file: Node) -> Result<Arc<dyn Content>> {
        let path = self.path(file)?;
        let file = self.tree.file(&path)?;
        let metadata = file.metadata().map_err(|error| Error::io(format!("cannot read {path}"), error))?;
        if !metadata.is_file() {
            return Err(Error::new(Code::Unsupported, format!("{path} is no regular file")));
        }
        Ok(Arc::new(Opening { file, path, size: metadata.len() }))
    }

    fn extents(&self, _file: Node) -> Result<Vec<FileExtent>> {
        Ok(Vec::new())
    }

    fn free(&self, _visit: &mut dyn FnMut(Range<u64>) -> Result<()>) -> Result<()> {
        Ok(())
    }

    fn files(&self, _visit: &mut Visitor<'_>) -> Result<()> {
        Ok(())
    }
}

/// A file that is open.
struct Opening {
    file: File,
    path: ItemPath,
    size: u64,
}

impl Content for Opening {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Piece> {
        let length =
            usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX).min(buffer.len());
        let part = buffer.get_mut(..length).unwrap_or_default();
        if part.is_empty() {
            return Ok(Piece::End);
        }
        let failed = |error| Error::io(format!("cannot read {}", self.path), error);
        match self.file.read_at(part, offset).map_err(failed)? {
            0 => Err(Error::integrity(format!("{} ends before its size", self.path))),
            length => Ok(Piece::Data(length)),
        }
    }
}
