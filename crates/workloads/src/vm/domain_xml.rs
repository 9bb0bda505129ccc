//! Machines as libvirt's domain documents (<https://libvirt.org/formatdomain.html>): read into neutral words, and
//! written by editing the document that was captured, so that whatever the neutral words do not know stays as it was.

use std::ops::Range;
use std::path::PathBuf;

use mainstay_core::{Error, Result};
use roxmltree::{Document, Node};

use super::hypervisor::{DiskPlace, MachineId};
use super::machine::{Console, Firmware, Interface, Machine, MachineDisk, RawDocument, RawKind};

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

/// The document of `machine` with these disks, for defining it: its captured document, brought to what the neutral
/// words now say. Disks and interfaces that the machine no longer has are left out.
///
/// Errors: [`mainstay_core::Code::Unsupported`] when it was captured from another vendor,
/// [`mainstay_core::Code::Integrity`] for a document that makes no sense.
pub(super) fn write(machine: &Machine, places: &[DiskPlace]) -> Result<String> {
    let raw = match &machine.raw {
        Some(raw) if raw.kind == RawKind::LibvirtXml => String::from_utf8_lossy(&raw.text).into_owned(),
        _ => skeleton(machine),
    };
    let document = open(&raw)?;
    let domain = document.root_element();
    let mut edits = Edits::default();
    edits.set_text(domain, "name", &machine.name);
    edits.set_text(domain, "uuid", &machine.id.0);
    if let Some(cpus) = machine.cpus {
        edits.set_text(domain, "vcpu", &cpus.to_string());
    }
    if let Some(memory) = machine.memory {
        for (name, node) in ["memory", "currentMemory"].map(|name| (name, child(domain, name))) {
            let Some(node) = node.filter(|node| bytes(*node) != Some(memory)) else { continue };
            edits.replace(node.range(), format!("<{name} unit='b'>{memory}</{name}>"));
        }
    }
    let devices = child(domain, "devices");
    for node in devices.into_iter().flat_map(|devices| children(devices, "disk")) {
        write_disk(&mut edits, node, machine, places);
    }
    let interfaces = devices.into_iter().flat_map(|devices| children(devices, "interface"));
    for (number, node) in interfaces.enumerate() {
        match machine.interfaces.get(number) {
            Some(wanted) => write_interface(&mut edits, node, wanted),
            None => edits.replace(node.range(), String::new()),
        }
    }
    // A running domain's number means nothing elsewhere.
    if let Some(number) = domain.attribute_node("id") {
        edits.replace(number.range(), String::new());
    }
    Ok(edits.apply(&raw))
}

/// The element, in the document's metadata, of a machine that was defined from here.
const MADE: &str = "<made xmlns='https://mainstay.invalid/machine'/>";

/// Notes in the document that the machine was defined from here, and may be taken away again.
pub(super) fn mark_as_made(text: &str) -> Result<String> {
    if made_here(text) {
        return Ok(text.to_owned());
    }
    let document = open(text)?;
    let domain = document.root_element();
    let mut edits = Edits::default();
    match child(domain, "metadata") {
        Some(metadata) if metadata.first_child().is_some() => edits.insert_first(metadata, MADE),
        Some(metadata) => edits.replace(metadata.range(), format!("<metadata>{MADE}</metadata>")),
        None => edits.insert_first(domain, &format!("<metadata>{MADE}</metadata>")),
    }
    Ok(edits.apply(text))
}

pub(super) fn made_here(text: &str) -> bool {
    let document = open(text);
    document.is_ok_and(|document| {
        let metadata = child(document.root_element(), "metadata");
        metadata.is_some_and(|metadata| {
            metadata.children().any(|node| node.has_tag_name(("https://mainstay.invalid/machine", "made")))
        })
    })
}

