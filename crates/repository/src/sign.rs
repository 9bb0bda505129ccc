//! Ed25519 signatures (RFC 8032), each made for one named use.
//!
//! Signed are the bytes `"mainstay signature v1" ‖ le64(len context) ‖ context ‖ message`, so that a signature under
//! one record is never one under another kind of record.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use mainstay_core::{Error, Id16, Result, WriterId};

use crate::seal::{Secret, derive};

/// Length of a signature in bytes.
pub const SIGNATURE_LEN: usize = 64;

const PREFIX: &[u8] = b"mainstay signature v1";
const WRITER_CONTEXT: &str = "mainstay 2026 writer id v1";

/// Signs. The seed is wiped when the last clone is dropped.
#[derive(Clone)]
pub struct SigningKey {
    seed: Secret,
    pair: Arc<Ed25519KeyPair>,
    public: VerifyingKey,
}

impl SigningKey {
    pub fn generate() -> Result<Self> {
        Self::from_seed(Secret::random()?)
    }

    /// The key of a 32-byte seed (RFC 8032, section 5.1.5).
    pub fn from_seed(seed: Secret) -> Result<Self> {
        let refused = |_rejected| Error::bug("the signature library refused a seed");
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed[..]).map_err(refused)?;
        let public = pair.public_key().as_ref().try_into();
        let wrong_len = |_slice| Error::bug("an Ed25519 public key is not 32 bytes long");
        Ok(Self { seed, pair: Arc::new(pair), public: VerifyingKey(public.map_err(wrong_len)?) })
    }

    pub fn seed(&self) -> &Secret {
        &self.seed
    }

    pub fn verifying_key(&self) -> VerifyingKey {
        self.public
    }

    /// Signs `message` for the use that `context` names; the signature verifies for no other context.
    pub fn sign(&self, context: &str, message: &[u8]) -> [u8; SIGNATURE_LEN] {
        let mut signature = [0; SIGNATURE_LEN];
        signature.copy_from_slice(self.pair.sign(&signed_bytes(context, message)).as_ref());
        signature
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({}, ..)", self.public.writer_id())
    }
}

/// A public key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VerifyingKey(pub [u8; 32]);

impl VerifyingKey {
    /// Errors: [`mainstay_core::Code::Integrity`] unless this key signed `message` for `context`.
    pub fn verify(&self, context: &str, message: &[u8], signature: &[u8; SIGNATURE_LEN]) -> Result<()> {
        UnparsedPublicKey::new(&ED25519, &self.0)
            .verify(&signed_bytes(context, message), signature)
            .map_err(|_unspecified| Error::integrity(format!("the signature of this {context} is not valid")))
    }

    /// The first 16 bytes of the BLAKE3 hash of the key.
    pub fn writer_id(&self) -> WriterId {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, ..] = derive(WRITER_CONTEXT, &[&self.0]);
        Id16([a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p])
    }
}

impl fmt::Debug for VerifyingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VerifyingKey({})", Id16(self.writer_id().0))
    }
}

fn signed_bytes(context: &str, message: &[u8]) -> Vec<u8> {
    let length = (context.len() as u64).to_le_bytes();
    [PREFIX, &length, context.as_bytes(), message].concat()
}

#[cfg(test)]
mod tests {
    use mainstay_core::Code;

    use super::*;

    #[test]
    fn a_signature_holds_for_its_key_context_and_message_only() {
        let key = SigningKey::from_seed(Secret::new([3; 32])).unwrap();
        let other = SigningKey::generate().unwrap().verifying_key();
        let signature = key.sign("commit", b"message");
        let public = key.verifying_key();
        public.verify("commit", b"message", &signature).unwrap();
        let refused = |key: VerifyingKey, context, message: &[u8], signature| {
            assert_eq!(key.verify(context, message, &signature).unwrap_err().code(), Code::Integrity);
        };
        refused(other, "commit", b"message", signature);
        refused(public, "commi", b"tmessage", signature);
        refused(public, "point", b"message", signature);
        refused(public, "commit", b"massage", signature);
        for bit in 0..SIGNATURE_LEN * 8 {
            let mut flipped = signature;
            flipped[bit / 8] ^= 1 << (bit % 8);
            refused(public, "commit", b"message", flipped);
        }
        refused(VerifyingKey([0xFF; 32]), "commit", b"message", signature);
    }

    #[test]
    fn golden_identity_and_hidden_seed() {
        let key = SigningKey::from_seed(Secret::new([3; 32])).unwrap();
        // The public key of the all-3 seed, as RFC 8032 defines it, and our name for it.
        let hex: String = key.verifying_key().0.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "ed4928c628d1c2c6eae90338905995612959273a5c63f93636c14614ac8737d1");
        assert_eq!(key.verifying_key().writer_id().to_string(), "a47a37251232bfcc19185dbb9e81c12a");
        let shown = format!("{key:?} {:?}", key.verifying_key());
        assert!(!shown.contains("3, 3") && !shown.contains("0303"), "{shown}");
    }
}
