//! A libvirt of the benchmark's own, with machines that do nothing until they are told to write.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::shell;

pub(super) struct Host {
    directory: PathBuf,
    daemon: Child,
}

impl Host {
    /// Asks for root.
    pub(super) fn start(directory: &Path) -> Result<Self> {
        std::fs::create_dir_all(directory)?;
        let script = shell::root().join("crates/testkit/guest/libvirt.sh");
        let mut unshare =
            shell::command("unshare", ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh"]);
        unshare.arg(script).arg(directory).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let daemon = unshare.spawn().context("cannot start libvirt")?;
        let host = Self { directory: directory.to_owned(), daemon };
        for _ in 0..600 {
            if shell::succeeds(&mut host.virsh(&["version"])) {
                return Ok(host);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        bail!("libvirt does not answer")
    }

    pub(super) fn uri(&self) -> String {
        format!("qemu:///system?socket={}/run/libvirt/libvirt-sock", self.directory.display())
    }

    fn virsh(&self, words: &[&str]) -> std::process::Command {
        let uri = self.uri();
        let mut virsh = shell::command("virsh", ["-q", "-c", &uri]);
        virsh.args(words).stdout(Stdio::null()).stderr(Stdio::null());
        virsh
    }

    fn order(&self, words: &[&str]) -> Result<()> {
        let done = shell::output(self.virsh(words).stdout(Stdio::piped()).stderr(Stdio::piped()))?;
        let (said, errors) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        if !done.status.success() || said.contains("rror") {
            bail!("virsh {words:?}: {said}{errors}");
        }
        Ok(())
    }

    /// Defines a machine with this disk and starts it, its processors at rest.
    pub(super) fn machine(&self, name: &str, disk: &Path) -> Result<()> {
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu><os><type arch='x86_64' \
             machine='q35'>hvm</type></os><devices><disk type='file' device='disk'><driver name='qemu' type='qcow2' \
             discard='unmap'/><source file='{}'/><target dev='vda' bus='virtio'/></disk><memballoon model='none'/></devices>\
             </domain>",
            disk.display()
        );
        let path = self.directory.join("domain.xml");
        std::fs::write(&path, xml)?;
        self.order(&["define", super::text(&path)?])?;
        self.order(&["start", name, "--paused"])
    }

    /// Writes this file to the disk at that offset, as the guest would.
    pub(super) fn write(&self, name: &str, offset: u64, file: &Path, length: u64) -> Result<()> {
        let line = format!(
            "qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend \"write -s {} {offset} {length}\"",
            file.display()
        );
        self.order(&["qemu-monitor-command", name, "--hmp", &line])
    }

    /// Takes the machine away again.
    pub(super) fn forget(&self, name: &str) -> Result<()> {
        self.order(&["destroy", name])?;
        self.order(&["undefine", name, "--checkpoints-metadata"])
    }

    /// The processor time that the emulator of a machine and libvirt have taken so far.
    pub(super) fn processor(&self, name: &str) -> Duration {
        let (guest, daemon) = (format!("guest={name},"), format!("--config\0{}", self.directory.display()));
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let numbers = processes.filter_map(|process| process.file_name().to_str()?.parse::<u32>().ok());
        let mine = |number: &u32| {
            let line = std::fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            line.contains(&daemon) || line.contains(&guest) && line.contains("qemu-system")
        };
        numbers.filter(mine).map(ticks).sum()
    }
}

/// User and system time of a process.
pub(super) fn ticks(number: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ');
    let ticks: u64 = fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    // Linux counts in hundredths of a second wherever programs can see it.
    Duration::from_millis(ticks * 10)
}

impl Drop for Host {
    fn drop(&mut self) {
        // Whatever it has started ends with it.
        let _gone = self.daemon.kill();
        let _ended = self.daemon.wait();
    }
}
