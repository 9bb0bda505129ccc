//! QEMU's storage daemon in the role of a machine: the same disks, bitmaps, jobs and monitor, without a guest.

use std::path::{Path, PathBuf};

use mainstay_core::Result;
use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

use super::guest::{tell, wait_for_file};
use super::process::Daemon;
use super::{Monitor, NbdGuest, PATIENCE, directory, disk, patiently};

/// A running storage daemon with block nodes `disk0`, `disk1` and so on. It is killed when the value goes.
#[derive(Debug)]
pub struct StorageDaemon {
    directory: TempDir,
    images: Vec<PathBuf>,
    daemon: Daemon,
}

impl StorageDaemon {
    /// With one empty qcow2 disk of so many MiB.
    pub fn blank(mebibytes: u64) -> Result<Self> {
        let directory = directory("qsd")?;
        let image = directory.path().join("disk.qcow2");
        disk::blank(&image, mebibytes)?;
        Self::begin(directory, &[&image])
    }

    /// With images that are there: qcow2 if the name ends so, otherwise raw.
    pub fn start(images: &[&Path]) -> Result<Self> {
        Self::begin(directory("qsd")?, images)
    }

    fn begin(directory: TempDir, images: &[&Path]) -> Result<Self> {
        let mut words = Vec::new();
        for name in ["qmp", "qmp-test"] {
            let socket = directory.path().join(name);
            words.extend([
                "--chardev".into(),
                format!("socket,id={name},path={},server=on,wait=off", socket.display()),
            ]);
            words.extend(["--monitor".into(), format!("chardev={name}")]);
        }
        for (number, image) in images.iter().enumerate() {
            let format = if image.extension().is_some_and(|name| name == "qcow2") { "qcow2" } else { "raw" };
            let file = json!({ "driver": "file", "filename": image, "discard": "unmap" });
            let name = format!("disk{number}");
            let node = json!({ "driver": format, "node-name": name, "discard": "unmap", "file": file });
            words.extend(["--blockdev".into(), node.to_string()]);
        }
        let daemon = Daemon::start("qemu-storage-daemon", words, &directory.path().join("log"))?;
        let images = images.iter().map(|image| (*image).to_owned()).collect();
        let mut daemon = Self { directory, images, daemon };
        daemon.wait()?;
        Ok(daemon)
    }

    fn wait(&mut self) -> Result<()> {
        let daemon = &mut self.daemon;
        let socket = self.directory.path().join("qmp-test");
        patiently("the storage daemon", PATIENCE, || {
            daemon.check()?;
            Ok(socket.exists().then_some(()))
        })?;
        self.monitor().map(drop)
    }

    /// Where files for this daemon can lie as long as it lives.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn disk(&self, place: usize) -> &Path {
        &self.images[place]
    }

    /// The monitor socket that nobody but the product uses.
    pub fn monitor_socket(&self) -> PathBuf {
        self.directory.path().join("qmp")
    }

    /// The test's own monitor. One at a time.
    pub fn monitor(&self) -> Result<Monitor> {
        Monitor::connect(&self.directory.path().join("qmp-test"))
    }

    /// The socket of the daemon's one NBD server, once [`StorageDaemon::guest`] has started it.
    pub fn nbd_socket(&self) -> PathBuf {
        self.directory.path().join("nbd")
    }

    /// Plays the guest of this disk over NBD. Starts the daemon's NBD server, of which it has one: where the product
    /// starts that itself, play the guest through [`StorageDaemon::guest_file`].
    pub fn guest(&self, place: usize) -> Result<NbdGuest> {
        let socket = self.nbd_socket();
        let mut monitor = self.monitor()?;
        if !socket.exists() {
            let address = json!({ "type": "unix", "data": { "path": socket } });
            monitor.run("nbd-server-start", json!({ "addr": address, "max-connections": 16 }))?;
        }
        let export = format!("guest{place}");
        let listed = monitor.run("query-block-exports", json!({}))?;
        if !listed.as_array().is_some_and(|all| all.iter().any(|one| one["id"] == export.as_str())) {
            let node = format!("disk{place}");
            let wanted =
                json!({ "type": "nbd", "id": export, "node-name": node, "name": export, "writable": true });
            monitor.run("block-export-add", wanted)?;
        }
        NbdGuest::connect(&socket, &export)
    }

    /// Plays the guest of this disk through FUSE: a file, as large as the disk, to write to. Asks for /dev/fuse.
    pub fn guest_file(&self, place: usize) -> Result<PathBuf> {
        let file = self.directory.path().join(format!("guest{place}"));
        std::fs::write(&file, "").map_err(super::io("cannot make a file to mount upon"))?;
        let node = format!("disk{place}");
        let wanted = json!({ "type": "fuse", "id": format!("fuse{place}"), "node-name": node, "mountpoint": file,
            "writable": true, "allow-other": "off" });
        self.monitor()?.run("block-export-add", wanted)?;
        Ok(file)
    }

    /// Its process; 0 when it has ended.
    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// Ends it as a power cut would.
    pub fn kill(&mut self) {
        self.daemon.kill();
        self.clear();
    }

    /// Ends it in order, so that bitmaps are stored.
    pub fn quit(&mut self) {
        self.daemon.end(Signal::TERM);
        self.clear();
    }

    /// Starts the same again, after it has ended.
    pub fn start_again(&mut self) -> Result<()> {
        self.clear();
        self.daemon.start_again()?;
        wait_for_file(&self.monitor_socket())?;
        self.wait()
    }

    fn clear(&self) {
        for socket in ["qmp", "qmp-test", "nbd"] {
            let _absent = std::fs::remove_file(self.directory.path().join(socket));
        }
        // A daemon that was killed leaves its mounts behind.
        for place in 0..self.images.len() {
            let file = self.directory.path().join(format!("guest{place}"));
            if std::fs::metadata(&file).is_err_and(|error| error.kind() != std::io::ErrorKind::NotFound) {
                let _gone = super::process::run_any("umount", ["-l".as_ref(), file.as_os_str()]);
            }
        }
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tell("the storage daemon", &self.daemon.words());
        }
        self.kill();
    }
}
