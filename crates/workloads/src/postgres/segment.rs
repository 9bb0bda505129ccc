//! Files of the write-ahead log: their names, and what stands at their beginning (`XLogLongPageHeaderData` in PostgreSQL's
//! `src/include/access/xlog_internal.h`).

use mainstay_core::{Error, Result};

use super::lsn::Lsn;

const HEAD_BYTES: usize = 40;
/// The first page of a segment says so.
const LONG: u16 = 2;

/// Such as `000000010000000000000042`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentName {
    pub timeline: u32,
    high: u32,
    low: u32,
}

impl SegmentName {
    /// `None` for what no whole segment is called.
    pub fn parse(name: &str) -> Option<Self> {
        let digit = |byte: u8| byte.is_ascii_digit() || (b'A'..=b'F').contains(&byte);
        if name.len() != 24 || !name.bytes().all(digit) {
            return None;
        }
        let part = |at: usize| u32::from_str_radix(name.get(at..at + 8)?, 16).ok();
        Some(Self { timeline: part(0)?, high: part(8)?, low: part(16)? })
    }

    /// Where it starts, when segments have `segment` bytes.
    #[must_use]
    pub fn start(self, segment: u64) -> Lsn {
        Lsn((u64::from(self.high) << 32).wrapping_add(u64::from(self.low).wrapping_mul(segment)))
    }
}

/// What a segment says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentHead {
    /// The cluster's number.
    pub system: String,
    pub segment_bytes: u64,
    pub start: Lsn,
}

impl SegmentHead {
    /// Errors: [`mainstay_core::Code::Integrity`] for what is no beginning of a segment.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let head = bytes
            .first_chunk::<HEAD_BYTES>()
            .ok_or_else(|| Error::integrity("a segment of the log ends in its header"))?;
        let number = |at: usize, length: usize| {
            let bytes = head.get(at..at + length).unwrap_or_default();
            bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
        };
        let head = Self {
            system: number(24, 8).to_string(),
            segment_bytes: number(32, 4),
            start: Lsn(number(8, 8)),
        };
        let size = head.segment_bytes;
        let is_whole = number(2, 2) & u64::from(LONG) != 0 && size.is_power_of_two() && size >= 1 << 20;
        if is_whole && head.start.segment_start(size) == head.start {
            return Ok(head);
        }
        Err(Error::integrity("what was pushed is no segment of a write-ahead log"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Lsn, SegmentHead, SegmentName};

    proptest! {
        #[test]
        fn hostile_segments_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..60), name in ".{0,30}") {
            let _either = SegmentHead::parse(&bytes);
            let _either = SegmentName::parse(&name).map(|name| name.start(1 << 20));
        }
    }

    #[test]
    fn names_are_those_that_places_have() {
        for segment in [1 << 20, 16 << 20, 64 << 20, 1 << 30] {
            let at = Lsn(0x1a_2b3c_4d5e).segment_start(segment);
            let name = SegmentName::parse(&at.file_name(7, segment)).unwrap();
            assert_eq!((name.timeline, name.start(segment)), (7, at));
        }
        for bad in ["00000002.history", "000000010000000000000042.partial", "00000001000000000000004g", ""] {
            assert_eq!(SegmentName::parse(bad), None, "{bad}");
        }
    }
}
