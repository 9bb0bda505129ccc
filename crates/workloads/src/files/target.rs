//! A directory to restore into, as a [`Target`]. Nothing outside it is ever touched: every step starts from the
//! open directory, goes down one name at a time, and never through a symbolic link.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::hash::{BuildHasher as _, Hasher as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, bounded};
use mainstay_core::{
    Captured, Code, Error, Item, ItemPath, Kind, Metadata, Progress, Receipt, Result, Skip, SkipReason,
    Target,
};
use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, flock, mkdirat, openat, syncfs, unlinkat};
use rustix::io::Errno;

use super::apply::Held;
use super::decide::{Action, RestoreMode, RestoreRules, decide};
use super::dirs::{Dir, open_beneath};
use super::inspect::{Inspector, kind, look};
use super::names::{ListingBuffer, NameList};
use super::open_dir::{Hold, OpenDir};
use super::paths::PathSet;
use super::remove::remove_tree;
use super::run::{OwnerRule, Restored, Run, is_temporary};
use super::write::{Job, Worker};

/// Items that may wait for a thread.
const QUEUE: usize = 256;

/// Where and how to restore.
#[derive(Clone, Debug, Default)]
pub struct FilesPlan {
    /// The directory that items are placed below; made if it is not there.
    pub root: PathBuf,
    pub rules: RestoreRules,
    pub owners: OwnerRule,
    /// Threads that write; as many as the machine has cores, from 2 to 8, when not said.
    pub writers: Option<usize>,
    /// Told of what is written, when it is.
    pub progress: Option<Arc<dyn Progress>>,
}

/// Writes items below one directory.
///
/// Dropped without [`Target::finish`], it removes what is unfinished. What was finished stays, so that a second
/// run with [`RestoreMode::Overwrite`] has only the rest to do.
pub struct FilesTarget {
    run: Arc<Run>,
    levels: Vec<Level>,
    /// The path of the deepest level.
    path: Vec<u8>,
    /// The path of the item before, to hold the source to its order.
    last: Option<ItemPath>,
    /// What the source could not yield, and a mirror therefore must not delete.
    kept: PathSet,
    queue: Option<Sender<Job>>,
    workers: Vec<JoinHandle<()>>,
    inspector: Inspector,
    buffer: ListingBuffer,
}

/// One directory on the way from the root of the target to the present item.
struct Level {
    /// `None` when it could not be made: what is below it is lost.
    hold: Option<Hold>,
    /// The length of its path.
    len: usize,
    /// In a mirrored directory, the names that the point holds.
    seen: Option<HashSet<Vec<u8>>>,
}

impl FilesTarget {
    /// Opens or makes the root directory and starts the threads.
    ///
    /// Errors: [`Code::AlreadyExists`] when [`RestoreMode::New`] finds something in it, [`Code::Conflict`] when
    /// another restore is writing there, [`Code::Unsupported`] when the kernel cannot confine paths.
    pub fn new(plan: FilesPlan) -> Result<Self> {
        let FilesPlan { root, rules, owners, writers, progress } = plan;
        let (fd, fresh) = open_root(&root, rules.mode)?;
        let fail = |errno: Errno| Error::io(format!("cannot look at {}", root.display()), errno.into());
        let dir = Dir::root(fd).map_err(fail)?;
        let run = Arc::new(Run::new(Arc::clone(&dir), rules, owners, tag(), progress));
        let inherits = OpenDir::has_default_acl(&dir);
        let top =
            OpenDir { dir, fresh, inherits, finish: OnceLock::new(), parent: None, run: Arc::clone(&run) };
        let (queue, jobs) = bounded(QUEUE);
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let count = writers.unwrap_or_else(|| cores.clamp(2, 8)).max(1);
        let mut target = Self {
            run,
            levels: Vec::new(),
            path: Vec::new(),
            last: None,
            kept: PathSet::default(),
            queue: Some(queue),
            workers: Vec::new(),
            inspector: Inspector::default(),
            buffer: ListingBuffer::default(),
        };
        for number in 0..count {
            let (worker, jobs) = (Worker::new(Arc::clone(&target.run)), jobs.clone());
            let thread = std::thread::Builder::new().name(format!("restore-{number}"));
            let started = thread.spawn(move || worker.work(&jobs));
            target.workers.push(started.map_err(|error| Error::io("cannot start a thread", error))?);
        }
        if !fresh {
            target.sweep(&top.dir);
        }
        let seen = target.run.rules.mirrors(&ItemPath::root()).then(HashSet::new);
        target.levels.push(Level { hold: Some(Hold::new(top)), len: 0, seen });
        Ok(target)
    }

