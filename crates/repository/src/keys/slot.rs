//! A key ring sealed under a passphrase or a random key, to be stored inside the repository.
//!
//! The head of a slot is readable by everyone, so that a wrong key can be told whose slot it was tried on. It is
//! authenticated by opening. A digest at the end tells damage from a wrong passphrase.

use argon2::{Algorithm, Argon2, Params, Version};
use mainstay_core::{Code, Error, Id16, Result, Time};
use zeroize::Zeroizing;

use super::bytes::Bytes;
use super::ring::RING_LEN_MAX;
use super::{KeyRing, Powers, short};
use crate::seal::{SealKey, Secret, Siv, TAG_LEN, constant_time_eq, open, random_bytes, seal};

const MAGIC: &[u8; 8] = b"MSTYSLOT";
const VERSION: u16 = 1;
const LOCK_PASSPHRASE: u8 = 1;
const LOCK_KEY: u8 = 2;
/// Longest label in bytes.
pub const LABEL_LEN_MAX: usize = 200;
/// Longest slot that is read, in bytes.
pub const SLOT_LEN_MAX: usize = RING_LEN_MAX + 1024;
const DIGEST_LEN: usize = 16;
const SALT_LEN: usize = 16;
const AAD: &[u8] = b"mainstay 2026 key slot v1";
const KEY_CONTEXT: &str = "mainstay 2026 key slot: random key v1";

const MEMORY_KIB_MAX: u32 = 1 << 20;
const LANES_MAX: u32 = 16;
/// Memory times passes, in KiB: what a hostile slot can make a reader do is bounded to some ten seconds.
const WORK_KIB_MAX: u64 = 16 << 20;

/// Names a slot.
pub type SlotId = Id16;

/// What guessing one passphrase costs: Argon2id version 0x13 (RFC 9106).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// In KiB; 8 per lane to 1 GiB.
    pub memory_kib: u32,
    pub passes: u32,
    /// 1 to 16.
    pub lanes: u32,
}

impl Default for Cost {
    /// 64 MiB, 3 passes, 4 lanes: the second choice of RFC 9106, for machines of every size.
    fn default() -> Self {
        Self { memory_kib: 64 << 10, passes: 3, lanes: 4 }
    }
}

impl Cost {
    /// The parameters, if a reader may be asked to spend that much.
    fn parameters(self) -> Result<Params> {
        let Self { memory_kib, passes, lanes } = self;
        let work = u64::from(memory_kib) * u64::from(passes);
        let silly = || {
            let what =
                format!("Argon2 with {memory_kib} KiB, {passes} passes and {lanes} lanes is out of bounds");
            Error::integrity(what).hint("A slot may ask for at most 1 GiB, 16 GiB·passes and 16 lanes.")
        };
        if memory_kib > MEMORY_KIB_MAX || lanes > LANES_MAX || work > WORK_KIB_MAX {
            return Err(silly());
        }
        Params::new(memory_kib, passes, lanes, Some(32)).map_err(|error| silly().because(error.to_string()))
    }
}

/// What people read about a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// At most [`LABEL_LEN_MAX`] bytes.
    pub label: String,
    pub created: Time,
}

/// The readable head of a slot. True only once the slot has been opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub slot: SlotId,
    /// The first half of the repository's [`super::FamilyId`].
    pub family: Id16,
    pub about: About,
    /// What the ring inside can do.
    pub powers: Powers,
    pub lock: Lock,
}

/// What opens a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lock {
    Passphrase {
        cost: Cost,
        salt: [u8; SALT_LEN],
    },
    /// A random key: the recovery kit or a key file.
    Key,
}

impl Header {
    fn new(ring: &KeyRing, about: &About, lock: Lock) -> Result<Self> {
        if about.label.len() > LABEL_LEN_MAX {
            return Err(Error::new(
                Code::Usage,
                format!("a key's label is longer than {LABEL_LEN_MAX} bytes"),
            ));
        }
        Ok(Self {
            slot: Id16(random_bytes()?),
            family: ring.family().prefix(),
            about: about.clone(),
            powers: ring.powers(),
            lock,
        })
    }

