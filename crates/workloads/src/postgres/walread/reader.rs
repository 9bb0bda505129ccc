//! From the bytes of a log to its records: pages and their headers, records that go on over pages.

use bytes::Buf as _;
use mainstay_core::{Code, Error, Result};

use super::super::lsn::Lsn;
use super::record::{HEADER, Record};

/// Bytes of a page. Servers may be built with others; nobody does.
const PAGE: usize = 8192;
const SHORT_HEADER: usize = 24;
const LONG_HEADER: usize = 40;
const FIRST_IS_REST: u16 = 0x01;
const IS_LONG: u16 = 0x02;
const FIRST_IS_OVERWRITTEN: u16 = 0x08;

/// The magic numbers of pages, and the major version each stands for.
const KNOWN: u16 = 0xd110;
const MAGICS: [(u16, u32); 7] =
    [(0xd101, 12), (0xd106, 13), (0xd10d, 14), (KNOWN, 15), (0xd113, 16), (0xd116, 17), (0xd118, 18)];

/// Reads a log that comes in pieces. Begins with the first record that begins in it.
#[derive(Debug, Default)]
pub struct WalReader {
    /// The page that is being gathered, and where it begins; the latter is known with the first byte.
    page: Vec<u8>,
    page_at: Option<u64>,
    /// A record that goes on, where it begins, and how much is to come.
    record: Vec<u8>,
    record_at: u64,
    rest: usize,
    /// Where the last record was.
    previous: Option<u64>,
    segment: u64,
    /// After a switch of segments nothing comes before this.
    resume: u64,
    /// Records are told apart from here on.
    in_step: bool,
    ended: bool,
}

/// Whoever is told of records.
type Each<'a> = dyn FnMut(&Record<'_>) -> Result<()> + 'a;

impl WalReader {
    /// `segment` is how many bytes a segment has.
    pub fn new(segment: u64) -> Self {
        Self { segment, ..Self::default() }
    }

