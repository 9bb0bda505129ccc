//! The disks of a copy: written by a push, read by a backup.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use mainstay_core::{Blocks, ChangeState, Code, Consistency, Error, Extent, Result, Time};
use mainstay_diskimage::FileBlocks;
use mainstay_nbd::WritableBlocks;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::state::{Staged, State};
use super::{DRIVER, file_of};
use crate::vm::hypervisor::{DiskMode, DiskSnapshot, MachineSnapshot, SnapshotRequest};
use crate::vm::machine::Machine;
use crate::vm::mark::{DiskMark, Marks};

/// What is written is noted by so many bytes.
const PAGE: u64 = 64 << 10;

/// What zeros are written by, where no hole can be made, in bytes.
const ZEROS: usize = 1 << 20;

/// Start and end, ascending and apart.
type Ranges = Vec<(u64, u64)>;

/// A disk that is written to, and what was written.
pub(in crate::vm) struct StagedDisk {
    file: File,
    path: PathBuf,
    blocks: FileBlocks,
    /// One bit for each page.
    pages: Mutex<Vec<u64>>,
}

impl StagedDisk {
    /// `keep`: what is there is built upon.
    pub(super) fn receive(path: &Path, size: u64, keep: bool) -> Result<Self> {
        let fail = |error| Error::io(format!("cannot make {}", path.display()), error);
        let file =
            File::options().create(true).truncate(!keep).read(true).write(true).open(path).map_err(fail)?;
        file.set_len(size).map_err(fail)?;
        let blocks = FileBlocks::open(path)?;
        let words = usize::try_from(size.div_ceil(PAGE).div_ceil(64)).unwrap_or(usize::MAX);
        Ok(Self { file, path: path.to_owned(), blocks, pages: Mutex::new(vec![0; words]) })
    }

    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|error| self.fail(error))
    }

    pub(super) fn written(&self) -> Ranges {
        let pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let set = |page: u64| {
            let word = usize::try_from(page / 64).ok().and_then(|word| pages.get(word)).copied().unwrap_or(0);
            word >> (page % 64) & 1 == 1
        };
        let mut ranges = Ranges::new();
        for page in (0..self.size().div_ceil(PAGE)).filter(|page| set(*page)) {
            let (start, end) = (page * PAGE, ((page + 1) * PAGE).min(self.size()));
            match ranges.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => ranges.push((start, end)),
            }
        }
        ranges
    }

    fn note(&self, range: &Range<u64>) {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        for page in range.start / PAGE..range.end.div_ceil(PAGE) {
            if let Some(word) = usize::try_from(page / 64).ok().and_then(|word| pages.get_mut(word)) {
                *word |= 1 << (page % 64);
            }
        }
    }

    fn inside(&self, range: &Range<u64>) -> Result<()> {
        if range.start <= range.end && range.end <= self.size() {
            return Ok(());
        }
        let what = format!("bytes {} to {} are not on the disk", range.start, range.end);
        Err(Error::new(Code::Usage, what))
    }

    fn fail(&self, error: std::io::Error) -> Error {
        Error::io(format!("cannot write {}", self.path.display()), error)
    }
}

impl Blocks for StagedDisk {
    fn size(&self) -> u64 {
        self.blocks.size()
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        self.blocks.extents(range)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.blocks.read_at(offset, buffer)
    }
}

impl WritableBlocks for StagedDisk {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let range = offset..offset.saturating_add(data.len() as u64);
        self.inside(&range)?;
        self.note(&range);
        self.file.write_all_at(data, offset).map_err(|error| self.fail(error))
    }

    fn zero(&self, range: Range<u64>) -> Result<()> {
        self.inside(&range)?;
        self.note(&range);
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, hole, range.start, range.end - range.start) {
            Ok(()) => return Ok(()),
            Err(Errno::OPNOTSUPP | Errno::INVAL) => {}
            Err(errno) => return Err(self.fail(errno.into())),
        }
        let zeros = vec![0; ZEROS];
        let mut at = range.start;
        while at < range.end {
            let length = usize::try_from(range.end - at).map_or(ZEROS, |rest| rest.min(ZEROS));
            let part = zeros.get(..length).unwrap_or(&zeros);
            self.file.write_all_at(part, at).map_err(|error| self.fail(error))?;
            at += length as u64;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.sync()
    }
}

/// Both.
pub(super) fn union(one: &Ranges, other: &Ranges) -> Ranges {
    let mut all: Ranges = one.iter().chain(other).copied().collect();
    all.sort_unstable();
    let mut joined = Ranges::new();
    for (start, end) in all {
        match joined.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => joined.push((start, end)),
        }
    }
    joined
}

/// A whole copy that is being backed up.
pub(super) struct StagedSnapshot {
    directory: PathBuf,
    state: State,
    staged: Staged,
    machine: Machine,
    shown: Vec<DiskSnapshot>,
    _lock: File,
}

