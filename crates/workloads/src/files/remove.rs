//! Deletes below an open directory: never through a link, never across a mount point.

use std::ffi::{CStr, CString};
use std::sync::Arc;

use mainstay_core::Kind;
use rustix::fs::{AtFlags, OFlags, StatxAttributes, unlinkat};
use rustix::io::Errno;

use super::dirs::Dir;
use super::inspect::{kind, look};
use super::names::{ListingBuffer, NameList};

/// A directory that is being emptied.
struct Emptying {
    dir: Arc<Dir>,
    name: CString,
    names: NameList,
}

/// Deletes `name` in `dir` and everything below it. Goes on after a failure; the first one is returned.
pub(super) fn remove_tree(dir: &Arc<Dir>, name: &CStr) -> Result<(), Errno> {
    let mut buffer = ListingBuffer::default();
    let mut failure = None;
    let mut stack: Vec<Emptying> = Vec::new();
    let mut todo = Some(name.to_owned());
    loop {
        if let Some(name) = todo.take() {
            let holder = stack.last().map_or(dir, |emptying| &emptying.dir);
            match remove_one(holder, name, &mut buffer) {
                Ok(None) => {}
                Ok(Some(emptying)) => stack.push(emptying),
                Err(errno) => failure = failure.or(Some(errno)),
            }
        }
        let Some(top) = stack.last_mut() else { break };
        todo = top.names.take().map(CStr::to_owned);
        if todo.is_none() {
            let Some(Emptying { name, .. }) = stack.pop() else { break };
            let holder = stack.last().map_or(dir, |emptying| &emptying.dir);
            let removed = holder.fd().and_then(|fd| unlinkat(&*fd, &*name, AtFlags::REMOVEDIR));
            failure = failure.or(removed.err());
        }
    }
    failure.map_or(Ok(()), Err)
}

/// Deletes what is no directory; opens and lists what is one.
fn remove_one(
    holder: &Arc<Dir>,
    name: CString,
    buffer: &mut ListingBuffer,
) -> Result<Option<Emptying>, Errno> {
    let fd = holder.fd()?;
    let stat = match look(&*fd, &name) {
        Err(Errno::NOENT) => return Ok(None),
        other => other?,
    };
    if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        return Err(Errno::XDEV);
    }
    if kind(&stat) != Some(Kind::Directory) {
        return unlinkat(&*fd, &*name, AtFlags::empty()).map(|()| None);
    }
    let dir = holder.enter(&name, OFlags::RDONLY)?;
    // Looked at again now that it is open: something may have been mounted or moved meanwhile.
    if dir.id().device != holder.id().device {
        return Err(Errno::XDEV);
    }
    let mut names = NameList::default();
    names.read(&*dir.fd()?, buffer)?;
    Ok(Some(Emptying { dir, name, names }))
}
