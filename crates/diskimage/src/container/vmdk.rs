//! VMDK, as VMware's "Virtual Disk Format 5.0" describes it: a text says which parts a disk consists of; the parts are
//! flat files, sparse files in grains, or sparse files whose grains are compressed (`streamOptimized`, in OVA files).

mod descriptor;
mod sparse;

use std::path::Path;
use std::sync::Arc;

use mainstay_core::{Blocks, Code, Error, Result};

use self::descriptor::{Descriptor, Part, PartKind};
use self::sparse::Sparse;
use super::{Format, Naming, Opening};
use crate::bytes;
use crate::compose::{Concat, Window};
use crate::mapped::{Map as _, Mapped};

/// The longest text that is read; VMware's own are below 20 KiB.
const TEXT_MAX: u64 = 1 << 20;
const SECTOR: u64 = 512;

pub(super) fn open(
    opening: &mut Opening<'_>,
    base: Arc<dyn Blocks>,
    path: &Path,
    naming: Naming,
) -> Result<Arc<dyn Blocks>> {
    let Some(descriptor) = describe(&*base)? else {
        return Err(Error::new(Code::Usage, "this is one part of a disk that consists of several files")
            .hint("Open the file that describes the disk; its name has no number."));
    };
    let parent = parent(opening, &descriptor, path, naming)?;
    if !sparse::is(&*base)? {
        return parts(opening, &descriptor, path, parent.as_ref(), naming);
    }
    let sparse = Sparse::open(base, parent)?;
    if sparse.unclean() {
        opening.notes.push(format!("{} was not closed cleanly.", path.display()));
    }
    Ok(Arc::new(Mapped(sparse)))
}

/// The text about the disk: the whole file, or within a sparse one. `None` in a part of a disk.
fn describe(base: &dyn Blocks) -> Result<Option<Descriptor>> {
    let sparse = sparse::text(base)?;
    let range = sparse.clone().unwrap_or(0..base.size());
    if range.end - range.start > TEXT_MAX {
        return Err(Error::integrity("a description of more than a megabyte"));
    }
    let text = bytes::read(base, range.start, bytes::index(range.end - range.start)?)?;
    let descriptor = Descriptor::parse(&text)?;
    match (descriptor.parts.is_empty(), sparse.is_some()) {
        (false, _) => Ok(Some(descriptor)),
        // A part of a disk has room for a description or none, but nothing in it.
        (true, true) => Ok(None),
        (true, false) => Err(Error::integrity("a description of a disk without parts")),
    }
}

/// The disk that this one is a layer on. It must not have changed since the layer was made.
fn parent(
    opening: &mut Opening<'_>,
    descriptor: &Descriptor,
    path: &Path,
    naming: Naming,
) -> Result<Option<Arc<dyn Blocks>>> {
    let Some(wanted) = descriptor.parent_id else { return Ok(None) };
    let name = descriptor.parent_name.as_ref().ok_or_else(|| Error::integrity("it is a layer on nothing"))?;
    let (path, base) = opening.companion(path, name.as_bytes(), naming)?;
    let id = match super::probe(&*base)? {
        Format::Vmdk => describe(&*base)?.map(|parent| parent.id),
        other => {
            return Err(Error::new(
                Code::Unsupported,
                format!("a VMDK layer on a {other} image is not read"),
            ));
        }
    };
    if id != Some(wanted) {
        return Err(Error::integrity(format!("{} was changed after a layer was put on it", path.display())));
    }
    Ok(Some(opening.layer(base, &path, Some(Format::Vmdk), naming)?.1))
}

/// A disk of several files, or of one flat one.
fn parts(
    opening: &mut Opening<'_>,
    descriptor: &Descriptor,
    path: &Path,
    parent: Option<&Arc<dyn Blocks>>,
    naming: Naming,
) -> Result<Arc<dyn Blocks>> {
    let mut devices: Vec<Arc<dyn Blocks>> = Vec::new();
    let mut start: u64 = 0;
    for Part { kind, sectors, name, offset } in &descriptor.parts {
        let too_long = || Error::integrity("a disk longer than any disk");
        let size = sectors.checked_mul(SECTOR).ok_or_else(too_long)?;
        let mut file = || opening.companion(path, name.as_bytes(), naming).map(|(_, base)| base);
        let device: Arc<dyn Blocks> = match kind {
            PartKind::Zero => Arc::new(Mapped(Empty(size))),
            PartKind::Flat => {
                let from = offset.checked_mul(SECTOR).ok_or_else(too_long)?;
                Arc::new(Window::new(file()?, from..from.checked_add(size).ok_or_else(too_long)?)?)
            }
            PartKind::Sparse => {
                let below = parent.map(|parent| rest_of(parent, start)).transpose()?;
                let sparse = Sparse::open(file()?, below)?;
                if sparse.size() < size {
                    return Err(Error::integrity(format!("{name} holds less of the disk than it should")));
                }
                Arc::new(Window::new(Arc::new(Mapped(sparse)), 0..size)?)
            }
        };
        devices.push(device);
        start = start.checked_add(size).ok_or_else(too_long)?;
    }
    match <[_; 1]>::try_from(devices) {
        Ok([device]) => Ok(device),
        Err(devices) => Ok(Arc::new(Concat::new(devices)?)),
    }
}

fn rest_of(parent: &Arc<dyn Blocks>, start: u64) -> Result<Arc<dyn Blocks>> {
    Ok(Arc::new(Window::new(Arc::clone(parent), start.min(parent.size())..parent.size())?))
}

/// A part that is a hole.
struct Empty(u64);

impl crate::mapped::Map for Empty {
    fn size(&self) -> u64 {
        self.0
    }

    fn devices(&self) -> &[Arc<dyn Blocks>] {
        &[]
    }

    fn place(&self, _offset: u64, wanted: u64) -> Result<(crate::mapped::Place, u64)> {
        Ok((crate::mapped::Place::Hole, wanted))
    }
}
