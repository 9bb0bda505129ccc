//! The file tree as a [`Source`]: one walk, names in byte order, one `statx` and one list of attributes each.

use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{
    Body, Captured, Clock, Code, Consistency, Error, Item, ItemPath, Kind, Next, Position, Receipt, Result,
    Skip, SkipReason, Source, Stamp, Time,
};
use rustix::fs::{OFlags, Statx, StatxAttributes};
use rustix::io::Errno;

use super::dirs::{Dir, FileId, open_below, open_beneath};
use super::hooks::{Hooks, Quiesced};
use super::inspect::{Inspector, kind, look, stamp};
use super::left_out::Recorder;
use super::names::{ListingBuffer, NameList};
use super::owners::Owners;
use super::reader::FileOpener;
use super::roots::{Node, Roots, top};
use super::scope::{CACHE_TAG, Scope, is_cache, is_pseudo};
use super::snapshot::{SNAPSHOT_PREFIX, SUBVOLUME_STAND_IN, SnapshotRule, Snapshots};

/// A file touched less than this before the run began is read again by the next one: its times may be too coarse
/// to tell a second change.
const SETTLED: Duration = Duration::from_secs(2);

/// What to protect.
#[derive(Clone, Debug, Default)]
pub struct FilesRequest {
    /// Absolute paths. Each appears in the point without its leading `/`, below its ancestors; a root that is
    /// reached through symbolic links appears under its real path, beside the links.
    pub roots: Vec<PathBuf>,
    /// As roots, but each by itself, without what is in it.
    pub bare: Vec<PathBuf>,
    /// A root that is itself a symbolic link stands for the link alone.
    pub keep_links: bool,
    /// Patterns as in a `.gitignore`, relative to the root that a path lies in.
    pub exclude: Vec<String>,
    /// Files with such patterns, one a line.
    pub exclude_files: Vec<PathBuf>,
    /// Paths never captured, whatever else is said: the repository itself.
    pub never: Vec<PathBuf>,
    /// Leave out what is in a directory marked by a valid `CACHEDIR.TAG`, but for the tag. Roots are exempt.
    pub skip_caches: bool,
    /// Stay on the file system of each root; mount points are captured as empty directories.
    pub one_file_system: bool,
    /// Read from snapshots, so that the point is of one moment.
    pub snapshots: SnapshotRule,
    /// Commands to run before anything is read and once all is stored.
    pub hooks: Option<Hooks>,
}

/// Reads file trees. Yields what it cannot read as [`Next::Skipped`].
pub struct FilesSource {
    stack: Vec<Frame>,
    /// The path of the directory on top of the stack, relative to `/`.
    path: Vec<u8>,
    after: After,
    began: Time,
    consistency: Consistency,
    quiesced: Option<Quiesced>,
    /// Last, so that nothing in a snapshot is open any more when it is deleted.
    scan: Scan,
}

/// What stays the same during a walk, and what is used over and over.
struct Scan {
    top: Arc<Dir>,
    scope: Scope,
    roots: Roots,
    snapshots: Snapshots,
    /// Something was read from the live tree since the snapshot does not show it.
    islands: bool,
    /// For a mirror: what the items of the point do not show.
    record: Recorder,
    inspector: Inspector,
    buffer: ListingBuffer,
    settled: Time,
    euid: u32,
}

/// A directory on the way from `/` to the present item.
struct Frame {
    dir: Arc<Dir>,
    /// The length of its path, and of the file name that is appended to it meanwhile.
    path_len: usize,
    names: NameList,
    node: Option<Node>,
    inside: Option<Inside>,
    device: u64,
}

/// What follows the item that was yielded last.
#[derive(Default)]
struct After {
    pending: VecDeque<Next>,
    descend: Option<Descend>,
}

/// A name about to be looked at.
struct At<'a> {
    dir: &'a Arc<Dir>,
    name: &'a CStr,
    node: Option<Node>,
    inside: Option<Inside>,
    device: u64,
}

