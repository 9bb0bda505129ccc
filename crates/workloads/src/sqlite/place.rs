//! Places in the log of a database.

use std::fmt;
use std::str::FromStr;

use mainstay_core::Position;
use serde::{Deserialize, Serialize};

/// The end of a frame in a write-ahead log. SQLite begins its log again and again from the front; each time is a
/// generation, which a journal numbers in their order. A place proves itself: the sums are over all of the generation up
/// to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    pub generation: u64,
    /// Of the log's header; zeros where the log was empty.
    pub salts: [u32; 2],
    /// Frames of the generation up to here.
    pub frame: u32,
    pub sums: [u32; 2],
}

const BYTES: usize = 28;

impl Place {
    /// Positions sort as the log does.
    pub fn position(&self) -> Position {
        let mut bytes = self.generation.to_be_bytes().to_vec();
        for word in [self.salts[0], self.salts[1], self.frame, self.sums[0], self.sums[1]] {
            bytes.extend_from_slice(&word.to_be_bytes());
        }
        Position(bytes)
    }

    /// `None` for what no place of a log is.
    pub fn from_position(position: &Position) -> Option<Self> {
        let bytes: &[u8; BYTES] = position.0.as_slice().try_into().ok()?;
        let (generation, rest) = bytes.split_first_chunk::<8>()?;
        let words = rest.as_chunks::<4>().0;
        let word = |index: usize| words.get(index).map_or(0, |word| u32::from_be_bytes(*word));
        Some(Self {
            generation: u64::from_be_bytes(*generation),
            salts: [word(0), word(1)],
            frame: word(2),
            sums: [word(3), word(4)],
        })
    }
}

impl fmt::Display for Place {
    /// `GENERATION:FRAME`, which names a place within one journal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.generation, self.frame)
    }
}

impl FromStr for Place {
    type Err = ();

    /// Of the text only generation and frame are known.
    fn from_str(text: &str) -> Result<Self, ()> {
        let (generation, frame) = text.split_once(':').ok_or(())?;
        let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then_some(()).ok_or(());
        number(generation).and(number(frame))?;
        let generation = generation.parse().map_err(|_number| ())?;
        Ok(Self { generation, frame: frame.parse().map_err(|_number| ())?, ..Self::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::Place;

    #[test]
    fn places_round_trip_and_sort_as_the_log_does() {
        let place = Place { generation: 3, salts: [7, 8], frame: 427, sums: [9, 10] };
        assert_eq!(Place::from_position(&place.position()), Some(place));
        let later = [
            Place { frame: 428, sums: [0, 0], ..place },
            Place { generation: 4, salts: [0, 0], frame: 0, sums: [0, 0] },
        ];
        assert!(later.iter().all(|later| later.position() > place.position()));
        let named: Place = "3:427".parse().unwrap();
        assert_eq!((named.generation, named.frame, place.to_string().as_str()), (3, 427, "3:427"));
        for bad in ["", "3", "3:", ":3", "+3:1", "3:99999999999"] {
            bad.parse::<Place>().unwrap_err();
        }
    }
}