fn write_disk(edits: &mut Edits, node: Node<'_, '_>, machine: &Machine, places: &[DiskPlace]) {
    let Some(name) = disk_name(node) else { return };
    let Some(disk) = machine.disks.iter().find(|disk| disk.name == name) else {
        return edits.replace(node.range(), String::new());
    };
    if let (Some(bus), Some(target)) = (&disk.bus, child(node, "target"))
        && target.attribute("bus") != Some(bus)
    {
        edits.set_attribute(target, "bus", bus);
        // The place on the old bus.
        children(node, "address").for_each(|address| edits.replace(address.range(), String::new()));
    }
    let Some(place) = places.iter().find(|place| place.name == name) else { return };
    edits.set_attribute_of_node(node, "type", "file");
    if let Some(driver) = child(node, "driver") {
        edits.set_attribute(driver, "type", &place.format);
    }
    let source = format!("<source file={}/>", quoted(&place.path.to_string_lossy()));
    match child(node, "source") {
        Some(old) => edits.replace(old.range(), source),
        None => edits.insert_first(node, &source),
    }
    // What lay below the captured image is in the image now.
    children(node, "backingStore").for_each(|below| edits.replace(below.range(), String::new()));
}

fn write_interface(edits: &mut Edits, node: Node<'_, '_>, wanted: &Interface) {
    if let (Some(mac), Some(old)) = (&wanted.mac, child(node, "mac")) {
        edits.set_attribute(old, "address", mac);
    }
    if let (Some(model), Some(old)) = (&wanted.model, child(node, "model")) {
        edits.set_attribute(old, "type", model);
    }
    if interface(node).network == wanted.network {
        return;
    }
    if let Some((kind, name)) = wanted.network.as_deref().and_then(|network| network.split_once(':')) {
        edits.set_attribute_of_node(node, "type", kind);
        let source = format!("<source {kind}={}/>", quoted(name));
        match child(node, "source") {
            Some(old) => edits.replace(old.range(), source),
            None => edits.insert_first(node, &source),
        }
    }
}

/// A plain domain for a machine that was captured from another vendor, without its values: those are edited in.
fn skeleton(machine: &Machine) -> String {
    use std::fmt::Write as _;
    let mut text = String::from("<domain type='kvm'><name/><uuid/><memory/><vcpu/>");
    let board = quoted(machine.board.as_deref().unwrap_or("q35"));
    let arch = quoted(machine.architecture.as_deref().unwrap_or("x86_64"));
    let uefi = if matches!(machine.firmware, Firmware::Uefi { .. }) { " firmware='efi'" } else { "" };
    // Writing to a string cannot fail.
    let _ = write!(text, "<os{uefi}><type arch={arch} machine={board}>hvm</type></os>");
    text.push_str("<features><acpi/></features><devices>");
    for disk in &machine.disks {
        let bus = quoted(disk.bus.as_deref().unwrap_or("virtio"));
        let _ = write!(
            text,
            "<disk type='file' device='disk'><driver name='qemu' type={}/><source/><target dev={} bus={bus}/></disk>",
            quoted(&disk.format),
            quoted(&disk.name),
        );
    }
    for interface in &machine.interfaces {
        let model = quoted(interface.model.as_deref().unwrap_or("virtio"));
        let _ = write!(text, "<interface type='user'><mac address=''/><model type={model}/></interface>");
        if interface.mac.is_none() {
            text = text.replace("<mac address=''/>", "");
        }
    }
    text.push_str("<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>");
    text.push_str("</devices></domain>");
    text
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
    let place = child(node, "source").and_then(|source| source.attribute(kind));
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

/// Changes to a text, by place.
#[derive(Default)]
struct Edits(Vec<(Range<usize>, String)>);

impl Edits {
    fn replace(&mut self, range: Range<usize>, text: String) {
        self.0.push((range, text));
    }

    /// The content of the child called `name`, which is made if it is not there.
    fn set_text(&mut self, parent: Node<'_, '_>, name: &str, text: &str) {
        let text = escaped(text);
        match child(parent, name) {
            None => self.insert_first(parent, &format!("<{name}>{text}</{name}>")),
            Some(node) => {
                let mut attributes = String::new();
                for attribute in node.attributes() {
                    attributes.push_str(&format!(" {}={}", attribute.name(), quoted(attribute.value())));
                }
                self.replace(node.range(), format!("<{name}{attributes}>{text}</{name}>"));
            }
        }
    }

    fn set_attribute(&mut self, node: Node<'_, '_>, name: &str, value: &str) {
        self.set_attribute_of_node(node, name, value);
    }

    fn set_attribute_of_node(&mut self, node: Node<'_, '_>, name: &str, value: &str) {
        match node.attribute_node(name) {
            Some(old) if old.value() == value => {}
            Some(old) => self.replace(old.range(), format!("{name}={}", quoted(value))),
            None => {
                let at = node.range().start + 1 + node.tag_name().name().len();
                self.replace(at..at, format!(" {name}={}", quoted(value)));
            }
        }
    }

    /// Puts an element before the others in `parent`, which has some.
    fn insert_first(&mut self, parent: Node<'_, '_>, element: &str) {
        if let Some(first) = parent.first_child() {
            let at = first.range().start;
            self.replace(at..at, element.to_owned());
        }
    }

    /// Later changes inside a part that is replaced as a whole are dropped.
    fn apply(mut self, text: &str) -> String {
        self.0.sort_by_key(|(range, _)| (range.start, std::cmp::Reverse(range.end)));
        let (mut written, mut at) = (String::with_capacity(text.len()), 0);
        for (range, new) in self.0 {
            if range.start < at {
                continue;
            }
            written.push_str(text.get(at..range.start).unwrap_or_default());
            written.push_str(&new);
            at = range.end;
        }
        written.push_str(text.get(at..).unwrap_or_default());
        written
    }
}

fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&apos;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
    }
    escaped
}

