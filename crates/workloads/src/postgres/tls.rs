//! TLS to a server, as `sslmode` of PostgreSQL's own programs means it: asked for in the clear (chapter "SSL Session
//! Encryption"), and bound to the log-in where the certificate allows that (RFC 5929, tls-server-end-point).

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, SHA384, SHA512, digest};
use mainstay_core::{Code, Error, Result};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme, StreamOwned,
};

/// Says in the clear that TLS is wanted: `SSLRequest`.
const REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// What a server at a host must show. On a socket nothing is encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsMode {
    Disable,
    /// TLS if the server offers it, from whoever it is.
    #[default]
    Prefer,
    /// TLS, from whoever it is.
    Require,
    /// A certificate signed by a known authority.
    VerifyCa,
    /// One that bears the server's name as well.
    VerifyFull,
}

impl TlsMode {
    /// As it is written in addresses.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "disable" => Self::Disable,
            "prefer" => Self::Prefer,
            "require" => Self::Require,
            "verify-ca" => Self::VerifyCa,
            "verify-full" => Self::VerifyFull,
            _ => return None,
        })
    }
}

/// How a connection is encrypted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tls {
    pub mode: TlsMode,
    /// Certificates of authorities, as PEM.
    pub authorities: Option<PathBuf>,
    /// Our own certificate and its key, as PEM.
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
}

pub(super) type Encrypted = StreamOwned<ClientConnection, TcpStream>;

/// What a connection has become.
pub(super) enum Asked {
    Encrypted(Box<Encrypted>),
    /// The server has no TLS, and need not.
    Plain(TcpStream),
}

/// Goes over to TLS, as far as `tls` says so.
///
/// Errors: [`Code::Refused`] when the server does not offer what is wanted, or shows a certificate that is not believed.
pub(super) fn ask(mut socket: TcpStream, host: &str, tls: &Tls) -> Result<Asked> {
    let failed = |error| Error::io(format!("cannot ask {host} for TLS"), error);
    socket.write_all(&REQUEST).map_err(failed)?;
    let mut answer = [0];
    socket.read_exact(&mut answer).map_err(failed)?;
    match (answer, tls.mode) {
        ([b'S'], _) => {}
        (_, TlsMode::Prefer) => return Ok(Asked::Plain(socket)),
        _ => {
            return Err(Error::new(Code::Refused, format!("the server at {host} offers no TLS")).hint(
                "set ssl = on at the server, or say sslmode=disable in the address if the network is trusted",
            ));
        }
    }
    let name = match ServerName::try_from(host.to_owned()) {
        Ok(name) => name,
        // Nobody compares it then.
        Err(_no_name) if tls.mode < TlsMode::VerifyFull => {
            let peer = socket.peer_addr().map_err(failed)?.ip();
            ServerName::IpAddress(peer.into())
        }
        Err(error) => return Err(unusable("no certificate can bear such a name").because(error)),
    };
    let mut connection = ClientConnection::new(Arc::new(config(tls)?), name)
        .map_err(|error| unusable("TLS cannot be set up").because(error))?;
    while connection.is_handshaking() {
        connection.complete_io(&mut socket).map_err(|error| {
            Error::new(Code::Refused, format!("there is no trustworthy TLS with {host}")).because(error).hint(
                "sslrootcert in the address names the authority that signed the server's certificate; \
                 sslmode=verify-ca takes a certificate of another name",
            )
        })?;
    }
    Ok(Asked::Encrypted(Box::new(StreamOwned::new(connection, socket))))
}

/// What binds a log-in to this connection: the digest of the server's certificate. `None` where none is defined.
pub(super) fn binding(stream: &Encrypted) -> Option<Vec<u8>> {
    end_point(stream.conn.peer_certificates()?.first()?)
}

