//! The prefilter: a keyed hash of 16 bytes, a binary tree over them in 16-bit arithmetic.
//!
//! ```text
//! leaf(b)         = fold((b xor k) · m)                       mod 2^16, m odd
//! node(l; x, y)   = x · a[l] + y · b[l]                       mod 2^16, both odd; x is the later half
//! fold(u)         = u xor (u >> 8)
//! value(window)   = the root of the tree: leaves, then node on levels 0 to 3, each but the last folded
//! candidate       ⇔ value(window) >> 7 == target
//! ```
//!
//! Sums and products mod 2^16 alternate with xor-shifts, so the value is linear over no ring and known cuts
//! give no equations to solve by elimination. Each step is a bijection of either operand, so no entropy of the
//! window is lost on the way. All nodes of one level use the same keys: the tree of a position shares three
//! quarters of its work with its neighbours, and a vector does 16 or 32 positions at once.

use super::KeyStream;

/// One position in 2^9 is a candidate.
pub(super) const RATE_BITS: u32 = 9;
/// The low bits of a value that are not looked at. (The high ones depend on every bit of the window.)
pub(super) const IGNORED_BITS: u32 = 16 - RATE_BITS;

/// Bytes of a window.
pub(super) const SPAN: usize = 16;
/// Positions looked at in one go, a trade between work thrown away at a cut and work repeated at the seams.
const BLOCK: usize = 128;
/// Positions asked together whether there is a candidate among them.
const PART: usize = 32;

#[derive(Clone)]
pub(super) struct Prefilter {
    /// Applied to a byte by xor, then by product.
    pub(super) leaf: (u16, u16),
    /// Factors of the later and of the earlier half, level by level.
    pub(super) levels: [(u16, u16); 4],
    /// The value of a candidate, without its ignored bits.
    pub(super) target: u16,
}

impl Prefilter {
    pub(super) fn new(stream: &mut KeyStream) -> Self {
        let leaf = (stream.next_u16(), stream.next_u16() | 1);
        let mut levels = [(0, 0); 4];
        for level in &mut levels {
            *level = (stream.next_u16() | 1, stream.next_u16() | 1);
        }
        let mut filter = Self { leaf, levels, target: 0 };
        filter.target = filter.choose_target(stream.next_u16() >> IGNORED_BITS);
        filter
    }

    /// The first target from `start` on (cyclically) that no window of 16 equal bytes has: long runs of one byte
    /// would otherwise be confirmed at every position, slowly, and cut into crumbs or not at all by chance.
    fn choose_target(&self, start: u16) -> u16 {
        let mut taken = [false; 1 << RATE_BITS];
        for byte in 0..=u8::MAX {
            let value = self.value(&[byte; SPAN]) >> IGNORED_BITS;
            if let Some(slot) = taken.get_mut(usize::from(value)) {
                *slot = true;
            }
        }
        // 256 runs cannot take all of 512 targets, so the search ends.
        let free = |target: &u16| !taken.get(usize::from(*target)).copied().unwrap_or(true);
        let rate = 1 << RATE_BITS;
        (0..rate).map(|step| (start + step) % rate).find(free).unwrap_or(start)
    }

    fn leaf_value(&self, byte: u8) -> u16 {
        fold((u16::from(byte) ^ self.leaf.0).wrapping_mul(self.leaf.1))
    }

    /// The definition.
    pub(super) fn value(&self, window: &[u8; SPAN]) -> u16 {
        let mut nodes = window.map(|byte| self.leaf_value(byte));
        let mut width = SPAN;
        let mut value = 0;
        for keys in self.levels {
            width /= 2;
            for at in 0..width {
                value = node(keys, nodes[2 * at + 1], nodes[2 * at]);
                nodes[at] = fold(value);
            }
        }
        value
    }

    /// Calls `accept` with the end of each candidate of `data` whose last byte lies at `from` or later, in order,
    /// until it agrees, and returns that end. `from` ≥ 15.
    ///
    /// The portable twin: plain loops over short arrays, which compilers turn into whatever vectors there are.
    pub(super) fn find(&self, data: &[u8], from: usize, accept: impl Fn(usize) -> bool) -> Option<usize> {
        const LEAD: usize = SPAN - 1;
        let mut at = from;
        while at < data.len() {
            // A short last block is filled up with zeros, whose candidates are not looked at.
            let count = (data.len() - at).min(BLOCK);
            let mut bytes = [0; LEAD + BLOCK];
            let first = at.checked_sub(LEAD)?;
            bytes.get_mut(..LEAD + count)?.copy_from_slice(data.get(first..at + count)?);
            let values = self.block(&bytes);
            for (part, values) in values.as_chunks::<PART>().0.iter().enumerate() {
                let hit = |value: u16| value >> IGNORED_BITS == self.target;
                if values.iter().fold(false, |seen, value| seen | hit(*value)) {
                    let hits = (0..).zip(values).filter(|(_lane, value)| hit(**value));
                    for lane in hits.map(|(lane, _value)| part * PART + lane).take_while(|lane| *lane < count)
                    {
                        if accept(at + lane + 1) {
                            return Some(at + lane + 1);
                        }
                    }
                }
            }
            at += BLOCK;
        }
        None
    }

    fn block(&self, bytes: &[u8; SPAN - 1 + BLOCK]) -> [u16; BLOCK] {
        let leaves = bytes.map(|byte| self.leaf_value(byte));
        let [one, two, three, four] = self.levels;
        let pairs: [u16; BLOCK + 14] = std::array::from_fn(|i| fold(node(one, leaves[i + 1], leaves[i])));
        let fours: [u16; BLOCK + 12] = std::array::from_fn(|i| fold(node(two, pairs[i + 2], pairs[i])));
        let eights: [u16; BLOCK + 8] = std::array::from_fn(|i| fold(node(three, fours[i + 4], fours[i])));
        std::array::from_fn(|i| node(four, eights[i + 8], eights[i]))
    }
}

fn node((later, earlier): (u16, u16), x: u16, y: u16) -> u16 {
    x.wrapping_mul(later).wrapping_add(y.wrapping_mul(earlier))
}

fn fold(value: u16) -> u16 {
    value ^ (value >> 8)
}
