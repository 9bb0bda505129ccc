//! Leaving out what a policy calls worthless: free space and swapped memory come back as zeros.

use std::ops::Range;
use std::sync::Arc;

use mainstay_core::{Blocks, Extent, ExtentKind, Result, Run};
use mainstay_diskimage::map::DiskMap;

/// What is not stored of a disk although it is there. With neither, an image comes back bit for bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leave {
    /// Space that no file uses, as far as the file systems tell: files deleted before cannot be recovered from it.
    pub free: bool,
    /// Swapped memory; with it goes the memory of a machine that sleeps on disk.
    pub swap: bool,
}

/// A disk without what is left out.
pub(super) struct Lean {
    base: Arc<dyn Blocks>,
    /// Ascending and apart.
    left: Vec<Range<u64>>,
}

impl Lean {
    pub(super) fn new(base: Arc<dyn Blocks>, map: &DiskMap, leave: Leave) -> Self {
        let free = map.free().iter().filter(|_| leave.free);
        let swap = map.swap().iter().filter(|_| leave.swap);
        let mut all: Vec<Range<u64>> = free.chain(swap).cloned().collect();
        all.sort_unstable_by_key(|range| range.start);
        let mut left: Vec<Range<u64>> = Vec::new();
        for range in all {
            match left.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => left.push(range),
            }
        }
        Self { base, left }
    }
}

impl Blocks for Lean {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        let mut found = Vec::new();
        for extent in self.base.extents(range)? {
            let Extent { range, kind, change } = extent;
            let mut at = range.start;
            let first = self.left.partition_point(|left| left.end <= range.start);
            let inside = self.left.iter().skip(first).take_while(|left| left.start < range.end);
            for left in inside.filter(|_| kind == ExtentKind::Data) {
                let (start, end) = (left.start.max(at), left.end.min(range.end));
                if start > at {
                    found.push(Extent { range: at..start, kind, change });
                }
                found.push(Extent { range: start..end, kind: ExtentKind::Hole, change });
                at = end;
            }
            if at < range.end {
                found.push(Extent { range: at..range.end, kind, change });
            }
        }
        Ok(found)
    }

    /// What is left out reads as it is: whoever copies asks for extents first.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.base.read_at(offset, buffer)
    }

    fn cuts(&self, range: Range<u64>) -> Result<Vec<Run>> {
        self.base.cuts(range)
    }
}
