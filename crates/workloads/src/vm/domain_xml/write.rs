//! A captured document brought to what the neutral words now say.

use roxmltree::Node;

use mainstay_core::Result;

use super::edit::{Edits, escaped, quoted};
use super::{attribute, bytes, child, children, disk_name, interface, open, text_of};
use crate::vm::hypervisor::DiskPlace;
use crate::vm::machine::{Firmware, Interface, Machine, MachineDisk, RawKind};

/// The document of `machine` with these disks, for defining it: its captured document, brought to what the neutral
/// words now say, or a plain one for a machine of another vendor. Disks and interfaces that the machine no longer has
/// are left out. With another id than the document's it is another machine, and shares no socket, port or log with the
/// first.
///
/// `kvm` says whether the host's KVM works; a captured document of libvirt's says itself what it runs on.
///
/// Errors: [`mainstay_core::Code::Integrity`] for a document that makes no sense.
pub(in crate::vm) fn write(machine: &Machine, places: &[DiskPlace], kvm: bool) -> Result<String> {
    let raw = match &machine.raw {
        Some(raw) if raw.kind == RawKind::LibvirtXml => String::from_utf8_lossy(&raw.text).into_owned(),
        _ => skeleton(machine, kvm),
    };
    let document = open(&raw)?;
    let domain = document.root_element();
    let mut edits = Edits::default();
    if text_of(domain, "uuid").is_some_and(|uuid| uuid != machine.id.0) {
        part(&mut edits, domain, machine);
    }
    edits.set_text(domain, "name", &machine.name);
    edits.set_text(domain, "uuid", &machine.id.0);
    let emulated = domain.attribute("type") == Some("qemu");
    write_shape(&mut edits, domain, machine, emulated);
    write_firmware(&mut edits, domain, machine);
    if let Some(devices) = child(domain, "devices") {
        write_disks(&mut edits, devices, machine, places);
        write_interfaces(&mut edits, devices, machine);
    }
    // A running domain's number means nothing elsewhere.
    edits.remove_attribute(domain, "id");
    Ok(edits.apply(&raw))
}

fn write_shape(edits: &mut Edits, domain: Node<'_, '_>, machine: &Machine, emulated: bool) {
    let known = text_of(domain, "vcpu");
    let cpus = machine.cpus.map(|cpus| cpus.to_string()).filter(|cpus| known.as_ref() != Some(cpus));
    let node = child(domain, "memory");
    let memory = machine.memory.filter(|memory| node.and_then(bytes) != Some(*memory));
    let cpu = child(domain, "cpu");
    if let Some(cpus) = &cpus {
        if let Some(node) = child(domain, "vcpu") {
            // Processors to be added later, and where each one runs, were meant for the old number.
            edits.set_content(node, cpus);
            edits.remove_attribute(node, "current");
        } else {
            edits.insert(domain, &format!("<vcpu>{cpus}</vcpu>"));
        }
        children(domain, "vcpus").for_each(|node| edits.remove(node));
        let tuning = child(domain, "cputune").into_iter();
        tuning.flat_map(|tuning| children(tuning, "vcpupin")).for_each(|node| edits.remove(node));
        cpu.into_iter().flat_map(|cpu| children(cpu, "topology")).for_each(|node| edits.remove(node));
    }
    if cpus.is_some() || memory.is_some() {
        cpu.into_iter().flat_map(|cpu| children(cpu, "numa")).for_each(|node| edits.remove(node));
        children(domain, "numatune").for_each(|node| edits.remove(node));
    }
    if let Some(memory) = memory {
        let element = |name: &str| format!("<{name} unit='b'>{memory}</{name}>");
        edits.set_child(domain, "memory", element("memory"));
        if let Some(node) = child(domain, "currentMemory") {
            edits.replace(node.range(), element("currentMemory"));
        }
    }
    let known = cpu.and_then(|cpu| text_of(cpu, "model").or(attribute(cpu, "mode")));
    if let Some(model) = machine.cpu_model.as_deref().filter(|model| known.as_deref() != Some(*model)) {
        let element = match model {
            // There is no host's processor to pass on; QEMU's own with everything is the nearest.
            "host-passthrough" | "host" if emulated => "<cpu mode='maximum'/>".into(),
            "host-passthrough" | "host-model" | "maximum" => format!("<cpu mode={}/>", quoted(model)),
            // QEMU's words for the same.
            "host" => "<cpu mode='host-passthrough'/>".into(),
            "max" => "<cpu mode='maximum'/>".into(),
            _ => format!("<cpu mode='custom' match='exact'><model>{}</model></cpu>", escaped(model)),
        };
        edits.set_child(domain, "cpu", element);
    }
}

