//! Runs: which chunks make up a stretch of content. A recipe is a list of runs.

use mainstay_core::Result;

use crate::codec::{Decoder, Encode};
use crate::cut::ChunkId;
use crate::format::page::GroupTable;
use crate::format::segment::GroupId;

/// A stretch of content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Run {
    /// `count` chunks of a group, from slot `first` on, `bytes` long together. They lie in the segments from
    /// `segment` to `last_segment`; saying so here spares the writer of an unchanged item the directory.
    Chunks {
        group: GroupId,
        first: u32,
        count: u32,
        segment: u32,
        last_segment: u32,
        bytes: u64,
        digest: RunDigest,
    },
    /// Zeros that occupied no space.
    Hole(u64),
    /// Zeros that did.
    Zeros(u64),
}

/// The first 16 bytes of BLAKE3 over the ids of the run's chunks: ties a run to content, whatever a directory
/// may say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RunDigest(pub(crate) [u8; 16]);

impl RunDigest {
    pub(crate) fn of<'a>(ids: impl IntoIterator<Item = &'a ChunkId>) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("mainstay run digest 1");
        for id in ids {
            hasher.update(&id.0);
        }
        let mut digest = [0; 16];
        digest.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Self(digest)
    }
}

const HOLE: u64 = 0;
const ZEROS: u64 = 1;
const FIRST_GROUP: u64 = 2;

impl Run {
    /// Bytes of content.
    pub(crate) fn length(&self) -> u64 {
        match self {
            Self::Chunks { bytes, .. } => *bytes,
            Self::Hole(length) | Self::Zeros(length) => *length,
        }
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>, groups: &mut GroupTable) {
        match self {
            Self::Hole(length) => {
                out.varint(HOLE);
                out.varint(*length);
            }
            Self::Zeros(length) => {
                out.varint(ZEROS);
                out.varint(*length);
            }
            Self::Chunks { group, first, count, segment, last_segment, bytes, digest } => {
                out.varint(FIRST_GROUP + groups.index_of(group));
                out.varint(u64::from(*first));
                out.varint(u64::from(*count));
                out.varint(u64::from(*segment));
                out.varint(u64::from(last_segment.saturating_sub(*segment)));
                out.varint(*bytes);
                out.fixed(&digest.0);
            }
        }
    }

    pub(crate) fn decode(input: &mut Decoder<'_>, groups: &GroupTable) -> Result<Self> {
        let tag = input.varint()?;
        let run = match tag {
            HOLE => Self::Hole(input.varint()?),
            ZEROS => Self::Zeros(input.varint()?),
            _ => {
                let group = groups.get(tag - FIRST_GROUP, input)?;
                let (first, count) = (input.varint_u32()?, input.varint_u32()?);
                let (segment, more) = (input.varint_u32()?, input.varint_u32()?);
                let bytes = input.varint()?;
                let last_segment = segment.checked_add(more);
                let (Some(_end), Some(last_segment), 1..) = (first.checked_add(count), last_segment, count)
                else {
                    return Err(input.malformed("a run has no chunks or too many"));
                };
                let digest = RunDigest(input.array()?);
                Self::Chunks { group, first, count, segment, last_segment, bytes, digest }
            }
        };
        if run.length() == 0 { Err(input.malformed("a run is empty")) } else { Ok(run) }
    }
}
