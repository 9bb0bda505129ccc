//! A plain QEMU that the fuzzer plays.

use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Clock, Id16, Time};
use mainstay_workloads::vm::{Endpoint, Owner, QemuHost, QemuMachine, SnapshotRequest};

use crate::peer::{Listener, Supply, place, speak_json};

const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 0, \"minor\": 0, \"major\": 10}}, \"capabilities\": []}}\n";

/// Says what some commands are answered with.
pub type Honest = fn(&str) -> Option<&'static str>;

/// A machine with its monitor and agent.
pub struct Lab {
    host: QemuHost,
    scratch: std::path::PathBuf,
    // They go after the host has let go of them.
    _monitor: Listener,
    _agent: Listener,
}

impl Lab {
    /// `monitor` and `agent` are the answers of both; `honest` those of the monitor that are given in any case.
    pub fn new(monitor: &Supply, honest: Honest, agent: &Supply) -> Self {
        let (monitor, agent) = (monitor.clone(), agent.clone());
        let monitor =
            Listener::start(place("q"), move |socket| speak_json(socket, &monitor, GREETING, honest));
        let agent = Listener::start(place("a"), move |socket| speak_json(socket, &agent, "", |_| None));
        let machine = QemuMachine {
            name: "web".into(),
            named: true,
            monitor: Endpoint::Unix(monitor.path().to_owned()),
            agent: Some(Endpoint::Unix(agent.path().to_owned())),
            server: None,
            link: None,
        };
        let scratch = place("s");
        std::fs::create_dir(&scratch).expect("a directory");
        let host = QemuHost::new(vec![machine], scratch.clone(), Arc::new(Still));
        Self { host, scratch, _monitor: monitor, _agent: agent }
    }

    pub fn host(&self) -> &QemuHost {
        &self.host
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.scratch));
    }
}

/// What every monitor says before it is asked for anything.
pub fn greeted(command: &str) -> Option<&'static str> {
    (command == "qmp_capabilities").then_some("{}")
}

/// A machine without disks that runs.
pub fn runs(command: &str) -> Option<&'static str> {
    Some(match command {
        "query-uuid" => "{\"UUID\": \"00112233-4455-6677-8899-aabbccddeeff\"}",
        "query-status" => "{\"status\": \"running\"}",
        "query-name" => "{\"name\": \"web\"}",
        "qmp_capabilities" => "{}",
        _ => "[]",
    })
}

/// Everything, with the guest frozen.
pub fn request() -> SnapshotRequest {
    let owner = Owner { repository: Id16([8; 16]), workload: Id16([9; 16]) };
    SnapshotRequest {
        freeze_limit: Duration::from_secs(1),
        trim: true,
        ..SnapshotRequest::new(owner, Id16([7; 16]))
    }
}

/// A clock that stands still.
#[derive(Debug)]
struct Still;

impl Clock for Still {
    fn now(&self) -> Time {
        Time::from_seconds(4_000_000_000)
    }

    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }

    fn sleep(&self, _length: Duration) {}
}
