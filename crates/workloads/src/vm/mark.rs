//! Marks: where the next increment of each disk starts. Recovery points carry them as their position.

use std::collections::BTreeMap;

use mainstay_core::{Error, Position, Result};
use serde::{Deserialize, Serialize};

use super::hypervisor::{DiskMode, MachineId};

/// The only version there is.
const VERSION: u32 = 1;

/// A position longer than this is not one of ours, in bytes.
const POSITION_MAX: usize = 1 << 20;

/// The marks of one machine, by the name of the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marks {
    version: u32,
    /// The driver that set them: `qemu`, `libvirt`, `folder`.
    pub driver: String,
    pub machine: MachineId,
    pub disks: BTreeMap<String, DiskMark>,
}

/// What must still hold of a disk for its tracking to be believed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskMark {
    /// The bitmap or checkpoint that records changes since; `None` when nothing does.
    pub bitmap: Option<String>,
    /// Bytes the guest saw.
    pub size: u64,
    /// Bytes for which the bitmap has one bit; 0 when the host does not say.
    pub granularity: u64,
    /// The image file.
    pub image: String,
    /// Its inode, where it could be looked at.
    pub inode: Option<u64>,
    /// Increments since the disk was last read whole.
    pub increments: u32,
    /// Evidence of unchanged image files, taken while the machine was shut down.
    #[serde(default)]
    pub stamp: Option<String>,
}

/// What a driver found of a disk and of the bitmap that the mark names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found<'a> {
    pub size: u64,
    pub image: &'a str,
    pub inode: Option<u64>,
    pub bitmap: Option<BitmapState>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapState {
    /// 0 when the host does not say.
    pub granularity: u64,
    pub recording: bool,
    pub inconsistent: bool,
    /// In use by another operation.
    pub busy: bool,
}

impl Marks {
    pub fn new(driver: &str, machine: MachineId) -> Self {
        Self { version: VERSION, driver: driver.into(), machine, disks: BTreeMap::new() }
    }

    /// Errors: only a mistake of ours.
    pub fn to_position(&self) -> Result<Position> {
        let bytes = serde_json::to_vec(self);
        bytes.map(Position).map_err(|error| Error::bug("cannot write marks down").because(error))
    }

    /// `None` for what is not a position of this version: then every disk is read whole.
    pub fn from_position(position: &Position) -> Option<Self> {
        if position.0.len() > POSITION_MAX {
            return None;
        }
        serde_json::from_slice(&position.0).ok().filter(|marks: &Self| marks.version == VERSION)
    }

    /// The mark of `disk`, if `driver` set it on `machine`.
    pub fn of(&self, driver: &str, machine: &MachineId, disk: &str) -> Option<&DiskMark> {
        let ours = self.driver == driver && self.machine == *machine;
        self.disks.get(disk).filter(|_| ours)
    }
}

impl DiskMark {
    /// How the disk has to be read: an increment only when everything still holds.
    pub fn judge(&self, found: &Found<'_>, scan_every: u32) -> DiskMode {
        match self.doubt(found, scan_every) {
            Some(why) => DiskMode::Scan { why },
            None => DiskMode::Incremental,
        }
    }

    fn doubt(&self, found: &Found<'_>, scan_every: u32) -> Option<String> {
        if let Some(why) = self.other(found, scan_every) {
            return Some(why);
        }
        let Some(name) = &self.bitmap else {
            return Some("nothing recorded what changed since the last point".into());
        };
        let Some(bitmap) = &found.bitmap else { return Some(format!("the bitmap {name} is missing")) };
        if bitmap.inconsistent {
            return Some(format!(
                "the bitmap {name} is inconsistent: its machine did not shut down in order"
            ));
        }
        if bitmap.busy {
            return Some(format!("the bitmap {name} is in use by another operation"));
        }
        if !bitmap.recording {
            return Some(format!("the bitmap {name} was not recording"));
        }
        if bitmap.granularity != self.granularity {
            return Some(format!(
                "the bitmap {name} had a granularity of {} bytes and now has {}",
                self.granularity, bitmap.granularity
            ));
        }
        None
    }

