//! QEMU's monitor: commands and events as lines of JSON, one client at a time. Protocol: QEMU's
//! `docs/interop/qmp-spec.rst`.

use std::collections::VecDeque;
use std::time::Duration;

use mainstay_core::{Code, Error, Result};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::channel::{Channel, Limit, busy, clean, line_of, part};
use super::endpoint::Endpoint;

/// The longest answer that is accepted, in bytes: the description of every node of a large machine.
const LINE_MAX: usize = 32 << 20;

/// Events kept until somebody asks for them; older ones are dropped.
const EVENTS_MAX: usize = 1024;

/// What the monitor may take to greet: it does at once, unless it speaks to somebody else.
const GREETING: Duration = Duration::from_secs(5);

/// What a command may take: it may have to wait for requests on their way to a slow disk.
const ANSWER: Duration = Duration::from_secs(60);

/// A connection to one QEMU.
pub(super) struct Qmp {
    channel: Channel,
    events: VecDeque<Value>,
    serial: u64,
    /// (major, minor)
    pub(super) version: (u64, u64),
}

impl Qmp {
    /// Errors: [`Code::NotFound`] when nobody listens, [`Code::Conflict`] when the monitor speaks to somebody else.
    pub(super) fn connect(endpoint: &Endpoint) -> Result<Self> {
        let mut channel = Channel::connect(endpoint, LINE_MAX)?;
        let line = channel.line(&Limit::new(GREETING)?)?.ok_or_else(|| busy(channel.peer()))?;
        let greeting: Value = serde_json::from_slice(&line).unwrap_or_default();
        let version = &greeting["QMP"]["version"]["qemu"];
        let (Some(major), Some(minor)) = (version["major"].as_u64(), version["minor"].as_u64()) else {
            let what = format!("{} is no QEMU monitor in JSON mode", channel.peer());
            return Err(Error::new(Code::Unsupported, what));
        };
        let mut qmp = Self { channel, events: VecDeque::new(), serial: 0, version: (major, minor) };
        qmp.run("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// The credentials of the process at the other end, if it is on this machine: process, user and group.
    pub(super) fn peer(&self) -> Option<rustix::net::UCred> {
        rustix::net::sockopt::socket_peercred(self.channel.socket()?).ok()
    }

    /// Errors: [`Code::Io`] with QEMU's own words when it refuses, or when it does not answer.
    pub(super) fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let limit = Limit::new(ANSWER)?;
        self.serial += 1;
        let id = self.serial;
        let message = json!({ "execute": command, "arguments": arguments, "id": id });
        self.channel.send(&line_of(&message), &limit)?;
        loop {
            let answer = match self.receive(&limit)? {
                Received::Answer(answer) => answer,
                Received::Event => continue,
                Received::Late => {
                    return Err(self.channel.late(&limit).during(format!("{command} is not answered")));
                }
            };
            // Anything else is the late answer to a command that was given up.
            if answer["id"].as_u64() != Some(id) {
                continue;
            }
            if let Some(error) = answer.get("error") {
                let words = clean(error["desc"].as_str().unwrap_or("no reason given"));
                return Err(Error::new(Code::Io, format!("QEMU refused {command}: {words}")));
            }
            return Ok(part(answer, "return"));
        }
    }

    /// Like [`Qmp::run`], with the answer as a type.
    pub(super) fn ask<T: DeserializeOwned>(&mut self, command: &str, arguments: Value) -> Result<T> {
        let answer = self.run(command, arguments)?;
        serde_json::from_value(answer).map_err(|error| {
            Error::new(Code::Unsupported, format!("QEMU's answer to {command} makes no sense")).because(error)
        })
    }

    /// Waits for an event called `name` for which `matches` holds of its data; whether it came in time.
    pub(super) fn wait(
        &mut self,
        name: &str,
        length: Duration,
        matches: impl Fn(&Value) -> bool,
    ) -> Result<bool> {
        Ok(self.event(name, length, matches)?.is_some())
    }

    /// The data of an event called `name` for which `matches` holds of them; `None` when it does not come in time.
    pub(super) fn event(
        &mut self,
        name: &str,
        length: Duration,
        matches: impl Fn(&Value) -> bool,
    ) -> Result<Option<Value>> {
        let limit = Limit::new(length)?;
        let wanted = |event: &Value| event["event"].as_str() == Some(name) && matches(&event["data"]);
        loop {
            if let Some(at) = self.events.iter().position(wanted) {
                return Ok(self.events.remove(at).map(|event| part(event, "data")));
            }
            if matches!(self.receive(&limit)?, Received::Late) {
                return Ok(None);
            }
        }
    }

    /// Takes one message in; events are put aside.
    fn receive(&mut self, limit: &Limit) -> Result<Received> {
        let Some(line) = self.channel.line(limit)? else { return Ok(Received::Late) };
        let message: Value = serde_json::from_slice(&line).map_err(|error| {
            Error::new(Code::Io, format!("{} speaks no JSON", self.channel.peer())).because(error)
        })?;
        if message.get("event").is_none() {
            return Ok(Received::Answer(message));
        }
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(message);
        Ok(Received::Event)
    }
}

enum Received {
    Answer(Value),
    Event,
    Late,
}
