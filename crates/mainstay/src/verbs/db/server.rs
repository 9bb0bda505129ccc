//! The server that a verb speaks to, and as whom.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use mainstay_core::{Code, Error, Result};
use mainstay_workloads::postgres::{Address, Connection, Place};
use mainstay_workloads::process::Program;
use zeroize::Zeroizing;

use crate::args::Server;
use crate::secrets;
use crate::session::Session;

/// Everything that a connection needs.
pub(super) struct Known {
    pub(super) name: String,
    pub(super) address: Address,
    user: String,
    password: Option<Zeroizing<Vec<u8>>>,
}

impl Known {
    pub(super) fn of(arguments: &Server, session: &Session) -> Result<Self> {
        let address: Address = arguments.server.parse()?;
        let user = address.user.clone().unwrap_or_else(|| "postgres".into());
        let password = match &arguments.password_file {
            Some(path) => Some(secrets::first_line_of(&session.doors.directory.join(path))?),
            None => match &session.doors.environment.home {
                Some(home) => pgpass(&home.join(".pgpass"), &address, &user)?,
                None => None,
            },
        };
        let name = match (&arguments.name, &address.place) {
            (Some(name), _) => name.clone(),
            (None, Place::Host(host)) => host.clone(),
            (None, Place::Socket(_)) => session.doors.host.clone(),
        };
        Ok(Self { name, address, user, password })
    }

    pub(super) fn dial(&self, replication: bool) -> Result<Connection> {
        let password = self.password.as_ref().map(|password| password.as_slice());
        Connection::open(&self.address, &self.user, password, replication)
    }
}

impl Known {
    /// Has a program of the server's vendor find its user and password. The environment of a process is seen by the same
    /// user only.
    pub(super) fn known_to(&self, program: Program) -> Program {
        let program = program.variable("PGUSER", &self.user);
        match &self.password {
            Some(password) => program.variable("PGPASSWORD", OsStr::from_bytes(password)),
            None => program,
        }
    }
}

/// The password that the file of PostgreSQL's own programs has for a server: lines of `host:port:database:user:password`,
/// `*` for any. As they do, it is left alone when others may read it.
fn pgpass(path: &Path, address: &Address, user: &str) -> Result<Option<Zeroizing<Vec<u8>>>> {
    use std::os::unix::fs::MetadataExt as _;
    let failed = |error| Error::io(format!("cannot read {}", path.display()), error);
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
        Ok(found) if found.mode() & 0o077 != 0 => {
            let what = format!("others may read {}", path.display());
            return Err(Error::new(Code::Refused, what).hint("chmod 600 it, or give --password-file"));
        }
        Ok(_) => {}
    }
    let text = Zeroizing::new(std::fs::read(path).map_err(failed)?);
    let host = match &address.place {
        Place::Socket(_) => "localhost".to_owned(),
        Place::Host(host) => host.clone(),
    };
    // One that is meant for the database is as good as one that is meant for replication.
    let database = address.database.clone().unwrap_or_else(|| user.to_owned());
    let port = address.port.to_string();
    let wanted = [b"replication", database.as_bytes()]
        .map(|database| [host.as_bytes(), port.as_bytes(), database, user.as_bytes()].map(<[u8]>::to_vec));
    for line in text.split(|byte| *byte == b'\n').filter(|line| !line.starts_with(b"#")) {
        let fields = fields(line);
        let [.., password] = fields.as_slice() else { continue };
        let fits = |(field, wanted): (&Zeroizing<Vec<u8>>, &Vec<u8>)| **field == *b"*" || **field == *wanted;
        let all = |wanted: &[Vec<u8>; 4]| fields.iter().zip(wanted).all(fits);
        if fields.len() == 5 && wanted.iter().any(all) {
            return Ok(Some(password.clone()));
        }
    }
    Ok(None)
}

/// Split at colons; a backslash takes the next byte as it is.
fn fields(line: &[u8]) -> Vec<Zeroizing<Vec<u8>>> {
    let mut fields = vec![Zeroizing::new(Vec::new())];
    let mut bytes = line.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b':' if fields.len() < 5 => fields.push(Zeroizing::new(Vec::new())),
            byte => {
                let byte = if *byte == b'\\' { bytes.next().unwrap_or(byte) } else { byte };
                if let Some(field) = fields.last_mut() {
                    field.push(*byte);
                }
            }
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::pgpass;

    #[test]
    fn passwords_are_found_as_the_servers_own_programs_find_them() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(".pgpass");
        let address = "postgres://me@db.example:5433".parse().unwrap();
        assert_eq!(pgpass(&path, &address, "me").unwrap(), None, "there is none");
        let text = "# a comment\nother:*:*:me:wrong\n*:5432:*:me:wrong\ndb.example:5433:replication:me:a\\:b\\\\:c\n";
        std::fs::write(&path, text).unwrap();
        let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        mode(0o644);
        assert!(!pgpass(&path, &address, "me").unwrap_err().chain().join(" ").contains("a:b"));
        mode(0o600);
        assert_eq!(pgpass(&path, &address, "me").unwrap().unwrap().as_slice(), b"a:b\\:c");
        assert_eq!(pgpass(&path, &address, "you").unwrap(), None);
    }
}
