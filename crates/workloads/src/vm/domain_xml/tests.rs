use super::*;
use crate::vm::hypervisor::DiskPlace;

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
    let same = parse(&write(&machine, &[], true).unwrap()).unwrap();
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
    let text = write(&other, std::slice::from_ref(&place), true).unwrap();
    let mut read = parse(&text).unwrap();
    (other.disks[0].source, other.disks[0].format) = ("/new & /a.raw".into(), "raw".into());
    (other.raw, read.raw) = (None, None);
    assert_eq!(read, other);
    for kept in ["<q:mine anything='kept'/>", "placement='static'", "secure='yes'", "<serial>S1</serial>"] {
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
    let read = parse(&write(&machine, &[place], true).unwrap()).unwrap();
    assert_eq!((read.name, read.cpus, read.memory), (machine.name.clone(), machine.cpus, machine.memory));
    assert_eq!(read.disks[0].source, "/x.qcow2");
    assert_eq!(read.interfaces[0].mac, machine.interfaces[0].mac);

    // Where KVM does not work there is no host's processor to pass on.
    machine.cpu_model = Some("host".into());
    let with = |kvm| write(&machine, &[], kvm).unwrap();
    assert!(with(true).contains("type='kvm'") && with(true).contains("host-passthrough"));
    assert!(with(false).contains("<domain type='qemu'>") && with(false).contains("mode='maximum'"));
}

/// A document with everything that a plain change of shape would leave behind.
const RICH: &str = "<domain type='kvm'><name>db</name><uuid>1b2c3d4e-0000-4000-8000-000000000009</uuid>
  <genid>1b2c3d4e-0000-4000-8000-00000000000a</genid>
  <memory unit='GiB'>2</memory>
  <vcpu current='2'>4</vcpu><vcpus><vcpu id='0' enabled='yes'/></vcpus>
  <cputune><shares>7</shares><vcpupin vcpu='3' cpuset='5'/></cputune>
  <sysinfo type='smbios'><system><entry name='serial'>kept</entry><entry name='uuid'>1b2c3d4e-0000-4000-8000-000000000009</entry></system></sysinfo>
  <os firmware='efi'><type arch='x86_64' machine='q35'>hvm</type><nvram>/vars/db.fd</nvram></os>
  <cpu mode='custom'><model>qemu64</model><topology sockets='1' cores='4' threads='1'/><numa><cell id='0' cpus='0-3' memory='2' unit='GiB'/></numa></cpu>
  <devices>
    <disk type='network' device='disk'><auth username='u'><secret type='ceph'/></auth><source protocol='rbd' name='pool/a'/><target dev='vda' bus='virtio'/></disk>
    <disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/><source file='/b'/><target dev='vdb' bus='virtio'/><address type='pci' slot='0x07'/></disk>
    <interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/></interface>
    <interface type='bridge'><mac address='52:54:00:00:00:02'/><source bridge='br0'/><virtualport type='openvswitch'/><target dev='tap3'/><model type='e1000e'/></interface>
    <serial type='file'><source path='/log/db'/></serial><console type='pty'/>
    <channel type='unix'><source mode='bind' path='/run/db.agent'/><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <graphics type='vnc' port='5901' autoport='no' listen='127.0.0.1'/>
    <vsock model='virtio'><cid auto='no' address='9'/></vsock>
  </devices>
</domain>";

#[test]
fn what_is_not_changed_stays_to_the_letter() {
    for text in [XML, RICH] {
        let machine = parse(text).unwrap();
        assert_eq!(write(&machine, &[], true).unwrap(), text.replace(" id='7'", " "));
    }
}

#[test]
fn another_shape_leaves_nothing_behind_that_was_meant_for_the_old_one() {
    let machine = parse(RICH).unwrap();
    let mut other = machine.clone();
    (other.cpus, other.memory, other.cpu_model) = (Some(2), Some(1 << 30), Some("Haswell".into()));
    let text = write(&Machine { cpu_model: machine.cpu_model.clone(), ..other.clone() }, &[], true).unwrap();
    for gone in ["current=", "<vcpus>", "vcpupin", "topology", "<numa>", "unit='GiB'"] {
        assert!(!text.contains(gone), "{gone}: {text}");
    }
    assert!(text.contains("<shares>7</shares>") && text.contains("<model>qemu64</model>"), "{text}");
    let read = parse(&write(&other, &[], true).unwrap()).unwrap();
    assert_eq!(
        (read.cpus, read.memory, read.cpu_model.as_deref()),
        (Some(2), Some(1 << 30), Some("Haswell"))
    );
    // The same identity keeps sockets, logs and the firmware's variables where they were.
    assert_eq!(text.matches("/run/db.agent").count() + text.matches("/vars/db.fd").count(), 2, "{text}");
}