    /// Goes to the directory at `path`, finishing those that are done. `None` when it could not be made.
    fn go_to(&mut self, path: &ItemPath) -> Option<Hold> {
        let within = |level: &[u8]| match path.as_bytes().strip_prefix(level) {
            Some(rest) => level.is_empty() || rest.is_empty() || rest.starts_with(b"/"),
            None => false,
        };
        while !within(&self.path) {
            self.leave();
        }
        while self.path.len() < path.as_bytes().len() {
            let start = if self.path.is_empty() { 0 } else { self.path.len() + 1 };
            let rest = path.as_bytes().get(start..).unwrap_or_default();
            let name = rest.split(|&byte| byte == b'/').next().unwrap_or_default().to_vec();
            // Not an item of the stream: made only because something is to be put into it.
            let hold = self.levels.last().and_then(|level| level.hold.clone());
            let hold = hold.and_then(|parent| self.enter(&parent, &name, None));
            self.descend(&name, hold);
        }
        self.levels.last().and_then(|level| level.hold.clone())
    }

    fn descend(&mut self, name: &[u8], hold: Option<Hold>) {
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(name);
        let path = ItemPath::new(self.path.clone()).unwrap_or_default();
        let seen = (hold.is_some() && self.run.rules.mirrors(&path)).then(HashSet::new);
        self.levels.push(Level { hold, len: self.path.len(), seen });
    }

    /// Leaves the deepest directory: a mirror now knows what does not belong there.
    fn leave(&mut self) {
        let Some(level) = self.levels.pop() else { return };
        if let (Some(hold), Some(seen)) = (&level.hold, &level.seen)
            && !hold.fresh
            && !self.run.is_stopped()
        {
            self.mirror(&hold.dir, seen);
        }
        self.path.truncate(self.levels.last().map_or(0, |level| level.len));
    }

    /// Deletes what is in `dir` but not in `seen`.
    fn mirror(&mut self, dir: &Arc<Dir>, seen: &HashSet<Vec<u8>>) {
        let Ok(directory) = ItemPath::new(self.path.clone()) else { return };
        if self.run.rules.is_cache(seen) {
            return;
        }
        for name in self.list(dir) {
            let Ok(path) = directory.join(name.to_bytes()) else { continue };
            if self.kept.touches(&path)
                || is_temporary(name.to_bytes())
                || seen.contains(name.to_bytes())
                || !self.run.rules.deletes(&path)
            {
                continue;
            }
            if !self.is_planned(dir, &name, &path) {
                let detail = "it came to be or was changed after the plan was made".to_owned();
                self.run.skip(path, SkipReason::Changed, detail);
                continue;
            }
            match remove_tree(dir, &name) {
                Ok(()) => self.run.count_deleted(),
                Err(errno) => {
                    let error = Error::io(format!("cannot delete {path}"), errno.into());
                    self.run.fail(&path, SkipReason::Unwritable, error);
                }
            }
        }
    }

    /// Whether what stands at `name` is what the plan found.
    fn is_planned(&mut self, dir: &Arc<Dir>, name: &CStr, path: &ItemPath) -> bool {
        let mut existing = || {
            let fd = dir.fd()?;
            let stat = look(&*fd, name)?;
            let kind = kind(&stat).ok_or(Errno::OPNOTSUPP)?;
            self.inspector.metadata(&*fd, name, &stat, kind)
        };
        // What cannot be looked at cannot be known again.
        existing().is_ok_and(|(existing, _trouble)| self.run.rules.is_planned(path, &existing))
    }

    /// Removes what a killed restore has left unfinished in `dir`.
    fn sweep(&mut self, dir: &Arc<Dir>) {
        let names = self.list(dir);
        let Ok(fd) = dir.fd() else { return };
        for name in names.iter().filter(|name| is_temporary(name.to_bytes())) {
            // A directory is none of ours, and stays.
            let _kept = unlinkat(&*fd, &**name, AtFlags::empty());
        }
    }

    fn list(&mut self, dir: &Arc<Dir>) -> Vec<CString> {
        let mut list = NameList::default();
        let listing =
            dir.enter(c".", OFlags::RDONLY).and_then(|open| list.read(&*open.fd()?, &mut self.buffer));
        // An incomplete list only means that less is cleaned up.
        let _incomplete = listing;
        list.sort();
        std::iter::from_fn(|| list.take().map(CStr::to_owned)).collect()
    }

