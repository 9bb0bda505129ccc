//! The disks of a running QEMU, as its monitor shows them.

use std::path::{Path, PathBuf};

use mainstay_core::{Code, Error, Result};
use serde::Deserialize;
use serde_json::json;

use crate::vm::channel::clean;
use crate::vm::qmp::Qmp;

/// The deepest chain of backing images that is followed.
const DEPTH_MAX: usize = 64;

/// A disk that the guest can write to.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    pub(super) name: String,
    /// The device that the guest sees, as QEMU calls it; a storage daemon has none.
    pub(super) device: Option<String>,
    pub(super) node: Node,
}

/// A node of QEMU's block graph.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Node {
    pub(super) node_name: String,
    pub(super) drv: String,
    pub(super) ro: bool,
    #[serde(default)]
    pub(super) file: String,
    pub(super) image: Image,
    #[serde(default)]
    pub(super) dirty_bitmaps: Vec<Bitmap>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Image {
    pub(super) virtual_size: u64,
    #[serde(default)]
    filename: String,
    format_specific: Option<FormatSpecific>,
    backing_image: Option<Box<Self>>,
    #[serde(default)]
    pub(super) snapshots: Vec<Internal>,
}

/// A snapshot inside an image.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Internal {
    pub(super) name: String,
    pub(super) date_sec: i64,
}

#[derive(Clone, Debug, Deserialize)]
struct FormatSpecific {
    #[serde(default)]
    data: FormatData,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct FormatData {
    /// Of qcow2: `1.1` since it can keep bitmaps.
    compat: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Bitmap {
    /// Empty for those of QEMU's own jobs.
    #[serde(default)]
    pub(super) name: String,
    pub(super) granularity: u64,
    #[serde(default)]
    pub(super) recording: bool,
    #[serde(default)]
    pub(super) busy: bool,
    #[serde(default)]
    pub(super) inconsistent: bool,
}

#[derive(Deserialize)]
struct BlockDevice {
    #[serde(default)]
    device: String,
    qdev: Option<String>,
    inserted: Option<Node>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BlockExport {
    id: String,
    node_name: String,
}

impl Node {
    pub(super) fn bitmap(&self, name: &str) -> Option<&Bitmap> {
        self.dirty_bitmaps.iter().find(|bitmap| bitmap.name == name)
    }

    /// Whether bitmaps outlive the process.
    pub(super) fn keeps_bitmaps(&self) -> bool {
        let compat = self.image.format_specific.as_ref().and_then(|format| format.data.compat.as_deref());
        self.drv == "qcow2" && compat.is_some_and(|compat| compat != "0.10")
    }

    /// The images below, nearest first.
    pub(super) fn backing(&self) -> Vec<PathBuf> {
        let first = self.image.backing_image.as_deref();
        let chain = std::iter::successors(first, |image| image.backing_image.as_deref());
        chain.take(DEPTH_MAX).map(|image| PathBuf::from(&image.filename)).collect()
    }

    /// The inode of its image, if that is a file that can be looked at from here.
    pub(super) fn inode(&self) -> Option<u64> {
        use std::os::unix::fs::MetadataExt as _;
        std::fs::metadata(Path::new(&self.file)).ok().map(|metadata| metadata.ino())
    }
}

/// Every disk that the guest can write to, in QEMU's order.
pub(super) fn disks(qmp: &mut Qmp) -> Result<Vec<Disk>> {
    let devices: Vec<BlockDevice> = qmp.ask("query-block", json!({}))?;
    let mut disks = Vec::new();
    for device in devices {
        let Some(node) = device.inserted.filter(|node| !node.ro) else { continue };
        let id = device.qdev.as_deref().map(device_id).filter(|id| !id.is_empty());
        let name = id.or(Some(&device.device)).filter(|name| !name.is_empty()).unwrap_or(&node.node_name);
        disks.push(Disk { name: item_name(name), device: device.qdev.clone(), node });
    }
    if disks.is_empty() {
        disks = exported(qmp)?;
    }
    let mut names: Vec<_> = disks.iter().map(|disk| &disk.name).collect();
    names.sort_unstable();
    if names.windows(2).any(|pair| matches!(pair, [one, other] if one == other)) {
        return Err(Error::new(Code::Unsupported, "two disks of the machine have one name")
            .hint("give each -device an id of its own"));
    }
    Ok(disks)
}

/// The devices, as QEMU calls them, and the node that each uses.
pub(super) fn drives(qmp: &mut Qmp) -> Result<Vec<(String, String)>> {
    let devices: Vec<BlockDevice> = qmp.ask("query-block", json!({}))?;
    let drive = |device: BlockDevice| Some((device.qdev?, device.inserted?.node_name));
    Ok(devices.into_iter().filter_map(drive).collect())
}

/// The disks of a storage daemon: what it exports to machines that run elsewhere.
fn exported(qmp: &mut Qmp) -> Result<Vec<Disk>> {
    let exports: Vec<BlockExport> = qmp.ask("query-block-exports", json!({}))?;
    let nodes: Vec<Node> = qmp.ask("query-named-block-nodes", json!({}))?;
    let wanted = |node: &Node| {
        let mut of = exports.iter().filter(|export| export.node_name == node.node_name);
        !node.ro && of.any(|export| !export.id.starts_with(super::PREFIX))
    };
    let disk = |node: Node| Disk { name: item_name(&node.node_name), device: None, node };
    let mut disks: Vec<Disk> = nodes.into_iter().filter(wanted).map(disk).collect();
    disks.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(disks)
}

/// The id in a path such as `/machine/peripheral/disk0/virtio-backend`.
fn device_id(path: &str) -> &str {
    let mut parts = path.split('/').filter(|part| !part.is_empty());
    let named = parts.by_ref().find(|part| matches!(*part, "peripheral" | "peripheral-anon"));
    match named {
        Some(_) => parts.next().unwrap_or_default(),
        None => path.rsplit('/').next().unwrap_or_default(),
    }
}

/// A name that may be the name of an item.
fn item_name(name: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '.');
    let name: String = clean(name).chars().map(|letter| if plain(letter) { letter } else { '_' }).collect();
    if name.chars().all(|letter| letter == '.') { format!("disk{name}") } else { name }
}

#[cfg(test)]
mod tests {
    use super::{device_id, item_name};

    #[test]
    fn names_of_disks_are_those_people_gave_and_can_be_items() {
        assert_eq!(device_id("/machine/peripheral/vd0/virtio-backend"), "vd0");
        assert_eq!(device_id("/machine/peripheral/sd1"), "sd1");
        assert_eq!(device_id("/machine/peripheral-anon/device[3]"), "device[3]");
        assert_eq!(device_id("vd0"), "vd0");
        assert_eq!(item_name("device[3]"), "device_3_");
        assert_eq!(item_name("#block12"), "_block12");
        for hostile in ["", ".", "..", "../../etc", "a\0b"] {
            mainstay_core::ItemPath::root().join(item_name(hostile).as_bytes()).map(drop).unwrap();
            assert!(!item_name(hostile).is_empty());
        }
    }
}
