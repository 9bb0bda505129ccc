//! A server of PostgreSQL on files that only this run has, heard by nobody but on a socket in its private directory.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Clock, Code, Error, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::address::{Address, Place};
use super::programs::Programs;
use super::tls::Tls;
use super::wire::Connection;
use crate::sandbox::Sandbox;

/// Files of the sandbox.
const SETTINGS: &str = "server.conf";
const ACCESS: &str = "access.conf";
const NAMES: &str = "names.conf";
const PORT: u16 = 5432;
/// How long a server may take to end at once.
const END_LIMIT: Duration = Duration::from_secs(20);
/// How long one may take to end in order.
const SHUT_DOWN_LIMIT: Duration = Duration::from_secs(600);
const TICK: Duration = Duration::from_millis(10);
/// So many lines of the log go into an error.
const LOG_LINES: usize = 3;
/// No more of a log is read.
const LOG_BYTES_MAX: u64 = 16 << 20;

/// A running server. Dropped, it ends at once.
pub struct Server {
    child: Child,
    log: PathBuf,
    /// What stands before this in the log is of servers that ran here earlier.
    from: u64,
    sockets: PathBuf,
    clock: Arc<dyn Clock>,
}

impl Server {
    /// The file in the sandbox that it writes what it says to.
    pub const LOG: &str = "server.log";

    /// Starts one on `data`, with `settings` and no others: what the cluster's own files say does not count, except what
    /// `ALTER SYSTEM` has left in the data directory.
    ///
    /// Errors: those of the system. A server that gives up is noticed by [`Server::check`].
    pub fn start(
        programs: &Programs,
        sandbox: &Sandbox,
        data: &Path,
        settings: &[(String, String)],
        clock: &Arc<dyn Clock>,
    ) -> Result<Self> {
        let place = sandbox.place();
        let mut text = String::new();
        let quoted = |path: PathBuf| path.display().to_string();
        let own = [
            ("listen_addresses", String::new()),
            ("port", PORT.to_string()),
            ("unix_socket_directories", quoted(place.to_owned())),
            ("unix_socket_permissions", "0700".into()),
            ("hba_file", quoted(place.join(ACCESS))),
            ("ident_file", quoted(place.join(NAMES))),
        ];
        let own = own.map(|(name, value)| (name.to_owned(), value));
        for (name, value) in own.iter().chain(settings) {
            text += &format!("{name} = '{}'\n", escaped(value)?);
        }
        for (name, text) in [
            (SETTINGS, text.as_str()),
            (ACCESS, "local all all trust\nlocal replication all trust\n"),
            (NAMES, ""),
        ] {
            let path = place.join(name);
            write(&path, text, programs.user())?;
        }
        let log = sandbox.path().join(Self::LOG);
        let file = File::options().append(true).create(true).mode(0o600).open(&log);
        let file = file.map_err(|error| Error::io(format!("cannot write {}", log.display()), error))?;
        let settings = format!("config_file={}", place.join(SETTINGS).display());
        let program = programs.program("postgres", Duration::MAX);
        let program = program.argument("-D").argument(data).argument("-c").argument(settings);
        let from = file.metadata().map_or(0, |found| found.len());
        let child = program.stand(file)?;
        Ok(Self { child, log, from, sockets: place.to_owned(), clock: Arc::clone(clock) })
    }

    /// How a role gets at a database of it.
    pub fn address(&self, role: &str, database: &str) -> Address {
        Address {
            place: Place::Socket(self.sockets.clone()),
            port: PORT,
            user: Some(role.to_owned()),
            database: Some(database.to_owned()),
            tls: Tls::default(),
        }
    }

    pub fn connect(&self, role: &str, database: &str) -> Result<Connection> {
        Connection::open(&self.address(role, database), role, None, false)
    }

    /// What it has said, and what servers that ran here before it have.
    pub fn log(&self) -> String {
        self.log_from(0)
    }

