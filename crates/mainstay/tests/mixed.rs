//! A machine restored as a whole from its image and newer files, through the real binary: as root, who may mount.

#![cfg(test)]
#![expect(clippy::disallowed_methods, reason = "these tests start the program and the tools that judge it")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use mainstay_testkit::at_home;
use std::time::Duration;

struct User(tempfile::TempDir);

impl User {
    /// A machine of one disk, whose image is stored, and newer files of it: many, so that putting them back takes a while.
    fn with_points(files: usize) -> Self {
        let user = Self(tempfile::tempdir().unwrap());
        for directory in ["live", "images", "tmp"] {
            std::fs::create_dir(user.at(directory)).unwrap();
        }
        std::fs::write(user.at("live/edited"), "old").unwrap();
        std::fs::write(user.at("live/gone"), "gone").unwrap();
        let inside = user.at("tree").join(user.at("live").strip_prefix("/").unwrap());
        std::fs::create_dir_all(&inside).unwrap();
        for name in ["edited", "gone"] {
            std::fs::copy(user.at("live").join(name), inside.join(name)).unwrap();
        }
        std::fs::create_dir_all(user.at("tree/etc")).unwrap();
        std::fs::write(user.at("tree/etc/fstab"), "/dev/vda / ext4 defaults 0 1\n").unwrap();
        let image = user.at("images/web.raw");
        std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let arguments = ["-q", "-t", "ext4", "-d"];
        let made = Command::new("mke2fs").args(arguments).arg(user.at("tree")).arg(&image).output();
        let made = made.unwrap_or_else(|error| panic!("mke2fs: {error}; install it: cargo xtask setup"));
        assert!(made.status.success(), "{made:?}");
        user.run(0, &["vm", "backup", "--host", "dir:images", "web.raw", "--name", "web"]);
        std::fs::write(user.at("live/edited"), "newer").unwrap();
        std::fs::remove_file(user.at("live/gone")).unwrap();
        for number in 0..files {
            std::fs::write(user.at("live").join(number.to_string()), number.to_string()).unwrap();
        }
        user.run(0, &["backup", "live", "--machine", "web"]);
        user
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = at_home(env!("CARGO_BIN_EXE_mainstay"), self.0.path());
        command.env("TMPDIR", self.at("tmp"));
        command.args(arguments).current_dir(self.0.path());
        command
    }

    fn run(&self, exit: i32, arguments: &[&str]) -> String {
        let Output { status, stdout, stderr } = self.command(arguments).output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
        assert_eq!(status.code(), Some(exit), "{arguments:?}: {out}\n{err}");
        format!("{out}{err}")
    }

    /// A file of the machine on a restored disk, read by the program itself.
    fn read(&self, directory: &str, name: &str) -> String {
        let host = format!("dir:{directory}");
        self.run(0, &["vm", "backup", "--host", &host, "--all", "--tag", directory]);
        let path = self.at("live").join(name);
        self.run(0, &["cat", "latest", path.to_str().unwrap(), "--image-only"])
    }

    fn places(&self) -> usize {
        std::fs::read_dir(self.at("tmp")).unwrap().count()
    }
}

/// Whether this test can run at all.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("NOT RUN: mounting volumes needs a privilege; run this test as root");
    }
    root
}

/// Whether a loop device has a file below the directory.
fn has_loop(directory: &Path) -> bool {
    let devices = std::fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path());
    let mut files =
        devices.filter_map(|device| std::fs::read_to_string(device.join("loop/backing_file")).ok());
    files.any(|file| Path::new(file.trim_end()).starts_with(directory))
}

#[test]
fn a_machine_comes_back_with_its_newer_files_or_as_its_image_has_it() {
    if !is_root() {
        return;
    }
    let user = User::with_points(3);
    let said = user.run(0, &["vm", "restore", "web@latest", "--to", "mixed", "--json"]);
    assert!(said.contains("\"type\":\"composed\"") && said.contains("\"type\":\"files_applied\""), "{said}");
    assert_eq!(user.read("mixed", "edited"), "newer");
    let gone = user.at("live/gone");
    user.run(1, &["cat", "latest", gone.to_str().unwrap()]);
    user.run(0, &["vm", "restore", "web@latest", "--to", "image", "--image-only"]);
    assert_eq!(user.read("image", "edited"), "old");
    user.run(0, &["vm", "restore", "web", "--to", "packed", "--format", "qcow2"]);
    assert_eq!(user.read("packed", "edited"), "newer");
    assert_eq!(user.places(), 0);
}

