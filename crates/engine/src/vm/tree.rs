//! The file systems of a machine joined into one tree, as the machine itself mounts them.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use mainstay_core::{
    Blocks, ChangeState, Code, Error, Extent, ExtentKind, ItemPath, Kind, Metadata, Piece, Result,
    StreamReader,
};
use mainstay_diskimage::fs::{Content, FileSystem, FsKind, Node, Opened};
use mainstay_diskimage::map::Opener;
use mainstay_diskimage::volume::{Encryption, Volume, volumes};

use super::fstab::{self, Device, Line};
use super::inside::Inside;

/// So many entries of a directory are asked for at once.
const PAGE_ENTRIES: usize = 4096;
/// Of so many entries of a directory the metadata that came along is kept; that of others is asked for again.
const KNOWN_MAX: usize = 1 << 16;
/// A table of mounts is read up to this length, in bytes.
const FSTAB_MAX: usize = 1 << 20;

/// A volume of the machine and what was found on it.
pub struct VolumeSeen {
    /// `vda1`, or `group-volume`.
    pub name: String,
    pub size: u64,
    /// What lies on it: `ext4`, `swap space`, `a LUKS container that no key was given for`.
    pub holds: String,
    /// Where the machine mounts it, if it was found out.
    pub mounted: Option<ItemPath>,
    label: Option<String>,
    uuid: Option<String>,
    file_system: Option<Arc<dyn FileSystem>>,
    trouble: Option<Trouble>,
    /// The index of the disk and the bytes of it that are the volume, if they are, as they lie there and in one piece.
    pub(super) stretch: Option<(usize, Range<u64>)>,
}

/// Why there may be files on a volume that nobody sees.
enum Trouble {
    Locked,
    Unreadable(Code, String),
}

/// The tree.
pub(super) struct Tree {
    pub(super) volumes: Vec<VolumeSeen>,
    /// Outer directories first; the first one is the root if there is one.
    pub(super) mounts: Vec<Mount>,
    /// Where the machine mounts what is not on its disks, or was not found there.
    pub(super) elsewhere: Vec<ItemPath>,
    pub(super) notes: Vec<String>,
}

pub(super) struct Mount {
    pub(super) at: ItemPath,
    base: Node,
    /// The index of the volume, and its line of the table.
    pub(super) volume: usize,
    pub(super) line: Line,
    file_system: Arc<dyn FileSystem>,
    /// Keeps hard links of different file systems apart.
    device: u64,
}

/// The index of the volume that a machine runs from, its root there, by path and by node, and its table of mounts.
type Root = (usize, (ItemPath, Node), Vec<Line>);

/// A file or directory of the tree.
#[derive(Clone)]
pub(super) struct Leaf {
    file_system: Arc<dyn FileSystem>,
    node: Node,
    device: u64,
    /// As the file system told it, where it came with the directory.
    known: Option<Box<Metadata>>,
}

impl Leaf {
    pub(super) fn metadata(&self) -> Result<Metadata> {
        let mut metadata = match &self.known {
            Some(known) => (**known).clone(),
            None => self.file_system.metadata(self.node)?,
        };
        if let Some(link) = &mut metadata.hard_link {
            link.device = self.device;
        }
        Ok(metadata)
    }

    pub(super) fn open(&self) -> Result<Box<dyn StreamReader>> {
        self.file_system.open(self.node)
    }

    pub(super) fn content(&self) -> Result<Arc<dyn Blocks>> {
        Ok(Arc::new(FileContent(self.file_system.content(self.node)?)))
    }

    /// What tells this directory from every other of the tree.
    pub(super) fn identity(&self) -> (u64, Node) {
        (self.device, self.node)
    }
}

/// The content of a file as blocks.
struct FileContent(Arc<dyn Content>);

