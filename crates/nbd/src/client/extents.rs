//! From block status to extents: what is allocated, crossed with what has changed.

use std::ops::Range;

use mainstay_core::{ChangeState, Extent, ExtentKind};

use super::session::{Outcome, Session, Stretches};
use crate::wire::{STATE_DIRTY, STATE_HOLE, STATE_ZERO};

/// How much one question about block status covers, in bytes.
const STEP: u64 = 1 << 30;
/// After so many stretches the rest of a range is reported as unknown data, which is always true: a server that cuts
/// its answer to dust costs time but no memory.
const STRETCHES_MAX: usize = 1 << 20;

/// Extents of one range, put together from front to back.
pub(super) struct Extents {
    range: Range<u64>,
    list: Vec<Extent>,
    stretches: usize,
}

impl Extents {
    pub(super) fn new(range: Range<u64>) -> Self {
        Self { range, list: Vec::new(), stretches: 0 }
    }

    /// Asks for the whole range. What was put together stays when the server refuses to go on.
    pub(super) fn ask(&mut self, session: &mut Session) -> Outcome<()> {
        let block = u64::from(session.info.block_size);
        let mut at = self.range.start / block * block;
        let end = self.range.end.next_multiple_of(block).min(session.info.size);
        while at < end {
            if self.stretches > STRETCHES_MAX {
                self.push(end, ExtentKind::Data, ChangeState::Unknown);
                break;
            }
            let length = u32::try_from((end - at).min(STEP)).unwrap_or(u32::MAX);
            let (allocation, dirty) = session.status(at, length)?;
            at = self.cross(at, allocation, dirty);
        }
        Ok(())
    }

    /// Takes both answers from `at` on, as far as both reach; returns how far that is. An absent one was not asked for.
    fn cross(&mut self, at: u64, allocation: Option<Stretches>, dirty: Option<Stretches>) -> u64 {
        let (allocation, dirty) = (ends(at, allocation), ends(at, dirty));
        self.stretches += allocation.len() + dirty.len();
        let (mut allocation, mut dirty) = (allocation.into_iter().peekable(), dirty.into_iter().peekable());
        let mut reached = at;
        while let (Some(&(one, state)), Some(&(other, change))) = (allocation.peek(), dirty.peek()) {
            let end = one.min(other);
            self.push(end, kind(state), self::change(change));
            allocation.next_if(|(stretch, _)| *stretch == end);
            dirty.next_if(|(stretch, _)| *stretch == end);
            reached = end;
            if end == u64::MAX {
                break;
            }
        }
        reached
    }

    /// Appends what reaches from the last end to `end`, clipped to the range.
    pub(super) fn push(&mut self, end: u64, kind: ExtentKind, change: ChangeState) {
        let end = end.min(self.range.end);
        let start = self.list.last().map_or(self.range.start, |last| last.range.end);
        if end <= start {
            return;
        }
        match self.list.last_mut() {
            Some(last) if last.kind == kind && last.change == change => last.range.end = end,
            _ => self.list.push(Extent { range: start..end, kind, change }),
        }
    }

    pub(super) fn into_list(self) -> Vec<Extent> {
        self.list
    }
}

/// Where each stretch ends, with its flags; without an answer, one that never ends.
fn ends(at: u64, stretches: Option<Stretches>) -> Vec<(u64, Option<u32>)> {
    let Some(stretches) = stretches else { return vec![(u64::MAX, None)] };
    let mut end = at;
    let ends = stretches.into_iter().map(|(length, flags)| {
        end = end.saturating_add(length.into());
        (end, Some(flags))
    });
    ends.collect()
}

fn kind(state: Option<u32>) -> ExtentKind {
    match state {
        // A hole that is not said to read as zeros may read as anything.
        Some(state) if state & STATE_ZERO == 0 => ExtentKind::Data,
        Some(state) if state & STATE_HOLE == 0 => ExtentKind::Zero,
        Some(_) => ExtentKind::Hole,
        None => ExtentKind::Data,
    }
}

fn change(state: Option<u32>) -> ChangeState {
    match state {
        Some(state) if state & STATE_DIRTY != 0 => ChangeState::Changed,
        Some(_) => ChangeState::Unchanged,
        None => ChangeState::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use mainstay_core::{ChangeState, Extent, ExtentKind};

    use super::Extents;

    #[test]
    fn two_answers_are_crossed_as_far_as_both_reach_and_clipped_to_the_range() {
        let mut extents = Extents::new(150..1000);
        let allocation = vec![(100, 0), (100, 3), (300, 2), (4000, 1)];
        let dirty = vec![(250, 1), (250, 0), (100, 1)];
        assert_eq!(extents.cross(100, Some(allocation), Some(dirty)), 700);
        let told: Vec<_> = extents
            .into_list()
            .into_iter()
            .map(|Extent { range, kind, change }| (range, kind, change))
            .collect();
        let expected = [
            (150..200, ExtentKind::Data, ChangeState::Changed),
            (200..300, ExtentKind::Hole, ChangeState::Changed),
            (300..350, ExtentKind::Zero, ChangeState::Changed),
            (350..600, ExtentKind::Zero, ChangeState::Unchanged),
            (600..700, ExtentKind::Data, ChangeState::Changed),
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn an_answer_that_was_not_asked_for_is_unknown() {
        let mut extents = Extents::new(0..300);
        assert_eq!(extents.cross(0, Some(vec![(100, 3), (150, 0)]), None), 250);
        let kinds: Vec<_> =
            extents.into_list().into_iter().map(|extent| (extent.range.end, extent.change)).collect();
        assert_eq!(kinds, [(100, ChangeState::Unknown), (250, ChangeState::Unknown)]);
    }
}
