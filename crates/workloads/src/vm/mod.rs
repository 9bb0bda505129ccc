//! Virtual machines: their disks, as of one moment, and what they are made of.

mod agent;
mod channel;
mod domain_xml;
mod endpoint;
mod folder;
mod guard;
mod hypervisor;
mod image_lock;
mod libvirt;
mod machine;
mod mark;
mod offline;
mod overwrite;
mod qemu;
mod qmp;
mod run_dir;
mod shape;
mod source;
pub mod sprawl;
pub mod spread;
mod stage;
mod watch;

/// The name of this kind of workload.
pub const KIND: &str = "vm";

pub use endpoint::Endpoint;
pub use folder::Folder;
pub use guard::{GuardProgram, attend, attend_at_standard_streams};
pub use hypervisor::{
    BitmapSeen, Caps, DiskMode, DiskPlace, DiskSnapshot, DiskSummary, Hypervisor, MachineId, MachineSnapshot,
    MachineState, MachineSummary, Owner, SnapshotRequest, SnapshotSeen, Swept, guest_answers, guest_shell,
};
pub use libvirt::LibvirtHost;
pub use machine::{Console, Firmware, Interface, Machine, MachineDisk, RawDocument, RawKind};
pub use mainstay_nbd::Address;
pub use mark::{DiskMark, Marks};
pub use overwrite::Overwrite;
pub use qemu::{
    Accelerator, Emulator, EmulatorPlan, Link, Place, QemuHost, QemuMachine, Received, Run, is_home,
    marks_of, overlay,
};
pub use shape::{Identity, Random, Shape};
pub use source::{DISKS, MACHINE, NVRAM, VmSource, disk_path};
pub use stage::Stage;
