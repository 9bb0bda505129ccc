//! A device whose bytes lie elsewhere: in the clusters of an image file, in its backing file, on several disks.
//! A format says where each byte lies; reading and telling extents are written once, here.

use std::ops::Range;
use std::sync::Arc;

use mainstay_core::{Blocks, Code, Error, Extent, ExtentKind, Result};

use crate::compose::{check_range, check_read, extent, push};

/// What one question about extents may return: 100 MiB of them.
const EXTENTS_MAX: usize = 1 << 22;

/// Where a byte lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Nowhere; it reads as zero.
    Hole,
    /// Declared to be zero.
    Zero,
    /// On [`Map::devices`] number `device`.
    At { device: usize, offset: u64 },
    /// `skip` bytes into what [`Map::unpack`] makes of the number `packed`.
    Packed { packed: u64, skip: usize },
}

/// Tells where the bytes of a device lie.
pub(crate) trait Map: Send + Sync {
    fn size(&self) -> u64;

    fn devices(&self) -> &[Arc<dyn Blocks>];

    /// Where byte `offset` lies, and how many bytes from there on, at least one, go on in the same way. The caller
    /// wants no more than `wanted` of them, and asks about no byte beyond the end.
    fn place(&self, offset: u64, wanted: u64) -> Result<(Place, u64)>;

    /// Unpacks what [`Place::Packed`] names.
    fn unpack(&self, packed: u64) -> Result<Arc<[u8]>> {
        Err(Error::bug(format!("nothing is packed here, but {packed} was asked for")))
    }
}

/// The device that a map describes.
pub(crate) struct Mapped<M>(pub(crate) M);

impl<M: Map> Mapped<M> {
    fn step(&self, offset: u64, wanted: u64) -> Result<(Place, u64)> {
        let (place, length) = self.0.place(offset, wanted)?;
        if length == 0 {
            return Err(Error::bug(format!("nothing is said about byte {offset} of a mapped device")));
        }
        Ok((place, length.min(wanted)))
    }

    /// The device, which must have `length` bytes at `offset`: the map may have been written to mislead.
    fn device(&self, device: usize, offset: u64, length: u64) -> Result<&Arc<dyn Blocks>> {
        let found = self.0.devices().get(device);
        let found = found.ok_or_else(|| Error::bug(format!("a mapped device has no part {device}")))?;
        if offset.checked_add(length).is_none_or(|end| end > found.size()) {
            let size = found.size();
            return Err(Error::integrity(format!("{length} bytes should lie at {offset} of {size}"))
                .hint("The image may be cut short."));
        }
        Ok(found)
    }
}

impl<M: Map> Blocks for Mapped<M> {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        check_range(self, &range)?;
        let mut extents = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let (place, length) = self.step(at, range.end - at)?;
            let here = at..at + length;
            match place {
                Place::Hole => push(&mut extents, extent(here, ExtentKind::Hole)),
                Place::Zero => push(&mut extents, extent(here, ExtentKind::Zero)),
                Place::Packed { .. } => push(&mut extents, extent(here, ExtentKind::Data)),
                Place::At { device, offset } => {
                    for below in self.device(device, offset, length)?.extents(offset..offset + length)? {
                        let start = at + (below.range.start - offset);
                        let range = start..start + (below.range.end - below.range.start);
                        push(&mut extents, Extent { range, ..below });
                    }
                }
            }
            if extents.len() > EXTENTS_MAX {
                return Err(Error::new(
                    Code::Refused,
                    format!("bytes {} to {} lie in more than {EXTENTS_MAX} pieces", range.start, range.end),
                )
                .hint("Ask about a shorter range."));
            }
            at += length;
        }
        Ok(extents)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        check_read(self, offset, buffer.len())?;
        let mut rest = buffer;
        let mut at = offset;
        while !rest.is_empty() {
            let (place, length) = self.step(at, rest.len() as u64)?;
            let length = crate::bytes::index(length)?;
            let (here, after) = rest.split_at_mut(length);
            match place {
                Place::Hole | Place::Zero => here.fill(0),
                Place::At { device, offset } => {
                    self.device(device, offset, here.len() as u64)?.read_at(offset, here)?;
                }
                Place::Packed { packed, skip } => {
                    let whole = self.0.unpack(packed)?;
                    let part = skip.checked_add(length).and_then(|end| whole.get(skip..end));
                    let part = part.ok_or_else(|| {
                        Error::integrity(format!("compressed data unpacks to {} bytes only", whole.len()))
                    })?;
                    here.copy_from_slice(part);
                }
            }
            rest = after;
            at += length as u64;
        }
        Ok(())
    }
}

impl<M: Map> Map for Arc<M> {
    fn size(&self) -> u64 {
        self.as_ref().size()
    }

    fn devices(&self) -> &[Arc<dyn Blocks>] {
        self.as_ref().devices()
    }

    fn place(&self, offset: u64, wanted: u64) -> Result<(Place, u64)> {
        self.as_ref().place(offset, wanted)
    }

    fn unpack(&self, packed: u64) -> Result<Arc<[u8]>> {
        self.as_ref().unpack(packed)
    }
}
