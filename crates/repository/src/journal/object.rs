//! The bytes of a journal object: a signed header that says which changes it holds, and the changes in sealed segments.

use mainstay_core::{
    Change, Code, DomainId, Error, Id16, Position, Result, StreamRef, Time, WorkloadKind, WorkloadRef,
    WriterId,
};

use crate::codec::{Decoder, Encode as _};
use crate::format::pack::{block_digest, short};
use crate::format::segment::{self, Binding, Class, Sealer};
use crate::keys::{DomainKeys, FamilyId};
use crate::seal::{self, SealKey, Siv, derive};
use crate::sign::{SigningKey, VerifyingKey};
use crate::wrap::{self, WrapPublic, WrapSecret};

const MAGIC: &[u8; 4] = b"MSjr";
const VERSION: u16 = 1;
const SIGNATURE_BYTES: usize = 64;
const SIGNATURE_CONTEXT: &str = "mainstay journal object 1";
/// Magic, version, length of the header.
pub(super) const PREFIX_BYTES: usize = 10;
/// No header is longer.
pub(super) const HEADER_BYTES_MAX: usize = 1 << 20;
/// No object is longer.
pub(crate) const OBJECT_BYTES_MAX: u64 = 64 << 20;

/// Names a stream to the store, which learns nothing of what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub Id16);

impl StreamId {
    pub(super) fn of(domain: &DomainKeys, stream: &StreamRef) -> Self {
        let mut text = Vec::new();
        text.fixed(&stream.workload.id.0);
        text.bytes(stream.name.as_bytes());
        let hash = derive("mainstay 2026 journal stream v1", &[domain.index_key.as_bytes(), &text]);
        Self(Id16(short(&hash)))
    }
}

/// What an object says of the changes in it. Whoever works in the domain may read it, so that a client that only writes
/// knows where it left off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) stream: StreamRef,
    pub(crate) start: Position,
    pub(crate) end: Position,
    /// The earliest and the latest time that a change in it tells.
    pub(crate) first: Option<Time>,
    pub(crate) last: Option<Time>,
    pub(crate) changes: u64,
    /// Of all changes together.
    pub(crate) bytes: u64,
    /// Why it does not start where the object before it ends.
    pub(crate) gap: Option<String>,
}

/// What everyone may know, in the order in which it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) stream: StreamId,
    pub(crate) number: u64,
    pub(crate) domain: DomainId,
    pub(crate) writer: WriterId,
    /// [`Stored::hash`] of the object before it; zeros for the first.
    pub(crate) previous: [u8; 32],
    /// The writer's clock.
    pub(crate) written: Time,
}

/// An object as it is stored: its header checked, its segments not read.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) header: Header,
    wrapped: Vec<u8>,
    siv: Siv,
    sealed_head: Vec<u8>,
    segments: Vec<(u64, [u8; 16])>,
    /// Where the segments begin.
    pub(crate) body_at: u64,
    /// Of the signed header: the link of the next one.
    pub(crate) hash: [u8; 32],
}

/// The key of one run of a writer.
pub(super) struct Session {
    key: SealKey,
    /// Its name, and the key wrapped to whoever reads.
    wrapped: Vec<u8>,
}

impl Session {
    pub(super) fn new(family: &FamilyId, content: &WrapPublic) -> Result<Self> {
        let (key, id) = (SealKey::random()?, Id16(seal::random_bytes()?));
        let mut wrapped = id.0.to_vec();
        wrapped.fixed(&wrap::wrap(content, &session_info(family, &id), key.as_bytes())?);
        Ok(Self { key, wrapped })
    }
}

fn session_info(family: &FamilyId, id: &Id16) -> Vec<u8> {
    let mut info = b"mainstay journal session 1".to_vec();
    info.fixed(&family.0);
    info.fixed(&id.0);
    info
}

fn object_key(session: &SealKey, stream: StreamId, number: u64) -> SealKey {
    let mut material = stream.0.0.to_vec();
    material.u64(number);
    session.derive("mainstay 2026 journal object key v1", &material)
}

fn head_key(domain: &DomainKeys) -> SealKey {
    domain.index_key.derive("mainstay 2026 journal head key v1", b"")
}

