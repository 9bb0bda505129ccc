//! Hosts of machines as people name them.

use std::path::{Path, PathBuf};

use mainstay_core::{Code, Error, Result};
use mainstay_workloads::vm::{
    Folder, GuardProgram, Hypervisor, LibvirtHost, MachineSummary, QemuHost, QemuMachine,
};

use crate::session::Session;

/// Opens a host. `scratch` is where it keeps what guests overwrite during a run.
///
/// Errors: [`Code::Usage`] for what names no host.
pub(super) fn open(text: &str, scratch: &Path, session: &Session) -> Result<Box<dyn Hypervisor>> {
    if let Some(machine) = text.strip_prefix("qmp:") {
        let machine = plain(machine, &session.doors.directory)?;
        let host = QemuHost::new(vec![machine], scratch.to_owned(), session.doors.clock.clone());
        return Ok(Box::new(host.guarded_by(guard()?)));
    }
    if let Some(directory) = text.strip_prefix("dir:").filter(|directory| !directory.is_empty()) {
        let directory = session.doors.directory.join(directory);
        return Ok(Box::new(Folder::new(directory, session.doors.clock.clone())));
    }
    if text.contains("://") {
        let host = LibvirtHost::new(text, scratch.to_owned(), session.doors.clock.clone());
        return Ok(Box::new(host.guarded_by(guard()?)));
    }
    Err(unknown(text))
}

fn unknown(text: &str) -> Error {
    Error::new(Code::Usage, format!("{text:?} names no host of machines"))
        .hint("write qemu:///system, qmp:SOCKET or dir:DIRECTORY; see mainstay vm backup --help")
}

/// `MONITOR[,agent=SOCKET][,nbd=SOCKET][,name=NAME]`.
fn plain(text: &str, directory: &Path) -> Result<QemuMachine> {
    let mut parts = text.split(',');
    let monitor = parts.next().filter(|monitor| !monitor.is_empty()).ok_or_else(|| unknown(text))?;
    let monitor = directory.join(monitor);
    let name = monitor.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let mut machine = QemuMachine { name, monitor, agent: None, server: None };
    for part in parts {
        let socket = |path: &str| Some(directory.join(path));
        match part.split_once('=') {
            Some(("agent", path)) => machine.agent = socket(path),
            Some(("nbd", path)) => machine.server = socket(path),
            Some(("name", name)) => name.clone_into(&mut machine.name),
            _ => {
                return Err(Error::new(Code::Usage, format!("{part:?} says nothing about a QEMU"))
                    .hint("after the monitor's socket stand agent=SOCKET, nbd=SOCKET and name=NAME"));
            }
        }
    }
    Ok(machine)
}

/// This program, standing by a backup.
fn guard() -> Result<GuardProgram> {
    let program: PathBuf =
        std::env::current_exe().map_err(|error| Error::io("cannot find this program's own file", error))?;
    Ok(GuardProgram { program, arguments: vec!["vm".into(), "guard".into()] })
}

/// The machine that `name` means on a host.
pub(super) fn find<'a>(name: &str, machines: &'a [MachineSummary]) -> Option<&'a MachineSummary> {
    let by_id = machines.iter().find(|machine| machine.id.0.eq_ignore_ascii_case(name));
    by_id.or_else(|| machines.iter().find(|machine| machine.name == name))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::plain;

    #[test]
    fn a_plain_qemu_is_named_by_its_sockets() {
        let found = plain("web.qmp,agent=/run/web.agent,name=web", Path::new("/run")).unwrap();
        assert_eq!((found.name.as_str(), found.monitor.as_path()), ("web", Path::new("/run/web.qmp")));
        assert_eq!(found.agent.as_deref(), Some(Path::new("/run/web.agent")));
        assert_eq!(plain("a/b.qmp", Path::new("/run")).unwrap().name, "b");
        for bad in ["", ",agent=x", "web.qmp,agnt=x"] {
            assert!(plain(bad, Path::new("/run")).is_err(), "{bad}");
        }
    }
}
