//! File records and the attributes in them.

use std::collections::BTreeSet;

use mainstay_core::{Code, Error, Result};

use super::content::Stream;
use super::{EXTENTS_MAX, Node, Volume, utf16};
use crate::fs::bytes::Bytes as _;

/// Kinds of attributes.
pub(super) mod kind_of_attribute {
    pub(in super::super) const STANDARD_INFORMATION: u32 = 0x10;
    pub(in super::super) const ATTRIBUTE_LIST: u32 = 0x20;
    pub(in super::super) const FILE_NAME: u32 = 0x30;
    pub(in super::super) const SECURITY_DESCRIPTOR: u32 = 0x50;
    pub(in super::super) const VOLUME_NAME: u32 = 0x60;
    pub(in super::super) const VOLUME_INFORMATION: u32 = 0x70;
    pub(in super::super) const DATA: u32 = 0x80;
    pub(in super::super) const INDEX_ROOT: u32 = 0x90;
    pub(in super::super) const INDEX_ALLOCATION: u32 = 0xa0;
    pub(in super::super) const BITMAP: u32 = 0xb0;
    pub(in super::super) const REPARSE_POINT: u32 = 0xc0;
    pub(super) const END: u32 = u32::MAX;
}

/// What stands for a file instead of its content ([MS-FSCC] 2.1.2.1).
mod tag {
    pub(super) const MOUNT_POINT: u32 = 0xa000_0003;
    pub(super) const SYMLINK: u32 = 0xa000_000c;
    pub(super) const LX_SYMLINK: u32 = 0xa000_001d;
    /// Sockets, pipes and devices of the Linux subsystem: empty files.
    pub(super) const HARMLESS: [u32; 4] = [0x8000_0023, 0x8000_0024, 0x8000_0025, 0x8000_0026];
}

/// The longest list of attributes that Windows makes, in bytes.
const LIST_MAX: u64 = 256 << 10;

/// The name space of names that only old programs use.
const DOS: u8 = 2;

/// Clusters that follow each other in a file, and on the volume unless they are a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) first: u64,
    pub(super) count: u64,
    pub(super) place: Option<u64>,
}

/// Where the value of an attribute is.
#[derive(Clone)]
pub(super) enum Body {
    Resident(Vec<u8>),
    Clusters(Vec<Run>),
}

pub(super) struct Attribute {
    pub(super) kind: u32,
    pub(super) name: Vec<u16>,
    pub(super) flags: u16,
    /// The first cluster of the value that this part is about.
    pub(super) first: u64,
    pub(super) unit: u16,
    pub(super) size: u64,
    pub(super) written: u64,
    pub(super) body: Body,
}

pub(super) struct File {
    pub(super) number: u64,
    pub(super) sequence: u16,
    flags: u16,
    base: u64,
    pub(super) attributes: Vec<Attribute>,
}

/// A record as it lies on the volume: each 512 bytes end with a mark that shows whether all were written together; it
/// goes, and what it stands for comes back.
pub(super) fn mend(bytes: &mut [u8], magic: &[u8; 4], what: &str) -> Result<()> {
    let damaged = || Error::integrity(format!("{what} is damaged"));
    if !bytes.starts_with(magic) {
        return Err(damaged());
    }
    let (place, count) = (usize::from(bytes.le16(4)?), usize::from(bytes.le16(6)?));
    let parts = count.checked_sub(1).filter(|&parts| parts > 0 && bytes.len().is_multiple_of(parts));
    let stride =
        parts.map(|parts| bytes.len() / parts).filter(|&stride| stride >= 512).ok_or_else(damaged)?;
    let marks = bytes.part(place, 2 * count)?.to_vec();
    for (part, original) in bytes.chunks_exact_mut(stride).zip(marks[2..].chunks_exact(2)) {
        let end = &mut part[stride - 2..];
        if end != &marks[..2] {
            return Err(Error::integrity(format!("{what} was not written to its end")));
        }
        end.copy_from_slice(original);
    }
    Ok(())
}