    /// What it has said itself.
    pub fn own_log(&self) -> String {
        self.log_from(self.from)
    }

    fn log_from(&self, from: u64) -> String {
        use std::io::{Read as _, Seek as _, SeekFrom};
        let mut text = Vec::new();
        let read = File::open(&self.log).and_then(|mut file| {
            file.seek(SeekFrom::Start(from))?;
            file.take(LOG_BYTES_MAX).read_to_end(&mut text)
        });
        // A log that cannot be read says nothing.
        let _length = read.unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// What its recovery is at, as the system's list of processes shows it.
    pub fn doing(&self) -> Option<String> {
        let pid = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        children.split_whitespace().find_map(|child| {
            let words = std::fs::read(format!("/proc/{child}/cmdline")).ok()?;
            let words = String::from_utf8_lossy(&words).replace('\0', " ");
            words.contains("startup").then(|| words.trim().to_owned())
        })
    }

    /// Errors: [`Code::Refused`] once it has given up, with the last that it said.
    pub fn check(&mut self) -> Result<()> {
        let ended = self.child.try_wait().map_err(|error| Error::io("cannot follow a server", error))?;
        let Some(status) = ended else { return Ok(()) };
        let log = self.own_log();
        let wrong = |line: &&str| ["FATAL:", "PANIC:", "ERROR:"].iter().any(|word| line.contains(word));
        let mut last: Vec<&str> = log.lines().rev().filter(wrong).take(LOG_LINES).collect();
        if last.is_empty() {
            last = log.lines().rev().take(LOG_LINES).collect();
        }
        last.reverse();
        let said = last.join(" / ").escape_debug().to_string();
        Err(Error::new(Code::Refused, format!("the server gave up ({status})")).because(said))
    }

    /// Has it end in order, with everything written to its files, waiting for nobody.
    pub fn shut_down(&mut self) -> Result<()> {
        let failed = |error: std::io::Error| Error::io("cannot end a server", error);
        kill_process(Pid::from_child(&self.child), Signal::INT).map_err(|errno| failed(errno.into()))?;
        let began = self.clock.monotonic();
        while self.child.try_wait().map_err(failed)?.is_none() {
            if self.clock.monotonic().saturating_sub(began) > SHUT_DOWN_LIMIT {
                return Err(Error::new(Code::Io, "the server does not end"));
            }
            self.clock.sleep(TICK);
        }
        Ok(())
    }

    /// Has it end at once; nothing of its files counts any more.
    pub fn stop(&mut self) {
        for signal in [Signal::QUIT, Signal::KILL] {
            if self.child.try_wait().is_ok_and(|ended| ended.is_some()) {
                return;
            }
            // It may have ended meanwhile.
            let _sent = kill_process(Pid::from_child(&self.child), signal);
            let began = self.clock.monotonic();
            while self.clock.monotonic().saturating_sub(began) < END_LIMIT {
                if self.child.try_wait().is_ok_and(|ended| ended.is_some()) {
                    return;
                }
                self.clock.sleep(TICK);
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A value as configuration files have it.
fn escaped(value: &str) -> Result<String> {
    if value.contains(['\n', '\r', '\0']) {
        return Err(Error::new(Code::Usage, format!("{value:?} cannot be the value of a setting")));
    }
    Ok(value.replace('\\', "\\\\").replace('\'', "''"))
}

fn write(path: &Path, text: &str, user: Option<(u32, u32)>) -> Result<()> {
    use std::io::Write as _;
    // Made anew: the place belongs to another user, whose links are not followed.
    let _there_was_none = std::fs::remove_file(path);
    let file = File::options().write(true).create_new(true).mode(0o600).open(path);
    let written = file.and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        // The file, whatever is at its name by now.
        let Some((user, group)) = user else { return Ok(()) };
        std::os::unix::fs::fchown(&file, Some(user), Some(group))
    });
    written.map_err(|error| Error::io(format!("cannot write {}", path.display()), error))
}
