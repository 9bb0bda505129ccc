//! Volumes: what can hold a file system. Partitions, whole disks, logical volumes of LVM, and what LUKS encrypts.

mod luks;
mod lvm;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use mainstay_core::{Blocks, Code, Error, Result};
use zeroize::Zeroizing;

use crate::bytes;
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
    /// Where bytes of the volume lie, in order: the index of the disk and the bytes there. What lies beyond the end of
    /// the volume or of a disk is left out. On a striped volume a long range lies in very many places.
    pub fn on_disk(&self, range: Range<u64>) -> Vec<(usize, Range<u64>)> {
        let mut places = Vec::new();
        self.each_on_disk(range, &mut |disk, range| places.push((disk, range)));
        places
    }

    /// As [`Volume::on_disk`], one place after the other.
    pub fn each_on_disk(&self, range: Range<u64>, put: &mut dyn FnMut(usize, Range<u64>)) {
        let range = range.start..range.end.min(self.blocks.size());
        if !range.is_empty() {
            self.place.each(range, put);
        }
    }

    /// The stretches of disks that the volume lies on, in no order; few, even when it is striped.
    pub fn occupied(&self) -> Vec<(usize, Range<u64>)> {
        let mut places = Vec::new();
        self.place.occupied(0..self.blocks.size(), &mut |disk, range| places.push((disk, range)));
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
    /// The places of `range`, in order.
    fn each(&self, range: Range<u64>, put: &mut dyn FnMut(usize, Range<u64>));

    /// As [`OnDisks::each`], but in fewer pieces and in any order.
    fn occupied(&self, range: Range<u64>, put: &mut dyn FnMut(usize, Range<u64>)) {
        self.each(range, put);
    }
}

/// A stretch of one disk, in bytes of it.
struct Stretch {
    disk: usize,
    range: Range<u64>,
}

impl OnDisks for Stretch {
    fn each(&self, range: Range<u64>, put: &mut dyn FnMut(usize, Range<u64>)) {
        // Metadata may speak of more than there is.
        let end = range.end.saturating_add(self.range.start).min(self.range.end);
        let start = range.start.saturating_add(self.range.start);
        if start < end {
            put(self.disk, start..end);
        }
    }
}

/// The place of a volume that begins `by` bytes into another.
struct Shifted {
    place: Arc<dyn OnDisks>,
    by: u64,
}

impl Shifted {
    fn of(&self, range: &Range<u64>) -> Range<u64> {
        range.start.saturating_add(self.by)..range.end.saturating_add(self.by)
    }
}

impl OnDisks for Shifted {
    fn each(&self, range: Range<u64>, put: &mut dyn FnMut(usize, Range<u64>)) {
        self.place.each(self.of(&range), put);
    }

    fn occupied(&self, range: Range<u64>, put: &mut dyn FnMut(usize, Range<u64>)) {
        self.place.occupied(self.of(&range), put);
    }
}

/// Finds the volumes of disks that belong together. `keys` is asked for each encrypted volume.
///
/// What cannot be understood is a note; only reading itself fails.
pub fn volumes(disks: &[Arc<dyn Blocks>], keys: &dyn Fn(&VolumeId) -> Option<Secret>) -> Result<Layout> {
    let mut search = Search { keys, volumes: Vec::new(), physical: Vec::new(), notes: Vec::new() };
    for (number, disk) in disks.iter().enumerate() {
        search.disk(number, disk)?;
    }
    let physical = std::mem::take(&mut search.physical);
    for volume in lvm::logical(physical, &mut search.notes) {
        search.add(volume, true)?;
    }
    Ok(Layout { volumes: search.volumes, notes: search.notes })
}

/// Volumes while they are looked for.
struct Search<'a> {
    keys: &'a dyn Fn(&VolumeId) -> Option<Secret>,
    volumes: Vec<Volume>,
    /// Those that LVM makes other volumes of.
    physical: Vec<lvm::Physical>,
    notes: Vec<String>,
}

