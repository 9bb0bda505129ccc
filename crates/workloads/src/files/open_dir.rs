//! A directory that is being restored into. Its own metadata is applied when the last thing in it is done,
//! whichever thread does that.

use std::ffi::CString;
use std::ops::Deref;
use std::os::fd::AsFd as _;
use std::sync::{Arc, OnceLock};

use mainstay_core::{Error, Metadata, SkipReason};
use rustix::fs::{OFlags, syncfs};
use rustix::io::Errno;

use super::apply::{DEFAULT_ACL, Held, apply};
use super::dirs::{Dir, open_beneath};
use super::inspect::{Inspector, look};
use super::run::Run;

pub(super) struct OpenDir {
    pub(super) dir: Arc<Dir>,
    /// Made by this run: nothing can be in it but what the run puts there.
    pub(super) fresh: bool,
    /// It has a default ACL, which whatever is made in it inherits.
    pub(super) inherits: bool,
    /// What it is to be in the end; unset when it is only passed through.
    pub(super) finish: OnceLock<Metadata>,
    pub(super) parent: Option<Hold>,
    pub(super) run: Arc<Run>,
}

/// Keeps an [`OpenDir`] from being finished. Whoever drops the last one finishes it, and then lets its parent go.
#[derive(Clone)]
pub(super) struct Hold(Option<Arc<OpenDir>>);

impl Hold {
    pub(super) fn new(dir: OpenDir) -> Self {
        Self(Some(Arc::new(dir)))
    }
}

impl Deref for Hold {
    type Target = OpenDir;

    fn deref(&self) -> &OpenDir {
        match &self.0 {
            Some(dir) => dir,
            None => unreachable!("emptied only by drop"),
        }
    }
}

impl Drop for Hold {
    /// One by one rather than in recursion: the chain may be far deeper than the stack.
    fn drop(&mut self) {
        let mut next = self.0.take();
        while let Some(mut dir) = next.and_then(Arc::into_inner) {
            dir.complete();
            next = dir.parent.take().and_then(|mut parent| parent.0.take());
        }
    }
}

impl OpenDir {
    fn complete(&self) {
        // The run makes the root's file system durable, and each other one when it is done with it.
        if self.parent.as_ref().is_some_and(|parent| parent.dir.id().device != self.dir.id().device)
            && let Err(errno) = self.flush()
        {
            self.run.stop(Error::io("cannot make what was restored durable", errno.into()));
        }
        let Some(metadata) = self.finish.get() else { return };
        let path = || mainstay_core::ItemPath::new(self.dir.path()).unwrap_or_default();
        match self.apply(metadata) {
            Ok(None) => {}
            Ok(Some(losses)) => self.run.skip(path(), SkipReason::Metadata, losses),
            Err(errno) => {
                let detail = std::io::Error::from(errno).to_string();
                self.run.skip(path(), SkipReason::Metadata, detail);
            }
        }
    }

    fn flush(&self) -> Result<(), Errno> {
        let fd = open_beneath(&*self.dir.fd()?, c".", OFlags::RDONLY)?;
        syncfs(fd)
    }

    fn apply(&self, metadata: &Metadata) -> Result<Option<String>, Errno> {
        let fd = self.dir.fd()?;
        let stat = look(&*fd, c".")?;
        let mut inspector = Inspector::default();
        let (present, _trouble) = inspector.metadata(&*fd, c".", &stat, metadata.kind)?;
        Ok(apply(&self.run, Held::Place(fd.as_fd()), metadata, Some(&present)))
    }

    /// Whether there is a default ACL on it.
    pub(super) fn has_default_acl(dir: &Arc<Dir>) -> bool {
        let has = || -> Result<bool, Errno> {
            let fd = dir.fd()?;
            let stat = look(&*fd, c".")?;
            let (present, _) =
                Inspector::default().metadata(&*fd, c".", &stat, mainstay_core::Kind::Directory)?;
            Ok(present.xattrs.iter().any(|(name, _)| name == DEFAULT_ACL))
        };
        has().unwrap_or(false)
    }

    /// Takes an inherited default ACL away, so that what is made in the directory does not get it.
    pub(super) fn shed_default_acl(dir: &Arc<Dir>) -> Result<(), Errno> {
        let fd = dir.fd()?;
        let name = CString::new(DEFAULT_ACL).or(Err(Errno::INVAL))?;
        match Held::Place(fd.as_fd()).remove_xattr(&name) {
            Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
            other => other,
        }
    }
}
