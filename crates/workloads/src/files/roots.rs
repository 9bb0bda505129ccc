//! Where a run begins: the roots the person named, resolved to real paths and put into one tree from `/` down,
//! so that one walk meets everything once and in order.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{Code, Error, Result};
use rustix::fs::{CWD, Mode, OFlags, openat, readlinkat};

use super::dirs::Dir;
use super::inspect::{kind, look};

/// As many symbolic links on the way to a root as the kernel itself would follow.
const LINKS_MAX: usize = 40;

/// A place in [`Roots`]; 0 is `/`.
pub(super) type Node = usize;

#[derive(Default)]
struct Place {
    children: BTreeMap<Vec<u8>, Node>,
    is_root: bool,
}

/// The named roots, their ancestors, and the symbolic links that led to them.
pub(super) struct Roots {
    places: Vec<Place>,
    /// Each root as it was named and its real path, without the leading `/`.
    pub(super) named: Vec<(Vec<u8>, Vec<u8>)>,
    /// The links that led to them.
    pub(super) links: Vec<Vec<u8>>,
}

impl Roots {
    /// Errors: [`Code::Usage`] for a path that is not absolute, [`Code::NotFound`] for one that leads nowhere.
    pub(super) fn resolve(
        paths: &[PathBuf],
        bare: &[PathBuf],
        keep_links: bool,
        top: &Arc<Dir>,
    ) -> Result<Self> {
        if paths.is_empty() && bare.is_empty() {
            return Err(Error::new(Code::Usage, "there is nothing to protect").hint("name at least one path"));
        }
        let mut roots = Self { places: vec![Place::default()], named: Vec::new(), links: Vec::new() };
        for (path, whole) in
            paths.iter().map(|path| (path, true)).chain(bare.iter().map(|path| (path, false)))
        {
            if !path.is_absolute() {
                let what = format!("{} is not an absolute path", path.display());
                return Err(Error::new(Code::Usage, what));
            }
            roots
                .add(path, whole, keep_links, top)
                .map_err(|error| error.during(format!("cannot protect {}", path.display())))?;
        }
        Ok(roots)
    }

    pub(super) fn child(&self, node: Node, name: &[u8]) -> Option<Node> {
        self.places.get(node)?.children.get(name).copied()
    }

    pub(super) fn children(&self, node: Node) -> impl Iterator<Item = &[u8]> {
        self.places.get(node).into_iter().flat_map(|place| place.children.keys().map(Vec::as_slice))
    }

    /// Whether the person named this place, rather than something below it.
    pub(super) fn is_root(&self, node: Node) -> bool {
        self.places.get(node).is_some_and(|place| place.is_root)
    }

    /// The real paths of all that the person named, without the leading `/`.
    pub(super) fn paths(&self) -> Vec<Vec<u8>> {
        let mut paths = Vec::new();
        let mut ahead = vec![(0, Vec::new())];
        while let Some((node, path)) = ahead.pop() {
            for (name, child) in self.places.get(node).into_iter().flat_map(|place| &place.children) {
                let mut path: Vec<u8> = path.clone();
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(name);
                ahead.push((*child, path));
            }
            if self.is_root(node) {
                paths.push(path);
            }
        }
        paths
    }

    /// Follows `path` one name at a time. Links on the way become places of their own: the point then holds the
    /// link and the real directory, and a restore in place needs to go through neither.
    fn add(&mut self, path: &Path, whole: bool, keep_links: bool, top: &Arc<Dir>) -> Result<()> {
        let mut ahead: VecDeque<Vec<u8>> = names(path.as_os_str().as_bytes()).collect();
        let mut dirs = vec![Arc::clone(top)];
        let mut real: Vec<Vec<u8>> = Vec::new();
        let mut links = 0;
        while let Some(name) = ahead.pop_front() {
            if name == b".." {
                real.pop();
                dirs.truncate(real.len() + 1);
                continue;
            }
            let dir = dirs.last().unwrap_or(top);
            let step = step(dir, &name, !ahead.is_empty())?;
            real.push(name);
            let alone = keep_links && ahead.is_empty();
            if let Step::Link(target) = step {
                if alone {
                    break;
                }
                links += 1;
                if links > LINKS_MAX {
                    return Err(Error::new(Code::Io, "there are too many symbolic links on the way"));
                }
                self.insert(&real);
                self.links.push(real.join(&b'/'));
                real.pop();
                if target.starts_with(b"/") {
                    real.clear();
                    dirs.truncate(1);
                }
                names(&target).rev().for_each(|name| ahead.push_front(name));
            } else if let Step::Directory(child) = step {
                dirs.push(child);
            }
        }
        let node = self.insert(&real);
        if !whole {
            return Ok(());
        }
        let named: Vec<Vec<u8>> = names(path.as_os_str().as_bytes()).collect();
        self.named.push((named.join(&b'/'), real.join(&b'/')));
        if let Some(place) = self.places.get_mut(node) {
            place.is_root = true;
        }
        Ok(())
    }

    fn insert(&mut self, path: &[Vec<u8>]) -> Node {
        let mut node = 0;
        for name in path {
            let free = self.places.len();
            let Some(place) = self.places.get_mut(node) else { break };
            node = *place.children.entry(name.clone()).or_insert(free);
            if node == free {
                self.places.push(Place::default());
            }
        }
        node
    }
}

fn names(path: &[u8]) -> impl DoubleEndedIterator<Item = Vec<u8>> {
    path.split(|&byte| byte == b'/').filter(|name| !matches!(*name, b"" | b".")).map(<[u8]>::to_vec)
}

/// What a name on the way to a root turned out to be.
enum Step {
    /// A symbolic link, with its target.
    Link(Vec<u8>),
    /// A directory with more to come behind it.
    Directory(Arc<Dir>),
    /// The end of the way.
    Arrived,
}

fn step(dir: &Arc<Dir>, name: &[u8], enter: bool) -> Result<Step> {
    let fail = |errno: rustix::io::Errno| {
        let mut path = dir.path();
        path.push(b'/');
        path.extend_from_slice(name);
        Error::io(format!("cannot look at {}", String::from_utf8_lossy(&path)), errno.into())
    };
    let name = CString::new(name)
        .map_err(|error| Error::new(Code::Usage, "a path contains a NUL byte").because(error))?;
    let fd = dir.fd().map_err(fail)?;
    let stat = look(&*fd, &name).map_err(fail)?;
    if kind(&stat) == Some(mainstay_core::Kind::Symlink) {
        let target = readlinkat(&*fd, &*name, Vec::new()).map_err(fail)?;
        return Ok(Step::Link(target.into_bytes()));
    }
    Ok(if enter { Step::Directory(dir.enter(&name, OFlags::PATH).map_err(fail)?) } else { Step::Arrived })
}

/// `/`, as far as this process can see.
pub(super) fn top() -> Result<Arc<Dir>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, c"/", flags, Mode::empty())
        .and_then(Dir::root)
        .map_err(|errno| Error::io("cannot open the root directory", errno.into()))
}
