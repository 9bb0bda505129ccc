//! A recovery point: a signed header that whoever expires can read, and a sealed body.

use mainstay_core::{
    Consistency, Counts, DomainId, Error, Id16, PointId, Position, Result, Time, WorkloadId, WorkloadKind,
    WorkloadRef, WriterId,
};

use crate::codec::{Decoder, Encode};
use crate::format::page::PageRef;
use crate::keys::FamilyId;
use crate::seal::{self, SealKey, Secret, Siv};
use crate::sign::{SigningKey, VerifyingKey};
use crate::wrap::{self, WrapPublic, WrapSecret};

const MAGIC: &[u8; 4] = b"MSpt";
const VERSION: u16 = 1;
const SIGNATURE_BYTES: usize = 64;
const SIGNATURE_CONTEXT: &str = "mainstay point header 1";
/// No point object is longer.
pub(crate) const POINT_BYTES_MAX: u64 = 16 << 20;

/// What everyone may know of a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) id: PointId,
    pub(crate) workload: WorkloadId,
    pub(crate) domain: DomainId,
    pub(crate) writer: WriterId,
    /// Of this writer for this workload, from 1.
    pub(crate) sequence: u64,
    /// Hash of the header of the point before it in that sequence; zeros for the first.
    pub(crate) previous: [u8; 32],
    pub(crate) parent: Option<PointId>,
    pub(crate) started: Time,
    pub(crate) finished: Time,
    pub(crate) moment: Time,
    pub(crate) consistency: Consistency,
    pub(crate) counts: Counts,
    /// Root of the map of groups that the point reaches; sealed to the collector.
    pub(crate) references: Option<PageRef>,
}

/// What only a holder of the content key may know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Body {
    pub(crate) workload: WorkloadRef,
    pub(crate) host: String,
    pub(crate) roots: Vec<String>,
    pub(crate) tags: Vec<String>,
    pub(crate) position: Position,
    pub(crate) items: Option<PageRef>,
    pub(crate) skips: Option<PageRef>,
}

impl Header {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(400);
        for id in [self.id, self.workload, self.domain, self.writer] {
            out.fixed(&id.0);
        }
        out.u64(self.sequence);
        out.fixed(&self.previous);
        out.fixed(&self.parent.unwrap_or_default().0);
        for time in [self.started, self.finished, self.moment] {
            out.i64(time.0);
        }
        out.u8(self.consistency as u8);
        let counts = &self.counts;
        for count in [
            counts.items,
            counts.bytes,
            counts.unchanged,
            counts.read_bytes,
            counts.new_bytes,
            counts.written_bytes,
            counts.skipped,
            counts.noticed,
        ] {
            out.u64(count);
        }
        encode_page(&mut out, self.references.as_ref());
        out
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self> {
        let (id, workload, domain, writer) = (input.id()?, input.id()?, input.id()?, input.id()?);
        let (sequence, previous, parent) = (input.u64()?, input.array()?, input.id()?);
        let (started, finished, moment) = (Time(input.i64()?), Time(input.i64()?), Time(input.i64()?));
        let consistency = input.u8()?;
        let consistency = Consistency::from_number(consistency)
            .ok_or_else(|| input.malformed("its consistency level is not known"))?;
        let counts = Counts {
            items: input.u64()?,
            bytes: input.u64()?,
            unchanged: input.u64()?,
            read_bytes: input.u64()?,
            new_bytes: input.u64()?,
            written_bytes: input.u64()?,
            skipped: input.u64()?,
            noticed: input.u64()?,
        };
        Ok(Self {
            id,
            workload,
            domain,
            writer,
            sequence,
            previous,
            parent: (parent != Id16::default()).then_some(parent),
            started,
            finished,
            moment,
            consistency,
            counts,
            references: decode_page(input)?,
        })
    }
}

