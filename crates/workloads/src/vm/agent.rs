//! The guest agent: what runs inside a machine and can hold its file systems still. Protocol: QEMU's
//! `docs/interop/qemu-ga-ref`. The agent is the guest's, so whatever it says is a claim, and every call has its time.

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use mainstay_core::{Code, Error, Result};
use serde_json::{Value, json};

use super::channel::{Channel, Limit, clean, line_of, part};
use super::endpoint::Endpoint;
use super::run_dir::tag;

/// The longest answer that is accepted, in bytes.
const LINE_MAX: usize = 4 << 20;

/// Before the text of a sync and its answer: it makes both parsers throw away half a line.
const DELIMITER: u8 = 0xff;

/// What an agent that lives may take for what is no work.
pub(super) const ANSWER: Duration = Duration::from_secs(5);

/// Where most guests keep what their agent runs around a freeze.
const HOOK: &str = "/etc/qemu/fsfreeze-hook";

/// A connection to the agent of one machine.
pub(super) struct Agent {
    channel: Channel,
    /// A process in the guest.
    timer: Option<i64>,
}

/// What an agent says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AgentInfo {
    pub(super) version: String,
    /// The commands that it carries out.
    pub(super) enabled: BTreeSet<String>,
}

impl Agent {
    /// Errors: [`Code::NotFound`] when there is no socket, [`Code::Io`] when no agent answers.
    pub(super) fn connect(endpoint: &Endpoint) -> Result<Self> {
        let mut agent = Self { channel: Channel::connect(endpoint, LINE_MAX)?, timer: None };
        let (text, number) = sync();
        let limit = Limit::new(ANSWER)?;
        agent.channel.send(&text, &limit)?;
        agent.synced(number, &limit)?;
        Ok(agent)
    }

    /// Speaks over the socket that somebody else connected. Nothing is said yet.
    pub(super) fn over(socket: UnixStream) -> Result<Self> {
        Ok(Self { channel: Channel::over(socket, "the guest agent".into(), LINE_MAX)?, timer: None })
    }

    /// The socket, if it is one of this machine.
    pub(super) fn socket(&self) -> Option<&UnixStream> {
        self.channel.socket()
    }

    /// Ends the conversation, also for those who share the socket.
    pub(super) fn hang_up(mut self) {
        // One that stays thaws what is thawed.
        let _best_effort = self.stop_timer();
        self.channel.hang_up();
    }

    pub(super) fn info(&mut self) -> Result<AgentInfo> {
        let info = self.run("guest-info", json!({}), ANSWER)?;
        let commands = info["supported_commands"].as_array().map_or(&[][..], Vec::as_slice);
        let enabled = commands.iter().filter(|command| command["enabled"].as_bool() == Some(true));
        let enabled = enabled.filter_map(|command| command["name"].as_str()).map(clean).collect();
        Ok(AgentInfo { version: clean(info["version"].as_str().unwrap_or_default()), enabled })
    }

    /// Freezes every file system; how many. When the time is up it may happen all the same: thaw.
    pub(super) fn freeze(&mut self, length: Duration) -> Result<u64> {
        Ok(self.run("guest-fsfreeze-freeze", json!({}), length)?.as_u64().unwrap_or(0))
    }

    /// Thaws every file system; how many were frozen until now.
    pub(super) fn thaw(&mut self, length: Duration) -> Result<u64> {
        self.channel.forget();
        // At one go, so that it is done even if the answers never come.
        let (mut text, number) = sync();
        text.extend(line_of(&json!({ "execute": "guest-fsfreeze-thaw" })));
        let limit = Limit::new(length)?;
        self.channel.send(&text, &limit)?;
        self.synced(number, &limit)?;
        Ok(self.answer("guest-fsfreeze-thaw", &limit)?.as_u64().unwrap_or(0))
    }

    /// Has every file system thawed, beside somebody who reads what the agent says.
    pub(super) fn thaw_unheard(&mut self) -> Result<()> {
        let (mut text, _) = sync();
        text.extend(line_of(&json!({ "execute": "guest-fsfreeze-thaw" })));
        self.channel.send(&text, &Limit::new(ANSWER)?)
    }

    /// See [`set_timer`]. It ends with [`Agent::hang_up`].
    pub(super) fn set_timer(&mut self, after: Duration) -> Result<()> {
        self.timer = set_timer(&mut |command, arguments| self.run(command, arguments, ANSWER), after)?;
        Ok(())
    }

    fn stop_timer(&mut self) -> Result<()> {
        let Some(timer) = self.timer.take() else { return Ok(()) };
        stop_timer(&mut |command, arguments| self.run(command, arguments, ANSWER), timer)
    }

    /// Runs a line in the guest's shell to its end; its exit status.
    ///
    /// Errors: [`Code::Io`] when it does not end in time, or is ended by a signal.
    pub(super) fn shell(&mut self, line: &str, limit: Duration) -> Result<i64> {
        shell(&mut |command, arguments| self.run(command, arguments, ANSWER), line, limit)
    }

    /// Tells the disks which blocks the file systems no longer use.
    pub(super) fn trim(&mut self, length: Duration) -> Result<()> {
        self.run("guest-fstrim", json!({}), length).map(drop)
    }