    fn encode(&self) -> Vec<u8> {
        let no_cost = Cost { memory_kib: 0, passes: 0, lanes: 0 };
        let (kind, cost, salt) = match self.lock {
            Lock::Passphrase { cost, salt } => (LOCK_PASSPHRASE, cost, salt),
            Lock::Key => (LOCK_KEY, no_cost, [0; SALT_LEN]),
        };
        // Labels are bounded by `new` and by `decode`.
        let label_len = self.about.label.len() as u8;
        [
            &MAGIC[..],
            &VERSION.to_le_bytes(),
            &[kind, label_len],
            &self.family.0,
            &self.slot.0,
            &self.about.created.0.to_le_bytes(),
            &self.powers.0.to_le_bytes(),
            &cost.memory_kib.to_le_bytes(),
            &cost.passes.to_le_bytes(),
            &cost.lanes.to_le_bytes(),
            &salt,
            self.about.label.as_bytes(),
        ]
        .concat()
    }

    fn decode(bytes: &mut Bytes<'_>) -> Result<Self> {
        if bytes.array()? != *MAGIC {
            return Err(bytes.broken("does not begin as one"));
        }
        let version = bytes.u16()?;
        let kind = bytes.u8()?;
        if version != VERSION || !matches!(kind, LOCK_PASSPHRASE | LOCK_KEY) {
            let what = format!("a key slot has the unknown version {version} or lock {kind}");
            return Err(Error::new(Code::TooNew, what).hint("Open it with a newer Mainstay."));
        }
        let label_len = usize::from(bytes.u8()?);
        let (family, slot) = (Id16(bytes.array()?), Id16(bytes.array()?));
        let created = Time(bytes.u64()?.cast_signed());
        let powers = Powers(bytes.u32()?);
        let cost = Cost { memory_kib: bytes.u32()?, passes: bytes.u32()?, lanes: bytes.u32()? };
        let salt = bytes.array()?;
        let label = bytes.take(label_len)?.to_vec();
        let label =
            String::from_utf8(label).map_err(|_utf8| bytes.broken("has a label that is not UTF-8"))?;
        if label.len() > LABEL_LEN_MAX {
            return Err(bytes.broken("has too long a label"));
        }
        let lock = if kind == LOCK_KEY { Lock::Key } else { Lock::Passphrase { cost, salt } };
        Ok(Self { slot, family, about: About { label, created }, powers, lock })
    }

    /// "key slot 0011…ff “laptop” of repository 0123-4567-89ab-cdef", safe to print.
    pub fn describe(&self) -> String {
        let label = self.about.label.escape_debug();
        format!("key slot {} “{label}” of repository {}", self.slot, short(&self.family.0))
    }
}

/// Seals `ring` under `passphrase`, which is taken byte for byte.
///
/// Errors: [`Code::Usage`] for an empty passphrase or a long label; those of the operating system's generator.
pub fn seal_with_passphrase(ring: &KeyRing, about: &About, passphrase: &[u8], cost: Cost) -> Result<Vec<u8>> {
    if passphrase.is_empty() {
        return Err(Error::new(Code::Usage, "the passphrase is empty"));
    }
    let salt = random_bytes()?;
    let header = Header::new(ring, about, Lock::Passphrase { cost, salt })?;
    seal_ring(ring, &header, &stretch(passphrase, cost, &salt)?)
}

/// Seals `ring` under a random key, without stretching it.
pub fn seal_with_key(ring: &KeyRing, about: &About, key: &Secret) -> Result<Vec<u8>> {
    let header = Header::new(ring, about, Lock::Key)?;
    let key = SealKey::from_secret(key.clone()).derive(KEY_CONTEXT, &header.slot.0);
    seal_ring(ring, &header, &key)
}

/// The readable head, for lists. Errors: [`Code::Integrity`] for a damaged slot, [`Code::TooNew`].
pub fn read_header(slot: &[u8]) -> Result<Header> {
    Parsed::new(slot).map(|parsed| parsed.header)
}

