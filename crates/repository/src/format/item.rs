//! Items as they stand in a tree page.

use mainstay_core::{HardLink, Item, ItemPath, Kind, Metadata, Result, Skip, SkipReason, Stamp, Time};

use crate::codec::{Decoder, Encode};
use crate::format::page::{GroupTable, PageRef};
use crate::format::run::Run;

/// Recipes of up to this many runs stand in the item; longer ones get pages of their own.
pub(crate) const INLINE_RUNS_MAX: usize = 16;

/// A longer path, in bytes, has no place in a tree.
pub(crate) const PATH_BYTES_MAX: usize = 64 << 10;
/// Nor has more than so many bytes of what is known of an item, path and content apart.
const KNOWN_BYTES_MAX: usize = 512 << 10;
/// The words of a skip are cut at so many bytes.
const DETAIL_BYTES_MAX: usize = 4 << 10;

/// Whether an item has a place in a tree.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fit {
    Whole,
    /// Without some of its extended attributes; what to say of that.
    Reduced(String),
    /// Not at all, and why.
    Refused(String),
}

/// Takes away what there is no place for: as many extended attributes as are too many together.
pub(crate) fn fit(item: &mut Item) -> Fit {
    let metadata = &mut item.metadata;
    let length = item.path.as_bytes().len();
    if length > PATH_BYTES_MAX {
        return Fit::Refused(format!("its path has {length} bytes, and {PATH_BYTES_MAX} is the most"));
    }
    let texts = [&metadata.user, &metadata.group, &metadata.link_target];
    let texts = texts.into_iter().flatten().map(Vec::len).sum::<usize>() + item.stamp.0.len();
    let attributes = metadata.attributes.iter().map(|(name, value)| 16 + name.len() + value.len());
    let known = texts.saturating_add(attributes.sum());
    let Some(mut room) = KNOWN_BYTES_MAX.checked_sub(known) else {
        return Fit::Refused(format!("{known} bytes are known of it, and {KNOWN_BYTES_MAX} is the most"));
    };
    let mut left_out = Vec::new();
    metadata.xattrs.retain(|(name, value)| {
        let rest = room.checked_sub(16 + name.len() + value.len());
        room = rest.unwrap_or(room);
        if rest.is_none() && left_out.len() < 8 {
            left_out.push(name.escape_ascii().to_string());
        }
        rest.is_some()
    });
    if left_out.is_empty() {
        return Fit::Whole;
    }
    let names = left_out.join(", ");
    Fit::Reduced(format!("its extended attributes are more than {KNOWN_BYTES_MAX} bytes; left out: {names}"))
}

/// Content as chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Recipe {
    /// The item has no content.
    None,
    Inline(Vec<Run>),
    /// Root of a map of runs, and the bytes they make together.
    Pages {
        root: PageRef,
        bytes: u64,
    },
}

impl Recipe {
    /// Bytes of content.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::None => 0,
            Self::Inline(runs) => runs.iter().map(Run::length).fold(0, u64::saturating_add),
            Self::Pages { bytes, .. } => *bytes,
        }
    }
}

/// An item of a stored tree, without its path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoredItem {
    pub(crate) metadata: Metadata,
    pub(crate) stamp: Stamp,
    pub(crate) changed_while_read: bool,
    /// Random-access blocks rather than a stream.
    pub(crate) blocks: bool,
    pub(crate) recipe: Recipe,
}

/// Fields that an item may have. Numbers from 128 on may be ignored by a reader that does not know them.
mod tag {
    pub(super) const USER: u8 = 1;
    pub(super) const GROUP: u8 = 2;
    pub(super) const HARD_LINK: u8 = 3;
    pub(super) const LINK_TARGET: u8 = 4;
    pub(super) const DEVICE: u8 = 5;
    pub(super) const XATTR: u8 = 6;
    pub(super) const ATTRIBUTE: u8 = 7;
    pub(super) const RUNS: u8 = 8;
    pub(super) const PAGES: u8 = 9;
    pub(super) const BLOCKS: u8 = 10;
    pub(super) const STAMP: u8 = 128;
    pub(super) const CHANGED: u8 = 129;
}

