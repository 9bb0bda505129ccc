//! The real world behind [`Doors`]. The only module that reads the environment, the clock and the terminal.

use std::ffi::OsString;
use std::io::{ErrorKind, IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use jiff::tz::TimeZone;
use mainstay_core::{Clock, Code, Error, Result, Time};
use zeroize::Zeroizing;

use crate::doors::{Doors, Environment, Passphrase, Person, Terminal};
use crate::{guest, signals};

/// This machine and whoever sits at it. Asks for signals to be told through [`Cancel`] from now on.
pub fn doors() -> Result<Doors> {
    let directory =
        std::env::current_dir().map_err(|error| Error::io("cannot find the current directory", error))?;
    Ok(Doors {
        clock: Arc::new(SystemClock::default()),
        zone: TimeZone::system(),
        environment: environment(),
        host: host(),
        guest: guest::identity(std::path::Path::new("/")),
        superuser: rustix::process::geteuid().is_root(),
        directory,
        out: Box::new(std::io::stdout()),
        err: Box::new(std::io::stderr()),
        terminal: Terminal {
            input: std::io::stdin().is_terminal(),
            output: std::io::stdout().is_terminal(),
            errors: std::io::stderr().is_terminal(),
        },
        person: Box::new(Someone),
        cancel: signals::listen()?,
    })
}

fn environment() -> Environment {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let passphrase = |file: &str, command: &str| Passphrase {
        file: variable(file).map(PathBuf::from),
        command: variable(command),
    };
    // The XDG base directory specification has relative paths ignored.
    let directory = |value: Option<OsString>| value.map(PathBuf::from).filter(|path| path.is_absolute());
    Environment {
        repository: variable("MAINSTAY_REPOSITORY"),
        key_file: variable("MAINSTAY_KEY_FILE").map(PathBuf::from),
        passphrase: passphrase("MAINSTAY_PASSPHRASE_FILE", "MAINSTAY_PASSPHRASE_COMMAND"),
        volume_passphrase: passphrase(
            "MAINSTAY_VOLUME_PASSPHRASE_FILE",
            "MAINSTAY_VOLUME_PASSPHRASE_COMMAND",
        ),
        no_color: variable("NO_COLOR").is_some() || variable("TERM").is_some_and(|term| term == "dumb"),
        user: ["SUDO_USER", "LOGNAME", "USER"]
            .into_iter()
            .find_map(|name| variable(name)?.into_string().ok()),
        home: directory(variable("HOME")),
        xdg_data: directory(variable("XDG_DATA_HOME")),
        xdg_config: directory(variable("XDG_CONFIG_HOME")),
        xdg_state: directory(variable("XDG_STATE_HOME")),
        path: variable("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default(),
    }
}

fn host() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    if name.is_empty() { "localhost".to_owned() } else { name }
}

struct SystemClock {
    zero: Instant,
}

impl Default for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    fn default() -> Self {
        Self { zero: Instant::now() }
    }
}

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    fn now(&self) -> Time {
        let nanoseconds = |duration: Duration| i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX);
        match SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) {
            Ok(after) => Time(nanoseconds(after)),
            Err(before) => Time(-nanoseconds(before.duration())),
        }
    }

    fn monotonic(&self) -> Duration {
        self.zero.elapsed()
    }

    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}

/// Whoever sits at the controlling terminal.
struct Someone;

impl Person for Someone {
    fn secret(&mut self, question: &str) -> Result<Zeroizing<String>> {
        let answer = signals::asking(|| rpassword::prompt_password(question));
        answer.map(Zeroizing::new).map_err(|error| match error.kind() {
            // At this prompt Ctrl-C is a letter like others.
            ErrorKind::Interrupted => Error::new(Code::Cancelled, "stopped before it was done"),
            _ => Error::io("cannot ask for the passphrase", error),
        })
    }

    fn line(&mut self, question: &str) -> Result<String> {
        let fail = |error| Error::io("cannot ask at the terminal", error);
        let mut errors = std::io::stderr();
        errors.write_all(question.as_bytes()).and_then(|()| errors.flush()).map_err(fail)?;
        let mut answer = String::new();
        signals::asking(|| std::io::stdin().read_line(&mut answer)).map_err(fail)?;
        Ok(answer)
    }
}
