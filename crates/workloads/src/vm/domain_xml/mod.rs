//! Machines as libvirt's domain documents (<https://libvirt.org/formatdomain.html>): read into neutral words, and
//! written by editing the document that was captured, so that whatever the neutral words do not know stays as it was.

mod edit;
mod write;

use std::path::PathBuf;

use mainstay_core::{Error, Result};
use roxmltree::{Document, Node};

use super::hypervisor::MachineId;
use super::machine::{Console, Firmware, Interface, Machine, MachineDisk, RawDocument, RawKind};

pub(super) use edit::quoted;
pub(super) use write::{made_here, mark_as_made, write};

/// The longest document that is read, in bytes.
pub(super) const DOCUMENT_MAX: usize = 8 << 20;

/// What only the live document of a domain tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Live {
    /// The images below each disk, nearest first, by the disk's name.
    pub(super) backing: Vec<(String, Vec<String>)>,
    /// User and group that the emulator runs as.
    pub(super) user: Option<(u32, u32)>,
}

impl Live {
    pub(super) fn backing_of(&self, disk: &str) -> Vec<PathBuf> {
        let found = self.backing.iter().find(|(name, _)| name == disk);
        found.map(|(_, chain)| chain.iter().map(PathBuf::from).collect()).unwrap_or_default()
    }
}

/// Reads a domain. The document itself becomes the machine's raw document.
///
/// Errors: [`mainstay_core::Code::Integrity`] for what is no domain document.
pub(super) fn parse(text: &str) -> Result<Machine> {
    let document = open(text)?;
    let domain = document.root_element();
    let devices = child(domain, "devices");
    let name = text_of(domain, "name").unwrap_or_default();
    let id = text_of(domain, "uuid").unwrap_or_else(|| name.clone());
    let mut machine = Machine::new(MachineId(id), name);
    machine.cpus = text_of(domain, "vcpu").and_then(|cpus| cpus.parse().ok());
    machine.memory = child(domain, "memory").and_then(bytes);
    let kind = child(domain, "os").and_then(|os| child(os, "type"));
    machine.architecture = kind.and_then(|kind| attribute(kind, "arch"));
    machine.board = kind.and_then(|kind| attribute(kind, "machine"));
    machine.cpu_model = child(domain, "cpu").and_then(|cpu| text_of(cpu, "model").or(attribute(cpu, "mode")));
    machine.firmware = child(domain, "os").map(firmware).unwrap_or_default();
    let all = |name: &'static str| devices.into_iter().flat_map(move |devices| children(devices, name));
    machine.disks = all("disk").filter_map(disk).collect();
    machine.interfaces = all("interface").map(interface).collect();
    machine.consoles = all("serial").map(|node| console("serial", node)).collect();
    machine.consoles.extend(all("graphics").map(|node| {
        let kind = node.attribute("type").unwrap_or("graphics").to_owned();
        Console { kind, target: attribute(node, "listen") }
    }));
    machine.agent = all("channel").any(is_agent);
    machine.raw = Some(RawDocument { kind: RawKind::LibvirtXml, text: text.as_bytes().to_vec() });
    Ok(machine)
}

pub(super) fn parse_live(text: &str) -> Result<Live> {
    let document = open(text)?;
    let domain = document.root_element();
    let disks = child(domain, "devices").into_iter().flat_map(|devices| children(devices, "disk"));
    let backing = |disk: Node<'_, '_>| {
        let first = child(disk, "backingStore");
        let chain = std::iter::successors(first, |below| child(*below, "backingStore"));
        let sources = chain.filter_map(|below| child(below, "source")).map(source).collect();
        Some((disk_name(disk)?, sources))
    };
    let label = children(domain, "seclabel").find(|label| label.attribute("model") == Some("dac"));
    let user = label.and_then(|label| text_of(label, "label")).and_then(|label| {
        let (user, group) = label.split_once(':')?;
        let number = |text: &str| text.trim_start_matches('+').parse().ok();
        Some((number(user)?, number(group)?))
    });
    Ok(Live { backing: disks.filter_map(backing).collect(), user })
}

fn open(text: &str) -> Result<Document<'_>> {
    if text.len() > DOCUMENT_MAX {
        return Err(Error::integrity("the domain document is too long"));
    }
    // Entities are refused, so a document is no larger than its text.
    let document = Document::parse(text)
        .map_err(|error| Error::integrity("the domain document makes no sense").because(error))?;
    if document.root_element().has_tag_name("domain") {
        Ok(document)
    } else {
        Err(Error::integrity("the document describes no domain"))
    }
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name(name))
}

