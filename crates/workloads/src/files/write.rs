//! One thread of a restore: everything but directories is made here, under a temporary name first.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use crossbeam_channel::Receiver;
use mainstay_core::{
    BlockStream, Body, Code, Error, Item, ItemPath, Kind, Metadata, Piece, SkipReason, StreamEnd,
    StreamReader,
};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, ftruncate, linkat, makedev, mknodat, openat, renameat,
    renameat_with, symlinkat, unlinkat,
};
use rustix::io::{Errno, pwrite};

use super::apply::{Held, apply};
use super::decide::{Action, RestoreMode, Trace, decide};
use super::dirs::{FileId, open_below};
use super::inspect::{Inspector, kind, look};
use super::open_dir::Hold;
use super::remove::remove_tree;
use super::run::{LinkPart, Made, Run};

/// What a body is read into, in bytes.
const BUFFER: usize = 256 << 10;

/// One item to make in an open directory.
pub(super) struct Job {
    pub(super) parent: Hold,
    pub(super) name: CString,
    pub(super) item: Item,
    pub(super) link: Option<LinkPart>,
}

/// Why an item was not restored, and whose fault it is.
struct Trouble(SkipReason, Error);

type Outcome<T> = Result<T, Trouble>;

pub(super) struct Worker {
    run: Arc<Run>,
    inspector: Inspector,
    buffer: Vec<u8>,
    /// Bytes of the present item that were told of.
    told: u64,
}

/// What stands at the name now.
struct Present {
    id: FileId,
    metadata: Metadata,
}

impl Worker {
    pub(super) fn new(run: Arc<Run>) -> Self {
        Self { run, inspector: Inspector::default(), buffer: vec![0; BUFFER], told: 0 }
    }

    /// Works until the queue is closed. After a fatal error the rest is thrown away.
    pub(super) fn work(mut self, jobs: &Receiver<Job>) {
        for job in jobs {
            if self.run.is_stopped() {
                continue;
            }
            let Job { parent, name, item, link } = job;
            self.told = 0;
            match self.restore(&parent, &name, &item, link) {
                Ok((action, bytes)) => self.run.count(action, &item.metadata, bytes),
                Err(Trouble(reason, error)) => self.run.fail(&item.path, reason, error),
            }
            self.run.dealt_with(item.metadata.size.saturating_sub(self.told));
        }
    }

    fn restore(
        &mut self,
        parent: &Hold,
        name: &CStr,
        item: &Item,
        link: Option<LinkPart>,
    ) -> Outcome<(Action, u64)> {
        let unwritable = |errno: Errno| unwritable(&item.path, errno);
        let fd = parent.dir.fd().map_err(unwritable)?;
        let present = if parent.fresh { None } else { self.present(&fd, name).map_err(unwritable)? };
        let existing = present.as_ref().map(|present| &present.metadata);
        let mode = self.run.rules.mode;
        let mut action = decide(mode, existing, &self.run.wanted(&item.metadata));
        self.may_change(item, action, existing)?;
        let mut first = None;
        match link {
            Some(LinkPart::Other(slot)) => {
                if let Some(made) = slot.wait().filter(|made| made.kind == item.metadata.kind) {
                    if present.as_ref().is_some_and(|present| present.id == made.id) {
                        return Ok((Action::Same, 0));
                    }
                    if action == Action::Same && mode != RestoreMode::Add {
                        action = Action::Replace;
                    }
                    if action != Action::Same && self.join_link(parent, &fd, name, &made, action, existing) {
                        return Ok((action, 0));
                    }
                }
            }
            Some(LinkPart::First(duty)) => first = Some(duty),
            None => {}
        }
        let bytes = match action {
            Action::Create | Action::Replace => self.make(parent, &fd, name, item, action, existing)?,
            Action::Metadata => {
                self.dress(&fd, name, item, present.as_ref())?;
                0
            }
            Action::Same | Action::Delete | Action::Blocked => 0,
        };
        if let Some(first) = first
            && (mode != RestoreMode::Add || action != Action::Same)
            && let Ok(stat) = look(&*fd, name)
        {
            let made = Made { path: item.path.clone(), kind: item.metadata.kind, id: FileId::of(&stat) };
            first.made(made);
        }
        Ok((action, bytes))
    }