/// As a new machine, and by a plan.
#[test]
fn new_machines_have_the_newer_files_unless_the_image_alone_is_wanted() {
    if !is_root() {
        return;
    }
    let user = User::with_points(3);
    let restore =
        ["vm", "restore", "web@latest", "--as", "two", "--host", "dir:machines", "--format", "qcow2"];
    std::fs::create_dir(user.at("machines")).unwrap();
    let said = user.run(0, &[restore.as_slice(), &["--to", "machines/two", "--json"]].concat());
    assert!(said.contains("\"type\":\"files_applied\""), "{said}");
    user.run(0, &[restore.as_slice(), &["--to", "machines/two"]].concat());
    assert_eq!(user.read("machines", "edited"), "newer");
    let machine = |name: &str, more: &str| {
        let directory = user.at(&format!("{name}-machines"));
        std::fs::create_dir(&directory).unwrap();
        let text = format!(
            "host = 'dir:{name}-machines'\ndirectory = '{name}-machines'\nformat = 'raw'\n\
             [[machine]]\npoint = 'web@latest'\nname = '{name}'\n{more}"
        );
        std::fs::write(user.at(&format!("{name}.toml")), text).unwrap();
        user.run(0, &["vm", "recover", &format!("{name}.toml")]);
        user.read(&format!("{name}-machines"), "edited")
    };
    assert_eq!(machine("planned", ""), "newer");
    assert_eq!(machine("plain", "image_only = true\n"), "old");
    assert_eq!(user.places(), 0);
}

#[test]
fn in_place_the_newer_files_come_too_and_the_undo_point_takes_all_back() {
    if !is_root() {
        return;
    }
    let user = User::with_points(3);
    let (image, present) = (user.at("images/web.raw"), user.at("present.raw"));
    let writes = ["-f", "raw", image.to_str().unwrap(), "-c", "write -P 7 40m 1m"];
    assert!(Command::new("qemu-io").args(writes).output().unwrap().status.success());
    std::fs::copy(&image, &present).unwrap();
    let said = user.run(0, &[IN_PLACE.as_slice(), &["web@latest", "--dry-run"]].concat());
    assert!(
        said.contains("newer files") && std::fs::read(&image).unwrap() == std::fs::read(&present).unwrap()
    );
    let said = user.run(0, &[IN_PLACE.as_slice(), &["web@latest", "--json"]].concat());
    assert!(said.contains("\"type\":\"files_applied\""), "{said}");
    let undo = said.split("\"undo\":\"").nth(1).unwrap().split('"').next().unwrap();
    // What is shown of the machine now is what it is now.
    let shown = user.run(0, &["cat", "web@latest", user.at("live/edited").to_str().unwrap()]);
    assert!(shown.starts_with("newer"), "{shown}");
    assert_eq!(user.read("images", "edited"), "newer");
    let check = Command::new("e2fsck").args(["-f", "-n"]).arg(&image).output().unwrap();
    assert!(check.status.success(), "{check:?}");
    user.run(0, &[IN_PLACE.as_slice(), &[&format!("web@{undo}")]].concat());
    assert!(std::fs::read(&image).unwrap() == std::fs::read(&present).unwrap(), "it is not taken back");
    assert_eq!(user.places(), 0);
}

const IN_PLACE: [&str; 6] = ["vm", "restore", "--in-place", "--host", "dir:images", "--yes"];

/// Killed while files are put on its disk, the machine does not come up, and the same command finishes.
#[test]
fn what_is_killed_in_place_while_files_are_put_there_is_finished_by_the_same_command() {
    if !is_root() {
        return;
    }
    let user = User::with_points(5000);
    let image = user.at("images/web.raw");
    let present = std::fs::read(&image).unwrap();
    let restore = [IN_PLACE.as_slice(), &["web@latest"]].concat();
    for _ in 0..2 {
        let mut running = user.command(&restore).spawn().unwrap();
        wait(|| has_loop(&user.at("tmp")));
        running.kill().unwrap();
        assert_eq!(running.wait().unwrap().code(), None, "it was done before it was killed");
        wait(|| !has_loop(&user.at("tmp")));
        assert!(std::fs::read(&image).unwrap().starts_with(b"MAINSTAY RESTORE"), "it could come up");
    }
    let said = user.run(0, &[restore.as_slice(), &["--json"]].concat());
    assert!(said.contains("\"type\":\"files_applied\""), "{said}");
    let undo = said.split("\"undo\":\"").nth(1).unwrap().split('"').next().unwrap();
    assert_eq!(user.read("images", "4999"), "4999");
    assert_eq!(user.read("images", "edited"), "newer");
    user.run(0, &[IN_PLACE.as_slice(), &[&format!("web@{undo}")]].concat());
    assert!(std::fs::read(&image).unwrap() == present, "it is not taken back to before the first of them");
}

/// Waits until something is so.
fn wait(mut until: impl FnMut() -> bool) {
    for _ in 0..12000 {
        if until() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("waited for a minute");
}

/// Killed in the middle, it leaves no mount and no loop device, and the next run nothing at all.
#[test]
fn what_is_killed_while_files_are_put_on_the_disks_leaves_nothing_behind() {
    if !is_root() {
        return;
    }
    let user = User::with_points(5000);
    let mut running = user.command(&["vm", "restore", "web", "--to", "killed"]).spawn().unwrap();
    wait(|| has_loop(&user.at("killed")));
    running.kill().unwrap();
    assert_eq!(running.wait().unwrap().code(), None, "it was done before it was killed");
    wait(|| !has_loop(&user.at("killed")));
    assert_eq!(user.places(), 1);
    user.run(0, &["vm", "restore", "web", "--to", "again"]);
    assert_eq!(user.places(), 0);
    assert_eq!(user.read("again", "4999"), "4999");
}
