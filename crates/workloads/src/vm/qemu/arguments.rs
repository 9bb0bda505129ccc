//! What QEMU's arguments say of a machine, as far as the neutral words go. Source: `qemu-system-x86_64(1)`. What is not
//! understood is passed over: the arguments themselves are kept as they are.

use serde_json::Value;

use crate::vm::machine::{Console, Firmware, Interface, Machine, MachineDisk};

/// The options of one argument: `driver,key=value,flag`, or JSON.
struct Options {
    /// What comes before the first comma, if it has no name.
    head: Option<String>,
    pairs: Vec<(String, String)>,
}

impl Options {
    fn of(text: &str) -> Self {
        if let Ok(Value::Object(object)) = serde_json::from_str(text) {
            let text = |value: Value| match value {
                Value::String(text) => text,
                other => other.to_string(),
            };
            let pairs: Vec<(String, String)> =
                object.into_iter().map(|(key, value)| (key, text(value))).collect();
            let head = pairs.iter().find(|(key, _)| matches!(key.as_str(), "driver" | "type"));
            return Self { head: head.map(|(_, value)| value.clone()), pairs };
        }
        let (mut head, mut pairs) = (None, Vec::new());
        for (place, part) in parts(text).into_iter().enumerate() {
            match part.split_once('=') {
                Some((key, value)) => pairs.push((key.to_owned(), value.to_owned())),
                None if place == 0 => head = Some(part),
                None => pairs.push((part, "on".into())),
            }
        }
        Self { head, pairs }
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().rfind(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// The value of `key`, which may also be given first and without its name.
    fn first_or(&self, key: &str) -> Option<&str> {
        self.get(key).or(self.head.as_deref())
    }
}

/// Splits at commas; two of them stand for one in a value.
fn parts(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        let part = letter == ',' && letters.next_if_eq(&',').is_none();
        match parts.last_mut() {
            Some(last) if !part => last.push(letter),
            _ => parts.push(String::new()),
        }
    }
    parts
}

/// Adds what the arguments say. What the monitor said already counts more.
pub(super) fn describe(machine: &mut Machine, arguments: &[String]) {
    let mut words = arguments.iter().peekable();
    let program = words.next().map(String::as_str).unwrap_or_default();
    machine.architecture =
        program.rsplit('/').next().and_then(|name| name.strip_prefix("qemu-system-")).map(str::to_owned);
    let (mut devices, mut nets) = (Vec::new(), Vec::new());
    let (mut kernel, mut initrd, mut append) = (None, None, None);
    while let Some(word) = words.next() {
        let Some(option) = word.strip_prefix('-').map(|word| word.trim_start_matches('-')) else { continue };
        let Some(value) = words.next_if(|value| !value.starts_with('-')) else { continue };
        let options = Options::of(value);
        match option {
            "machine" | "M" => {
                machine.board = options.first_or("type").map(str::to_owned);
                flash(&options, &mut machine.firmware);
            }
            "cpu" => machine.cpu_model = options.head.clone(),
            "m" if machine.memory.is_none() => machine.memory = options.first_or("size").and_then(memory),
            "smp" if machine.cpus.is_none() => {
                machine.cpus = options.first_or("cpus").and_then(|cpus| cpus.parse().ok());
            }
            "kernel" => kernel = Some(value.clone()),
            "initrd" => initrd = Some(value.clone()),
            "append" => append = Some(value.clone()),
            "drive" if options.get("if") == Some("pflash") => drive_flash(&options, &mut machine.firmware),
            "drive" => devices.push(drive(options)),
            "device" => devices.push(options),
            "netdev" | "nic" | "net" => nets.push((option.to_owned(), options)),
            "serial" | "vnc" | "spice" | "virtfs" => {
                let target = Some(value.clone());
                machine.consoles.push(Console { kind: option.into(), target });
            }
            _ => {}
        }
    }
    if let Some(kernel) = kernel {
        machine.firmware = Firmware::Kernel { kernel, initrd, arguments: append };
    }
    machine.interfaces = interfaces(&devices, &nets);
    machine.disks.iter_mut().for_each(|disk| complete(disk, &devices));
}

/// A drive with a bus of its own is a device too.
fn drive(mut options: Options) -> Options {
    options.head = match options.get("if") {
        Some("virtio") => Some("virtio-blk".into()),
        Some("scsi") => Some("scsi-hd".into()),
        Some("none") => None,
        _ => Some("ide-hd".into()),
    };
    options
}

/// Flash that `-machine` names by its node; which file that is, the nodes say.
fn flash(options: &Options, firmware: &mut Firmware) {
    if let Some(code) = options.get("pflash0") {
        let nvram = options.get("pflash1").map(str::to_owned);
        *firmware = Firmware::Uefi { loader: Some(code.to_owned()), nvram, secure_boot: false };
    }
}

fn drive_flash(options: &Options, firmware: &mut Firmware) {
    let Some(file) = options.get("file").map(str::to_owned) else { return };
    let fixed = options.get("unit") == Some("0") || matches!(options.get("readonly"), Some("on"));
    let (mut code, mut variables) = match firmware {
        Firmware::Uefi { loader, nvram, .. } => (loader.take(), nvram.take()),
        _ => (None, None),
    };
    if fixed && code.is_none() {
        code = Some(file);
    } else {
        variables = Some(file);
    }
    *firmware = Firmware::Uefi { loader: code, nvram: variables, secure_boot: false };
}

fn interfaces(devices: &[Options], nets: &[(String, Options)]) -> Vec<Interface> {
    let network = |options: &Options| {
        let kind = options.first_or("type").unwrap_or("user");
        let place = options.get("br").or(options.get("ifname")).or(options.get("path"));
        place.map_or_else(|| kind.to_owned(), |place| format!("{kind}:{place}"))
    };
    let plugged = devices.iter().filter_map(|device| {
        let id = device.get("netdev")?;
        let net = nets.iter().find(|(_, net)| net.get("id") == Some(id));
        Some(Interface {
            mac: device.get("mac").map(str::to_owned),
            model: device
                .head
                .as_deref()
                .map(|model| model.trim_end_matches("-pci").replace("virtio-net", "virtio")),
            network: net.map(|(_, net)| network(net)),
        })
    });
    let whole = nets.iter().filter(|(option, net)| option == "nic" && net.first_or("type") != Some("none"));
    let whole = whole.map(|(_, net)| Interface {
        mac: net.get("mac").map(str::to_owned),
        model: net.get("model").map(str::to_owned),
        network: Some(network(net)),
    });
    plugged.chain(whole).collect()
}

/// Adds what the device says that carries the disk.
fn complete(disk: &mut MachineDisk, devices: &[Options]) {
    let carries = |device: &&Options| {
        ["id", "drive"].iter().any(|key| device.get(key) == Some(disk.name.as_str()))
            || device.get("file").is_some_and(|file| file == disk.source)
    };
    let all: Vec<&Options> = devices.iter().filter(carries).collect();
    let bus = all.iter().find_map(|device| bus(device.head.as_deref()?));
    disk.bus = disk.bus.take().or(bus.map(str::to_owned));
    disk.serial = all.iter().find_map(|device| device.get("serial")).map(str::to_owned);
    disk.boot_order = all.iter().find_map(|device| device.get("bootindex")?.parse().ok());
}

fn bus(driver: &str) -> Option<&'static str> {
    Some(match driver {
        driver if driver.starts_with("virtio-blk") => "virtio",
        driver if driver.starts_with("scsi-") => "scsi",
        driver if driver.starts_with("ide-") => "ide",
        driver if driver.starts_with("nvme") => "nvme",
        driver if driver.starts_with("usb-") => "usb",
        _ => return None,
    })
}

