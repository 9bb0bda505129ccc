//! `mainstay mount` with the real binary and the kernel's FUSE: what is shown is what is in the points.

#![cfg(test)]
#![expect(clippy::disallowed_methods, reason = "these tests start the program and look at what it mounts")]

use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use mainstay_testkit::Rng;
use mainstay_testkit::at_home;
use mainstay_testkit::tree::{compare, hostile_tree};

/// A person with a directory to mount on.
struct User {
    directory: tempfile::TempDir,
}

impl User {
    fn new() -> Self {
        let user = Self { directory: tempfile::tempdir().unwrap() };
        std::fs::create_dir(user.at("mounted")).unwrap();
        user
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = at_home(env!("CARGO_BIN_EXE_mainstay"), self.directory.path());
        command.args(arguments);
        command
    }

    fn run(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn fail(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(!output.status.success(), "{arguments:?}: {}", said(&output));
        said(&output)
    }

    fn back_up(&self, name: &str, tree: &Path) {
        self.run(&["backup", tree.to_str().unwrap(), "--name", name]);
    }

    /// Mounts, and returns when there is something to see.
    fn mount(&self, what: &[&str]) -> Mount {
        let at = self.at("mounted");
        let place = at.to_str().unwrap();
        let arguments = [&["mount", "--json"], what, &[place]].concat();
        let child = self.command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut mount = Mount { child: Some(child), at };
        let child = mount.child.as_mut().unwrap();
        let mut line = String::new();
        let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
        while !line.contains("\"mounted\"") {
            line.clear();
            let length = std::io::BufRead::read_line(&mut out, &mut line).unwrap();
            if length == 0 {
                let output = mount.child.take().unwrap().wait_with_output().unwrap();
                panic!("{}; this takes /dev/fuse and root", said(&output));
            }
        }
        // Whatever it writes later must find a reader.
        std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
        mount
    }
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

struct Mount {
    child: Option<Child>,
    at: PathBuf,
}

impl Mount {
    fn signal(&self, name: &str) {
        tool("kill", &[name, &self.child.as_ref().unwrap().id().to_string()]);
    }

    /// Waits for its end, and returns what it said on the way.
    fn ended(mut self) -> (Option<i32>, String) {
        let output = self.child.take().unwrap().wait_with_output().unwrap();
        (output.status.code(), said(&output))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let _killed = child.kill();
        let _status = child.wait();
        let _unmounted = Command::new("umount").arg("-l").arg(&self.at).output();
    }
}

fn tool(program: &str, arguments: &[&str]) {
    let output = Command::new(program).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; install it: cargo xtask setup"));
    assert!(output.status.success(), "{program}: {}", said(&output));
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn below(root: &Path, tree: &Path) -> PathBuf {
    root.join(tree.strip_prefix("/").unwrap())
}

#[test]
fn a_mounted_point_is_the_tree_that_was_backed_up() {
    let user = User::new();
    let tree = user.at("tree");
    hostile_tree(&tree).unwrap().iter().for_each(|part| println!("NOT RUN: {part}"));
    user.run(&["backup", tree.to_str().unwrap(), "--name", "tree"]);
    let mount = user.mount(&["tree@latest"]);
    let shown = below(&mount.at, &tree);
    // How much of a file is allocated nobody counts; where its holes are is compared.
    let mut differences = compare(&tree, &shown).unwrap();
    differences.retain(|difference| !difference.contains(": allocation is "));
    assert_eq!(differences, [""; 0]);
    let refused = std::fs::write(shown.join("new"), "x").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(30), "read-only: {refused}");
    tool("umount", &[mount.at.to_str().unwrap()]);
    let (status, said) = mount.ended();
    assert_eq!(status, Some(0), "{said}");
}

#[test]
fn everything_is_there_by_workload_and_time_and_new_points_appear() {
    let user = User::new();
    let tree = user.at("tree");
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("one"), "first").unwrap();
    user.back_up("docs", &tree);
    let mount = user.mount(&[]);
    assert_eq!(names(&mount.at), ["docs"]);
    let [first, latest] = &names(&mount.at.join("docs"))[..] else { panic!("one point") };
    assert_eq!(
        (latest.as_str(), std::fs::read_link(mount.at.join("docs/latest")).unwrap()),
        ("latest", first.into())
    );
    let one =
        |point: &str| std::fs::read_to_string(below(&mount.at.join("docs").join(point), &tree.join("one")));
    assert_eq!(one(first).unwrap(), "first");

    std::fs::write(tree.join("one"), "second").unwrap();
    user.back_up("docs", &tree);
    user.back_up("other", &tree);
    // The kernel remembers for two seconds which points there are.
    let mut rounds = 0;
    while names(&mount.at) != ["docs", "other"] || one("latest").unwrap() != "second" {
        rounds += 1;
        assert!(rounds < 600, "new points never appear");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(one(first).unwrap(), "first");
    mount.signal("-INT");
    assert_eq!(mount.ended().0, Some(0));
}

#[test]
fn a_mounted_machine_shows_files_and_disks_with_random_access() {
    let user = User::new();
    let tree = user.at("tree");
    std::fs::create_dir_all(tree.join("etc")).unwrap();
    std::fs::create_dir(user.at("images")).unwrap();
    let content = Rng::new(9).bytes(5 << 20);
    std::fs::write(tree.join("etc/big"), &content).unwrap();
    std::fs::hard_link(tree.join("etc/big"), tree.join("etc/twin")).unwrap();
    let image = user.at("images/web.raw");
    std::fs::File::create(&image).unwrap().set_len(48 << 20).unwrap();
    tool("mke2fs", &["-q", "-t", "ext4", "-d", tree.to_str().unwrap(), image.to_str().unwrap()]);
    let host = format!("dir:{}", user.at("images").display());
    user.run(&["vm", "backup", "--host", &host, "--all"]);

    let mount = user.mount(&["web.raw"]);
    assert!(std::fs::read(mount.at.join("etc/big")).unwrap() == content);
    let inode = |name: &str| std::fs::metadata(mount.at.join("etc").join(name)).unwrap().ino();
    assert_eq!(inode("big"), inode("twin"));
    assert!(names(&mount.at.join("@volumes/vda")).contains(&"etc".to_owned()));
    let disk = std::fs::File::open(mount.at.join("@machine/disks/web.raw")).unwrap();
    let (mut rng, original) = (Rng::new(3), std::fs::read(&image).unwrap());
    std::thread::scope(|scope| {
        for seed in [rng.next_u64(), rng.next_u64(), rng.next_u64()] {
            let (disk, original, mut rng) = (&disk, &original, Rng::new(seed));
            scope.spawn(move || {
                for _ in 0..200 {
                    let (at, mut buffer) = (rng.range(0..(47 << 20)) as usize, vec![0; 5000]);
                    disk.read_exact_at(&mut buffer, at as u64).unwrap();
                    assert!(buffer == original[at..at + 5000], "seed {seed}, at {at}");
                }
            });
        }
    });
    drop(disk);
    mount.signal("-TERM");
    assert_eq!(mount.ended().0, Some(0));
}

/// Changes so much in the middle of every large pack that its parity does not make it good.
fn damage(directory: &Path) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            damage(&path);
        } else if path.to_str().unwrap().contains("/repository/pack/") {
            let file = std::fs::OpenOptions::new().read(true).write(true).open(&path);
            let file = file.unwrap();
            let length = file.metadata().unwrap().len();
            let mut part = vec![0; length as usize / 8];
            file.read_exact_at(&mut part, length / 2).unwrap();
            part.iter_mut().for_each(|byte| *byte ^= 0xff);
            file.write_all_at(&part, length / 2).unwrap();
        }
    }
}

