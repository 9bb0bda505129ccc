//! LVM2: physical volumes on partitions or disks, and what their newest metadata says about logical volumes. Linear and
//! striped ones are read; others are told about.

mod text;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use mainstay_core::{Blocks, Code, Error, Result};

use self::text::{Section, Value};
use super::{Encryption, OnDisks, Volume, VolumeKind};
use crate::bytes::{self, Fields};
use crate::checksum::lvm;
use crate::mapped::{Map, Mapped, Place};

const SECTOR: u64 = 512;
/// Where the label may be, in sectors.
const LABELS: u64 = 4;
/// Of the header of a metadata area.
const AREA: u64 = 512;
/// The longest metadata that is read; LVM makes room for 1 MiB.
const TEXT_MAX: u64 = 8 << 20;
/// The shortest stripe that LVM makes, in bytes.
const STRIPE_MIN: u64 = 4096;
/// Legs that a striped volume may have.
const STRIPES_MAX: u64 = 128;

/// A volume that LVM has put its label on.
pub(super) struct Physical {
    volume: Volume,
    id: String,
    /// The newest that lies here; some volumes keep none.
    metadata: Option<Section>,
}

impl Physical {
    /// Takes a volume that [`label`] found a label on.
    pub(super) fn read(volume: Volume, label: Label, notes: &mut Vec<String>) -> Self {
        let mut newest: Option<(u64, Section)> = None;
        for area in label.areas {
            match metadata(&*volume.blocks, &area) {
                Ok(Some(text)) => {
                    let sequence = sequence(&text);
                    if newest.as_ref().is_none_or(|(known, _)| *known < sequence) {
                        newest = Some((sequence, text));
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    notes.push(format!("{}: a copy of LVM's metadata cannot be read: {error}.", volume.name));
                }
            }
        }
        Self { volume, id: label.id, metadata: newest.map(|(_, text)| text) }
    }
}

/// What makes a volume a physical volume.
pub(super) struct Label {
    id: String,
    /// Where metadata lies.
    areas: Vec<Range<u64>>,
}

/// LVM's label, if it is on the volume.
pub(super) fn label(blocks: &dyn Blocks) -> Result<Option<Label>> {
    let head = bytes::read_up_to(blocks, 0, bytes::index(LABELS * SECTOR)?)?;
    for (number, sector) in (0..).zip(head.chunks_exact(bytes::index(SECTOR)?)) {
        let fields = Fields::new("LVM's label", sector);
        let signed = fields.take(0, 8)? == b"LABELONE" && fields.take(24, 8)? == b"LVM2 001";
        if !signed || fields.le64(8)? != number || fields.le32(16)? != lvm(&sector[20..]) {
            continue;
        }
        let header = bytes::index(u64::from(fields.le32(20)?))?;
        let id = String::from_utf8_lossy(fields.take(header, 32)?).into_owned();
        let mut at = header + 40;
        let mut lists = [Vec::new(), Vec::new()];
        // Where data lies, then where metadata lies; a pair of zeros ends each list.
        for list in &mut lists {
            loop {
                let (offset, size) = (fields.le64(at)?, fields.le64(at + 8)?);
                at += 16;
                if offset == 0 {
                    break;
                }
                list.push(offset..offset.saturating_add(size));
            }
        }
        let [_, areas] = lists;
        return Ok(Some(Label { id, areas }));
    }
    Ok(None)
}

/// The text in a metadata area; `None` when nothing has been written there yet.
fn metadata(blocks: &dyn Blocks, area: &Range<u64>) -> Result<Option<Section>> {
    let head = bytes::read(blocks, area.start, bytes::index(AREA)?)?;
    let fields = Fields::new("the header of a metadata area", &head);
    if fields.take(4, 16)? != b" LVM2 x[5A%r0N*>" || fields.le32(0)? != lvm(&head[4..]) {
        return Err(Error::integrity("the header of its area is damaged"));
    }
    let (offset, size, sum, flags) = (fields.le64(40)?, fields.le64(48)?, fields.le32(56)?, fields.le32(60)?);
    if offset == 0 || flags & 1 != 0 {
        return Ok(None);
    }
    let room = area.end - area.start;
    if size > TEXT_MAX || size > room.saturating_sub(AREA) || offset < AREA || offset >= room {
        return Err(Error::integrity(format!("{size} bytes at {offset} of an area of {room}")));
    }
    // The area is a ring behind its header.
    let first = size.min(room - offset);
    let mut text = bytes::read(blocks, area.start.saturating_add(offset), bytes::index(first)?)?;
    text.extend(bytes::read(blocks, area.start.saturating_add(AREA), bytes::index(size - first)?)?);
    if lvm(&text) != sum {
        return Err(Error::integrity("its checksum is wrong"));
    }
    Section::parse(&text).map(Some)
}

fn sequence(text: &Section) -> u64 {
    text.sections().next().and_then(|(_, group)| group.number("seqno").ok()).unwrap_or(0)
}

/// The logical volumes of all groups that these physical volumes belong to, by name.
pub(super) fn logical(found: Vec<Physical>, notes: &mut Vec<String>) -> Vec<Volume> {
    let mut by_id: BTreeMap<String, Volume> = BTreeMap::new();
    let mut newest: BTreeMap<String, (u64, Section)> = BTreeMap::new();
    for Physical { volume, id, metadata } in found {
        if let Some(text) = metadata {
            let group =
                text.sections().next().and_then(|(_, group)| group.text("id").ok()).unwrap_or_default();
            let (group, sequence) = (group.to_owned(), sequence(&text));
            if newest.get(&group).is_none_or(|(known, _)| *known < sequence) {
                newest.insert(group, (sequence, text));
            }
        }
        if let Some(first) = by_id.get(&id) {
            notes.push(format!(
                "{} is a copy of the physical volume {} and is left out.",
                volume.name, first.name
            ));
        } else {
            by_id.insert(id, volume);
        }
    }
    let mut volumes = Vec::new();
    for (id, (_, text)) in &newest {
        let Some((name, section)) = text.sections().next() else { continue };
        let twin = newest.iter().any(|(other, (_, text))| other != id && text.section(name).is_some());
        // Groups of one name are told apart as LVM tells them apart, by their identity.
        let name = if twin { format!("{name}@{id}") } else { name.to_owned() };
        match Group::new(name.clone(), section, &by_id) {
            Ok(group) => group.volumes(section, &mut volumes, notes),
            Err(error) => notes.push(format!("The volume group {name} cannot be read: {error}.")),
        }
    }
    volumes.sort_by(|a, b| a.name.cmp(&b.name));
    volumes
}

/// A volume group, as far as its logical volumes need it.
struct Group {
    name: String,
    /// In bytes.
    extent: u64,
    physical: BTreeMap<String, Member>,
}

/// What a physical volume gives to the logical ones on it.
#[derive(Clone)]
struct Part {
    blocks: Arc<dyn Blocks>,
    place: Arc<dyn OnDisks>,
    encryption: Encryption,
}

/// A physical volume of a group.
struct Member {
    /// `None` when its disk is not among those given.
    volume: Option<Part>,
    /// Where its extents begin, in bytes.
    start: u64,
    extents: u64,
}

impl Group {
    fn new(name: String, section: &Section, by_id: &BTreeMap<String, Volume>) -> Result<Self> {
        let extent = section.number("extent_size")?.checked_mul(SECTOR).filter(|extent| *extent != 0);
        let extent = extent.ok_or_else(|| Error::integrity("its extents have no size"))?;
        let mut physical = BTreeMap::new();
        for (name, section) in section.section("physical_volumes").iter().flat_map(|list| list.sections()) {
            let id: String = section.text("id")?.chars().filter(|letter| *letter != '-').collect();
            let volume = by_id.get(&id).map(|Volume { blocks, place, encryption, .. }| Part {
                blocks: Arc::clone(blocks),
                place: Arc::clone(place),
                encryption: *encryption,
            });
            let start = section.number("pe_start")?.checked_mul(SECTOR);
            let start = start.ok_or_else(|| Error::integrity("its extents lie beyond every disk"))?;
            physical.insert(name.to_owned(), Member { volume, start, extents: section.number("pe_count")? });
        }
        Ok(Self { name, extent, physical })
    }