fn children<'a, 'input: 'a>(
    node: Node<'a, 'input>,
    name: &'static str,
) -> impl Iterator<Item = Node<'a, 'input>> + use<'a, 'input> {
    node.children().filter(move |child| child.has_tag_name(name))
}

fn attribute(node: Node<'_, '_>, name: &str) -> Option<String> {
    node.attribute(name).map(str::to_owned)
}

fn text_of(node: Node<'_, '_>, name: &str) -> Option<String> {
    let text = child(node, name)?.text()?.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// A quantity of memory. Units are libvirt's: `KiB` when it says none.
fn bytes(node: Node<'_, '_>) -> Option<u64> {
    let number: u64 = node.text()?.trim().parse().ok()?;
    let unit = match node.attribute("unit").unwrap_or("KiB") {
        "b" | "bytes" => 1,
        "KB" => 1000,
        "k" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "T" | "TiB" => 1 << 40,
        _ => return None,
    };
    number.checked_mul(unit)
}

fn firmware(os: Node<'_, '_>) -> Firmware {
    if let Some(kernel) = text_of(os, "kernel") {
        return Firmware::Kernel { kernel, initrd: text_of(os, "initrd"), arguments: text_of(os, "cmdline") };
    }
    let loader = child(os, "loader");
    let flash = loader.is_some_and(|loader| loader.attribute("type") == Some("pflash"));
    if !flash && os.attribute("firmware") != Some("efi") {
        return Firmware::Bios;
    }
    Firmware::Uefi {
        loader: text_of(os, "loader"),
        nvram: text_of(os, "nvram"),
        secure_boot: loader.is_some_and(|loader| loader.attribute("secure") == Some("yes")),
    }
}

fn disk_name(disk: Node<'_, '_>) -> Option<String> {
    child(disk, "target").and_then(|target| attribute(target, "dev"))
}

fn disk(node: Node<'_, '_>) -> Option<MachineDisk> {
    let target = child(node, "target")?;
    let format = child(node, "driver").and_then(|driver| attribute(driver, "type"));
    let order = child(node, "boot").and_then(|boot| boot.attribute("order"));
    let changes = node.attribute("device").is_none_or(|device| matches!(device, "disk" | "lun"));
    Some(MachineDisk {
        name: attribute(target, "dev")?,
        bus: attribute(target, "bus"),
        format: format.unwrap_or_else(|| "raw".into()),
        serial: text_of(node, "serial"),
        boot_order: order.and_then(|order| order.parse().ok()),
        size: None,
        source: child(node, "source").map(source).unwrap_or_default(),
        read_only: !changes || child(node, "readonly").is_some() || child(node, "shareable").is_some(),
    })
}

/// A path, or what stands for one: `POOL/VOLUME`, `PROTOCOL:NAME`.
fn source(node: Node<'_, '_>) -> String {
    let plain = ["file", "dev", "dir"].iter().find_map(|name| node.attribute(*name));
    if let Some(path) = plain {
        return path.to_owned();
    }
    let attribute = |name| node.attribute(name).unwrap_or_default();
    match node.attribute("pool") {
        Some(pool) => format!("{pool}/{}", attribute("volume")),
        None => format!("{}:{}", attribute("protocol"), attribute("name")),
    }
}

fn interface(node: Node<'_, '_>) -> Interface {
    let kind = node.attribute("type").unwrap_or_default();
    let name = if kind == "direct" { "dev" } else { kind };
    let place = child(node, "source").and_then(|source| source.attribute(name));
    Interface {
        mac: child(node, "mac").and_then(|mac| attribute(mac, "address")),
        model: child(node, "model").and_then(|model| attribute(model, "type")),
        network: Some(place.map_or_else(|| kind.to_owned(), |place| format!("{kind}:{place}"))),
    }
}

fn console(kind: &str, node: Node<'_, '_>) -> Console {
    Console { kind: kind.into(), target: child(node, "source").and_then(|source| attribute(source, "path")) }
}

fn is_agent(channel: Node<'_, '_>) -> bool {
    let target = child(channel, "target").and_then(|target| target.attribute("name"));
    target.is_some_and(|name| name.starts_with("org.qemu.guest_agent"))
}

#[cfg(test)]
mod tests;