impl Blocks for FileContent {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        let change = ChangeState::Unknown;
        Ok(if range.is_empty() { Vec::new() } else { vec![Extent { range, kind: ExtentKind::Data, change }] })
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let length = match self.0.read(offset + done as u64, rest)? {
                Piece::Data(length) => length,
                Piece::Hole(length) => {
                    let length = usize::try_from(length).unwrap_or(usize::MAX).min(rest.len());
                    rest.get_mut(..length).unwrap_or_default().fill(0);
                    length
                }
                Piece::End => 0,
            };
            if length == 0 {
                return Err(Error::integrity("a file ends before its size"));
            }
            done += length;
        }
        Ok(())
    }
}

impl Tree {
    /// Finds volumes and file systems on the disks of a machine. What cannot be understood becomes a note.
    pub(super) fn of(disks: &[Arc<dyn Blocks>], inside: &Inside<'_>) -> Result<Self> {
        let layout = volumes(disks, inside.keys)?;
        let mut tree =
            Self { volumes: Vec::new(), mounts: Vec::new(), elsewhere: Vec::new(), notes: layout.notes };
        for volume in layout.volumes {
            let seen = tree.look(volume, inside.open);
            tree.volumes.push(seen);
        }
        tree.mount()?;
        Ok(tree)
    }

    fn look(&mut self, volume: Volume, open: Opener<'_>) -> VolumeSeen {
        let name = volume.name.replace('/', "-");
        let (size, label, uuid) = (volume.blocks.size(), volume.label.clone(), volume.uuid.clone());
        let stretch = stretch(&volume);
        let (mut file_system, mut trouble) = (None, None);
        let holds = if volume.encryption == Encryption::Locked {
            trouble = Some(Trouble::Locked);
            "encrypted, and no key opens it".to_owned()
        } else {
            match open(volume.blocks) {
                Ok(Opened::FileSystem(found)) => {
                    self.notes.extend(found.about().notes.iter().map(|note| format!("{name}: {note}")));
                    let holds = found.about().kind.name().to_owned();
                    file_system = Some(found);
                    holds
                }
                Ok(Opened::Other(other)) => other.name().to_owned(),
                Err(error) => {
                    let why = error.chain().join(": ");
                    self.notes.push(format!("{name}: {why}"));
                    let holds = format!("unreadable: {why}");
                    trouble = Some(Trouble::Unreadable(error.code(), why));
                    holds
                }
            }
        };
        VolumeSeen { name, size, holds, mounted: None, label, uuid, file_system, trouble, stretch }
    }

    /// Finds the root and mounts what its table says.
    fn mount(&mut self) -> Result<()> {
        let Some((root, base, table)) = self.find_root()? else { return Ok(()) };
        let (at, owners) = (ItemPath::root(), Vec::new());
        let line = Line { device: Device::Elsewhere, at, base: base.0, owners };
        self.add_mount(root, line, base.1);
        for line in table {
            if line.at.is_root() {
                continue;
            }
            let volume = self.volumes.iter().position(|volume| volume.is(&line.device));
            let file_system = volume.and_then(|index| self.volumes.get(index)?.file_system.clone());
            let (Some(volume), Some(file_system)) = (volume, file_system) else {
                self.elsewhere.push(line.at);
                continue;
            };
            match unless_odd(file_system.lookup(&line.base))? {
                Some(base) => self.add_mount(volume, line, base),
                None => {
                    let at = line.at;
                    self.notes.push(format!("/{at}: what the machine mounts there is not on its volume"));
                    self.elsewhere.push(at);
                }
            }
        }
        Ok(())
    }

    fn add_mount(&mut self, volume: usize, line: Line, base: Node) {
        let at = line.at.clone();
        let device = self.volumes.len() as u64 + self.mounts.len() as u64;
        let Some(seen) = self.volumes.get_mut(volume) else { return };
        let Some(file_system) = seen.file_system.clone() else { return };
        seen.mounted.get_or_insert_with(|| at.clone());
        self.mounts.retain(|mount| mount.at != at);
        self.mounts.push(Mount { at, base, volume, line, file_system, device });
    }

