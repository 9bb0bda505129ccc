//! The door of xtask to processes, the environment and the clock.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use serde_json::Value;

use crate::say;

/// The directory of the checkout. What cargo says when it starts this counts: two checkouts may share a build directory,
/// and then one runs what the other has built.
pub(crate) fn root() -> &'static Path {
    static MANIFEST: OnceLock<PathBuf> = OnceLock::new();
    let manifest = MANIFEST.get_or_init(|| {
        variable("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
    });
    manifest.parent().unwrap_or(manifest)
}

/// An environment variable that is set to something.
pub(crate) fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// The one place where a moment is read; only for figures shown to people.
#[expect(clippy::disallowed_methods, reason = "the clock door of xtask")]
pub(crate) fn moment() -> Instant {
    Instant::now()
}

/// A command that runs in the checkout with nothing on its standard input.
#[expect(clippy::disallowed_methods, reason = "the process door of xtask")]
pub(crate) fn command<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(root()).stdin(Stdio::null());
    command
}

/// Gives a command a home of its own, so that the person's settings, keys and caches stay out of it.
pub(crate) fn at_home<'a>(command: &'a mut Command, home: &Path) -> &'a mut Command {
    for kind in ["CONFIG", "DATA", "STATE", "CACHE"] {
        command.env(format!("XDG_{kind}_HOME"), home.join(kind.to_lowercase()));
    }
    command.env("HOME", home)
}

/// A command of the cargo that runs this.
pub(crate) fn cargo<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Command {
    let cargo =
        variable("CARGO").map_or_else(|| "cargo".to_owned(), |path| path.to_string_lossy().into_owned());
    command(&cargo, arguments)
}

/// Where cargo puts what it builds.
pub(crate) fn target_directory() -> Result<PathBuf> {
    let metadata = capture(&mut cargo(["metadata", "--format-version=1", "--no-deps", "--offline"]))?;
    let metadata: Value = serde_json::from_str(&metadata).context("cargo metadata printed no JSON")?;
    metadata["target_directory"]
        .as_str()
        .map(PathBuf::from)
        .context("cargo metadata names no target directory")
}

/// Shows the command, runs it with this process's output, and fails when it does.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let text = shown(command);
    say::command(&text);
    let status = command.status().with_context(|| format!("cannot start {text}"))?;
    if !status.success() {
        bail!("{text} failed ({status})");
    }
    Ok(())
}

/// Which of the two streams of a command is followed.
pub(crate) enum Stream {
    Output,
    Errors,
}

/// Like [`run`], and shows each line of one of the streams to `each` as well.
pub(crate) fn follow(command: &mut Command, stream: Stream, each: &mut dyn FnMut(&str)) -> Result<()> {
    let text = shown(command);
    say::command(&text);
    match stream {
        Stream::Output => command.stdout(Stdio::piped()),
        Stream::Errors => command.stderr(Stdio::piped()),
    };
    let mut child = command.spawn().with_context(|| format!("cannot start {text}"))?;
    let output = child.stdout.take().map(|pipe| Box::new(pipe) as Box<dyn Read>);
    let followed = output.or_else(|| child.stderr.take().map(|pipe| Box::new(pipe) as Box<dyn Read>));
    for line in BufReader::new(followed.context("the pipe is missing")?).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        say::line(&line);
        each(&line);
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("{text} failed ({status})");
    }
    Ok(())
}

/// Runs quietly; whatever it said is in the result, failed or not.
pub(crate) fn output(command: &mut Command) -> Result<Output> {
    let text = shown(command);
    command.output().with_context(|| format!("cannot start {text}"))
}

/// What the command prints on its standard output; its errors go to the developer.
pub(crate) fn capture(command: &mut Command) -> Result<String> {
    let text = shown(command);
    let output = output(command.stderr(Stdio::inherit()))?;
    if !output.status.success() {
        bail!("{text} failed ({})", output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("{text} printed something that is not UTF-8"))
}

/// Whether the command can be started and succeeds; it says nothing.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    output(command).is_ok_and(|output| output.status.success())
}

/// Whether a program of this name is on the path.
pub(crate) fn has_program(name: &str) -> bool {
    let path = variable("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(name).is_file())
}

/// The text of a command as one would type it in the checkout.
pub(crate) fn shown(command: &Command) -> String {
    let program = PathBuf::from(command.get_program());
    let name = program.file_name().unwrap_or(command.get_program()).to_string_lossy().into_owned();
    let set = command.get_envs().filter_map(|(name, value)| {
        value.map(|value| format!("{}={}", name.to_string_lossy(), value.to_string_lossy()))
    });
    let arguments = command.get_args().map(|argument| argument.to_string_lossy().into_owned());
    let words: Vec<String> = set.chain([name]).chain(arguments).collect();
    words.join(" ")
}
