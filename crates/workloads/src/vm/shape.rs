//! What a machine becomes when it is brought back as another one, or elsewhere. Pure: neutral words in, neutral words
//! out; each vendor then writes them down in its own.

use mainstay_core::{Code, Error, Result};

use super::hypervisor::MachineId;
use super::machine::Machine;

/// What is to be different. Whatever is `None` or empty stays as it was captured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    pub name: Option<String>,
    pub identity: Identity,
    pub cpus: Option<u32>,
    /// Bytes.
    pub memory: Option<u64>,
    /// The processor model, in the words of the host.
    pub cpu_model: Option<String>,
    /// Of all disks: `virtio`, `scsi`, `sata`.
    pub bus: Option<String>,
    /// The disks wanted, by name.
    pub disks: Option<Vec<String>>,
    /// From what an interface is plugged into to what it shall be plugged into, in the words of
    /// [`super::machine::Interface::network`]; `none` takes the interface away. The first that fits counts, and `*`
    /// fits everything.
    pub networks: Vec<(String, String)>,
}

/// Who the machine is, to its host and its neighbours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Identity {
    /// A new UUID and new MAC addresses.
    #[default]
    New,
    /// As captured: for when the first one is gone.
    Same,
}

/// Fills bytes with what nobody can foretell.
pub type Random<'a> = &'a mut dyn FnMut(&mut [u8]) -> Result<()>;

impl Shape {
    /// Whether a machine can be called so: one file and one word to every host.
    ///
    /// Errors: [`Code::Usage`].
    pub fn check_name(name: &str) -> Result<()> {
        let strange = |letter: char| letter.is_control() || letter == '/';
        if !name.is_empty() && !name.starts_with(['.', '-']) && name.len() <= 200 && !name.contains(strange) {
            return Ok(());
        }
        Err(Error::new(Code::Usage, format!("a machine cannot be called {name:?}"))
            .hint("choose another name without slashes that does not begin with a dot or a dash"))
    }

    /// The machine as it is to be defined.
    ///
    /// Errors: [`Code::NotFound`] for a disk that it does not have, [`Code::Usage`] for a name that cannot be one or
    /// for no processors and memory.
    pub fn apply(&self, mut machine: Machine, random: Random<'_>) -> Result<Machine> {
        if let Some(name) = &self.name {
            name.clone_into(&mut machine.name);
        }
        Self::check_name(&machine.name)?;
        if self.cpus == Some(0) || self.memory.is_some_and(|memory| memory < 1 << 20) {
            return Err(Error::new(Code::Usage, "a machine needs a processor and a MiB of memory at least"));
        }
        machine.cpus = self.cpus.or(machine.cpus);
        machine.memory = self.memory.or(machine.memory);
        machine.cpu_model = self.cpu_model.clone().or(machine.cpu_model);
        if let Some(wanted) = &self.disks {
            let known: Vec<&str> = machine.disks.iter().map(|disk| disk.name.as_str()).collect();
            if let Some(missing) = wanted.iter().find(|name| !known.contains(&name.as_str())) {
                let what = format!("the machine has no disk {missing:?}");
                return Err(Error::new(Code::NotFound, what).hint(format!("it has {}", known.join(", "))));
            }
            machine.disks.retain(|disk| wanted.contains(&disk.name));
        }
        if let Some(bus) = &self.bus {
            machine.disks.iter_mut().for_each(|disk| disk.bus = Some(bus.clone()));
        }
        for interface in &mut machine.interfaces {
            let plugged = interface.network.as_deref().unwrap_or("user");
            let fits = |from: &String| from == "*" || from == plugged;
            if let Some((_, to)) = self.networks.iter().find(|(from, _)| fits(from)) {
                interface.network = Some(to.clone());
            }
        }
        if self.identity == Identity::New {
            machine.id = MachineId(uuid(random)?);
            for interface in &mut machine.interfaces {
                interface.mac = Some(mac(random)?);
            }
        }
        Ok(machine)
    }
}

/// Version 4, as RFC 9562 has it.
fn uuid(random: Random<'_>) -> Result<String> {
    let mut bytes = [0; 16];
    random(&mut bytes)?;
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    let [a, b, c, d, e, f, g, h, i, j, rest @ ..] = bytes.map(|byte| format!("{byte:02x}"));
    Ok(format!("{a}{b}{c}{d}-{e}{f}-{g}{h}-{i}{j}-{}", rest.concat()))
}

/// Below the prefix that QEMU's machines have.
fn mac(random: Random<'_>) -> Result<String> {
    let mut bytes = [0; 3];
    random(&mut bytes)?;
    let [one, two, three] = bytes;
    Ok(format!("52:54:00:{one:02x}:{two:02x}:{three:02x}"))
}

#[cfg(test)]
mod tests {
    use super::super::machine::{Interface, MachineDisk};
    use super::*;

    fn machine() -> Machine {
        let disk = |name: &str| MachineDisk {
            name: name.into(),
            bus: Some("virtio".into()),
            format: "raw".into(),
            serial: None,
            boot_order: None,
            size: None,
            source: String::new(),
            read_only: false,
        };
        let interface = |network: &str| Interface { mac: None, model: None, network: Some(network.into()) };
        let mut machine = Machine::new(MachineId("old".into()), "web");
        machine.disks = vec![disk("vda"), disk("vdb")];
        machine.interfaces = ["network:default", "bridge:br0", "bridge:br1"].map(interface).into();
        machine
    }

    fn ones(bytes: &mut [u8]) -> Result<()> {
        bytes.fill(0xff);
        Ok(())
    }

    #[test]
    fn a_shape_changes_what_it_names_and_gives_a_new_identity_unless_told_otherwise() {
        let same = Shape { identity: Identity::Same, ..Shape::default() };
        assert_eq!(same.apply(machine(), &mut ones).unwrap(), machine());
        let pair = |from: &str, to: &str| (from.to_owned(), to.to_owned());
        let shape = Shape {
            name: Some("web2".into()),
            cpus: Some(3),
            bus: Some("sata".into()),
            disks: Some(vec!["vdb".into()]),
            networks: vec![pair("bridge:br0", "none"), pair("*", "bridge:lab")],
            ..Shape::default()
        };
        let shaped = shape.apply(machine(), &mut ones).unwrap();
        assert_eq!((shaped.name.as_str(), shaped.cpus, shaped.memory), ("web2", Some(3), None));
        assert_eq!(shaped.id.0, "ffffffff-ffff-4fff-bfff-ffffffffffff");
        let disks: Vec<_> =
            shaped.disks.iter().map(|disk| (disk.name.as_str(), disk.bus.as_deref())).collect();
        assert_eq!(disks, [("vdb", Some("sata"))]);
        let plugged: Vec<_> = shaped.interfaces.iter().filter_map(|card| card.network.as_deref()).collect();
        assert_eq!(plugged, ["bridge:lab", "none", "bridge:lab"]);
        assert!(shaped.interfaces.iter().all(|card| card.mac.as_deref() == Some("52:54:00:ff:ff:ff")));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let apply = |shape: Shape| shape.apply(machine(), &mut ones).map(drop).unwrap_err().code();
        for name in ["", "a/b", "..", "-c", "a\nb"] {
            assert_eq!(apply(Shape { name: Some(name.into()), ..Shape::default() }), Code::Usage, "{name:?}");
        }
        assert_eq!(apply(Shape { cpus: Some(0), ..Shape::default() }), Code::Usage);
        assert_eq!(apply(Shape { disks: Some(vec!["sda".into()]), ..Shape::default() }), Code::NotFound);
    }
}