    /// Takes the bytes from `at` on, and tells of the records that have come to their end.
    ///
    /// Errors: [`Code::Integrity`] for a log that is damaged; [`Code::Unsupported`] for one of another version; those of
    /// `each`. After one the reader is of no more use.
    pub fn push(&mut self, at: Lsn, mut bytes: &[u8], each: &mut Each<'_>) -> Result<()> {
        let mut at = at.0;
        if self.page_at.is_none() {
            // A page that is not there from its beginning says nothing.
            let skip = usize::try_from(at.wrapping_neg() % PAGE as u64).unwrap_or(0);
            let Some(rest) = bytes.get(skip..).filter(|rest| !rest.is_empty()) else { return Ok(()) };
            (bytes, at) = (rest, at + skip as u64);
            self.page_at = Some(at);
        }
        let expected = self.page_at.unwrap_or(at).wrapping_add(self.page.len() as u64);
        if expected != at {
            let what = format!("the log goes on at {} and not at {}", Lsn(at), Lsn(expected));
            return Err(Error::integrity(what));
        }
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at((PAGE - self.page.len()).min(bytes.len()));
            self.page.extend_from_slice(now);
            bytes = later;
            if self.page.len() == PAGE {
                let page = std::mem::take(&mut self.page);
                self.read_page(&page, each)?;
                self.page_at = self.page_at.map(|at| at + PAGE as u64);
                self.page = page;
                self.page.clear();
            }
        }
        Ok(())
    }

    /// Tells of the records in the page that has only begun. What of a record is missing then is not told of.
    pub fn finish(mut self, each: &mut Each<'_>) -> Result<()> {
        let page = std::mem::take(&mut self.page);
        if page.len() < SHORT_HEADER { Ok(()) } else { self.read_page(&page, each) }
    }

    fn read_page(&mut self, page: &[u8], each: &mut Each<'_>) -> Result<()> {
        let start = self.page_at.unwrap_or_default();
        if self.ended || start < self.resume {
            return Ok(());
        }
        let Some(header) = self.header(start, page)? else { return Ok(()) };
        let mut at = if header.info & IS_LONG != 0 { LONG_HEADER } else { SHORT_HEADER };
        if header.info & FIRST_IS_OVERWRITTEN != 0 {
            // The server crashed within that record, and wrote on from here.
            (self.rest, self.in_step) = (0, true);
            self.record.clear();
        }
        let goes_on = header.info & FIRST_IS_REST != 0;
        if self.rest > 0 {
            if !goes_on || header.rest != self.rest {
                return Err(broken(start, "does not go on with the record before it"));
            }
            let Some(after) = self.go_on(page, at, each)? else { return Ok(()) };
            at = after;
        } else if goes_on {
            if self.in_step {
                return Err(broken(start, "goes on with a record that had ended"));
            }
            at = at.saturating_add(aligned(header.rest));
            if at >= PAGE {
                return Ok(());
            }
        }
        self.in_step = true;
        self.records(start, page, at, each)
    }

    /// `None` for a page that was never written.
    fn header(&mut self, start: u64, page: &[u8]) -> Result<Option<PageHeader>> {
        let header = PageHeader::parse(page).ok_or_else(|| broken(start, "is cut short"))?;
        if header.magic == 0 {
            self.ended = true;
            return Ok(None);
        }
        if header.magic != KNOWN {
            return Err(match MAGICS.iter().find(|(magic, _)| *magic == header.magic) {
                Some((_, version)) => Error::new(
                    Code::Unsupported,
                    format!("the log is of PostgreSQL {version}, of which only its server reads the log"),
                )
                .hint(
                    "logs of version 15 can be searched; a record can be restored from any moment: shop@TIME",
                ),
                None => broken(start, "is no page of a log"),
            });
        }
        if header.address != start {
            return Err(broken(start, "is another page"));
        }
        if let Some((segment, block)) = header.sizes {
            if block as usize != PAGE || !segment.is_power_of_two() || segment < 1 << 20 {
                return Err(broken(start, "is of a server with other sizes of pages"));
            }
            self.segment = u64::from(segment);
        }
        Ok(Some(header))
    }

    /// Takes more of a record; where it ends in the page, when it does.
    fn go_on(&mut self, page: &[u8], at: usize, each: &mut Each<'_>) -> Result<Option<usize>> {
        let part = page.get(at..).unwrap_or_default();
        let part = part.get(..self.rest).unwrap_or(part);
        self.record.extend_from_slice(part);
        self.rest -= part.len();
        if self.rest > 0 {
            return Ok(None);
        }
        let record = std::mem::take(&mut self.record);
        self.tell(self.record_at, &record, each)?;
        self.record = record;
        self.record.clear();
        Ok(Some(at + aligned(part.len())))
    }

    fn records(&mut self, start: u64, page: &[u8], mut at: usize, each: &mut Each<'_>) -> Result<()> {
        loop {
            let place = start + at as u64;
            if place < self.resume {
                return Ok(());
            }
            let Some(left) = page.get(at..).filter(|left| left.len() >= 8) else { return Ok(()) };
            let length = left.first_chunk().map_or(0, |length| u32::from_le_bytes(*length));
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            if length == 0 {
                self.ended = true;
                return Ok(());
            }
            if length < HEADER {
                return Err(broken(place, "is no record"));
            }
            match left.get(..length) {
                Some(record) => {
                    self.tell(place, record, each)?;
                    at += aligned(length);
                }
                None => {
                    self.record.clear();
                    self.record.extend_from_slice(left);
                    (self.record_at, self.rest) = (place, length - left.len());
                    return Ok(());
                }
            }
        }
    }

    fn tell(&mut self, at: u64, bytes: &[u8], each: &mut Each<'_>) -> Result<()> {
        let record = Record::parse(Lsn(at), bytes)?;
        if self.previous.is_some_and(|previous| previous != record.previous.0) {
            return Err(broken(at, "does not follow the record before it"));
        }
        self.previous = Some(at);
        // The rest of the segment is not used.
        if record.is_switch()
            && let Some(segment) = at.checked_div(self.segment)
        {
            self.resume = (segment + 1) * self.segment;
        }
        each(&record)
    }
}

fn broken(at: u64, why: &str) -> Error {
    Error::integrity(format!("what is at {} of the log {why}", Lsn(at)))
}

/// Records begin at multiples of eight bytes.
fn aligned(length: usize) -> usize {
    length.saturating_add(7) & !7
}

struct PageHeader {
    magic: u16,
    info: u16,
    address: u64,
    /// Bytes that are still to come of a record that began earlier, with those in this page.
    rest: usize,
    /// Of a segment and of a page; in the first page of a segment.
    sizes: Option<(u32, u32)>,
}

impl PageHeader {
    fn parse(mut page: &[u8]) -> Option<Self> {
        let (magic, info) = (page.try_get_u16_le().ok()?, page.try_get_u16_le().ok()?);
        page.try_get_u32_le().ok()?;
        let address = page.try_get_u64_le().ok()?;
        let rest = usize::try_from(page.try_get_u32_le().ok()?).ok()?;
        page.try_get_u32_le().ok()?;
        let sizes = if info & IS_LONG != 0 {
            page.try_get_u64_le().ok()?;
            Some((page.try_get_u32_le().ok()?, page.try_get_u32_le().ok()?))
        } else {
            None
        };
        Some(Self { magic, info, address, rest, sizes })
    }
}