/// Below a root: where its relative paths begin, and its device.
#[derive(Clone, Copy)]
struct Inside {
    start: usize,
    device: u64,
    /// What is read is a snapshot, not the live tree.
    snapshot: bool,
}

/// A directory that was yielded and is entered next.
struct Descend {
    name: CString,
    node: Option<Node>,
    /// What it lies in, itself included.
    inside: Option<Inside>,
    is_root: bool,
    crossed: bool,
    /// Set when it is not to be opened by its name.
    opened: Option<Arc<Dir>>,
}

impl FilesSource {
    /// Errors: [`Code::NotFound`] for a root that does not exist, [`Code::Usage`] for one that is not absolute
    /// and for patterns that make no sense.
    pub fn new(request: FilesRequest, clock: Arc<dyn Clock>) -> Result<Self> {
        let FilesRequest { exclude, exclude_files, never, skip_caches, one_file_system, hooks, .. } =
            &request;
        let top = top()?;
        let (mut quiesced, trouble) = match hooks.clone().map(Quiesced::begin).transpose()? {
            Some((quiesced, trouble)) => (Some(quiesced), trouble),
            None => (None, None),
        };
        let began = clock.now();
        let roots = Roots::resolve(&request.roots, &request.bare, request.keep_links, &top)?;
        let mut scan = Scan {
            scope: Scope::new(exclude, exclude_files, never, *skip_caches, *one_file_system)?,
            snapshots: Snapshots::take(&roots.paths(), request.snapshots)?,
            islands: false,
            record: Recorder::default(),
            top: Arc::clone(&top),
            roots,
            inspector: Inspector::new(Owners::of_this_machine()),
            buffer: ListingBuffer::default(),
            settled: Time(began.0.saturating_sub(i64::try_from(SETTLED.as_nanos()).unwrap_or(i64::MAX))),
            euid: rustix::process::geteuid().as_raw(),
        };
        scan.record_request();
        let asked = hooks.as_ref().is_some_and(|hooks| hooks.quiesce.is_some());
        let at_rest = asked && trouble.is_none();
        if scan.snapshots.whole {
            // The moment is pinned: the application need not wait for the reading.
            quiesced.take().map_or(Ok(()), Quiesced::thaw)?;
        }
        let mut source = Self {
            scan,
            stack: Vec::new(),
            path: Vec::new(),
            after: After::default(),
            began,
            consistency: if at_rest { Consistency::Application } else { Consistency::Fuzzy },
            quiesced,
        };
        if let Some(error) = trouble {
            let detail = format!("captured without being quiesced: {}", error.chain().join(": "));
            let skip = Skip { path: ItemPath::root(), reason: SkipReason::Changed, detail };
            source.after.pending.push_back(Next::Skipped(skip));
        }
        source.begin(&top)?;
        Ok(source)
    }

    /// Puts `/` on the stack: as a root if it is one, otherwise as the way to the roots.
    fn begin(&mut self, top: &Arc<Dir>) -> Result<()> {
        let fail = |errno: Errno| Error::io("cannot list the root directory", errno.into());
        let (dir, snapshot) = match self.scan.snapshots.instead_of(b"") {
            Some(snapshot) => (snapshot.and_then(Dir::root).map_err(fail)?, true),
            // `.` of the top is the top, opened for listing.
            None if self.scan.roots.is_root(0) => (top.enter(c".", OFlags::RDONLY).map_err(fail)?, false),
            None => (Arc::clone(top), false),
        };
        let device = dir.id().device;
        let inside = self.scan.roots.is_root(0).then_some(Inside { start: 0, device, snapshot });
        let (names, error) = self.scan.list(&dir, inside, Some(0), true);
        if let Some(errno) = error {
            return Err(fail(errno));
        }
        if inside.is_some() {
            let at = At { dir: &dir, name: c".", node: None, inside: None, device };
            let stat = look(&*dir.fd().map_err(fail)?, at.name).map_err(fail)?;
            let (item, trouble) =
                self.scan.item(&at, ItemPath::root(), &stat, Kind::Directory).map_err(fail)?;
            self.after.pending.push_back(Next::Item(item));
            self.after.pending.extend(trouble.map(Next::Skipped));
        }
        self.stack.push(Frame { dir, path_len: 0, names, node: Some(0), inside, device });
        Ok(())
    }

