//! Somebody with a folder of machines and a repository.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use mainstay_testkit::at_home;
use serde_json::Value;

const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

pub(crate) struct User(tempfile::TempDir);

impl User {
    pub(crate) fn new() -> Self {
        // Short, because the paths of sockets are.
        Self(tempfile::Builder::new().prefix("ms-rec-").tempdir().unwrap())
    }

    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = at_home(env!("CARGO_BIN_EXE_mainstay"), self.0.path());
        command.current_dir(self.0.path());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).args(arguments);
        command
    }

    pub(crate) fn start(&self, arguments: &[&str]) -> Child {
        self.command(arguments).spawn().unwrap()
    }

    pub(crate) fn try_run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> String {
        let output = self.try_run(arguments);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{arguments:?}: {out}\n{err}");
        out.into_owned()
    }

    /// The only line of this type that a run prints with `--json`.
    pub(crate) fn only(&self, kind: &str, arguments: &[&str]) -> Value {
        let out = self.run(&[arguments, &["--json"]].concat());
        let lines = out.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let mut found: Vec<Value> = lines.filter(|line| line["type"] == kind).collect();
        assert_eq!(found.len(), 1, "{kind}: {out}");
        found.remove(0)
    }

    /// It ends with this status and says that.
    pub(crate) fn fails(&self, arguments: &[&str], status: i32, why: &str) {
        let output = self.try_run(arguments);
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {err}");
        assert!(err.contains(why), "{arguments:?}: {err}");
    }
}

pub(crate) fn tool(program: &str, arguments: &[&str]) {
    let output = Command::new(program).env("PATH", PATH).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; install it: cargo xtask setup"));
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&said));
}

/// Whether both disks read the same, whatever their formats.
pub(crate) fn same(one: &Path, other: &Path) {
    tool("qemu-img", &["compare", "-q", one.to_str().unwrap(), other.to_str().unwrap()]);
}