impl File {
    /// A record with all its attributes, also those that others hold for it.
    pub(super) fn parse(volume: &Volume, number: u64, bytes: Vec<u8>) -> Result<Self> {
        let mut file = Self::parse_alone(volume, number, bytes)?;
        let Some(list) =
            file.attributes.iter().find(|attribute| attribute.kind == kind_of_attribute::ATTRIBUTE_LIST)
        else {
            return Ok(file);
        };
        if list.size > LIST_MAX {
            return Err(Error::integrity(format!("file record {number} has too many attributes")));
        }
        let list = match &list.body {
            Body::Resident(value) => value.clone(),
            Body::Clusters(_) => {
                let stream = Stream::of(&file, kind_of_attribute::ATTRIBUTE_LIST, &[])?;
                let mut value = vec![0; stream.size as usize];
                volume.read_stream(&stream, 0, &mut value)?;
                value
            }
        };
        let mut others = BTreeSet::new();
        let mut at = 0;
        while at + 0x1a <= list.len() {
            let length = usize::from(list.le16(at + 4)?);
            if length < 0x1a {
                return Err(Error::integrity(format!("the attributes of file record {number} are damaged")));
            }
            others.insert(list.le64(at + 0x10)? & 0xffff_ffff_ffff);
            at += length;
        }
        others.remove(&number);
        for other in others {
            // The table of files tells of its own later parts in its earlier ones.
            let Some(bytes) = volume.raw_record(other)? else { continue };
            let part = Self::parse_alone(volume, other, bytes)?;
            if part.base != number {
                return Err(Error::integrity(format!(
                    "file record {other} belongs to another file than {number}"
                )));
            }
            file.attributes.extend(part.attributes);
        }
        Ok(file)
    }

    fn parse_alone(volume: &Volume, number: u64, mut bytes: Vec<u8>) -> Result<Self> {
        mend(&mut bytes, b"FILE", &format!("file record {number}"))?;
        let used = (bytes.le32(0x18)? as usize).min(bytes.len());
        let mut attributes = Vec::new();
        let mut at = usize::from(bytes.le16(0x14)?);
        while at + 8 <= used && bytes.le32(at)? != kind_of_attribute::END {
            let length = bytes.le32(at + 4)? as usize;
            if length < 0x18 || !length.is_multiple_of(8) {
                return Err(Error::integrity(format!("an attribute of file record {number} is damaged")));
            }
            attributes.push(Attribute::parse(volume, bytes.part(at, length)?)?);
            at += length;
        }
        Ok(Self {
            number,
            sequence: bytes.le16(0x10)?,
            flags: bytes.le16(0x16)?,
            base: bytes.le64(0x20)? & 0xffff_ffff_ffff,
            attributes,
        })
    }

    pub(super) fn node(&self) -> Node {
        Node { space: u64::from(self.sequence), number: self.number }
    }

    pub(super) fn is_in_use(&self) -> bool {
        self.flags & 1 != 0
    }

    pub(super) fn is_directory(&self) -> bool {
        self.flags & 2 != 0
    }

    /// Whether this only holds attributes for another record.
    pub(super) fn is_part_of_another(&self) -> bool {
        self.base != 0
    }

    /// The value of an attribute without a name that lies in the record.
    pub(super) fn resident(&self, kind: u32) -> Option<&[u8]> {
        self.attributes.iter().find_map(|attribute| match &attribute.body {
            Body::Resident(value) if attribute.kind == kind && attribute.name.is_empty() => {
                Some(value.as_slice())
            }
            _ => None,
        })
    }

    /// How many names it has, not counting those for old programs.
    pub(super) fn names(&self) -> usize {
        let name = |attribute: &&Attribute| match &attribute.body {
            Body::Resident(value) => {
                attribute.kind == kind_of_attribute::FILE_NAME && value.get(0x41) != Some(&DOS)
            }
            Body::Clusters(_) => false,
        };
        self.attributes.iter().filter(name).count()
    }

    /// Names of content beside the nameless one.
    pub(super) fn stream_names(&self) -> BTreeSet<Vec<u16>> {
        let named =
            |attribute: &&Attribute| attribute.kind == kind_of_attribute::DATA && !attribute.name.is_empty();
        self.attributes.iter().filter(named).map(|attribute| attribute.name.clone()).collect()
    }

    /// Where a symbolic link or a mount point leads.
    pub(super) fn link_target(&self) -> Option<Vec<u8>> {
        let value = self.resident(kind_of_attribute::REPARSE_POINT)?;
        let tag = value.le32(0).ok()?;
        let names = match tag {
            tag::SYMLINK => 20,
            tag::MOUNT_POINT => 16,
            tag::LX_SYMLINK => {
                return value.get(12..).filter(|target| !target.is_empty()).map(<[u8]>::to_vec);
            }
            _ => return None,
        };
        let name = |at: usize| {
            let (start, length) = (value.le16(at).ok()?, value.le16(at + 2).ok()?);
            value.part(names + usize::from(start), usize::from(length)).ok().filter(|name| !name.is_empty())
        };
        // The name for people first, then the one for the system.
        let target = utf16(name(12).or_else(|| name(8))?);
        Some(target.iter().map(|&byte| if byte == b'\\' { b'/' } else { byte }).collect())
    }

