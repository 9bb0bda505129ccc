//! A host on another network: two network namespaces and a cable between them, which can be cut.

use std::ffi::OsStr;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::path::{Path, PathBuf};
use std::process::Command;

use mainstay_core::{Code, Error, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde_json::json;
use tempfile::TempDir;

use super::process::{self, Daemon};
use super::{Monitor, PATIENCE, directory, patiently};

/// One end of the cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where the machines run.
    Host,
    /// Where backups are made.
    Proxy,
}

/// Two network namespaces that see each other and nothing else. They go with the value. Asks for root.
#[derive(Debug)]
pub struct Cable {
    tag: String,
}

impl Cable {
    pub fn lay() -> Result<Self> {
        let cable = Self { tag: format!("ms{:x}", RandomState::new().build_hasher().finish() >> 32) };
        for side in [Side::Host, Side::Proxy] {
            process::run("ip", ["netns", "add", &cable.name(side)])?;
        }
        let (host, proxy) = (cable.name(Side::Host), cable.name(Side::Proxy));
        let pair = ["link", "add", "cable", "netns", &host, "type", "veth", "peer", "cable", "netns", &proxy];
        process::run("ip", pair)?;
        for side in [Side::Host, Side::Proxy] {
            let name = cable.name(side);
            let address = format!("{}/24", Self::address(side));
            process::run("ip", ["-n", &name, "address", "add", &address, "dev", "cable"])?;
            for device in ["lo", "cable"] {
                process::run("ip", ["-n", &name, "link", "set", device, "up"])?;
            }
        }
        Ok(cable)
    }

    /// The same in every cable, since nobody else is on it.
    pub fn address(side: Side) -> &'static str {
        match side {
            Side::Host => "10.99.0.1",
            Side::Proxy => "10.99.0.2",
        }
    }

    /// A program that will run at one end.
    pub fn command<A: AsRef<OsStr>>(&self, side: Side, program: &Path, arguments: &[A]) -> Command {
        let name = self.name(side);
        let mut command = process::command("ip", ["netns", "exec", &name]);
        command.arg(program).args(arguments);
        command
    }

    /// From now on nothing comes through, and nobody is told.
    pub fn cut(&self) -> Result<()> {
        self.set("down")
    }

    pub fn mend(&self) -> Result<()> {
        self.set("up")
    }

    fn set(&self, state: &str) -> Result<()> {
        process::run("ip", ["-n", &self.name(Side::Proxy), "link", "set", "cable", state]).map(drop)
    }

    pub(super) fn name(&self, side: Side) -> String {
        format!("{}-{}", self.tag, if side == Side::Host { "host" } else { "proxy" })
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for side in [Side::Host, Side::Proxy] {
            let _gone = process::run("ip", ["netns", "delete", &self.name(side)]);
        }
    }
}

/// The group ffdhe2048 of RFC 7919. A QEMU that finds none in its directory makes one up, for a second.
const GROUP: &str = "-----BEGIN DH PARAMETERS-----\n\
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz\n\
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a\n\
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7\n\
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi\n\
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD\n\
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==\n\
-----END DH PARAMETERS-----\n";

/// Makes a directory of certificates as QEMU, libvirt and Mainstay name them, good for these addresses.
pub fn certificates(directory: &Path, addresses: &[&str]) -> Result<()> {
    let bad = |error| Error::bug(format!("a certificate cannot be made: {error}"));
    std::fs::create_dir_all(directory).map_err(super::io("cannot make a directory"))?;
    let write = |name: &str, text: String| {
        std::fs::write(directory.join(name), text).map_err(super::io("cannot write a certificate"))
    };
    write("dh-params.pem", GROUP.into())?;
    let mut params = CertificateParams::new(Vec::new()).map_err(bad)?;
    params.distinguished_name.push(DnType::CommonName, "the authority of a test");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let key = KeyPair::generate().map_err(bad)?;
    write("ca-cert.pem", params.self_signed(&key).map_err(bad)?.pem())?;
    let issuer = Issuer::new(params, key);
    for (name, purpose) in
        [("server", ExtendedKeyUsagePurpose::ServerAuth), ("client", ExtendedKeyUsagePurpose::ClientAuth)]
    {
        let addresses: Vec<String> = addresses.iter().map(|address| (*address).to_owned()).collect();
        let mut params = CertificateParams::new(addresses).map_err(bad)?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().map_err(bad)?;
        write(&format!("{name}-cert.pem"), params.signed_by(&key, &issuer).map_err(bad)?.pem())?;
        write(&format!("{name}-key.pem"), key.serialize_pem())?;
    }
    Ok(())
}

/// A QEMU at the host's end whose monitor listens there, under TLS. It runs no guest: the test plays it.
#[derive(Debug)]
pub struct FarQemu {
    directory: TempDir,
    daemon: Daemon,
}