impl Search<'_> {
    fn disk(&mut self, number: usize, disk: &Arc<dyn Blocks>) -> Result<()> {
        let name = disk_name(number);
        let table = partitions(&**disk);
        let table = self.noted(&name, "its partition table cannot be read", table)?.unwrap_or_default();
        self.notes.extend(table.notes.iter().map(|note| format!("{name}: {note}")));
        if table.partitions.is_empty() {
            let volume = Volume {
                name,
                kind: VolumeKind::Disk,
                label: None,
                uuid: None,
                blocks: Arc::clone(disk),
                encryption: Encryption::None,
                place: Arc::new(Stretch { disk: number, range: 0..disk.size() }),
            };
            return self.add(volume, false);
        }
        if table.partitions.iter().any(|partition| is_dynamic(&partition.kind)) {
            self.notes.push(format!("{name} is a dynamic disk of Windows, whose volumes are not read."));
        }
        for partition in table.partitions {
            let volume = Volume {
                name: format!("{name}{}", partition.number),
                kind: VolumeKind::Partition(partition.kind),
                label: partition.label,
                uuid: partition.uuid,
                place: Arc::new(Stretch { disk: number, range: partition.range.clone() }),
                blocks: Arc::new(Window::new(Arc::clone(disk), partition.range)?),
                encryption: Encryption::None,
            };
            self.add(volume, false)?;
        }
        Ok(())
    }

    /// Unlocks a volume if need be, and keeps it: for LVM, unless it came from there, or as what it is.
    fn add(&mut self, volume: Volume, logical: bool) -> Result<()> {
        let volume = self.unlock(volume)?;
        let label = lvm::label(&*volume.blocks);
        match self.noted(&volume.name, "LVM's label cannot be read", label)?.flatten() {
            Some(label) if !logical => {
                self.physical.push(lvm::Physical::read(volume, label, &mut self.notes));
                return Ok(());
            }
            Some(_) => self.notes.push(format!("{}: LVM on a logical volume is not followed.", volume.name)),
            None => {}
        }
        let told = told(&*volume.blocks);
        if let Some(told) = self.noted(&volume.name, "its first bytes cannot be read", told)?.flatten() {
            self.notes.push(format!("{} is {told}, which is not read.", volume.name));
        }
        self.volumes.push(volume);
        Ok(())
    }

    /// The volume as LUKS hides it, or as it is.
    fn unlock(&mut self, mut volume: Volume) -> Result<Volume> {
        let header = luks::header(&*volume.blocks);
        let broken = header.is_err();
        let Some(luks) = self.noted(&volume.name, "its encryption cannot be read", header)?.flatten() else {
            if broken {
                volume.encryption = Encryption::Locked;
            }
            return Ok(volume);
        };
        volume.encryption = Encryption::Locked;
        volume.uuid = Some(luks.uuid.clone());
        volume.label = luks.label.clone().or(volume.label);
        let id = VolumeId { name: volume.name.clone(), uuid: volume.uuid.clone() };
        let Some(secret) = (self.keys)(&id) else { return Ok(volume) };
        let unlocked = luks.unlock(&volume.blocks, &secret);
        match self.noted(&volume.name, "it cannot be unlocked", unlocked)? {
            Some(Some(plain)) => {
                volume.blocks = Arc::new(plain);
                volume.place = Arc::new(Shifted { place: volume.place, by: luks.start() });
                volume.encryption = Encryption::Unlocked;
            }
            Some(None) => {
                self.notes.push(format!("{}: the key that was given does not open it.", volume.name));
            }
            None => {}
        }
        Ok(volume)
    }

    /// What cannot be understood becomes a note and `None`.
    fn noted<T>(&mut self, name: &str, what: &str, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) if understanding(&error) => {
                self.notes.push(format!("{name}: {what}: {}.", error.chain().join(": ")));
                Ok(None)
            }
            Err(error) => Err(error.during(format!("cannot read {name}"))),
        }
    }
}

/// Whether an error is about the bytes rather than about getting them.
fn understanding(error: &Error) -> bool {
    matches!(error.code(), Code::Integrity | Code::Unsupported | Code::Refused)
}

/// Whether Windows keeps volumes of its own making in a partition.
fn is_dynamic(kind: &PartitionKind) -> bool {
    match kind {
        PartitionKind::Mbr(kind) => *kind == 0x42,
        PartitionKind::Gpt(kind) => kind == "af9b60a0-1431-4f62-bc68-3311714a69ad",
    }
}

/// What is known by its looks and not read.
fn told(blocks: &dyn Blocks) -> Result<Option<&'static str>> {
    let head = bytes::read_up_to(blocks, 0, 4100)?;
    let at = |place: usize, mark: &[u8]| head.get(place..place + mark.len()) == Some(mark);
    let raid = [0xFC, 0x4E, 0x2B, 0xA9];
    Ok(if at(3, b"-FVE-FS-") {
        Some("encrypted with BitLocker")
    } else if at(0, &raid) || at(4096, &raid) {
        Some("a part of a Linux RAID")
    } else {
        None
    })
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
