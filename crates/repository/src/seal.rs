//! Sealing: one authenticated encryption for everything that is stored, and secrets that do not show themselves.
//!
//! The construction derives a fresh AES-256-GCM key from the sealing key *and a keyed digest of what is sealed*,
//! so there is no counter to keep. A virtual machine that is cloned between two seals repeats a key only for
//! the same bytes and the same associated data, which yields the same ciphertext and tells nobody more than that.
//!
//! ```text
//! mac key     = BLAKE3 derive_key("mainstay 2026 seal: digest key v1", key)
//! siv         = BLAKE3 keyed(mac key; le64(len aad) ‖ aad ‖ plaintext)            32 bytes, stored
//! message key = BLAKE3 derive_key("mainstay 2026 seal: message key v1", key ‖ siv)
//! sealed      = AES-256-GCM(message key, nonce 0, aad, plaintext) ‖ tag           len + 16 bytes
//! ```
//!
//! Opening checks both the GCM tag and the `siv`. The tag refuses damaged bytes before anything is hashed and
//! keeps the cipher inside its ordinary interface. The `siv` does what the tag cannot: GCM does not commit to
//! its key (one ciphertext can be made to open under two keys), whereas two keys that open one message here
//! are a collision of BLAKE3. Slots opened by guessable passphrases need that.
//!
//! What leaks: the length, and whether the same bytes were sealed twice under one key and associated data.

use std::fmt;
use std::ops::Deref;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use mainstay_core::{Code, Error, Result};
use zeroize::{Zeroize, Zeroizing};

/// Bytes that sealing adds to the plaintext, beside the [`Siv`].
pub const TAG_LEN: usize = 16;

const DIGEST_CONTEXT: &str = "mainstay 2026 seal: digest key v1";
const MESSAGE_CONTEXT: &str = "mainstay 2026 seal: message key v1";

/// 32 secret bytes: wiped when dropped, never shown by `Debug`.
#[derive(Clone)]
pub struct Secret([u8; 32]);

impl Secret {
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// From the operating system's generator.
    pub fn random() -> Result<Self> {
        Ok(Self(random_bytes()?))
    }

    /// Copies exactly 32 bytes; `None` for any other length.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        Some(Self(bytes.try_into().ok()?))
    }
}

impl Deref for Secret {
    type Target = [u8; 32];

    fn deref(&self) -> &[u8; 32] {
        &self.0
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// The key of [`seal`] and [`open`].
#[derive(Clone)]
pub struct SealKey(Secret);

impl SealKey {
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(Secret::new(bytes))
    }

    pub const fn from_secret(secret: Secret) -> Self {
        Self(secret)
    }

    /// From the operating system's generator.
    pub fn random() -> Result<Self> {
        Secret::random().map(Self)
    }

    /// An independent key for `context` (a constant of the program, which names the use) and `material` (which
    /// names the thing).
    #[must_use]
    pub fn derive(&self, context: &str, material: &[u8]) -> Self {
        Self(Secret::new(derive(context, &[self.as_bytes(), material])))
    }

    /// For wrapping the key. Whoever calls this keeps the copy as secret as the key.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    fn siv(&self, aad: &[u8], plaintext: &[u8]) -> Siv {
        let mac_key = Zeroizing::new(derive(DIGEST_CONTEXT, &[self.as_bytes()]));
        let mut hasher = blake3::Hasher::new_keyed(&mac_key);
        hasher.update(&(aad.len() as u64).to_le_bytes());
        hasher.update(aad);
        hasher.update(plaintext);
        let siv = Siv(*hasher.finalize().as_bytes());
        hasher.zeroize();
        siv
    }

    fn message_key(&self, siv: &Siv) -> Result<LessSafeKey> {
        let bytes = Zeroizing::new(derive(MESSAGE_CONTEXT, &[self.as_bytes(), &siv.0]));
        let refused = |_unspecified| Error::bug("the cipher refused a key");
        UnboundKey::new(&AES_256_GCM, &bytes[..]).map(LessSafeKey::new).map_err(refused)
    }
}

