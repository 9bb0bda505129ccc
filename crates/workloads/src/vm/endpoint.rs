//! Where a monitor or an agent listens: beside us, or on another machine.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use mainstay_core::{Code, Error, Result};
use mainstay_nbd::{Address, ClientTls};
use serde::{Deserialize, Serialize};

/// Written as a path, or `tcp://HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Endpoint {
    Unix(PathBuf),
    Tcp {
        host: String,
        port: u16,
        /// The directory of our certificates ([`ClientTls::from_directory`]). Whoever speaks to a monitor can do
        /// whatever QEMU can, so without TLS only this very machine is spoken to: the end of a tunnel.
        tls: Option<PathBuf>,
    },
}

impl Endpoint {
    /// With certificates for TCP; a path needs none.
    #[must_use]
    pub fn secured(self, certificates: Option<&Path>) -> Self {
        match self {
            Self::Tcp { host, port, .. } => Self::Tcp { host, port, tls: certificates.map(Path::to_owned) },
            unix @ Self::Unix(_) => unix,
        }
    }

    /// The address to connect to, and how.
    ///
    /// Errors: [`Code::Usage`] for another machine without TLS.
    pub(super) fn dial(&self) -> Result<(Address, Option<ClientTls>)> {
        match self {
            Self::Unix(path) => Ok((Address::Unix(path.clone()), None)),
            Self::Tcp { host, port, tls } => {
                let here = matches!(host.as_str(), "localhost" | "127.0.0.1" | "::1");
                if tls.is_none() && !here {
                    let what =
                        format!("{self} is on another machine, and nothing protects what is said to it");
                    return Err(Error::new(Code::Usage, what).hint("name the certificates: tls=DIR"));
                }
                let tls = tls.as_deref().map(ClientTls::from_directory).transpose()?;
                Ok((Address::tcp(host.clone(), *port), tls))
            }
        }
    }
}

impl From<PathBuf> for Endpoint {
    fn from(path: PathBuf) -> Self {
        Self::Unix(path)
    }
}

impl From<&Path> for Endpoint {
    fn from(path: &Path) -> Self {
        Self::Unix(path.to_owned())
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp { host, port, .. } => write!(f, "tcp://{}", Address::tcp(host.clone(), *port)),
        }
    }
}

impl FromStr for Endpoint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let Some(rest) = text.strip_prefix("tcp://") else { return Ok(Self::Unix(text.into())) };
        match (rest.parse()?, rest.rsplit_once(':')) {
            (Address::Tcp { host, port }, Some((_, given))) if given.parse() == Ok(port) => {
                Ok(Self::Tcp { host, port, tls: None })
            }
            _ => {
                Err(Error::new(Code::Usage, format!("{text:?} names no port")).hint("write tcp://HOST:PORT"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Endpoint;

    #[test]
    fn other_machines_are_spoken_to_by_tls_only() {
        for far in ["tcp://host:4444", "tcp://[fe80::1]:4444"] {
            let endpoint: Endpoint = far.parse().unwrap();
            assert_eq!(endpoint.to_string(), far);
            assert!(endpoint.dial().is_err(), "{far}");
        }
        for here in ["tcp://127.0.0.1:4444", "tcp://[::1]:4444", "/run/web.qmp"] {
            assert!(here.parse::<Endpoint>().unwrap().dial().is_ok(), "{here}");
        }
        for wrong in ["tcp://", "tcp://host", "tcp://:4444", "tcp://host:x", "tcp://::1"] {
            assert!(wrong.parse::<Endpoint>().is_err(), "{wrong}");
        }
    }
}
