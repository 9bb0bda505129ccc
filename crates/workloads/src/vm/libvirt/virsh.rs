//! The program `virsh`: libvirt without linking it.

use std::path::Path;
use std::time::Duration;

use mainstay_core::{Code, Error, Result};
use serde::{Deserialize, Serialize};

use crate::process::{Outcome, Program};
use crate::vm::channel::clean;
use crate::vm::run_dir::tag;

/// What a question may take.
pub(super) const ANSWER: Duration = Duration::from_secs(60);

/// As much as is read of an answer, in bytes.
const OUTPUT_MAX: usize = 16 << 20;

/// How to reach one libvirt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Virsh {
    pub(super) uri: String,
}

impl Virsh {
    /// Whether its paths name files of this computer: the URI names no host, and no transport but a local socket.
    pub(super) fn is_here(&self) -> bool {
        let Some((scheme, rest)) = self.uri.split_once("://") else { return false };
        let transport = scheme.split_once('+').map_or("unix", |(_driver, transport)| transport);
        transport == "unix" && rest.starts_with('/')
    }

    /// Runs one command, given as words.
    ///
    /// Errors: [`Code::Unsupported`] without the program, [`Code::Io`] with libvirt's own words.
    pub(super) fn run(&self, words: &[&str]) -> Result<String> {
        self.run_within(ANSWER, words)
    }

    pub(super) fn run_within(&self, limit: Duration, words: &[&str]) -> Result<String> {
        let outcome = self.program(limit, words).run().map_err(with_hint)?;
        if outcome.status == Some(0) {
            return Ok(String::from_utf8_lossy(&outcome.output).into_owned());
        }
        Err(refused(words.first().copied().unwrap_or_default(), &outcome))
    }

    /// Asks several questions over one connection: to start the program costs more than most answers. The answer to each,
    /// nothing where libvirt refused, and all that it said.
    pub(super) fn ask<const N: usize>(&self, questions: [String; N]) -> Result<([String; N], Outcome)> {
        // A document of a machine may hold anything but what nobody knew beforehand.
        let marker = format!("=={:016x}==", tag());
        let outcome = self.run_line(ANSWER, &questions.join(&format!("; echo {marker}; ")))?;
        let text = String::from_utf8_lossy(&outcome.output).into_owned();
        // Some drivers end the line at what they do not know.
        let mut answers = text.split(&marker).map(|answer| answer.trim().to_owned());
        Ok((std::array::from_fn(|_| answers.next().unwrap_or_default()), outcome))
    }

    /// Runs a line of commands, one after the other over one connection, whatever becomes of each.
    pub(super) fn run_line(&self, limit: Duration, line: &str) -> Result<Outcome> {
        self.program(limit, &[line]).run().map_err(with_hint)
    }

    /// Like [`Virsh::run_line`]; virsh says more, and how long each command took.
    pub(super) fn time_line(&self, limit: Duration, line: &str) -> Result<Outcome> {
        self.plain(limit).arguments(["-t", line]).run().map_err(with_hint)
    }

    fn program(&self, limit: Duration, words: &[&str]) -> Program {
        self.plain(limit).argument("-q").arguments(words.iter().copied())
    }

    fn plain(&self, limit: Duration) -> Program {
        // Its words are read, so they must not depend on where the person lives.
        let program = Program::new("virsh", limit).variable("LC_ALL", "C").keep_output(OUTPUT_MAX);
        // Over a link that may be cut, silence is noticed.
        let alive: &[&str] = if self.is_here() { &[] } else { &["-k", "5", "-K", "3"] };
        program.arguments(["-c", self.uri.as_str()]).arguments(alive.iter().copied())
    }
}

/// What libvirt said when it refused.
pub(super) fn refused(command: &str, outcome: &Outcome) -> Error {
    let words = String::from_utf8_lossy(&outcome.errors);
    let lines = words.lines().map(|line| line.trim_start_matches("error: ").trim());
    let mut said: Vec<String> = Vec::new();
    for line in lines.filter(|line| !line.is_empty()).map(clean) {
        // Each question of several may have met the same trouble.
        if !said.contains(&line) {
            said.push(line);
        }
    }
    let said = if said.is_empty() { "no reason given".into() } else { said.join(": ") };
    let code = if said.contains("Domain not found") || said.contains("failed to get domain") {
        Code::NotFound
    } else {
        Code::Io
    };
    Error::new(code, format!("libvirt refused {command}: {said}"))
}

/// A path as a word in a line of commands.
///
/// Errors: [`Code::Usage`] for one that cannot be written so.
pub(super) fn word(path: &Path) -> Result<String> {
    let text = path.to_str().filter(|text| !text.contains('\'') && !text.contains('\n'));
    let text = text.ok_or_else(|| {
        Error::new(Code::Usage, format!("the path {} cannot be given to virsh", path.display()))
            .hint("name a scratch directory without quotes in its path")
    })?;
    Ok(format!("'{text}'"))
}

fn with_hint(error: Error) -> Error {
    match error.code() {
        Code::Unsupported => error.hint("install libvirt's clients: the program virsh"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::Virsh;

    #[test]
    fn a_uri_with_a_host_or_a_transport_is_elsewhere() {
        for (uri, here) in [
            ("qemu:///system", true),
            ("qemu:///session?socket=/run/user/1000/libvirt/virtqemud-sock", true),
            ("qemu+unix:///system?socket=/run/libvirt/other", true),
            ("test:///default", true),
            ("qemu://hv1/system", false),
            ("qemu://root@/system", false),
            ("qemu+ssh://hv1/system", false),
            ("qemu+ssh:///system", false),
            ("qemu+tls://hv1/system", false),
            ("qemu+unix://hv1/system", false),
            ("alias", false),
        ] {
            assert_eq!(Virsh { uri: uri.into() }.is_here(), here, "{uri}");
        }
    }
}
