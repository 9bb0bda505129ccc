//! A plan to begin with, for the machines that a repository has points of.

use std::fmt::Write as _;

use mainstay_core::Result;
use mainstay_repository::{PointInfo, Repository};
use mainstay_workloads::vm::{KIND, Machine};

use super::super::in_place::takes_back;
use super::machine::whole_machine;

const HEAD: &str = r#"# A recovery plan: which machines come back where, in which order and shape.
#   mainstay vm recover plan.toml --dry-run     shows what would happen
#   mainstay vm recover plan.toml               does it, and goes on where it was interrupted
version = 1

# A libvirt URI, or dir:DIRECTORY for plain QEMU: then `directory` is that directory.
host = "qemu:///system"
# Each machine gets a directory of its name below it.
directory = "/var/lib/libvirt/images/recovered"
# qcow2 or raw.
format = "qcow2"

# What interfaces were plugged into, and what they shall be plugged into: network:NAME, bridge:NAME, direct:DEVICE,
# user, or none, which takes the interface away. "*" is whatever is not named. A machine can have a table of its own.
[networks]
"#;

/// A plan with every machine of the repository as it was captured last, its choices in comments.
///
/// Errors: those of the repository; a point that cannot be read is left out, in a comment.
pub fn example(repository: &Repository) -> Result<String> {
    let points = repository.points()?;
    let mut newest: Vec<&PointInfo> = Vec::new();
    for point in points.iter().rev() {
        if point.workload.kind.0 == KIND
            && !takes_back(point)
            && newest.iter().all(|known| known.workload.id != point.workload.id)
        {
            newest.push(point);
        }
    }
    newest.sort_by(|one, other| one.workload.name.cmp(&other.workload.name));
    let (mut networks, mut machines): (Vec<String>, String) = (Vec::new(), String::new());
    for point in newest {
        let name = &point.workload.name;
        match repository.read(&point.id).and_then(|reader| whole_machine(&reader)) {
            Ok(machine) => {
                let plugged = machine.interfaces.iter().filter_map(|interface| interface.network.clone());
                networks.extend(plugged);
                machines.push_str(&section(name, &machine));
            }
            Err(error) => {
                let why = error.chain().join(": ").replace(char::is_control, " ");
                let _cannot_fail = writeln!(machines, "\n# {} cannot be read: {why}", quoted(name));
            }
        }
    }
    networks.sort();
    networks.dedup();
    let mut text = HEAD.to_owned();
    for network in networks {
        let _cannot_fail = writeln!(text, "#{} = {}", quoted(&network), quoted(&network));
    }
    Ok(text + &machines)
}

fn section(workload: &str, machine: &Machine) -> String {
    let mebibytes = machine.memory.unwrap_or(1 << 30) >> 20;
    let disks: Vec<String> = machine.disks.iter().map(|disk| quoted(&disk.name)).collect();
    let sizes = machine.disks.iter().map(|disk| {
        format!("{} = \"{} MiB\"", quoted(&disk.name), disk.size.unwrap_or_default().div_ceil(1 << 20).max(1))
    });
    let sizes: Vec<String> = sizes.collect();
    let bus = machine.disks.iter().find_map(|disk| disk.bus.clone()).unwrap_or_else(|| "virtio".into());
    format!(
        "
[[machine]]
point = {}
name = {}
# Machines of this plan that must be there first.
#after = []
# \"same\" keeps its UUID and MAC addresses; only where the first one is gone.
identity = \"new\"
#cpus = {}
#memory = \"{mebibytes} MiB\"
#cpu = \"host-model\"
#bus = {}
# A part of its disks, and other sizes for them; a smaller one must still hold its partitions.
#disks = [{}]
#sizes = {{ {} }}
#networks = {{ \"*\" = \"none\" }}
# Leave away what was backed up of its files since the image.
#image_only = true
start = true
# What the next machines wait for: agent, nothing, or a time; and the longest wait.
wait = {}
limit = \"10m\"
# Lines for the guest's shell that must end well.
#checks = [\"systemctl is-system-running\"]
",
        quoted(&format!("{workload}@latest")),
        quoted(&machine.name.replace('/', "_")),
        machine.cpus.unwrap_or(1),
        quoted(&bus),
        disks.join(", "),
        sizes.join(", "),
        quoted(if machine.agent { "agent" } else { "30s" }),
    )
}

/// A string of TOML.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for letter in text.chars() {
        match letter {
            '"' | '\\' => quoted.extend(['\\', letter]),
            letter if letter.is_control() => {
                let _cannot_fail = write!(quoted, "\\u{:04X}", u32::from(letter));
            }
            letter => quoted.push(letter),
        }
    }
    quoted + "\""
}
