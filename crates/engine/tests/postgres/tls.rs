//! Servers over TLS.

use std::os::unix::fs::MetadataExt as _;

use mainstay_core::{Code, Error, Result};
use mainstay_testkit::lab::{Postgres, PostgresPlan, certificates};
use mainstay_workloads::postgres::{Address, Connection};

use crate::common::{back_up_by, directory, repository};

const ACCESS: &str = "local all postgres trust\nhostssl all cert 127.0.0.1/32 cert\n\
                      hostssl replication cert 127.0.0.1/32 cert\n\
                      hostssl all all 127.0.0.1/32 scram-sha-256\n\
                      hostssl replication all 127.0.0.1/32 scram-sha-256\n\
                      hostnossl all open 127.0.0.1/32 scram-sha-256\n";

struct Stage {
    server: Postgres,
    certificates: tempfile::TempDir,
}

impl Stage {
    fn new() -> Self {
        let plan = PostgresPlan { access: ACCESS, tcp: true, ..PostgresPlan::default() };
        let server = Postgres::start(&plan).unwrap();
        for role in ["backup", "open", "cert"] {
            let statement = format!("CREATE ROLE {role} LOGIN REPLICATION PASSWORD 'right'");
            server.ask("postgres", &statement).unwrap();
        }
        Self { server, certificates: directory() }
    }

    /// Has the server speak TLS, as who is at `addresses`.
    fn encrypt(&self, kind: &str, addresses: &[&str]) {
        let at = self.certificates.path().join(kind);
        certificates(&at, addresses).unwrap();
        let owner = std::fs::metadata(self.server.data()).unwrap();
        for (name, as_here) in
            [("server-cert.pem", "server.crt"), ("server-key.pem", "server.key"), ("ca-cert.pem", "root.crt")]
        {
            let to = self.server.data().join(as_here);
            std::fs::copy(at.join(name), &to).unwrap();
            std::os::unix::fs::chown(&to, Some(owner.uid()), Some(owner.gid())).unwrap();
            std::fs::set_permissions(&to, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        }
        for setting in ["ssl = on", "ssl_ca_file = 'root.crt'"] {
            self.server.ask("postgres", &format!("ALTER SYSTEM SET {setting}")).unwrap();
        }
        self.server.ask("postgres", "SELECT pg_reload_conf()").unwrap();
        mainstay_testkit::lab::patiently("TLS", std::time::Duration::from_secs(30), || {
            Ok((self.server.ask("postgres", "SHOW ssl")? == "on").then_some(()))
        })
        .unwrap();
    }

    fn file(&self, name: &str) -> String {
        self.certificates.path().join(name).display().to_string()
    }

    fn address(&self, host: &str, parameters: &str) -> Address {
        format!("postgres://{host}:{}/postgres?{parameters}", self.server.port()).parse().unwrap()
    }

    fn open(&self, role: &str, host: &str, parameters: &str) -> Result<Connection> {
        Connection::open(&self.address(host, parameters), role, Some(b"right"), true)
    }

    fn ordinary(&self, role: &str, parameters: &str) -> Connection {
        Connection::open(&self.address("127.0.0.1", parameters), role, Some(b"right"), false).unwrap()
    }
}

#[track_caller]
fn refused(opened: Result<Connection>, code: Code) -> Error {
    let error = opened.err().unwrap();
    assert_eq!(error.code(), code, "{error:?}");
    assert!(error.next_step().is_some(), "{error:?}");
    error
}

#[test]
fn a_server_is_believed_as_far_as_its_certificate_and_the_mode_go() {
    let stage = Stage::new();
    // Without a line for replication in the clear: an ordinary connection.
    assert!(!stage.ordinary("open", "").is_encrypted());
    refused(stage.open("open", "127.0.0.1", "sslmode=require"), Code::Refused);
    stage.encrypt("right", &["127.0.0.1"]);
    let authority = format!("sslrootcert={}", stage.file("right/ca-cert.pem"));
    for mode in ["prefer", "require", "verify-ca", "verify-full"] {
        let named = if mode.starts_with("verify") { authority.as_str() } else { "" };
        let connection = stage.open("backup", "127.0.0.1", &format!("sslmode={mode}&{named}")).unwrap();
        assert!(connection.is_encrypted(), "{mode}");
    }
    // The certificate names an address, and no name.
    let localhost = |mode: &str| stage.open("backup", "localhost", &format!("sslmode={mode}&{authority}"));
    assert!(localhost("verify-ca").unwrap().is_encrypted());
    refused(localhost("verify-full"), Code::Refused);
    // Another authority, and none at all.
    certificates(&stage.certificates.path().join("other"), &["127.0.0.1"]).unwrap();
    let other = format!("sslrootcert={}", stage.file("other/ca-cert.pem"));
    for mode in ["require", "verify-ca", "verify-full"] {
        refused(stage.open("backup", "127.0.0.1", &format!("sslmode={mode}&{other}")), Code::Refused);
    }
    refused(stage.open("backup", "127.0.0.1", "sslmode=verify-full"), Code::Usage);
    assert!(!stage.ordinary("open", "sslmode=disable").is_encrypted());
    refused(stage.open("backup", "127.0.0.1", "sslmode=disable"), Code::Refused);
    // A wrong password stays a wrong password.
    let address = stage.address("127.0.0.1", "");
    let wrong = Connection::open(&address, "backup", Some(b"wrong"), true);
    refused(wrong, Code::WrongKey);
}

#[test]
fn a_client_shows_its_certificate_and_a_cluster_is_backed_up_over_tls() {
    let stage = Stage::new();
    stage.encrypt("right", &["127.0.0.1"]);
    stage.server.ask("postgres", "ALTER ROLE cert RENAME TO client").unwrap();
    let hba = stage.server.data().join("pg_hba.conf");
    let access = std::fs::read_to_string(&hba).unwrap().replace(" cert 127", " client 127");
    std::fs::write(&hba, access).unwrap();
    stage.server.ask("postgres", "SELECT pg_reload_conf()").unwrap();
    let authority = format!("sslmode=verify-full&sslrootcert={}", stage.file("right/ca-cert.pem"));
    let ours = format!(
        "{authority}&sslcert={}&sslkey={}",
        stage.file("right/client-cert.pem"),
        stage.file("right/client-key.pem")
    );
    mainstay_testkit::lab::patiently("the new rules", std::time::Duration::from_secs(30), || {
        Ok(stage.open("client", "127.0.0.1", &ours).ok())
    })
    .unwrap();
    stage.open("client", "127.0.0.1", &authority).err().unwrap();
    let half = format!("{authority}&sslcert={}", stage.file("right/client-cert.pem"));
    assert_eq!(stage.open("client", "127.0.0.1", &half).err().unwrap().code(), Code::Usage);
    let repository = repository();
    let made = back_up_by(&repository, &|replication| {
        Connection::open(&stage.address("127.0.0.1", &authority), "backup", Some(b"right"), replication)
    });
    assert_eq!(made.point.counts.skipped, 0);
}
