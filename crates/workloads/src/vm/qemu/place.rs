//! The directory that a machine runs in: who is in it, and what its overlays lie over.

use std::fs::File;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use mainstay_core::{Code, Error, Result};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::super::machine::Machine;

const RECORD: &str = "run.json";

/// The longest record, in bytes.
const RECORD_MAX: u64 = 16 << 20;

/// A directory that nobody else runs a machine in, as long as this lives.
pub struct Place {
    path: PathBuf,
    _lock: File,
}

/// What an earlier run wrote down, so that the next one goes on with the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Run {
    /// The id of the recovery point that the overlays lie over.
    pub point: String,
    /// How the person named it; another point may have that name by now.
    pub asked: String,
    pub machine: Machine,
}

impl Place {
    /// Makes the directory if it is not there. Only its owner may enter: whoever reaches the monitor in it owns the
    /// machine.
    ///
    /// Errors: [`Code::Conflict`] when somebody else runs a machine in it.
    pub fn take(path: &Path) -> Result<Self> {
        let fail = |error| Error::io(format!("cannot use the directory {}", path.display()), error);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(fail)?;
        let lock = File::create(path.join("lock")).map_err(fail)?;
        match rustix::io::retry_on_intr(|| flock(&lock, FlockOperation::NonBlockingLockExclusive)) {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(Errno::WOULDBLOCK) => {
                let what = format!("somebody runs a machine in {}", path.display());
                Err(Error::new(Code::Conflict, what).hint("wait for its end, or choose another directory"))
            }
            Err(errno) => Err(fail(errno.into())),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What an earlier run in `directory` wrote down.
    ///
    /// Errors: [`Code::Integrity`] when it makes no sense.
    pub fn earlier(directory: &Path) -> Result<Option<Run>> {
        let path = directory.join(RECORD);
        let fail = |error| Error::io(format!("cannot read {}", path.display()), error);
        match std::fs::metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(fail(error)),
            // The run died before it had anything.
            Ok(metadata) if metadata.len() == 0 => return Ok(None),
            Ok(metadata) if metadata.len() > RECORD_MAX => {
                return Err(Error::integrity(format!("{} is too long", path.display())));
            }
            Ok(_) => {}
        }
        let text = std::fs::read(&path).map_err(fail)?;
        let run = serde_json::from_slice(&text);
        run.map(Some).map_err(|error| {
            Error::integrity(format!("{} makes no sense", path.display()))
                .because(error)
                .hint("nobody knows what the disks in this directory lie over; choose another one")
        })
    }

    /// Writes down what runs here, before anything of it is written; what an earlier run here began stays.
    ///
    /// Errors: [`Code::Refused`] when that lies over another point: it would be another machine's disk underneath.
    pub fn hold(&self, run: &Run) -> Result<()> {
        if let Some(earlier) = Self::earlier(&self.path)? {
            if earlier.point == run.point {
                return Ok(());
            }
            let what = format!(
                "what is in {} was written over the point {}, not over {}",
                self.path.display(),
                earlier.point,
                run.point
            );
            return Err(Error::new(Code::Refused, what)
                .hint("name that point to go on with it, or choose another directory"));
        }
        let fail = |error| Error::io(format!("cannot write in {}", self.path.display()), error);
        let text =
            serde_json::to_vec(run).map_err(|error| Error::bug("cannot write down a run").because(error))?;
        let path = self.path.join(RECORD);
        let file = File::create(&path).map_err(fail)?;
        std::io::Write::write_all(&mut &file, &text).and_then(|()| file.sync_all()).map_err(fail)
    }
}

#[cfg(test)]
mod tests {
    use super::{Place, Run};
    use crate::vm::{Machine, MachineId};
    use mainstay_core::Code;

    #[test]
    fn a_directory_is_of_one_run_at_a_time_and_of_one_point_for_good() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("new/web");
        let run = |point: &str| Run {
            point: point.into(),
            asked: "web@latest".into(),
            machine: Machine::new(MachineId("web".into()), "web"),
        };
        let place = Place::take(&at).unwrap();
        assert_eq!(Place::take(&at).map(drop).unwrap_err().code(), Code::Conflict);
        assert_eq!(Place::earlier(&at).unwrap(), None);
        place.hold(&run("one")).unwrap();
        drop(place);
        let place = Place::take(&at).unwrap();
        place.hold(&run("one")).unwrap();
        assert_eq!(place.hold(&run("two")).unwrap_err().code(), Code::Refused);
        assert_eq!(Place::earlier(&at).unwrap(), Some(run("one")));
        std::fs::write(at.join("run.json"), "{").unwrap();
        assert_eq!(place.hold(&run("one")).unwrap_err().code(), Code::Integrity);
    }
}