fn config(tls: &Tls) -> Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let authorities = tls.authorities.as_deref().map(certificates).transpose()?;
    if authorities.is_none() && tls.mode >= TlsMode::VerifyCa {
        return Err(unusable("the authority is not named that signed the server's certificate")
            .hint("add sslrootcert=FILE to the address"));
    }
    let mut roots = RootCertStore::empty();
    for certificate in authorities.iter().flatten() {
        roots.add(certificate.clone()).map_err(|error| {
            unusable("a certificate in sslrootcert is none of an authority").because(error)
        })?;
    }
    let verifier = Verifier {
        provider: Arc::clone(&provider),
        // As PostgreSQL's own programs do: an authority that is named is asked for.
        trusted: authorities.map(|certificates| (roots, certificates)),
        names: tls.mode == TlsMode::VerifyFull,
    };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable("TLS cannot be set up").because(error))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    match (&tls.certificate, &tls.key) {
        (Some(certificate), Some(key)) => {
            let chain = certificates(certificate)?;
            let secret = PrivateKeyDer::from_pem_slice(&read(key)?)
                .map_err(|error| unusable("the key in sslkey cannot be read as PEM").because(error))?;
            builder
                .with_client_auth_cert(chain, secret)
                .map_err(|error| unusable("the certificate in sslcert does not fit its key").because(error))
        }
        (None, None) => Ok(builder.with_no_client_auth()),
        _ => Err(unusable("sslcert and sslkey belong together")),
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| Error::io(format!("cannot read {}", path.display()), error))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<std::result::Result<_, _>>()
        .map_err(|error| unusable("a certificate cannot be read as PEM").because(error))?;
    if certificates.is_empty() {
        return Err(unusable(&format!("there is no certificate in {}", path.display())));
    }
    Ok(certificates)
}

fn unusable(what: &str) -> Error {
    Error::new(Code::Usage, what)
}

/// Believes as much as the mode says.
#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    trusted: Option<(RootCertStore, Vec<CertificateDer<'static>>)>,
    names: bool,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        if let Some((roots, themselves)) = &self.trusted {
            let certificate = ParsedCertificate::try_from(end_entity)?;
            // One that signed itself is often named as its own authority.
            if !themselves.contains(end_entity) {
                let algorithms = self.provider.signature_verification_algorithms.all;
                verify_server_cert_signed_by_trust_anchor(
                    &certificate,
                    roots,
                    intermediates,
                    now,
                    algorithms,
                )?;
            }
            if self.names {
                verify_server_name(&certificate, server_name)?;
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// The digest of a certificate by the algorithm that it is signed with; SHA-256 for the weak ones.
fn end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01];
    const ECDSA: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04];
    let (outer, _) = element(certificate, 0x30)?;
    let (_signed, rest) = element(outer, 0x30)?;
    let (algorithm, _) = element(rest, 0x30)?;
    let (name, _) = element(algorithm, 0x06)?;
    let with = match (name.strip_prefix(RSA), name.strip_prefix(ECDSA)) {
        // With MD5, SHA-1 and SHA-256; with SHA-1 and SHA-256.
        (Some([4 | 5 | 11]), _) | (_, Some([1] | [3, 2])) => &SHA256,
        (Some([12]), _) | (_, Some([3, 3])) => &SHA384,
        (Some([13]), _) | (_, Some([3, 4])) => &SHA512,
        _ => return None,
    };
    Some(digest(with, certificate).as_ref().to_vec())
}

/// The content of a DER element of type `tag`, and what follows it.
fn element(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (found, rest) = bytes.split_first()?;
    let (first, mut rest) = rest.split_first()?;
    let mut length = usize::from(*first);
    if *first & 0x80 != 0 {
        let (digits, after) =
            rest.split_at_checked(usize::from(first & 0x7f)).filter(|(digits, _)| digits.len() <= 4)?;
        length = digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit));
        rest = after;
    }
    rest.split_at_checked(length).filter(|_| *found == tag)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{SHA256, digest, element, end_point};

    proptest! {
        #[test]
        fn hostile_certificates_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _either = end_point(&bytes);
            let _either = element(&bytes, 0x30);
        }
    }

    #[test]
    fn a_certificate_is_bound_by_the_digest_that_it_is_signed_with() {
        let certificate = |name: &[u8]| {
            let name = [&[6, name.len() as u8], name].concat();
            let algorithm = [&[0x30, name.len() as u8], &name[..]].concat();
            let inner = [&[0x30, 1, 0], &algorithm[..], &[3, 1, 0]].concat();
            [&[0x30, 0x81, inner.len() as u8], &inner[..]].concat()
        };
        let ecdsa = |rest: &[u8]| certificate(&[&[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04], rest].concat());
        let small = ecdsa(&[3, 2]);
        assert_eq!(end_point(&small).as_deref(), Some(digest(&SHA256, &small).as_ref()));
        assert_eq!(end_point(&ecdsa(&[3, 3])).map(|sum| sum.len()), Some(48));
        assert_eq!(end_point(&ecdsa(&[3, 4])).map(|sum| sum.len()), Some(64));
        assert_eq!(end_point(&certificate(&[0x2b, 0x65, 0x70])), None, "Ed25519 has none");
    }
}