fn binding(family: &FamilyId, header: &Header) -> Binding {
    let number = header.number.to_le_bytes();
    let hash = derive("mainstay 2026 journal group v1", &[&header.stream.0.0, &number]);
    Binding { family: *family, domain: header.domain, group: Id16(short(&hash)), class: Class::Data }
}

/// An object and what the next one must name.
pub(super) struct Sealed {
    pub(super) bytes: Vec<u8>,
    pub(super) hash: [u8; 32],
}

/// `raw` are the segments' plain bytes as [`put_change`] wrote them.
pub(super) fn seal_object(
    family: &FamilyId,
    keys: (&DomainKeys, &SigningKey, &Session),
    sealer: &mut Sealer,
    header: &Header,
    head: &Head,
    raw: &[Vec<u8>],
) -> Result<Sealed> {
    let (domain, signer, session) = keys;
    let binding = binding(family, header);
    let key = object_key(&session.key, header.stream, header.number);
    let mut segments = Vec::with_capacity(raw.len());
    for (ordinal, raw) in raw.iter().enumerate() {
        segments.push(sealer.seal(&key, &binding, ordinal as u32, raw)?);
    }
    let mut out = Vec::with_capacity(4096 + segments.iter().map(Vec::len).sum::<usize>());
    out.fixed(MAGIC);
    out.u16(VERSION);
    out.u32(0);
    header.encode(&mut out);
    out.bytes(&session.wrapped);
    let mut message = head.encode();
    message.resize(seal::padded_len(message.len() as u64) as usize, 0);
    let siv = seal::seal(&head_key(domain), &header.associated_data(family), &mut message)?;
    out.fixed(&siv.0);
    out.bytes(&message);
    out.varint(segments.len() as u64);
    for segment in &segments {
        out.varint(segment.len() as u64);
        out.fixed(&block_digest(segment));
    }
    let length = (out.len() + SIGNATURE_BYTES) as u32;
    if let Some(field) = out.get_mut(6..PREFIX_BYTES) {
        field.copy_from_slice(&length.to_le_bytes());
    }
    let mut signed = family.0.to_vec();
    signed.fixed(&out);
    let signature = signer.sign(SIGNATURE_CONTEXT, &signed);
    out.fixed(&signature);
    let hash = *blake3::hash(&out).as_bytes();
    segments.iter().for_each(|segment| out.fixed(segment));
    Ok(Sealed { bytes: out, hash })
}

impl Header {
    fn encode(&self, out: &mut Vec<u8>) {
        out.fixed(&self.stream.0.0);
        out.u64(self.number);
        out.fixed(&self.domain.0);
        out.fixed(&self.writer.0);
        out.fixed(&self.previous);
        out.i64(self.written.0);
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self> {
        Ok(Self {
            stream: StreamId(input.id()?),
            number: input.u64()?,
            domain: input.id()?,
            writer: input.id()?,
            previous: input.array()?,
            written: Time(input.i64()?),
        })
    }

    fn associated_data(&self, family: &FamilyId) -> Vec<u8> {
        let mut data = b"mainstay journal head 1".to_vec();
        data.fixed(&family.0);
        self.encode(&mut data);
        data
    }
}

impl Head {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let StreamRef { workload, name, parent } = &self.stream;
        out.fixed(&workload.id.0);
        for text in [&workload.kind.0, &workload.name, name] {
            out.bytes(text.as_bytes());
        }
        out.u8(u8::from(parent.is_some()));
        if let Some((name, position)) = parent {
            out.bytes(name.as_bytes());
            out.bytes(&position.0);
        }
        out.bytes(&self.start.0);
        out.bytes(&self.end.0);
        for time in [self.first, self.last] {
            out.i64(time.map_or(NO_TIME, |time| time.0));
        }
        out.u64(self.changes);
        out.u64(self.bytes);
        out.bytes(self.gap.as_deref().unwrap_or_default().as_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self> {
        let mut input = Decoder::new("journal head", bytes);
        let workload =
            WorkloadRef { id: input.id()?, kind: WorkloadKind(input.text()?), name: input.text()? };
        let name = input.text()?;
        let parent = match input.u8()? {
            0 => None,
            1 => Some((input.text()?, Position(input.bytes()?.to_vec()))),
            _ => return Err(input.malformed("its stream has neither one parent nor none")),
        };
        let (start, end) = (Position(input.bytes()?.to_vec()), Position(input.bytes()?.to_vec()));
        if end <= start {
            return Err(input.malformed("it ends before it starts"));
        }
        let mut times = [None; 2];
        for time in &mut times {
            *time = Some(input.i64()?).filter(|time| *time != NO_TIME).map(Time);
        }
        let ([first, last], changes, bytes) = (times, input.u64()?, input.u64()?);
        let gap = Some(input.text()?).filter(|gap| !gap.is_empty());
        let padding = input.take(input.remaining())?;
        if padding.iter().any(|byte| *byte != 0) {
            return Err(Error::new(Code::TooNew, "a journal object tells more than this version knows"));
        }
        Ok(Self {
            stream: StreamRef { workload, name, parent },
            start,
            end,
            first,
            last,
            changes,
            bytes,
            gap,
        })
    }
}

const NO_TIME: i64 = i64::MIN;

impl Stored {
    /// How long the header is, from the first [`PREFIX_BYTES`] of an object.
    pub(super) fn header_length(prefix: &[u8]) -> Result<usize> {
        let mut input = Decoder::new("journal object", prefix);
        input.expect(MAGIC)?;
        if input.u16()? != VERSION {
            return Err(Error::new(Code::TooNew, "a journal object was written by a newer version"));
        }
        match input.u32()? as usize {
            length if (PREFIX_BYTES + SIGNATURE_BYTES..=HEADER_BYTES_MAX).contains(&length) => Ok(length),
            _ => Err(input.malformed("its header cannot be that long")),
        }
    }

