//! Other programs, as tests start them.

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// What only root has on its path is found as well.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// A program as somebody runs it who lives in `place`: with a home, data, configuration and state below it, with nothing else
/// of this process's environment, and with nobody at the terminal.
#[expect(clippy::disallowed_methods, reason = "the tests' door to other programs")]
pub fn at_home(program: impl AsRef<OsStr>, place: &Path) -> Command {
    let mut command = Command::new(program);
    settle(&mut command, place);
    command
}

/// The same for a command that is there already.
pub fn settle(command: &mut Command, place: &Path) {
    command.env_clear().env("PATH", PATH).stdin(Stdio::null());
    for (name, directory) in [
        ("HOME", "home"),
        ("XDG_DATA_HOME", "data"),
        ("XDG_CONFIG_HOME", "config"),
        ("XDG_STATE_HOME", "state"),
    ] {
        command.env(name, place.join(directory));
    }
}

/// Runs a tool to its end with `input` on its standard input.
///
/// Panics when it is not there, naming what installs it, and when it fails, with what it said.
#[track_caller]
#[expect(clippy::disallowed_methods, reason = "the tests' door to other programs")]
#[expect(clippy::panic, clippy::unwrap_used, reason = "a test that cannot go on says where")]
pub fn tool<A: AsRef<OsStr>>(program: &str, arguments: &[A], input: &str) {
    let mut child = Command::new(program)
        .env("PATH", PATH)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}; install it: cargo xtask setup"));
    // One that wants no input may be gone by now.
    let _read = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}
