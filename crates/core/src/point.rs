//! Names of the things a repository keeps, and what a run reports about them.

use std::fmt;
use std::str::FromStr;

use crate::Time;

/// Sixteen bytes of identity, written as 32 hexadecimal digits. Random unless its type says otherwise.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Id16(pub [u8; 16]);

impl fmt::Display for Id16 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Id16 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Id16 {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if text.len() != 32 || !text.is_ascii() {
            return Err(());
        }
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
            let [high, low] = pair else { return Err(()) };
            *byte = digit(*high).ok_or(())? << 4 | digit(*low).ok_or(())?;
        }
        Ok(Self(bytes))
    }
}

/// A protected thing. Stable; its name may change.
pub type WorkloadId = Id16;
/// A recovery point.
pub type PointId = Id16;
/// A circle of trust inside which content is stored once.
pub type DomainId = Id16;
/// Whoever signs points and commits: the first 16 bytes of the BLAKE3 hash of its public signing key.
pub type WriterId = Id16;

/// The folder of the `workloads` crate that knows how to protect and restore it: `files`, `vm`, `postgres`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkloadKind(pub String);

/// How people and points refer to a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadRef {
    pub id: WorkloadId,
    pub kind: WorkloadKind,
    pub name: String,
}

/// Where the next increment starts (an LSN, a GTID, a bitmap). Opaque outside its workload.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Position(pub Vec<u8>);

/// How consistent the captured state is, weakest first. The numbers are part of the repository format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Consistency {
    /// Each item by itself; the set was read over a span of time.
    Fuzzy = 1,
    /// As after a power cut: one moment, nothing flushed for it.
    Crash = 2,
    FileSystem = 3,
    Application = 4,
    /// The workload was shut down.
    Offline = 5,
}

impl Consistency {
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Fuzzy,
            2 => Self::Crash,
            3 => Self::FileSystem,
            4 => Self::Application,
            5 => Self::Offline,
            _ => return None,
        })
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Fuzzy => "fuzzy",
            Self::Crash => "crash",
            Self::FileSystem => "file-system",
            Self::Application => "application",
            Self::Offline => "offline",
        }
    }
}

/// What a source reached, told when it has yielded everything and before anything is released.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    pub position: Position,
    pub consistency: Consistency,
    /// The moment the point stands for.
    pub moment: Time,
}

/// Totals of one run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub items: u64,
    /// Content bytes of all items, as a restore would write them.
    pub bytes: u64,
    /// Items whose content was not read again.
    pub unchanged: u64,
    /// Content bytes that were read from the source.
    pub read_bytes: u64,
    /// Content bytes that the repository did not hold yet, before compression.
    pub new_bytes: u64,
    /// Bytes added to the medium.
    pub written_bytes: u64,
    /// Items with something missing (exit code 3).
    pub skipped: u64,
    /// Items that are worth a word though nothing is missing.
    pub noticed: u64,
}

/// Given to the source when the target holds everything durably: only now may a bitmap or a slot move on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// The point that was made, when the target is a repository.
    pub point: Option<PointId>,
    pub counts: Counts,
}

#[cfg(test)]
mod tests {
    use super::Id16;

    #[test]
    fn ids_round_trip_and_refuse_other_text() {
        let id = Id16(std::array::from_fn(|index| index as u8 * 17));
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in ["", "00", "zz112233445566778899aabbccddeeff", "+0112233445566778899aabbccddeef"] {
            assert_eq!(bad.parse::<Id16>(), Err(()), "{bad}");
        }
    }
}
