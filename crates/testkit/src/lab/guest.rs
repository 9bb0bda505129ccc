//! A guest of the test's own: started by QEMU without acceleration, since a processor's own is not to be had everywhere
//! and the device's existence proves nothing.

use std::path::{Path, PathBuf};
use std::time::Duration;

use mainstay_core::Result;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::inside::ask_agent;
use super::process::Daemon;
use super::{GuestImage, Inside, Monitor, PATIENCE, directory, disk, io, patiently};
use crate::rng::say;

/// How disks hang on the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bus {
    #[default]
    Virtio,
    Scsi,
    Nvme,
}

/// A guest about to start.
#[derive(Debug)]
pub struct GuestPlan {
    directory: TempDir,
    image: GuestImage,
    /// Block nodes of QEMU's `-blockdev`, the system disk first.
    nodes: Vec<Value>,
    files: Vec<PathBuf>,
    bus: Bus,
    itself: bool,
    words: Vec<String>,
}

impl GuestPlan {
    /// Without disks; the first one given is the system disk.
    pub fn bare() -> Result<Self> {
        Ok(Self {
            directory: directory("guest")?,
            image: GuestImage::get()?,
            nodes: Vec::new(),
            files: Vec::new(),
            bus: Bus::Virtio,
            itself: false,
            words: Vec::new(),
        })
    }

    /// With a system disk of its own.
    pub fn new() -> Result<Self> {
        let plan = Self::bare()?;
        let disk = plan.directory.path().join("system.qcow2");
        plan.image.copy_disk(&disk)?;
        Ok(plan.disk(&disk))
    }

    /// Adds an image that is there: qcow2 if its name ends so, otherwise raw.
    #[must_use]
    pub fn disk(self, image: &Path) -> Self {
        let format = if image.extension().is_some_and(|name| name == "qcow2") { "qcow2" } else { "raw" };
        let file = json!({ "driver": "file", "filename": image, "discard": "unmap" });
        let mut plan = self.node(json!({ "driver": format, "discard": "unmap", "file": file }));
        plan.files.push(image.to_owned());
        plan
    }

    /// Adds a qcow2 disk with an empty ext4 on the whole of it.
    pub fn data(self, mebibytes: u64) -> Result<Self> {
        let image = self.directory.path().join(format!("data{}.qcow2", self.nodes.len()));
        disk::formatted(&image, mebibytes)?;
        Ok(self.disk(&image))
    }

    /// Adds a disk from any block node; it is named `disk0`, `disk1` and so on by its place.
    #[must_use]
    pub fn node(mut self, mut node: Value) -> Self {
        node["node-name"] = json!(format!("disk{}", self.nodes.len()));
        self.nodes.push(node);
        self
    }

    #[must_use]
    pub fn bus(mut self, bus: Bus) -> Self {
        self.bus = bus;
        self
    }

    /// Lets the machine boot by itself, from the boot loader on its first disk, instead of starting the kernel for it.
    #[must_use]
    pub fn boots_itself(mut self) -> Self {
        self.itself = true;
        self
    }

    /// Adds words to the emulator's command line.
    #[must_use]
    pub fn words<'a>(mut self, words: impl IntoIterator<Item = &'a str>) -> Self {
        self.words.extend(words.into_iter().map(str::to_owned));
        self
    }

    /// Where files for this guest can lie as long as it lives.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Starts the emulator; see [`Inside::wait`] for the guest.
    pub fn start(self) -> Result<Guest> {
        let daemon =
            Daemon::start("qemu-system-x86_64", self.command_line(), &self.directory.path().join("log"))?;
        let Self { directory, files, .. } = self;
        let inside = Inside::new(&directory.path().join("test"));
        let mut guest = Guest { directory, files, daemon, inside };
        guest.wait_for_emulator()?;
        Ok(guest)
    }

    fn command_line(&self) -> Vec<String> {
        let at = |name: &str| self.directory.path().join(name).display().to_string();
        let socket = |name: &str| format!("socket,id={name},path={},server=on,wait=off", at(name));
        let port = |name: &str, port: &str| format!("virtserialport,chardev={name},name={port}");
        let mut words: Vec<String> =
            "-nodefaults -no-user-config -display none -no-reboot -machine q35,accel=tcg \
             -cpu qemu64 -m 384 -smp 1 -device virtio-serial-pci"
                .split_whitespace()
                .map(str::to_owned)
                .collect();
        let mut add = |option: &str, value: String| words.extend([option.to_owned(), value]);
        if !self.itself {
            add("-kernel", self.image.kernel.display().to_string());
            add("-initrd", self.image.initrd.display().to_string());
            add("-append", "console=ttyS0 root=auto rw quiet panic=1".into());
        }
        add("-serial", format!("file:{}", at("console")));
        // One monitor for the product and one for the test: each speaks to one client at a time.
        for name in ["qmp", "qmp-test"] {
            add("-chardev", socket(name));
            add("-mon", format!("chardev={name},mode=control"));
        }
        for (name, kind) in [("agent", "org.qemu.guest_agent.0"), ("test", "org.mainstay.test.0")] {
            add("-chardev", socket(name));
            add("-device", port(name, kind));
        }
        if self.bus == Bus::Scsi {
            add("-device", "virtio-scsi-pci,id=scsi".into());
        }
        for (number, node) in self.nodes.iter().enumerate() {
            add("-blockdev", node.to_string());
            let kind = match self.bus {
                Bus::Virtio => "virtio-blk-pci".to_owned(),
                Bus::Scsi => "scsi-hd,bus=scsi.0".to_owned(),
                Bus::Nvme => "nvme".to_owned(),
            };
            let order = if self.itself { format!(",bootindex={number}") } else { String::new() };
            let names = format!("drive=disk{number},id=dev{number},serial=serial{number}");
            add("-device", format!("{kind},{names}{order}"));
        }
        words.extend(self.words.iter().cloned());
        words
    }
}

