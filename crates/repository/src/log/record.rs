//! Records of the commit log: signed, chained, each of a kind that must be understood.

use mainstay_core::{Code, DomainId, Error, Id16, PointId, Result, Time, WriterId};

use super::text::SealedText;
use crate::codec::{Decoder, Encode as _};
use crate::config::{Duty, Features};
use crate::format::pack::{BuiltPack, GroupDigest, GroupHeader, PackId};
use crate::format::segment::{Class, GroupId};
use crate::keys::{FamilyId, Powers};
use crate::ranges::Ranges;
use crate::seal::derive;
use crate::sign::{SigningKey, VerifyingKey};

const MAGIC: &[u8; 4] = b"MSlg";
const VERSION: u16 = 1;
const SIGNATURE_BYTES: usize = 64;
const SIGNATURE_CONTEXT: &str = "mainstay log record 1";
/// No record is longer. A commit says about 100 bytes for every pack it adds, and writers register packs as they
/// go, so none comes near.
pub(crate) const RECORD_BYTES_MAX: u64 = 16 << 20;
const PACK_ENTRY_BYTES_MIN: usize = 65;

/// Names the log of one copy of a family, so that no record is believed in another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LogId(pub(crate) [u8; 32]);

impl LogId {
    pub(crate) fn of(family: &FamilyId, copy: &Id16) -> Self {
        Self(derive("mainstay 2026 log id v1", &[&family.0, &copy.0]))
    }
}

/// No pack is longer: sums of such lengths fit 64 bits for as many packs as a log can name.
const PACK_BYTES_MAX: u64 = 1 << 40;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) sequence: u64,
    /// Hash of the last valid record before this one; zeros for the first.
    pub(crate) previous: [u8; 32],
    /// Random: tells a writer whose reply was lost that a record is its own.
    pub(crate) commit: Id16,
    pub(crate) writer: WriterId,
    /// What the writer's clock said. A claim; the order is the sequence's.
    pub(crate) time: Time,
    pub(crate) change: Change,
}

/// What a record does. The numbers of the kinds are part of the format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// The first record, signed by the root key: who may write.
    Genesis {
        writers: Vec<WriterEntry>,
    },
    /// Signed by the root key: adds a writer or changes its powers; none revokes it.
    Writer(WriterEntry),
    /// Registers packs and their index runs, and a point that reaches only registered packs.
    Commit {
        packs: Vec<PackEntry>,
        runs: Vec<RunEntry>,
        point: Option<PointEntry>,
    },
    Note {
        point: PointId,
        note: StoredNote,
    },
    Expire {
        points: Vec<PointId>,
        reason: SealedText,
    },
    /// From here on nobody may rely on `packs`; what was live in them lies in `moved`.
    Condemn {
        packs: Vec<PackId>,
        moved: Vec<PackEntry>,
    },
    /// The bytes of these condemned packs may go.
    Delete {
        packs: Vec<PackId>,
    },
    /// Signed by the root key: from here on readers, writers and collectors must know more; see
    /// [`crate::config::Features`].
    Features(Features),
    /// Nobody needs the objects of this journal with lower numbers any more.
    Trim {
        stream: Id16,
        below: u64,
    },
    /// Somebody decided something about what is around the repository. A later one of the same id takes its place; with no
    /// words it takes it back.
    Decision {
        id: Id16,
        words: SealedText,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WriterEntry {
    pub(crate) key: VerifyingKey,
    pub(crate) powers: Powers,
    pub(crate) name: SealedText,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PackEntry {
    pub(crate) id: PackId,
    pub(crate) length: u64,
    pub(crate) footer_hash: [u8; 32],
    /// The medium keeps it until then; it is not deleted before. Zero: not promised.
    pub(crate) retain_until: Time,
    pub(crate) groups: Vec<GroupEntry>,
}

/// The segments of a group that a pack holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GroupEntry {
    pub(crate) id: GroupId,
    pub(crate) class: Class,
    /// What the group is; see [`GroupDigest`]. The first record that names a group says it for good.
    pub(crate) digest: GroupDigest,
    pub(crate) segments: Ranges,
}

/// An index run: which chunks the groups of one domain hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunEntry {
    pub(crate) id: Id16,
    pub(crate) domain: DomainId,
    pub(crate) length: u64,
    pub(crate) hash: [u8; 32],
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PointEntry {
    pub(crate) id: PointId,
    /// Of its signed header.
    pub(crate) hash: [u8; 32],
    /// It does not expire before. Zero: not promised.
    pub(crate) retain_until: Time,
}

/// A later fact about a point. The numbers are part of the format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StoredNote {
    Tag(SealedText),
    Untag(SealedText),
    Hold { id: Id16, reason: SealedText, until: Option<Time> },
    Release(Id16),
    Verified { read_data: bool },
    Proven { how: SealedText, seconds: u64 },
    Boot(SealedText),
}