    /// Parses a header of the length that [`Stored::header_length`] said, and checks its signature.
    pub(super) fn decode(
        family: &FamilyId,
        bytes: &[u8],
        writer: impl FnOnce(&WriterId) -> Option<VerifyingKey>,
    ) -> Result<Self> {
        let length = Self::header_length(bytes)?;
        let bytes = bytes.get(..length).unwrap_or_default();
        let (signed, signature) = bytes
            .split_last_chunk::<SIGNATURE_BYTES>()
            .ok_or_else(|| Error::integrity("a journal object ends in its header"))?;
        let mut input = Decoder::new("journal object", signed);
        input.take(PREFIX_BYTES)?;
        let header = Header::decode(&mut input)?;
        let key = writer(&header.writer)
            .ok_or_else(|| Error::integrity("a journal object is signed by nobody this repository knows"))?;
        let mut message = family.0.to_vec();
        message.fixed(signed);
        key.verify(SIGNATURE_CONTEXT, &message, signature)
            .map_err(|error| error.during("cannot trust the header of a journal object"))?;
        let wrapped = input.bytes()?.to_vec();
        let (siv, sealed_head) = (Siv(input.array()?), input.bytes()?.to_vec());
        let mut segments = Vec::new();
        for _ in 0..input.count(17)? {
            segments.push((input.varint()?, input.array()?));
        }
        input.later_fields()?;
        let hash = *blake3::hash(bytes).as_bytes();
        let total = segments.iter().try_fold(length as u64, |sum, (length, _)| sum.checked_add(*length));
        if total.is_none_or(|total| total > OBJECT_BYTES_MAX) {
            return Err(Error::integrity("a journal object is longer than any can be"));
        }
        Ok(Self { header, wrapped, siv, sealed_head, segments, body_at: length as u64, hash })
    }

    /// Of the whole object.
    pub(super) fn length(&self) -> u64 {
        self.body_at + self.segments.iter().map(|(length, _)| length).sum::<u64>()
    }

    pub(super) fn head(&self, family: &FamilyId, domain: &DomainKeys) -> Result<Head> {
        let mut message = self.sealed_head.clone();
        let associated = self.header.associated_data(family);
        seal::open(&head_key(domain), &associated, &self.siv, &mut message)?;
        let head = Head::decode(&message)?;
        if StreamId::of(domain, &head.stream) != self.header.stream {
            return Err(Error::integrity("a journal object lies under the name of another stream"));
        }
        Ok(head)
    }

    /// Checks the bytes of the segments, without a key.
    pub(super) fn check_body(&self, body: &[u8]) -> Result<()> {
        self.split(body).map(drop)
    }

