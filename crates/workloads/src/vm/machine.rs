//! What a machine is made of, in words that are no vendor's, beside the vendor's own document.

use serde::{Deserialize, Serialize};

use mainstay_core::{Error, Result};

use super::hypervisor::MachineId;

/// The only version there is.
const VERSION: u32 = 1;

/// The longest document that is read, in bytes.
const DOCUMENT_MAX: usize = 16 << 20;

/// The most that a firmware keeps, in bytes; the largest known is 64 MiB.
const NVRAM_MAX: u64 = 64 << 20;

/// A machine's configuration. What the neutral words do not know is in [`Machine::raw`] and comes back from there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Machine {
    pub version: u32,
    pub id: MachineId,
    pub name: String,
    /// Virtual processors.
    pub cpus: Option<u32>,
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// `x86_64`, `aarch64`.
    pub architecture: Option<String>,
    /// The board: `q35`, `pc-i440fx-9.2`.
    pub board: Option<String>,
    /// The processor model: `host`, `qemu64`.
    pub cpu_model: Option<String>,
    pub firmware: Firmware,
    pub disks: Vec<MachineDisk>,
    pub interfaces: Vec<Interface>,
    pub consoles: Vec<Console>,
    /// Whether the guest can be spoken to.
    pub agent: bool,
    /// Not part of the neutral document: it is an item of its own.
    #[serde(skip)]
    pub raw: Option<RawDocument>,
    /// The variables of the firmware, likewise.
    #[serde(skip)]
    pub nvram: Option<Vec<u8>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Firmware {
    #[default]
    Bios,
    Uefi {
        /// The code, a path on the host.
        loader: Option<String>,
        /// The variables of this machine, a path on the host.
        nvram: Option<String>,
        secure_boot: bool,
    },
    /// The host starts a kernel itself.
    Kernel { kernel: String, initrd: Option<String>, arguments: Option<String> },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MachineDisk {
    /// Unique in the machine, and the name of its item: `vda`.
    pub name: String,
    /// `virtio`, `scsi`, `sata`, `ide`, `nvme`, `usb`.
    pub bus: Option<String>,
    /// `raw` or `qcow2`.
    pub format: String,
    pub serial: Option<String>,
    /// 1 is tried first.
    pub boot_order: Option<u32>,
    /// Bytes the guest sees.
    pub size: Option<u64>,
    /// A path on the host; for what has none, the vendor's words.
    pub source: String,
    /// A disk that does not change, or is not to be captured (a CD, a shared disk).
    pub read_only: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Interface {
    pub mac: Option<String>,
    /// `virtio`, `e1000e`.
    pub model: Option<String>,
    /// What it is plugged into: `network:default`, `bridge:br0`, `user`.
    pub network: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Console {
    /// `serial`, `vnc`, `spice`, `virtio`.
    pub kind: String,
    /// Where it leads, in the vendor's words.
    pub target: Option<String>,
}

/// The vendor's own description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawDocument {
    pub kind: RawKind,
    pub text: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawKind {
    /// A `domain` document of libvirt.
    LibvirtXml,
    /// What QEMU's monitor and its arguments say.
    QemuJson,
}

impl RawKind {
    /// The name of its item.
    pub const fn item(self) -> &'static str {
        match self {
            Self::LibvirtXml => "machine.xml",
            Self::QemuJson => "qemu.json",
        }
    }
}

impl Machine {
    pub fn new(id: MachineId, name: impl Into<String>) -> Self {
        Self {
            version: VERSION,
            id,
            name: name.into(),
            cpus: None,
            memory: None,
            architecture: None,
            board: None,
            cpu_model: None,
            firmware: Firmware::Bios,
            disks: Vec::new(),
            interfaces: Vec::new(),
            consoles: Vec::new(),
            agent: false,
            raw: None,
            nvram: None,
        }
    }

    /// Takes the variables of the firmware in, if they are in a file that can be read from here.
    pub(super) fn read_nvram(&mut self) {
        let Firmware::Uefi { nvram: Some(path), .. } = &self.firmware else { return };
        let small = |metadata: std::fs::Metadata| metadata.is_file() && metadata.len() <= NVRAM_MAX;
        if std::fs::metadata(path).is_ok_and(small) {
            self.nvram = std::fs::read(path).ok();
        }
    }

    /// The neutral document.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec_pretty(self)
            .map_err(|error| Error::bug("cannot describe a machine").because(error))
    }

    /// Errors: [`mainstay_core::Code::TooNew`] for a version that is not known,
    /// [`mainstay_core::Code::Integrity`] for what is no such document.
    pub fn from_json(text: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let strange =
            |error| Error::integrity("the description of the machine makes no sense").because(error);
        if text.len() > DOCUMENT_MAX {
            return Err(Error::integrity("the description of the machine is too long"));
        }
        let head: Head = serde_json::from_slice(text).map_err(strange)?;
        if head.version > VERSION {
            let what = format!("the description of the machine has version {}", head.version);
            return Err(Error::new(mainstay_core::Code::TooNew, what));
        }
        serde_json::from_slice(text).map_err(strange)
    }
}
