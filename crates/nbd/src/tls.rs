//! TLS by certificates, TLS 1.2 and later. Pre-shared keys are not offered: rustls does not have them.

use std::path::Path;
use std::sync::Arc;

use mainstay_core::{Code, Error, Result};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection};

use crate::address::Address;

/// A certificate with its chain, and its private key.
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    /// Both are texts in PEM; in `chain` the own certificate comes first.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self> {
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|error| unusable("the private key cannot be read as PEM").because(error))?;
        Ok(Self { chain: certificates(chain)?, key })
    }
}

/// How a client makes sure of its server, and who it says it is.
#[derive(Clone)]
pub struct ClientTls {
    config: Arc<ClientConfig>,
    name: Option<ServerName<'static>>,
}

impl ClientTls {
    /// `authorities` are the certificates, in PEM, that may have signed the server's; no others are believed.
    pub fn new(authorities: &[u8], identity: Option<Identity>) -> Result<Self> {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable("TLS cannot be set up").because(error))?
            .with_root_certificates(roots(authorities)?);
        let config = match identity {
            None => builder.with_no_client_auth(),
            Some(Identity { chain, key }) => builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| unusable("the client's certificate does not fit its key").because(error))?,
        };
        Ok(Self { config: Arc::new(config), name: None })
    }

    /// The name that the server's certificate must bear, when it is not the TCP host that is connected to.
    pub fn server_name(mut self, name: &str) -> Result<Self> {
        self.name = Some(server_name(name)?);
        Ok(self)
    }

    /// With the certificates of a directory, named as QEMU, libvirt and GnuTLS name them: `ca-cert.pem`,
    /// `client-cert.pem` and `client-key.pem`.
    pub fn from_directory(directory: &Path) -> Result<Self> {
        let authorities = pem(directory, "ca-cert.pem")?;
        let identity =
            Identity::from_pem(&pem(directory, "client-cert.pem")?, &pem(directory, "client-key.pem")?)?;
        Self::new(&authorities, Some(identity))
    }

    pub(crate) fn connection_to(&self, address: &Address) -> Result<Connection> {
        let name = match (&self.name, address) {
            (Some(name), _) => name.clone(),
            (None, Address::Tcp { host, .. }) => server_name(host)?,
            (None, Address::Unix(_)) => {
                return Err(Error::new(
                    Code::Usage,
                    "a socket has no host name to look for in a certificate",
                )
                .hint("say which name the server's certificate bears"));
            }
        };
        ClientConnection::new(Arc::clone(&self.config), name)
            .map(Connection::Client)
            .map_err(|error| unusable("TLS cannot be set up").because(error))
    }
}

/// Who a server says it is, and which clients it lets in.
#[derive(Clone)]
pub struct ServerTls(Arc<ServerConfig>);

impl ServerTls {
    /// With `clients`, certificates of authorities in PEM, only clients are let in that have a certificate signed by
    /// one of them. Without, everybody is, and TLS only keeps secrets.
    pub fn new(identity: Identity, clients: Option<&[u8]>) -> Result<Self> {
        let builder = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable("TLS cannot be set up").because(error))?;
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(authorities) => {
                let roots = Arc::new(roots(authorities)?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
                    .build()
                    .map_err(|error| unusable("the clients' authorities are unusable").because(error))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        builder
            .with_single_cert(identity.chain, identity.key)
            .map(|config| Self(Arc::new(config)))
            .map_err(|error| unusable("the server's certificate does not fit its key").because(error))
    }

    /// With the certificates of a directory, named as QEMU, libvirt and GnuTLS name them: `ca-cert.pem`,
    /// `server-cert.pem` and `server-key.pem`. Only clients are let in that the same authority has signed.
    pub fn from_directory(directory: &Path) -> Result<Self> {
        let authorities = pem(directory, "ca-cert.pem")?;
        let identity =
            Identity::from_pem(&pem(directory, "server-cert.pem")?, &pem(directory, "server-key.pem")?)?;
        Self::new(identity, Some(&authorities))
    }

    pub(crate) fn connection(&self) -> Result<Connection> {
        ServerConnection::new(Arc::clone(&self.0))
            .map(Connection::Server)
            .map_err(|error| unusable("TLS cannot be set up").because(error))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn server_name(name: &str) -> Result<ServerName<'static>> {
    ServerName::try_from(name.to_owned()).map_err(|error| {
        Error::new(Code::Usage, format!("{} can be no name in a certificate", name.escape_debug()))
            .because(error)
    })
}

fn roots(authorities: &[u8]) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(authorities)? {
        roots
            .add(certificate)
            .map_err(|error| unusable("a certificate is none of an authority").because(error))?;
    }
    Ok(roots)
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<std::result::Result<_, _>>()
        .map_err(|error| unusable("a certificate cannot be read as PEM").because(error))?;
    if certificates.is_empty() {
        return Err(unusable("there is no certificate in what was given as PEM"));
    }
    Ok(certificates)
}

fn pem(directory: &Path, name: &str) -> Result<Vec<u8>> {
    let path = directory.join(name);
    std::fs::read(&path).map_err(|error| {
        Error::io(format!("cannot read the certificates in {}", path.display()), error)
            .hint("a directory for TLS holds ca-cert.pem, and client-cert.pem with client-key.pem or the same for server")
    })
}

fn unusable(what: &str) -> Error {
    Error::new(Code::Usage, what)
}
