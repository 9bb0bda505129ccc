//! The bytes of a write-ahead log: <https://sqlite.org/fileformat2.html#walformat>. All numbers are big-endian.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use mainstay_core::{Change, Error, Result};

use super::place::Place;

pub(super) const HEADER_BYTES: usize = 32;
const FRAME_HEADER_BYTES: usize = 24;
/// Followed by one bit: whether sums are over big-endian words.
const MAGIC: u32 = 0x377f_0682;
const PAGE_BYTES: std::ops::RangeInclusive<u32> = 512..=65536;

/// What a log begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) bytes: [u8; HEADER_BYTES],
    pub(super) page_bytes: u32,
    pub(super) salts: [u32; 2],
    pub(super) sums: [u32; 2],
    big_endian: bool,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>());
    bytes.map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

/// The running sums of SQLite, over pairs of words.
fn add([mut one, mut other]: [u32; 2], bytes: &[u8], big_endian: bool) -> [u32; 2] {
    let number =
        |bytes: [u8; 4]| if big_endian { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) };
    for pair in bytes.as_chunks::<8>().0 {
        let [a, b, c, d, e, f, g, h] = *pair;
        one = one.wrapping_add(number([a, b, c, d])).wrapping_add(other);
        other = other.wrapping_add(number([e, f, g, h])).wrapping_add(one);
    }
    [one, other]
}

impl Header {
    /// `None` for what is no header, or one that is not written out yet.
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let magic = word(bytes, 0);
        let big_endian = magic & 1 == 1;
        let sums = add([0, 0], bytes.get(..24)?, big_endian);
        let page_bytes = word(bytes, 8);
        let is_one = magic & !1 == MAGIC
            && PAGE_BYTES.contains(&page_bytes)
            && page_bytes.is_power_of_two()
            && sums == [word(bytes, 24), word(bytes, 28)];
        let salts = [word(bytes, 16), word(bytes, 20)];
        is_one.then_some(Self { bytes: *bytes, page_bytes, salts, sums, big_endian })
    }

    /// `None` for an empty log.
    pub(super) fn read(file: &File) -> Result<Option<Self>> {
        let mut bytes = [0; HEADER_BYTES];
        match file.read_exact_at(&mut bytes, 0) {
            Ok(()) => Ok(Self::parse(&bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(Error::io("cannot read the log", error)),
        }
    }

    pub(super) fn frame_bytes(&self) -> usize {
        FRAME_HEADER_BYTES + self.page_bytes as usize
    }

    fn offset(&self, frame: u32) -> u64 {
        HEADER_BYTES as u64 + u64::from(frame) * self.frame_bytes() as u64
    }

    pub(super) fn start(&self, generation: u64) -> Place {
        Place { generation, salts: self.salts, frame: 0, sums: self.sums }
    }

    /// The place behind so many frames, if they are of this generation.
    pub(super) fn place(&self, file: &File, frames: u32) -> Option<Place> {
        let Some(before) = frames.checked_sub(1) else { return Some(self.start(0)) };
        let mut header = [0; FRAME_HEADER_BYTES];
        file.read_exact_at(&mut header, self.offset(before)).ok()?;
        let frame = Frame::of(&header).filter(|frame| frame.salts == self.salts)?;
        Some(Place { frame: frames, sums: frame.sums, ..self.start(0) })
    }

    /// Whether what is stored at a place is still what was seen there.
    pub(super) fn holds(&self, file: &File, place: &Place) -> bool {
        place.salts == self.salts
            && self.place(file, place.frame).is_some_and(|stored| stored.sums == place.sums)
    }

    /// The sums after a frame, if it belongs here.
    fn check(&self, sums: [u32; 2], frame: &[u8]) -> Option<[u32; 2]> {
        let header = Frame::of(frame)?;
        let sums = add(sums, frame.get(..8)?, self.big_endian);
        let sums = add(sums, frame.get(FRAME_HEADER_BYTES..)?, self.big_endian);
        (header.salts == self.salts && header.sums == sums && header.page != 0).then_some(sums)
    }

    /// Reads on from a place. Yields the ends of pieces of whole frames, none longer than a change may be, up to the last
    /// commit that is there; stops at the first commit behind `enough` bytes.
    pub(super) fn scan(&self, file: &File, from: &Place, enough: usize) -> Result<Vec<Place>> {
        let per_piece = ((Change::BYTES_MAX - HEADER_BYTES) / self.frame_bytes()).max(1) as u32;
        let mut frame = vec![0; self.frame_bytes()];
        let (mut at, mut ends) = (*from, Vec::new());
        // The last commit, and how many pieces were full before it.
        let mut commit: Option<(Place, usize)> = None;
        while (at.frame - from.frame) as usize * frame.len() < enough
            || commit.is_none_or(|(end, _)| end != at)
        {
            match file.read_exact_at(&mut frame, self.offset(at.frame)) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => break,
                Err(error) => return Err(Error::io("cannot read the log", error)),
            }
            let Some((sums, next)) = self.check(at.sums, &frame).zip(at.frame.checked_add(1)) else { break };
            at = Place { frame: next, sums, ..at };
            if at.frame - ends.last().unwrap_or(from).frame >= per_piece {
                ends.push(at);
            }
            if Frame::of(&frame).is_some_and(|frame| frame.pages_after != 0) {
                commit = Some((at, ends.len()));
            }
        }
        let (end, full) = commit.unwrap_or((*from, 0));
        ends.truncate(full);
        if end != *ends.last().unwrap_or(from) {
            ends.push(end);
        }
        Ok(ends)
    }

    /// The bytes between two places, which must be what [`Header::scan`] saw. `None` when they have changed since.
    pub(super) fn piece(&self, file: &File, from: &Place, to: &Place) -> Result<Option<Vec<u8>>> {
        let mut bytes = vec![0; (to.frame - from.frame) as usize * self.frame_bytes()];
        if let Err(error) = file.read_exact_at(&mut bytes, self.offset(from.frame)) {
            return match error.kind() {
                std::io::ErrorKind::UnexpectedEof => Ok(None),
                _ => Err(Error::io("cannot read the log", error)),
            };
        }
        let mut frames = bytes.chunks_exact(self.frame_bytes());
        let sums = frames.try_fold(from.sums, |sums, frame| self.check(sums, frame));
        Ok((sums == Some(to.sums)).then_some(bytes))
    }
}

