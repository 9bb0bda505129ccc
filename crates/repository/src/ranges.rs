//! A set of small numbers as sorted, separate ranges: the segments of a group that somebody has or needs.

use std::ops::Range;

use mainstay_core::Result;

use crate::codec::{Decoder, Encode};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranges(Vec<Range<u32>>);

impl Ranges {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn contains(&self, number: u32) -> bool {
        let at = self.0.partition_point(|range| range.end <= number);
        self.0.get(at).is_some_and(|range| range.contains(&number))
    }

    pub(crate) fn count(&self) -> u64 {
        self.0.iter().map(|range| u64::from(range.end - range.start)).sum()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> {
        self.0.iter().flat_map(Clone::clone)
    }

    pub(crate) fn insert(&mut self, range: Range<u32>) {
        if range.is_empty() {
            return;
        }
        // Everything that overlaps or touches the new range melts into it.
        let first = self.0.partition_point(|known| known.end < range.start);
        let last = self.0.partition_point(|known| known.start <= range.end);
        let mut merged = range;
        for known in self.0.drain(first..last) {
            merged = merged.start.min(known.start)..merged.end.max(known.end);
        }
        self.0.insert(first, merged);
    }

    pub(crate) fn extend(&mut self, other: &Self) {
        other.0.iter().for_each(|range| self.insert(range.clone()));
    }

    /// What is in both sets.
    pub(crate) fn and(&self, other: &Self) -> Self {
        let (mut both, mut left, mut right) = (Vec::new(), 0, 0);
        while let (Some(one), Some(two)) = (self.0.get(left), other.0.get(right)) {
            let common = one.start.max(two.start)..one.end.min(two.end);
            if !common.is_empty() {
                both.push(common);
            }
            if one.end < two.end { left += 1 } else { right += 1 }
        }
        Self(both)
    }

    /// What is in this set and not in `other`.
    pub(crate) fn minus(&self, other: &Self) -> Self {
        let ends = std::iter::once(0).chain(other.0.iter().map(|range| range.end));
        let starts = other.0.iter().map(|range| range.start).chain(std::iter::once(u32::MAX));
        let gaps = ends.zip(starts).map(|(end, start)| end..start).filter(|gap| !gap.is_empty());
        self.and(&Self(gaps.collect()))
    }

    pub(crate) fn is_superset(&self, other: &Self) -> bool {
        other.0.iter().all(|range| {
            let at = self.0.partition_point(|known| known.end <= range.start);
            self.0.get(at).is_some_and(|known| known.start <= range.start && known.end >= range.end)
        })
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.varint(self.0.len() as u64);
        let mut end = 0;
        for range in &self.0 {
            out.varint(u64::from(range.start - end));
            out.varint(u64::from(range.end - range.start));
            end = range.end;
        }
    }

    pub(crate) fn decode(input: &mut Decoder<'_>) -> Result<Self> {
        let mut ranges = Self::default();
        let mut end = 0_u32;
        for index in 0..input.count(2)? {
            let (gap, length) = (input.varint_u32()?, input.varint_u32()?);
            let start = end.checked_add(gap);
            let next = start.and_then(|start| start.checked_add(length));
            match (start, next) {
                (Some(start), Some(next)) if length > 0 && (gap > 0 || index == 0) => {
                    ranges.0.push(start..next);
                    end = next;
                }
                _ => return Err(input.malformed("its ranges overlap, touch or overflow")),
            }
        }
        Ok(ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::Ranges;
    use crate::codec::Decoder;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn agrees_with_a_plain_set(inserts in prop::collection::vec((0..60_u32, 0..9_u32), 0..20), other in prop::collection::vec((0..60_u32, 0..9_u32), 0..4)) {
            let build = |list: &[(u32, u32)]| {
                let (mut ranges, mut model) = (Ranges::default(), BTreeSet::new());
                for (start, length) in list {
                    ranges.insert(*start..start + length);
                    model.extend(*start..start + length);
                }
                (ranges, model)
            };
            let (ranges, model) = build(&inserts);
            let (others, other_model) = build(&other);
            prop_assert_eq!(ranges.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(ranges.count(), model.len() as u64);
            prop_assert_eq!(ranges.is_superset(&others), model.is_superset(&other_model));
            let common = model.intersection(&other_model).copied().collect::<Vec<_>>();
            prop_assert_eq!(ranges.and(&others).iter().collect::<Vec<_>>(), common);
            let rest = model.difference(&other_model).copied().collect::<Vec<_>>();
            prop_assert_eq!(ranges.minus(&others).iter().collect::<Vec<_>>(), rest);
            for number in 0..70 {
                prop_assert_eq!(ranges.contains(number), model.contains(&number));
            }
            let mut bytes = Vec::new();
            ranges.encode(&mut bytes);
            prop_assert_eq!(Ranges::decode(&mut Decoder::new("ranges", &bytes)).unwrap(), ranges);
        }
    }
}
