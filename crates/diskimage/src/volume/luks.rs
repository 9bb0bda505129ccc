//! LUKS, versions 1 and 2: the header, which passphrase opens it, and the decrypted content. AES in the modes that
//! cryptsetup has used by default, past and present; other ciphers are refused in words.

mod cipher;
mod header1;
mod header2;

use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;

use aws_lc_rs::{constant_time, digest, pbkdf2};
use mainstay_core::{Blocks, Code, Error, Extent, ExtentKind, Result};
use zeroize::{Zeroize as _, Zeroizing};

use self::cipher::{Cipher, Kind};
use super::Secret;
use crate::bytes;
use crate::compose::{check_range, check_read, extent};

const MAGIC: [u8; 6] = *b"LUKS\xBA\xBE";
const SECTOR: u64 = 512;

/// Key slots that are tried.
const SLOTS_MAX: usize = 32;
/// Bytes of a key: two of 256 bits for XTS.
const KEY_MAX: usize = 64;
/// How often a key is spread out before it is stored; cryptsetup's own number is 4000.
const SPREAD_MAX: u32 = 8192;
/// Rounds of PBKDF2 that a header may cost altogether: half a minute.
const ROUNDS_MAX: u64 = 100_000_000;
/// Of Argon2, in KiB; cryptsetup goes up to this by itself.
const MEMORY_MAX: u32 = 1 << 20;
/// KiB that Argon2 may touch in all slots and passes together: about a minute.
const TOUCHED_MAX: u64 = 64 << 20;
const LANES_MAX: u32 = 16;

/// What reads are cut into, in bytes; a multiple of every sector.
const PIECE: usize = 128 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hash {
    Sha1,
    Sha256,
    Sha384,
    Sha512,
}

impl Hash {
    fn named(name: &str) -> Result<Self> {
        match name {
            "sha1" => Ok(Self::Sha1),
            "sha256" => Ok(Self::Sha256),
            "sha384" => Ok(Self::Sha384),
            "sha512" => Ok(Self::Sha512),
            other => Err(unsupported(format!("the hash {other}"))),
        }
    }

    fn digest(self) -> &'static digest::Algorithm {
        match self {
            Self::Sha1 => &digest::SHA1_FOR_LEGACY_USE_ONLY,
            Self::Sha256 => &digest::SHA256,
            Self::Sha384 => &digest::SHA384,
            Self::Sha512 => &digest::SHA512,
        }
    }

    fn pbkdf2(self) -> pbkdf2::Algorithm {
        match self {
            Self::Sha1 => pbkdf2::PBKDF2_HMAC_SHA1,
            Self::Sha256 => pbkdf2::PBKDF2_HMAC_SHA256,
            Self::Sha384 => pbkdf2::PBKDF2_HMAC_SHA384,
            Self::Sha512 => pbkdf2::PBKDF2_HMAC_SHA512,
        }
    }
}

/// From a passphrase to a key.
enum Derivation {
    Pbkdf2 { hash: Hash, rounds: u32, salt: Vec<u8> },
    Argon2 { kind: argon2::Algorithm, passes: u32, memory: u32, lanes: u32, salt: Vec<u8> },
}

/// The volume key, encrypted for one passphrase.
struct Slot {
    derivation: Derivation,
    /// Where the spread key lies.
    offset: u64,
    kind: Kind,
    /// Bytes of the key that encrypts it.
    wrap: usize,
    /// Bytes of the volume key.
    key: usize,
    spread: u32,
    spread_hash: Hash,
}

/// What tells that a volume key is the right one.
struct Check {
    hash: Hash,
    rounds: u32,
    salt: Vec<u8>,
    digest: Vec<u8>,
}

/// The header of an encrypted volume.
pub(super) struct Luks {
    pub(super) uuid: String,
    pub(super) label: Option<String>,
    slots: Vec<Slot>,
    check: Check,
    /// The encrypted bytes.
    data: Range<u64>,
    kind: Kind,
    /// Bytes that are encrypted together.
    sector: u64,
    /// Added to the number of a sector of 512 bytes.
    tweak: u64,
}