    /// Enters the directory that was yielded last.
    fn enter(&mut self, descend: Descend) {
        let Some(parent) = self.stack.last() else { return };
        let Descend { name, node, inside, is_root, crossed, opened } = descend;
        let access = if inside.is_some() { OFlags::RDONLY } else { OFlags::PATH };
        self.path.truncate(parent.path_len);
        append(&mut self.path, name.to_bytes());
        let path_len = self.path.len();
        let opened = opened.map_or_else(|| parent.dir.enter(&name, access), Ok).and_then(|dir| {
            // On the way to a root it is passed through like anything else.
            let pseudo = crossed && !is_root && inside.is_some() && is_pseudo(&*dir.fd()?);
            Ok((dir, pseudo))
        });
        let (dir, inside, names, trouble) = match opened {
            Ok((dir, pseudo)) => {
                if pseudo {
                    self.scan.record.add(b'x', &self.path);
                }
                let inside = inside.filter(|_| !pseudo);
                let (names, trouble) = self.scan.list(&dir, inside, node, is_root);
                (dir, inside, names, trouble)
            }
            Err(errno) => (Arc::clone(&parent.dir), inside, NameList::default(), Some(errno)),
        };
        if let Some(errno) = trouble {
            self.after.pending.push_back(Next::Skipped(skip(&self.path, SkipReason::Unreadable, errno)));
        }
        let device = dir.id().device;
        self.stack.push(Frame { dir, path_len, names, node, inside, device });
    }

    /// What the next name that counts is; `None` once all are done.
    fn step(&mut self) -> Result<Option<Next>> {
        while let Some(frame) = self.stack.last_mut() {
            self.path.truncate(frame.path_len);
            let Frame { dir, names, node, inside, device, .. } = frame;
            let Some(name) = names.take() else {
                self.stack.pop();
                continue;
            };
            let at = At { dir, name, node: *node, inside: *inside, device: *device };
            if let Some(next) = self.scan.visit(&at, &mut self.path, &mut self.after)? {
                return Ok(Some(next));
            }
        }
        Ok(None)
    }
}

impl Source for FilesSource {
    fn next(&mut self) -> Result<Next> {
        loop {
            if let Some(next) = self.after.pending.pop_front() {
                return Ok(next);
            }
            match self.after.descend.take() {
                // What entering has to say comes before what is inside.
                Some(descend) => self.enter(descend),
                None => return Ok(self.step()?.unwrap_or(Next::End)),
            }
        }
    }

    fn seal(&mut self) -> Result<Captured> {
        let one_moment = self.scan.snapshots.whole && !self.scan.islands;
        let consistency = match self.consistency {
            // The application was let go when the snapshot was taken; what lies beside that went on.
            Consistency::Application if self.scan.snapshots.whole && !one_moment => Consistency::Fuzzy,
            Consistency::Fuzzy if one_moment => Consistency::FileSystem,
            reached => reached,
        };
        let position = Position(self.scan.record.bytes());
        Ok(Captured { position, consistency, moment: self.began })
    }

    /// Errors: the thaw command failed. The point is whole all the same.
    fn commit(mut self: Box<Self>, _receipt: &Receipt) -> Result<()> {
        self.quiesced.take().map_or(Ok(()), Quiesced::thaw)
    }
}

impl Scan {
    /// Writes down what was asked for.
    fn record_request(&mut self) {
        for (named, real) in &self.roots.named {
            self.record.add(b'n', named);
            self.record.add(b'r', real);
        }
        self.roots.links.iter().for_each(|link| self.record.add(b'l', link));
        self.scope.lines.iter().for_each(|line| self.record.add(b'p', line.as_bytes()));
        if self.scope.cache_tags {
            self.record.add(b'c', b"");
        }
    }

