//! The header of LUKS 2 (LUKS2 On-Disk Format Specification 1.1): a binary part with a checksum, JSON behind it, and
//! both once more behind that.

use aws_lc_rs::digest;
use mainstay_core::{Blocks, Error, Result};
use serde_json::Value;

use super::cipher::Kind;
use super::header1::whole_sectors;
use super::{Check, Derivation, Hash, KEY_MAX, Luks, MAGIC, SLOTS_MAX, Slot, unsupported};
use crate::bytes::{self, Fields};

const BINARY: usize = 4096;
/// The lengths that a header may have, which is where its copy begins.
const LENGTHS: [u64; 9] =
    [16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20];
const MAGIC_OF_COPY: [u8; 6] = *b"SKUL\xBA\xBE";

/// The binary part and the text of the newest copy that is whole.
struct Found {
    sequence: u64,
    binary: Vec<u8>,
    json: Value,
}

pub(super) fn read(blocks: &dyn Blocks) -> Result<Luks> {
    let places = [(0, MAGIC)].into_iter().chain(LENGTHS.map(|length| (length, MAGIC_OF_COPY)));
    let copies = places.filter_map(|(at, magic)| copy(blocks, at, magic).transpose());
    let mut newest: Option<Found> = None;
    let mut trouble = Error::integrity("the LUKS header is damaged");
    for copy in copies {
        match copy {
            Ok(found) if newest.as_ref().is_none_or(|known| known.sequence < found.sequence) => {
                newest = Some(found);
            }
            Ok(_) => {}
            Err(error) => trouble = error,
        }
    }
    let Some(Found { binary, json, .. }) = newest else { return Err(trouble) };
    let fields = Fields::new("the LUKS header", &binary);
    let label = fields.text(24, 48)?;
    let uuid = fields.text(168, 40)?.to_lowercase();
    luks(blocks, &json, uuid, Some(label).filter(|label| !label.is_empty()))
}

/// The header at `at`; `None` where there is none.
fn copy(blocks: &dyn Blocks, at: u64, magic: [u8; 6]) -> Result<Option<Found>> {
    if at + BINARY as u64 > blocks.size() {
        return Ok(None);
    }
    let binary = bytes::read(blocks, at, BINARY)?;
    let fields = Fields::new("the LUKS header", &binary);
    if fields.take(0, 6)? != magic || fields.be16(6)? != 2 {
        return Ok(None);
    }
    let length = fields.be64(8)?;
    if !LENGTHS.contains(&length) || fields.be64(256)? != at {
        return Err(Error::integrity(format!("a LUKS header of {length} bytes that should lie elsewhere")));
    }
    let hash = Hash::named(&fields.text(72, 32)?)?;
    let mut whole = bytes::read(blocks, at, bytes::index(length)?)?;
    whole[448..512].fill(0);
    let sum = digest::digest(hash.digest(), &whole);
    if fields.take(448, sum.as_ref().len())? != sum.as_ref() {
        return Err(Error::integrity("the checksum of the LUKS header is wrong"));
    }
    let text = whole[BINARY..].split(|byte| *byte == 0).next().unwrap_or_default();
    let json = serde_json::from_slice(text)
        .map_err(|error| Error::integrity("the LUKS header holds no JSON").because(error))?;
    Ok(Some(Found { sequence: fields.be64(16)?, binary, json }))
}

fn luks(blocks: &dyn Blocks, json: &Value, uuid: String, label: Option<String>) -> Result<Luks> {
    let required = json["config"]["requirements"]["mandatory"].as_array();
    if let Some(first) = required.and_then(|list| list.first()) {
        return Err(unsupported(format!("the requirement {first}")));
    }
    let segments: Vec<(&String, &Value)> = json["segments"].as_object().into_iter().flatten().collect();
    let [(number, segment)] = segments.as_slice() else {
        return Err(unsupported(format!("{} segments, as in the middle of re-encryption,", segments.len())));
    };
    if segment["type"] != "crypt" || !segment["integrity"].is_null() {
        return Err(unsupported("integrity protection".into()));
    }
    let (start, sector) = (long(segment, "offset")?, integer(segment, "sector_size")?);
    if !matches!(sector, 512 | 1024 | 2048 | 4096) || start == 0 || start > blocks.size() {
        return Err(Error::integrity(format!("data at byte {start} in sectors of {sector}")));
    }
    let end = match segment["size"].as_str() {
        Some("dynamic") => blocks.size(),
        _ => start.saturating_add(long(segment, "size")?).min(blocks.size()),
    };
    let digests: Vec<&Value> =
        json["digests"].as_object().into_iter().flatten().map(|(_, digest)| digest).collect();
    let of = |digest: &&&Value| names(&digest["segments"]).any(|name| name == number.as_str());
    let digest = digests.iter().find(of).ok_or_else(|| Error::integrity("no digest for the data"))?;
    let mut slots = Vec::new();
    for name in names(&digest["keyslots"]).take(SLOTS_MAX) {
        slots.extend(slot(&json["keyslots"][name])?);
    }
    Ok(Luks {
        uuid,
        label,
        slots,
        check: Check {
            hash: Hash::named(text(digest, "hash")?)?,
            rounds: small(digest, "iterations")?,
            salt: base64(text(digest, "salt")?)?,
            digest: base64(text(digest, "digest")?)?,
        },
        data: start..whole_sectors(start, end, sector),
        kind: Kind::named(text(segment, "encryption")?)?,
        sector,
        tweak: long(segment, "iv_tweak")?,
    })
}