    /// Whether this may be done to what exists now.
    fn may_change(&self, item: &Item, action: Action, existing: Option<&Metadata>) -> Outcome<()> {
        let rules = &self.run.rules;
        let changes = matches!(action, Action::Replace | Action::Metadata);
        if changes && existing.is_some_and(|existing| !rules.is_planned(&item.path, existing)) {
            return Err(refuse(item, "what stands there has changed since the plan was made"));
        }
        let empties = action == Action::Replace
            && rules.mode == RestoreMode::Mirror
            && existing.is_some_and(|existing| existing.kind == Kind::Directory);
        if empties && !(rules.mirrors(&item.path) && rules.deletes(&item.path)) {
            return Err(refuse(item, "a directory stands there that holds what must be kept"));
        }
        Ok(())
    }

    fn present(&mut self, fd: &OwnedFd, name: &CStr) -> Result<Option<Present>, Errno> {
        let stat = match look(fd, name) {
            Err(Errno::NOENT) => return Ok(None),
            other => other?,
        };
        let kind = kind(&stat).ok_or(Errno::OPNOTSUPP)?;
        let (metadata, _trouble) = self.inspector.metadata(fd, name, &stat, kind)?;
        Ok(Some(Present { id: FileId::of(&stat), metadata }))
    }

    /// Makes the item under a temporary name and moves it to its place. Returns the bytes written.
    fn make(
        &mut self,
        parent: &Hold,
        fd: &OwnedFd,
        name: &CStr,
        item: &Item,
        action: Action,
        existing: Option<&Metadata>,
    ) -> Outcome<u64> {
        let temporary = self.run.temporary_name();
        let made = match item.metadata.kind {
            // A disk becomes an image file.
            Kind::File | Kind::Disk | Kind::Record => self.make_file(parent, fd, &temporary, item),
            _ => self.make_special(fd, &temporary, item).map(|()| 0),
        };
        let placed = made.and_then(|bytes| {
            self.is_still(fd, name, item, existing)?;
            self.place(parent, fd, &temporary, name, action, existing).map(|()| bytes).map_err(|errno| {
                match errno {
                    Errno::NOTEMPTY => refuse(item, "a directory stands there that holds something"),
                    _ => unwritable(&item.path, errno),
                }
            })
        });
        if placed.is_err() {
            let _not_there = unlinkat(fd, &*temporary, AtFlags::empty());
        }
        placed
    }

    /// Writing takes its time: what is about to be replaced may have changed meanwhile.
    fn is_still(
        &mut self,
        fd: &OwnedFd,
        name: &CStr,
        item: &Item,
        existing: Option<&Metadata>,
    ) -> Outcome<()> {
        let Some(existing) = existing else { return Ok(()) };
        let now = self.present(fd, name).map_err(|errno| unwritable(&item.path, errno))?;
        if now.is_none_or(|now| Trace::of(&now.metadata) == Trace::of(existing)) {
            return Ok(());
        }
        Err(refuse(item, "what stands there was changed meanwhile"))
    }

