//! TLS against ourselves and against QEMU and libnbd, with certificates made here.

use std::path::Path;
use std::sync::Arc;

use mainstay_core::{Blocks, Code};
use mainstay_nbd::{
    Address, Client, ClientTls, Export, Identity, Server, ServerOptions, ServerTls, WritableBlocks,
};
use mainstay_testkit::Rng;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use crate::lab::{Daemon, Disk, run, sparse};

const SIZE: usize = 6 << 20;

/// An authority.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate and its key, as PEM.
pub(crate) struct Pair(String, String);

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    fn sign(&self, name: &str, purpose: ExtendedKeyUsagePurpose) -> Pair {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().unwrap();
        Pair(params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    pub(crate) fn server(&self) -> Pair {
        self.sign("localhost", ExtendedKeyUsagePurpose::ServerAuth)
    }

    fn client(&self) -> Pair {
        self.sign("the-client", ExtendedKeyUsagePurpose::ClientAuth)
    }

    /// For clients that connect over a socket and show nothing.
    pub(crate) fn client_tls(&self) -> ClientTls {
        tls(self, None).server_name("localhost").unwrap()
    }

    /// As QEMU, GnuTLS and libnbd expect them in a directory.
    fn write(&self, directory: &Path) {
        let files = [("ca-cert.pem", self.pem.clone())].into_iter();
        let pairs = [("server", self.server()), ("client", self.client())];
        for (name, content) in files {
            std::fs::write(directory.join(name), content).unwrap();
        }
        for (name, Pair(certificate, key)) in pairs {
            std::fs::write(directory.join(format!("{name}-cert.pem")), certificate).unwrap();
            std::fs::write(directory.join(format!("{name}-key.pem")), key).unwrap();
        }
    }
}

impl Pair {
    pub(crate) fn identity(&self) -> Identity {
        Identity::from_pem(self.0.as_bytes(), self.1.as_bytes()).unwrap()
    }
}

fn secure(server: Identity, clients: Option<&str>, disk: Arc<Disk>) -> Server {
    let tls = ServerTls::new(server, clients.map(str::as_bytes)).unwrap();
    let options = ServerOptions { tls: Some(tls), ..ServerOptions::default() };
    let exports = vec![Export::writable("disk", disk as _)];
    Server::start(&Address::tcp("localhost", 0), exports, options).unwrap()
}

fn tls(authority: &Authority, identity: Option<Identity>) -> ClientTls {
    ClientTls::new(authority.pem.as_bytes(), identity).unwrap()
}

#[test]
fn only_the_right_certificates_open_an_export() {
    let (ours, others) = (Authority::new("ours"), Authority::new("others"));
    let model = sparse(&mut Rng::new(1), SIZE);
    let disk = Disk::new(model.clone());
    let server = secure(ours.server().identity(), Some(&ours.pem), Arc::clone(&disk));
    let attempt = |tls: Option<ClientTls>| {
        let client = Client::new(server.address().clone(), "disk");
        tls.into_iter().fold(client, Client::tls).blocks(None)
    };
    let remote = attempt(Some(tls(&ours, Some(ours.client().identity())))).unwrap();
    let mut read = vec![0; SIZE];
    remote.read_at(0, &mut read).unwrap();
    assert!(read == model);
    read.reverse();
    remote.write_at(0, &read).unwrap();
    remote.flush().unwrap();
    assert!(disk.bytes() == read);

    let plain = attempt(None).err().unwrap();
    assert_eq!((plain.code(), plain.next_step()), (Code::Refused, Some("connect with TLS")));
    let wrong_name = tls(&ours, Some(ours.client().identity())).server_name("example.org").unwrap();
    let other_server = tls(&others, Some(ours.client().identity()));
    let other_client = tls(&ours, Some(others.client().identity()));
    let a_servers = tls(&ours, Some(ours.server().identity()));
    for refused in [wrong_name, other_server, other_client, a_servers, tls(&ours, None)] {
        let error = attempt(Some(refused)).err().unwrap();
        assert_eq!(error.code(), Code::Io, "{error:?}");
    }
    server.stop().unwrap();
    let plain = Server::start(
        &Address::tcp("localhost", 0),
        vec![Export::writable("disk", disk as _)],
        ServerOptions::default(),
    )
    .unwrap();
    let client = Client::new(plain.address().clone(), "disk").tls(tls(&ours, None));
    assert_eq!(client.info().unwrap_err().code(), Code::Refused);
}

#[test]
fn what_is_no_certificate_is_refused_in_words() {
    let ours = Authority::new("ours");
    let Pair(certificate, key) = ours.server();
    let Pair(_, other_key) = ours.server();
    assert_eq!(Identity::from_pem(b"nonsense", key.as_bytes()).err().unwrap().code(), Code::Usage);
    assert_eq!(Identity::from_pem(certificate.as_bytes(), b"").err().unwrap().code(), Code::Usage);
    let mixed = Identity::from_pem(certificate.as_bytes(), other_key.as_bytes()).unwrap();
    assert_eq!(ServerTls::new(mixed, None).err().unwrap().code(), Code::Usage);
    assert_eq!(ClientTls::new(b"", None).err().unwrap().code(), Code::Usage);
    let nameless = Client::new(Address::Unix("/nowhere".into()), "").tls(tls(&ours, None));
    assert!(nameless.info().is_err());
}

#[test]
fn qemu_and_libnbd_come_in_with_their_certificates() {
    let ours = Authority::new("ours");
    let directory = tempfile::tempdir().unwrap();
    ours.write(directory.path());
    let model = sparse(&mut Rng::new(2), SIZE);
    let server = secure(ours.server().identity(), Some(&ours.pem), Disk::new(model.clone()));
    let Address::Tcp { port, .. } = server.address() else { panic!("no TCP") };
    let there = directory.path().join("there");
    let (there_name, certificates) = (there.to_str().unwrap(), directory.path().display());
    let object = format!("tls-creds-x509,id=tls,endpoint=client,dir={certificates}");
    let source = format!(
        "driver=raw,file.driver=nbd,file.host=localhost,file.port={port},file.export=disk,file.tls-creds=tls"
    );
    run("qemu-img", ["convert", "--object", &object, "--image-opts", &source, "-O", "raw", there_name]);
    assert!(std::fs::read(&there).unwrap() == model);
    let uri = format!("nbds://localhost:{port}/disk?tls-certificates={certificates}");
    run("nbdcopy", [uri.as_str(), there_name]);
    assert!(std::fs::read(&there).unwrap() == model);
    assert!(run("nbdinfo", [&uri]).contains("protocol: newstyle-fixed with TLS"));
}

#[test]
fn qemu_nbd_lets_us_in_with_our_certificates() {
    let (ours, others) = (Authority::new("ours"), Authority::new("others"));
    let directory = tempfile::tempdir().unwrap();
    ours.write(directory.path());
    let model = sparse(&mut Rng::new(3), SIZE);
    let image = directory.path().join("image");
    std::fs::write(&image, &model).unwrap();
    let object =
        format!("tls-creds-x509,id=tls,endpoint=server,verify-peer=yes,dir={}", directory.path().display());
    let arguments = ["--object", &object, "--tls-creds=tls", "-e", "8", "-f", "raw", "-x", "disk"];
    let image = image.to_str().unwrap();
    let daemon = Daemon::qemu_nbd(directory.path(), &[&arguments[..], &[image]].concat());
    let named = |tls: ClientTls| tls.server_name("localhost").unwrap();
    let remote =
        daemon.client("disk").tls(named(tls(&ours, Some(ours.client().identity())))).blocks(None).unwrap();
    let mut read = vec![0; SIZE];
    remote.read_at(0, &mut read).unwrap();
    assert!(read == model);
    remote.write_at(100_000, &model[..3 << 20]).unwrap();
    remote.flush().unwrap();
    assert!(std::fs::read(image).unwrap()[100_000..][..3 << 20] == model[..3 << 20]);
    assert_eq!(daemon.client("disk").info().unwrap_err().code(), Code::Refused);
    let stranger = daemon.client("disk").tls(named(tls(&ours, Some(others.client().identity()))));
    assert!(stranger.info().is_err());
}
