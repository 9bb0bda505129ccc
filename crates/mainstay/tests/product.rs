//! The program as people use it: the real binary, real files, compared by a checker that shares no code with it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]
#![expect(clippy::disallowed_methods, reason = "these tests start the program and kill it")]

use std::io::Read as _;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use mainstay_testkit::Rng;
use mainstay_testkit::tree::{compare, hostile_tree};

/// A user with a home of its own.
struct User {
    home: PathBuf,
    /// Somebody other than who runs the tests.
    uid: Option<u32>,
}

impl User {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mainstay"));
        command.env_clear().env("HOME", &self.home).env("PATH", "/usr/bin:/bin").args(arguments);
        // Root would keep what it remembers in a place of the machine.
        command.env("XDG_STATE_HOME", self.home.join("state"));
        command.stdin(Stdio::null());
        if let Some(uid) = self.uid {
            command.uid(uid).gid(uid);
        }
        let repository = self.home.join("repository");
        let key = self.home.join("key");
        command.arg("--repository").arg(repository).arg("--key-file").arg(key);
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs and expects one of these exit statuses.
    fn expect(&self, arguments: &[&str], statuses: &[i32]) -> String {
        let output = self.run(arguments);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(
            output.status.code().is_some_and(|code| statuses.contains(&code)),
            "{arguments:?}: {out}\n{err}"
        );
        out.into_owned()
    }

    fn init(&self) {
        self.expect(&["init", "--generate-key", "--kit", self.home.join("kit").to_str().unwrap()], &[0]);
    }
}

fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o777)).unwrap();
    directory
}

/// The place of `path` below `target` after a restore.
fn below(target: &Path, path: &Path) -> PathBuf {
    target.join(path.strip_prefix("/").unwrap())
}

/// Everything a Linux file system holds, through the repository and back, twice: a first point and an unchanged one.
fn hostile_round_trip(user: &User) {
    let (tree, target) = (user.home.join("tree"), user.home.join("target"));
    user.init();
    let tree_name = tree.to_str().unwrap();
    user.expect(&["backup", tree_name], &[0]);
    user.expect(&["backup", tree_name], &[0]);
    // Somebody else's directories above the tree cannot be made by an ordinary user; that is said, with status 3.
    user.expect(&["restore", "latest", tree_name, "--to", target.to_str().unwrap()], &[0, 3]);
    assert_eq!(compare(&tree, &below(&target, &tree)).unwrap(), Vec::<String>::new());
    user.expect(&["verify", "--read-data"], &[0]);
}

#[test]
fn a_hostile_tree_comes_back_identical() {
    let home = directory();
    let absent = hostile_tree(&home.path().join("tree")).unwrap();
    absent.iter().for_each(|part| println!("NOT RUN: {part}"));
    hostile_round_trip(&User { home: home.path().to_owned(), uid: None });
}

#[test]
fn a_hostile_tree_of_an_ordinary_user_comes_back_identical() {
    if !rustix::process::geteuid().is_root() {
        println!("NOT RUN: it is the test beside this one, whoever runs it is an ordinary user already");
        return;
    }
    let home = directory();
    let tree = home.path().join("tree");
    // Made by the ordinary user too, so that everything in it is that user's.
    let made = std::thread::scope(|scope| {
        let make = scope.spawn(|| {
            rustix::thread::set_thread_groups(&[]).unwrap();
            let (uid, gid) = (rustix::process::Uid::from_raw(65534), rustix::process::Gid::from_raw(65534));
            rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
            rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
            hostile_tree(&tree)
        });
        make.join().unwrap()
    });
    made.unwrap().iter().for_each(|part| println!("NOT RUN as an ordinary user: {part}"));
    hostile_round_trip(&User { home: home.path().to_owned(), uid: Some(65534) });
}

/// The ids of points in lines of JSON.
fn point_ids(lines: &str) -> Vec<String> {
    let ids = lines.match_indices("\"point\":\"").map(|(at, key)| &lines[at + key.len()..]);
    ids.filter_map(|rest| rest.split('"').next()).map(str::to_owned).collect()
}

/// Runs a verb and kills it at a random moment. What it wrote to stdout, when it was faster.
fn run_and_kill(user: &User, verb: &[&str], rng: &mut Rng) -> Option<String> {
    let mut child = user.command(verb).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_micros(rng.range(0..80_000)));
    // Killing one that has ended is no error.
    let _ended = child.kill();
    let mut out = String::new();
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    child.wait().unwrap().success().then_some(out)
}

#[test]
fn kill_minus_nine_loses_nothing_that_was_acknowledged() {
    let home = directory();
    let user = User { home: home.path().to_owned(), uid: None };
    user.init();
    let tree = home.path().join("tree");
    let tree_name = tree.to_str().unwrap();
    std::fs::create_dir(&tree).unwrap();
    let mut rng = Rng::new(mainstay_testkit::seeds(1).next().unwrap());
    let mut acknowledged = Vec::new();
    for round in 0..24 {
        let name = tree.join(format!("file-{}", rng.range(0..12)));
        let length = usize::try_from(rng.range(0..2_000_000)).unwrap();
        std::fs::write(name, rng.bytes(length)).unwrap();
        if round % 4 == 3 {
            run_and_kill(&user, &["gc"], &mut rng);
        } else if let Some(lines) = run_and_kill(&user, &["--json", "backup", tree_name], &mut rng) {
            acknowledged.extend(point_ids(&lines).pop());
        }
    }
    let kept = point_ids(&user.expect(&["--json", "points"], &[0]));
    assert!(acknowledged.iter().all(|point| kept.contains(point)), "{acknowledged:?} in {kept:?}");
    println!("{} backups were acknowledged before the kill", acknowledged.len());
    for _ in 0..4 {
        run_and_kill(&user, &["expire", "--keep-last", "2", "--yes"], &mut rng);
        run_and_kill(&user, &["gc"], &mut rng);
    }
    user.expect(&["backup", tree_name], &[0]);
    user.expect(&["verify", "--read-data"], &[0]);
    let target = home.path().join("target");
    user.expect(&["restore", "latest", "--to", target.to_str().unwrap()], &[0]);
    assert_eq!(compare(&tree, &below(&target, &tree)).unwrap(), Vec::<String>::new());
}