    fn split<'a>(&self, mut body: &'a [u8]) -> Result<Vec<&'a [u8]>> {
        let mut parts = Vec::with_capacity(self.segments.len());
        for (length, digest) in &self.segments {
            let length = usize::try_from(*length).unwrap_or(usize::MAX);
            let (part, rest) = body
                .split_at_checked(length)
                .ok_or_else(|| Error::integrity("a journal object ends too early"))?;
            if block_digest(part) != *digest {
                return Err(Error::integrity("a segment of a journal object is damaged"));
            }
            parts.push(part);
            body = rest;
        }
        if body.is_empty() { Ok(parts) } else { Err(Error::integrity("bytes follow a journal object")) }
    }

    /// The changes in it, in order.
    pub(super) fn changes(
        &self,
        family: &FamilyId,
        secret: &WrapSecret,
        head: &Head,
        body: &[u8],
    ) -> Result<Vec<Change>> {
        let (id, wrapped) = self
            .wrapped
            .split_first_chunk::<16>()
            .ok_or_else(|| Error::integrity("a journal object has no key"))?;
        let session = wrap::unwrap(secret, &session_info(family, &Id16(*id)), wrapped)?;
        let session = <[u8; 32]>::try_from(session.as_slice())
            .map_err(|_length| Error::integrity("the key of a journal object has the wrong length"))?;
        let key = object_key(&SealKey::new(session), self.header.stream, self.header.number);
        let binding = binding(family, &self.header);
        let (mut changes, mut at) = (Vec::new(), head.start.clone());
        for (ordinal, part) in self.split(body)?.into_iter().enumerate() {
            let raw = segment::open(&key, &binding, ordinal as u32, part)?;
            read_changes(&raw, &mut at, &mut changes)?;
        }
        if at == head.end && changes.len() as u64 == head.changes {
            return Ok(changes);
        }
        Err(Error::integrity("a journal object does not hold what its header says"))
    }
}

/// Appends a change to the plain bytes of a segment. It starts where the one before it ended.
pub(super) fn put_change(raw: &mut Vec<u8>, change: &Change) {
    raw.bytes(&change.end.0);
    raw.i64(change.time.map_or(NO_TIME, |time| time.0));
    raw.bytes(&change.bytes);
}

fn read_changes(raw: &[u8], at: &mut Position, changes: &mut Vec<Change>) -> Result<()> {
    let mut input = Decoder::new("journal segment", raw);
    while !input.is_empty() {
        let end = Position(input.bytes()?.to_vec());
        if end <= *at {
            return Err(input.malformed("a change ends before it starts"));
        }
        let time = Some(input.i64()?).filter(|time| *time != NO_TIME).map(Time);
        let start = std::mem::replace(at, end.clone());
        changes.push(Change { start, end, time, bytes: input.bytes()?.to_vec() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use mainstay_core::{Id16, Position, StreamRef, Time, WorkloadKind, WorkloadRef};

    use super::{Change, Head, Stored, put_change, read_changes};
    use crate::hostile::feed;
    use crate::keys::FamilyId;

    #[test]
    fn hostile_objects_heads_and_segments_are_errors() {
        let workload =
            WorkloadRef { id: Id16([1; 16]), kind: WorkloadKind("postgres".into()), name: "shop".into() };
        let at = |byte| Position(vec![byte; 8]);
        let head = Head {
            stream: StreamRef { workload, name: "wal 1".into(), parent: Some(("wal 0".into(), at(1))) },
            start: at(2),
            end: at(3),
            first: None,
            last: Some(Time(7)),
            changes: 2,
            bytes: 90,
            gap: Some("it was lost".into()),
        };
        assert_eq!(Head::decode(&head.encode()).unwrap(), head);
        feed(&head.encode(), 1 << 16, |bytes| drop(Head::decode(bytes)));

        let change = Change { start: at(2), end: at(3), time: None, bytes: vec![5; 90] };
        let mut raw = Vec::new();
        put_change(&mut raw, &change);
        put_change(&mut raw, &Change { start: at(3), end: at(4), time: Some(Time(1)), bytes: Vec::new() });
        feed(&raw, 1 << 16, |bytes| drop(read_changes(bytes, &mut at(2), &mut Vec::new())));

        let mut object = b"MSjr\x01\x00\xc8\x00\x00\x00".to_vec();
        object.resize(200, 3);
        feed(&object, 1 << 16, |bytes| drop(Stored::decode(&FamilyId([1; 32]), bytes, |_| None)));
    }
}
