//! `qemu-storage-daemon` plays a machine, and a writable export of it plays the guest.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use mainstay_nbd::WritableBlocks as _;

use crate::lab::{Daemon, LONG, run};

/// A storage daemon with a disk, an NBD server and a monitor.
pub(crate) struct Machine {
    pub(crate) daemon: Daemon,
    monitor: BufReader<UnixStream>,
}

impl Machine {
    pub(crate) fn start(directory: &Path) -> Self {
        let name = |file: &str| directory.join(file).to_str().unwrap().to_owned();
        for file in ["disk", "scratch"] {
            run("qemu-img", ["create", "-q", "-f", "qcow2", &name(file), "64M"]);
        }
        let node = |node: &str| {
            format!(
                "driver=qcow2,node-name={node},discard=unmap,file.driver=file,file.filename={}",
                name(node)
            )
        };
        let arguments = [
            "--blockdev".to_owned(),
            node("disk"),
            "--chardev".to_owned(),
            format!("socket,id=monitor,server=on,wait=off,path={}", name("monitor.sock")),
            "--monitor".to_owned(),
            "chardev=monitor".to_owned(),
            "--nbd-server".to_owned(),
            format!("addr.type=unix,addr.path={},max-connections=8", name("nbd.sock")),
        ];
        let daemon = Daemon::start("qemu-storage-daemon", arguments, directory.join("nbd.sock"));
        let monitor = UnixStream::connect(directory.join("monitor.sock")).unwrap();
        monitor.set_read_timeout(Some(LONG)).unwrap();
        let mut machine = Self { daemon, monitor: BufReader::new(monitor) };
        let greeting = machine.line();
        assert!(greeting.contains("QMP"), "{greeting}");
        machine.ask("qmp_capabilities", "");
        machine
    }

    /// Waits for an event that has all of these words.
    pub(crate) fn wait_for(&mut self, words: &[&str]) {
        loop {
            let line = self.line();
            if line.contains("\"event\"") && words.iter().all(|word| line.contains(word)) {
                return;
            }
        }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.monitor.read_line(&mut line).unwrap();
        line
    }

    pub(crate) fn ask(&mut self, command: &str, arguments: &str) {
        let line = format!("{{\"execute\": \"{command}\", \"arguments\": {{{arguments}}}}}\n");
        self.monitor.get_mut().write_all(line.as_bytes()).unwrap();
        loop {
            let answer = self.line();
            assert!(!answer.contains("\"error\""), "{command}: {answer}");
            if answer.starts_with("{\"return\"") {
                return;
            }
        }
    }

    pub(crate) fn export(&mut self, node: &str, more: &str) {
        let fixed =
            format!("\"type\": \"nbd\", \"id\": \"{node}\", \"node-name\": \"{node}\", \"name\": \"{node}\"");
        self.ask("block-export-add", &format!("{fixed}, {more}"));
    }

    pub(crate) fn write(&self, node: &str, at: u64, len: u64, byte: u8) {
        let guest = self.daemon.client(node).connections(1).blocks(None).unwrap();
        guest.write_at(at, &vec![byte; usize::try_from(len).unwrap()]).unwrap();
        guest.flush().unwrap();
    }
}