    /// Why it is not the disk that the mark was set on, or its turn to be read whole, whatever records its changes.
    pub(super) fn other(&self, found: &Found<'_>, scan_every: u32) -> Option<String> {
        if found.size != self.size {
            return Some(format!("the disk had {} bytes and now has {}", self.size, found.size));
        }
        let moved = self.inode.is_some() && found.inode.is_some() && self.inode != found.inode;
        if moved || found.image != self.image {
            return Some("the image is another file than at the last point".into());
        }
        if scan_every > 0 && self.increments.saturating_add(1) >= scan_every {
            return Some(format!("everything is read after {} increments", self.increments));
        }
        None
    }
}

/// [`mainstay_core::Id16`] as hexadecimal digits.
pub(super) mod id16 {
    use mainstay_core::Id16;
    use serde::{Deserialize as _, Deserializer, Serializer, de};

    pub(crate) fn serialize<S: Serializer>(id: &Id16, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(id)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Id16, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|()| de::Error::custom("not 32 hexadecimal digits"))
    }
}

#[cfg(test)]
mod tests {
    use super::{BitmapState, DiskMark, Found, Marks};
    use crate::vm::hypervisor::{DiskMode, MachineId};
    use mainstay_core::Position;

    fn mark() -> DiskMark {
        DiskMark {
            bitmap: Some("b".into()),
            size: 64,
            granularity: 16,
            image: "/a".into(),
            inode: Some(5),
            increments: 3,
            stamp: None,
        }
    }

    #[test]
    fn an_increment_needs_everything_to_hold() {
        let bitmap = BitmapState { granularity: 16, recording: true, inconsistent: false, busy: false };
        let good = Found { size: 64, image: "/a", inode: Some(5), bitmap: Some(bitmap) };
        assert_eq!(mark().judge(&good, 0), DiskMode::Incremental);
        assert_eq!(mark().judge(&good, 5), DiskMode::Incremental);
        assert_eq!(mark().judge(&Found { inode: None, ..good.clone() }, 0), DiskMode::Incremental);
        let doubts = [
            (mark().judge(&good, 4), "after 3 increments"),
            (mark().judge(&Found { size: 65, ..good.clone() }, 0), "64 bytes and now has 65"),
            (mark().judge(&Found { image: "/b", ..good.clone() }, 0), "another file"),
            (mark().judge(&Found { inode: Some(6), ..good.clone() }, 0), "another file"),
            (mark().judge(&Found { bitmap: None, ..good.clone() }, 0), "missing"),
            (with(&good, BitmapState { inconsistent: true, ..bitmap }), "inconsistent"),
            (with(&good, BitmapState { busy: true, ..bitmap }), "in use"),
            (with(&good, BitmapState { recording: false, ..bitmap }), "not recording"),
            (
                with(&good, BitmapState { granularity: 32, ..bitmap }),
                "granularity of 16 bytes and now has 32",
            ),
            (DiskMark { bitmap: None, ..mark() }.judge(&good, 0), "nothing recorded"),
        ];
        for (mode, words) in doubts {
            assert!(matches!(&mode, DiskMode::Scan { why } if why.contains(words)), "{mode:?}: {words}");
        }
    }

    fn with(good: &Found<'_>, bitmap: BitmapState) -> DiskMode {
        mark().judge(&Found { bitmap: Some(bitmap), ..good.clone() }, 0)
    }

    #[test]
    fn marks_come_back_and_strange_positions_are_none() {
        let mut marks = Marks::new("qemu", MachineId("m".into()));
        marks.disks.insert("vda".into(), mark());
        let position = marks.to_position().unwrap();
        assert_eq!(Marks::from_position(&position).as_ref(), Some(&marks));
        assert!(marks.of("qemu", &MachineId("m".into()), "vda").is_some());
        assert!(marks.of("libvirt", &MachineId("m".into()), "vda").is_none());
        let newer = String::from_utf8(position.0).unwrap().replace("\"version\":1", "\"version\":2");
        for strange in [Vec::new(), b"{}".to_vec(), vec![b'['; 2 << 20], newer.into_bytes()] {
            assert_eq!(Marks::from_position(&Position(strange)), None);
        }
    }
}