pub(super) fn quoted(text: &str) -> String {
    format!("'{}'", escaped(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    const XML: &str = "<domain type='kvm' id='7' xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web &amp; mail</name><uuid>1b2c3d4e-0000-4000-8000-000000000001</uuid>
  <metadata><q:mine anything='kept'/></metadata>
  <memory unit='MiB'>512</memory><currentMemory unit='KiB'>524288</currentMemory>
  <vcpu placement='static'>2</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type><loader readonly='yes' type='pflash' secure='yes'>/code.fd</loader><nvram>/vars.fd</nvram></os>
  <cpu mode='host-model'/>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/a.qcow2'/><backingStore type='file'><source file='/base.qcow2'/><backingStore/></backingStore><target dev='vda' bus='virtio'/><serial>S1</serial><boot order='1'/><address type='pci' slot='0x05'/></disk>
    <disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/lvm/data'/><target dev='sda' bus='scsi'/></disk>
    <disk type='network' device='disk'><driver name='qemu'/><source protocol='rbd' name='pool/image'/><target dev='vdc' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><target dev='hda' bus='ide'/><readonly/></disk>
    <interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/><model type='virtio'/></interface>
    <interface type='bridge'><mac address='52:54:00:00:00:02'/><source bridge='br0'/><model type='e1000e'/></interface>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <graphics type='vnc' listen='127.0.0.1'/>
  </devices>
  <seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+108</label></seclabel>
</domain>";

    #[test]
    fn a_domain_is_read_into_neutral_words() {
        let machine = parse(XML).unwrap();
        assert_eq!(
            (machine.name.as_str(), machine.cpus, machine.memory),
            ("web & mail", Some(2), Some(512 << 20))
        );
        assert_eq!(machine.cpu_model.as_deref(), Some("host-model"));
        assert!(
            matches!(&machine.firmware, Firmware::Uefi { nvram: Some(path), secure_boot: true, .. } if path == "/vars.fd")
        );
        let disks: Vec<_> = machine
            .disks
            .iter()
            .map(|disk| (disk.name.as_str(), disk.source.as_str(), disk.format.as_str(), disk.read_only))
            .collect();
        assert_eq!(
            disks,
            [
                ("vda", "/a.qcow2", "qcow2", false),
                ("sda", "/dev/lvm/data", "raw", false),
                ("vdc", "rbd:pool/image", "raw", false),
                ("hda", "", "raw", true),
            ]
        );
        assert_eq!((machine.disks[0].boot_order, machine.disks[0].serial.as_deref()), (Some(1), Some("S1")));
        assert_eq!(machine.interfaces[1].network.as_deref(), Some("bridge:br0"));
        assert_eq!(machine.consoles[0].kind, "vnc");
        assert!(machine.agent);
        let live = parse_live(XML).unwrap();
        assert_eq!(live.user, Some((64055, 108)));
        assert_eq!(live.backing[0], ("vda".into(), vec!["/base.qcow2".into()]));
        let json = machine.to_json().unwrap();
        assert_eq!(Machine::from_json(&json).unwrap(), Machine { raw: None, ..machine });
    }

    #[test]
    fn editing_changes_what_was_said_and_keeps_the_rest() {
        let machine = parse(XML).unwrap();
        let same = parse(&write(&machine, &[]).unwrap()).unwrap();
        assert_eq!(Machine { raw: None, ..same }, Machine { raw: None, ..machine.clone() });

        let mut other = machine.clone();
        other.name = "clone <2>".into();
        other.id = MachineId("1b2c3d4e-0000-4000-8000-000000000002".into());
        (other.cpus, other.memory) = (Some(8), Some(1 << 30));
        other.disks.retain(|disk| disk.name != "sda");
        other.disks[0].bus = Some("sata".into());
        other.interfaces.truncate(1);
        other.interfaces[0].mac = Some("52:54:00:00:00:99".into());
        other.interfaces[0].network = Some("bridge:lab".into());
        let place = DiskPlace { name: "vda".into(), path: "/new & /a.raw".into(), format: "raw".into() };
        let text = write(&other, std::slice::from_ref(&place)).unwrap();
        let mut read = parse(&text).unwrap();
        (other.disks[0].source, other.disks[0].format) = ("/new & /a.raw".into(), "raw".into());
        (other.raw, read.raw) = (None, None);
        assert_eq!(read, other);
        for kept in ["<q:mine anything='kept'/>", "placement='static'", "secure='yes'", "<serial>S1</serial>"]
        {
            assert!(text.contains(kept), "{kept}");
        }
        assert!(!made_here(&text) && made_here(&mark_as_made(&text).unwrap()));
        for gone in ["slot='0x05'", "backingStore", " id='7'", "/dev/lvm/data"] {
            assert!(!text.contains(gone), "{gone}");
        }
    }

    #[test]
    fn a_machine_of_another_vendor_becomes_a_plain_domain() {
        let mut machine = Machine { raw: None, ..parse(XML).unwrap() };
        machine.disks.truncate(1);
        machine.firmware = Firmware::Bios;
        let place = DiskPlace { name: "vda".into(), path: "/x.qcow2".into(), format: "qcow2".into() };
        let read = parse(&write(&machine, &[place]).unwrap()).unwrap();
        assert_eq!((read.name, read.cpus, read.memory), (machine.name, machine.cpus, machine.memory));
        assert_eq!(read.disks[0].source, "/x.qcow2");
        assert_eq!(read.interfaces[0].mac, machine.interfaces[0].mac);
    }

    #[test]
    fn hostile_documents_are_errors() {
        let entities = "<!DOCTYPE d [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;'>]><domain>&b;</domain>";
        let deep = format!("<domain>{}", "<a>".repeat(100_000));
        let cut = &XML[..XML.len() / 2];
        for text in ["", "<pool/>", "<domain", entities, &deep, cut] {
            assert_eq!(parse(text).unwrap_err().code(), mainstay_core::Code::Integrity, "{text:.40}");
        }
        assert_eq!(parse("<domain/>").unwrap().disks, []);
    }
}
