//! Binary logs: places in them, and the frame of their events.
//! <https://mariadb.com/kb/en/2-binlog-event-header/>. Numbers are little-endian.

use std::fmt;
use std::str::FromStr;

use mainstay_core::{Change, Position, Time};

pub(super) const HEADER_BYTES: usize = 19;
/// What every file begins with, and nobody sends.
pub const FILE_START: &[u8; 4] = b"\xfebin";

pub(super) const ROTATE: u8 = 4;
pub(super) const DESCRIPTION: u8 = 15;
pub(super) const HEARTBEAT: u8 = 27;
const GTID: u8 = 162;
/// What follows is encrypted, and is sent decrypted: as other bytes than the file holds.
pub(super) const ENCRYPTION: u8 = 164;
pub(super) const ARTIFICIAL: u16 = 0x20;

/// A place in the log of a server: before the byte `offset` of a file. A server that is told to forget its logs numbers
/// its files from one again; that begins another epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub epoch: u32,
    /// The number at the end of the file's name.
    pub file: u32,
    pub offset: u64,
}

impl Place {
    /// Positions sort as the log does.
    pub fn position(&self) -> Position {
        let (epoch, file) = (self.epoch.to_be_bytes(), self.file.to_be_bytes());
        Position([epoch.as_slice(), &file, &self.offset.to_be_bytes()].concat())
    }

    /// `None` for what no place of a log is.
    pub fn from_position(position: &Position) -> Option<Self> {
        let (epoch, rest) = position.0.split_first_chunk::<4>()?;
        let (file, offset) = rest.split_first_chunk::<4>()?;
        Some(Self {
            epoch: u32::from_be_bytes(*epoch),
            file: u32::from_be_bytes(*file),
            offset: u64::from_be_bytes(offset.try_into().ok()?),
        })
    }
}

impl fmt::Display for Place {
    /// `FILE:OFFSET`, the file by its number.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:06}:{}", self.file, self.offset)
    }
}

/// A file of a log by its name: what it begins with, and its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFile {
    pub base: String,
    pub number: u32,
}

impl FromStr for LogFile {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (base, number) = text.rsplit_once('.').ok_or(())?;
        let is_number = number.len() >= 6 && number.bytes().all(|byte| byte.is_ascii_digit());
        let is_base = !base.is_empty() && !base.contains(['/', '\0']);
        let number = number.parse().map_err(|_number| ())?;
        (is_number && is_base).then(|| Self { base: base.to_owned(), number }).ok_or(())
    }
}

impl fmt::Display for LogFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06}", self.base, self.number)
    }
}

/// A transaction by its name: domain, server, number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gtid {
    pub domain: u32,
    pub server: u32,
    pub sequence: u64,
}

impl fmt::Display for Gtid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.domain, self.server, self.sequence)
    }
}

impl FromStr for Gtid {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split('-').map(|part| part.parse::<u64>().map_err(|_number| ()));
        let (Some(domain), Some(server), Some(sequence), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(());
        };
        let small = |number: u64| u32::try_from(number).map_err(|_number| ());
        Ok(Self { domain: small(domain?)?, server: small(server?)?, sequence: sequence? })
    }
}

/// An event of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event<'a> {
    /// In seconds since 1970; 0 for none.
    pub seconds: u32,
    pub kind: u8,
    pub server: u32,
    /// Where it ends in its file, the lower 32 bits.
    pub end: u32,
    pub flags: u16,
    /// All of it, with the header.
    pub bytes: &'a [u8],
}

impl<'a> Event<'a> {
    /// The event at the front; `None` when it is not all there, or its length makes no sense.
    pub fn first(bytes: &'a [u8]) -> Option<Self> {
        let header: &[u8; HEADER_BYTES] = bytes.first_chunk()?;
        let word = |at: usize| {
            let part = header.get(at..).and_then(|rest| rest.first_chunk::<4>());
            part.map_or(0, |part| u32::from_le_bytes(*part))
        };
        let length = word(9) as usize;
        if length < HEADER_BYTES {
            return None;
        }
        Some(Self {
            seconds: word(0),
            kind: header[4],
            server: word(5),
            end: word(13),
            flags: u16::from_le_bytes([header[17], header[18]]),
            bytes: bytes.get(..length)?,
        })
    }