/// Bytes; without a unit QEMU means MiB.
fn memory(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit: u64 = match text.get(digits.len()..)?.to_ascii_uppercase().as_str() {
        "K" | "KB" | "KIB" => 1 << 10,
        "" | "M" | "MB" | "MIB" => 1 << 20,
        "G" | "GB" | "GIB" => 1 << 30,
        "T" | "TB" | "TIB" => 1 << 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::hypervisor::MachineId;

    fn described(line: &str, disks: &[(&str, &str)]) -> Machine {
        let mut machine = Machine::new(MachineId("m".into()), "m");
        for (name, source) in disks {
            machine.disks.push(MachineDisk {
                name: (*name).into(),
                bus: None,
                format: "qcow2".into(),
                serial: None,
                boot_order: None,
                size: None,
                source: (*source).into(),
                read_only: false,
            });
        }
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        describe(&mut machine, &words);
        machine
    }

    #[test]
    fn arguments_of_every_style_are_understood() {
        let line = r#"/usr/bin/qemu-system-x86_64 -nodefaults -machine q35,accel=kvm -cpu host,-avx512f -m size=2G
            -smp 4,sockets=1 -drive if=pflash,format=raw,unit=0,readonly=on,file=/code.fd
            -drive if=pflash,format=raw,unit=1,file=/vars,,1.fd
            -blockdev {"driver":"qcow2","node-name":"disk0"} -device virtio-blk-pci,drive=disk0,id=vd0,serial=S1,bootindex=1
            -device {"driver":"scsi-hd","id":"sd0","drive":"x","bootindex":2}
            -drive file=/third.qcow2,if=virtio
            -netdev bridge,id=n0,br=br0 -device virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01
            -nic user,model=e1000e -serial stdio -vnc :1"#;
        let machine = described(line, &[("vd0", "/a"), ("sd0", "/b"), ("c", "/third.qcow2")]);
        assert_eq!(machine.architecture.as_deref(), Some("x86_64"));
        assert_eq!((machine.board.as_deref(), machine.cpu_model.as_deref()), (Some("q35"), Some("host")));
        assert_eq!((machine.memory, machine.cpus), (Some(2 << 30), Some(4)));
        let (loader, nvram) = (Some("/code.fd".into()), Some("/vars,1.fd".into()));
        assert_eq!(machine.firmware, Firmware::Uefi { loader, nvram, secure_boot: false });
        let disks: Vec<_> = machine.disks.iter().map(|disk| (disk.bus.as_deref(), disk.boot_order)).collect();
        assert_eq!(disks, [(Some("virtio"), Some(1)), (Some("scsi"), Some(2)), (Some("virtio"), None)]);
        assert_eq!(machine.disks[0].serial.as_deref(), Some("S1"));
        let nets: Vec<_> =
            machine.interfaces.iter().map(|net| (net.model.as_deref(), net.network.as_deref())).collect();
        assert_eq!(nets, [(Some("virtio"), Some("bridge:br0")), (Some("e1000e"), Some("user"))]);
        assert_eq!(machine.consoles.len(), 2);
        let kernel = described("qemu-system-aarch64 -kernel /k -append root=/dev/vda -m 512", &[]);
        assert!(matches!(kernel.firmware, Firmware::Kernel { arguments: Some(_), .. }));
        assert_eq!(kernel.memory, Some(512 << 20));
        described("", &[]);
        described("x -m -smp , -device ,,,,= -drive", &[]);
    }
}
