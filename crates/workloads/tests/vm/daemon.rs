//! `qemu-storage-daemon` plays the machine: it has a monitor and a block layer, and the guest is a writable NBD export.
//! A model of what the guest wrote tells what must be on its disks.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Blocks, ChangeState, Extent, ExtentKind, Id16};
use mainstay_nbd::{Address, Client, Remote, WritableBlocks as _};
use mainstay_testkit::{Rng, ScriptedClock};
use mainstay_workloads::vm::{
    DiskMode, Hypervisor, MachineId, MachineSnapshot, Marks, Owner, QemuHost, QemuMachine, SnapshotRequest,
};

use rustix::process::{Pid, Signal, kill_process};

pub(crate) const OWNER: Owner = Owner { repository: Id16([1; 16]), workload: Id16([2; 16]) };

/// A disk of the machine and its model.
pub(crate) struct Disk {
    pub(crate) name: &'static str,
    pub(crate) format: &'static str,
    pub(crate) model: Vec<u8>,
    guest: Option<Guest>,
}

/// How the guest gets at a disk.
enum Guest {
    Export(Box<Remote>),
    /// A device of an emulator, whose guest does nothing; the monitor at this path writes for it.
    Device(PathBuf),
}

pub(crate) struct Daemon {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) disks: Vec<Disk>,
    pub(crate) process: Option<Child>,
    emulated: bool,
}

impl Daemon {
    /// An emulator with real devices in the place of the daemon.
    pub(crate) fn emulator(disks: &[(&'static str, &'static str, usize)]) -> Self {
        Self::with(disks, true)
    }

    pub(crate) fn new(disks: &[(&'static str, &'static str, usize)]) -> Self {
        Self::with(disks, false)
    }

    fn with(disks: &[(&'static str, &'static str, usize)], emulated: bool) -> Self {
        let mut daemon =
            Self { directory: tempfile::tempdir().unwrap(), disks: Vec::new(), process: None, emulated };
        for (name, format, size) in disks {
            daemon.add_disk(name, format, *size);
        }
        daemon.start();
        daemon
    }