fn write_firmware(edits: &mut Edits, domain: Node<'_, '_>, machine: &Machine) {
    let (Firmware::Uefi { nvram, .. }, Some(os)) = (&machine.firmware, child(domain, "os")) else { return };
    match (nvram, child(os, "nvram")) {
        (Some(path), None) => edits.set_text(os, "nvram", path),
        (Some(path), Some(node)) if node.text().map(str::trim) != Some(path) => edits.set_content(node, path),
        // Where there is none, the host makes one from its template.
        (None, Some(node)) => edits.remove(node),
        _ => {}
    }
}

/// Takes away what two machines of one host cannot both have.
fn part(edits: &mut Edits, domain: Node<'_, '_>, machine: &Machine) {
    if let Some(node) = child(domain, "genid").filter(|node| node.text().is_some()) {
        edits.replace(node.range(), "<genid/>".into());
    }
    let system = child(domain, "sysinfo").and_then(|info| child(info, "system"));
    let entries = system.into_iter().flat_map(|system| children(system, "entry"));
    entries
        .filter(|entry| entry.attribute("name") == Some("uuid"))
        .for_each(|entry| edits.set_content(entry, &machine.id.0));
    let Some(devices) = child(domain, "devices") else { return };
    for channel in children(devices, "channel").filter(|node| node.attribute("type") == Some("unix")) {
        // The host then chooses a place.
        children(channel, "source").for_each(|node| edits.remove(node));
    }
    for line in ["serial", "console", "parallel"].into_iter().flat_map(|name| children(devices, name)) {
        let ends = [("source", "path"), ("log", "file")].into_iter();
        for (node, name) in ends.filter_map(|(kind, name)| Some((child(line, kind)?, name))) {
            let written = matches!(line.attribute("type"), Some("file" | "unix")) || name == "file";
            if let Some(path) = node.attribute(name).filter(|_| written) {
                edits.set_attribute(node, name, &format!("{path}.{}", machine.name.replace('/', "_")));
            }
        }
    }
    for graphics in children(devices, "graphics").filter(|node| node.attribute("port").is_some()) {
        edits.set_attribute(graphics, "port", "-1");
        edits.set_attribute(graphics, "autoport", "yes");
    }
    let numbers = children(devices, "vsock").filter_map(|socket| child(socket, "cid"));
    numbers.for_each(|node| edits.replace(node.range(), "<cid auto='yes'/>".into()));
    let cards = children(devices, "interface").flat_map(|card| children(card, "target"));
    cards.for_each(|node| edits.remove(node));
}

fn write_disks(edits: &mut Edits, devices: Node<'_, '_>, machine: &Machine, places: &[DiskPlace]) {
    let mut names: Vec<String> = Vec::new();
    for node in children(devices, "disk") {
        let known = disk_name(node).and_then(|name| machine.disks.iter().find(|disk| disk.name == name));
        match known {
            Some(disk) => {
                names.push(disk.name.clone());
                write_disk(edits, node, disk, places);
            }
            None => edits.remove(node),
        }
    }
    let mut new = String::new();
    for disk in machine.disks.iter().filter(|disk| !names.contains(&disk.name)).collect::<Vec<_>>() {
        let target = target(disk, &names);
        new.push_str(&new_disk(disk, &target, places));
        names.push(target);
    }
    let mut scsi = machine.disks.iter().filter(|disk| disk.bus.as_deref() == Some("scsi"));
    let is_scsi = |node: Node<'_, '_>| {
        node.attribute("type") == Some("scsi")
            || child(node, "target").and_then(|target| target.attribute("bus")) == Some("scsi")
    };
    if scsi.next().is_some()
        && !["controller", "disk"].into_iter().flat_map(|name| children(devices, name)).any(is_scsi)
    {
        // Otherwise the host chooses one that few guests know.
        new.push_str("<controller type='scsi' index='0' model='virtio-scsi'/>");
    }
    let plugged = children(devices, "interface").count();
    new.extend(machine.interfaces.iter().skip(plugged).filter_map(new_interface));
    edits.append(devices, new);
}

