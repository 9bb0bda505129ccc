//! Hosts of machines as people name them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mainstay_core::{Code, Error, Result};
use mainstay_workloads::vm::{
    Address, Endpoint, Folder, GuardProgram, Hypervisor, LibvirtHost, Link, MachineId, QemuHost, QemuMachine,
    Stage,
};

use crate::session::Session;

/// Where a QEMU on another machine offers its disks, unless somebody says otherwise: the port registered for NBD.
const NBD_PORT: u16 = 10809;

/// Where it has its certificates, unless somebody says otherwise: where libvirt keeps them for QEMU.
const HOST_TLS: &str = "/etc/pki/qemu";

/// Opens a host. `scratch` is where it keeps what guests overwrite during a run.
///
/// Errors: [`Code::Usage`] for what names no host.
pub(super) fn open(text: &str, scratch: &Path, session: &Session) -> Result<Box<dyn Hypervisor>> {
    if text.starts_with("qmp:") {
        return Ok(Box::new(open_qemu(text, scratch, session)?));
    }
    if let Some(directory) = text.strip_prefix("stage:").filter(|directory| !directory.is_empty()) {
        return Ok(Box::new(Stage::new(session.doors.directory.join(directory))));
    }
    if let Some(directory) = text.strip_prefix("dir:").filter(|directory| !directory.is_empty()) {
        let directory = session.doors.directory.join(directory);
        return Ok(Box::new(Folder::new(directory, session.doors.clock.clone())));
    }
    if text.contains("://") {
        let (uri, link) = libvirt(text, &session.doors.directory)?;
        let host = LibvirtHost::new(uri, scratch.to_owned(), session.doors.clock.clone());
        let host = link.into_iter().fold(host, LibvirtHost::far);
        return Ok(Box::new(host.guarded_by(guard()?)));
    }
    Err(unknown(text))
}

/// Opens a plain QEMU.
pub(super) fn open_qemu(text: &str, scratch: &Path, session: &Session) -> Result<QemuHost> {
    let Some(machine) = text.strip_prefix("qmp:") else { return Err(unknown(text)) };
    let machine = plain(machine, &session.doors.directory)?;
    let host = QemuHost::new(vec![machine], scratch.to_owned(), session.doors.clock.clone());
    Ok(host.guarded_by(guard()?))
}

fn unknown(text: &str) -> Error {
    Error::new(Code::Usage, format!("{text:?} names no host of machines"))
        .hint("write qemu:///system, qmp:SOCKET or dir:DIRECTORY; see mainstay vm backup --help")
}

/// `MONITOR[,agent=SOCKET][,nbd=SOCKET][,name=NAME]`; on another machine, where MONITOR and SOCKET may be
/// `tcp://HOST:PORT`, `nbd=HOST:PORT`, `tls=DIR`, `host-tls=DIR` and `host-scratch=DIR`.
fn plain(text: &str, directory: &Path) -> Result<QemuMachine> {
    let (monitor, parts) = text.split_once(',').unwrap_or((text, ""));
    let told = told(parts, &KEYS, "the monitor")?;
    if monitor.is_empty() {
        return Err(unknown(text));
    }
    let tls = told.get("tls").map(|path| directory.join(path));
    let endpoint = |text: &str| match text.parse()? {
        Endpoint::Unix(path) => Ok(Endpoint::Unix(directory.join(path))),
        tcp @ Endpoint::Tcp { .. } => Ok::<_, Error>(tcp.secured(tls.as_deref())),
    };
    let monitor = endpoint(monitor)?;
    let name = match &monitor {
        Endpoint::Unix(path) => path.file_stem().map(|stem| stem.to_string_lossy().into_owned()),
        Endpoint::Tcp { host, port, .. } => Some(format!("{host}-{port}")),
    };
    let given = told.get("name").map(|name| (*name).to_owned());
    let (named, name) = (given.is_some(), given.or(name).unwrap_or_default());
    let far = matches!(monitor, Endpoint::Tcp { .. }) || told.contains_key("host-scratch") || tls.is_some();
    let host = match &monitor {
        Endpoint::Tcp { host, .. } => Some(host.as_str()),
        Endpoint::Unix(_) => None,
    };
    let link = far.then(|| link(host, &told, tls.as_deref())).transpose()?;
    let server = told.get("nbd").filter(|_| link.is_none()).map(|path| directory.join(path));
    let agent = told.get("agent").map(|agent| endpoint(agent)).transpose()?;
    Ok(QemuMachine { name, named, monitor, agent, server, link })
}

/// What may stand after a monitor.
const KEYS: [&str; 6] = ["agent", "nbd", "name", "tls", "host-tls", "host-scratch"];

/// What may stand after a URI of libvirt.
const LIBVIRT_KEYS: [&str; 3] = ["tls", "host-scratch", "nbd"];

/// `URI[,tls=DIR,host-scratch=DIR][,nbd=HOST:PORT]`.
fn libvirt<'a>(text: &'a str, directory: &Path) -> Result<(&'a str, Option<Link>)> {
    let Some((uri, parts)) = text.split_once(',') else { return Ok((text, None)) };
    let told = told(parts, &LIBVIRT_KEYS, "the URI")?;
    let tls = told.get("tls").map(|path| directory.join(path));
    let host = uri.split_once("://").and_then(|(_, rest)| rest.split('/').next()).unwrap_or_default();
    let host = host.rsplit_once('@').map_or(host, |(_user, host)| host);
    let bare = host.strip_prefix('[').and_then(|host| host.split(']').next());
    let host = bare.unwrap_or_else(|| host.split(':').next().unwrap_or_default());
    let link = link(Some(host).filter(|host| !host.is_empty()), &told, tls.as_deref())?;
    Ok((uri, Some(link)))
}

