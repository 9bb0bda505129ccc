//! Places in a write-ahead log.

use std::fmt;
use std::str::FromStr;

use mainstay_core::Position;

/// A byte in the write-ahead log of a cluster, counted from its beginning; written as PostgreSQL does: `1A/2B3C4D5E`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// Positions sort as the log does.
    pub fn position(self) -> Position {
        Position(self.0.to_be_bytes().to_vec())
    }

    /// `None` for what no log position is.
    pub fn from_position(position: &Position) -> Option<Self> {
        Some(Self(u64::from_be_bytes(position.0.as_slice().try_into().ok()?)))
    }

    /// The beginning of the segment of `segment` bytes that holds this byte.
    #[must_use]
    pub fn segment_start(self, segment: u64) -> Self {
        Self(self.0 - self.0.checked_rem(segment).unwrap_or(0))
    }

    /// The name of the file that holds this byte: timeline, then the number of the segment in two parts.
    pub fn file_name(self, timeline: u32, segment: u64) -> String {
        let number = self.0.checked_div(segment).unwrap_or(0);
        let per_log = (1_u64 << 32).checked_div(segment).unwrap_or(1).max(1);
        format!("{timeline:08X}{:08X}{:08X}", number / per_log, number % per_log)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

impl FromStr for Lsn {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (high, low) = text.split_once('/').ok_or(())?;
        let part = |text: &str| match text.len() {
            1..=8 if text.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                u64::from_str_radix(text, 16).map_err(|_digits| ())
            }
            _ => Err(()),
        };
        Ok(Self(part(high)? << 32 | part(low)?))
    }
}

#[cfg(test)]
mod tests {
    use super::Lsn;

    #[test]
    fn places_are_written_as_the_server_writes_them() {
        for text in ["0/0", "0/1", "1A/2B3C4D5E", "FFFFFFFF/FFFFFFFF"] {
            assert_eq!(text.parse::<Lsn>().unwrap().to_string(), text);
        }
        for bad in ["", "/", "0", "0/", "/0", "0/100000000", "x/0", "0/+1", "0/0/0"] {
            assert_eq!(bad.parse::<Lsn>(), Err(()), "{bad}");
        }
        let lsn: Lsn = "1A/2B3C4D5E".parse().unwrap();
        assert_eq!(Lsn::from_position(&lsn.position()), Some(lsn));
    }

    #[test]
    fn segments_are_named_as_the_server_names_them_whatever_their_size() {
        let lsn: Lsn = "1A/2B3C4D5E".parse().unwrap();
        for (segment, name, start) in [
            (16 << 20, "000000020000001A0000002B", "1A/2B000000"),
            (64 << 20, "000000020000001A0000000A", "1A/28000000"),
            (1 << 20, "000000020000001A000002B3", "1A/2B300000"),
            (1 << 30, "000000020000001A00000000", "1A/0"),
        ] {
            assert_eq!(lsn.file_name(2, segment), name);
            assert_eq!(lsn.segment_start(segment).to_string(), start);
        }
    }
}
