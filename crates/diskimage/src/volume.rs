//! Volumes: what can hold a file system. Partitions, whole disks, logical volumes of LVM, and what LUKS encrypts.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use mainstay_core::{Blocks, Result};
use zeroize::Zeroizing;

use crate::compose::Window;
use crate::partition::{PartitionKind, partitions};

/// What opens an encrypted volume. Wiped when dropped.
pub enum Secret {
    /// What a person types, or the content of a key file.
    Passphrase(Zeroizing<Vec<u8>>),
    /// The key that the data is encrypted with, as `cryptsetup luksDump --dump-volume-key` shows it.
    VolumeKey(Zeroizing<Vec<u8>>),
}

/// Names a volume while its key is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct VolumeId {
    /// As [`Volume::name`].
    pub name: String,
    /// Of the encryption's header; lower case.
    pub uuid: Option<String>,
}

/// The volumes of a machine's disks.
pub struct Layout {
    /// By disk and place on it; logical volumes behind all partitions, by name.
    pub volumes: Vec<Volume>,
    /// What could not be understood, and what is odd, each a sentence.
    pub notes: Vec<String>,
}

/// Something that may hold a file system.
pub struct Volume {
    /// Stable while the disks keep their order: `vda`, `vda1`, or `group/volume` as LVM calls it.
    pub name: String,
    pub kind: VolumeKind,
    /// Of the partition table; a file system has its own.
    pub label: Option<String>,
    /// Of the partition, the logical volume or the encryption's header, whichever is innermost; lower case.
    pub uuid: Option<String>,
    /// The content: in plain if it was encrypted and a key was given.
    pub blocks: Arc<dyn Blocks>,
    pub encryption: Encryption,
    place: Arc<dyn OnDisks>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeKind {
    /// A disk without a partition table.
    Disk,
    Partition(PartitionKind),
    /// Of LVM.
    Logical,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    None,
    /// [`Volume::blocks`] is the decrypted content; the disks hold other bytes at the same places.
    Unlocked,
    /// No key was given: [`Volume::blocks`] is what lies on the disks.
    Locked,
}

impl Volume {
    /// Where bytes of the volume lie, in order: the index of the disk and the bytes there. What lies beyond the end,
    /// and what lies on a missing disk, is left out.
    pub fn on_disk(&self, range: Range<u64>) -> Vec<(usize, Range<u64>)> {
        let range = range.start..range.end.min(self.blocks.size());
        let mut places = Vec::new();
        if !range.is_empty() {
            self.place.add(range, &mut places);
        }
        places
    }
}

impl fmt::Debug for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Volume")
            .field("name", &self.name)
            .field("kind", &self.kind)
            .field("label", &self.label)
            .field("uuid", &self.uuid)
            .field("size", &self.blocks.size())
            .field("encryption", &self.encryption)
            .finish_non_exhaustive()
    }
}

/// Tells where the bytes of a volume lie.
trait OnDisks: Send + Sync {
    fn add(&self, range: Range<u64>, places: &mut Vec<(usize, Range<u64>)>);
}

/// A stretch of one disk that begins at byte `start` of it.
struct Stretch {
    disk: usize,
    start: u64,
}

impl OnDisks for Stretch {
    fn add(&self, range: Range<u64>, places: &mut Vec<(usize, Range<u64>)>) {
        places.push((self.disk, range.start + self.start..range.end + self.start));
    }
}

/// Finds the volumes of disks that belong together. `keys` is asked for each encrypted volume.
///
/// What cannot be understood is a note; only reading itself fails.
pub fn volumes(disks: &[Arc<dyn Blocks>], keys: &dyn Fn(&VolumeId) -> Option<Secret>) -> Result<Layout> {
    let _not_yet = keys;
    let mut layout = Layout { volumes: Vec::new(), notes: Vec::new() };
    for (number, disk) in disks.iter().enumerate() {
        let name = disk_name(number);
        let table = partitions(&**disk)?;
        layout.notes.extend(table.notes.iter().map(|note| format!("{name}: {note}")));
        if table.partitions.is_empty() {
            layout.volumes.push(Volume {
                name,
                kind: VolumeKind::Disk,
                label: None,
                uuid: None,
                blocks: Arc::clone(disk),
                encryption: Encryption::None,
                place: Arc::new(Stretch { disk: number, start: 0 }),
            });
            continue;
        }
        for partition in table.partitions {
            layout.volumes.push(Volume {
                name: format!("{name}{}", partition.number),
                kind: VolumeKind::Partition(partition.kind),
                label: partition.label,
                uuid: partition.uuid,
                place: Arc::new(Stretch { disk: number, start: partition.range.start }),
                blocks: Arc::new(Window::new(Arc::clone(disk), partition.range)?),
                encryption: Encryption::None,
            });
        }
    }
    Ok(layout)
}

/// The name that Linux would give the virtual disk of this number: `vda` to `vdz`, then `vdaa`.
pub fn disk_name(number: usize) -> String {
    let mut letters = Vec::new();
    let mut rest = number + 1;
    while rest > 0 {
        letters.push(b'a' + ((rest - 1) % 26) as u8);
        rest = (rest - 1) / 26;
    }
    let letters: String = letters.iter().rev().map(|letter| char::from(*letter)).collect();
    format!("vd{letters}")
}

#[cfg(test)]
mod tests {
    use super::disk_name;

    #[test]
    fn disks_are_named_as_linux_names_them() {
        assert_eq!([0, 25, 26, 701, 702].map(disk_name), ["vda", "vdz", "vdaa", "vdzz", "vdaaa"]);
    }
}