/// The key of a path: `/` becomes NUL, which no name holds, so that bytes sort as paths do.
pub(crate) fn path_key(path: &ItemPath) -> Vec<u8> {
    path.as_bytes().iter().map(|byte| if *byte == b'/' { 0 } else { *byte }).collect()
}

/// The smallest key that is greater than those of `path` and of everything below it.
pub(crate) fn key_after(path: &ItemPath) -> Vec<u8> {
    let mut key = path_key(path);
    key.push(1);
    key
}

pub(crate) fn path_of_key(key: &[u8]) -> Result<ItemPath> {
    let bytes: Vec<u8> = key.iter().map(|byte| if *byte == 0 { b'/' } else { *byte }).collect();
    let refused = key.contains(&b'/');
    match ItemPath::new(bytes) {
        Ok(path) if !refused => Ok(path),
        Ok(_) => Err(Decoder::new("path of an item", &[]).malformed("a name holds a slash")),
        Err(error) => Err(Decoder::new("path of an item", &[]).malformed("it is not a path").because(error)),
    }
}

fn field(out: &mut Vec<u8>, tag: u8, write: impl FnOnce(&mut Vec<u8>)) {
    let mut value = Vec::new();
    write(&mut value);
    out.u8(tag);
    out.bytes(&value);
}

impl StoredItem {
    pub(crate) fn encode(&self, out: &mut Vec<u8>, groups: &mut GroupTable) {
        let metadata = &self.metadata;
        out.u8(metadata.kind as u8);
        out.varint(metadata.size);
        out.varint(u64::from(metadata.mode));
        out.varint(u64::from(metadata.uid));
        out.varint(u64::from(metadata.gid));
        out.i64(metadata.modified.0);
        if let Some(user) = &metadata.user {
            field(out, tag::USER, |out| out.fixed(user));
        }
        if let Some(group) = &metadata.group {
            field(out, tag::GROUP, |out| out.fixed(group));
        }
        if let Some(link) = &metadata.hard_link {
            field(out, tag::HARD_LINK, |out| {
                out.varint(link.device);
                out.varint(link.inode);
            });
        }
        if let Some(target) = &metadata.link_target {
            field(out, tag::LINK_TARGET, |out| out.fixed(target));
        }
        if let Some((major, minor)) = metadata.device {
            field(out, tag::DEVICE, |out| {
                out.u32(major);
                out.u32(minor);
            });
        }
        for (name, value) in &metadata.xattrs {
            field(out, tag::XATTR, |out| {
                out.bytes(name);
                out.fixed(value);
            });
        }
        for (name, value) in &metadata.attributes {
            field(out, tag::ATTRIBUTE, |out| {
                out.bytes(name.as_bytes());
                out.fixed(value);
            });
        }
        self.encode_content(out, groups);
    }

    fn encode_content(&self, out: &mut Vec<u8>, groups: &mut GroupTable) {
        match &self.recipe {
            Recipe::None => {}
            Recipe::Inline(runs) => field(out, tag::RUNS, |out| {
                runs.iter().for_each(|run| run.encode(out, groups));
            }),
            Recipe::Pages { root, bytes } => field(out, tag::PAGES, |out| {
                root.encode(out);
                out.varint(*bytes);
            }),
        }
        if self.blocks {
            field(out, tag::BLOCKS, |_| ());
        }
        if !self.stamp.0.is_empty() {
            field(out, tag::STAMP, |out| out.fixed(&self.stamp.0));
        }
        if self.changed_while_read {
            field(out, tag::CHANGED, |_| ());
        }
    }