    /// Makes or opens the directory `name`; `item` is absent when it is only on the way.
    fn enter(&mut self, parent: &Hold, name: &[u8], item: Option<&Item>) -> Option<Hold> {
        let path = || {
            let mut path = parent.dir.path();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name);
            ItemPath::new(path).unwrap_or_default()
        };
        let entered =
            CString::new(name).or(Err(Errno::INVAL)).and_then(|name| self.try_enter(parent, &name, item));
        match entered {
            Ok(hold) => Some(hold),
            Err(errno) => {
                let error = Error::io(format!("cannot restore into {}", path()), errno.into());
                self.run.fail(&path(), SkipReason::Unwritable, error);
                None
            }
        }
    }

    fn try_enter(
        &mut self,
        parent: &Hold,
        name: &CStr,
        item: Option<&Item>,
    ) -> std::result::Result<Hold, Errno> {
        let fd = parent.dir.fd()?;
        let mode = if item.is_some() { Mode::RWXU } else { Mode::from_raw_mode(0o777) };
        let action = match mkdirat(&*fd, name, mode) {
            Ok(()) => Action::Create,
            Err(Errno::EXIST) => {
                let stat = look(&*fd, name)?;
                let kind = kind(&stat).ok_or(Errno::NOTDIR)?;
                let (existing, _trouble) = self.inspector.metadata(&*fd, name, &stat, kind)?;
                let wanted = item.map(|item| self.run.wanted(&item.metadata));
                let action = wanted
                    .map_or(Action::Same, |wanted| decide(self.run.rules.mode, Some(&existing), &wanted));
                if existing.kind == Kind::Directory {
                    return self.merge(parent, &fd, name, item, existing, action);
                }
                if action != Action::Replace {
                    return Err(Errno::NOTDIR);
                }
                if item.is_some_and(|item| !self.run.rules.is_planned(&item.path, &existing)) {
                    return Err(Errno::STALE);
                }
                unlinkat(&*fd, name, AtFlags::empty())?;
                mkdirat(&*fd, name, mode)?;
                action
            }
            Err(errno) => return Err(errno),
        };
        let dir = parent.dir.enter(name, OFlags::PATH)?;
        let inherits = parent.inherits && item.is_none();
        if parent.inherits && !inherits {
            OpenDir::shed_default_acl(&dir)?;
        }
        if let Some(item) = item {
            self.run.count(action, &item.metadata, 0);
        }
        let finish = item.map(|item| item.metadata.clone());
        Ok(self.opened(parent, dir, true, inherits, finish))
    }

    /// Opens a directory that was there before.
    fn merge(
        &mut self,
        parent: &Hold,
        fd: &OwnedFd,
        name: &CStr,
        item: Option<&Item>,
        existing: Metadata,
        action: Action,
    ) -> std::result::Result<Hold, Errno> {
        if self.run.rules.mode == RestoreMode::New {
            return Err(Errno::EXIST);
        }
        // One's own directory may be closed even to oneself; it is opened for the while.
        let euid = self.run.euid;
        let closed = euid != 0 && existing.uid == euid && existing.mode & 0o700 != 0o700;
        if closed {
            let held = open_beneath(fd, name, OFlags::PATH)?;
            Held::Place(held.as_fd()).chmod(existing.mode | 0o700)?;
        }
        let dir = parent.dir.enter(name, OFlags::PATH)?;
        self.sweep(&dir);
        if let Some(item) = item {
            self.run.count(action, &item.metadata, 0);
        }
        let finish = match item {
            Some(item) if self.run.rules.mode != RestoreMode::Add => Some(item.metadata.clone()),
            _ => closed.then_some(existing),
        };
        let inherits = OpenDir::has_default_acl(&dir);
        Ok(self.opened(parent, dir, false, inherits, finish))
    }

    fn opened(
        &self,
        parent: &Hold,
        dir: Arc<Dir>,
        fresh: bool,
        inherits: bool,
        finish: Option<Metadata>,
    ) -> Hold {
        let finish = finish.map_or_else(OnceLock::new, OnceLock::from);
        let run = Arc::clone(&self.run);
        Hold::new(OpenDir { dir, fresh, inherits, finish, parent: Some(parent.clone()), run })
    }

    /// Lets the threads end, after what is queued or, once stopped, at once.
    fn join(&mut self) {
        self.queue = None;
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                self.run.stop(Error::bug("a thread of the restore has panicked"));
            }
        }
    }
}

impl Target for FilesTarget {
    type Done = Restored;