/// Errors: [`Code::WrongKey`] for another passphrase, [`Code::Usage`] when the slot takes none,
/// [`Code::Integrity`] for a damaged slot, [`Code::TooNew`].
pub fn open_with_passphrase(slot: &[u8], passphrase: &[u8]) -> Result<KeyRing> {
    let parsed = Parsed::new(slot)?;
    let Lock::Passphrase { cost, salt } = parsed.header.lock else {
        return Err(parsed.other_lock("a recovery kit or a key file, not by a passphrase"));
    };
    parsed.open(&stretch(passphrase, cost, &salt)?, "the passphrase")
}

/// Errors: as [`open_with_passphrase`].
pub fn open_with_key(slot: &[u8], key: &Secret) -> Result<KeyRing> {
    let parsed = Parsed::new(slot)?;
    if parsed.header.lock != Lock::Key {
        return Err(parsed.other_lock("a passphrase, not by a recovery kit or a key file"));
    }
    let key = SealKey::from_secret(key.clone()).derive(KEY_CONTEXT, &parsed.header.slot.0);
    parsed.open(&key, "the key")
}

fn seal_ring(ring: &KeyRing, header: &Header, key: &SealKey) -> Result<Vec<u8>> {
    let head = header.encode();
    let mut sealed = ring.encode();
    sealed.reserve_exact(TAG_LEN);
    let siv = seal(key, &[AAD, &head].concat(), &mut sealed)?;
    let len = (sealed.len() as u32).to_le_bytes();
    let mut slot = [&head[..], &siv.0, &len, &sealed].concat();
    let digest = digest(&slot);
    slot.extend_from_slice(&digest);
    Ok(slot)
}

fn digest(bytes: &[u8]) -> [u8; DIGEST_LEN] {
    let mut short = [0; DIGEST_LEN];
    short.iter_mut().zip(blake3::hash(bytes).as_bytes()).for_each(|(to, byte)| *to = *byte);
    short
}

fn stretch(passphrase: &[u8], cost: Cost, salt: &[u8; SALT_LEN]) -> Result<SealKey> {
    let mut key = Zeroizing::new([0; 32]);
    Argon2::new(Algorithm::Argon2id, Version::V0x13, cost.parameters()?)
        .hash_password_into(passphrase, salt, &mut key[..])
        .map_err(|error| {
            let what = format!("cannot stretch the passphrase with {} KiB of memory", cost.memory_kib);
            Error::new(Code::Unsupported, what).because(error.to_string())
        })?;
    Ok(SealKey::new(*key))
}

struct Parsed<'a> {
    header: Header,
    head: &'a [u8],
    siv: Siv,
    sealed: &'a [u8],
}

impl<'a> Parsed<'a> {
    fn new(slot: &'a [u8]) -> Result<Self> {
        let mut bytes = Bytes::new(slot, "key slot");
        let header = Header::decode(&mut bytes)?;
        let head = slot.get(..slot.len() - bytes.len()).unwrap_or_default();
        let siv = Siv(bytes.array()?);
        let len = bytes.u32()? as usize;
        if len > RING_LEN_MAX + TAG_LEN {
            return Err(bytes.broken("is too long"));
        }
        let sealed = bytes.take(len)?;
        let body = slot.get(..slot.len() - bytes.len()).unwrap_or_default();
        if !constant_time_eq(&digest(body), &bytes.last::<DIGEST_LEN>()?) {
            return Err(Error::integrity(format!("{} is damaged", header.describe()))
                .hint("Use its second copy, or another key of the repository."));
        }
        Ok(Self { header, head, siv, sealed })
    }

    fn open(&self, key: &SealKey, what: &str) -> Result<KeyRing> {
        let mut bytes = Zeroizing::new(self.sealed.to_vec());
        if open(key, &[AAD, self.head].concat(), &self.siv, &mut bytes).is_err() {
            return Err(Error::new(
                Code::WrongKey,
                format!("{what} does not open {}", self.header.describe()),
            )
            .hint("Check that it belongs to this repository and to this slot."));
        }
        let ring = KeyRing::decode(&bytes)?;
        if ring.family().prefix() != self.header.family {
            return Err(Error::integrity(format!(
                "{} holds keys of another repository",
                self.header.describe()
            )));
        }
        Ok(ring)
    }

    fn other_lock(&self, opener: &str) -> Error {
        Error::new(Code::Usage, format!("{} is opened by {opener}", self.header.describe()))
    }
}
