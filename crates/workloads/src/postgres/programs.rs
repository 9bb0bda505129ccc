//! PostgreSQL's own programs on this machine, of the major version that wrote a cluster.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mainstay_core::{Code, Error, Result};

use crate::process::Program;

/// For what only reads a file or says who it is.
const LIMIT: Duration = Duration::from_secs(60);
/// Where distributions put them, with the major version in place of `{}`.
const PLACES: [&str; 4] =
    ["/usr/lib/postgresql/{}/bin", "/usr/pgsql-{}/bin", "/usr/lib64/pgsql/{}/bin", "/opt/postgresql/{}/bin"];

/// The programs of one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programs {
    directory: PathBuf,
    user: Option<(u32, u32)>,
}

impl Programs {
    /// Looks in `named`, or else where distributions put them and in `path`, the directories that are searched for
    /// programs. The server will run as `user`: see [`server_user`].
    ///
    /// Errors: [`Code::Unsupported`] when this version is not there.
    pub fn find(
        major: u32,
        named: Option<&Path>,
        path: &[PathBuf],
        user: Option<(u32, u32)>,
    ) -> Result<Self> {
        let usual = PLACES.iter().map(|place| PathBuf::from(place.replace("{}", &major.to_string())));
        let places: Vec<PathBuf> = match named {
            Some(directory) => vec![directory.to_owned()],
            None => usual.chain(path.iter().cloned()).collect(),
        };
        let mut others = Vec::new();
        for directory in places.into_iter().filter(|place| place.join("postgres").exists()) {
            let this = Self { directory, user };
            let found = this.run("postgres", &["--version"])?;
            match version(&found) {
                Some(version) if version == major => return Ok(this),
                _ => others.push(found.trim().to_owned()),
            }
        }
        let error =
            Error::new(Code::Unsupported, format!("the programs of PostgreSQL {major} are not to be found"));
        let hint = format!("install the package postgresql-{major}, or name their directory with --programs");
        Err(if others.is_empty() { error } else { error.because(format!("there is {}", others.join(", "))) }
            .hint(hint))
    }

    /// Where a program is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Whether an optional one is there.
    pub fn has(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    /// A program as the server's user runs it, with words that can be read by programs.
    pub fn program(&self, name: &str, limit: Duration) -> Program {
        Program::new(self.path(name), limit).as_user(self.user).variable("LC_ALL", "C")
    }

    /// User and group that they run as, where these are not ours.
    pub fn user(&self) -> Option<(u32, u32)> {
        self.user
    }

    /// What one said that ended well.
    pub fn run(&self, name: &str, words: &[&str]) -> Result<String> {
        let output = self.program(name, LIMIT).arguments(words.iter().copied()).run_well()?;
        Ok(String::from_utf8_lossy(&output).into_owned())
    }

    /// The control file of a cluster, by the names that `pg_controldata` has for its fields.
    pub fn control(&self, data: &Path) -> Result<HashMap<String, String>> {
        let output = self.program("pg_controldata", LIMIT).argument(data).run_well()?;
        let text = String::from_utf8_lossy(&output);
        let fields = text.lines().filter_map(|line| line.split_once(':'));
        Ok(fields.map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned())).collect())
    }
}

/// From such as `postgres (PostgreSQL) 15.4 (Debian 15.4-1)`.
fn version(said: &str) -> Option<u32> {
    let number = said.split_once(") ")?.1;
    number.split(|sign: char| !sign.is_ascii_digit()).next()?.parse().ok()
}

/// Who a server runs as, since it refuses to be root: nobody else when we are not root ourselves, else the user that was
/// named, or `postgres`.
///
/// Errors: [`Code::Unsupported`] when there is no such user.
pub fn server_user(named: Option<&str>) -> Result<Option<(u32, u32)>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let name = named.unwrap_or("postgres");
    let table = std::fs::read_to_string("/etc/passwd")
        .map_err(|error| Error::io("cannot read /etc/passwd", error))?;
    let found = table.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then_some(())?;
        let mut number = || fields.next()?.parse::<u32>().ok();
        let _password = number();
        Some((number()?, number()?))
    });
    let what = "a server of PostgreSQL does not run as root";
    match found {
        Some((0, _)) => Err(Error::new(Code::Usage, what)),
        Some(user) => Ok(Some(user)),
        None => Err(Error::new(Code::Unsupported, format!("{what}, and there is no user {name}"))
            .hint("name another user with --user, or start Mainstay as one")),
    }
}

#[cfg(test)]
mod tests {
    use super::version;

    #[test]
    fn versions_are_read_as_the_server_says_them() {
        assert_eq!(version("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"), Some(15));
        assert_eq!(version("postgres (PostgreSQL) 18beta1"), Some(18));
        assert_eq!(version("mariadbd  Ver 10.11"), None);
    }
}
