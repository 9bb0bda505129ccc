//! PostgreSQL servers of the test's own, on sockets in directories of their own.

use std::path::{Path, PathBuf};
use std::time::Duration;

use mainstay_core::{Code, Error, Result};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use super::process::{self, Daemon};
use super::{SETUP, directory, io, patiently};

const PORT: u16 = 5432;
/// Where Debian has the configuration, beside the data.
const APART: &str = "etc";
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
    /// Whether pages have checksums.
    pub checksums: bool,
    /// Whether it listens at 127.0.0.1 too, at a port of its own.
    pub tcp: bool,
    /// Whether the configuration lies outside the data directory, as Debian has it.
    pub apart: bool,
}

impl Default for PostgresPlan<'_> {
    fn default() -> Self {
        Self {
            segment: 16,
            settings: &[],
            access: "local all all trust\nlocal replication all trust\n",
            checksums: false,
            tcp: false,
            apart: false,
        }
    }
}

/// A cluster, and its server while it runs. Both go with the value; an adopted cluster's files stay.
#[derive(Debug)]
pub struct Postgres {
    directory: TempDir,
    data: PathBuf,
    port: u16,
    tcp: bool,
    server: Option<Daemon>,
}

impl Postgres {
    /// Makes a cluster and starts its server.
    pub fn start(plan: &PostgresPlan<'_>) -> Result<Self> {
        let directory = Self::place()?;
        let data = directory.path().join("data");
        let segment = format!("--wal-segsize={}", plan.segment);
        let at = data.display().to_string();
        let mut words = vec!["-D", &at, "-A", "trust", "-U", "postgres", "-N", "--locale=C.UTF-8", &segment];
        words.extend(plan.checksums.then_some("-k"));
        run_as_server(&program("initdb")?, &words)?;
        let mut settings = String::new();
        for (name, value) in plan.settings {
            settings += &format!("{name} = {value}\n");
        }
        append(&data.join("postgresql.conf"), &settings)?;
        std::fs::write(data.join("pg_hba.conf"), plan.access).map_err(io("cannot write pg_hba.conf"))?;
        let port = if plan.tcp { free_port()? } else { PORT };
        let mut this = Self { directory, data, port, tcp: plan.tcp, server: None };
        if plan.apart {
            this.part()?;
        }
        this.resume()?;
        Ok(this)
    }

    /// Moves the configuration away from the data.
    fn part(&self) -> Result<()> {
        let apart = self.space(APART)?;
        self.space(&format!("{APART}/conf.d"))?;
        let mut settings = format!("data_directory = '{}'\n", self.data.display());
        for (setting, name) in [("", "postgresql"), ("hba_file", "pg_hba"), ("ident_file", "pg_ident")] {
            let to = apart.join(format!("{name}.conf"));
            let from = self.data.join(format!("{name}.conf"));
            run_as_server("mv", &[&from.display().to_string(), &to.display().to_string()])?;
            if !setting.is_empty() {
                settings += &format!("{setting} = '{}'\n", to.display());
            }
        }
        append(&apart.join("postgresql.conf"), &settings)
    }

    /// Starts a server on files that are there already.
    pub fn adopt(data: &Path) -> Result<Self> {
        let mut this = Self::of(Self::place()?, data.to_owned());
        this.resume()?;
        Ok(this)
    }

    fn of(directory: TempDir, data: PathBuf) -> Self {
        Self { directory, data, port: PORT, tcp: false, server: None }
    }

    /// A standby that follows this server.
    pub fn standby(&self) -> Result<Self> {
        let directory = Self::place()?;
        let data = directory.path().join("data");
        self.client("pg_basebackup", &["-D", &data.display().to_string(), "-c", "fast", "-R"])?;
        let mut standby = Self::of(directory, data);
        standby.run_until("t")?;
        Ok(standby)
    }

    /// Makes a standby a server of its own, on a new timeline.
    pub fn promote(&self) -> Result<()> {
        self.ask("postgres", "SELECT pg_promote()")?;
        // So that all that comes is told to be on the new one.
        self.ask("postgres", "CHECKPOINT").map(drop)
    }

    /// Starts a standby on files that are there already, and waits until it answers.
    pub fn adopt_standby(data: &Path) -> Result<Self> {
        let mut this = Self::of(Self::place()?, data.to_owned());
        this.run_until("t")?;
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
        self.run_until("f")
    }

    /// Starts a standby again, and waits until it answers.
    pub fn resume_standby(&mut self) -> Result<()> {
        self.run_until("t")
    }

    /// Starts it, and waits until it says whether it recovers.
    fn run_until(&mut self, recovering: &str) -> Result<()> {
        let (data, sockets) = (self.data.display().to_string(), self.directory.path().display().to_string());
        let (port, tcp) = (self.port.to_string(), if self.tcp { "127.0.0.1" } else { "" });
        let listen = format!("listen_addresses={tcp}");
        let mut words = vec!["-D", &data, "-k", &sockets, "-p", &port, "-c", &listen];
        let apart = format!("config_file={}/{APART}/postgresql.conf", self.directory.path().display());
        if !self.data.join("postgresql.conf").exists() {
            words.extend(["-c", &apart]);
        }
        let (name, words) = as_server(&program("postgres")?, &words);
        let mut server = Daemon::start(&name, words, &self.directory.path().join("log"))?;
        patiently("PostgreSQL", START_LIMIT, || {
            server.check()?;
            let answer = self.ask("postgres", "SELECT pg_is_in_recovery()");
            Ok(answer.ok().filter(|answer| answer.trim() == recovering))
        })?;
        self.server = Some(server);
        Ok(())
    }

    /// For Mainstay: without a database.
    pub fn address(&self) -> String {
        format!(
            "postgres:///postgres?host={}&port={}&user=postgres",
            self.directory.path().display(),
            self.port
        )
    }

    /// At 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
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
        let port = self.port.to_string();
        let words = ["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", &sockets, "-p", &port];
        let more = ["-U", "postgres", "-d", database, "-c", sql];
        let answer = process::run(&program("psql")?, words.into_iter().chain(more))?;
        Ok(answer.trim_end().to_owned())
    }

    /// Runs one of PostgreSQL's own programs as the server's user; what it said.
    pub fn run(&self, name: &str, words: &[&str]) -> Result<String> {
        run_as_server(&program(name)?, words)
    }

    /// Runs one that speaks to this server.
    pub fn client(&self, name: &str, words: &[&str]) -> Result<String> {
        let sockets = self.directory.path().display().to_string();
        let port = self.port.to_string();
        self.run(name, &[&["-h", &sockets, "-p", &port, "-U", "postgres"], words].concat())
    }

    /// Ends the server with all its processes, as a power cut of its machine would.
    pub fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            let children = children(server.pid());
            server.kill();
            // Until they have gone, a server started anew refuses.
            for child in children {
                let _gone = rustix::process::kill_process(child, Signal::KILL);
                let gone = || Ok((!runs(child)).then_some(()));
                let _noticed = patiently("a killed process", START_LIMIT, gone);
            }
        }
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

fn free_port() -> Result<u16> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).map_err(io("cannot listen"))?;
    Ok(listener.local_addr().map_err(io("cannot listen"))?.port())
}

fn children(of: u32) -> Vec<Pid> {
    let listed = std::fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap_or_default();
    listed.split_whitespace().filter_map(|word| Pid::from_raw(word.parse().ok()?)).collect()
}

/// One that nobody has waited for yet does no more.
fn runs(process: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.as_raw_nonzero()));
    stat.is_ok_and(|stat| !stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')))
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
