//! Entries of directories: a short name for each, and a long one in the entries before it.

use mainstay_core::{Error, Kind, Result, Time};

use super::{DIRECTORY_MAX, Volume};
use crate::fs::bytes::Bytes as _;

const READ_ONLY: u8 = 0x01;
const LABEL: u8 = 0x08;
const DIRECTORY: u8 = 0x10;
const LONG_NAME: u8 = 0x0f;

/// The characters 128 to 255 of code page 437, in which short names are written where nobody chose another.
const HIGH_CHARACTERS: &str = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";

/// What a directory says of a file.
pub(super) struct Entry {
    pub(super) name: Vec<u8>,
    pub(super) attributes: u8,
    pub(super) cluster: u32,
    pub(super) size: u32,
    pub(super) modified: Time,
}

impl Entry {
    pub(super) fn parse(raw: &[u8]) -> Result<Self> {
        Ok(Self {
            name: short_name(raw.part(0, 11)?, raw.byte(12)?),
            attributes: raw.byte(11)?,
            cluster: u32::from(raw.le16(20)?) << 16 | u32::from(raw.le16(26)?),
            size: raw.le32(28)?,
            modified: moment(raw.le16(24)?, raw.le16(22)?),
        })
    }

    pub(super) fn is_directory(&self) -> bool {
        self.attributes & DIRECTORY != 0
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.attributes & READ_ONLY != 0
    }

    pub(super) fn kind(&self) -> Kind {
        if self.is_directory() { Kind::Directory } else { Kind::File }
    }
}

/// The parts of a long name that were seen; they come last part first.
#[derive(Default)]
struct LongName {
    units: Vec<u16>,
    checksum: u8,
    /// The number of the part that must come next; 0 when all are there.
    wanted: u8,
    /// Where the first of them is in the directory.
    start: u64,
}

impl Volume {
    /// Shows the entries of a directory from an offset on, each with its own offset and its place on the volume, until
    /// `each` says no; then that entry is the next. Returns where to go on.
    pub(super) fn scan(
        &self,
        first: u32,
        from: u64,
        each: &mut dyn FnMut(u64, &Entry, u64) -> Result<bool>,
    ) -> Result<Option<u64>> {
        let mut long: Option<LongName> = None;
        let mut parts = Parts::new(self, first);
        while let Some((offset, place, bytes)) = parts.next()? {
            for (index, raw) in bytes.chunks_exact(32).enumerate() {
                let at = offset + 32 * index as u64;
                match (raw[0], raw[11]) {
                    (0, _) => return Ok(None),
                    (0xe5, _) => long = None,
                    (_, attributes) if attributes & 0x3f == LONG_NAME => {
                        long = LongName::push(long.take(), raw, at)?;
                    }
                    (_, attributes) if attributes & LABEL != 0 => long = None,
                    (b'.', _) if matches!(&raw[..11], b".          " | b"..         ") => long = None,
                    _ => {
                        let mut entry = Entry::parse(raw)?;
                        let name = long.take().filter(|long| long.belongs_to(&raw[..11]));
                        let start = name.as_ref().map_or(at, |name| name.start);
                        if let Some(name) = name {
                            entry.name = name.text();
                        }
                        if self.width != super::Width::ThirtyTwo {
                            entry.cluster &= 0xffff;
                        }
                        if start >= from && !each(start, &entry, place + 32 * index as u64)? {
                            return Ok(Some(start));
                        }
                    }
                }
            }
        }
        Ok(None)
    }
}

/// The parts of a directory as they lie on the volume.
struct Parts<'a> {
    volume: &'a Volume,
    /// The next cluster; `None` for a root directory with a fixed place.
    cluster: Option<u32>,
    offset: u64,
}

impl<'a> Parts<'a> {
    fn new(volume: &'a Volume, first: u32) -> Self {
        let fixed = first == 0 && !volume.root.is_empty();
        Self { volume, cluster: (!fixed).then_some(first), offset: 0 }
    }

    /// Offset within the directory, place on the volume, and bytes.
    fn next(&mut self) -> Result<Option<(u64, u64, Vec<u8>)>> {
        let offset = self.offset;
        let (place, length) = match self.cluster {
            None if offset > 0 => return Ok(None),
            None => (self.volume.root.start, self.volume.root.end - self.volume.root.start),
            Some(cluster) if self.volume.is_cluster(cluster) => {
                self.cluster = Some(self.volume.next(cluster)?);
                (self.volume.place(cluster), self.volume.cluster_size)
            }
            Some(_) if offset == 0 => {
                return Err(Error::integrity("a directory of the FAT file system lies nowhere"));
            }
            Some(_) => return Ok(None),
        };
        if offset >= DIRECTORY_MAX {
            return Err(Error::integrity("a directory of the FAT file system goes on without end"));
        }
        self.offset += length;
        let bytes = self.volume.pages.take(place, usize::try_from(length).unwrap_or(0))?;
        Ok(Some((offset, place, bytes)))
    }
}