impl Change {
    pub(super) fn kind(&self) -> u16 {
        match self {
            Self::Genesis { .. } => 1,
            Self::Writer(_) => 2,
            Self::Commit { .. } => 3,
            Self::Note { .. } => 4,
            Self::Expire { .. } => 5,
            Self::Condemn { .. } => 6,
            Self::Delete { .. } => 7,
            Self::Features(_) => 8,
            Self::Trim { .. } => 9,
            Self::Decision { .. } => 10,
        }
    }

    /// What the signer of such a record must be able to do; `None` for the root key's own.
    pub(crate) fn needs(&self) -> Option<Powers> {
        match self {
            Self::Genesis { .. } | Self::Writer(_) | Self::Features(_) => None,
            Self::Commit { .. } => Some(Powers::WRITE),
            // A writer may tag and hold; only who may expire can take a hold away.
            Self::Note { note: StoredNote::Release(_), .. }
            | Self::Expire { .. }
            | Self::Trim { .. }
            | Self::Decision { .. } => Some(Powers::EXPIRE),
            Self::Note { .. } => Some(Powers::WRITE),
            Self::Condemn { .. } | Self::Delete { .. } => Some(Powers::COLLECT),
        }
    }

    /// Whose features its author must know.
    pub(crate) fn duty(&self) -> Duty {
        match self {
            Self::Expire { .. } | Self::Condemn { .. } | Self::Delete { .. } | Self::Trim { .. } => {
                Duty::Collect
            }
            _ => Duty::Write,
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Genesis { writers } => list(&mut out, writers, WriterEntry::encode),
            Self::Writer(writer) => writer.encode(&mut out),
            Self::Commit { packs, runs, point } => {
                list(&mut out, packs, PackEntry::encode);
                list(&mut out, runs, RunEntry::encode);
                list(&mut out, point.as_slice(), PointEntry::encode);
            }
            Self::Note { point, note } => {
                out.fixed(&point.0);
                note.encode(&mut out);
            }
            Self::Expire { points, reason } => {
                list(&mut out, points, |id, out| out.fixed(&id.0));
                reason.encode(&mut out);
            }
            Self::Condemn { packs, moved } => {
                list(&mut out, packs, |id, out| out.fixed(&id.0));
                list(&mut out, moved, PackEntry::encode);
            }
            Self::Delete { packs } => list(&mut out, packs, |id, out| out.fixed(&id.0)),
            Self::Features(features) => features.encode(&mut out),
            Self::Trim { stream, below } => {
                out.fixed(&stream.0);
                out.u64(*below);
            }
            Self::Decision { id, words } => {
                out.fixed(&id.0);
                words.encode(&mut out);
            }
        }
        out
    }

    pub(super) fn decode(kind: u16, input: &mut Decoder<'_>) -> Result<Self> {
        Ok(match kind {
            1 => Self::Genesis { writers: read_list(input, 85, WriterEntry::decode)? },
            2 => Self::Writer(WriterEntry::decode(input)?),
            3 => {
                let (packs, runs) = (
                    read_list(input, PACK_ENTRY_BYTES_MIN, PackEntry::decode)?,
                    read_list(input, 72, RunEntry::decode)?,
                );
                let mut points = read_list(input, 56, PointEntry::decode)?;
                if points.len() > 1 {
                    return Err(input.malformed("it commits several points"));
                }
                Self::Commit { packs, runs, point: points.pop() }
            }
            4 => Self::Note { point: input.id()?, note: StoredNote::decode(input)? },
            5 => Self::Expire {
                points: read_list(input, 16, Decoder::id)?,
                reason: SealedText::decode(input)?,
            },
            6 => Self::Condemn {
                packs: read_list(input, 16, Decoder::id)?,
                moved: read_list(input, PACK_ENTRY_BYTES_MIN, PackEntry::decode)?,
            },
            7 => Self::Delete { packs: read_list(input, 16, Decoder::id)? },
            8 => Self::Features(Features::decode(input)?),
            9 => Self::Trim { stream: input.id()?, below: input.u64()? },
            10 => Self::Decision { id: input.id()?, words: SealedText::decode(input)? },
            _ => return Err(Error::new(Code::TooNew, format!("a log record is of the unknown kind {kind}"))),
        })
    }
}

