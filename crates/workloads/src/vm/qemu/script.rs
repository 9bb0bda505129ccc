//! A machine as a directory that plain QEMU runs: its disks, and a shell script that starts it. Options are those of
//! `qemu-system-x86_64(1)`.

use std::fmt::Write as _;
use std::path::Path;

use mainstay_core::{Code, Error, Result};
use serde_json::json;

use super::emulator::{device, firmware, kvm_works};
use crate::vm::hypervisor::DiskPlace;
use crate::vm::machine::{Firmware, Interface, Machine};

/// The name of the script in the directory of its machine.
pub(in crate::vm) const SCRIPT: &str = "start";
/// Its sockets there.
pub(in crate::vm) const MONITOR: &str = "qmp";
pub(in crate::vm) const AGENT: &str = "agent";

/// The line by which a script is known as ours.
const HEAD: &str = "# Written by Mainstay when it brought this machine back; yours to change.";

/// Bytes.
const MEMORY: u64 = 1 << 30;

/// Whether a script was written by us.
pub(in crate::vm) fn is_ours(script: &str) -> bool {
    script.lines().any(|line| line == HEAD)
}

/// The script that starts `machine` in `directory`, where its disks are.
///
/// Errors: [`Code::Unsupported`] for firmware or a kernel that is not here, or a processor that is no word.
pub(in crate::vm) fn script(machine: &Machine, places: &[DiskPlace], directory: &Path) -> Result<String> {
    let architecture = machine.architecture.as_deref().unwrap_or("x86_64");
    if !architecture.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        let what = format!("{architecture:?} is no processor that QEMU has");
        return Err(Error::new(Code::Unsupported, what));
    }
    let (accelerator, processor) = match architecture {
        "x86_64" if kvm_works(directory) => ("kvm", "host"),
        "x86_64" => ("tcg", "qemu64"),
        _ => ("tcg", "max"),
    };
    let mut script = format!(
        "#!/bin/sh\n{HEAD}\n# Runs the machine until it is shut down. What is added to the command line goes to QEMU: \
         ./start -daemonize\n# The files here: {MONITOR} is its monitor, {AGENT} its guest agent, console what it prints on \
         its first serial line.\nset -eu\numask 077\ncd \"$(dirname \"$0\")\"\nexec 9>lock\n\
         flock -n 9 || {{ echo 'the machine runs already' >&2; exit 1; }}\n\
         # ACCEL=kvm CPU=host is fastest, where the processor can; ACCEL=tcg CPU={processor} runs everywhere.\n\
         exec qemu-system-{architecture} \\\n  -accel \"${{ACCEL:-{accelerator}}}\" -cpu \"${{CPU:-{processor}}}\" \\\n"
    );
    let mut add = |option: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(script, "  {option} {} \\", quoted(&value));
    };
    words(machine, places, directory, &mut add)?;
    script.push_str("  -nodefaults -no-user-config -no-reboot -display none \"$@\"\n");
    Ok(script)
}

fn words(
    machine: &Machine,
    places: &[DiskPlace],
    directory: &Path,
    add: &mut impl FnMut(&str, String),
) -> Result<()> {
    add("-name", format!("guest={}", machine.name.replace(',', ",,")));
    if is_uuid(&machine.id.0) {
        add("-uuid", machine.id.0.clone());
    }
    add("-machine", board(machine));
    add("-m", (machine.memory.unwrap_or(MEMORY) >> 20).max(64).to_string());
    add("-smp", machine.cpus.unwrap_or(1).to_string());
    add("-vga", "std".into());
    add("-serial", "file:console".into());
    add("-chardev", format!("socket,id=qmp,path={MONITOR},server=on,wait=off"));
    add("-mon", "chardev=qmp,mode=control".into());
    add("-device", "virtio-serial-pci".into());
    add("-chardev", format!("socket,id=agent,path={AGENT},server=on,wait=off"));
    add("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0".into());
    firmware(&machine.firmware, add)?;
    if let Firmware::Uefi { nvram: Some(path), .. } = &machine.firmware {
        let path = relative(Path::new(path), directory).replace(',', ",,");
        add("-drive", format!("if=pflash,format=raw,file={path}"));
    }
    if machine.disks.iter().any(|disk| disk.bus.as_deref() == Some("scsi")) {
        add("-device", "virtio-scsi-pci,id=scsi".into());
    }
    let mut disks: Vec<_> = machine.disks.iter().collect();
    disks.sort_by_key(|disk| disk.boot_order.unwrap_or(u32::MAX));
    for (number, disk) in disks.into_iter().enumerate() {
        let place = places.iter().find(|place| place.name == disk.name);
        let place = place.ok_or_else(|| Error::bug(format!("no place for the disk {}", disk.name)))?;
        let file =
            json!({ "driver": "file", "filename": relative(&place.path, directory), "discard": "unmap" });
        let node = json!({ "driver": place.format, "node-name": format!("disk{number}"), "file": file,
            "discard": "unmap" });
        add("-blockdev", node.to_string());
        let kind = device(disk.bus.as_deref());
        add(
            "-device",
            format!("{kind},drive=disk{number},id=dev{number},serial=disk{number},bootindex={number}"),
        );
    }
    for (number, interface) in machine.interfaces.iter().enumerate() {
        card(number, interface, add);
    }
    Ok(())
}

