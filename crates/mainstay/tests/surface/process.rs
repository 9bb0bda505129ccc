//! The real program as a process: signals, kill -9, pipes.

use std::io::Read as _;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::machine::{directories_below, files_below};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

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

/// The command that tells the passphrase is not a part of the run, so it is waited for.
#[test]
fn a_second_signal_ends_what_waits_for_something_else() {
    let home = Home::new();
    let mut command = home.command();
    command.env_remove("MAINSTAY_KEY_FILE");
    let asked = format!("touch {}; sleep 600 & echo $! > pid; wait", home.path().join("ready").display());
    command.env("MAINSTAY_PASSPHRASE_COMMAND", asked);
    let mut child = command.arg("points").spawn().unwrap();
    home.wait_until_ready(&mut child);
    signal(&child, Signal::INT);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(child.try_wait().unwrap(), None);
    signal(&child, Signal::INT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let left: i32 = std::fs::read_to_string(home.path().join("pid")).unwrap().trim().parse().unwrap();
    kill_process(Pid::from_raw(left).unwrap(), Signal::KILL).unwrap();
}

/// The first signal ends the first command, further ones find the application at rest and wait for the second one.
#[test]
fn no_number_of_signals_leaves_an_application_at_rest() {
    let home = Home::new();
    std::fs::create_dir(home.path().join("d")).unwrap();
    let command = |line: &str| format!("{line} && touch ready");
    let mut child = home
        .command()
        .args(["backup", "d", "--quiesce", &command("touch stopped; rm -f ready; sleep 600 & wait")])
        .args(["--thaw", "touch thawing; sleep 1; rm stopped"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let reached = |name: &str| home.path().join(name).exists();
    while !reached("stopped") {
        assert_eq!(child.try_wait().unwrap(), None, "the backup ended before its first command");
        std::thread::sleep(Duration::from_millis(5));
    }
    signal(&child, Signal::TERM);
    while !reached("thawing") {
        std::thread::sleep(Duration::from_millis(5));
    }
    for asked in [Signal::TERM, Signal::INT, Signal::HUP] {
        signal(&child, asked);
        std::thread::sleep(Duration::from_millis(50));
    }
    let ended = child.wait_with_output().unwrap();
    assert!(!reached("stopped") && !reached("ready"), "{ended:?}");
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(ended.status.code() == Some(130) && said.contains("waiting for the thaw command"), "{ended:?}");
    assert_eq!(home.points(), 0);
}

/// Asks for a passphrase at a terminal of its own, and is stopped there.
#[test]
fn a_signal_at_the_passphrase_prompt_brings_the_echo_back() {
    let home = Home::new();
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    unlockpt(&ours).unwrap();
    let name = ptsname(&ours, Vec::new()).unwrap().into_string().unwrap();
    let terminal = std::fs::File::options().read(true).write(true).open(&name).unwrap();
    let echoes = || tcgetattr(&terminal).unwrap().local_modes.contains(LocalModes::ECHO);
    let program = home.command();
    let mut command = home.command_of(Path::new("/usr/bin/setsid"));
    command.arg("--ctty").arg(program.get_program()).arg("points").env_remove("MAINSTAY_KEY_FILE");
    command.stdin(terminal.try_clone().unwrap()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().expect("setsid of util-linux: cargo xtask setup");
    while echoes() {
        assert_eq!(child.try_wait().unwrap(), None, "nobody was asked");
        std::thread::sleep(Duration::from_millis(5));
    }
    signal(&child, Signal::TERM);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(echoes());
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