    pub fn time(&self) -> Option<Time> {
        (self.seconds != 0).then(|| Time::from_seconds(self.seconds.into()))
    }

    fn body(&self) -> &'a [u8] {
        self.bytes.get(HEADER_BYTES..).unwrap_or_default()
    }

    /// The name of the transaction that begins here, if one does.
    pub fn gtid(&self) -> Option<Gtid> {
        let (sequence, rest) = self.body().split_first_chunk::<8>().filter(|_| self.kind == GTID)?;
        let domain = u32::from_le_bytes(*rest.first_chunk()?);
        Some(Gtid { domain, server: self.server, sequence: u64::from_le_bytes(*sequence) })
    }

    /// The file that follows, for an event that says so; `has_sums` when a checksum ends it.
    pub(super) fn next_file(&self, has_sums: bool) -> Option<LogFile> {
        let name = self.body().get(8..).filter(|_| self.kind == ROTATE)?;
        let name = name.get(..name.len().checked_sub(if has_sums { 4 } else { 0 })?)?;
        std::str::from_utf8(name).ok()?.parse().ok()
    }

    /// Whether events from here on end with a checksum, as a description says: its last byte before its own checksum.
    pub(super) fn has_sums(&self) -> bool {
        self.bytes.len().checked_sub(5).and_then(|at| self.bytes.get(at)) == Some(&1)
    }

    /// Whether the checksum at its end is right.
    pub(super) fn is_sound(&self) -> bool {
        let Some((content, sum)) = self.bytes.split_last_chunk::<4>() else { return false };
        crc32(content) == u32::from_le_bytes(*sum)
    }
}

/// Where the bytes of a change of a journal belong.
pub fn log_bytes(change: &Change) -> Option<Place> {
    let (start, end) = (Place::from_position(&change.start)?, Place::from_position(&change.end)?);
    if (start.epoch, start.file) == (end.epoch, end.file) {
        return Some(start);
    }
    Some(Place { offset: FILE_START.len() as u64, ..end })
}

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut sum, mut bit) = (byte as u32, 0);
        while bit < 8 {
            sum = if sum & 1 == 1 { sum >> 1 ^ 0xedb8_8320 } else { sum >> 1 };
            bit += 1;
        }
        table[byte] = sum;
        byte += 1;
    }
    table
};

/// The checksum of Ethernet and of zlib, as `sum` so far goes on.
pub(super) fn crc32_more(sum: u32, bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!sum, |sum, byte| sum >> 8 ^ TABLE[((sum ^ u32::from(*byte)) & 0xff) as usize])
}

fn crc32(bytes: &[u8]) -> u32 {
    crc32_more(0, bytes)
}

#[cfg(test)]
mod tests {
    use super::{Event, Gtid, LogFile, Place, crc32};

    #[test]
    fn places_files_and_transactions_are_written_as_the_server_writes_them() {
        let place = Place { epoch: 1, file: 34, offset: 1588 };
        assert_eq!(Place::from_position(&place.position()), Some(place));
        assert!(Place { file: 35, offset: 4, ..place }.position() > place.position());
        let file: LogFile = "mysql-bin.000034".parse().unwrap();
        assert_eq!(
            (file.base.as_str(), file.number, file.to_string().as_str()),
            ("mysql-bin", 34, "mysql-bin.000034")
        );
        for bad in ["mysql-bin", "mysql-bin.34", ".000034", "../x.000001", "x.00000a"] {
            bad.parse::<LogFile>().unwrap_err();
        }
        assert_eq!("0-7-123".parse::<Gtid>().unwrap().to_string(), "0-7-123");
        for bad in ["", "0-7", "0-7-1-2", "a-b-c", "0-99999999999-1"] {
            bad.parse::<Gtid>().unwrap_err();
        }
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn hostile_bytes_are_no_events_and_nothing_worse() {
        let mut bytes = [0_u8; 64];
        for length in [0_u32, 1, 18, 19, 20, 64, 65, u32::MAX] {
            bytes[9..13].copy_from_slice(&length.to_le_bytes());
            for kind in 0..=255 {
                bytes[4] = kind;
                for cut in 0..bytes.len() {
                    if let Some(event) = Event::first(&bytes[..cut]) {
                        let _read = (event.gtid(), event.next_file(true), event.has_sums(), event.is_sound());
                    }
                }
            }
        }
    }
}