/// An interface. What it is plugged into is another vendor's word more often than not, and then it is plugged into
/// nothing: a machine must not reach a network that nobody has chosen for it.
fn card(number: usize, interface: &Interface, add: &mut impl FnMut(&str, String)) {
    let network = interface.network.as_deref().unwrap_or("none");
    let (kind, name) = network.split_once(':').unwrap_or((network, ""));
    let model = match interface.model.as_deref().unwrap_or("virtio") {
        "virtio" => "virtio-net-pci",
        other => other,
    };
    let mac =
        interface.mac.as_deref().map(|mac| format!(",mac={}", mac.replace(',', ",,"))).unwrap_or_default();
    let model = model.replace(',', ",,");
    match kind {
        "none" => return,
        "user" => add("-netdev", format!("user,id=net{number}")),
        "bridge" => add("-netdev", format!("bridge,id=net{number},br={}", name.replace(',', ",,"))),
        _ => return add("-device", format!("{model}{mac}")),
    }
    add("-device", format!("{model},netdev=net{number}{mac}"));
}

/// Versions of boards differ between releases of QEMU; their newest runs the same guests.
fn board(machine: &Machine) -> String {
    let aarch64 = machine.architecture.as_deref() == Some("aarch64");
    let board = machine.board.as_deref().unwrap_or(if aarch64 { "virt" } else { "q35" });
    let newest = [("pc-q35", "q35"), ("pc-i440fx", "pc"), ("virt-", "virt")];
    let newest = newest.into_iter().find(|(versioned, _)| board.starts_with(versioned));
    newest.map_or(board, |(_, newest)| newest).replace(',', ",,")
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36 && text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
}

/// So that the directory can be moved.
fn relative(path: &Path, directory: &Path) -> String {
    path.strip_prefix(directory).unwrap_or(path).to_string_lossy().into_owned()
}

/// One word for the shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::hypervisor::MachineId;
    use crate::vm::machine::MachineDisk;

    #[test]
    fn a_script_says_what_the_machine_is_and_hostile_words_stay_words() {
        let evil = "x'; touch /tmp/evil; '$(reboot)`,drive=y";
        let mut machine = Machine::new(MachineId("1b2c3d4e-0000-4000-8000-000000000001".into()), evil);
        (machine.cpus, machine.memory, machine.board) = (Some(3), Some(512 << 20), Some("pc-q35-9.2".into()));
        machine.disks = vec![MachineDisk {
            name: "vda".into(),
            bus: Some("scsi".into()),
            format: "raw".into(),
            serial: None,
            boot_order: None,
            size: None,
            source: String::new(),
            read_only: false,
        }];
        let card = |network: &str| Interface {
            mac: Some("52:54:00:00:00:01".into()),
            model: Some(evil.into()),
            network: Some(network.into()),
        };
        machine.interfaces = ["user", "none", "network:default", evil].map(card).into();
        let directory = tempfile::tempdir().unwrap();
        let place = DiskPlace {
            name: "vda".into(),
            path: directory.path().join("vda.qcow2"),
            format: "qcow2".into(),
        };
        let text = script(&machine, &[place], directory.path()).unwrap();
        for there in [
            "-machine 'q35'",
            "-m '512'",
            "-smp '3'",
            "\"filename\":\"vda.qcow2\"",
            "scsi-hd,bus=scsi.0,drive=disk0",
            "-netdev 'user,id=net0'",
        ] {
            assert!(text.contains(there), "{there}: {text}");
        }
        assert!(!text.contains("net1") && !text.contains("net2"), "{text}");
        assert!(text.contains("guest=x'\\''; touch /tmp/evil; '\\''$(reboot)`,,drive=y'"), "{text}");
        machine.architecture = Some("../../sh".into());
        assert_eq!(script(&machine, &[], directory.path()).unwrap_err().code(), Code::Unsupported);
    }
}