    /// Errors: the first fatal error of any thread; [`Code::Integrity`] when items do not come in order.
    fn put(&mut self, item: Item) -> Result<()> {
        self.run.check()?;
        if self.last.as_ref().is_some_and(|last| *last >= item.path) {
            return Err(Error::integrity(format!("the item {} is out of order", item.path)));
        }
        self.last = Some(item.path.clone());
        let Some(directory) = item.path.parent() else {
            if let Some(top) = self.levels.first().and_then(|level| level.hold.as_ref())
                && item.metadata.kind == Kind::Directory
                && self.run.rules.mode != RestoreMode::Add
            {
                top.finish.get_or_init(|| item.metadata.clone());
            }
            self.run.dealt_with(0);
            return Ok(());
        };
        let parent = self.go_to(&directory);
        let name = item.path.name();
        if let Some(seen) = self.levels.last_mut().and_then(|level| level.seen.as_mut()) {
            seen.insert(name.to_vec());
        }
        let Some(parent) = parent else {
            let lost = "its directory could not be restored".to_owned();
            self.run.dealt_with(item.metadata.size);
            self.run.skip(item.path, SkipReason::Unwritable, lost);
            return Ok(());
        };
        if item.metadata.kind == Kind::Directory {
            let entered = self.enter(&parent, name, Some(&item));
            self.run.dealt_with(0);
            self.descend(name, entered);
            return Ok(());
        }
        let name = CString::new(name).map_err(|error| Error::bug("a path with a NUL byte").because(error))?;
        let link = item.metadata.hard_link.map(|link| self.run.link(link));
        if let Some(queue) = &self.queue
            && queue.send(Job { parent, name, item, link }).is_err()
        {
            self.run.stop(Error::bug("the threads of the restore have ended early"));
        }
        self.run.check()
    }

    fn skip(&mut self, skip: Skip) -> Result<()> {
        if skip.reason.is_loss() {
            self.kept.insert(skip.path.clone());
        }
        self.run.record(skip);
        self.run.check()
    }

    fn finish(mut self: Box<Self>, _captured: &Captured) -> Result<(Receipt, Restored)> {
        while !self.levels.is_empty() {
            self.leave();
        }
        self.join();
        self.run.check()?;
        let fd = self.run.root.fd();
        fd.and_then(|fd| syncfs(&*fd))
            .map_err(|errno| Error::io("cannot make what was restored durable", errno.into()))?;
        let restored = self.run.take();
        Ok((Receipt { point: None, counts: restored.counts }, restored))
    }
}

impl Drop for FilesTarget {
    fn drop(&mut self) {
        if !self.workers.is_empty() {
            self.run.stop(Error::new(Code::Cancelled, "the restore was given up"));
            self.join();
        }
    }
}

/// Sixteen hexadecimal digits that no other run has.
fn tag() -> String {
    format!("{:016x}", std::hash::RandomState::new().build_hasher().finish())
}

/// Keeps other restores out of the directory, waiting a while for one that is about to end.
fn is_ours_alone(root: &OwnedFd) -> bool {
    const TRIES: u32 = 600;
    for _ in 0..TRIES {
        match flock(root, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => std::thread::sleep(std::time::Duration::from_millis(50)),
            // A file system without locks: then nobody else is kept out.
            _locked_or_cannot => return true,
        }
    }
    false
}

/// Opens the root directory, making it if need be; and whether nothing can be in it.
fn open_root(root: &Path, mode: RestoreMode) -> Result<(OwnedFd, bool)> {
    let fail = |what: &str, error| Error::io(format!("cannot {what} {}", root.display()), error);
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o777).create(root).map_err(|error| fail("make", error))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = openat(CWD, root, flags, Mode::empty()).map_err(|errno| fail("open", errno.into()))?;
    if !is_ours_alone(&fd) {
        let what = format!("another restore is writing to {}", root.display());
        return Err(Error::new(Code::Conflict, what).hint("wait for it, or choose another directory"));
    }
    if let Err(Errno::NOSYS | Errno::PERM) = open_beneath(&fd, c".", OFlags::PATH) {
        let what = "this kernel cannot confine a restore to its directory (openat2 is missing or forbidden)";
        return Err(Error::new(Code::Unsupported, what)
            .hint("run it on Linux 5.6 or later, outside a container that forbids openat2"));
    }
    let mut names = NameList::default();
    names.read(&fd, &mut ListingBuffer::default()).map_err(|errno| fail("list", errno.into()))?;
    let empty = names.take().is_none();
    if mode == RestoreMode::New && !empty {
        let what = format!("{} is not empty", root.display());
        return Err(Error::new(Code::AlreadyExists, what)
            .hint("choose a new directory, or say whether to add to it, overwrite or mirror"));
    }
    Ok((fd, empty))
}