    pub(crate) fn add_disk(&mut self, name: &'static str, format: &'static str, size: usize) {
        let path = self.path(name);
        let (format, options) = if format == "qcow2-0.10" { ("qcow2", "compat=0.10") } else { (format, "") };
        let options = if options.is_empty() { vec![] } else { vec!["-o", options] };
        let size_text = size.to_string();
        run(
            "qemu-img",
            &[&["create", "-q", "-f", format], &options[..], &[path.to_str().unwrap(), &size_text]].concat(),
        );
        self.disks.push(Disk { name, format, model: vec![0; size], guest: None });
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts the daemon, and connects the guest to its disks.
    #[expect(clippy::disallowed_methods, reason = "the daemon is to be killed, stopped and started at will")]
    pub(crate) fn start(&mut self) {
        if self.emulated {
            return self.start_emulator();
        }
        let (monitor, server) = (self.path("monitor"), self.path("server"));
        let mut command = Command::new("qemu-storage-daemon");
        command.arg("--chardev").arg(format!("socket,path={},server=on,wait=off,id=c", monitor.display()));
        command.args(["--monitor", "chardev=c", "--nbd-server"]);
        command.arg(format!("addr.type=unix,addr.path={},max-connections=100", server.display()));
        for disk in &self.disks {
            let path = self.path(disk.name);
            command.arg("--blockdev").arg(format!(
                "driver={},node-name={},discard=unmap,file.driver=file,file.filename={},file.discard=unmap,cache.no-flush=on",
                disk.format.trim_end_matches("-0.10"),
                disk.name,
                path.display()
            ));
            command
                .arg("--export")
                .arg(format!("type=nbd,id=guest-{0},node-name={0},name={0},writable=on", disk.name));
        }
        let process = command.stdin(Stdio::null()).spawn();
        self.process = Some(process.expect("qemu-storage-daemon is there: cargo xtask setup"));
        wait_for(|| UnixStream::connect(&server).is_ok());
        for disk in &mut self.disks {
            disk.guest = Some(Guest::Export(Box::new(guest(&server, disk.name))));
        }
    }

    #[expect(clippy::disallowed_methods, reason = "the emulator is to be killed and started at will")]
    fn start_emulator(&mut self) {
        let mut command = Command::new("qemu-system-x86_64");
        command.args("-nodefaults -no-user-config -display none -machine q35,accel=tcg -m 32".split(' '));
        for socket in ["monitor", "writes"] {
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", self.path(socket).display()));
        }
        for disk in &self.disks {
            let (name, format, path) =
                (disk.name, disk.format.trim_end_matches("-0.10"), self.path(disk.name));
            command.arg("-blockdev").arg(format!(
                "driver={format},node-name=node-{name},discard=unmap,file.driver=file,file.filename={},cache.no-flush=on",
                path.display()
            ));
            command.arg("-device").arg(format!("virtio-blk-pci,drive=node-{name},id={name}"));
        }
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        self.process = Some(process.expect("qemu-system-x86_64 is there: cargo xtask setup"));
        wait_for(|| UnixStream::connect(self.path("writes")).is_ok());
        for disk in &mut self.disks {
            disk.guest = Some(Guest::Device(self.directory.path().join("writes")));
        }
    }

    /// The machine is shut down in order.
    pub(crate) fn stop(&mut self) {
        self.disks.iter_mut().for_each(|disk| drop(disk.guest.take()));
        self.signal(Signal::TERM);
        self.process.take().unwrap().wait().unwrap();
    }

    pub(crate) fn kill(&mut self) {
        for disk in &self.disks {
            match disk.guest.as_ref().unwrap() {
                Guest::Export(guest) => guest.flush().unwrap(),
                Guest::Device(monitor) => order(monitor, disk.name, "flush"),
            }
        }
        let mut process = self.process.take().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
        for stale in ["monitor", "server", "writes"] {
            let _absent = std::fs::remove_file(self.path(stale));
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(self.process.as_ref().unwrap())
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// What a guest does: writes and trims of any size anywhere.
    pub(crate) fn scribble(&mut self, rng: &mut Rng, times: usize) {
        for _ in 0..times {
            let disk = rng.below(self.disks.len());
            let size = self.disks[disk].model.len() as u64;
            let offset = rng.range(0..size / 512) * 512;
            let length = (rng.range(1..129) * 512).min(size - offset);
            if rng.chance(20) {
                self.trim(disk, offset, length);
            } else {
                let bytes = rng.bytes(length as usize);
                self.write(disk, offset, &bytes);
            }
        }
    }

    pub(crate) fn write(&mut self, disk: usize, offset: u64, bytes: &[u8]) {
        let disk = &mut self.disks[disk];
        let part = &mut disk.model[offset as usize..][..bytes.len()];
        match disk.guest.as_ref().unwrap() {
            Guest::Export(guest) => {
                guest.write_at(offset, bytes).unwrap();
                part.copy_from_slice(bytes);
            }
            Guest::Device(monitor) => {
                let (pattern, length) = (bytes[0], bytes.len());
                order(monitor, disk.name, &format!("write -P {pattern} {offset} {length}"));
                part.fill(pattern);
            }
        }
    }

    fn trim(&mut self, disk: usize, offset: u64, length: u64) {
        let disk = &mut self.disks[disk];
        let part = &mut disk.model[offset as usize..][..length as usize];
        match disk.guest.as_ref().unwrap() {
            Guest::Export(guest) => {
                guest.trim(offset..offset + length).unwrap();
                // A trim is advice: what is there now is what the guest sees.
                guest.read_at(offset, part).unwrap();
            }
            Guest::Device(monitor) => {
                order(monitor, disk.name, &format!("write -z -u {offset} {length}"));
                part.fill(0);
            }
        }
    }

    /// Another connection of the guest's to a disk.
    pub(crate) fn connect(&self, disk: &str) -> Remote {
        guest(&self.path("server"), disk)
    }

    pub(crate) fn machine(&self) -> QemuMachine {
        QemuMachine {
            name: "daemon".into(),
            named: true,
            monitor: self.path("monitor").into(),
            agent: None,
            server: (!self.emulated).then(|| self.path("server")),
            link: None,
        }
    }

    pub(crate) fn host(&self) -> QemuHost {
        host_of(self.machine(), self.scratch())
    }

    pub(crate) fn scratch(&self) -> PathBuf {
        let scratch = self.path("scratch");
        std::fs::create_dir_all(&scratch).unwrap();
        scratch
    }

    pub(crate) fn snapshot(
        &self,
        request: &SnapshotRequest,
    ) -> mainstay_core::Result<Box<dyn MachineSnapshot>> {
        self.host().snapshot(&id(), request)
    }

    pub(crate) fn models(&self) -> Vec<Vec<u8>> {
        self.disks.iter().map(|disk| disk.model.clone()).collect()
    }

    /// Everything of ours that is in the daemon.
    pub(crate) fn remains(&self) -> Vec<String> {
        let mut monitor = Monitor::connect(&self.path("monitor"));
        let mut found = Vec::new();
        for (question, key) in
            [("query-block-exports", "id"), ("query-jobs", "id"), ("query-named-block-nodes", "node-name")]
        {
            let answer = monitor.ask(question, serde_json::json!({}));
            let names = answer.as_array().unwrap().iter().map(|one| one[key].as_str().unwrap().to_owned());
            found.extend(names.filter(|name| name.starts_with("mainstay")));
        }
        found
    }

    /// The names of the bitmaps on a disk.
    pub(crate) fn bitmaps(&self, disk: &str) -> Vec<String> {
        let mut monitor = Monitor::connect(&self.path("monitor"));
        let nodes = monitor.ask("query-named-block-nodes", serde_json::json!({}));
        let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == disk).unwrap().clone();
        let bitmaps = node["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
        bitmaps.iter().map(|bitmap| bitmap["name"].as_str().unwrap().to_owned()).collect()
    }

    /// What each device of the emulator uses.
    pub(crate) fn drivers(&self) -> Vec<String> {
        let devices = Monitor::connect(&self.path("writes")).ask("query-block", serde_json::json!({}));
        let devices = devices.as_array().unwrap().iter();
        devices.map(|device| device["inserted"]["drv"].as_str().unwrap().to_owned()).collect()
    }

    pub(crate) fn run(&self, command: &str, arguments: serde_json::Value) {
        Monitor::connect(&self.path("monitor")).ask(command, arguments);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _gone = process.kill();
            let _ended = process.wait();
        }
    }
}

pub(crate) fn host_of(machine: QemuMachine, scratch: PathBuf) -> QemuHost {
    QemuHost::new(vec![machine], scratch, Arc::new(ScriptedClock::default()))
}

/// Has the emulator do what its guest would have a device do.
fn order(monitor: &Path, device: &str, what: &str) {
    let line = format!("qemu-io -d /machine/peripheral/{device}/virtio-backend \"{what}\"");
    let said =
        Monitor::connect(monitor).ask("human-monitor-command", serde_json::json!({ "command-line": line }));
    assert!(!said.as_str().unwrap().contains("rror"), "{line}: {said}");
}

fn guest(server: &Path, disk: &str) -> Remote {
    Client::new(Address::Unix(server.into()), disk).connections(1).blocks(None).unwrap()
}

pub(crate) fn id() -> MachineId {
    MachineId("daemon".into())
}

pub(crate) fn request(rng: &mut Rng, since: Option<&Marks>) -> SnapshotRequest {
    let mut run = Id16::default();
    rng.fill(&mut run.0);
    SnapshotRequest { since: since.cloned(), ..SnapshotRequest::new(OWNER, run) }
}

/// Brings `disks` to what the snapshot holds, reading only what must be read: what a restore would give.
pub(crate) fn capture(snapshot: &dyn MachineSnapshot, disks: &mut Vec<Vec<u8>>) -> mainstay_core::Result<()> {
    disks.resize(snapshot.disks().len(), Vec::new());
    for (index, disk) in disks.iter_mut().enumerate() {
        let shown = &snapshot.disks()[index];
        let blocks = snapshot.open(index)?;
        assert_eq!(blocks.size(), shown.size);
        if shown.mode != DiskMode::Incremental {
            disk.clear();
        }
        disk.resize(shown.size as usize, 0xee);
        for extent in blocks.extents(0..shown.size)? {
            assert_eq!(shown.mode == DiskMode::Incremental, extent.change != ChangeState::Unknown);
            if extent.change != ChangeState::Unchanged {
                take_over(blocks.as_ref(), &extent, disk)?;
            }
        }
    }
    Ok(())
}

/// Everything that the disk at this place holds, whatever has changed.
pub(crate) fn whole(snapshot: &dyn MachineSnapshot, disk: usize) -> Vec<u8> {
    let blocks = snapshot.open(disk).unwrap();
    let mut bytes = vec![0xee; blocks.size() as usize];
    for extent in blocks.extents(0..blocks.size()).unwrap() {
        take_over(blocks.as_ref(), &extent, &mut bytes).unwrap();
    }
    bytes
}

fn take_over(blocks: &dyn Blocks, extent: &Extent, disk: &mut [u8]) -> mainstay_core::Result<()> {
    let part = &mut disk[extent.range.start as usize..extent.range.end as usize];
    if extent.kind == ExtentKind::Data {
        return blocks.read_at(extent.range.start, part);
    }
    part.fill(0);
    Ok(())
}

pub(crate) fn modes(snapshot: &dyn MachineSnapshot) -> Vec<String> {
    let told = |mode: &DiskMode| match mode {
        DiskMode::Scan { why } => format!("scan: {why}"),
        other => other.name().into(),
    };
    snapshot.disks().iter().map(|disk| told(&disk.mode)).collect()
}

/// A monitor connection of the test's own.
pub(crate) struct Monitor(std::io::BufReader<UnixStream>);

impl Monitor {
    pub(crate) fn connect(path: &Path) -> Self {
        let mut monitor = Self(std::io::BufReader::new(UnixStream::connect(path).unwrap()));
        monitor.line();
        monitor.ask("qmp_capabilities", serde_json::json!({}));
        monitor
    }

    fn line(&mut self) -> serde_json::Value {
        use std::io::BufRead as _;
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    pub(crate) fn ask(&mut self, command: &str, arguments: serde_json::Value) -> serde_json::Value {
        use std::io::Write as _;
        let message = serde_json::json!({ "execute": command, "arguments": arguments });
        writeln!(self.0.get_mut(), "{message}").unwrap();
        loop {
            let mut answer = self.line();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if answer.get("return").is_some() {
                return answer["return"].take();
            }
        }
    }
}

#[track_caller]
pub(crate) fn wait_for(mut met: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if met() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("what was waited for never came");
}

pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let program = mainstay_workloads::process::Program::new(program, Duration::from_secs(60));
    let output = program.arguments(arguments).run_well().expect("qemu-utils is there: cargo xtask setup");
    String::from_utf8(output).unwrap()
}