fn list<T>(out: &mut Vec<u8>, items: &[T], mut encode: impl FnMut(&T, &mut Vec<u8>)) {
    out.varint(items.len() as u64);
    items.iter().for_each(|item| encode(item, out));
}

fn read_list<'a, T>(
    input: &mut Decoder<'a>,
    least_bytes: usize,
    decode: impl Fn(&mut Decoder<'a>) -> Result<T>,
) -> Result<Vec<T>> {
    let count = input.count(least_bytes)?;
    (0..count).map(|_| decode(input)).collect()
}

impl WriterEntry {
    fn encode(&self, out: &mut Vec<u8>) {
        out.fixed(&self.key.0);
        out.u32(self.powers.0);
        self.name.encode(out);
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self> {
        let key = VerifyingKey(input.array()?);
        let powers = Powers(input.u32()?);
        Ok(Self { key, powers, name: SealedText::decode(input)? })
    }
}

impl PackEntry {
    /// What the log says of a pack that was just built.
    pub(crate) fn of(pack: &BuiltPack) -> Self {
        let footer = &pack.footer;
        let group = |(index, header): (usize, &GroupHeader)| {
            let digest = footer.group_digest(index)?;
            let segments = footer.segments(&header.id);
            Some(GroupEntry { id: header.id, class: header.class, digest, segments })
        };
        Self {
            id: pack.id,
            length: pack.length,
            footer_hash: pack.footer_hash,
            retain_until: Time(0),
            groups: footer.groups.iter().enumerate().filter_map(group).collect(),
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.fixed(&self.id.0);
        out.u64(self.length);
        out.fixed(&self.footer_hash);
        out.i64(self.retain_until.0);
        list(out, &self.groups, |group, out| {
            out.fixed(&group.id.0);
            out.u8(group.class as u8);
            out.fixed(&group.digest.0);
            group.segments.encode(out);
        });
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self> {
        let (id, length, footer_hash) = (input.id()?, input.u64()?, input.array()?);
        if length > PACK_BYTES_MAX {
            return Err(input.malformed("a pack is longer than any can be"));
        }
        let retain_until = Time(input.i64()?);
        let groups = read_list(input, 34, |input| {
            let (id, class) = (input.id()?, input.u8()?);
            let class = Class::from_number(class).ok_or_else(|| input.malformed("a class is not known"))?;
            let digest = GroupDigest(input.array()?);
            Ok(GroupEntry { id, class, digest, segments: Ranges::decode(input)? })
        })?;
        Ok(Self { id, length, footer_hash, retain_until, groups })
    }
}

impl RunEntry {
    fn encode(&self, out: &mut Vec<u8>) {
        out.fixed(&self.id.0);
        out.fixed(&self.domain.0);
        out.u64(self.length);
        out.fixed(&self.hash);
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self> {
        Ok(Self { id: input.id()?, domain: input.id()?, length: input.u64()?, hash: input.array()? })
    }
}

impl PointEntry {
    fn encode(&self, out: &mut Vec<u8>) {
        out.fixed(&self.id.0);
        out.fixed(&self.hash);
        out.i64(self.retain_until.0);
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self> {
        Ok(Self { id: input.id()?, hash: input.array()?, retain_until: Time(input.i64()?) })
    }
}

impl StoredNote {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Tag(tag) => {
                out.u8(1);
                tag.encode(out);
            }
            Self::Untag(tag) => {
                out.u8(2);
                tag.encode(out);
            }
            Self::Hold { id, reason, until } => {
                out.u8(3);
                out.fixed(&id.0);
                reason.encode(out);
                out.i64(until.unwrap_or(Time(i64::MAX)).0);
            }
            Self::Release(id) => {
                out.u8(4);
                out.fixed(&id.0);
            }
            Self::Verified { read_data } => {
                out.u8(5);
                out.u8(u8::from(*read_data));
            }
            Self::Proven { how, seconds } => {
                out.u8(6);
                how.encode(out);
                out.u64(*seconds);
            }
            Self::Boot(reads) => {
                out.u8(7);
                reads.encode(out);
            }
        }
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self> {
        Ok(match input.u8()? {
            1 => Self::Tag(SealedText::decode(input)?),
            2 => Self::Untag(SealedText::decode(input)?),
            3 => {
                let (id, reason) = (input.id()?, SealedText::decode(input)?);
                let until = Time(input.i64()?);
                Self::Hold { id, reason, until: (until.0 != i64::MAX).then_some(until) }
            }
            4 => Self::Release(input.id()?),
            5 => Self::Verified { read_data: input.u8()? != 0 },
            6 => Self::Proven { how: SealedText::decode(input)?, seconds: input.u64()? },
            7 => Self::Boot(SealedText::decode(input)?),
            kind => {
                let what = format!("the log has a note of kind {kind}, which this version does not know");
                return Err(Error::new(Code::TooNew, what));
            }
        })
    }
}

impl Record {
    pub(crate) fn encode(&self, log: &LogId, signer: &SigningKey) -> Result<Vec<u8>> {
        let body = self.change.encode();
        let mut out = Vec::with_capacity(body.len() + 220);
        out.fixed(MAGIC);
        out.u16(VERSION);
        out.u16(self.change.kind());
        out.u64(self.sequence);
        out.fixed(&log.0);
        out.fixed(&self.previous);
        out.fixed(&self.commit.0);
        out.fixed(&self.writer.0);
        out.i64(self.time.0);
        out.bytes(&body);
        let signature = signer.sign(SIGNATURE_CONTEXT, &out);
        out.fixed(&signature);
        if out.len() as u64 > RECORD_BYTES_MAX {
            return Err(Error::bug(format!("a log record of {} bytes", out.len())));
        }
        Ok(out)
    }

    /// Whether the bytes call themselves the record of this log and number.
    pub(crate) fn is_named(log: &LogId, sequence: u64, bytes: &[u8]) -> bool {
        let mut input = Decoder::new("log record", bytes);
        let mut head = || -> Result<(u64, [u8; 32])> {
            input.expect(MAGIC)?;
            let (_version, _kind) = (input.u16()?, input.u16()?);
            Ok((input.u64()?, input.array()?))
        };
        head().is_ok_and(|head| head == (sequence, log.0))
    }

    /// Parses the record of number `sequence` and checks who signed it. `signer` knows everyone who ever could.
    ///
    /// Errors: [`Code::Integrity`] for bytes that are no record of this repository and number, signed by somebody it
    /// knows: then the number is void.
    pub(crate) fn decode(
        log: &LogId,
        sequence: u64,
        bytes: &[u8],
        signer: impl FnOnce(&WriterId) -> Option<Signer>,
    ) -> Result<Decoded> {
        let mut input = Decoder::new("log record", bytes);
        input.expect(MAGIC)?;
        let (version, kind) = (input.u16()?, input.u16()?);
        if version != VERSION {
            return Err(input.malformed("its version is not 1"));
        }
        if input.u64()? != sequence {
            return Err(input.malformed("it has another number"));
        }
        if input.array()? != log.0 {
            return Err(input.malformed("it belongs to another log"));
        }
        let (previous, commit, writer, time) = (input.array()?, input.id()?, input.id()?, Time(input.i64()?));
        let mut body = Decoder::new("log record", input.bytes()?);
        let signed = bytes.get(..bytes.len() - input.remaining()).unwrap_or_default();
        let signature = input.array::<SIGNATURE_BYTES>()?;
        input.end()?;
        let Some(signer) = signer(&writer) else {
            return Err(Error::integrity("a log record is signed by nobody this repository knows"));
        };
        signer.key.verify(SIGNATURE_CONTEXT, signed, &signature)?;
        // From here on the record has its place in the chain, whatever this version makes of it.
        let change = Change::decode(kind, &mut body).and_then(|change| body.later_fields().map(|()| change));
        Ok(match change {
            Ok(change) if signer.may(&change) => {
                Decoded::Effective(Box::new(Self { sequence, previous, commit, writer, time, change }))
            }
            Ok(_) | Err(_) => Decoded::Idle { previous },
        })
    }
}

/// Somebody whose records have a place in the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Signer {
    pub(crate) key: VerifyingKey,
    /// `None` for the root key; without any power once revoked.
    pub(crate) powers: Option<Powers>,
}

impl Signer {
    pub(crate) fn may(&self, change: &Change) -> bool {
        match (change.needs(), self.powers) {
            (None, powers) => powers.is_none(),
            (Some(needed), Some(powers)) => powers.contains(needed),
            (Some(_), None) => false,
        }
    }
}

/// A record with a place in the chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Decoded {
    Effective(Box<Record>),
    /// It does nothing: its signer lacked the power, or it is of a kind that this version does not know. Whoever
    /// needs to know such kinds is stopped by [`Change::Features`], which the root signs before they are used.
    Idle {
        previous: [u8; 32],
    },
}