impl Body {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.fixed(&self.workload.id.0);
        out.bytes(self.workload.kind.0.as_bytes());
        out.bytes(self.workload.name.as_bytes());
        out.bytes(self.host.as_bytes());
        for texts in [&self.roots, &self.tags] {
            out.varint(texts.len() as u64);
            texts.iter().for_each(|text| out.bytes(text.as_bytes()));
        }
        out.bytes(&self.position.0);
        encode_page(&mut out, self.items.as_ref());
        encode_page(&mut out, self.skips.as_ref());
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self> {
        let mut input = Decoder::new("point body", bytes);
        let workload =
            WorkloadRef { id: input.id()?, kind: WorkloadKind(input.text()?), name: input.text()? };
        let host = input.text()?;
        let mut lists = [Vec::new(), Vec::new()];
        for list in &mut lists {
            for _ in 0..input.count(1)? {
                list.push(input.text()?);
            }
        }
        let [roots, tags] = lists;
        let body = Self {
            workload,
            host,
            roots,
            tags,
            position: Position(input.bytes()?.to_vec()),
            items: decode_page(&mut input)?,
            skips: decode_page(&mut input)?,
        };
        input.later_fields()?;
        Ok(body)
    }
}

fn encode_page(out: &mut Vec<u8>, page: Option<&PageRef>) {
    out.u8(u8::from(page.is_some()));
    if let Some(page) = page {
        page.encode(out);
    }
}

fn decode_page(input: &mut Decoder<'_>) -> Result<Option<PageRef>> {
    match input.u8()? {
        0 => Ok(None),
        1 => PageRef::decode(input).map(Some),
        _ => Err(input.malformed("a page reference is neither there nor absent")),
    }
}

/// A point as stored. The header's hash and signature cover the sealed body.
pub(crate) struct StoredPoint {
    pub(crate) header: Header,
    wrapped_key: Vec<u8>,
    siv: Siv,
    sealed_body: Vec<u8>,
    /// Of the signed header: the point's link in its chain, and what the log records.
    pub(crate) hash: [u8; 32],
}

fn associated_data(family: &FamilyId, id: &PointId) -> Vec<u8> {
    let mut data = b"mainstay point body 1".to_vec();
    data.fixed(&family.0);
    data.fixed(&id.0);
    data
}

/// The object's bytes and the hash that the log records.
pub(crate) fn seal_point(
    family: &FamilyId,
    content: &WrapPublic,
    signer: &SigningKey,
    header: &Header,
    body: &Body,
) -> Result<(Vec<u8>, [u8; 32])> {
    let key = SealKey::random()?;
    let associated = associated_data(family, &header.id);
    let wrapped = wrap::wrap(content, &associated, key.as_bytes())?;
    let mut message = body.encode();
    let siv = seal::seal(&key, &associated, &mut message)?;
    let mut out = Vec::with_capacity(512 + wrapped.len() + message.len());
    out.fixed(MAGIC);
    out.u16(VERSION);
    out.bytes(&header.encode());
    out.bytes(&wrapped);
    out.fixed(&siv.0);
    out.fixed(blake3::hash(&message).as_bytes());
    let mut signed = family.0.to_vec();
    signed.fixed(&out);
    let signature = signer.sign(SIGNATURE_CONTEXT, &signed);
    out.fixed(&signature);
    let hash = *blake3::hash(&out).as_bytes();
    out.fixed(&message);
    Ok((out, hash))
}

impl StoredPoint {
    /// Parses a point object and checks its signature with the key that `writer` finds for its writer.
    pub(crate) fn decode(
        family: &FamilyId,
        bytes: &[u8],
        writer: impl FnOnce(&WriterId) -> Option<VerifyingKey>,
    ) -> Result<Self> {
        let mut input = Decoder::new("point", bytes);
        input.expect(MAGIC)?;
        if input.u16()? != VERSION {
            return Err(Error::new(mainstay_core::Code::TooNew, "the point was written by a newer version"));
        }
        let mut header_input = Decoder::new("point header", input.bytes()?);
        let header = Header::decode(&mut header_input)?;
        header_input.later_fields()?;
        let wrapped_key = input.bytes()?.to_vec();
        let (siv, body_hash) = (Siv(input.array()?), input.array::<32>()?);
        let signed_length = bytes.len() - input.remaining();
        let signature = input.array::<SIGNATURE_BYTES>()?;
        let sealed_body = input.take(input.remaining())?.to_vec();
        if *blake3::hash(&sealed_body).as_bytes() != body_hash {
            return Err(Error::integrity(format!(
                "the body of point {} does not match its header",
                header.id
            )));
        }
        let Some(key) = writer(&header.writer) else {
            return Err(Error::integrity(format!(
                "point {} is signed by nobody this repository knows",
                header.id
            )));
        };
        let mut signed = family.0.to_vec();
        signed.fixed(bytes.get(..signed_length).unwrap_or_default());
        key.verify(SIGNATURE_CONTEXT, &signed, &signature)
            .map_err(|error| error.during(format!("cannot trust the header of point {}", header.id)))?;
        let hash = *blake3::hash(bytes.get(..signed_length + SIGNATURE_BYTES).unwrap_or_default()).as_bytes();
        Ok(Self { header, wrapped_key, siv, sealed_body, hash })
    }