    fn volumes(&self, section: &Section, volumes: &mut Vec<Volume>, notes: &mut Vec<String>) {
        let all = || section.section("logical_volumes").into_iter().flat_map(Section::sections);
        let segments = || all().flat_map(|(_, volume)| volume.sections());
        // What a snapshot keeps of its origin looks like a volume of its own, and reads as nonsense.
        let stores: Vec<&str> =
            segments().filter_map(|(_, segment)| segment.text("cow_store").ok()).collect();
        for (name, section) in all().filter(|(_, volume)| volume.says("status", "VISIBLE")) {
            let full = format!("{}/{name}", self.name);
            if stores.contains(&name) {
                notes.push(format!("{full} is a snapshot of LVM, which is not read; its origin is."));
                continue;
            }
            match self.volume(section) {
                Ok(map) => {
                    let map = Arc::new(map);
                    volumes.push(Volume {
                        name: full,
                        kind: VolumeKind::Logical,
                        label: None,
                        uuid: section.text("id").ok().map(str::to_owned),
                        blocks: Arc::new(Mapped(Arc::clone(&map))),
                        encryption: map.encryption,
                        place: map,
                    });
                }
                Err(error) => notes.push(format!("{full} cannot be read: {error}.")),
            }
        }
    }

    fn volume(&self, section: &Section) -> Result<Logical> {
        let mut logical = Logical {
            segments: Vec::new(),
            size: 0,
            devices: Vec::new(),
            places: Vec::new(),
            encryption: Encryption::None,
        };
        let mut segments = Vec::new();
        for (_, segment) in section.sections() {
            segments.push((segment.number("start_extent")?, segment));
        }
        segments.sort_by_key(|(start, _)| *start);
        for (start, segment) in segments {
            let end = start.checked_mul(self.extent);
            if end != Some(logical.size) {
                return Err(Error::integrity("its segments leave a gap or overlap"));
            }
            self.segment(segment, &mut logical)?;
        }
        Ok(logical)
    }