    pub(crate) fn decode(mut input: Decoder<'_>, groups: &GroupTable) -> Result<Self> {
        let kind = input.u8()?;
        let kind = Kind::from_number(kind).ok_or_else(|| input.malformed("an item is of no known kind"))?;
        let mut metadata = Metadata::new(kind);
        metadata.size = input.varint()?;
        metadata.mode = input.varint_u32()?;
        metadata.uid = input.varint_u32()?;
        metadata.gid = input.varint_u32()?;
        metadata.modified = Time(input.i64()?);
        let mut item = Self {
            metadata,
            stamp: Stamp::default(),
            changed_while_read: false,
            blocks: false,
            recipe: Recipe::None,
        };
        while !input.is_empty() {
            let tag = input.u8()?;
            let value = Decoder::new("field of an item", input.bytes()?);
            item.decode_field(tag, value, groups)?;
        }
        Ok(item)
    }

    fn decode_field(&mut self, tag: u8, mut value: Decoder<'_>, groups: &GroupTable) -> Result<()> {
        let rest = |value: &mut Decoder<'_>| value.take(value.remaining()).map(<[u8]>::to_vec);
        match tag {
            tag::USER => self.metadata.user = Some(rest(&mut value)?),
            tag::GROUP => self.metadata.group = Some(rest(&mut value)?),
            tag::HARD_LINK => {
                self.metadata.hard_link = Some(HardLink { device: value.varint()?, inode: value.varint()? });
            }
            tag::LINK_TARGET => self.metadata.link_target = Some(rest(&mut value)?),
            tag::DEVICE => self.metadata.device = Some((value.u32()?, value.u32()?)),
            tag::XATTR => self.metadata.xattrs.push((value.bytes()?.to_vec(), rest(&mut value)?)),
            tag::ATTRIBUTE => self.metadata.attributes.push((value.text()?, rest(&mut value)?)),
            tag::RUNS => {
                let mut runs = Vec::new();
                while !value.is_empty() {
                    runs.push(Run::decode(&mut value, groups)?);
                }
                self.recipe = Recipe::Inline(runs);
            }
            tag::PAGES => {
                self.recipe = Recipe::Pages { root: PageRef::decode(&mut value)?, bytes: value.varint()? };
            }
            tag::BLOCKS => self.blocks = true,
            tag::STAMP => self.stamp = Stamp(rest(&mut value)?),
            tag::CHANGED => self.changed_while_read = true,
            130.. => return Ok(()),
            _ => {
                let what = format!("an item has a field of kind {tag}, which this version does not know");
                return Err(mainstay_core::Error::new(mainstay_core::Code::TooNew, what));
            }
        }
        value.end()
    }
}

/// What is too long is cut: of a path the end, so that a directory above stands for what was skipped.
pub(crate) fn encode_skip(skip: &Skip, out: &mut Vec<u8>) {
    let path = skip.path.as_bytes();
    let cut = path.get(..=PATH_BYTES_MAX).and_then(|start| start.iter().rposition(|byte| *byte == b'/'));
    let end = if path.len() > PATH_BYTES_MAX { cut.unwrap_or(0) } else { path.len() };
    let reason = match skip.reason {
        // What a restore meets; to a point made of another point it is the same as any other source that fails.
        SkipReason::Damaged | SkipReason::Unwritable => SkipReason::Unreadable,
        reason => reason,
    };
    out.u8(reason as u8);
    out.bytes(path.get(..end).unwrap_or_default());
    out.bytes(&skip.detail.as_bytes()[..skip.detail.floor_char_boundary(DETAIL_BYTES_MAX)]);
}

pub(crate) fn decode_skip(mut input: Decoder<'_>) -> Result<Skip> {
    let reason = input.u8()?;
    let reason =
        SkipReason::from_number(reason).ok_or_else(|| input.malformed("a skip has no known reason"))?;
    let path = ItemPath::new(input.bytes()?)
        .map_err(|error| input.malformed("a skipped path is not a path").because(error))?;
    let skip = Skip { path, reason, detail: input.text()? };
    input.end()?;
    Ok(skip)
}

