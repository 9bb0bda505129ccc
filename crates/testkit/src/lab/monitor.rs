//! Talks QMP (QEMU's `docs/interop/qmp-spec`) and the guest agent's dialect of it (`docs/interop/qemu-ga-ref`).
//! Plain and blocking: the product has its own, and the two check each other.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use mainstay_core::{Code, Error, Result};
use serde_json::{Value, json};

use super::{PATIENCE, io, patiently};

/// A line of JSON each way.
#[derive(Debug)]
struct Lines {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Lines {
    fn connect(path: &Path) -> Result<Self> {
        let connected = || Ok(UnixStream::connect(path).ok());
        let stream = patiently(&format!("connecting to {}", path.display()), PATIENCE, connected)?;
        Ok(Self { stream, buffer: Vec::new() })
    }

    fn send(&mut self, prefix: &[u8], message: &Value) -> Result<()> {
        let text = [prefix, message.to_string().as_bytes(), b"\n"].concat();
        self.stream.write_all(&text).map_err(io("cannot send a command"))
    }

    /// The next line; `None` when nothing came within `limit`.
    fn receive(&mut self, limit: Duration) -> Result<Option<Value>> {
        self.stream.set_read_timeout(Some(limit)).map_err(io("cannot set a time limit"))?;
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let text = line.strip_prefix(&[0xff]).unwrap_or(&line);
                let parsed = serde_json::from_slice(text);
                return parsed.map(Some).map_err(|error| {
                    Error::new(Code::Io, format!("no JSON: {}", String::from_utf8_lossy(&line)))
                        .because(error)
                });
            }
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(Error::new(Code::Io, "the other side hung up")),
                Ok(read) => self.buffer.extend(bytes.iter().take(read)),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("cannot receive an answer", error)),
            }
        }
    }
}

fn answer(command: &str, mut line: Value) -> Result<Value> {
    match line.get("error") {
        Some(error) => {
            Err(Error::new(Code::Io, format!("{command}: {}", error["desc"].as_str().unwrap_or("no"))))
        }
        None => Ok(line["return"].take()),
    }
}

/// A connection to a QMP monitor.
#[derive(Debug)]
pub struct Monitor {
    lines: Lines,
    events: Vec<Value>,
}

impl Monitor {
    pub fn connect(path: &Path) -> Result<Self> {
        let mut monitor = Self { lines: Lines::connect(path)?, events: Vec::new() };
        let greeting = monitor.lines.receive(PATIENCE)?.unwrap_or_default();
        if greeting.get("QMP").is_none() {
            return Err(Error::new(Code::Io, format!("{} does not speak QMP", path.display())));
        }
        monitor.run("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Carries out a command; what it returns.
    pub fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.lines.send(b"", &json!({ "execute": command, "arguments": arguments }))?;
        loop {
            let line = self.lines.receive(PATIENCE)?;
            let line = line.ok_or_else(|| Error::new(Code::Io, format!("{command}: no answer")))?;
            if line.get("event").is_some() {
                self.events.push(line);
            } else {
                return answer(command, line);
            }
        }
    }

    /// Waits for an event of this name, in the past of this connection or to come.
    pub fn event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                return Ok(self.events.remove(at));
            }
            match self.lines.receive(limit)? {
                Some(line) => self.events.push(line),
                None => return Err(Error::new(Code::Io, format!("no event {name}: {:?}", self.events))),
            }
        }
    }
}

/// A connection to a guest agent.
pub(super) struct Agent(Lines);

impl Agent {
    /// Waits until the agent answers, which takes as long as its guest takes to boot.
    pub(super) fn connect(path: &Path, limit: Duration) -> Result<Self> {
        let mut agent = Self(Lines::connect(path)?);
        let mut number = 0;
        // Asked anew now and then: whatever was sent before the guest had its port open may be lost.
        patiently(&format!("the agent behind {}", path.display()), limit, || {
            number += 1;
            let ask = json!({ "execute": "guest-sync-delimited", "arguments": { "id": number } });
            agent.0.send(&[0xff], &ask)?;
            while let Ok(Some(line)) = agent.0.receive(Duration::from_millis(400)) {
                if line["return"] == number {
                    return Ok(Some(()));
                }
            }
            Ok(None)
        })?;
        Ok(agent)
    }

    pub(super) fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.0.send(b"", &json!({ "execute": command, "arguments": arguments }))?;
        let line = self.0.receive(PATIENCE)?;
        answer(command, line.ok_or_else(|| Error::new(Code::Io, format!("{command}: no answer")))?)
    }
}
