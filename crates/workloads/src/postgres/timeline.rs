//! Timelines: the lines of a cluster's history, of which each promotion begins a new one. What came before a timeline is in
//! its history file, as the chapter "Continuous Archiving and Point-in-Time Recovery" says.

use mainstay_core::{Error, Result};

use super::lsn::Lsn;
use super::wire::Connection;

/// Nobody has promoted so often.
const LINES_MAX: usize = 10_000;

/// A timeline and those that it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct History {
    pub timeline: u32,
    /// Those before it, the first one first, each with the place where it was left.
    pub before: Vec<(u32, Lsn)>,
    /// The file, as the server wrote it. Empty for the first timeline, which has none.
    pub text: Vec<u8>,
}

impl History {
    /// Errors: [`mainstay_core::Code::Integrity`] for what is no history of this timeline.
    pub fn parse(timeline: u32, text: Vec<u8>) -> Result<Self> {
        let malformed = || Error::integrity(format!("the history of timeline {timeline} is malformed"));
        let mut before: Vec<(u32, Lsn)> = Vec::new();
        for line in text.split(|byte| *byte == b'\n').take(LINES_MAX) {
            let line = String::from_utf8_lossy(line);
            if line.trim().is_empty() || line.trim_start().starts_with('#') {
                continue;
            }
            let mut words = line.split_whitespace();
            let (Some(Ok(earlier)), Some(Ok(left))) =
                (words.next().map(str::parse), words.next().map(str::parse))
            else {
                return Err(malformed());
            };
            if before.last().is_some_and(|(last, at)| *last >= earlier || *at > left) || earlier >= timeline {
                return Err(malformed());
            }
            before.push((earlier, left));
        }
        if before.is_empty() != (timeline == 1) {
            return Err(malformed());
        }
        Ok(Self { timeline, before, text })
    }

    /// Asks a server for it.
    pub fn ask(connection: &mut Connection, timeline: u32) -> Result<Self> {
        if timeline == 1 {
            return Self::parse(1, Vec::new());
        }
        let answer = connection.query(&format!("TIMELINE_HISTORY {timeline}"))?;
        let text = answer.into_iter().next().and_then(|row| row.into_iter().nth(1)).flatten();
        let text = text.ok_or_else(|| connection.broken("it does not tell of its timeline"))?;
        Self::parse(timeline, text.into_bytes())
    }

    /// How its file is called.
    pub fn file_name(timeline: u32) -> String {
        format!("{timeline:08X}.history")
    }

    /// All timelines up to this one, the first one first, each with the place where it was left; this one never was.
    pub fn legs(&self) -> impl DoubleEndedIterator<Item = (u32, Option<Lsn>)> {
        let before = self.before.iter().map(|(timeline, left)| (*timeline, Some(*left)));
        before.chain([(self.timeline, None)])
    }
}

#[cfg(test)]
mod tests {
    use super::{History, Lsn};

    #[test]
    fn a_history_tells_where_each_timeline_was_left() {
        let text = b"1\t0/3000060\tno recovery target specified\n\n# x\n2\t0/5000000\tbefore 2026\n".to_vec();
        let history = History::parse(3, text).unwrap();
        let legs: Vec<_> = history.legs().collect();
        assert_eq!(legs, [(1, Some(Lsn(0x300_0060))), (2, Some(Lsn(0x500_0000))), (3, None)]);
        assert_eq!(History::parse(1, Vec::new()).unwrap().legs().count(), 1);
        assert_eq!(History::file_name(26), "0000001A.history");
    }

    #[test]
    fn nonsense_is_no_history() {
        for (timeline, text) in [
            (2, ""),
            (1, "1\t0/1\tx"),
            (2, "2\t0/1\tx"),
            (3, "2\t0/2\tx\n1\t0/3\tx"),
            (3, "1\t0/9\n2\t0/3"),
            (2, "1\tx"),
        ] {
            History::parse(timeline, text.as_bytes().to_vec()).unwrap_err();
        }
    }
}