fn write_disk(edits: &mut Edits, node: Node<'_, '_>, disk: &MachineDisk, places: &[DiskPlace]) {
    if let (Some(bus), Some(target)) = (&disk.bus, child(node, "target"))
        && target.attribute("bus") != Some(bus)
    {
        edits.set_attribute(target, "bus", bus);
        // The place on the old bus.
        children(node, "address").for_each(|address| edits.remove(address));
    }
    let Some(place) = places.iter().find(|place| place.name == disk.name) else { return };
    edits.set_attribute(node, "type", "file");
    if node.attribute("device") == Some("lun") {
        edits.set_attribute(node, "device", "disk");
    }
    match child(node, "driver") {
        Some(driver) => edits.set_attribute(driver, "type", &place.format),
        None => edits.insert(node, &format!("<driver name='qemu' type={}/>", quoted(&place.format))),
    }
    let source = format!("<source file={}/>", quoted(&place.path.to_string_lossy()));
    edits.set_child(node, "source", source);
    // What lay below the captured image is in the image now, and no key opens it.
    for name in ["backingStore", "mirror", "auth", "encryption"] {
        children(node, name).for_each(|below| edits.remove(below));
    }
}

fn new_disk(disk: &MachineDisk, target: &str, places: &[DiskPlace]) -> String {
    let place = places.iter().find(|place| place.name == disk.name);
    let path = place.map_or_else(|| disk.source.clone(), |place| place.path.to_string_lossy().into_owned());
    let format = place.map_or(&disk.format, |place| &place.format);
    let order = disk.boot_order.map(|order| format!("<boot order='{order}'/>")).unwrap_or_default();
    format!(
        "<disk type='file' device='disk'><driver name='qemu' type={}/><source file={}/>\
         <target dev={} bus={}/>{order}</disk>",
        quoted(format),
        quoted(&path),
        quoted(target),
        quoted(disk.bus.as_deref().unwrap_or("virtio")),
    )
}

/// How libvirt calls the disk: by its bus and a letter, since it takes no other names.
fn target(disk: &MachineDisk, taken: &[String]) -> String {
    let prefix = match disk.bus.as_deref() {
        Some("scsi" | "sata" | "usb") => "sd",
        Some("ide") => "hd",
        _ => "vd",
    };
    let fits = disk.name.strip_prefix(prefix).is_some_and(|rest| {
        (1..=2).contains(&rest.len()) && rest.bytes().all(|byte| byte.is_ascii_lowercase())
    });
    let mut letters = ('a'..='z').map(|letter| format!("{prefix}{letter}"));
    let mut free = || letters.find(|name| !taken.contains(name)).unwrap_or_else(|| format!("{prefix}aa"));
    if fits && !taken.contains(&disk.name) { disk.name.clone() } else { free() }
}

/// The interface is plugged into nothing: it is left out.
pub(in crate::vm) fn is_unplugged(interface: &Interface) -> bool {
    interface.network.as_deref() == Some("none")
}

fn write_interfaces(edits: &mut Edits, devices: Node<'_, '_>, machine: &Machine) {
    for (number, node) in children(devices, "interface").enumerate() {
        match machine.interfaces.get(number) {
            Some(wanted) if !is_unplugged(wanted) => write_interface(edits, node, wanted),
            _ => edits.remove(node),
        }
    }
}

