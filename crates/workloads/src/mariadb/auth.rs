//! How a password is proven without being told.

use aws_lc_rs::digest::{Digest, SHA1_FOR_LEGACY_USE_ONLY, SHA512, digest};
use curve25519_dalek::{EdwardsPoint, Scalar};
use mainstay_core::{Code, Error, Result};

/// What answers a server's challenge, by the name of its method. Nothing is sent where the server asks for nothing.
pub(super) fn answer(method: &str, challenge: &[u8], password: &[u8]) -> Result<Vec<u8>> {
    match method {
        _ if password.is_empty() && method != "mysql_clear_password" => Ok(Vec::new()),
        "mysql_native_password" | "" => Ok(native(challenge, password)),
        "client_ed25519" => Ok(ed25519(challenge, password)),
        "auth_socket" | "unix_socket" => Ok(Vec::new()),
        // The name came from outside.
        _ => Err(Error::new(
            Code::Unsupported,
            "the server wants the password proven in a way that is not known here",
        )
        .hint(
            "give the account a password by mysql_native_password or ed25519, or let it in by unix_socket",
        )),
    }
}

fn sha1(parts: &[&[u8]]) -> Digest {
    digest(&SHA1_FOR_LEGACY_USE_ONLY, &parts.concat())
}

/// <https://mariadb.com/kb/en/connection/#mysql_native_password-plugin>
fn native(challenge: &[u8], password: &[u8]) -> Vec<u8> {
    let challenge = challenge.strip_suffix(&[0]).unwrap_or(challenge);
    let once = sha1(&[password]);
    let twice = sha1(&[once.as_ref()]);
    let mask = sha1(&[challenge, twice.as_ref()]);
    once.as_ref().iter().zip(mask.as_ref()).map(|(one, other)| one ^ other).collect()
}

/// Ed25519 over the challenge, but with the hash of a password of any length in the place of that of a seed.
/// <https://mariadb.com/kb/en/connection/#client_ed25519-plugin>
fn ed25519(challenge: &[u8], password: &[u8]) -> Vec<u8> {
    let wide = |parts: &[&[u8]]| {
        let mut bytes = [0; 64];
        bytes.copy_from_slice(digest(&SHA512, &parts.concat()).as_ref());
        bytes
    };
    let secret = wide(&[password]);
    let (low, nonce) = secret.split_at(32);
    let mut low: [u8; 32] = low.try_into().unwrap_or_default();
    low = curve25519_dalek::scalar::clamp_integer(low);
    let public = EdwardsPoint::mul_base_clamped(low).compress();
    let r = Scalar::from_bytes_mod_order_wide(&wide(&[nonce, challenge]));
    let commitment = EdwardsPoint::mul_base(&r).compress();
    let k = Scalar::from_bytes_mod_order_wide(&wide(&[commitment.as_bytes(), public.as_bytes(), challenge]));
    let s = r + k * Scalar::from_bytes_mod_order(low);
    [commitment.as_bytes().as_slice(), s.as_bytes()].concat()
}