    fn make_file(&mut self, parent: &Hold, dir: &OwnedFd, temporary: &CStr, item: &Item) -> Outcome<u64> {
        let unwritable = |errno: Errno| unwritable(&item.path, errno);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(dir, temporary, flags, Mode::RUSR | Mode::WUSR).map_err(unwritable)?;
        let bytes = match &item.body {
            Body::Stream(open) | Body::Pages(open) => {
                let stream = open.open().map_err(|error| Trouble(SkipReason::Unreadable, error))?;
                self.fill(&file, stream, &item.path)?
            }
            Body::Blocks(blocks) => {
                self.fill(&file, Box::new(BlockStream::new(blocks.as_ref())), &item.path)?
            }
            Body::None if item.metadata.size == 0 => 0,
            Body::None => {
                let error = Error::new(Code::Unsupported, "a file without a stream of content");
                return Err(Trouble(SkipReason::Unsupported, error));
            }
        };
        let inherited =
            if parent.inherits { self.present(dir, temporary).map_err(unwritable)? } else { None };
        let inherited = inherited.as_ref().map(|present| &present.metadata);
        if let Some(losses) = apply(&self.run, Held::Open(file.as_fd()), &item.metadata, inherited) {
            self.run.skip(item.path.clone(), SkipReason::Metadata, losses);
        }
        Ok(bytes)
    }

    /// Writes the content, leaving holes where the source has some. Returns the bytes written, holes not counted.
    fn fill(
        &mut self,
        file: &OwnedFd,
        mut stream: Box<dyn StreamReader + '_>,
        path: &ItemPath,
    ) -> Outcome<u64> {
        let unreadable = |error| Trouble(SkipReason::Unreadable, error);
        let (mut offset, mut written, mut ends_in_hole) = (0_u64, 0_u64, false);
        loop {
            if self.run.is_stopped() {
                return Err(unreadable(Error::new(Code::Cancelled, "the restore was given up")));
            }
            match stream.read(&mut self.buffer).map_err(unreadable)? {
                Piece::Data(len) => {
                    let mut data = self.buffer.get(..len).unwrap_or_default();
                    while !data.is_empty() {
                        match pwrite(file, data, offset) {
                            Err(Errno::INTR) => {}
                            Ok(0) => return Err(unwritable(path, Errno::IO)),
                            Ok(done) => {
                                data = data.get(done..).unwrap_or_default();
                                offset += done as u64;
                                written += done as u64;
                            }
                            Err(errno) => return Err(unwritable(path, errno)),
                        }
                    }
                    ends_in_hole = false;
                }
                Piece::Hole(len) => {
                    let end = offset.checked_add(len).filter(|end| i64::try_from(*end).is_ok());
                    offset = end.ok_or_else(|| unwritable(path, Errno::FBIG))?;
                    ends_in_hole = true;
                }
                Piece::End => break,
            }
            self.run.advance(offset - self.told);
            self.told = offset;
        }
        if ends_in_hole {
            ftruncate(file, offset).map_err(|errno| unwritable(path, errno))?;
        }
        if stream.finish().map_err(unreadable)? == StreamEnd::Changed {
            let detail = "it changed while it was read".to_owned();
            self.run.skip(path.clone(), SkipReason::Changed, detail);
        }
        Ok(written)
    }

    /// A symbolic link, FIFO, socket or device.
    fn make_special(&mut self, dir: &OwnedFd, temporary: &CStr, item: &Item) -> Outcome<()> {
        let Item { path, metadata, .. } = item;
        let unwritable = |errno: Errno| unwritable(path, errno);
        let private = Mode::RUSR | Mode::WUSR;
        let node = |file_type, device| mknodat(dir, temporary, file_type, private, device);
        let (major, minor) = metadata.device.unwrap_or_default();
        let made = match metadata.kind {
            Kind::Symlink => symlinkat(metadata.link_target.as_deref().unwrap_or_default(), dir, temporary),
            Kind::Fifo => node(FileType::Fifo, 0),
            Kind::Socket => node(FileType::Socket, 0),
            Kind::CharDevice => node(FileType::CharacterDevice, makedev(major, minor)),
            Kind::BlockDevice => node(FileType::BlockDevice, makedev(major, minor)),
            Kind::File | Kind::Directory | Kind::Disk | Kind::Record => Err(Errno::OPNOTSUPP),
        };
        match made {
            Err(Errno::PERM | Errno::OPNOTSUPP) => {
                let what = format!("cannot make a thing of the kind {:?} here", metadata.kind);
                return Err(Trouble(SkipReason::Unsupported, Error::new(Code::Unsupported, what)));
            }
            other => other.map_err(unwritable)?,
        }
        self.dress(dir, temporary, item, None)
    }

