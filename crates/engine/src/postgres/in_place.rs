//! Recovery in the place of a data directory that is there: what is there is moved aside, whole, and can be moved back.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{Clock, Code, Error, Progress, Result};
use mainstay_repository::Repository;
use mainstay_workloads::files::Restored;
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::plan::ClusterPlan;
use super::restore::restore_cluster;

/// Where the control file of a cluster says which one it is, and how it ended: see `pg_control.h`, the same since
/// PostgreSQL 9.3.
const SYSTEM_AT: usize = 0;
const STATE_AT: usize = 16;
const HEAD_BYTES: usize = 20;
const SHUT_DOWN: [u32; 2] = [1, 2];

/// What a restore over a directory did.
#[derive(Clone, Debug)]
pub struct PutInPlace {
    pub restored: Restored,
    /// Where what was there is now, as it was.
    pub aside: PathBuf,
}

/// What the control file of a cluster that does not run says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Control {
    /// The cluster's own number.
    pub system: u64,
    /// Its server ended in order.
    pub is_shut_down: bool,
}

impl Control {
    /// Errors: [`Code::NotFound`] when there is no cluster in the directory.
    pub fn read(data: &Path) -> Result<Self> {
        let path = data.join("global/pg_control");
        let mut head = [0; HEAD_BYTES];
        File::open(&path)
            .and_then(|mut file| file.read_exact(&mut head))
            .map_err(|error| Error::io(format!("cannot read {}", path.display()), error))?;
        let part = |at: usize, length: usize| head.get(at..at + length).unwrap_or_default();
        let system = part(SYSTEM_AT, 8).try_into().map_or(0, u64::from_ne_bytes);
        let state = part(STATE_AT, 4).try_into().map_or(0, u32::from_ne_bytes);
        Ok(Self { system, is_shut_down: SHUT_DOWN.contains(&state) })
    }
}

/// Errors: [`Code::Refused`] while a server runs on the directory, and when its last one did not end in order.
pub fn check_stopped(data: &Path) -> Result<Control> {
    let pid = data.join("postmaster.pid");
    if pid.exists() {
        let what = format!("a server runs on {}, or has crashed there", data.display());
        return Err(Error::new(Code::Refused, what)
            .because(format!("there is {}", pid.display()))
            .hint("stop it; if none runs, remove that file, or restore to another directory with --to"));
    }
    let control = Control::read(data)?;
    if control.is_shut_down {
        return Ok(control);
    }
    let what = format!("the server on {} did not end in order, or runs on another machine", data.display());
    Err(Error::new(Code::Refused, what).hint("start and stop it, or restore to another directory with --to"))
}

/// Restores beside a data directory, and then exchanges the two in one step: until then nothing that is there is touched.
///
/// Errors: those of [`check_stopped`] and [`restore_cluster`]; [`Code::Refused`] when another cluster is there.
pub fn restore_cluster_in_place(
    repository: &Repository,
    plan: &ClusterPlan,
    data: &Path,
    clock: &dyn Clock,
    progress: &Arc<dyn Progress>,
) -> Result<PutInPlace> {
    let control = check_stopped(data)?;
    if control.system.to_string() != plan.cluster.system {
        let what = format!("another cluster is in {}", data.display());
        return Err(Error::new(Code::Refused, what).hint("restore to a new directory with --to"));
    }
    let stamp = clock.now().seconds();
    let new = beside(data, &format!("mainstay-{stamp}"));
    let restored = restore_cluster(repository, plan, &new, progress)?;
    // Somebody may have started it meanwhile.
    check_stopped(data)?;
    let failed = |from: &Path, to: &Path, errno: rustix::io::Errno| {
        let what = format!("cannot put {} in the place of {}", from.display(), to.display());
        Error::io(what, errno.into()).hint(format!("what was restored is in {}", new.display()))
    };
    renameat_with(CWD, &new, CWD, data, RenameFlags::EXCHANGE).map_err(|errno| failed(&new, data, errno))?;
    let aside = beside(data, &format!("before-{stamp}"));
    renameat_with(CWD, &new, CWD, &aside, RenameFlags::NOREPLACE)
        .map_err(|errno| failed(&new, &aside, errno))?;
    Ok(PutInPlace { restored, aside })
}

fn beside(data: &Path, ending: &str) -> PathBuf {
    // Without a slash at its end, which would put it inside.
    let mut name = data.components().collect::<PathBuf>().into_os_string();
    name.push(format!(".{ending}"));
    name.into()
}