    /// Throws away whatever comes before the answer to this sync.
    fn synced(&mut self, number: u64, limit: &Limit) -> Result<()> {
        loop {
            let Some(line) = self.channel.line(limit)? else { return Err(self.silent(limit)) };
            let fresh = line.rsplit(|&byte| byte == DELIMITER).next().unwrap_or_default();
            let answer: Value = serde_json::from_slice(fresh).unwrap_or_default();
            if answer["return"].as_u64() == Some(number) {
                return Ok(());
            }
        }
    }

    pub(super) fn run(&mut self, command: &str, arguments: Value, length: Duration) -> Result<Value> {
        let limit = Limit::new(length)?;
        let message = json!({ "execute": command, "arguments": arguments });
        self.channel.send(&line_of(&message), &limit)?;
        self.answer(command, &limit)
    }

    fn answer(&mut self, command: &str, limit: &Limit) -> Result<Value> {
        let Some(line) = self.channel.line(limit)? else { return Err(self.silent(limit)) };
        let answer: Value = serde_json::from_slice(&line)
            .map_err(|error| Error::new(Code::Io, "the guest agent speaks no JSON").because(error))?;
        if let Some(error) = answer.get("error") {
            let words = clean(error["desc"].as_str().unwrap_or("no reason given"));
            return Err(Error::new(Code::Io, format!("the guest agent refused {command}: {words}")));
        }
        Ok(part(answer, "return"))
    }

    fn silent(&self, limit: &Limit) -> Error {
        self.channel.late(limit).hint("is the guest agent running in the guest?")
    }
}

/// However commands get to the agent.
pub(super) type Ask<'a> = &'a mut dyn FnMut(&str, Value) -> Result<Value>;

/// Has the guest thaw itself after so long, and again a few times, should nobody else do it: by a process of the guest's
/// own, since the link to the agent may be cut while the guest stands still. The number of that process.
///
/// Errors: [`Code::Io`] when the agent may start no programs, or the guest knows no `sh` or `fsfreeze`.
pub(super) fn set_timer(run: Ask<'_>, after: Duration) -> Result<Option<i64>> {
    let fail =
        |error: Error| error.during("the guest has nothing to thaw itself with, should the link be cut");
    if shell(run, "command -v fsfreeze", ANSWER).map_err(fail)? != 0 {
        return Err(fail(Error::new(Code::Unsupported, "it knows no fsfreeze")));
    }
    // Nothing of this writes to what is frozen.
    let script = format!(
        r#"for time in 1 2 3 4 5; do
            sleep {}
            while read -r device place rest; do
                case $device in /*) fsfreeze --unfreeze "$(printf %b "$place")" ;; esac
            done < /proc/mounts
            [ ! -x {HOOK} ] || {HOOK} thaw
        done"#,
        after.as_secs().max(1)
    );
    let started = run("guest-exec", json!({ "path": "/bin/sh", "arg": ["-c", script] }));
    Ok(started.map_err(fail)?["pid"].as_i64())
}

/// Ends such a process. While the guest is frozen, the agent starts no programs, and it stays.
pub(super) fn stop_timer(run: Ask<'_>, timer: i64) -> Result<()> {
    let status = run("guest-exec-status", json!({ "pid": timer }))?;
    if status["exited"].as_bool() == Some(false) {
        let kill = format!("kill {timer}");
        run("guest-exec", json!({ "path": "/bin/sh", "arg": ["-c", kill] }))?;
    }
    Ok(())
}

/// Runs a line in the guest's shell.
pub(super) fn shell(run: Ask<'_>, line: &str, limit: Duration) -> Result<i64> {
    const LOOK: Duration = Duration::from_millis(200);
    let started = run("guest-exec", json!({ "path": "/bin/sh", "arg": ["-c", line] }))?;
    let pid = started["pid"].clone();
    for _ in 0..=limit.as_millis() / LOOK.as_millis() {
        let status = run("guest-exec-status", json!({ "pid": pid }))?;
        if status["exited"].as_bool() == Some(true) {
            let ended = status["exitcode"].as_i64();
            return ended.ok_or_else(|| Error::new(Code::Io, "the command in the guest was killed"));
        }
        std::thread::sleep(LOOK);
    }
    Err(Error::new(Code::Io, format!("the command in the guest did not end within {} s", limit.as_secs())))
}

/// The text of a sync, and the number that its answer has.
fn sync() -> (Vec<u8>, u64) {
    // The agent's numbers are signed.
    let number = tag() >> 16;
    let message = json!({ "execute": "guest-sync-delimited", "arguments": { "id": number } });
    ([&[DELIMITER], line_of(&message).as_slice()].concat(), number)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;

    use serde_json::{Value, json};

    use super::{ANSWER, Agent};

    #[test]
    fn an_answer_that_is_no_object_holds_nothing() {
        for line in ["7", "[]", "\"return\"", "null", "{}"] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(format!("{line}\n").as_bytes()).unwrap();
            let mut agent = Agent::over(ours).unwrap();
            assert_eq!(agent.run("guest-info", json!({}), ANSWER).unwrap(), Value::Null, "{line}");
        }
    }
}
