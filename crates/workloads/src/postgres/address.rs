//! Where a server is, and as whom to speak to it.

use std::path::PathBuf;
use std::str::FromStr;

use mainstay_core::{Code, Error, Result};

use super::tls::{Tls, TlsMode};

const DEFAULT_PORT: u16 = 5432;
const DEFAULT_SOCKETS: &str = "/var/run/postgresql";

/// How a server is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The directory of its socket.
    Socket(PathBuf),
    Host(String),
}

/// `postgres://[USER@][HOST][:PORT][/DATABASE][?host=DIRECTORY&…]`, as PostgreSQL's own programs take it. A password in it
/// is refused: it would be seen by everybody who lists processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    pub place: Place,
    pub port: u16,
    pub user: Option<String>,
    pub database: Option<String>,
    /// For a host: `sslmode`, `sslrootcert`, `sslcert` and `sslkey` among the parameters.
    pub tls: Tls,
}

impl Address {
    /// For people: without what could be secret.
    pub fn display(&self) -> String {
        match &self.place {
            Place::Socket(directory) => format!("{}/.s.PGSQL.{}", directory.display(), self.port),
            Place::Host(host) if host.contains(':') => format!("[{host}]:{}", self.port),
            Place::Host(host) => format!("{host}:{}", self.port),
        }
    }
}

fn wrong(why: &str) -> Error {
    Error::new(Code::Usage, format!("this is not the address of a PostgreSQL server: {why}")).hint(
        "write it as postgres://USER@HOST:PORT/DATABASE, or postgres:///DATABASE?host=/var/run/postgresql for a socket",
    )
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let rest = text
            .strip_prefix("postgres://")
            .or_else(|| text.strip_prefix("postgresql://"))
            .ok_or_else(|| wrong("it does not begin with postgres://"))?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
        let (user, host) = match authority.rsplit_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, authority),
        };
        if user.is_some_and(|user| user.contains(':')) {
            return Err(Error::new(Code::Usage, "a password in an address is seen by everybody on this machine").hint(
                "leave it out; give it in a file with --password-file, or in ~/.pgpass as for PostgreSQL's own programs",
            ));
        }
        let (host, port) = split_port(host)?;
        let mut address = Self {
            place: if host.is_empty() {
                Place::Socket(DEFAULT_SOCKETS.into())
            } else {
                Place::Host(decode(host)?)
            },
            port: port.unwrap_or(DEFAULT_PORT),
            user: user.map(decode).transpose()?.filter(|user| !user.is_empty()),
            database: Some(decode(database)?).filter(|database| !database.is_empty()),
            tls: Tls::default(),
        };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').ok_or_else(|| wrong("a parameter has no value"))?;
            let value = decode(value)?;
            match name {
                "host" if value.starts_with('/') => address.place = Place::Socket(value.into()),
                "host" => address.place = Place::Host(value),
                "port" => address.port = value.parse().map_err(|_number| wrong("its port is no number"))?,
                "user" => address.user = Some(value),
                "dbname" => address.database = Some(value),
                "sslmode" => {
                    address.tls.mode = TlsMode::named(&value).ok_or_else(|| {
                        wrong("its sslmode is none of disable, prefer, require, verify-ca and verify-full")
                    })?;
                }
                "sslrootcert" => address.tls.authorities = Some(value.into()),
                "sslcert" => address.tls.certificate = Some(value.into()),
                "sslkey" => address.tls.key = Some(value.into()),
                _ => return Err(wrong(&format!("the parameter {name:?} is not known"))),
            }
        }
        Ok(address)
    }
}

fn split_port(host: &str) -> Result<(&str, Option<u16>)> {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (name, after) = rest.split_once(']').ok_or_else(|| wrong("a bracket is not closed"))?;
            (name, after.strip_prefix(':'))
        }
        None => match host.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, None),
        },
    };
    let port = port.map(str::parse).transpose().map_err(|_number| wrong("its port is no number"))?;
    Ok((name, port))
}

/// Percent-encoded text.
fn decode(text: &str) -> Result<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || char::from(rest.next()?).to_digit(16);
        let (Some(high), Some(low)) = (digit(), digit()) else {
            return Err(wrong("a % is not followed by two hexadecimal digits"));
        };
        bytes.push((high << 4 | low) as u8);
    }
    match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(wrong("a part of it is no text")),
    }
}

#[cfg(test)]
mod tests {
    use super::{Address, Place, TlsMode};

    #[test]
    fn addresses_are_read_as_the_servers_own_programs_read_them() {
        let read = |text: &str| text.parse::<Address>().unwrap();
        let socket = read("postgres:///shop?host=/tmp/a%20b&port=5433&user=backup");
        assert_eq!(socket.place, Place::Socket("/tmp/a b".into()));
        assert_eq!((socket.port, socket.user.as_deref()), (5433, Some("backup")));
        assert_eq!(socket.database.as_deref(), Some("shop"));
        let host = read("postgresql://ba%40ckup@db.example:6000");
        assert_eq!((host.place, host.port), (Place::Host("db.example".into()), 6000));
        assert_eq!(host.user.as_deref(), Some("ba@ckup"));
        assert_eq!(read("postgres://[::1]:7/x").place, Place::Host("::1".into()));
        let tls = read("postgres://h?sslmode=verify-full&sslrootcert=/etc/ca.pem").tls;
        assert_eq!((tls.mode, tls.authorities), (TlsMode::VerifyFull, Some("/etc/ca.pem".into())));
        assert_eq!(read("postgres://h").tls.mode, TlsMode::Prefer);
        assert_eq!(read("postgres://").place, Place::Socket("/var/run/postgresql".into()));
    }

    #[test]
    fn a_password_or_nonsense_is_refused_and_not_repeated() {
        let error = "postgres://me:hunter2@host/db".parse::<Address>().unwrap_err();
        assert!(!error.chain().join(" ").contains("hunter2"));
        for bad in [
            "mysql://x",
            "postgres://h:x",
            "postgres://h?port",
            "postgres://h?sslmode=off",
            "postgres://%x",
            "postgres://[::1",
        ] {
            bad.parse::<Address>().unwrap_err();
        }
    }
}