    /// The sorted names to visit in a directory, and the error that cut the listing short.
    fn list(
        &mut self,
        dir: &Arc<Dir>,
        inside: Option<Inside>,
        node: Option<Node>,
        is_root: bool,
    ) -> (NameList, Option<Errno>) {
        let mut names = NameList::default();
        let mut read = || {
            if inside.is_some() {
                names.read(&*dir.fd()?, &mut self.buffer)?;
            }
            Ok(())
        };
        let mut trouble = read().err();
        for name in node.into_iter().flat_map(|node| self.roots.children(node)) {
            trouble = names.push(name).err().or(trouble);
        }
        names.sort();
        let may_be_cache = inside.is_some() && !is_root && self.scope.cache_tags && names.contains(CACHE_TAG);
        if may_be_cache && dir.fd().is_ok_and(|fd| is_cache(&*fd)) {
            let named = |name: &[u8]| node.is_some_and(|node| self.roots.child(node, name).is_some());
            names.retain(|name| name == CACHE_TAG || named(name));
        }
        (names, trouble)
    }

    /// Looks at one name. `path` is its directory's and becomes its own; `None` when it does not belong to the run.
    fn visit(&mut self, at: &At<'_>, path: &mut Vec<u8>, after: &mut After) -> Result<Option<Next>> {
        let parent_len = path.len();
        append(path, at.name.to_bytes());
        let node = at.node.and_then(|node| self.roots.child(node, at.name.to_bytes()));
        let unreadable = |errno| Ok(Some(Next::Skipped(skip(path, SkipReason::Unreadable, errno))));
        let stat = match at.dir.fd().and_then(|fd| look(&*fd, at.name)) {
            Ok(stat) => stat,
            Err(errno) if node.is_some() => {
                return Err(Error::io(
                    format!("cannot look at /{}", String::from_utf8_lossy(path)),
                    errno.into(),
                ));
            }
            Err(errno) => return unreadable(errno),
        };
        let Some(kind) = kind(&stat) else {
            return Ok(Some(Next::Skipped(skip(path, SkipReason::Unsupported, Errno::OPNOTSUPP))));
        };
        if self.leaves_out(at, node, path, &stat, kind)? {
            return Ok(None);
        }
        let Ok(item_path) = ItemPath::new(path.clone()) else {
            let parent = path.get(..parent_len).unwrap_or_default();
            return Ok(Some(Next::Skipped(skip(parent, SkipReason::Unsupported, Errno::NAMETOOLONG))));
        };
        let found = match self.elsewhere(at, node, path, &stat) {
            Ok(None) => self.item(at, item_path, &stat, kind).map(|item| (item, stat, None)),
            Ok(Some((dir, stat))) => {
                let there = At { dir: &dir, name: c".", ..*at };
                self.item(&there, item_path, &stat, kind).map(|item| (item, stat, Some(dir)))
            }
            Err(errno) => Err(errno),
        };
        let ((item, trouble), stat, opened) = match found {
            Ok(found) => found,
            Err(errno) => return unreadable(errno),
        };
        after.pending.extend(trouble.map(Next::Skipped));
        if kind == Kind::Directory {
            after.descend = self.descend(at, node, path, &stat, opened);
        }
        Ok(Some(Next::Item(item)))
    }