/// A slot that a passphrase could open; others serve re-encryption.
fn slot(json: &Value) -> Result<Option<Slot>> {
    if json["type"] != "luks2" {
        return Ok(None);
    }
    let (kdf, area, spread) = (&json["kdf"], &json["area"], &json["af"]);
    let salt = base64(text(kdf, "salt")?)?;
    let derivation = match text(kdf, "type")? {
        "pbkdf2" => Derivation::Pbkdf2 {
            hash: Hash::named(text(kdf, "hash")?)?,
            rounds: small(kdf, "iterations")?,
            salt,
        },
        name => Derivation::Argon2 {
            kind: match name {
                "argon2i" => argon2::Algorithm::Argon2i,
                "argon2id" => argon2::Algorithm::Argon2id,
                other => return Err(unsupported(format!("keys derived by {other}"))),
            },
            passes: small(kdf, "time")?,
            memory: small(kdf, "memory")?,
            lanes: small(kdf, "cpus")?,
            salt,
        },
    };
    let length = |value: &Value| integer(value, "key_size").and_then(bytes::index);
    let (wrap, key) = (length(area)?, length(json)?);
    if wrap > KEY_MAX || key > KEY_MAX {
        return Err(Error::integrity(format!("a key of {key} bytes under one of {wrap}")));
    }
    Ok(Some(Slot {
        derivation,
        offset: long(area, "offset")?,
        kind: Kind::named(text(area, "encryption")?)?,
        wrap,
        key,
        spread: small(spread, "stripes")?,
        spread_hash: Hash::named(text(spread, "hash")?)?,
    }))
}

fn names(list: &Value) -> impl Iterator<Item = &str> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str)
}

fn missing(name: &str) -> Error {
    Error::integrity(format!("the LUKS header has no usable {name}"))
}

fn text<'a>(json: &'a Value, name: &str) -> Result<&'a str> {
    json[name].as_str().ok_or_else(|| missing(name))
}

fn integer(json: &Value, name: &str) -> Result<u64> {
    json[name].as_u64().ok_or_else(|| missing(name))
}

fn small(json: &Value, name: &str) -> Result<u32> {
    u32::try_from(integer(json, name)?).map_err(|error| missing(name).because(error))
}

/// Numbers of 64 bits, which JSON has no room for, stand there as text.
fn long(json: &Value, name: &str) -> Result<u64> {
    text(json, name)?.parse().map_err(|error: std::num::ParseIntError| missing(name).because(error))
}

fn base64(text: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for group in text.trim_end_matches('=').as_bytes().chunks(4) {
        let mut bits: u32 = 0;
        for letter in group {
            let six = match letter {
                b'A'..=b'Z' => letter - b'A',
                b'a'..=b'z' => letter - b'a' + 26,
                b'0'..=b'9' => letter - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return Err(missing("base64 text")),
            };
            bits = bits << 6 | u32::from(six);
        }
        bits <<= 6 * (4 - group.len());
        bytes.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn base64_of_every_length() {
        let known: [(&str, &[u8]); 5] =
            [("", b""), ("Zg==", b"f"), ("Zm8=", b"fo"), ("Zm9v", b"foo"), ("+/+/", b"\xFB\xFF\xBF")];
        for (text, bytes) in known {
            assert_eq!(base64(text).unwrap(), bytes);
        }
        assert!(base64("Zm9*").is_err());
    }
}
