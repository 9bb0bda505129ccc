//! Where a server listens.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use mainstay_core::{Code, Error};

/// The port that is registered for NBD.
const PORT: u16 = 10809;

/// Written `unix:/path` or `HOST`, `HOST:PORT`, `[::1]:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Unix(PathBuf),
    /// Port 0 lets a server choose one.
    Tcp {
        host: String,
        port: u16,
    },
}

impl Address {
    pub fn tcp(host: impl Into<String>, port: u16) -> Self {
        Self::Tcp { host: host.into(), port }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || {
            Error::new(Code::Usage, format!("{} is no address of an NBD server", text.escape_debug()))
                .hint("write unix:/path/of/the/socket, HOST or HOST:PORT")
        };
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() { Err(wrong()) } else { Ok(Self::Unix(path.into())) };
        }
        let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, port)) => (host, port.strip_prefix(':').or(port.is_empty().then_some(""))),
            None if text.starts_with('[') => return Err(wrong()),
            None if text.matches(':').count() > 1 => (text, Some("")),
            None => text.split_once(':').map_or((text, Some("")), |(host, port)| (host, Some(port))),
        };
        let port = match port {
            Some("") => PORT,
            Some(port) => port.parse().ok().ok_or_else(wrong)?,
            None => return Err(wrong()),
        };
        if host.is_empty() {
            return Err(wrong());
        }
        Ok(Self::tcp(host, port))
    }
}

#[cfg(test)]
mod tests {
    use super::Address;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for (text, address) in [
            ("unix:/run/a b.sock", Address::Unix("/run/a b.sock".into())),
            ("host:7", Address::tcp("host", 7)),
            ("[::1]:7", Address::tcp("::1", 7)),
        ] {
            assert_eq!(text.parse::<Address>().unwrap(), address);
            assert_eq!(address.to_string(), text);
        }
        for text in ["host", "::1", "[::1]"] {
            assert!(matches!(text.parse().unwrap(), Address::Tcp { port: 10809, .. }), "{text}");
        }
        for text in ["", "unix:", ":7", "host:x", "host:70000", "[::1]7", "[::1"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