#[cfg(test)]
mod tests {
    use super::{
        PATH_BYTES_MAX, Recipe, StoredItem, decode_skip, encode_skip, key_after, path_key, path_of_key,
    };
    use crate::codec::Decoder;
    use crate::format::page::GroupTable;
    use crate::format::run::{Run, RunDigest};
    use mainstay_core::{HardLink, Id16, ItemPath, Kind, Metadata, Skip, SkipReason, Stamp, Time};
    use proptest::prelude::*;

    fn path(text: &str) -> ItemPath {
        ItemPath::new(text).unwrap()
    }

    #[test]
    fn keys_sort_as_paths_do_and_bound_subtrees() {
        let paths = ["", "a", "a/b", "a/b/c", "a/b\u{1}", "a b", "a.b", "ab"].map(path);
        for left in &paths {
            assert_eq!(path_of_key(&path_key(left)).unwrap(), *left);
            for right in &paths {
                assert_eq!(left.cmp(right), path_key(left).cmp(&path_key(right)), "{left} {right}");
                if !left.is_root() {
                    let inside = path_key(right) >= path_key(left) && path_key(right) < key_after(left);
                    assert_eq!(inside, right.is_within(left), "{right} in {left}");
                }
            }
        }
    }

    #[test]
    fn hostile_keys_are_refused() {
        for key in [&b"a/b"[..], b"..", b"a\0..\0b", b"\0etc", b"a\0"] {
            assert!(path_of_key(key).is_err(), "{key:?}");
        }
    }

    #[test]
    fn skips_of_any_length_are_cut_to_what_a_page_holds() {
        let long = |name: usize| ItemPath::new([&vec![b'd'; 60_000][..], b"/", &vec![b'n'; name]].concat());
        for (name, kept) in [(9, 60_010), (PATH_BYTES_MAX - 60_001, PATH_BYTES_MAX), (6000, 60_000)] {
            let (path, detail) = (long(name).unwrap(), "ä".repeat(3001));
            let mut bytes = Vec::new();
            encode_skip(&Skip { path: path.clone(), reason: SkipReason::Unreadable, detail }, &mut bytes);
            let skip = decode_skip(Decoder::new("skip", &bytes)).unwrap();
            assert!(path.is_within(&skip.path) && skip.path.as_bytes().len() == kept, "{name}");
            assert_eq!(skip.detail, "ä".repeat(2048));
        }
    }

    #[test]
    fn every_field_round_trips() {
        let mut metadata = Metadata::new(Kind::File);
        metadata.size = 1 << 40;
        metadata.mode = 0o7755;
        metadata.modified = Time(-12_345);
        metadata.user = Some(b"ro\xffot".to_vec());
        metadata.group = Some(b"wheel".to_vec());
        metadata.hard_link = Some(HardLink { device: 9, inode: u64::MAX });
        metadata.link_target = Some(b"../x".to_vec());
        metadata.device = Some((8, 1));
        metadata.xattrs = vec![(b"user.a".to_vec(), vec![0, 1]), (b"user.b".to_vec(), vec![])];
        metadata.attributes = vec![("x".into(), vec![3])];
        let chunks = Run::Chunks {
            group: Id16([4; 16]),
            first: 3,
            count: 2,
            segment: 1,
            last_segment: 2,
            bytes: 99,
            digest: RunDigest([5; 16]),
        };
        let item = StoredItem {
            metadata,
            stamp: Stamp(vec![1, 2, 3]),
            changed_while_read: true,
            blocks: true,
            recipe: Recipe::Inline(vec![chunks, Run::Hole(4096), Run::Zeros(1)]),
        };
        let (mut bytes, mut groups) = (Vec::new(), GroupTable::default());
        item.encode(&mut bytes, &mut groups);
        assert_eq!(StoredItem::decode(Decoder::new("item", &bytes), &groups).unwrap(), item);
        for length in 0..bytes.len() {
            let cut = StoredItem::decode(Decoder::new("item", &bytes[..length]), &groups);
            assert!(cut.is_err() || cut.is_ok_and(|cut| cut != item), "{length}");
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_errors(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let _either = StoredItem::decode(Decoder::new("item", &bytes), &GroupTable::default());
        }
    }
}
