//! Wrapping secrets to a public key: HPKE (RFC 9180) in base mode, so that whoever only writes cannot read.
//!
//! ```text
//! suite 1: KEM X-Wing (X25519 + ML-KEM-768, 0x647a), KDF HKDF-SHA256, AEAD ChaCha20-Poly1305
//! wrapped = suite, 1 byte ‖ encapsulated key, 1120 bytes ‖ sealed secret ‖ tag, 16 bytes
//! ```
//!
//! Suite number and `info` are both authenticated. Anyone who holds the public key can wrap: a wrapped secret says
//! nothing about who made it; the signature of the record that holds it does.

use std::fmt;

use hpke::aead::ChaCha20Poly1305;
use hpke::kdf::HkdfSha256;
use hpke::kem::{Kem, XWing};
use hpke::{Deserializable, OpModeR, OpModeS, Serializable, single_shot_open, single_shot_seal};
use mainstay_core::{Code, Error, Result};
use zeroize::Zeroizing;

use crate::seal::Secret;

type PublicKey = <XWing as Kem>::PublicKey;
type PrivateKey = <XWing as Kem>::PrivateKey;
type Encapsulated = <XWing as Kem>::EncappedKey;

const SUITE_XWING: u8 = 1;
const ENCAPSULATED_LEN: usize = 1120;
/// Length of a public key in bytes.
pub const PUBLIC_LEN: usize = 1216;
/// Bytes that wrapping adds to a secret.
pub const OVERHEAD: usize = 1 + ENCAPSULATED_LEN + 16;

/// Wraps to the holder of the [`WrapSecret`].
#[derive(Clone, PartialEq, Eq)]
pub struct WrapPublic(PublicKey);

impl WrapPublic {
    /// Exactly [`PUBLIC_LEN`] bytes; [`Code::Integrity`] when they are no public key.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let refused = |error: hpke::HpkeError| {
            Error::integrity("these bytes are not a public key").because(error.to_string())
        };
        PublicKey::from_bytes(bytes).map(Self).map_err(refused)
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.to_bytes().to_vec()
    }
}

impl fmt::Debug for WrapPublic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WrapPublic({})", &blake3::hash(&self.to_bytes()).to_hex()[..16])
    }
}

/// Unwraps. Kept as the 32-byte seed of X-Wing, from which both of its keys follow.
#[derive(Clone)]
pub struct WrapSecret(Secret);

impl WrapSecret {
    pub fn generate() -> Result<Self> {
        Secret::random().map(Self)
    }

    pub const fn from_secret(secret: Secret) -> Self {
        Self(secret)
    }

    pub fn secret(&self) -> &Secret {
        &self.0
    }

    pub fn public(&self) -> Result<WrapPublic> {
        Ok(WrapPublic(XWing::sk_to_pk(&self.private()?)))
    }

    fn private(&self) -> Result<PrivateKey> {
        let refused =
            |error: hpke::HpkeError| Error::bug("a seed was refused as a key").because(error.to_string());
        PrivateKey::from_bytes(&self.0[..]).map_err(refused)
    }
}

impl fmt::Debug for WrapSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WrapSecret(..)")
    }
}

/// Wraps `secret` for the holder of the private key, bound to `info` (which names what it is for, and where).
///
/// Errors: [`Code::Bug`] only; the operating system's generator failing ends the process.
pub fn wrap(to: &WrapPublic, info: &[u8], secret: &[u8]) -> Result<Vec<u8>> {
    let (encapsulated, sealed) = single_shot_seal::<ChaCha20Poly1305, HkdfSha256, XWing>(
        &OpModeS::Base,
        &to.0,
        info,
        secret,
        &[SUITE_XWING],
    )
    .map_err(|error| Error::bug("cannot wrap a key").because(error.to_string()))?;
    Ok([&[SUITE_XWING][..], &encapsulated.to_bytes(), &sealed].concat())
}

/// The secret that was wrapped under the same `info`.
///
/// Errors: [`Code::TooNew`] for a suite this version does not know, [`Code::Integrity`] when key, `info` or any
/// byte differs from what was wrapped.
pub fn unwrap(with: &WrapSecret, info: &[u8], wrapped: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
    let refused = || Error::integrity("a wrapped key does not open");
    let (&suite, rest) = wrapped.split_first().ok_or_else(refused)?;
    if suite != SUITE_XWING {
        return Err(Error::new(Code::TooNew, format!("a key is wrapped with the unknown suite {suite}"))
            .hint("Read this repository with a newer Mainstay."));
    }
    let (encapsulated, sealed) = rest.split_at_checked(ENCAPSULATED_LEN).ok_or_else(refused)?;
    let encapsulated = Encapsulated::from_bytes(encapsulated).map_err(|_refused| refused())?;
    single_shot_open::<ChaCha20Poly1305, HkdfSha256, XWing>(
        &OpModeR::Base,
        &with.private()?,
        &encapsulated,
        info,
        sealed,
        &[SUITE_XWING],
    )
    .map(Zeroizing::new)
    .map_err(|_refused| refused())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_holder_of_the_secret_unwraps_and_only_what_was_wrapped() {
        let key = WrapSecret::generate().unwrap();
        let public = WrapPublic::from_bytes(&key.public().unwrap().to_bytes()).unwrap();
        let wrapped = wrap(&public, b"pack 1", b"the key of a pack").unwrap();
        assert_eq!(wrapped.len(), 17 + OVERHEAD);
        assert_eq!(unwrap(&key, b"pack 1", &wrapped).unwrap().as_slice(), b"the key of a pack");
        assert_ne!(wrapped, wrap(&public, b"pack 1", b"the key of a pack").unwrap());

        let refused = |key: &WrapSecret, info: &[u8], wrapped: &[u8]| {
            assert_eq!(unwrap(key, info, wrapped).unwrap_err().code(), Code::Integrity);
        };
        refused(&WrapSecret::generate().unwrap(), b"pack 1", &wrapped);
        refused(&key, b"pack 2", &wrapped);
        for at in (1..wrapped.len()).step_by(13).chain([wrapped.len() - 1]) {
            let mut flipped = wrapped.clone();
            flipped[at] ^= 0x40;
            refused(&key, b"pack 1", &flipped);
        }
        for len in [0, 1, 1000, ENCAPSULATED_LEN + 1, OVERHEAD - 1, wrapped.len() - 1] {
            refused(&key, b"pack 1", &wrapped[..len]);
        }
    }

    #[test]
    fn an_unknown_suite_is_too_new_and_nothing_secret_is_shown() {
        let key = WrapSecret::from_secret(Secret::new([0xAB; 32]));
        let mut wrapped = wrap(&key.public().unwrap(), b"", b"x").unwrap();
        wrapped[0] = 2;
        assert_eq!(unwrap(&key, b"", &wrapped).unwrap_err().code(), Code::TooNew);
        assert_eq!(format!("{key:?}"), "WrapSecret(..)");
        assert_eq!(WrapPublic::from_bytes(&[0xFF; PUBLIC_LEN]).unwrap_err().code(), Code::Integrity);
        assert_eq!(WrapPublic::from_bytes(&[0; 7]).unwrap_err().code(), Code::Integrity);
    }

    /// A key wrapped by the first release opens forever.
    #[test]
    fn golden_public_key() {
        let key = WrapSecret::from_secret(Secret::new([1; 32]));
        assert_eq!(
            blake3::hash(&key.public().unwrap().to_bytes()).to_hex()[..32].to_owned(),
            "b7173bda0013cc5797dcb9834337ad17"
        );
    }
}