    /// Appends a segment.
    fn segment(&self, section: &Section, logical: &mut Logical) -> Result<()> {
        let kind = section.text("type")?;
        if !matches!(kind, "striped" | "linear") {
            return Err(Error::new(
                Code::Unsupported,
                format!("it is of the kind {kind}, which is not read"),
            ));
        }
        let legs = section.number("stripe_count")?;
        let stripe = match legs {
            1 => u64::MAX,
            2..=STRIPES_MAX => section.number("stripe_size")?.saturating_mul(SECTOR),
            _ => return Err(Error::integrity(format!("it has {legs} stripes"))),
        };
        let extents = section.number("extent_count")?;
        let size = extents.checked_mul(self.extent).filter(|size| *size != 0 && extents.is_multiple_of(legs));
        let end = size.and_then(|size| logical.size.checked_add(size));
        let end = end.ok_or_else(|| Error::integrity("a segment has no possible size"))?;
        if legs > 1 && (stripe < STRIPE_MIN || !self.extent.is_multiple_of(stripe)) {
            return Err(Error::integrity("its stripes do not fit into extents"));
        }
        let stripes = section.list("stripes")?;
        let mut parts = Vec::new();
        for leg in stripes.chunks(2) {
            let [Value::Text(name), Value::Number(first)] = leg else {
                return Err(Error::integrity("it lies nowhere that could be named"));
            };
            parts.push(self.leg(name, *first, extents / legs, logical)?);
        }
        if parts.len() as u64 != legs {
            return Err(Error::integrity(format!("it has {} stripes instead of {legs}", parts.len())));
        }
        logical.segments.push(Segment { start: logical.size, end, stripe, legs: parts });
        logical.size = end;
        Ok(())
    }