fn unsupported(what: String) -> Error {
    Error::new(Code::Unsupported, format!("LUKS with {what} is not read"))
}

/// The header, if the volume begins like one.
pub(super) fn header(blocks: &dyn Blocks) -> Result<Option<Luks>> {
    let head = bytes::read_up_to(blocks, 0, 592)?;
    if !head.starts_with(&MAGIC) {
        return Ok(None);
    }
    match head.get(6..8) {
        Some([0, 1]) => header1::read(blocks, &head).map(Some),
        Some([0, 2]) => header2::read(blocks).map(Some),
        _ => Err(unsupported("an unknown version".into())),
    }
}

impl Luks {
    /// The decrypted volume; `None` when the secret opens none of its slots.
    pub(super) fn unlock(&self, base: &Arc<dyn Blocks>, secret: &Secret) -> Result<Option<Decrypted>> {
        let Some(key) = self.volume_key(&**base, secret)? else { return Ok(None) };
        let cipher = Cipher::new(self.kind, &key)?;
        let data = self.data.clone();
        Ok(Some(Decrypted { base: Arc::clone(base), data, cipher, sector: self.sector, tweak: self.tweak }))
    }

    /// Where the encrypted bytes begin.
    pub(super) fn start(&self) -> u64 {
        self.data.start
    }

    fn volume_key(&self, base: &dyn Blocks, secret: &Secret) -> Result<Option<Zeroizing<Vec<u8>>>> {
        let mut cost = Cost::default();
        let passphrase = match secret {
            Secret::VolumeKey(key) => {
                return Ok(self.check.agrees(key, &mut cost)?.then(|| key.clone()));
            }
            Secret::Passphrase(passphrase) => passphrase,
        };
        for slot in &self.slots {
            let key = slot.open(base, passphrase, &mut cost)?;
            if self.check.agrees(&key, &mut cost)? {
                return Ok(Some(key));
            }
        }
        Ok(None)
    }
}

/// What a header has cost so far: it can demand any amount of work.
#[derive(Default)]
struct Cost {
    rounds: u64,
    touched: u64,
}

impl Cost {
    fn spend(&mut self, rounds: u64, touched: u64) -> Result<()> {
        self.rounds = self.rounds.saturating_add(rounds);
        self.touched = self.touched.saturating_add(touched);
        if self.rounds > ROUNDS_MAX || self.touched > TOUCHED_MAX {
            return Err(Error::new(
                Code::Refused,
                "the LUKS header demands more work than any passphrase is worth",
            ));
        }
        Ok(())
    }
}

impl Check {
    fn agrees(&self, key: &[u8], cost: &mut Cost) -> Result<bool> {
        let mut digest = vec![0; self.digest.len()];
        stretch(self.hash, self.rounds, &self.salt, key, &mut digest, cost)?;
        Ok(!digest.is_empty() && constant_time::verify_slices_are_equal(&digest, &self.digest).is_ok())
    }
}

fn stretch(
    hash: Hash,
    rounds: u32,
    salt: &[u8],
    secret: &[u8],
    out: &mut [u8],
    cost: &mut Cost,
) -> Result<()> {
    let rounds = NonZeroU32::new(rounds).ok_or_else(|| Error::integrity("a key derived in no rounds"))?;
    cost.spend(u64::from(rounds.get()) * (out.len() as u64).div_ceil(20).max(1), 0)?;
    pbkdf2::derive(hash.pbkdf2(), rounds, salt, secret, out);
    Ok(())
}

