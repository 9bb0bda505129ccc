//! A key ring as a text file, for a write-only agent: what protects it is the mode of the file.
//!
//! ```text
//! -----BEGIN MAINSTAY KEY-----
//! Repository: 0123-4567-89ab-cdef
//! Powers: write
//!
//! base64 (RFC 4648, padded) of the encoded ring and 8 bytes of its BLAKE3 hash, 64 characters a line
//! -----END MAINSTAY KEY-----
//! ```
//!
//! Lines before the empty one are for people and are not read. Text around the two marks is passed over.

use mainstay_core::{Error, Result};
use zeroize::Zeroizing;

use super::KeyRing;
use super::ring::RING_LEN_MAX;

const BEGIN: &str = "-----BEGIN MAINSTAY KEY-----";
const END: &str = "-----END MAINSTAY KEY-----";
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const CHECK_LEN: usize = 8;
const LINE_BYTES: usize = 48;
/// Longest text that is read, in bytes.
pub const TEXT_LEN_MAX: usize = 2 * RING_LEN_MAX;

/// As secret as the ring.
pub fn encode(ring: &KeyRing) -> Zeroizing<String> {
    let mut bytes = ring.encode();
    let check = blake3::hash(&bytes);
    bytes.reserve_exact(CHECK_LEN);
    bytes.extend(check.as_bytes().iter().take(CHECK_LEN));
    let mut text = Zeroizing::new(String::with_capacity(bytes.len() * 3 / 2 + 256));
    let (family, powers) = (ring.family().short(), ring.powers());
    text.push_str(&format!("{BEGIN}\nRepository: {family}\nPowers: {powers}\n\n"));
    for line in bytes.chunks(LINE_BYTES) {
        line.chunks(3).for_each(|group| push_group(&mut text, group));
        text.push('\n');
    }
    text.push_str(END);
    text.push('\n');
    text
}

/// Errors: [`mainstay_core::Code::Integrity`] for text that holds no whole key, [`mainstay_core::Code::TooNew`].
pub fn decode(text: &str) -> Result<KeyRing> {
    let broken = |how: &str| {
        Error::integrity(format!("the key file {how}")).hint("Copy it again, whole, from where it was made.")
    };
    if text.len() > TEXT_LEN_MAX {
        return Err(broken("is too long"));
    }
    let (_before, rest) = text.split_once(BEGIN).ok_or_else(|| broken("has no line that begins a key"))?;
    let (armored, _after) = rest.split_once(END).ok_or_else(|| broken("ends before its key does"))?;
    // The first line is what is left of the mark.
    let body = armored.lines().skip(1).skip_while(|line| !line.trim().is_empty());
    let symbols = body.flat_map(str::bytes).filter(|byte| !byte.is_ascii_whitespace());
    let bytes = decode_base64(symbols).ok_or_else(|| broken("is not base64"))?;
    let (ring, check) = bytes.split_last_chunk::<CHECK_LEN>().ok_or_else(|| broken("is too short"))?;
    if !blake3::hash(ring).as_bytes().starts_with(check) {
        return Err(broken("is damaged"));
    }
    KeyRing::decode(ring)
}

fn push_group(text: &mut String, group: &[u8]) {
    let byte = |at: usize| u32::from(group.get(at).copied().unwrap_or(0));
    let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
    for at in 0..4 {
        let value = bits >> (18 - 6 * at) & 63;
        let symbol = ALPHABET.get(value as usize).map_or('=', |symbol| char::from(*symbol));
        text.push(if at <= group.len() { symbol } else { '=' });
    }
}

/// Strict: whole groups, padding at the end only, unused bits zero.
fn decode_base64(symbols: impl Iterator<Item = u8>) -> Option<Zeroizing<Vec<u8>>> {
    let symbols: Zeroizing<Vec<u8>> = Zeroizing::new(symbols.collect());
    let (groups, &[]) = symbols.as_chunks::<4>() else { return None };
    let mut bytes = Zeroizing::new(Vec::with_capacity(groups.len() * 3));
    for (number, group) in groups.iter().enumerate() {
        let padding = group.iter().rev().take_while(|symbol| **symbol == b'=').count();
        if padding > 2 || (padding > 0 && number + 1 != groups.len()) {
            return None;
        }
        let kept = 4 - padding;
        let mut bits = 0;
        for symbol in group.get(..kept)? {
            bits = bits << 6 | ALPHABET.iter().position(|known| known == symbol)? as u32;
        }
        bits <<= 6 * padding;
        let [_none, decoded @ ..] = bits.to_be_bytes();
        let (data, unused) = decoded.split_at_checked(kept - 1)?;
        if unused.iter().any(|byte| *byte != 0) {
            return None;
        }
        bytes.extend_from_slice(data);
    }
    Some(bytes)
}
