//! PostgreSQL servers of the test's own, on sockets in directories of their own.

use std::path::{Path, PathBuf};
use std::time::Duration;

use mainstay_core::{Code, Error, Result};
use rustix::process::Signal;
use tempfile::TempDir;

use super::process::{self, Daemon};
use super::{SETUP, directory, io, patiently};

const PORT: u16 = 5432;
const START_LIMIT: Duration = Duration::from_secs(120);

/// How a cluster is made.
#[derive(Clone, Copy, Debug)]
pub struct PostgresPlan<'a> {
    /// MiB of a segment of the write-ahead log.
    pub segment: u32,
    /// Settings by name, as they stand in `postgresql.conf`.
    pub settings: &'a [(&'a str, &'a str)],
    /// `pg_hba.conf`.
    pub access: &'a str,
}

impl Default for PostgresPlan<'_> {
    fn default() -> Self {
        Self { segment: 16, settings: &[], access: "local all all trust\nlocal replication all trust\n" }
    }
}

/// A cluster, and its server while it runs. Both go with the value; an adopted cluster's files stay.
#[derive(Debug)]
pub struct Postgres {
    directory: TempDir,
    data: PathBuf,
    server: Option<Daemon>,
}

impl Postgres {
    /// Makes a cluster and starts its server.
    pub fn start(plan: &PostgresPlan<'_>) -> Result<Self> {
        let directory = Self::place()?;
        let data = directory.path().join("data");
        let segment = format!("--wal-segsize={}", plan.segment);
        let at = data.display().to_string();
        let words = ["-D", &at, "-A", "trust", "-U", "postgres", "-k", "-N", "--locale=C.UTF-8", &segment];
        run_as_server(&program("initdb")?, &words)?;
        let mut settings = String::new();
        for (name, value) in plan.settings {
            settings += &format!("{name} = {value}\n");
        }
        append(&data.join("postgresql.conf"), &settings)?;
        std::fs::write(data.join("pg_hba.conf"), plan.access).map_err(io("cannot write pg_hba.conf"))?;
        let mut this = Self { directory, data, server: None };
        this.resume()?;
        Ok(this)
    }

    /// Starts a server on files that are there already.
    pub fn adopt(data: &Path) -> Result<Self> {
        let mut this = Self { directory: Self::place()?, data: data.to_owned(), server: None };
        this.resume()?;
        Ok(this)
    }

    fn place() -> Result<TempDir> {
        let directory = directory("pg")?;
        if rustix::process::geteuid().is_root() {
            process::run("chown", ["postgres:", &directory.path().display().to_string()])?;
        }
        Ok(directory)
    }

    /// Starts the server, and waits until it lets ordinary users in.
    pub fn resume(&mut self) -> Result<()> {
        let (data, sockets) = (self.data.display().to_string(), self.directory.path().display().to_string());
        let words = ["-D", &data, "-k", &sockets, "-c", "listen_addresses="];
        let (name, words) = as_server(&program("postgres")?, &words);
        let mut server = Daemon::start(&name, words, &self.directory.path().join("log"))?;
        patiently("PostgreSQL", START_LIMIT, || {
            server.check()?;
            let answer = self.ask("postgres", "SELECT pg_is_in_recovery()");
            Ok(answer.ok().filter(|answer| answer.trim() == "f"))
        })?;
        self.server = Some(server);
        Ok(())
    }

    /// For Mainstay: without a database.
    pub fn address(&self) -> String {
        format!("postgres:///postgres?host={}&port={PORT}&user=postgres", self.directory.path().display())
    }

    /// A directory that the server may write to.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Makes a directory for a tablespace.
    pub fn space(&self, name: &str) -> Result<PathBuf> {
        let at = self.directory.path().join(name);
        run_as_server("mkdir", &[&at.display().to_string()])?;
        Ok(at)
    }

    pub fn data(&self) -> &Path {
        &self.data
    }

    /// What a query answers: columns by `|`, rows by line.
    pub fn ask(&self, database: &str, sql: &str) -> Result<String> {
        let sockets = self.directory.path().display().to_string();
        let words = ["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", &sockets, "-U", "postgres"];
        let answer = process::run(&program("psql")?, words.into_iter().chain(["-d", database, "-c", sql]))?;
        Ok(answer.trim_end().to_owned())
    }

    /// Runs one of PostgreSQL's own programs as the server's user; what it said.
    pub fn run(&self, name: &str, words: &[&str]) -> Result<String> {
        run_as_server(&program(name)?, words)
    }

    /// Runs one that speaks to this server.
    pub fn client(&self, name: &str, words: &[&str]) -> Result<String> {
        let sockets = self.directory.path().display().to_string();
        self.run(name, &[&["-h", &sockets, "-U", "postgres"], words].concat())
    }

    /// Ends the server as a power cut of its machine would.
    pub fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill();
        }
        // Its children notice, and let go of the shared memory; a server started before that refuses.
        let _gone = std::fs::remove_file(self.data.join("postmaster.pid"));
    }

    /// Ends it in order, waiting for nobody.
    pub fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.end(Signal::INT);
        }
    }

    /// What it has said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if std::thread::panicking() {
            super::guest::tell("PostgreSQL", &self.log());
        }
        self.stop();
    }
}

fn append(path: &Path, text: &str) -> Result<()> {
    use std::io::Write as _;
    let file = std::fs::File::options().append(true).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(io(format!("cannot write {}", path.display())))
}

/// The newest version that is there.
fn program(name: &str) -> Result<String> {
    let mut versions: Vec<(u32, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten() {
        let version = entry.file_name().to_str().and_then(|name| name.parse().ok());
        versions.extend(version.map(|version| (version, entry.path().join("bin").join(name))));
    }
    versions.sort();
    let found = versions.into_iter().rev().map(|(_, path)| path).find(|path| path.exists());
    let missing = || Error::new(Code::Unsupported, format!("there is no {name} of PostgreSQL")).hint(SETUP);
    Ok(found.ok_or_else(missing)?.display().to_string())
}

/// Servers refuse to run as root.
fn as_server(program: &str, words: &[&str]) -> (String, Vec<String>) {
    let words = words.iter().map(|word| (*word).to_owned());
    if !rustix::process::geteuid().is_root() {
        return (program.to_owned(), words.collect());
    }
    let user = ["--reuid=postgres", "--regid=postgres", "--init-groups", program].map(str::to_owned);
    ("setpriv".into(), user.into_iter().chain(words).collect())
}

fn run_as_server(program: &str, words: &[&str]) -> Result<String> {
    let (name, words) = as_server(program, words);
    process::run(&name, words)
}
