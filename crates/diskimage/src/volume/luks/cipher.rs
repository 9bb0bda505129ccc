//! AES over sectors, as dm-crypt does it.

use aws_lc_rs::cipher::{
    AES_128, AES_192, AES_256, Algorithm, DecryptingKey, DecryptionContext, EncryptingKey, UnboundCipherKey,
};
use aws_lc_rs::digest;
use mainstay_core::{Error, Result};
use zeroize::Zeroizing;

use super::unsupported;
use crate::bytes;

const BLOCK: usize = 16;

/// What `aes-xts-plain64` means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    mode: Mode,
    start: Start,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Xts,
    Cbc,
}

/// How the start of a sector is told from its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// The lower 32 bits of it.
    Plain,
    Plain64,
    /// Encrypted with the SHA-256 of the key.
    Essiv,
}

impl Kind {
    pub(super) fn named(name: &str) -> Result<Self> {
        let refused = || unsupported(format!("the cipher {name}"));
        let (mode, start) =
            name.strip_prefix("aes-").and_then(|rest| rest.split_once('-')).ok_or_else(refused)?;
        let mode = match mode {
            "xts" => Mode::Xts,
            "cbc" => Mode::Cbc,
            _ => return Err(refused()),
        };
        let start = match start {
            "plain" => Start::Plain,
            "plain64" => Start::Plain64,
            "essiv:sha256" => Start::Essiv,
            _ => return Err(refused()),
        };
        Ok(Self { mode, start })
    }
}

pub(super) struct Cipher {
    kind: Kind,
    data: DecryptingKey,
    /// Encrypts the number of a sector first.
    essiv: Option<EncryptingKey>,
    /// The second half of an XTS key, which encrypts it then.
    tweak: Option<EncryptingKey>,
}

impl Cipher {
    pub(super) fn new(kind: Kind, key: &[u8]) -> Result<Self> {
        let (data, tweak) = match kind.mode {
            Mode::Xts => {
                let (data, tweak) = key.split_at(key.len() / 2);
                (data, Some(encrypting(tweak)?))
            }
            Mode::Cbc => (key, None),
        };
        let essiv = match kind.start {
            Start::Essiv => Some(encrypting(digest::digest(&digest::SHA256, key).as_ref())?),
            Start::Plain | Start::Plain64 => None,
        };
        let unbound = UnboundCipherKey::new(algorithm(data)?, data).map_err(refused)?;
        Ok(Self { kind, data: DecryptingKey::ecb(unbound).map_err(refused)?, essiv, tweak })
    }

    /// Decrypts whole sectors of `sector` bytes in place. The first has the number `first`, counted in 512 bytes.
    pub(super) fn decrypt(&self, buffer: &mut [u8], sector: u64, first: u64) -> Result<()> {
        let (sector, step) = (bytes::index(sector)?, sector / super::SECTOR);
        let mut starts = Zeroizing::new(Vec::with_capacity(buffer.len() / sector * BLOCK));
        for number in 0..(buffer.len() / sector) as u64 {
            let number = first.wrapping_add(number.wrapping_mul(step));
            let number = if self.kind.start == Start::Plain { number & u64::from(u32::MAX) } else { number };
            starts.extend(u128::from(number).to_le_bytes());
        }
        for key in [&self.essiv, &self.tweak].into_iter().flatten() {
            key.encrypt(&mut starts).map_err(refused)?;
        }
        match self.kind.mode {
            Mode::Xts => self.xts(buffer, sector, &starts),
            Mode::Cbc => self.cbc(buffer, sector, &starts),
        }
    }

    /// Every block is masked before and after by what its place in the sector makes of the sector's start.
    fn xts(&self, buffer: &mut [u8], sector: usize, starts: &[u8]) -> Result<()> {
        let mut masks = Zeroizing::new(Vec::with_capacity(buffer.len()));
        for start in starts.as_chunks::<BLOCK>().0 {
            let mut mask = u128::from_le_bytes(*start);
            for _ in 0..sector / BLOCK {
                masks.extend(mask.to_le_bytes());
                mask = (mask << 1) ^ (0x87 & 0u128.wrapping_sub(mask >> 127));
            }
        }
        mix(buffer, &masks);
        self.blocks(buffer)?;
        mix(buffer, &masks);
        Ok(())
    }

    /// Every block is mixed with the encrypted one before it.
    fn cbc(&self, buffer: &mut [u8], sector: usize, starts: &[u8]) -> Result<()> {
        let mut before = Vec::with_capacity(buffer.len());
        for (start, sector) in starts.chunks_exact(BLOCK).zip(buffer.chunks_exact(sector)) {
            before.extend_from_slice(start);
            before.extend_from_slice(&sector[..sector.len() - BLOCK]);
        }
        self.blocks(buffer)?;
        mix(buffer, &before);
        Ok(())
    }

    fn blocks(&self, buffer: &mut [u8]) -> Result<()> {
        self.data.decrypt(buffer, DecryptionContext::None).map(|_same| ()).map_err(refused)
    }
}

fn mix(buffer: &mut [u8], other: &[u8]) {
    buffer.iter_mut().zip(other).for_each(|(byte, other)| *byte ^= other);
}

fn encrypting(key: &[u8]) -> Result<EncryptingKey> {
    EncryptingKey::ecb(UnboundCipherKey::new(algorithm(key)?, key).map_err(refused)?).map_err(refused)
}

fn algorithm(key: &[u8]) -> Result<&'static Algorithm> {
    match key.len() {
        16 => Ok(&AES_128),
        24 => Ok(&AES_192),
        32 => Ok(&AES_256),
        other => Err(Error::integrity(format!("an AES key of {other} bytes"))),
    }
}

fn refused(error: aws_lc_rs::error::Unspecified) -> Error {
    Error::integrity("the cipher refuses its key or its data").because(error)
}