impl StagedSnapshot {
    pub(super) fn new(
        directory: PathBuf,
        state: State,
        staged: Staged,
        lock: File,
        request: &SnapshotRequest,
    ) -> Result<Self> {
        let machine = staged.machine();
        let wanted = |name: &String| request.disks.is_empty() || request.disks.contains(name);
        if let Some(missing) =
            request.disks.iter().find(|name| !staged.disks.iter().any(|disk| disk.name == **name))
        {
            return Err(Error::new(Code::NotFound, format!("the machine has no disk {missing}")));
        }
        let mode = |name: &str, size: u64| {
            let Some(since) = &request.since else { return DiskMode::Full };
            let mark = since.of(DRIVER, &machine.id, name);
            let known = |copy: &&String| [state.held.as_ref(), Some(&staged.copy)].contains(&Some(*copy));
            match mark {
                Some(mark) if mark.bitmap.as_ref().filter(known).is_none() => {
                    DiskMode::Scan { why: "the last point was made of an older copy".into() }
                }
                Some(mark) if mark.size != size => DiskMode::Scan { why: "its size is another one".into() },
                Some(_) => DiskMode::Incremental,
                None => DiskMode::Scan { why: "the last point was not made of a copy".into() },
            }
        };
        let disks = staged.disks.iter().filter(|disk| wanted(&disk.name));
        let shown = disks.map(|disk| DiskSnapshot {
            name: disk.name.clone(),
            size: disk.size,
            mode: mode(&disk.name, disk.size),
            tracked: true,
        });
        let shown = shown.collect();
        Ok(Self { directory, state, staged, machine, shown, _lock: lock })
    }
}

impl MachineSnapshot for StagedSnapshot {
    fn reached(&self) -> Consistency {
        self.staged.reached()
    }

    fn frozen(&self) -> Duration {
        self.staged.frozen()
    }

    fn moment(&self) -> Option<Time> {
        Some(self.staged.moment())
    }

    fn notes(&self) -> &[String] {
        &self.staged.notes
    }

    fn machine(&self) -> &Machine {
        &self.machine
    }

    fn disks(&self) -> &[DiskSnapshot] {
        &self.shown
    }

    fn open(&self, disk: usize) -> Result<Box<dyn Blocks>> {
        let shown = self.shown.get(disk).ok_or_else(|| Error::bug(format!("there is no disk {disk}")))?;
        let path = file_of(&self.directory, &shown.name);
        let blocks = FileBlocks::open(&path)?;
        if blocks.size() != shown.size {
            return Err(Error::integrity(format!("{} is not as long as the disk was", path.display())));
        }
        if shown.mode != DiskMode::Incremental {
            return Ok(Box::new(blocks));
        }
        let changed = self.state.changed.get(&shown.name).cloned().unwrap_or_default();
        Ok(Box::new(Changed { blocks, changed }))
    }

    fn marks(&self) -> Result<Marks> {
        let mut marks = Marks::new(DRIVER, self.machine.id.clone());
        for disk in &self.shown {
            let mark = DiskMark {
                bitmap: Some(self.staged.copy.clone()),
                size: disk.size,
                granularity: PAGE,
                image: file_of(&self.directory, &disk.name).to_string_lossy().into_owned(),
                inode: None,
                increments: 0,
                stamp: None,
            };
            marks.disks.insert(disk.name.clone(), mark);
        }
        Ok(marks)
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        // A point of some of the disks is none that the others can build upon.
        if self.shown.len() < self.staged.disks.len() {
            return Ok(());
        }
        self.state.held = Some(self.staged.copy.clone());
        self.state.changed.clear();
        self.state.write(&self.directory)
    }
}

/// A disk of which it is known what the last point does not hold.
struct Changed {
    blocks: FileBlocks,
    changed: Ranges,
}

impl Blocks for Changed {
    fn size(&self) -> u64 {
        self.blocks.size()
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        let mut found = Vec::new();
        for Extent { range, kind, .. } in self.blocks.extents(range)? {
            let mut at = range.start;
            let mut push = |range: Range<u64>, change| {
                if range.start < range.end {
                    found.push(Extent { range, kind, change });
                }
            };
            let first = self.changed.partition_point(|changed| changed.1 <= range.start);
            for (start, end) in self.changed.iter().skip(first).take_while(|changed| changed.0 < range.end) {
                let (start, end) = (*start.max(&range.start), *end.min(&range.end));
                push(at..start, ChangeState::Unchanged);
                push(start..end, ChangeState::Changed);
                at = end;
            }
            push(at..range.end, ChangeState::Unchanged);
        }
        Ok(found)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.blocks.read_at(offset, buffer)
    }
}
