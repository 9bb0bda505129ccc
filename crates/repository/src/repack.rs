//! Copies sealed segments into new packs, unopened: what the collector does with packs that are mostly dead, and
//! a writer with what it relies on in a pack that was condemned under it.

use mainstay_core::{Code, Error, Result};

use crate::fetch::{Fetch, Sealed};
use crate::format::pack::{BlockKind, BuiltPack, GroupHeader, PackBuilder, PackId};
use crate::format::segment::{Class, GroupId};
use crate::log::random_id;
use crate::ranges::Ranges;

/// Segments to copy, and the pack to take them from.
pub(crate) struct Wanted {
    pub(crate) group: GroupId,
    pub(crate) segments: Ranges,
    pub(crate) from: PackId,
}

/// Hands every finished pack to `emit`. Groups keep id, key, ordinals and directory. What cannot be read is left to
/// `unreadable`: when that returns, the group is left out whole.
pub(crate) fn copy(
    fetch: &Fetch,
    wanted: &[Wanted],
    emit: &mut dyn FnMut(BuiltPack) -> Result<()>,
    unreadable: &mut dyn FnMut(Error) -> Result<()>,
) -> Result<()> {
    let parity = fetch.shared().tuning.parity;
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
            emit(builder.finish(parity)?)?;
        }
    }
    open.map_or(Ok(()), |builder| emit(builder.finish(parity)?))
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
        let Sealed { header, bytes } = fetch.sealed_segment_in(&want.from, &want.group, ordinal)?;
        segments.push((ordinal, bytes));
        found.get_or_insert(header);
    }
    let Some(header) = found else {
        return Err(Error::bug("a group without segments is to be copied"));
    };
    let directory = match header.class {
        Class::Structure => None,
        _ => Some(directory(fetch, want)?),
    };
    Ok(SealedGroup { header, segments, directory })
}

/// The directory of a group is the same in every pack.
fn directory(fetch: &Fetch, want: &Wanted) -> Result<Vec<u8>> {
    let sealed = fetch.sealed_directory_in(&want.from, &want.group).or_else(|error| match error.code() {
        Code::Integrity | Code::NotFound => fetch.sealed_directory(&want.group),
        _ => Err(error),
    })?;
    Ok(sealed.bytes)
}

/// Those of the segments that can be copied from this pack.
pub(crate) fn readable(fetch: &Fetch, pack: &PackId, group: &GroupId, segments: &Ranges) -> Result<Ranges> {
    let mut whole = Ranges::default();
    let held = match fetch.footer(pack) {
        Ok(footer) => footer.segments(group),
        Err(error) if is_damage(&error) => return Ok(whole),
        Err(error) => return Err(error),
    };
    // A record may claim more segments than anybody could look at.
    for segment in segments.and(&held).iter() {
        match fetch.sealed_segment_in(pack, group, segment) {
            Ok(_) => whole.insert(segment..segment.saturating_add(1)),
            Err(error) if is_damage(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(whole)
}

/// Something is not there, or not what it was.
pub(crate) fn is_damage(error: &Error) -> bool {
    matches!(error.code(), Code::Integrity | Code::NotFound)
}