    pub(crate) fn open_body(&self, family: &FamilyId, content: &WrapSecret) -> Result<Body> {
        let associated = associated_data(family, &self.header.id);
        let opening = || format!("cannot open the body of point {}", self.header.id);
        let key = wrap::unwrap(content, &associated, &self.wrapped_key).map_err(|e| e.during(opening()))?;
        let key = Secret::from_slice(&key).ok_or_else(|| Error::integrity(opening()))?;
        let key = SealKey::from_secret(key);
        let mut message = self.sealed_body.clone();
        seal::open(&key, &associated, &self.siv, &mut message).map_err(|error| error.during(opening()))?;
        let body = Body::decode(&message)?;
        if body.workload.id == self.header.workload {
            Ok(body)
        } else {
            Err(Error::integrity(format!(
                "header and body of point {} name different workloads",
                self.header.id
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Body, Header, StoredPoint, seal_point};
    use crate::codec::Decoder;
    use crate::format::page::PageRef;
    use crate::hostile::feed;
    use crate::keys::FamilyId;
    use crate::sign::SigningKey;
    use crate::wrap::WrapSecret;
    use mainstay_core::{Consistency, Counts, Id16, Position, Time, WorkloadKind, WorkloadRef};

    fn parts(signer: &SigningKey) -> (Header, Body) {
        let page = PageRef { group: Id16([1; 16]), segment: 2, slot: 3, id: [4; 32] };
        let header = Header {
            id: Id16([5; 16]),
            workload: Id16([6; 16]),
            domain: Id16([7; 16]),
            writer: signer.verifying_key().writer_id(),
            sequence: 8,
            previous: [9; 32],
            parent: Some(Id16([10; 16])),
            started: Time(-1),
            finished: Time(1),
            moment: Time(2),
            consistency: Consistency::Crash,
            counts: Counts { items: 3, bytes: u64::MAX, ..Counts::default() },
            references: Some(page),
        };
        let body = Body {
            workload: WorkloadRef {
                id: header.workload,
                kind: WorkloadKind("files".into()),
                name: "web".into(),
            },
            host: "host".into(),
            roots: vec!["/srv".into(), "/etc".into()],
            tags: vec!["weekly".into()],
            position: Position(vec![1, 2, 3]),
            items: Some(page),
            skips: None,
        };
        (header, body)
    }

    #[test]
    fn comes_back_as_it_was_and_changed_ones_are_errors() {
        let (family, signer) = (FamilyId([1; 32]), SigningKey::generate().unwrap());
        let secret = WrapSecret::generate().unwrap();
        let (header, body) = parts(&signer);
        let (bytes, hash) = seal_point(&family, &secret.public().unwrap(), &signer, &header, &body).unwrap();
        let key = signer.verifying_key();
        let stored = StoredPoint::decode(&family, &bytes, |_| Some(key)).unwrap();
        assert_eq!((&stored.header, stored.hash), (&header, hash));
        assert_eq!(stored.open_body(&family, &secret).unwrap(), body);
        assert!(StoredPoint::decode(&FamilyId([2; 32]), &bytes, |_| Some(key)).is_err());
        feed(&bytes, 1 << 16, |other| {
            let believed = StoredPoint::decode(&family, other, |_| Some(key)).is_ok();
            assert_eq!(believed, other == bytes, "a changed point was believed");
        });
    }

    #[test]
    fn hostile_headers_and_bodies_are_errors() {
        let (header, body) = parts(&SigningKey::generate().unwrap());
        feed(&header.encode(), 1 << 16, |bytes| {
            let mut input = Decoder::new("point header", bytes);
            let _either = Header::decode(&mut input).and_then(|_| input.later_fields());
        });
        feed(&body.encode(), 1 << 18, |bytes| drop(Body::decode(bytes)));
    }
}
