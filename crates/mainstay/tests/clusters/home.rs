//! The program as an administrator of databases uses it.

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use rustix::process::Signal;
use serde_json::Value;

/// A home with a repository that a generated key opens.
pub(crate) struct Home {
    directory: tempfile::TempDir,
}

impl Home {
    pub(crate) fn new() -> Self {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::Builder::new().prefix("ms-").tempdir().unwrap();
        // The server's user goes through it to what is restored.
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let home = Self { directory };
        home.run(&["init", "--generate-key", "--kit", "kit"]);
        home
    }

    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.directory.path().join(path)
    }

    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = self.plain(env!("CARGO_BIN_EXE_mainstay"));
        command.args(words).arg("--json");
        command
    }

    #[expect(clippy::disallowed_methods, reason = "the tests run the program and kill it")]
    pub(crate) fn plain(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", self.directory.path().display());
        command.env_clear().env("HOME", self.directory.path()).env("PATH", path);
        for kind in ["DATA", "CONFIG", "STATE", "CACHE"] {
            command.env(format!("XDG_{kind}_HOME"), self.at(kind));
        }
        command.current_dir(self.directory.path()).stdin(Stdio::null());
        command
    }

    pub(crate) fn output(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// Runs it to its end, which must be a good one; its lines of JSON.
    #[track_caller]
    pub(crate) fn run(&self, words: &[&str]) -> Vec<Value> {
        let output = self.output(words);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{words:?}: {:?}\n{out}{err}", output.status);
        lines(&out)
    }

    /// Runs it beside the test; what it says goes to a file of this name.
    pub(crate) fn start(&self, log: &str, words: &[&str]) -> Running {
        let file = std::fs::File::options().create(true).append(true).open(self.at(log)).unwrap();
        let errors = file.try_clone().unwrap();
        Running(self.command(words).stdout(file).stderr(errors).spawn().unwrap())
    }

    /// As [`Home::start`], what a shell is told.
    pub(crate) fn start_shell(&self, log: &str, line: &str) -> Running {
        let file = std::fs::File::options().create(true).append(true).open(self.at(log)).unwrap();
        let errors = file.try_clone().unwrap();
        Running(self.plain("sh").args(["-c", line]).stdout(file).stderr(errors).spawn().unwrap())
    }

    /// Up to where the journal of a workload is promised to reach.
    pub(crate) fn promised(&self, workload: &str) -> Option<String> {
        let output = self.output(&["db", "status", workload]);
        let lines = lines(&String::from_utf8_lossy(&output.stdout));
        let newest = lines.iter().find(|line| line["type"] == "recoverable")?;
        newest["end"].as_str().map(str::to_owned)
    }
}

fn lines(out: &str) -> Vec<Value> {
    out.lines().filter(|line| line.starts_with('{')).map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A run of the program. It ends with the value.
pub(crate) struct Running(Child);

impl Running {
    pub(crate) fn has_ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }

    /// As a power cut would.
    pub(crate) fn kill(mut self) {
        self.end(Signal::KILL);
    }

    /// As Ctrl-C does; how it ended.
    pub(crate) fn interrupt(mut self) -> Option<i32> {
        self.end(Signal::INT)
    }

    fn end(&mut self, signal: Signal) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.0);
        let _gone = rustix::process::kill_process(pid, signal);
        self.0.wait().unwrap().code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end(Signal::KILL);
    }
}