struct Frame {
    page: u32,
    /// Pages of the database after this commit; 0 for a frame that commits nothing.
    pages_after: u32,
    salts: [u32; 2],
    sums: [u32; 2],
}

impl Frame {
    fn of(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; FRAME_HEADER_BYTES] = bytes.first_chunk()?;
        Some(Self {
            page: word(bytes, 0),
            pages_after: word(bytes, 4),
            salts: [word(bytes, 8), word(bytes, 12)],
            sums: [word(bytes, 16), word(bytes, 20)],
        })
    }
}

/// Whether a change of a journal begins a generation; its bytes begin with the header of the log then.
pub fn changes_start(start: &Place, end: &Place) -> bool {
    start.frame == 0 || start.generation != end.generation || start.salts != end.salts
}

/// Puts frames of a log into the file of a database, as a checkpoint would.
pub struct Replay<'a> {
    file: &'a File,
    header: Option<Header>,
    pages: Option<u32>,
    page_bytes: u32,
}

impl<'a> Replay<'a> {
    /// `page_bytes`: of the database, which no log of it may contradict.
    pub fn new(file: &'a File, page_bytes: u32) -> Self {
        Self { file, header: None, pages: None, page_bytes }
    }

    /// A change of a journal, from `start` to `end`; of its frames those behind `after` and up to `until`, as numbers
    /// within the generation. The end of the last commit among them.
    ///
    /// Errors: [`mainstay_core::Code::Integrity`] for bytes that are no such change.
    pub fn change(&mut self, change: &Change, after: u32, until: u32) -> Result<Option<Place>> {
        let malformed = || Error::integrity("a change of a log is malformed");
        let start = Place::from_position(&change.start).ok_or_else(malformed)?;
        let end = Place::from_position(&change.end).ok_or_else(malformed)?;
        let (mut at, mut bytes) = (start, change.bytes.as_slice());
        if changes_start(&start, &end) {
            let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or_else(malformed)?;
            let header = Header::parse(header).ok_or_else(malformed)?;
            (self.header, bytes, at) = (Some(header), rest, header.start(end.generation));
        }
        let page_bytes = self.page_bytes;
        if !bytes.len().is_multiple_of(FRAME_HEADER_BYTES + page_bytes as usize)
            || self.header.is_some_and(|header| header.page_bytes != page_bytes)
        {
            return Err(malformed());
        }
        let mut committed = None;
        for frame in bytes.chunks_exact(FRAME_HEADER_BYTES + page_bytes as usize) {
            let header = Frame::of(frame).ok_or_else(malformed)?;
            at.frame = at.frame.checked_add(1).ok_or_else(malformed)?;
            at.sums = header.sums;
            if header.salts != end.salts {
                return Err(malformed());
            }
            if at.frame > until {
                break;
            }
            if at.frame > after {
                self.page(header.page, frame.get(FRAME_HEADER_BYTES..).unwrap_or_default())?;
            }
            if header.pages_after != 0 {
                committed = Some(at);
                if at.frame > after {
                    self.pages = Some(header.pages_after);
                }
            }
        }
        Ok(committed)
    }

    fn page(&self, page: u32, content: &[u8]) -> Result<()> {
        let before = page.checked_sub(1).ok_or_else(|| Error::integrity("a log names a page 0"))?;
        let at = u64::from(before) * u64::from(self.page_bytes);
        self.file.write_all_at(content, at).map_err(|error| Error::io("cannot write the database", error))
    }

    /// Gives the file the length that the last commit said, and makes it durable.
    pub fn finish(self) -> Result<()> {
        let length = self.pages.map(|pages| u64::from(pages) * u64::from(self.page_bytes));
        let sized = length.map_or(Ok(()), |length| self.file.set_len(length));
        sized
            .and_then(|()| self.file.sync_all())
            .map_err(|error| Error::io("cannot write the database", error))
    }
}

/// The last commit in a change at or before frame `until`, without putting anything anywhere.
pub fn last_commit(change: &Change, until: u32) -> Option<Place> {
    let (start, end) = (Place::from_position(&change.start)?, Place::from_position(&change.end)?);
    let (mut at, mut bytes) = (start, change.bytes.as_slice());
    if changes_start(&start, &end) {
        let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        (at, bytes) = (Header::parse(header)?.start(end.generation), rest);
    }
    let frames = end.frame.checked_sub(at.frame).filter(|frames| *frames > 0)?;
    let mut committed = None;
    for frame in bytes.chunks_exact((bytes.len() / frames as usize).max(1)) {
        let header = Frame::of(frame)?;
        at = Place { frame: at.frame + 1, sums: header.sums, ..at };
        if at.frame > until {
            break;
        }
        if header.pages_after != 0 {
            committed = Some(at);
        }
    }
    committed
}