impl Derivation {
    fn derive(&self, passphrase: &[u8], length: usize, cost: &mut Cost) -> Result<Zeroizing<Vec<u8>>> {
        let mut key = Zeroizing::new(vec![0; length]);
        match self {
            Self::Pbkdf2 { hash, rounds, salt } => stretch(*hash, *rounds, salt, passphrase, &mut key, cost)?,
            Self::Argon2 { kind, passes, memory, lanes, salt } => {
                if *memory > MEMORY_MAX || *lanes > LANES_MAX {
                    return Err(unsupported(format!("Argon2 in {memory} KiB and {lanes} lanes")));
                }
                cost.spend(0, u64::from(*memory) * u64::from(*passes))?;
                let failed = |error| Error::integrity("a key derived in an impossible way").because(error);
                let failed = |error: argon2::Error| failed(error.to_string());
                let parameters =
                    argon2::Params::new(*memory, *passes, *lanes, Some(length)).map_err(failed)?;
                let argon2 = argon2::Argon2::new(*kind, argon2::Version::V0x13, parameters);
                argon2.hash_password_into(passphrase, salt, &mut key).map_err(failed)?;
            }
        }
        Ok(key)
    }
}

impl Slot {
    /// What the passphrase makes of the slot: the volume key, or nonsense.
    fn open(&self, base: &dyn Blocks, passphrase: &[u8], cost: &mut Cost) -> Result<Zeroizing<Vec<u8>>> {
        if self.wrap > KEY_MAX
            || self.key > KEY_MAX
            || self.key == 0
            || !(1..=SPREAD_MAX).contains(&self.spread)
        {
            return Err(Error::integrity(format!(
                "a key of {} bytes, spread {} times",
                self.key, self.spread
            )));
        }
        let wrap = self.derivation.derive(passphrase, self.wrap, cost)?;
        let length = self.key * bytes::index(u64::from(self.spread))?;
        let whole = length.next_multiple_of(bytes::index(SECTOR)?);
        let mut spread = Zeroizing::new(bytes::read(base, self.offset, whole)?);
        Cipher::new(self.kind, &wrap)?.decrypt(&mut spread, SECTOR, 0)?;
        Ok(gather(&spread[..length], self.key, self.spread_hash))
    }
}

/// Puts a spread key together again: every copy is mixed into the next, so that losing any of them loses the key.
fn gather(spread: &[u8], length: usize, hash: Hash) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0; length]);
    let copies = spread.chunks_exact(length);
    let last = copies.len() - 1;
    for (number, copy) in copies.enumerate() {
        key.iter_mut().zip(copy).for_each(|(byte, other)| *byte ^= other);
        if number == last {
            break;
        }
        for (part, piece) in (0u32..).zip(key.chunks_mut(hash.digest().output_len())) {
            let mut context = digest::Context::new(hash.digest());
            context.update(&part.to_be_bytes());
            context.update(piece);
            let length = piece.len();
            piece.copy_from_slice(&context.finish().as_ref()[..length]);
        }
    }
    key
}

/// The content of an encrypted volume, decrypted as it is read.
pub(super) struct Decrypted {
    base: Arc<dyn Blocks>,
    data: Range<u64>,
    cipher: Cipher,
    sector: u64,
    tweak: u64,
}

impl Blocks for Decrypted {
    fn size(&self) -> u64 {
        self.data.end - self.data.start
    }

    /// All is data: a hole decrypts to something else than zeros.
    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        check_range(self, &range)?;
        Ok(if range.is_empty() { Vec::new() } else { vec![extent(range, ExtentKind::Data)] })
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        check_read(self, offset, buffer.len())?;
        let (mut rest, mut at) = (buffer, offset);
        let mut piece = Zeroizing::new(Vec::new());
        while !rest.is_empty() {
            let skip = bytes::index(at % self.sector)?;
            let length = rest.len().min(PIECE - skip);
            let (here, after) = rest.split_at_mut(length);
            let start = at - skip as u64;
            let whole = (skip + length).next_multiple_of(bytes::index(self.sector)?);
            piece.zeroize();
            piece.resize(whole, 0);
            self.base.read_at(self.data.start + start, &mut piece)?;
            self.cipher.decrypt(&mut piece, self.sector, self.tweak.wrapping_add(start / SECTOR))?;
            here.copy_from_slice(&piece[skip..skip + length]);
            rest = after;
            at += length as u64;
        }
        Ok(())
    }
}
