//! Snapshots of logical volumes: taken by `lvcreate`, which holds the file system still for the moment, mounted
//! read-only under `/run`, and removed in the opposite order.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mainstay_core::{Code, Error, Result};

use crate::armed::Armed;
use crate::process::Program;

use super::mounts::Mount;

const LIMIT: Duration = Duration::from_secs(300);

/// Where snapshots are mounted, each in a directory of its own name.
const PLACE: &str = "/run";

/// How the names of snapshots and of the directories that they are mounted at begin.
const PREFIX: &str = "mainstay-snapshot-";

/// Space set aside for what changes while the snapshot is read, where the pool does not provide it.
const EXTENTS: &str = "20%ORIGIN";

/// A logical volume, as `lvs` names it.
#[derive(Debug, PartialEq, Eq)]
struct Volume {
    group: String,
    name: String,
    /// In a thin pool, which gives a snapshot its space as it needs it.
    thin: bool,
}

/// A mounted snapshot. Dropped, it is removed.
pub(super) struct LogicalSnapshot {
    group: String,
    name: String,
    /// Where it is mounted.
    pub(super) path: PathBuf,
    /// It belongs to another run.
    left: bool,
    _armed: Armed,
}

impl LogicalSnapshot {
    /// Takes a snapshot of the volume that is mounted there.
    ///
    /// Errors: [`Code::Unsupported`] when no logical volume is.
    pub(super) fn take(mount: &Mount, tag: &str) -> Result<Self> {
        let refuse = |why: &str| {
            let point = String::from_utf8_lossy(&mount.point).into_owned();
            Error::new(Code::Unsupported, format!("cannot take a snapshot of /{point}: {why}"))
        };
        if mount.root != b"/" || !mount.source.starts_with(b"/dev/") {
            return Err(refuse("no logical volume is mounted there as a whole"));
        }
        let listed = Program::new("lvs", LIMIT)
            .arguments(["--noheadings", "--separator", "/", "-o", "vg_name,lv_name,pool_lv"])
            .argument(OsStr::from_bytes(&mount.source))
            .run_well()
            .map_err(|error| refuse("it does not lie on LVM").because(error))?;
        let volume = Volume::parse(&listed).ok_or_else(|| refuse("lvs speaks in riddles"))?;
        let name = format!("{PREFIX}{tag}");
        let path = Path::new(PLACE).join(&name);
        let _armed = armed(&name);
        Program::new("lvcreate", LIMIT).arguments(volume.snapshot_arguments(&name)).run_well()?;
        // From here on, whatever fails, the volume is removed.
        let snapshot = Self { group: volume.group, name, path, left: false, _armed };
        std::fs::create_dir(&snapshot.path)
            .map_err(|error| Error::io(format!("cannot make {}", snapshot.path.display()), error))?;
        let device = format!("/dev/{}/{}", snapshot.group, snapshot.name);
        let options = mount_options(&mount.kind);
        Program::new("mount", LIMIT)
            .arguments(["-o", options, &device])
            .argument(&snapshot.path)
            .run_well()?;
        Ok(snapshot)
    }

    /// Lets it be.
    pub(super) fn leave(mut self) {
        self.left = true;
    }

    /// What runs that crashed have left mounted; the caller finds out which of them are in use.
    pub(super) fn mounted() -> Vec<Self> {
        let Ok(entries) = std::fs::read_dir(PLACE) else { return Vec::new() };
        let left = entries.flatten().filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let listed = Program::new("lvs", LIMIT)
                .arguments(["--noheadings", "-o", "vg_name", "--select"])
                .argument(format!("lv_name={name}"));
            let group = name.starts_with(PREFIX).then(|| listed.run_well().ok())??;
            let group = String::from_utf8(group).ok()?.trim().to_owned();
            let (path, left) = (entry.path(), false);
            (!group.is_empty()).then(|| Self { _armed: armed(&name), group, name, path, left })
        });
        left.collect()
    }
}

fn armed(name: &str) -> Armed {
    Armed::new(format!("the snapshot {name} to be removed"))
}

impl Drop for LogicalSnapshot {
    fn drop(&mut self) {
        let Self { group, name, path, left, .. } = self;
        if *left {
            return;
        }
        // Each step is tried whatever became of the one before; the next run tries again what is left.
        let _unmounted = Program::new("umount", LIMIT).argument(&*path).run_well();
        let _removed_place = std::fs::remove_dir(path);
        let _removed =
            Program::new("lvremove", LIMIT).arguments(["--force", &format!("{group}/{name}")]).run_well();
    }
}

impl Volume {
    /// One line of `group/name/pool`, the pool empty where there is none.
    fn parse(line: &[u8]) -> Option<Self> {
        let line = std::str::from_utf8(line).ok()?.trim();
        let mut fields = line.split('/');
        let (group, name, pool) = (fields.next()?, fields.next()?, fields.next()?);
        let sound = !group.is_empty() && !name.is_empty() && !line.contains('\n') && fields.next().is_none();
        sound.then(|| Self { group: group.into(), name: name.into(), thin: !pool.is_empty() })
    }

    fn snapshot_arguments(&self, name: &str) -> Vec<String> {
        let space: &[&str] = if self.thin { &["--setactivationskip", "n"] } else { &["--extents", EXTENTS] };
        let mut arguments = vec!["--snapshot".to_owned(), "--name".to_owned(), name.to_owned()];
        arguments.extend(space.iter().map(|argument| (*argument).to_owned()));
        arguments.push(format!("{}/{}", self.group, self.name));
        arguments
    }
}

/// XFS refuses a second file system of one identity unless it is told not to mind.
fn mount_options(kind: &[u8]) -> &'static str {
    if kind == b"xfs" { "ro,nouuid" } else { "ro" }
}

#[cfg(test)]
mod tests {
    use super::Volume;

    #[test]
    fn volumes_are_told_apart() {
        let thick = Volume::parse(b"  system/home/\n").unwrap();
        assert_eq!(thick, Volume { group: "system".into(), name: "home".into(), thin: false });
        assert!(Volume::parse(b"  system/home/pool\n").unwrap().thin);
        for odd in [b"".as_slice(), b"home", b"a/b", b"a/b/c/d", b"a/b/\n c/d/", b"\xff/a/"] {
            assert_eq!(Volume::parse(odd), None);
        }
        assert_eq!(
            thick.snapshot_arguments("s"),
            ["--snapshot", "--name", "s", "--extents", "20%ORIGIN", "system/home"]
        );
    }
}
