//! MariaDB servers of the test's own, on sockets in directories of their own.

use std::path::{Path, PathBuf};
use std::time::Duration;

use mainstay_core::Result;
use rustix::process::Signal;
use tempfile::TempDir;

use super::process::{self, Daemon};
use super::{directory, patiently};

const START_LIMIT: Duration = Duration::from_secs(120);

/// A server's files, and the server while it runs. Both go with the value; an adopted server's files stay.
#[derive(Debug)]
pub struct MariaDb {
    directory: TempDir,
    data: PathBuf,
    settings: Vec<String>,
    server: Option<Daemon>,
}

impl MariaDb {
    /// Makes the files of a server and starts it. `settings` are words of its command line.
    pub fn start(settings: &[&str]) -> Result<Self> {
        let directory = Self::place()?;
        let data = directory.path().join("data");
        let at = format!("--datadir={}", data.display());
        let words = ["--no-defaults", &at, "--auth-root-authentication-method=normal", "--skip-test-db"];
        run_as_server("mariadb-install-db", &words)?;
        let settings = settings.iter().map(|word| (*word).to_owned()).collect();
        let mut this = Self { directory, data, settings, server: None };
        this.resume()?;
        Ok(this)
    }

    /// Starts a server on files that are there already.
    pub fn adopt(data: &Path) -> Result<Self> {
        let (directory, data) = (Self::place()?, data.to_owned());
        let mut this = Self { directory, data, settings: Vec::new(), server: None };
        this.resume()?;
        Ok(this)
    }

    fn place() -> Result<TempDir> {
        let directory = directory("my")?;
        if rustix::process::geteuid().is_root() {
            process::run("chown", ["mysql:", &directory.path().display().to_string()])?;
        }
        Ok(directory)
    }

    /// Starts the server, and waits until it lets users in.
    pub fn resume(&mut self) -> Result<()> {
        let mut words = vec![
            "--no-defaults".to_owned(),
            format!("--datadir={}", self.data.display()),
            format!("--socket={}", self.socket().display()),
            format!("--pid-file={}", self.directory.path().join("pid").display()),
            "--skip-networking".to_owned(),
            "--innodb-buffer-pool-size=32M".to_owned(),
        ];
        words.extend(self.settings.iter().cloned());
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let (name, words) = as_server("mariadbd", &words);
        let mut server = Daemon::start(&name, words, &self.directory.path().join("log"))?;
        patiently("MariaDB", START_LIMIT, || {
            server.check()?;
            Ok(self.ask("SELECT 1").ok())
        })?;
        self.server = Some(server);
        Ok(())
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    /// For Mainstay, as a user.
    pub fn address(&self, user: &str) -> String {
        format!("mariadb://{user}@/?socket={}", self.socket().display())
    }

    /// A directory that the server may write to.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn data(&self) -> &Path {
        &self.data
    }

    /// What queries answer: columns by tabs, rows by line.
    pub fn ask(&self, sql: &str) -> Result<String> {
        let socket = format!("--socket={}", self.socket().display());
        let words = ["--no-defaults", &socket, "--user=root", "--batch", "--skip-column-names", "-e", sql];
        Ok(process::run("mariadb", words)?.trim_end().to_owned())
    }

    /// Has the server's own program check every table.
    pub fn check(&self) -> Result<String> {
        let socket = format!("--socket={}", self.socket().display());
        let words =
            ["--no-defaults", &socket, "--user=root", "--all-databases", "--check", "--extended", "--silent"];
        process::run("mariadb-check", words)
    }

    /// Ends the server as a power cut of its process would: SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill();
        }
    }

    /// Ends it in order.
    pub fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.end(Signal::TERM);
        }
    }

    /// What it has said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for MariaDb {
    fn drop(&mut self) {
        if std::thread::panicking() {
            super::guest::tell("MariaDB", &self.log());
        }
        self.kill();
    }
}

/// Servers refuse to run as root.
fn as_server(program: &str, words: &[&str]) -> (String, Vec<String>) {
    let words = words.iter().map(|word| (*word).to_owned());
    if !rustix::process::geteuid().is_root() {
        return (program.to_owned(), words.collect());
    }
    let user = ["--reuid=mysql", "--regid=mysql", "--init-groups", program].map(str::to_owned);
    ("setpriv".into(), user.into_iter().chain(words).collect())
}

fn run_as_server(program: &str, words: &[&str]) -> Result<String> {
    let (name, words) = as_server(program, words);
    process::run(&name, words)
}
