//! Virtual machines through the real binary. `qemu-storage-daemon` plays the machine, whose "guest" writes over NBD; real
//! guests are in the tests of the workload.

#![cfg(test)]
#![expect(clippy::disallowed_methods, reason = "these tests start the program and the tools that judge it")]

use std::path::Path;
use std::process::Command;

use mainstay_testkit::at_home;
use mainstay_testkit::lab::{StorageDaemon, compare};

struct User<'a>(&'a Path);

impl User<'_> {
    fn run(&self, arguments: &[&str]) -> String {
        let mut command = at_home(env!("CARGO_BIN_EXE_mainstay"), self.0);
        let output = command.args(arguments).output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{arguments:?}: {out}\n{err}");
        out.into_owned()
    }
}

fn tool(program: &str, arguments: &[&str]) {
    let output = Command::new(program).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; install it: cargo xtask setup"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_machine_its_increments_its_files_and_its_disk_come_back() {
    let directory = tempfile::tempdir().unwrap();
    let place = |name: &str| directory.path().join(name);
    std::fs::create_dir_all(place("tree/etc")).unwrap();
    std::fs::write(place("tree/etc/motd"), "welcome\n").unwrap();
    std::fs::write(place("tree/big"), mainstay_testkit::Rng::new(1).bytes(3 << 20)).unwrap();
    let (raw, qcow2) = (place("disk.raw"), place("disk.qcow2"));
    let (raw, qcow2) = (raw.to_str().unwrap(), qcow2.to_str().unwrap());
    std::fs::File::create(raw).unwrap().set_len(64 << 20).unwrap();
    tool("mke2fs", &["-q", "-t", "ext4", "-d", place("tree").to_str().unwrap(), raw]);
    tool("qemu-img", &["convert", "-O", "qcow2", raw, qcow2]);

    let mut daemon = StorageDaemon::start(&[Path::new(qcow2)]).unwrap();
    let mut guest = daemon.guest(0).unwrap();
    let host =
        format!("qmp:{},nbd={},name=web", daemon.monitor_socket().display(), daemon.nbd_socket().display());
    let user = User(directory.path());
    let first = user.run(&["vm", "backup", "--host", &host, "web", "--json"]);
    assert!(first.contains("\"mode\":\"full\"") && first.contains("\"consistency\":\"crash\""), "{first}");
    guest.write(20 << 20, &[0x5a; 100_000]).unwrap();
    let second = user.run(&["vm", "backup", "--host", &host, "--all", "--json"]);
    assert!(second.contains("\"mode\":\"incremental\""), "{second}");

    assert_eq!(user.run(&["cat", "web@latest", "/etc/motd"]), "welcome\n");
    let files = place("files");
    user.run(&["restore", "web@latest", "/big", "--to", files.to_str().unwrap()]);
    assert!(std::fs::read(files.join("big")).unwrap() == std::fs::read(place("tree/big")).unwrap());
    let listed = user.run(&["vm", "list", "--host", &host, "--json"]);
    assert!(listed.contains("\"workload\":\"web\""), "{listed}");

    // What the image holds already is not stored again with the files.
    let backup = user.run(&["backup", place("tree").to_str().unwrap(), "--json"]);
    assert!(backup.contains("\"new_bytes\":0,"), "{backup}");

    let target = place("restored");
    user.run(&["vm", "restore", "web@latest", "--to", target.to_str().unwrap()]);
    drop(guest);
    // In order, so that the image holds what was written.
    daemon.quit();
    let mut restored = std::fs::read_dir(target).unwrap().map(|entry| entry.unwrap().path());
    let disk = restored.find(|path| path.extension().is_some_and(|end| end == "raw")).unwrap();
    compare(Path::new(qcow2), &disk).unwrap();
    let target = place("restored-qcow2");
    user.run(&["vm", "restore", "web@latest", "--to", target.to_str().unwrap(), "--format", "qcow2"]);
    let image = target.join(disk.with_extension("qcow2").file_name().unwrap());
    tool("qemu-img", &["check", "-q", image.to_str().unwrap()]);
    compare(Path::new(qcow2), &image).unwrap();
    user.run(&["verify", "--read-data"]);
}