impl LongName {
    /// The name with one part more; `None` when the part does not fit those before it.
    fn push(before: Option<Self>, raw: &[u8], at: u64) -> Result<Option<Self>> {
        /// Set on the part that comes first, which is the end of the name.
        const FIRST: u8 = 0x40;
        const PARTS_MAX: u8 = 20;
        let (number, checksum) = (raw.byte(0)?, raw.byte(13)?);
        let order = number & 0x1f;
        if order == 0 || order > PARTS_MAX {
            return Ok(None);
        }
        let before = if number & FIRST != 0 {
            Some(Self { units: Vec::new(), checksum, wanted: order, start: at })
        } else {
            before.filter(|name| name.wanted == order && name.checksum == checksum)
        };
        let Some(mut name) = before else { return Ok(None) };
        let places = [1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30];
        let mut part = places.iter().map(|&place| raw.le16(place)).collect::<Result<Vec<u16>>>()?;
        part.append(&mut name.units);
        name.units = part;
        name.wanted -= 1;
        Ok(Some(name))
    }

    /// Whether it is whole and was written together with this short name.
    fn belongs_to(&self, short: &[u8]) -> bool {
        let sum = short.iter().fold(0u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
        self.wanted == 0 && sum == self.checksum
    }

    fn text(&self) -> Vec<u8> {
        let end = self.units.iter().position(|&unit| unit == 0).unwrap_or(self.units.len());
        crate::fs::bytes::from_utf16(self.units[..end].iter().copied())
    }
}

/// The eleven bytes of a short name with its dot; flags say which part is in lower case.
fn short_name(raw: &[u8], flags: u8) -> Vec<u8> {
    const LOWER_BASE: u8 = 0x08;
    const LOWER_EXTENSION: u8 = 0x10;
    let part = |bytes: &[u8], lower: bool| -> String {
        let end = bytes.iter().rposition(|&byte| byte != b' ').map_or(0, |last| last + 1);
        let text = bytes[..end]
            .iter()
            .enumerate()
            .map(|(index, &byte)| character(byte, index == 0 && bytes.len() == 8));
        if lower { text.map(|letter| letter.to_ascii_lowercase()).collect() } else { text.collect() }
    };
    let (base, extension) = raw.split_at(8.min(raw.len()));
    let mut name = part(base, flags & LOWER_BASE != 0);
    let extension = part(extension, flags & LOWER_EXTENSION != 0);
    if !extension.is_empty() {
        name.push('.');
        name.push_str(&extension);
    }
    name.into_bytes()
}

fn character(byte: u8, first: bool) -> char {
    // A name that really begins with the mark of deleted ones.
    let byte = if first && byte == 0x05 { 0xe5 } else { byte };
    match byte {
        0..128 => char::from(byte),
        high => HIGH_CHARACTERS.chars().nth(usize::from(high - 128)).unwrap_or('\u{fffd}'),
    }
}

/// Local time of the machine that wrote it; nobody knows where that was, so it counts as UTC.
fn moment(date: u16, time: u16) -> Time {
    let (year, month, day) =
        (1980 + i64::from(date >> 9), i64::from(date >> 5 & 0xf), i64::from(date & 0x1f));
    let seconds =
        i64::from(time >> 11) * 3600 + i64::from(time >> 5 & 0x3f) * 60 + i64::from(time & 0x1f) * 2;
    // Days since 1970 by counting years from March on, so that the leap day is the last of a year.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1 - 719_468;
    Time::from_seconds(days * 86_400 + seconds)
}

#[cfg(test)]
mod tests {
    use super::{HIGH_CHARACTERS, moment, short_name};

    #[test]
    fn moments_are_counted_from_1980_to_2107() {
        let at = |year: u16, month: u16, day: u16, time: u16| {
            moment((year - 1980) << 9 | month << 5 | day, time).seconds()
        };
        assert_eq!(at(1980, 1, 1, 0), 315_532_800);
        assert_eq!(at(2000, 2, 29, 0), 951_782_400);
        assert_eq!(at(2026, 11, 23, 3 << 11 | 30 << 5 | 1), 1_795_404_602);
        assert_eq!(at(2107, 12, 31, 0), 4_354_732_800);
    }

    #[test]
    fn short_names_are_shown_with_their_dot_and_case() {
        assert_eq!(HIGH_CHARACTERS.chars().count(), 128);
        assert_eq!(short_name(b"README  TXT", 0), b"README.TXT");
        assert_eq!(short_name(b"README  TXT", 0x18), b"readme.txt");
        assert_eq!(short_name(b"A B        ", 0), b"A B");
        assert_eq!(short_name(b"\x05\x81       ", 0), "\u{3c3}\u{fc}".as_bytes());
    }
}