impl FarQemu {
    /// With qcow2 images that are there, as the devices `disk0`, `disk1` and so on.
    pub fn start(cable: &Cable, images: &[&Path]) -> Result<Self> {
        let directory = directory("far")?;
        let at = |name: &str| directory.path().join(name);
        certificates(&at("pki"), &[Cable::address(Side::Host), Cable::address(Side::Proxy)])?;
        std::fs::create_dir(at("scratch")).map_err(super::io("cannot make a directory"))?;
        let mut words: Vec<String> =
            "-nodefaults -no-user-config -display none -machine q35,accel=tcg -m 32 -S"
                .split(' ')
                .map(str::to_owned)
                .collect();
        words.extend([
            "-object".into(),
            format!("tls-creds-x509,id=pki,endpoint=server,verify-peer=on,dir={}", at("pki").display()),
            "-chardev".into(),
            format!(
                "socket,id=far,host={},port={},server=on,wait=off,tls-creds=pki",
                Cable::address(Side::Host),
                Self::PORT
            ),
            "-mon".into(),
            "chardev=far,mode=control".into(),
        ]);
        for name in ["local", "test"] {
            words.extend(["-qmp".into(), format!("unix:{},server=on,wait=off", at(name).display())]);
        }
        for (number, image) in images.iter().enumerate() {
            let file = json!({ "driver": "file", "filename": image, "discard": "unmap" });
            let node = json!({ "driver": "qcow2", "node-name": format!("node{number}"), "discard": "unmap", "file": file });
            words.extend(["-blockdev".into(), node.to_string()]);
            words.extend(["-device".into(), format!("virtio-blk-pci,drive=node{number},id=disk{number}")]);
        }
        let name = cable.name(Side::Host);
        let all = ["netns", "exec", &name, "qemu-system-x86_64"].map(str::to_owned).into_iter().chain(words);
        let daemon = Daemon::start("ip", all, &at("log"))?;
        let mut qemu = Self { directory, daemon };
        let socket = qemu.directory.path().join("test");
        patiently("the emulator", PATIENCE, || {
            qemu.daemon.check()?;
            Ok(socket.exists().then_some(()))
        })?;
        Ok(qemu)
    }

    /// Ends it in order.
    pub fn end(&mut self) {
        self.daemon.end(rustix::process::Signal::TERM);
    }

    /// Of its monitor.
    pub const PORT: u16 = 4444;

    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// The certificates of both ends.
    pub fn certificates(&self) -> PathBuf {
        self.directory.path().join("pki")
    }

    /// Where it may make files.
    pub fn scratch(&self) -> PathBuf {
        self.directory.path().join("scratch")
    }

    /// A monitor for who runs at its own end.
    pub fn local_monitor(&self) -> PathBuf {
        self.directory.path().join("local")
    }

    /// The test's own monitor. One at a time.
    pub fn monitor(&self) -> Result<Monitor> {
        Monitor::connect(&self.directory.path().join("test"))
    }

    /// Writes as the guest would: one byte, again and again.
    pub fn write(&self, disk: usize, offset: u64, length: usize, byte: u8) -> Result<()> {
        let line = format!(
            "qemu-io -d /machine/peripheral/disk{disk}/virtio-backend \"write -P {byte} {offset} {length}\""
        );
        let said = self.monitor()?.run("human-monitor-command", json!({ "command-line": line }))?;
        let said = said.as_str().unwrap_or_default();
        if said.contains("rror") || said.contains("ailed") {
            return Err(Error::new(Code::Io, format!("{line}: {said}")));
        }
        Ok(())
    }

    /// Whatever of ours is in it.
    pub fn remains(&self) -> Result<Vec<String>> {
        let mut monitor = self.monitor()?;
        let mut found = Vec::new();
        for (question, arguments, key) in [
            ("query-block-exports", json!({}), "id"),
            ("query-jobs", json!({}), "id"),
            ("query-named-block-nodes", json!({}), "node-name"),
            ("qom-list", json!({ "path": "/objects" }), "name"),
        ] {
            let answer = monitor.run(question, arguments)?;
            let all = answer.as_array().into_iter().flatten();
            let names = all.filter_map(|one| one[key].as_str().map(str::to_owned));
            found.extend(names.filter(|name| name.starts_with("mainstay")));
        }
        Ok(found)
    }

    /// The processor time that it has taken so far, in seconds.
    pub fn processor(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        // After the name, which may hold anything: the third field and those that follow.
        let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ').collect::<Vec<_>>();
        let ticks: f64 = fields.iter().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
        ticks / f64::from(u32::try_from(rustix::param::clock_ticks_per_second()).unwrap_or(100))
    }
}