impl fmt::Debug for SealKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SealKey(..)")
    }
}

/// The keyed digest that a sealed message is stored with. Not secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Siv(pub [u8; 32]);

/// Encrypts `message` in place and appends a tag of [`TAG_LEN`] bytes. `aad` is authenticated, not stored: name in
/// it whatever must not be swapped (repository, kind, version, place).
///
/// Errors: [`Code::Bug`] when the message is longer than the cipher allows (64 GiB).
pub fn seal(key: &SealKey, aad: &[u8], message: &mut Vec<u8>) -> Result<Siv> {
    seal_from(0, key, aad, message)
}

/// As [`seal`], of what lies in `bytes` from `start` on; what is before it stays as it is and is no part of it.
pub(crate) fn seal_from(start: usize, key: &SealKey, aad: &[u8], bytes: &mut Vec<u8>) -> Result<Siv> {
    let message = bytes.get_mut(start..).unwrap_or_default();
    let siv = key.siv(aad, message);
    let refused = |_unspecified| Error::bug("the cipher refused a message");
    let sealed = key.message_key(&siv)?.seal_in_place_separate_tag(nonce(), Aad::from(aad), message);
    bytes.extend_from_slice(sealed.map_err(refused)?.as_ref());
    Ok(siv)
}

/// Decrypts `message` in place and removes the tag. On error nothing of the plaintext is left in it.
///
/// Errors: [`Code::Integrity`] when key, `aad`, `siv` or any byte differs from what was sealed; which of them is
/// not told.
pub fn open(key: &SealKey, aad: &[u8], siv: &Siv, message: &mut Vec<u8>) -> Result<()> {
    let opened =
        key.message_key(siv)?.open_in_place(nonce(), Aad::from(aad), message).map(|bytes| bytes.len());
    if let Ok(len) = opened {
        message.truncate(len);
        if constant_time_eq(&key.siv(aad, message).0, &siv.0) {
            return Ok(());
        }
    }
    message.zeroize();
    Err(Error::new(Code::Integrity, "sealed bytes do not authenticate"))
}

/// Every message has a key of its own, so one nonce serves them all.
fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

/// Padmé: the length to which `len` is padded so that at most 12 % is added and only O(log log n) bits of it show.
///
/// Source: Nikitin et al., "Reducing Metadata Leakage from Encrypted Files and Communication with PURBs",
/// PoPETs 2019. Saturates where the padded length would not fit.
pub const fn padded_len(len: u64) -> u64 {
    if len < 2 {
        return len;
    }
    let exponent = len.ilog2();
    let kept = exponent.ilog2() + 1;
    let mask = (1 << exponent.saturating_sub(kept)) - 1;
    match len.checked_add(mask) {
        Some(sum) => sum & !mask,
        None => u64::MAX,
    }
}

/// BLAKE3 in key derivation mode over the concatenation of `parts`.
pub(crate) fn derive(context: &str, parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(context);
    for part in parts {
        hasher.update(part);
    }
    let bytes = *hasher.finalize().as_bytes();
    hasher.zeroize();
    bytes
}

/// Whether two digests are equal, in a time that does not tell where they differ.
pub(crate) fn constant_time_eq(left: &[u8], right: &[u8]) -> bool {
    aws_lc_rs::constant_time::verify_slices_are_equal(left, right).is_ok()
}

