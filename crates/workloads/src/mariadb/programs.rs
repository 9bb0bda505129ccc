//! MariaDB's own programs, and how they are told a password.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use mainstay_core::{Code, Error, Result};
use tempfile::TempDir;
use zeroize::Zeroizing;

use super::address::Address;

pub(super) const GRANTS: &str = "the account needs: GRANT RELOAD, PROCESS, LOCK TABLES, BINLOG MONITOR, REPLICATION SLAVE, \
                                 SLAVE MONITOR ON *.* TO backup@localhost";

/// As whom to speak to a server.
pub struct Login {
    pub address: Address,
    pub user: String,
    pub password: Option<Zeroizing<Vec<u8>>>,
}

/// A file that tells programs where the server is and as whom to speak to it, readable by nobody else. It goes with the
/// value.
pub(super) struct Options {
    directory: TempDir,
}

impl Options {
    pub(super) fn of(login: &Login) -> Result<Self> {
        let mut text = Zeroizing::new(String::with_capacity(1024));
        // Every program of ours reads this group.
        text.push_str("[client-server]\n");
        match &login.address.host {
            None => {
                text.push_str(&format!("socket=\"{}\"\n", quoted(&login.address.socket.to_string_lossy())?));
            }
            Some(host) => {
                text.push_str(&format!(
                    "host=\"{}\"\nport={}\nprotocol=tcp\n",
                    quoted(host)?,
                    login.address.port
                ));
            }
        }
        text.push_str(&format!("user=\"{}\"\n", quoted(&login.user)?));
        if let Some(password) = &login.password {
            let password = std::str::from_utf8(password)
                .map_err(|_text| Error::new(Code::Usage, "the password is no text"))?;
            text.push_str("password=\"");
            text.push_str(&Zeroizing::new(quoted(password)?));
            text.push_str("\"\n");
        }
        let directory = tempfile::Builder::new().prefix("mainstay-db-login-").tempdir();
        let directory = directory.map_err(|error| Error::io("cannot make a private directory", error))?;
        let this = Self { directory };
        let file = std::fs::File::options().write(true).create_new(true).mode(0o600).open(this.path());
        file.and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(|error| Error::io("cannot write a private file", error))?;
        Ok(this)
    }

    pub(super) fn path(&self) -> PathBuf {
        self.directory.path().join("options.cnf")
    }

    /// The first argument of any program.
    pub(super) fn argument(&self) -> String {
        format!("--defaults-file={}", self.path().display())
    }

    /// A private place beside it.
    pub(super) fn directory(&self) -> &Path {
        self.directory.path()
    }
}

/// As option files want it between quotes.
fn quoted(text: &str) -> Result<String> {
    if text.contains(['\n', '\0']) {
        return Err(Error::new(Code::Usage, "a name or password with a line break in it"));
    }
    Ok(text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// What a program said at last, in a line.
pub(super) fn last_words(said: &str) -> String {
    let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let telling = |line: &&&str| ["ERROR", "FATAL", "Error", "error"].iter().any(|word| line.contains(word));
    let line = lines.iter().rev().find(telling).or_else(|| lines.last());
    line.map_or_else(|| "it said nothing".into(), |line| line.escape_debug().to_string())
}
