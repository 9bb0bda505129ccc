//! What is known of a copy, in a file that is replaced as a whole.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use mainstay_core::{Code, Consistency, Error, Id16, Result, Time};
use serde::{Deserialize, Serialize};

use crate::vm::hypervisor::{MachineSnapshot, Owner};
use crate::vm::machine::{Machine, RawDocument, RawKind};
use crate::vm::mark::Marks;

const FILE: &str = "state.json";

/// The only version there is.
const VERSION: u32 = 1;

/// A longer one is not ours, in bytes.
const LONGEST: u64 = 256 << 20;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct State {
    version: u32,
    /// Of the bitmaps on the host.
    pub(super) owner: Owner,
    /// The disks are what `staged` says.
    pub(super) whole: bool,
    /// The last whole copy.
    pub(super) staged: Option<Staged>,
    /// The copy that the last point was made of; `None` before the first.
    pub(super) held: Option<String>,
    /// What was written since that copy, by the name of the disk: start and end, ascending and apart.
    pub(super) changed: BTreeMap<String, Vec<(u64, u64)>>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Staged {
    /// Names this copy.
    pub(super) copy: String,
    /// Nanoseconds since 1970, by the clock of this machine.
    moment: i64,
    /// As the repository numbers it.
    reached: u8,
    frozen_milliseconds: u64,
    pub(super) notes: Vec<String>,
    pub(super) machine: Machine,
    /// The vendor's document, if the machine has one.
    raw: Option<String>,
    pub(super) disks: Vec<StagedShape>,
    /// Where the next push starts.
    pub(super) marks: Marks,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct StagedShape {
    pub(super) name: String,
    /// In bytes.
    pub(super) size: u64,
}

impl State {
    pub(super) fn new(owner: Owner) -> Self {
        Self { version: VERSION, owner, whole: false, staged: None, held: None, changed: BTreeMap::new() }
    }

    /// `None` when there is none.
    pub(super) fn read(directory: &Path) -> Result<Option<Self>> {
        let path = directory.join(FILE);
        let fail = |error| Error::io(format!("cannot read {}", path.display()), error);
        match std::fs::metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(fail(error)),
            Ok(metadata) if metadata.len() > LONGEST => {
                return Err(Error::integrity(format!("{} is too long", path.display())));
            }
            Ok(_) => {}
        }
        let text = std::fs::read(&path).map_err(fail)?;
        let state: Self = serde_json::from_slice(&text)
            .map_err(|error| Error::integrity(format!("{} makes no sense", path.display())).because(error))?;
        if state.version != VERSION {
            let what = format!("{} is of version {}", path.display(), state.version);
            return Err(Error::new(Code::Unsupported, what).hint("a newer Mainstay made it"));
        }
        Ok(Some(state))
    }

    /// Durable when it returns.
    pub(super) fn write(&self, directory: &Path) -> Result<()> {
        let path = directory.join(FILE);
        let fail = |error| Error::io(format!("cannot write {}", path.display()), error);
        let text =
            serde_json::to_vec(self).map_err(|error| Error::bug("cannot write a state").because(error))?;
        let new = directory.join("state.new");
        let mut file = File::create(&new).map_err(fail)?;
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(fail)?;
        replace(&new, &path).map_err(fail)?;
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(fail)
    }
}

#[expect(clippy::disallowed_methods, reason = "the state of a copy is replaced as a whole")]
fn replace(new: &Path, old: &Path) -> std::io::Result<()> {
    std::fs::rename(new, old)
}

impl Staged {
    pub(super) fn of(snapshot: &dyn MachineSnapshot, copy: Id16, moment: Time) -> Result<Self> {
        let machine = snapshot.machine().clone();
        let raw = machine.raw.as_ref().map(|raw| String::from_utf8_lossy(&raw.text).into_owned());
        let shape = |disk: &crate::vm::DiskSnapshot| StagedShape { name: disk.name.clone(), size: disk.size };
        Ok(Self {
            copy: copy.to_string(),
            moment: moment.0,
            reached: snapshot.reached() as u8,
            frozen_milliseconds: u64::try_from(snapshot.frozen().as_millis()).unwrap_or(u64::MAX),
            notes: snapshot.notes().to_vec(),
            machine,
            raw,
            disks: snapshot.disks().iter().map(shape).collect(),
            marks: snapshot.marks()?,
        })
    }

    pub(super) fn machine(&self) -> Machine {
        let raw =
            self.raw.as_ref().map(|text| RawDocument { kind: RawKind::QemuJson, text: text.clone().into() });
        Machine { raw, ..self.machine.clone() }
    }

    pub(super) fn moment(&self) -> Time {
        Time(self.moment)
    }

    pub(super) fn reached(&self) -> Consistency {
        Consistency::from_number(self.reached).unwrap_or(Consistency::Crash)
    }

    pub(super) fn frozen(&self) -> Duration {
        Duration::from_millis(self.frozen_milliseconds)
    }
}
