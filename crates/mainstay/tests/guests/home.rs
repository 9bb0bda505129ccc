//! The program as an administrator of a host uses it.

use std::path::{Path, PathBuf};
use std::process::Command;

use mainstay_testkit::at_home;
use mainstay_testkit::lab::{Guest, GuestImage};
use serde_json::Value;

/// A home with a repository that a generated key opens.
pub(crate) struct Home {
    directory: tempfile::TempDir,
}

impl Home {
    pub(crate) fn new() -> Self {
        // Short, because the paths of sockets are.
        let home = Self { directory: tempfile::Builder::new().prefix("ms-").tempdir().unwrap() };
        std::fs::create_dir(home.at("tmp")).unwrap();
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

    /// Another program, as whoever lives here runs it; `mainstay` may lie in the home itself.
    pub(crate) fn plain(&self, program: &str) -> Command {
        let mut command = at_home(program, self.directory.path());
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", self.directory.path().display());
        command.env("PATH", path).env("TMPDIR", self.at("tmp")).current_dir(self.directory.path());
        command
    }

    /// Runs it to its end, which must be a good one; its lines of JSON.
    #[track_caller]
    pub(crate) fn run(&self, words: &[&str]) -> Vec<Value> {
        let output = self.command(words).output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{words:?}: {:?}\n{out}{err}", output.status);
        out.lines()
            .filter(|line| line.starts_with('{'))
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// Takes a point of a machine; the line that tells how.
    #[track_caller]
    pub(crate) fn back_up(&self, host: &str, machine: &str, more: &[&str]) -> Value {
        let words = ["vm", "backup", "--host", host, machine];
        let lines = self.run(&[words.as_slice(), more].concat());
        let line = lines.into_iter().find(|line| line["type"] == "machine_captured").unwrap();
        println!("{machine} stood still for {} ms; {}", line["frozen_milliseconds"], modes(&line).join(", "));
        line
    }

    /// Takes a point of the small guest, shut down, as the machine `web`.
    pub(crate) fn back_up_image(&self) {
        let images = self.at("images");
        std::fs::create_dir_all(images.join("web")).unwrap();
        GuestImage::get().unwrap().copy_disk(&images.join("web/vda.qcow2")).unwrap();
        self.run(&["vm", "backup", "--host", &format!("dir:{}", images.display()), "web"]);
    }

    /// Writes the disks of a point to images; where they are.
    #[track_caller]
    pub(crate) fn restore(&self, point: &str) -> [PathBuf; 2] {
        let to = self.at(&format!("restored-{point}"));
        self.run(&["vm", "restore", point, "--to", to.to_str().unwrap()]);
        let mut images: Vec<PathBuf> = files(&to).filter(|path| is_disk(path)).collect();
        images.sort();
        images.try_into().unwrap()
    }
}

fn files(directory: &Path) -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path())
}

/// Descriptions lie beside the disks.
fn is_disk(path: &Path) -> bool {
    path.metadata().unwrap().len() >= 1 << 20
}

pub(crate) fn references(images: &[PathBuf; 2]) -> [&Path; 2] {
    [&images[0], &images[1]]
}

/// How each disk was read.
pub(crate) fn modes(line: &Value) -> Vec<String> {
    let disks = line["disks"].as_array().unwrap();
    disks.iter().map(|disk| disk["mode"].as_str().unwrap().to_owned()).collect()
}

/// A plain QEMU, as `--host` takes it.
pub(crate) fn plain(guest: &Guest) -> String {
    format!("qmp:{},agent={},name=web", guest.monitor_socket().display(), guest.agent_socket().display())
}