    /// Where a leg of `extents` begins: the device of the volume, and the byte there.
    fn leg(&self, name: &str, first: u64, extents: u64, logical: &mut Logical) -> Result<(usize, u64)> {
        let member = self.physical.get(name);
        let member = member
            .ok_or_else(|| Error::integrity(format!("it lies on {name}, which is not in the group")))?;
        let Some(part) = &member.volume else {
            return Err(Error::new(
                Code::NotFound,
                format!("it lies on {name}, which is none of these disks"),
            ));
        };
        let beyond = || Error::integrity(format!("it reaches beyond the end of {name}"));
        let end = first.checked_add(extents).filter(|end| *end <= member.extents).ok_or_else(beyond)?;
        let byte = |extent: u64| extent.checked_mul(self.extent)?.checked_add(member.start);
        let (start, _end) = byte(first).zip(byte(end)).ok_or_else(beyond)?;
        logical.devices.push(Arc::clone(&part.blocks));
        logical.places.push(Arc::clone(&part.place));
        if part.encryption != Encryption::None {
            logical.encryption = part.encryption;
        }
        Ok((logical.devices.len() - 1, start))
    }
}

/// A logical volume.
struct Logical {
    /// Without gaps.
    segments: Vec<Segment>,
    size: u64,
    devices: Vec<Arc<dyn Blocks>>,
    /// Of the devices.
    places: Vec<Arc<dyn OnDisks>>,
    /// Of a device that has one.
    encryption: Encryption,
}

struct Segment {
    start: u64,
    end: u64,
    /// Bytes on one leg before the next one's turn.
    stripe: u64,
    /// Each a device and where it begins there.
    legs: Vec<(usize, u64)>,
}

impl Map for Logical {
    fn size(&self) -> u64 {
        self.size
    }

    fn devices(&self) -> &[Arc<dyn Blocks>] {
        &self.devices
    }

    fn place(&self, offset: u64, _wanted: u64) -> Result<(Place, u64)> {
        let number = self.segments.partition_point(|segment| segment.end <= offset);
        let beyond = || Error::bug(format!("a logical volume has no byte {offset}"));
        let segment = self.segments.get(number).ok_or_else(beyond)?;
        let (within, legs) = (offset - segment.start, segment.legs.len() as u64);
        let (stripe, inside) = (within / segment.stripe, within % segment.stripe);
        let (device, start) = segment.legs[bytes::index(stripe % legs)?];
        let place = Place::At { device, offset: start + stripe / legs * segment.stripe + inside };
        Ok((place, (segment.stripe - inside).min(segment.end - offset)))
    }
}

impl OnDisks for Logical {
    fn each(&self, range: Range<u64>, put: &mut dyn FnMut(usize, Range<u64>)) {
        let mut at = range.start;
        while at < range.end {
            let Ok((Place::At { device, offset }, length)) = self.place(at, range.end - at) else { return };
            let length = length.min(range.end - at);
            self.places[device].each(offset..offset + length, put);
            at += length;
        }
    }

    /// All of every segment that the range touches: what lies on one leg lies there in one piece.
    fn occupied(&self, range: Range<u64>, put: &mut dyn FnMut(usize, Range<u64>)) {
        let touched = |segment: &&Segment| segment.start < range.end && range.start < segment.end;
        for segment in self.segments.iter().filter(touched) {
            let length = (segment.end - segment.start) / segment.legs.len() as u64;
            for (device, start) in &segment.legs {
                self.places[*device].occupied(*start..*start + length, put);
            }
        }
    }
}
