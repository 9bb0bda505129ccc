//! Copies sealed segments into new packs, unopened: what the collector does with packs that are mostly dead, and
//! a writer with what it relies on in a pack that was condemned under it.

use mainstay_core::{Error, Result};

use crate::fetch::{Fetch, Sealed};
use crate::format::pack::{BlockKind, BuiltPack, PackBuilder, PackId};
use crate::format::segment::{Class, GroupId};
use crate::log::random_id;
use crate::log::record::GroupEntry;
use crate::ranges::Ranges;

const PACK_BYTES: u64 = 32 << 20;

/// Segments to copy, and the pack to take them from; any pack that holds them when it is `None`.
pub(crate) struct Wanted {
    pub(crate) group: GroupId,
    pub(crate) segments: Ranges,
    pub(crate) from: Option<PackId>,
}

/// Hands every finished pack to `emit`. Groups keep id, key, ordinals and directory.
pub(crate) fn copy(
    fetch: &Fetch,
    wanted: &[Wanted],
    emit: &mut dyn FnMut(BuiltPack, Vec<GroupEntry>) -> Result<()>,
) -> Result<()> {
    let mut open: Option<(PackBuilder, Vec<GroupEntry>)> = None;
    for want in wanted {
        let (builder, groups) = match &mut open {
            Some(open) => open,
            None => open.insert((PackBuilder::new(random_id()?), Vec::new())),
        };
        copy_group(fetch, want, builder, groups)?;
        if builder.length() >= PACK_BYTES
            && let Some((builder, groups)) = open.take()
        {
            emit(builder.finish(), groups)?;
        }
    }
    match open {
        Some((builder, groups)) => emit(builder.finish(), groups),
        None => Ok(()),
    }
}

fn copy_group(
    fetch: &Fetch,
    want: &Wanted,
    builder: &mut PackBuilder,
    groups: &mut Vec<GroupEntry>,
) -> Result<()> {
    let mut place = None;
    for ordinal in want.segments.iter() {
        let Sealed { header, bytes } = match &want.from {
            Some(pack) => fetch.sealed_segment_in(pack, &want.group, ordinal)?,
            None => fetch.sealed_segment(&want.group, ordinal)?,
        };
        let (index, _class) = match place {
            Some(place) => place,
            None => {
                let class = header.class;
                *place.insert((builder.add_group(header), class))
            }
        };
        builder.push(index, BlockKind::Segment, ordinal, bytes);
    }
    let Some((index, class)) = place else {
        return Err(Error::bug("a group without segments is to be copied"));
    };
    if class != Class::Structure {
        let directory = match &want.from {
            Some(pack) => fetch.sealed_directory_in(pack, &want.group)?,
            None => fetch.sealed_directory(&want.group)?,
        };
        builder.push(index, BlockKind::Directory, 0, directory.bytes);
    }
    groups.push(GroupEntry { id: want.group, class, segments: want.segments.clone() });
    Ok(())
}