    /// The volume that the machine runs from: the one with a table of mounts, otherwise the one that looks like a
    /// system, otherwise the only one.
    fn find_root(&self) -> Result<Option<Root>> {
        let readable = || {
            self.volumes.iter().enumerate().filter_map(|(index, it)| Some((index, it.file_system.as_ref()?)))
        };
        let bases = |found: &Arc<dyn FileSystem>| {
            // A system on btrfs commonly lives in a subvolume of this name.
            let usual = found.child(found.root(), b"@").ok().flatten();
            let usual = usual.and_then(|node| Some((ItemPath::new("@").ok()?, node)));
            [Some((ItemPath::root(), found.root())), usual].into_iter().flatten()
        };
        for (index, found) in readable() {
            for base in bases(found) {
                if let Some(table) = unless_odd(read_table(found.as_ref(), base.1))?.flatten() {
                    return Ok(Some((index, base, table)));
                }
            }
        }
        for (index, found) in readable() {
            for base in bases(found) {
                let has = |name: &[u8]| found.child(base.1, name).ok().flatten().is_some();
                if has(b"etc") && (has(b"usr") || has(b"bin")) {
                    return Ok(Some((index, base, Vec::new())));
                }
            }
        }
        let mut all = readable();
        Ok(match (all.next(), all.next()) {
            (Some((index, found)), None) => Some((index, (ItemPath::root(), found.root()), Vec::new())),
            _ => None,
        })
    }

    /// Why files of the machine may not be found, if its disks were not all read.
    pub(super) fn unread(&self) -> Option<Error> {
        let troubled = self.volumes.iter().find_map(|volume| Some((&volume.name, volume.trouble.as_ref()?)));
        Some(match troubled? {
            (name, Trouble::Unreadable(code, why)) => {
                Error::new(*code, format!("{name} cannot be read: {why}"))
                    .hint("its disk comes back as it is: restore /@machine")
            }
            (name, Trouble::Locked) => {
                Error::new(Code::Refused, format!("{name} is encrypted, and no key that was given opens it"))
                    .hint("give its key: --volume-key-file [VOLUME=]FILE, or --ask-volume-passphrase")
            }
        })
    }

    pub(super) fn has_root(&self) -> bool {
        self.mounts.first().is_some_and(|mount| mount.at.is_root())
    }

    /// The leaf at a path of the machine.
    pub(super) fn lookup(&self, path: &ItemPath) -> Result<Option<Leaf>> {
        let mount = self.mounts.iter().filter(|mount| path.is_within(&mount.at));
        let Some(mount) = mount.max_by_key(|mount| mount.at.as_bytes().len()) else { return Ok(None) };
        let below = path.components().skip(mount.at.components().count());
        mount.leaf().below(below)
    }

    /// The leaf at a path of one volume.
    pub(super) fn lookup_volume(&self, name: &[u8], path: &ItemPath) -> Result<Option<Leaf>> {
        let Some(index) = self.volumes.iter().position(|volume| volume.name.as_bytes() == name) else {
            return Ok(None);
        };
        let Some(file_system) = self.volumes.get(index).and_then(|it| it.file_system.clone()) else {
            return Ok(None);
        };
        let node = file_system.root();
        Leaf { file_system, node, device: index as u64, known: None }.below(path.components())
    }

    /// What lies in a directory, sorted by name. `path` is its place in the machine's tree, where other volumes may be
    /// mounted; `None` on a volume by itself.
    pub(super) fn children(&self, directory: &Leaf, path: Option<&ItemPath>) -> Result<Vec<(Vec<u8>, Leaf)>> {
        let mut found = Vec::new();
        let mut names = HashSet::new();
        let mut from = 0;
        loop {
            let listing = directory.file_system.list(directory.node, from, PAGE_ENTRIES)?;
            for (entry, known) in listing.page.entries.into_iter().zip(listing.metadata) {
                // A damaged directory may say a name twice; the first one counts.
                if names.insert(entry.name.clone()) {
                    let known = known.filter(|_| found.len() < KNOWN_MAX).map(Box::new);
                    let file_system = Arc::clone(&directory.file_system);
                    found.push((
                        entry.name,
                        Leaf { file_system, node: entry.node, device: directory.device, known },
                    ));
                }
            }
            match listing.page.next {
                Some(next) if next > from => from = next,
                Some(_) => return Err(Error::integrity("a directory goes round in a circle")),
                None => break,
            }
        }
        if let Some(path) = path {
            for (name, leaf) in &mut found {
                let here = |mount: &&Mount| {
                    mount.at.parent().as_ref() == Some(path) && mount.at.name() == name.as_slice()
                };
                if let Some(mount) = self.mounts.iter().find(here) {
                    *leaf = mount.leaf();
                }
            }
        }
        found.sort_unstable_by(|(left, _), (right, _)| left.cmp(right));
        Ok(found)
    }
}