/// `KEY=VALUE`s with commas between. `place` is what they stand after.
fn told<'a>(parts: &'a str, keys: &[&str], place: &str) -> Result<BTreeMap<&'a str, &'a str>> {
    let mut told = BTreeMap::new();
    for part in parts.split(',').filter(|part| !part.is_empty()) {
        match part.split_once('=') {
            Some((key, value)) if keys.contains(&key) && !value.is_empty() => told.insert(key, value),
            _ => {
                return Err(Error::new(
                    Code::Usage,
                    format!("{part:?} says nothing about a host of machines"),
                )
                .hint(format!("after {place} stand {}=…, with commas between", keys.join("=…, "))));
            }
        };
    }
    Ok(told)
}

/// What is said of another computer, which is called `host` if anybody said how.
fn link(host: Option<&str>, told: &BTreeMap<&str, &str>, tls: Option<&Path>) -> Result<Link> {
    let missing = |key: &str, what: &str| {
        Error::new(Code::Usage, format!("the machine is on another computer, and nothing says {what}"))
            .hint(format!("add {key}; see mainstay vm backup --help"))
    };
    let (host, port) = match (told.get("nbd"), host) {
        (Some(nbd), _) => match nbd.parse()? {
            Address::Tcp { host, port } => (host, port),
            Address::Unix(_) => return Err(missing("nbd=HOST:PORT", "where it can offer its disks")),
        },
        (None, Some(host)) => (host.to_owned(), NBD_PORT),
        (None, None) => return Err(missing("nbd=HOST:PORT", "where it can offer its disks")),
    };
    let tls = tls.ok_or_else(|| missing("tls=DIR", "which certificates are yours"))?;
    let host_scratch = told.get("host-scratch");
    let host_scratch = host_scratch
        .ok_or_else(|| missing("host-scratch=DIR", "where on it QEMU may keep what the guest overwrites"))?;
    Ok(Link {
        host,
        port,
        tls: tls.to_owned(),
        host_tls: told.get("host-tls").map_or_else(|| HOST_TLS.into(), PathBuf::from),
        host_scratch: host_scratch.into(),
    })
}

/// This program, standing by a backup.
fn guard() -> Result<GuardProgram> {
    let program: PathBuf =
        std::env::current_exe().map_err(|error| Error::io("cannot find this program's own file", error))?;
    Ok(GuardProgram { program, arguments: vec!["vm".into(), "guard".into()] })
}

/// The machine that `name` means on a host.
pub(super) fn find<'a>(wanted: &str, machines: &'a [(MachineId, String)]) -> Option<&'a (MachineId, String)> {
    let by_id = machines.iter().find(|(id, _)| id.0.eq_ignore_ascii_case(wanted));
    by_id.or_else(|| machines.iter().find(|(_, name)| name == wanted))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{libvirt, plain};

    #[test]
    fn a_libvirt_on_another_computer_is_named_by_its_uri_and_how_to_reach_its_disks() {
        let run = Path::new("/run");
        let link = |text: &str| libvirt(text, run).unwrap().1;
        assert_eq!(link("qemu:///system"), None);
        for (uri, host) in [
            ("qemu+tls://hv1/system", "hv1"),
            ("qemu+ssh://root@hv1:2222/system?keyfile=/k", "hv1"),
            ("qemu+tls://[fd00::1]:16514/system", "fd00::1"),
        ] {
            let link = link(&format!("{uri},tls=pki,host-scratch=/s")).unwrap();
            assert_eq!(
                (link.host.as_str(), link.port, link.tls.as_path()),
                (host, 10809, Path::new("/run/pki"))
            );
        }
        assert_eq!(link("qemu:///system,tls=pki,host-scratch=/s,nbd=h:7").unwrap().port, 7);
        for bad in
            ["qemu://h/system,tls=x", "qemu:///system,tls=x,host-scratch=/s", "qemu://h/system,agent=x"]
        {
            assert!(libvirt(bad, run).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_plain_qemu_is_named_by_its_sockets() {
        let run = Path::new("/run");
        let found = plain("web.qmp,agent=/run/web.agent,name=web", run).unwrap();
        assert_eq!((found.name.as_str(), found.monitor), ("web", Path::new("/run/web.qmp").into()));
        assert_eq!((found.agent, found.link), (Some(Path::new("/run/web.agent").into()), None));
        assert_eq!(plain("a/b.qmp", run).unwrap().name, "b");
        let far = plain("tcp://h:4444,tls=pki,host-scratch=/s", run).unwrap().link.unwrap();
        assert_eq!((far.host.as_str(), far.port, far.tls.as_path()), ("h", 10809, Path::new("/run/pki")));
        let tunnel = plain("web.qmp,nbd=h:7,tls=pki,host-tls=/t,host-scratch=/s", run).unwrap().link.unwrap();
        assert_eq!((tunnel.port, tunnel.host_tls.as_path()), (7, Path::new("/t")));
        let far = [
            "tcp://h:4444",
            "tcp://h:4444,tls=x",
            "tcp://h:4444,host-scratch=/s",
            "web.qmp,tls=x,host-scratch=/s",
        ];
        for bad in ["", ",agent=x", "web.qmp,agnt=x"].into_iter().chain(far) {
            assert!(plain(bad, Path::new("/run")).is_err(), "{bad}");
        }
    }
}