#[test]
fn disks_and_networks_are_plugged_into_what_is_asked_for() {
    let mut machine = parse(RICH).unwrap();
    machine.disks[1].bus = Some("scsi".into());
    machine.disks.push(MachineDisk { name: "disk.qcow2".into(), bus: None, ..machine.disks[1].clone() });
    machine.interfaces[0].network = Some("none".into());
    machine.interfaces[1].network = Some("network:lab".into());
    machine.interfaces.push(Interface { mac: None, model: None, network: Some("direct:eth1".into()) });
    let places = ["vda", "vdb", "disk.qcow2"].map(|name| DiskPlace {
        name: name.into(),
        path: format!("/new/{name}").into(),
        format: "qcow2".into(),
    });
    let text = write(&machine, &places, true).unwrap();
    for gone in ["auth", "rbd", "slot=", "network='default'", "00:01", "openvswitch", "tap3", "br0"] {
        assert!(!text.contains(gone), "{gone}: {text}");
    }
    for there in [
        "<driver name='qemu' type='qcow2'/><source file='/new/vda'/>",
        "<driver name='qemu' type='qcow2' cache='none'/><source file='/new/vdb'/><target dev='vdb' bus='scsi'/>",
        "<source file='/new/disk.qcow2'/><target dev='vdc' bus='virtio'/>",
        "model='virtio-scsi'",
        "<source network='lab'/>",
        "<source dev='eth1' mode='bridge'/>",
    ] {
        assert!(text.contains(there), "{there}: {text}");
    }
    let read = parse(&text).unwrap();
    assert_eq!(read.interfaces[0].network.as_deref(), Some("network:lab"));
    assert_eq!(read.interfaces[0].mac, machine.interfaces[1].mac);
    machine.interfaces[1].network = Some("user".into());
    let text = write(&machine, &places, true).unwrap();
    assert!(text.contains("<interface type='user'><mac address='52:54:00:00:00:02'/>"), "{text}");
}

#[test]
fn another_machine_shares_nothing_with_the_first() {
    let mut machine = parse(RICH).unwrap();
    machine.id = MachineId("1b2c3d4e-0000-4000-8000-0000000000ff".into());
    machine.name = "db2".into();
    machine.firmware = Firmware::Uefi { loader: None, nvram: None, secure_boot: false };
    let text = write(&machine, &[], true).unwrap();
    let old =
        ["0000009<", "00000000000a", "/run/db.agent", "'/log/db'", "5901", "address='9'", "/vars/", "tap3"];
    for gone in old {
        assert!(!text.contains(gone), "{gone}: {text}");
    }
    for there in
        ["<entry name='uuid'>1b2c3d4e-0000-4000-8000-0000000000ff<", "'/log/db.db2'", "<genid/>", "kept"]
    {
        assert!(text.contains(there), "{there}: {text}");
    }
    machine.firmware = Firmware::Uefi { loader: None, nvram: Some("/new/vars".into()), secure_boot: false };
    assert!(write(&machine, &[], true).unwrap().contains("<nvram>/new/vars</nvram>"));
}

/// The neutral document and the vendor's come out of a point, which somebody else may have written.
#[test]
fn hostile_words_stay_words() {
    let evil = "'/><disk device=\"x\"/>&amp;<!--";
    let mut machine = parse(RICH).unwrap();
    (machine.name, machine.cpu_model) = (evil.into(), Some(evil.into()));
    machine.disks[0].bus = Some(evil.into());
    machine.interfaces[0] = Interface {
        mac: Some(evil.into()),
        model: Some(evil.into()),
        network: Some(format!("bridge:{evil}")),
    };
    let place = DiskPlace { name: "vda".into(), path: evil.into(), format: evil.into() };
    for raw in [machine.raw.clone(), None] {
        machine.raw = raw;
        let text = write(&machine, std::slice::from_ref(&place), true).unwrap();
        let read = parse(&text).unwrap();
        assert_eq!((read.name.as_str(), read.disks.len(), read.interfaces.len()), (evil, 2, 2), "{text}");
        assert_eq!(read.interfaces[0].network, machine.interfaces[0].network);
    }
    machine.raw = Some(RawDocument { kind: RawKind::LibvirtXml, text: b"<domain><name>\xff".to_vec() });
    assert_eq!(write(&machine, &[], true).unwrap_err().code(), mainstay_core::Code::Integrity);
    for text in ["", "{", "[]", "{\"version\":1}", "{\"version\":1,\"disks\":[{}]}"] {
        let error = Machine::from_json(text.as_bytes()).unwrap_err();
        assert_eq!(error.code(), mainstay_core::Code::Integrity, "{text}");
    }
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