pub(crate) fn random_bytes<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    match getrandom::fill(&mut bytes) {
        Ok(()) => Ok(bytes),
        Err(error) => {
            Err(Error::new(Code::Io, "the operating system gives no random bytes").because(error.to_string()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> SealKey {
        SealKey::new([byte; 32])
    }

    fn refused(key: &SealKey, aad: &[u8], siv: &Siv, sealed: &[u8]) {
        let mut message = sealed.to_vec();
        assert_eq!(open(key, aad, siv, &mut message).unwrap_err().code(), Code::Integrity);
        assert!(message.is_empty(), "a refused message must not be left behind");
    }

    #[test]
    fn what_is_sealed_opens_again() {
        for len in [0, 1, 15, 16, 17, 1000, 70_000] {
            let plain: Vec<u8> = (0..len).map(|i| i as u8).collect();
            let mut message = plain.clone();
            let siv = seal(&key(1), b"aad", &mut message).unwrap();
            assert_eq!(message.len(), plain.len() + TAG_LEN);
            assert!(len < 16 || message[..len] != plain[..]);
            open(&key(1), b"aad", &siv, &mut message).unwrap();
            assert_eq!(message, plain);
        }
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_is_refused() {
        let aad = *b"repository 7, segment 3";
        let mut sealed = b"the bytes of one small segment".to_vec();
        let siv = seal(&key(1), &aad, &mut sealed).unwrap();
        let flip = |bytes: &mut [u8], bit: usize| bytes[bit / 8] ^= 1 << (bit % 8);
        for bit in 0..siv.0.len() * 8 {
            let mut other = siv;
            flip(&mut other.0, bit);
            refused(&key(1), &aad, &other, &sealed);
        }
        for bit in 0..aad.len() * 8 {
            let mut other = aad;
            flip(&mut other, bit);
            refused(&key(1), &other, &siv, &sealed);
        }
        for bit in 0..sealed.len() * 8 {
            let mut other = sealed.clone();
            flip(&mut other, bit);
            refused(&key(1), &aad, &siv, &other);
        }
        for len in 0..sealed.len() {
            refused(&key(1), &aad, &siv, &sealed[..len]);
        }
        refused(&key(2), &aad, &siv, &sealed);
        refused(&key(1), &aad[1..], &siv, &sealed);
    }

    /// The GCM tag alone would pass here: only the digest ties the message to its key.
    #[test]
    fn a_valid_tag_under_a_chosen_siv_is_refused() {
        let siv = Siv([9; 32]);
        let mut forged = b"made by someone who holds the key".to_vec();
        let message_key = key(1).message_key(&siv).unwrap();
        message_key.seal_in_place_append_tag(nonce(), Aad::from(b"a"), &mut forged).unwrap();
        refused(&key(1), b"a", &siv, &forged);
    }

    #[test]
    fn a_cloned_machine_never_reuses_a_message_key_for_other_bytes() {
        let original = SealKey::random().unwrap();
        let clone = original.clone();
        let (mut left, mut right) = (b"written before".to_vec(), b"written after!".to_vec());
        let (a, b) = (seal(&original, b"p", &mut left).unwrap(), seal(&clone, b"p", &mut right).unwrap());
        assert_ne!(a, b);
        let derived = |siv| derive(MESSAGE_CONTEXT, &[original.as_bytes(), siv]);
        assert_ne!(derived(&a.0), derived(&b.0));
        // Nor does the boundary between associated data and message move unseen.
        assert_ne!(original.siv(b"ab", b"c"), original.siv(b"a", b"bc"));
    }

    #[test]
    fn golden_bytes() {
        let mut message = b"mainstay".to_vec();
        let siv = seal(&key(7), b"golden", &mut message).unwrap();
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(hex(&siv.0), "e41e74aaa5b164a13afa70df5da8f523b2f67ca3a38c684a1a379de32d8c424f");
        assert_eq!(hex(&message), "70760f53769efda0677134562c94353a16b87e571b0f5289");
    }

    #[test]
    fn padding_follows_the_paper() {
        let pairs = [(0, 0), (1, 1), (2, 2), (7, 7), (9, 10), (100, 104), (1000, 1024), (1 << 20, 1 << 20)];
        for (len, padded) in pairs {
            assert_eq!(padded_len(len), padded, "{len}");
        }
        for len in (1..2_000_000u64).step_by(37) {
            let padded = padded_len(len);
            assert!(padded >= len && (padded - len) * 100 <= len * 12, "{len} → {padded}");
            assert_eq!(padded_len(padded), padded);
        }
        assert_eq!(padded_len(u64::MAX), u64::MAX);
    }

    #[test]
    fn nothing_secret_is_shown() {
        assert_eq!(format!("{:?} {:?}", key(0xAB), Secret::new([0xAB; 32])), "SealKey(..) Secret(..)");
    }
}
