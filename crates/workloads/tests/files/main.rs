//! The files workload from outside: trees through the source into the target, without a repository between them.

#![cfg(test)]

mod confinement;
mod conformance;
mod hooks;
mod modes;
mod round_trip;
mod snapshot;
mod source;

use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{Item, ItemPath, Next, Result, Skip, Source, Target, Time};
use mainstay_testkit::ScriptedClock;
use mainstay_workloads::files::{
    FilesPlan, FilesRequest, FilesSource, FilesTarget, OwnerRule, RestoreMode, RestoreRules, Restored,
};

/// A moment long after every file here was made.
fn clock() -> Arc<ScriptedClock> {
    Arc::new(ScriptedClock::at(Time::from_seconds(4_000_000_000)))
}

fn request(root: &Path) -> FilesRequest {
    FilesRequest { roots: vec![root.to_owned()], ..FilesRequest::default() }
}

fn plan(root: &Path, mode: RestoreMode) -> FilesPlan {
    let rules = RestoreRules { mode, ..RestoreRules::default() };
    FilesPlan { root: root.to_owned(), rules, owners: owners(), ..FilesPlan::default() }
}

/// Only root can give things away, such as the directories above a test's own.
fn owners() -> OwnerRule {
    if rustix::process::geteuid().is_root() { OwnerRule::ByName } else { OwnerRule::Leave }
}

/// The one loop, as plain as it can be.
fn copy(mut source: FilesSource, target: FilesTarget) -> Result<Restored> {
    let mut target = Box::new(target);
    loop {
        match source.next()? {
            Next::Item(item) => target.put(*item)?,
            Next::Skipped(skip) => target.skip(skip)?,
            Next::End => break,
        }
    }
    let captured = source.seal()?;
    let (receipt, restored) = target.finish(&captured)?;
    Box::new(source).commit(&receipt)?;
    Ok(restored)
}

fn backup_and_restore(from: &Path, to: &Path, mode: RestoreMode) -> Restored {
    let source = FilesSource::new(request(from), clock()).unwrap();
    copy(source, FilesTarget::new(plan(to, mode)).unwrap()).unwrap()
}

/// Where a tree at `path` is restored to below `target`.
fn inside(target: &Path, path: &Path) -> PathBuf {
    target.join(path.strip_prefix("/").unwrap())
}

/// Everything a source yields.
fn walk(request: FilesRequest) -> (Vec<Item>, Vec<Skip>) {
    let mut source = FilesSource::new(request, clock()).unwrap();
    let (mut items, mut skips) = (Vec::new(), Vec::new());
    loop {
        match source.next().unwrap() {
            Next::Item(item) => items.push(*item),
            Next::Skipped(skip) => skips.push(skip),
            Next::End => return (items, skips),
        }
    }
}

fn item_path(path: &Path) -> ItemPath {
    ItemPath::new(path.as_os_str().as_bytes().strip_prefix(b"/").unwrap()).unwrap()
}

/// Runs `act` on a thread that is the user 65534 and no more, if this process has the power for that. Credentials
/// belong to threads, and a thread hands its own on to those that it starts.
fn as_ordinary_user<T: Send>(act: impl FnOnce() -> T + Send) -> T {
    as_ordinary_user_in(&[], act)
}

/// As [`as_ordinary_user`], of these groups too.
fn as_ordinary_user_in<T: Send>(groups: &[u32], act: impl FnOnce() -> T + Send) -> T {
    use rustix::process::{Gid, Uid};
    std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            if rustix::process::geteuid().is_root() {
                let (uid, gid) = (Uid::from_raw(65534), Gid::from_raw(65534));
                let groups: Vec<_> = groups.iter().copied().map(Gid::from_raw).collect();
                rustix::thread::set_thread_groups(&groups).unwrap();
                rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
                rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
            }
            act()
        });
        run.join().unwrap()
    })
}

/// A directory that any user may write to.
fn shared_directory() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o777)).unwrap();
    directory
}

fn captured() -> mainstay_core::Captured {
    mainstay_core::Captured {
        position: mainstay_core::Position::default(),
        consistency: mainstay_core::Consistency::Fuzzy,
        moment: Time::default(),
    }
}
