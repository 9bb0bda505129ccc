//! The confirmation: a pseudo-random function of 64 bytes.
//!
//! NH (Black et al., "UMAC: Fast and Secure Message Authentication", CRYPTO 1999) over 64-bit words makes 16 bytes of
//! the window; two windows chosen without the key collide with a chance of at most 2^-64. SipHash-2-4 (Aumasson
//! and Bernstein, INDOCRYPT 2012) of those 16 bytes then hides the hash: only its output is ever visible.

use super::{KeyStream, WINDOW};

const WORDS: usize = WINDOW / 8;

#[derive(Clone)]
pub(super) struct Confirm {
    nh: [u64; WORDS],
    sip: (u64, u64),
}

impl Confirm {
    pub(super) fn new(stream: &mut KeyStream) -> Self {
        let nh = std::array::from_fn(|_| stream.next_u64());
        Self { nh, sip: (stream.next_u64(), stream.next_u64()) }
    }

    pub(super) fn digest(&self, window: &[u8; WINDOW]) -> u64 {
        let (words, _none) = window.as_chunks::<8>();
        let mut sum = 0u128;
        for (pair, keys) in words.chunks_exact(2).zip(self.nh.chunks_exact(2)) {
            if let ([low, high], [low_key, high_key]) = (pair, keys) {
                let low = u64::from_le_bytes(*low).wrapping_add(*low_key);
                let high = u64::from_le_bytes(*high).wrapping_add(*high_key);
                sum = sum.wrapping_add(u128::from(low) * u128::from(high));
            }
        }
        siphash(self.sip, [sum as u64, (sum >> 64) as u64])
    }
}

/// SipHash-2-4 of 16 bytes, given as two little-endian words.
fn siphash((k0, k1): (u64, u64), message: [u64; 2]) -> u64 {
    let mut v = [
        k0 ^ 0x736f_6d65_7073_6575,
        k1 ^ 0x646f_7261_6e64_6f6d,
        k0 ^ 0x6c79_6765_6e65_7261,
        k1 ^ 0x7465_6462_7974_6573,
    ];
    // The last word is empty but for the length of the message.
    for word in [message[0], message[1], 16 << 56] {
        v[3] ^= word;
        round(&mut v);
        round(&mut v);
        v[0] ^= word;
    }
    v[2] ^= 0xff;
    for _ in 0..4 {
        round(&mut v);
    }
    v[0] ^ v[1] ^ v[2] ^ v[3]
}

fn round(v: &mut [u64; 4]) {
    v[0] = v[0].wrapping_add(v[1]);
    v[1] = v[1].rotate_left(13) ^ v[0];
    v[0] = v[0].rotate_left(32);
    v[2] = v[2].wrapping_add(v[3]);
    v[3] = v[3].rotate_left(16) ^ v[2];
    v[0] = v[0].wrapping_add(v[3]);
    v[3] = v[3].rotate_left(21) ^ v[0];
    v[2] = v[2].wrapping_add(v[1]);
    v[1] = v[1].rotate_left(17) ^ v[2];
    v[2] = v[2].rotate_left(32);
}

#[cfg(test)]
mod tests {
    /// From the reference vectors of SipHash-2-4: key 00 01 … 0f, message 00 01 … 0f (16 bytes).
    #[test]
    fn siphash_matches_its_reference_vector() {
        let word = |first: u8| u64::from_le_bytes(std::array::from_fn(|i| first + i as u8));
        let digest = super::siphash((word(0), word(8)), [word(0), word(8)]);
        #[expect(deprecated, reason = "the standard library's SipHash-2-4 is the second opinion")]
        let mut second = std::hash::SipHasher::new_with_keys(word(0), word(8));
        std::hash::Hasher::write(&mut second, &std::array::from_fn::<u8, 16, _>(|i| i as u8));
        assert_eq!(digest, std::hash::Hasher::finish(&second));
        assert_eq!(digest, 0x3f2a_cc7f_57c2_9bdb);
    }
}
