//! What a test does inside a guest: through an agent of its own, which the product never sees and a freeze never stops.

use std::path::{Path, PathBuf};

use mainstay_core::{Code, Error, Result};
use serde_json::{Value, json};

use super::monitor::Agent;
use super::{PATIENCE, patiently};

/// The inside of a running guest.
#[derive(Clone, Debug)]
pub struct Inside {
    socket: PathBuf,
}

/// How a command in the guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// -1 when a signal ended it.
    pub status: i64,
    /// Standard output with the errors after it.
    pub output: String,
}

impl Inside {
    /// The inside of a guest whose port `org.mainstay.test.0` is this socket.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Waits until the guest has booted.
    pub fn wait(&self) -> Result<()> {
        Agent::connect(&self.socket, PATIENCE).map(drop)
    }

    /// Runs a line of shell in the guest to its end.
    pub fn run(&self, line: &str) -> Result<Ran> {
        let mut agent = Agent::connect(&self.socket, PATIENCE)?;
        let arguments = json!({ "path": "/bin/sh", "arg": ["-c", line], "capture-output": true });
        let started = agent.run("guest-exec", arguments)?;
        patiently(line, PATIENCE, || {
            let state = agent.run("guest-exec-status", json!({ "pid": started["pid"] }))?;
            if state["exited"] != true {
                return Ok(None);
            }
            let text = |name: &str| decode(state[name].as_str().unwrap_or_default());
            let output = [text("out-data"), text("err-data")].concat();
            let output = String::from_utf8_lossy(&output).into_owned();
            Ok(Some(Ran { status: state["exitcode"].as_i64().unwrap_or(-1), output }))
        })
    }

    /// Runs a line of shell and takes any status but 0 for an error; what it printed, without the last line feed.
    pub fn run_well(&self, line: &str) -> Result<String> {
        let ran = self.run(line)?;
        if ran.status != 0 {
            return Err(Error::new(Code::Io, format!("in the guest, {line}: {} {}", ran.status, ran.output)));
        }
        Ok(ran.output.trim_end_matches('\n').to_owned())
    }

    /// Starts a process that changes the directory round by round until the guest ends; see [`super::check_rounds`].
    pub fn start_writer(&self, directory: &str) -> Result<()> {
        let mut agent = Agent::connect(&self.socket, PATIENCE)?;
        let line = format!("mkdir -p {directory} && exec writer {directory} > /dev/null 2>&1");
        agent.run("guest-exec", json!({ "path": "/bin/sh", "arg": ["-c", line] }))?;
        Ok(())
    }

    /// The last round that the writer has finished in this directory; 0 before the first.
    pub fn rounds(&self, directory: &str) -> Result<u64> {
        let last = self.run(&format!("tail -n 1 {directory}/log"))?.output;
        Ok(last.trim().parse().unwrap_or(0))
    }

    /// Waits until the writer has finished so many rounds more; the last one.
    pub fn wait_for_rounds(&self, directory: &str, more: u64) -> Result<u64> {
        let wanted = self.rounds(directory)? + more;
        patiently("rounds of the writer", PATIENCE, || {
            let round = self.rounds(directory)?;
            Ok((round >= wanted).then_some(round))
        })
    }
}

/// Base64 as agents write it; anything else ends it.
fn decode(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let (mut bits, mut held) = (0u32, 0);
    for letter in text.bytes() {
        let value = match letter {
            b'A'..=b'Z' => letter - b'A',
            b'a'..=b'z' => letter - b'a' + 26,
            b'0'..=b'9' => letter - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => break,
        };
        bits = bits << 6 | u32::from(value);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held & 0xff) as u8);
        }
    }
    bytes
}

/// The agent that the product uses too, asked directly. Connects, asks and hangs up: the port has room for one.
pub(super) fn ask_agent(socket: &Path, command: &str, arguments: Value) -> Result<Value> {
    Agent::connect(socket, PATIENCE)?.run(command, arguments)
}

#[cfg(test)]
mod tests {
    #[test]
    fn output_of_the_agent_is_decoded() {
        assert_eq!(super::decode("aGVsbG8KAP8="), b"hello\n\0\xff");
        assert_eq!(super::decode(""), b"");
    }
}