impl Mount {
    pub(super) fn kind(&self) -> FsKind {
        self.file_system.about().kind
    }

    fn leaf(&self) -> Leaf {
        let file_system = Arc::clone(&self.file_system);
        Leaf { file_system, node: self.base, device: self.device, known: None }
    }
}

impl Leaf {
    fn below<'a>(mut self, names: impl Iterator<Item = &'a [u8]>) -> Result<Option<Self>> {
        for name in names {
            if self.file_system.metadata(self.node)?.kind != Kind::Directory {
                return Ok(None);
            }
            match self.file_system.child(self.node, name)? {
                Some(node) => (self.node, self.known) = (node, None),
                None => return Ok(None),
            }
        }
        Ok(Some(self))
    }
}

impl VolumeSeen {
    /// Whether files can be read from it.
    pub fn is_readable(&self) -> bool {
        self.file_system.is_some()
    }

    fn is(&self, device: &Device) -> bool {
        let about = self.file_system.as_ref().map(|found| found.about());
        let same = |known: &Option<String>, wanted: &str| {
            known.as_deref().is_some_and(|known| known.eq_ignore_ascii_case(wanted))
        };
        match device {
            Device::Uuid(uuid) => about.is_some_and(|about| about.uuid.eq_ignore_ascii_case(uuid)),
            Device::Label(label) => about.is_some_and(|about| about.label == label.as_bytes()),
            Device::PartUuid(uuid) => same(&self.uuid, uuid),
            Device::PartLabel(label) => self.label.as_ref() == Some(label),
            Device::Path(path) => self.name == device_name(path),
            Device::Elsewhere => false,
        }
    }
}

/// Where a volume lies, unless it is encrypted or in pieces.
fn stretch(volume: &Volume) -> Option<(usize, Range<u64>)> {
    let mut places = (volume.encryption == Encryption::None).then(|| volume.occupied())?;
    let (disk, range) = places.pop().filter(|_| places.is_empty())?;
    (range.end - range.start == volume.blocks.size()).then_some((disk, range))
}

/// The name of a volume for a path below `/dev`: disks have other letters on other buses.
fn device_name(path: &str) -> String {
    if let Some(mapped) = path.strip_prefix("mapper/") {
        return mapped.to_owned();
    }
    for bus in ["sd", "hd", "xvd"] {
        if let Some(rest) = path.strip_prefix(bus) {
            return format!("vd{rest}");
        }
    }
    path.replace('/', "-")
}

fn read_table(found: &dyn FileSystem, base: Node) -> Result<Option<Vec<Line>>> {
    let Some(etc) = found.child(base, b"etc")? else { return Ok(None) };
    let Some(table) = found.child(etc, b"fstab")? else { return Ok(None) };
    let metadata = found.metadata(table)?;
    if metadata.kind != Kind::File || metadata.size > FSTAB_MAX as u64 {
        return Ok(None);
    }
    let (mut stream, mut text) = (found.open(table)?, vec![0; FSTAB_MAX]);
    let mut held = 0;
    loop {
        match stream.read(text.get_mut(held..).unwrap_or_default())? {
            Piece::Data(length) => held += length,
            Piece::Hole(_) => {}
            Piece::End => break,
        }
    }
    Ok(Some(fstab::parse(text.get(..held).unwrap_or_default())))
}

/// `None` for what a guest may have got wrong.
fn unless_odd<T>(outcome: Result<T>) -> Result<Option<T>> {
    match outcome {
        Ok(found) => Ok(Some(found)),
        Err(error) if matches!(error.code(), Code::Integrity | Code::Unsupported | Code::NotFound) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