/// A running guest. It is killed when the value goes; if the test fails, the console is printed.
#[derive(Debug)]
pub struct Guest {
    directory: TempDir,
    files: Vec<PathBuf>,
    daemon: Daemon,
    inside: Inside,
}

impl Guest {
    /// The image of the disk at this place, for those that are files.
    pub fn disk(&self, place: usize) -> &Path {
        &self.files[place]
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The monitor socket that nobody but the product uses.
    pub fn monitor_socket(&self) -> PathBuf {
        self.directory.path().join("qmp")
    }

    /// The socket of the agent that the product uses.
    pub fn agent_socket(&self) -> PathBuf {
        self.directory.path().join("agent")
    }

    /// The test's own monitor. One at a time.
    pub fn monitor(&self) -> Result<Monitor> {
        Monitor::connect(&self.directory.path().join("qmp-test"))
    }

    /// Asks the agent that the product uses, while the product does not.
    pub fn ask_agent(&self, command: &str, arguments: Value) -> Result<Value> {
        ask_agent(&self.agent_socket(), command, arguments)
    }

    pub fn inside(&self) -> &Inside {
        &self.inside
    }

    /// The emulator's process; 0 when it has ended.
    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// What the guest has printed on its console.
    pub fn console(&self) -> String {
        let text = std::fs::read(self.directory.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// How long the guest's file systems stood still each time, by its own clock.
    pub fn standstills(&self) -> Vec<Duration> {
        standstills(&self.console())
    }

    /// Ends the emulator as a power cut would. The images stay.
    pub fn kill(&mut self) {
        self.daemon.kill();
    }

    /// Presses the power button and waits until the guest has shut down in order.
    pub fn shut_down(&mut self) -> Result<()> {
        self.monitor()?.run("system_powerdown", json!({}))?;
        self.wait_for_end()
    }

    /// Waits until the guest has shut down, whoever asked it to.
    pub fn wait_for_end(&mut self) -> Result<()> {
        let daemon = &mut self.daemon;
        patiently("the guest's end", PATIENCE, || Ok(daemon.has_ended()?.then_some(())))?;
        self.daemon.kill();
        Ok(())
    }

    /// Starts the same machine again, after it has ended.
    pub fn start_again(&mut self) -> Result<()> {
        for socket in ["qmp", "qmp-test", "agent", "test"] {
            let _absent = std::fs::remove_file(self.directory.path().join(socket));
        }
        self.daemon.start_again()?;
        self.wait_for_emulator()
    }

    fn wait_for_emulator(&mut self) -> Result<()> {
        let socket = self.directory.path().join("qmp-test");
        let daemon = &mut self.daemon;
        patiently("the emulator", PATIENCE, || {
            daemon.check()?;
            Ok(socket.exists().then_some(()))
        })?;
        // It may open its monitor and then find something wrong with what it was told.
        self.monitor().map(drop).map_err(|error| error.during(self.daemon.words()))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tell("the guest's console", &self.console());
            tell("the emulator", &self.daemon.words());
        }
    }
}

/// Shows the end of a text beside the failure of a test.
pub(super) fn tell(what: &str, text: &str) {
    let lines: Vec<&str> = text.lines().collect();
    let end = lines.get(lines.len().saturating_sub(60)..).unwrap_or_default();
    say(&format!("--- {what}, its last {} lines\n{}", end.len(), end.join("\n")));
}

pub(super) fn standstills(console: &str) -> Vec<Duration> {
    let (mut since, mut all) = (None, Vec::new());
    for line in console.lines() {
        let Some((_, told)) = line.split_once("FREEZE HOOK ") else { continue };
        let Some((kind, uptime)) = told.trim().split_once(' ') else { continue };
        let Ok(uptime) = uptime.parse::<f64>() else { continue };
        match (kind, since) {
            ("freeze", _) => since = Some(uptime),
            ("thaw", Some(start)) => {
                all.push(Duration::from_secs_f64((uptime - start).max(0.0)));
                since = None;
            }
            _ => {}
        }
    }
    all
}

/// The agents' and monitors' sockets appear a moment after the emulator starts.
pub(super) fn wait_for_file(path: &Path) -> Result<()> {
    patiently(&format!("{}", path.display()), PATIENCE, || {
        path.try_exists().map(|there| there.then_some(())).map_err(io("cannot look for a socket"))
    })
}

#[cfg(test)]
mod tests {
    use super::standstills;
    use std::time::Duration;

    #[test]
    fn standstills_are_read_from_the_console() {
        let console = "boot\r\nFREEZE HOOK freeze 5.25\r\nFREEZE HOOK thaw 5.50\r\nFREEZE HOOK thaw 9\r\nFREEZE HOOK freeze 10\r\n";
        assert_eq!(standstills(console), [Duration::from_millis(250)]);
    }
}