    /// Applies metadata to something that cannot or need not be opened, and that nobody else has a name for.
    fn dress(&mut self, dir: &OwnedFd, name: &CStr, item: &Item, expected: Option<&Present>) -> Outcome<()> {
        let unwritable = |errno: Errno| unwritable(&item.path, errno);
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let held = openat(dir, name, flags, Mode::empty()).map_err(unwritable)?;
        let stat = super::inspect::look_at_open(&held).map_err(unwritable)?;
        // Another program may have put a link to something of its choice here meanwhile.
        let mine = kind(&stat) == Some(item.metadata.kind)
            && stat.stx_nlink <= 1
            && match expected {
                Some(present) => present.id == FileId::of(&stat),
                None => stat.stx_uid == self.run.euid,
            };
        if !mine {
            return Err(unwritable(Errno::STALE));
        }
        let (present, _trouble) =
            self.inspector.metadata(dir, name, &stat, item.metadata.kind).map_err(unwritable)?;
        if let Some(losses) = apply(&self.run, Held::Place(held.as_fd()), &item.metadata, Some(&present)) {
            self.run.skip(item.path.clone(), SkipReason::Metadata, losses);
        }
        Ok(())
    }

    /// Moves a finished item to its name.
    fn place(
        &self,
        parent: &Hold,
        dir: &OwnedFd,
        temporary: &CStr,
        name: &CStr,
        action: Action,
        existing: Option<&Metadata>,
    ) -> Result<(), Errno> {
        if action == Action::Create {
            return match renameat_with(dir, temporary, dir, name, RenameFlags::NOREPLACE) {
                // A file system without the flag: linking refuses a taken name just as well.
                Err(Errno::INVAL) => {
                    linkat(dir, temporary, dir, name, AtFlags::empty())?;
                    unlinkat(dir, temporary, AtFlags::empty())
                }
                other => other,
            };
        }
        if existing.is_some_and(|existing| existing.kind == Kind::Directory) {
            if self.run.rules.mode == RestoreMode::Mirror {
                remove_tree(&parent.dir, name)?;
            } else {
                unlinkat(dir, name, AtFlags::REMOVEDIR)?;
            }
        }
        renameat(dir, temporary, dir, name)
    }

    /// Makes `name` another name of the first link. False when that cannot be: then it is written like any item.
    fn join_link(
        &self,
        parent: &Hold,
        dir: &OwnedFd,
        name: &CStr,
        made: &Made,
        action: Action,
        existing: Option<&Metadata>,
    ) -> bool {
        let temporary = self.run.temporary_name();
        let join = || -> Result<(), Errno> {
            let mut names: Vec<&[u8]> = made.path.components().collect();
            let last = CString::new(names.pop().unwrap_or_default()).or(Err(Errno::INVAL))?;
            let home = open_below(self.run.root.fd()?, names.into_iter())?;
            linkat(&home, &*last, dir, &*temporary, AtFlags::empty())?;
            if FileId::of(&look(dir, &temporary)?) != made.id {
                return Err(Errno::STALE);
            }
            self.place(parent, dir, &temporary, name, action, existing)
        };
        let joined = join().is_ok();
        if !joined {
            let _not_there = unlinkat(dir, &*temporary, AtFlags::empty());
        }
        joined
    }
}

fn refuse(item: &Item, what: &str) -> Trouble {
    let error = Error::new(Code::Refused, format!("cannot restore {}: {what}", item.path));
    Trouble(SkipReason::Unwritable, error)
}

fn unwritable(path: &ItemPath, errno: Errno) -> Trouble {
    Trouble(SkipReason::Unwritable, Error::io(format!("cannot restore {path}"), errno.into()))
}
