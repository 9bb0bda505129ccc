//! Where a server is, and as whom to speak to it.

use std::path::PathBuf;
use std::str::FromStr;

use mainstay_core::{Code, Error, Result};

const DEFAULT_PORT: u16 = 3306;
const DEFAULT_SOCKET: &str = "/run/mysqld/mysqld.sock";

/// `mariadb://[USER@][HOST][:PORT][/?socket=PATH]`; `mysql://` is the same. A password in it is refused: it would be seen
/// by everybody who lists processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// `None` for a socket.
    pub host: Option<String>,
    pub port: u16,
    pub socket: PathBuf,
    pub user: Option<String>,
}

impl Address {
    /// For people.
    pub fn display(&self) -> String {
        match &self.host {
            None => self.socket.display().to_string(),
            Some(host) if host.contains(':') => format!("[{host}]:{}", self.port),
            Some(host) => format!("{host}:{}", self.port),
        }
    }
}

fn wrong(why: &str) -> Error {
    Error::new(Code::Usage, format!("this is not the address of a MariaDB server: {why}")).hint(
        "write it as mariadb://USER@HOST:PORT, or mariadb://USER@/?socket=/run/mysqld/mysqld.sock for a socket",
    )
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let rest = text.strip_prefix("mariadb://").or_else(|| text.strip_prefix("mysql://"));
        let rest = rest.ok_or_else(|| wrong("it does not begin with mariadb://"))?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        if !path.is_empty() {
            return Err(wrong("it names a database, but a server is backed up as a whole"));
        }
        let (user, host) =
            authority.rsplit_once('@').map_or((None, authority), |(user, host)| (Some(user), host));
        if user.is_some_and(|user| user.contains(':')) {
            return Err(Error::new(
                Code::Usage,
                "a password in an address is seen by everybody on this machine",
            )
            .hint("leave it out, and give it in a file with --password-file"));
        }
        let (host, port) = split_port(host)?;
        let mut address = Self {
            host: Some(host.to_owned()).filter(|host| !host.is_empty()),
            port: port.unwrap_or(DEFAULT_PORT),
            socket: DEFAULT_SOCKET.into(),
            user: user.filter(|user| !user.is_empty()).map(str::to_owned),
        };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("socket", path)) if path.starts_with('/') => {
                    (address.socket, address.host) = (path.into(), None);
                }
                Some(("user", user)) if !user.is_empty() => address.user = Some(user.to_owned()),
                _ => return Err(wrong("it has a parameter that is not known")),
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
        None => host.split_once(':').map_or((host, None), |(name, port)| (name, Some(port))),
    };
    let port = port.map(str::parse).transpose().map_err(|_number| wrong("its port is no number"))?;
    Ok((name, port))
}

#[cfg(test)]
mod tests {
    use super::Address;

    #[test]
    fn addresses_are_read_and_passwords_in_them_refused_and_not_repeated() {
        let read = |text: &str| text.parse::<Address>().unwrap();
        let socket = read("mariadb://backup@/?socket=/tmp/s");
        assert_eq!((socket.host, socket.socket.to_str()), (None, Some("/tmp/s")));
        assert_eq!(socket.user.as_deref(), Some("backup"));
        let host = read("mysql://b@[::1]:3307");
        assert_eq!((host.host.as_deref(), host.port), (Some("::1"), 3307));
        assert_eq!(read("mariadb://").socket.to_str(), Some("/run/mysqld/mysqld.sock"));
        let error = "mariadb://me:hunter2@host".parse::<Address>().unwrap_err();
        assert!(!error.chain().join(" ").contains("hunter2"));
        for bad in ["postgres://x", "mariadb://h:x", "mariadb://h/db", "mariadb://h?ssl=no", "mariadb://[::1"]
        {
            bad.parse::<Address>().unwrap_err();
        }
    }
}