    /// Refuses content that is not where it seems: encrypted, packed by a filter, or kept elsewhere.
    pub(super) fn check_readable(&self) -> Result<()> {
        let Some(point) =
            self.attributes.iter().find(|attribute| attribute.kind == kind_of_attribute::REPARSE_POINT)
        else {
            return Ok(());
        };
        let tag = match &point.body {
            Body::Resident(value) => value.le32(0)?,
            Body::Clusters(_) => 0,
        };
        if tag::HARMLESS.contains(&tag) {
            return Ok(());
        }
        let what = format!(
            "the content of file record {} is kept by a filter of Windows (reparse tag {tag:#010x}), which only \
             Windows can read",
            self.number
        );
        Err(Error::new(Code::Unsupported, what))
    }
}

impl Attribute {
    fn parse(volume: &Volume, raw: &[u8]) -> Result<Self> {
        let kind = raw.le32(0)?;
        let name = raw.part(usize::from(raw.le16(0x0a)?), 2 * usize::from(raw.byte(9)?))?;
        let name = name.as_chunks::<2>().0.iter().map(|pair| u16::from_le_bytes(*pair)).collect();
        let flags = raw.le16(0x0c)?;
        if raw.byte(8)? == 0 {
            let value = raw.part(usize::from(raw.le16(0x14)?), raw.le32(0x10)? as usize)?.to_vec();
            let size = value.len() as u64;
            let body = Body::Resident(value);
            return Ok(Self { kind, name, flags, first: 0, unit: 0, size, written: size, body });
        }
        let (first, last) = (raw.le64(0x10)?, raw.le64(0x18)?);
        let runs = runs(volume, raw.get(usize::from(raw.le16(0x20)?)..).unwrap_or_default(), first)?;
        let end = runs.last().map_or(first, |run| run.first + run.count);
        if end != last.wrapping_add(1) {
            return Err(Error::integrity("an attribute of a file ends elsewhere than it says"));
        }
        // Only the first part knows the sizes.
        let (size, written) = if first == 0 { (raw.le64(0x30)?, raw.le64(0x38)?) } else { (0, 0) };
        Ok(Self {
            kind,
            name,
            flags,
            first,
            unit: raw.le16(0x22)?,
            size,
            written,
            body: Body::Clusters(runs),
        })
    }
}

/// The packed list of runs: for each, the lengths of two numbers, how many clusters, and how far from the last place.
fn runs(volume: &Volume, packed: &[u8], first: u64) -> Result<Vec<Run>> {
    let damaged = || Error::integrity("the places of a file's content are damaged");
    let mut runs: Vec<Run> = Vec::new();
    let (mut at, mut next, mut place) = (0, first, 0i64);
    while let Some(&sizes) = packed.get(at).filter(|&&sizes| sizes != 0) {
        let (count_size, move_size) = (usize::from(sizes & 0xf), usize::from(sizes >> 4));
        if count_size == 0 || count_size > 8 || move_size > 8 || runs.len() as u64 >= EXTENTS_MAX {
            return Err(damaged());
        }
        let count = number(packed.part(at + 1, count_size)?);
        let moved = number(packed.part(at + 1 + count_size, move_size)?);
        at += 1 + count_size + move_size;
        let count = u64::try_from(count).ok().filter(|&count| count > 0).ok_or_else(damaged)?;
        let end = next.checked_add(count).filter(|&end| end < 1 << 52).ok_or_else(damaged)?;
        let mut run = Run { first: next, count, place: None };
        if move_size > 0 {
            place = place.checked_add(moved).ok_or_else(damaged)?;
            let start = u64::try_from(place).ok();
            let fits = |start: &u64| start.checked_add(count).is_some_and(|end| end <= volume.clusters);
            run.place = Some(start.filter(fits).ok_or_else(damaged)?);
        }
        runs.push(run);
        next = end;
    }
    Ok(runs)
}

/// A number of up to eight bytes with a sign; 0 for none.
fn number(bytes: &[u8]) -> i64 {
    let fill = if bytes.last().is_some_and(|byte| byte & 0x80 != 0) { 0xff } else { 0 };
    let mut whole = [fill; 8];
    whole[..bytes.len()].copy_from_slice(bytes);
    if bytes.is_empty() { 0 } else { i64::from_le_bytes(whole) }
}

impl Volume {
    /// The bytes of a record; `None` when the part of the table that would hold it is not known yet.
    fn raw_record(&self, number: u64) -> Result<Option<Vec<u8>>> {
        let offset = number.checked_mul(self.record_size as u64);
        let known = self.table.known(self.cluster_size);
        let Some(offset) = offset.filter(|offset| offset + (self.record_size as u64) <= known) else {
            return Ok(None);
        };
        let mut bytes = vec![0; self.record_size];
        self.read_stream(&self.table, offset, &mut bytes)?;
        Ok(Some(bytes))
    }
}