    /// The directory to read instead of the one at `path`: the snapshot of a root; or, inside a snapshot, the
    /// live directory where it shows only the stand-in for a mount point or a subvolume.
    fn elsewhere(
        &self,
        at: &At<'_>,
        node: Option<Node>,
        path: &[u8],
        stat: &Statx,
    ) -> std::result::Result<Option<(Arc<Dir>, Statx)>, Errno> {
        let fd = if let Some(snapshot) =
            node.filter(|node| self.roots.is_root(*node)).and_then(|_| self.snapshots.instead_of(path))
        {
            snapshot?
        } else if kind(stat) == Some(Kind::Directory)
            && at.inside.is_some_and(|inside| inside.snapshot)
            && (stat.stx_ino == SUBVOLUME_STAND_IN || self.snapshots.is_mount_point(path))
        {
            let names = path.split(|&byte| byte == b'/');
            open_beneath(open_below(self.top.fd()?, names)?, c".", OFlags::RDONLY)?
        } else {
            return Ok(None);
        };
        let dir = at.dir.adopt(at.name, fd)?;
        let stat = look(&*dir.fd()?, c".")?;
        Ok(Some((dir, stat)))
    }

    fn leaves_out(
        &mut self,
        at: &At<'_>,
        node: Option<Node>,
        path: &[u8],
        stat: &Statx,
        kind: Kind,
    ) -> Result<bool> {
        if self.scope.forbids(FileId::of(stat), path) {
            if node.is_some() {
                let what = format!("/{} is where recovery points are kept", String::from_utf8_lossy(path));
                return Err(Error::new(Code::Usage, what).hint("protect a directory outside the repository"));
            }
            self.record.add(b'x', path);
            return Ok(true);
        }
        let (None, Some(Inside { start, .. })) = (node, at.inside) else { return Ok(false) };
        if at.name.to_bytes().starts_with(SNAPSHOT_PREFIX) {
            return Ok(true);
        }
        Ok(self.scope.excludes(path.get(start..).unwrap_or_default(), kind == Kind::Directory))
    }

    fn item(
        &mut self,
        at: &At<'_>,
        path: ItemPath,
        stat: &Statx,
        kind: Kind,
    ) -> std::result::Result<(Box<Item>, Option<Skip>), Errno> {
        let (metadata, trouble) = self.inspector.metadata(&*at.dir.fd()?, at.name, stat, kind)?;
        let trouble = trouble.map(|errno| skip(path.as_bytes(), SkipReason::Metadata, errno));
        let (body, stamp) = if kind == Kind::File {
            let opener = FileOpener::new(Arc::clone(at.dir), at.name.to_owned(), stat, self.euid);
            (Body::Stream(Box::new(opener)), stamp(stat, self.settled))
        } else {
            (Body::None, Stamp::default())
        };
        Ok((Box::new(Item { path, metadata, stamp, body }), trouble))
    }

    /// Whether and how to go into the directory at `path`.
    fn descend(
        &mut self,
        at: &At<'_>,
        node: Option<Node>,
        path: &[u8],
        stat: &Statx,
        opened: Option<Arc<Dir>>,
    ) -> Option<Descend> {
        let device = FileId::of(stat).device;
        let is_root = node.is_some_and(|node| self.roots.is_root(node));
        let mounted = stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
        let stays = |inside: &Inside| !(self.scope.one_file_system && (device != inside.device || mounted));
        let inside = if is_root {
            Some(Inside { start: path.len() + 1, device, snapshot: opened.is_some() })
        } else {
            let live = opened.is_some();
            at.inside.filter(stays).map(|inside| Inside { snapshot: inside.snapshot && !live, ..inside })
        };
        if at.inside.is_some() && inside.is_none() {
            self.record.add(b'x', path);
        }
        self.islands |= !is_root && opened.is_some() && inside.is_some();
        let leads_on =
            inside.is_some() || node.is_some_and(|node| self.roots.children(node).next().is_some());
        let (name, crossed) = (at.name.to_owned(), device != at.device || mounted);
        leads_on.then_some(Descend { name, node, inside, is_root, crossed, opened })
    }
}

fn append(path: &mut Vec<u8>, name: &[u8]) {
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
}

fn skip(path: &[u8], reason: SkipReason, errno: Errno) -> Skip {
    let detail = std::io::Error::from(errno).to_string();
    Skip { path: ItemPath::new(path.to_vec()).unwrap_or_default(), reason, detail }
}