fn write_interface(edits: &mut Edits, node: Node<'_, '_>, wanted: &Interface) {
    match (&wanted.mac, child(node, "mac")) {
        (Some(mac), Some(old)) => edits.set_attribute(old, "address", mac),
        (Some(mac), None) => edits.insert(node, &format!("<mac address={}/>", quoted(mac))),
        (None, _) => {}
    }
    match (&wanted.model, child(node, "model")) {
        (Some(model), Some(old)) => edits.set_attribute(old, "type", model),
        (Some(model), None) => edits.insert(node, &format!("<model type={}/>", quoted(model))),
        (None, _) => {}
    }
    let Some(network) = &wanted.network else { return };
    if interface(node).network.as_ref() == Some(network) {
        return;
    }
    let (kind, source) = plug(network);
    edits.set_attribute(node, "type", kind);
    match source {
        Some(source) => edits.set_child(node, "source", source),
        None => children(node, "source").for_each(|old| edits.remove(old)),
    }
    // These were of the old place.
    for name in ["virtualport", "target", "portForward"] {
        children(node, name).for_each(|old| edits.remove(old));
    }
}

fn new_interface(wanted: &Interface) -> Option<String> {
    if is_unplugged(wanted) {
        return None;
    }
    let (kind, source) = plug(wanted.network.as_deref().unwrap_or("user"));
    let mac = wanted.mac.as_deref().map(|mac| format!("<mac address={}/>", quoted(mac))).unwrap_or_default();
    let model = quoted(wanted.model.as_deref().unwrap_or("virtio"));
    let source = source.unwrap_or_default();
    Some(format!("<interface type={}>{mac}{source}<model type={model}/></interface>", quoted(kind)))
}

/// The type of an interface that is plugged into `network`, and its `source` if it has one.
fn plug(network: &str) -> (&str, Option<String>) {
    let (kind, name) = network.split_once(':').unwrap_or((network, ""));
    match kind {
        "network" | "bridge" => (kind, Some(format!("<source {kind}={}/>", quoted(name)))),
        "direct" => (kind, Some(format!("<source dev={} mode='bridge'/>", quoted(name)))),
        // Other vendors' words for what leads out through the host, or nowhere we know.
        _ => ("user", None),
    }
}

/// A plain domain for a machine that was captured from another vendor; what the neutral words know is edited in.
fn skeleton(machine: &Machine, kvm: bool) -> String {
    let kind = if kvm { "kvm" } else { "qemu" };
    let board = quoted(machine.board.as_deref().unwrap_or("q35"));
    let arch = quoted(machine.architecture.as_deref().unwrap_or("x86_64"));
    let uefi = if matches!(machine.firmware, Firmware::Uefi { .. }) { " firmware='efi'" } else { "" };
    let mut kernel = String::new();
    if let Firmware::Kernel { kernel: path, initrd, arguments } = &machine.firmware {
        let parts = [("kernel", Some(path)), ("initrd", initrd.as_ref()), ("cmdline", arguments.as_ref())];
        for (name, text) in parts.into_iter().filter_map(|(name, text)| Some((name, text?))) {
            kernel.push_str(&format!("<{name}>{}</{name}>", escaped(text)));
        }
    }
    format!(
        "<domain type='{kind}'><name/><memory unit='MiB'>1024</memory><vcpu>1</vcpu>\
         <os{uefi}><type arch={arch} machine={board}>hvm</type>{kernel}</os><features><acpi/></features><devices>\
         <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
         <serial type='pty'/></devices></domain>"
    )
}

/// The element, in the document's metadata, of a machine that was defined from here.
const MADE: &str = "<made xmlns='https://mainstay.invalid/machine'/>";

/// Notes in the document that the machine was defined from here, and may be taken away again.
pub(in crate::vm) fn mark_as_made(text: &str) -> Result<String> {
    if made_here(text) {
        return Ok(text.to_owned());
    }
    let document = open(text)?;
    let domain = document.root_element();
    let mut edits = Edits::default();
    match child(domain, "metadata") {
        Some(metadata) if metadata.first_child().is_some() => edits.insert(metadata, MADE),
        Some(metadata) => edits.replace(metadata.range(), format!("<metadata>{MADE}</metadata>")),
        None => edits.insert(domain, &format!("<metadata>{MADE}</metadata>")),
    }
    Ok(edits.apply(text))
}

pub(in crate::vm) fn made_here(text: &str) -> bool {
    let document = open(text);
    document.is_ok_and(|document| {
        let metadata = child(document.root_element(), "metadata");
        metadata.is_some_and(|metadata| {
            metadata.children().any(|node| node.has_tag_name(("https://mainstay.invalid/machine", "made")))
        })
    })
}
