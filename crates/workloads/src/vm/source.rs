//! A moment of a machine as items: its description in neutral words and in the vendor's, and its disks.

use std::collections::VecDeque;

use mainstay_core::{
    Body, Captured, Item, ItemPath, Kind, Metadata, Next, Open, Piece, Receipt, Result, Source, Stamp,
    StreamEnd, StreamReader, Time,
};

use super::hypervisor::{DiskMode, MachineSnapshot};

/// The directory that holds the disks.
pub const DISKS: &str = "disks";
/// The item that describes the machine in neutral words.
pub const MACHINE: &str = "machine.json";

/// The item that holds the variables of the machine's firmware.
pub const NVRAM: &str = "nvram";

/// The path of the item of a disk.
pub fn disk_path(name: &str) -> Result<ItemPath> {
    let named = ItemPath::new(DISKS).and_then(|disks| disks.join(name.as_bytes()));
    named.map_err(|error| {
        mainstay_core::Error::integrity(format!("a disk cannot be called {name:?}")).because(error)
    })
}

/// Yields a machine as it was at one moment.
pub struct VmSource {
    snapshot: Box<dyn MachineSnapshot>,
    items: VecDeque<(ItemPath, What)>,
    moment: Time,
}

enum What {
    Directory,
    Document(Vec<u8>),
    /// By its place in the snapshot.
    Disk(usize),
}

impl VmSource {
    /// `moment` is when the snapshot was taken.
    pub fn new(snapshot: Box<dyn MachineSnapshot>, moment: Time) -> Result<Self> {
        let path = |name: &str| {
            ItemPath::new(name)
                .map_err(|error| mainstay_core::Error::bug("an impossible path").because(error))
        };
        let machine = snapshot.machine();
        let mut items =
            vec![(path(DISKS)?, What::Directory), (path(MACHINE)?, What::Document(machine.to_json()?))];
        if let Some(raw) = &machine.raw {
            items.push((path(raw.kind.item())?, What::Document(raw.text.clone())));
        }
        if let Some(variables) = &machine.nvram {
            items.push((path(NVRAM)?, What::Document(variables.clone())));
        }
        for (number, disk) in snapshot.disks().iter().enumerate() {
            items.push((disk_path(&disk.name)?, What::Disk(number)));
        }
        items.sort_by(|(left, _), (right, _)| left.cmp(right));
        Ok(Self { snapshot, items: items.into(), moment })
    }

    fn item(&self, path: ItemPath, what: What) -> Result<Item> {
        let mut metadata = Metadata { modified: self.moment, mode: 0o600, ..Metadata::new(Kind::Record) };
        let body = match what {
            What::Directory => {
                (metadata.kind, metadata.mode) = (Kind::Directory, 0o700);
                Body::None
            }
            What::Document(text) => {
                metadata.size = text.len() as u64;
                Body::Stream(Box::new(Document(text)))
            }
            What::Disk(number) => {
                if let Some(disk) = self.snapshot.disks().get(number) {
                    let known = self.snapshot.machine().disks.iter().find(|known| known.name == disk.name);
                    if let Some(known) = known {
                        let bus = known.bus.iter().map(|bus| ("bus".to_owned(), bus.clone().into_bytes()));
                        metadata.attributes.extend(bus);
                        metadata.attributes.push(("format".into(), known.format.clone().into_bytes()));
                    }
                    metadata.attributes.push(("mode".into(), disk.mode.name().into()));
                    if let DiskMode::Scan { why } = &disk.mode {
                        metadata.attributes.push(("why".into(), why.clone().into_bytes()));
                    }
                }
                let blocks = self.snapshot.open(number)?;
                (metadata.kind, metadata.size) = (Kind::Disk, blocks.size());
                Body::Blocks(blocks)
            }
        };
        Ok(Item { path, metadata, stamp: Stamp::default(), body })
    }
}

impl Source for VmSource {
    fn next(&mut self) -> Result<Next> {
        match self.items.pop_front() {
            Some((path, what)) => Ok(Next::Item(Box::new(self.item(path, what)?))),
            None => Ok(Next::End),
        }
    }

    fn seal(&mut self) -> Result<Captured> {
        Ok(Captured {
            position: self.snapshot.marks()?.to_position()?,
            consistency: self.snapshot.reached(),
            moment: self.moment,
        })
    }

    fn commit(self: Box<Self>, _receipt: &Receipt) -> Result<()> {
        self.snapshot.commit()
    }
}

struct Document(Vec<u8>);

impl Open for Document {
    fn open(&self) -> Result<Box<dyn StreamReader>> {
        Ok(Box::new(DocumentReader(self.0.clone().into())))
    }
}

struct DocumentReader(VecDeque<u8>);

impl StreamReader for DocumentReader {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Piece> {
        let length = buffer.len().min(self.0.len());
        for (to, from) in buffer.iter_mut().zip(self.0.drain(..length)) {
            *to = from;
        }
        Ok(if length == 0 { Piece::End } else { Piece::Data(length) })
    }

    fn finish(self: Box<Self>) -> Result<StreamEnd> {
        Ok(StreamEnd::Steady)
    }
}
