//! The real program as a process: signals, kill -9, pipes.

use std::io::Read as _;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::machine::{directories_below, files_below};
use rustix::process::{Pid, Signal, kill_process};

struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        let home = Self(tempfile::tempdir().unwrap());
        let done = home.command().args(["init", "--generate-key", "--kit", "kit"]).output().unwrap();
        assert!(done.status.success(), "{done:?}");
        home
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn command(&self) -> Command {
        self.command_of(Path::new(env!("CARGO_BIN_EXE_mainstay")))
    }

    fn command_of(&self, program: &Path) -> Command {
        #[expect(clippy::disallowed_methods, reason = "a test of the process as such")]
        let mut command = Command::new(program);
        command.current_dir(self.path()).env_clear().env("HOME", self.path());
        let repository = self.path().join("repository");
        command.env("MAINSTAY_REPOSITORY", repository).env("MAINSTAY_KEY_FILE", self.path().join("key"));
        command
    }

    fn points(&self) -> usize {
        let listed = self.command().args(["points", "--json"]).output().unwrap();
        assert!(listed.status.success(), "{listed:?}");
        listed.stdout.iter().filter(|byte| **byte == b'\n').count()
    }

    /// Starts a backup that waits in its first command until it is told to go on by a signal or dies.
    fn waiting_backup(&self) -> Child {
        std::fs::create_dir_all(self.path().join("d")).unwrap();
        for number in 0..50 {
            std::fs::write(self.path().join(format!("d/{number}")), vec![number; 100_000]).unwrap();
        }
        let ready = self.path().join("ready");
        let _not_there = std::fs::remove_file(&ready);
        let quiesce = format!("touch {}; sleep 1", ready.display());
        self.command()
            .args(["backup", "d", "--quiesce", &quiesce])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Waits until the backup has reached its first command.
    fn wait_until_ready(&self, child: &mut Child) {
        while !self.path().join("ready").exists() {
            assert_eq!(child.try_wait().unwrap(), None, "the backup ended before its first command");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// As an ordinary user, whoever runs the tests: root would read everything.
#[test]
fn what_cannot_be_read_is_named_counted_kept_in_the_point_and_exit_3() {
    const NOBODY: u32 = 65_534;
    let home = Home::new();
    std::fs::create_dir(home.path().join("d")).unwrap();
    std::fs::write(home.path().join("d/good"), "x").unwrap();
    let secret = home.path().join("d/secret");
    std::fs::write(&secret, "x").unwrap();
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o000)).unwrap();
    let program = home.path().join("mainstay");
    std::fs::copy(env!("CARGO_BIN_EXE_mainstay"), &program).unwrap();
    let root = rustix::process::geteuid().is_root();
    if root {
        files_below(home.path()).iter().for_each(|file| chown(file, Some(NOBODY), Some(NOBODY)).unwrap());
        directories_below(home.path())
            .iter()
            .for_each(|file| chown(file, Some(NOBODY), Some(NOBODY)).unwrap());
    }
    let run = |arguments: &[&str]| {
        let mut command = home.command_of(&program);
        if root {
            command.uid(NOBODY).gid(NOBODY);
        }
        let done = command.args(arguments).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        (done.status.code(), text(&done.stdout), text(&done.stderr))
    };
    let (code, out, err) = run(&["backup", "d"]);
    assert_eq!(code, Some(3), "{out}{err}");
    assert!(err.contains(&format!("skipped: {}: ", secret.display())), "{err}");
    assert!(out.contains("1 item was skipped"), "{out}");
    let (code, out, _) = run(&["backup", "d", "--json"]);
    assert!(
        code == Some(3) && out.contains("\"type\":\"skipped\"") && out.contains("\"skipped\":1"),
        "{out}"
    );
    let (code, out, _) = run(&["points", "show", "latest"]);
    assert!(code == Some(0) && out.contains(&format!("{}: ", secret.display())), "{out}");
    let (_, out, err) = run(&["status"]);
    assert!(out.contains("  1\n"), "{out}{err}");
}

#[test]
fn an_interrupted_backup_ends_cleanly_with_130() {
    for asked in [Signal::INT, Signal::TERM] {
        let home = Home::new();
        let mut child = home.waiting_backup();
        home.wait_until_ready(&mut child);
        signal(&child, asked);
        let ended = child.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(130), "{ended:?}");
        assert!(String::from_utf8_lossy(&ended.stderr).contains("error: stopped"), "{ended:?}");
        assert_eq!(home.points(), 0);
    }
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let home = Home::new();
    let mut child = home.waiting_backup();
    home.wait_until_ready(&mut child);
    signal(&child, Signal::INT);
    std::thread::sleep(Duration::from_millis(100));
    signal(&child, Signal::INT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(home.points(), 0);
}

#[test]
fn kill_9_at_any_moment_loses_no_point_and_the_next_run_goes_on() {
    let home = Home::new();
    let mut acknowledged = 0;
    for round in 0..6 {
        let mut child = home.waiting_backup();
        home.wait_until_ready(&mut child);
        // From the moment the first command ends on, somewhere in the run or after it.
        std::thread::sleep(Duration::from_millis(950 + 30 * round));
        let _ended_already = kill_process(Pid::from_child(&child), Signal::KILL);
        let status = child.wait().unwrap();
        acknowledged += usize::from(status.success());
        assert!(status.success() || status.signal() == Some(9), "{status:?}");
        assert!(home.points() >= acknowledged, "round {round}: an acknowledged point is lost");
    }
    let done = home.command().args(["backup", "d"]).output().unwrap();
    assert!(done.status.success(), "{done:?}");
    let done = home.command().args(["verify", "--read-data"]).output().unwrap();
    assert!(done.status.success(), "{done:?}");
}

#[test]
fn a_closed_pipe_is_exit_0_without_a_word() {
    let home = Home::new();
    std::fs::create_dir(home.path().join("d")).unwrap();
    std::fs::write(home.path().join("d/big"), vec![7; 5_000_000]).unwrap();
    assert!(home.command().args(["backup", "d"]).output().unwrap().status.success());
    let file = home.path().join("d/big");
    let mut child = home
        .command()
        .args(["cat", "latest", file.to_str().unwrap()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut start = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut start).unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!((ended.status.code(), ended.stderr.as_slice()), (Some(0), &b""[..]));
}