#[test]
fn damage_is_an_error_where_it_is_and_nowhere_else() {
    let user = User::new();
    let tree = user.at("tree");
    std::fs::create_dir(&tree).unwrap();
    for number in 0..8 {
        std::fs::write(tree.join(format!("{number}")), Rng::new(number).bytes(2 << 20)).unwrap();
    }
    user.back_up("docs", &tree);
    damage(&user.at("data"));
    let mount = user.mount(&["docs"]);
    let (mut whole, mut broken) = (0, 0);
    for number in 0..8 {
        match std::fs::read(below(&mount.at, &tree).join(format!("{number}"))) {
            Ok(read) => {
                assert!(read == Rng::new(number).bytes(2 << 20));
                whole += 1;
            }
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(5), "{error}");
                broken += 1;
            }
        }
    }
    assert!(whole >= 4 && broken >= 1, "{whole} {broken}");
    mount.signal("-INT");
    let (status, said) = mount.ended();
    assert_eq!(status, Some(0));
    assert!(said.contains("damaged") || said.contains("is not what was written"), "{said}");
}

#[test]
fn the_point_is_held_while_it_is_mounted_and_a_dead_mount_is_told_how_to_clear() {
    let user = User::new();
    let tree = user.at("tree");
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("one"), "first").unwrap();
    user.back_up("docs", &tree);
    std::fs::write(tree.join("one"), "second").unwrap();
    user.back_up("docs", &tree);

    let mount = user.mount(&["docs~1"]);
    let place = mount.at.to_str().unwrap().to_owned();
    let id = user.run(&["points", "--json"]);
    let id = id.split("\"point\":\"").nth(1).unwrap().split('"').next().unwrap().to_owned();
    let refused = user.fail(&["expire", &id, "--yes"]);
    assert!(refused.contains("mounted at"), "{refused}");
    let again = user.fail(&["mount", &place]);
    assert!(again.contains("is not empty"), "{again}");
    mount.signal("-INT");
    assert_eq!(mount.ended().0, Some(0));

    let mount = user.mount(&["docs"]);
    mount.signal("-KILL");
    assert_eq!(mount.ended().0, None);
    let dead = user.fail(&["mount", "docs", &place]);
    assert!(dead.contains("whose program is gone") && dead.contains(&format!("umount -l {place}")), "{dead}");
    tool("umount", &["-l", &place]);
    user.run(&["expire", &id, "--yes"]);
    let missing = user.fail(&["mount", "docs", user.at("nowhere").to_str().unwrap()]);
    assert!(missing.contains("mkdir"), "{missing}");
}
