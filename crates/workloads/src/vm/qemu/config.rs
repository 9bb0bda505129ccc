//! A QEMU's configuration: from its arguments where they can be read, and from its monitor.

use serde_json::{Value, json};

use mainstay_core::{Error, Result};

use super::arguments::describe;
use super::disks::disks;
use super::{QemuMachine, identity, optional};
use crate::vm::channel::clean;
use crate::vm::machine::{Machine, MachineDisk, RawDocument, RawKind};
use crate::vm::qmp::Qmp;

/// Questions whose answers are kept as they are.
const QUESTIONS: [&str; 8] = [
    "query-version",
    "query-name",
    "query-uuid",
    "query-status",
    "query-cpus-fast",
    "query-memory-size-summary",
    "query-block",
    "query-rx-filter",
];

pub(super) fn machine(known: &QemuMachine, qmp: &mut Qmp) -> Result<Machine> {
    let answers: serde_json::Map<String, Value> =
        QUESTIONS.iter().map(|question| ((*question).to_owned(), optional(qmp, question))).collect();
    let peer = qmp.peer().filter(|_| known.link.is_none());
    let arguments = peer.map(|peer| arguments(peer.pid.as_raw_pid())).unwrap_or_default();
    let raw = json!({ "version": 1, "arguments": arguments, "answers": answers });
    let mut machine = Machine::new(identity(known, qmp), name_of(known, qmp));
    let cpus = answers.get("query-cpus-fast").and_then(Value::as_array).map(Vec::len);
    machine.cpus = cpus.and_then(|cpus| u32::try_from(cpus).ok());
    machine.memory =
        answers.get("query-memory-size-summary").and_then(|answer| answer["base-memory"].as_u64());
    machine.agent = known.agent.is_some();
    for disk in disks(qmp)? {
        machine.disks.push(MachineDisk {
            name: disk.name,
            bus: None,
            format: disk.node.drv,
            serial: None,
            boot_order: None,
            size: Some(disk.node.image.virtual_size),
            source: clean(&disk.node.file),
            read_only: false,
        });
    }
    describe(&mut machine, &arguments);
    machine.read_nvram();
    let text = serde_json::to_vec_pretty(&raw);
    let text = text.map_err(|error| Error::bug("cannot write a machine down").because(error))?;
    machine.raw = Some(RawDocument { kind: RawKind::QemuJson, text });
    Ok(machine)
}

pub(super) fn name_of(known: &QemuMachine, qmp: &mut Qmp) -> String {
    let own = if known.named { None } else { optional(qmp, "query-name")["name"].as_str().map(clean) };
    own.unwrap_or_else(|| known.name.clone())
}

/// The arguments of a process, if this user may see them.
fn arguments(pid: i32) -> Vec<String> {
    let text = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = text.split(|&byte| byte == 0).filter(|word| !word.is_empty());
    words.map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}
