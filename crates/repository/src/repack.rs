//! Copies sealed segments into new packs, unopened: what the collector does with packs that are mostly dead, and
//! a writer with what it relies on in a pack that was condemned under it.

use mainstay_core::{Error, Result};

use crate::fetch::{Fetch, Sealed};
use crate::format::pack::{BlockKind, BuiltPack, GroupHeader, PackBuilder, PackId};
use crate::format::segment::{Class, GroupId};
use crate::log::random_id;
use crate::ranges::Ranges;

/// Segments to copy, and the pack to take them from; any pack that holds them when it is `None`.
pub(crate) struct Wanted {
    pub(crate) group: GroupId,
    pub(crate) segments: Ranges,
    pub(crate) from: Option<PackId>,
}

/// Hands every finished pack to `emit`. Groups keep id, key, ordinals and directory. What cannot be read is left to
/// `unreadable`: when that returns, the group is left out whole.
pub(crate) fn copy(
    fetch: &Fetch,
    wanted: &[Wanted],
    emit: &mut dyn FnMut(BuiltPack) -> Result<()>,
    unreadable: &mut dyn FnMut(Error) -> Result<()>,
) -> Result<()> {
    let mut open: Option<PackBuilder> = None;
    for want in wanted {
        let group = match read_group(fetch, want) {
            Ok(group) => group,
            Err(error) => {
                unreadable(error)?;
                continue;
            }
        };
        let builder = match &mut open {
            Some(open) => open,
            None => open.insert(PackBuilder::new(random_id()?)),
        };
        group.add_to(builder);
        if builder.length() >= fetch.shared().tuning.pack_bytes
            && let Some(builder) = open.take()
        {
            emit(builder.finish())?;
        }
    }
    open.map_or(Ok(()), |builder| emit(builder.finish()))
}

/// What is copied of one group: no more than the pack that it lies in.
struct SealedGroup {
    header: GroupHeader,
    segments: Vec<(u32, Vec<u8>)>,
    directory: Option<Vec<u8>>,
}

impl SealedGroup {
    /// A group that lay in several packs comes once for each of them, and is one group of the new pack.
    fn add_to(self, builder: &mut PackBuilder) {
        let known = builder.group(&self.header.id);
        let index = known.unwrap_or_else(|| builder.add_group(self.header));
        for (ordinal, bytes) in self.segments {
            builder.push(index, BlockKind::Segment, ordinal, bytes);
        }
        if let Some(directory) = self.directory.filter(|_| known.is_none()) {
            builder.push(index, BlockKind::Directory, 0, directory);
        }
    }
}

fn read_group(fetch: &Fetch, want: &Wanted) -> Result<SealedGroup> {
    let (mut found, mut segments) = (None, Vec::new());
    for ordinal in want.segments.iter() {
        let Sealed { header, bytes } = match &want.from {
            Some(pack) => fetch.sealed_segment_in(pack, &want.group, ordinal)?,
            None => fetch.sealed_segment(&want.group, ordinal)?,
        };
        segments.push((ordinal, bytes));
        found.get_or_insert(header);
    }
    let Some(header) = found else {
        return Err(Error::bug("a group without segments is to be copied"));
    };
    let directory = match (header.class, &want.from) {
        (Class::Structure, _) => None,
        (_, Some(pack)) => Some(fetch.sealed_directory_in(pack, &want.group)?.bytes),
        (_, None) => Some(fetch.sealed_directory(&want.group)?.bytes),
    };
    Ok(SealedGroup { header, segments, directory })
}
