//! A real guest whose host is reached over a network. What is said to its agent goes through a pipe that is cut in the
//! worst of moments.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use mainstay_core::Id16;
use mainstay_testkit::RealClock;
use mainstay_testkit::lab::{Guest, GuestPlan, certificates};
use mainstay_workloads::vm::{
    Endpoint, Hypervisor as _, Link, MachineId, Owner, QemuHost, QemuMachine, SnapshotRequest,
};

use crate::capture::Protected;

/// What is cut when the guest has been frozen, if it is to be.
#[derive(Default)]
struct Scissors {
    armed: AtomicBool,
    cut: AtomicBool,
}

/// Passes what is said on to the agent's socket. Returns the port.
fn pipe(agent: &Path, scissors: &Arc<Scissors>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (agent, scissors) = (agent.to_owned(), Arc::clone(scissors));
    thread::spawn(move || {
        for client in listener.incoming() {
            let client = client.unwrap();
            if scissors.cut.load(Ordering::SeqCst) {
                continue;
            }
            let agent = UnixStream::connect(&agent).unwrap();
            let (mut from, mut to) = (client.try_clone().unwrap(), agent.try_clone().unwrap());
            let freezes = Arc::new(AtomicBool::new(false));
            let (asked, scissors) = (Arc::clone(&freezes), Arc::clone(&scissors));
            thread::spawn(move || {
                let mut buffer = [0; 8192];
                while let Ok(length @ 1..) = from.read(&mut buffer) {
                    let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                    asked.fetch_or(text.contains("fsfreeze-freeze"), Ordering::SeqCst);
                    if to.write_all(&buffer[..length]).is_err() {
                        break;
                    }
                }
                drop(to.shutdown(Shutdown::Both));
            });
            thread::spawn(move || answer(&agent, &client, &freezes, &scissors));
        }
    });
    port
}

/// Passes answers back, up to the one that says that the guest is frozen.
fn answer(mut agent: &UnixStream, mut client: &TcpStream, freezes: &AtomicBool, scissors: &Scissors) {
    let mut buffer = [0; 8192];
    while let Ok(length @ 1..) = agent.read(&mut buffer) {
        if freezes.load(Ordering::SeqCst) && scissors.armed.swap(false, Ordering::SeqCst) {
            scissors.cut.store(true, Ordering::SeqCst);
            break;
        }
        if client.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = (agent.shutdown(Shutdown::Both), client.shutdown(Shutdown::Both));
}

fn host(guest: &Guest, agent: u16) -> QemuHost {
    let at = |name: &str| guest.directory().join(name);
    certificates(&at("pki"), &["127.0.0.1"]).unwrap();
    for directory in ["scratch", "plans"] {
        std::fs::create_dir_all(at(directory)).unwrap();
    }
    // Free a moment ago, and nobody else's: the system hands out others first.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let machine = QemuMachine {
        name: "guest".into(),
        named: true,
        monitor: guest.monitor_socket().into(),
        agent: Some(Endpoint::Tcp { host: "127.0.0.1".into(), port: agent, tls: None }),
        server: None,
        link: Some(Link {
            host: "127.0.0.1".into(),
            port,
            tls: at("pki"),
            host_tls: at("pki"),
            host_scratch: at("scratch"),
        }),
    };
    QemuHost::new(vec![machine], at("plans"), Arc::new(RealClock))
}

#[test]
fn a_guest_whose_link_is_cut_while_it_stands_still_thaws_itself() {
    let guest = GuestPlan::new().unwrap().data(64).unwrap().start().unwrap();
    let scissors = Arc::new(Scissors::default());
    let host = host(&guest, pipe(&guest.agent_socket(), &scissors));
    let id = MachineId("guest".into());
    let mut protected = Protected::new(&host, id.clone(), guest.inside());
    assert_eq!(protected.back_up(), ["full", "full"]);
    assert_eq!(protected.back_up(), ["incremental", "incremental"]);

    scissors.armed.store(true, Ordering::SeqCst);
    let owner = Owner { repository: Id16([1; 16]), workload: Id16([2; 16]) };
    let request = SnapshotRequest {
        freeze_limit: Duration::from_secs(4),
        ..SnapshotRequest::new(owner, Id16([99; 16]))
    };
    let outcome = host.snapshot(&id, &request);
    assert!(scissors.cut.load(Ordering::SeqCst), "the guest was never frozen");
    // Both of its disks were not held at one moment, so there is no snapshot.
    println!("{:?}", outcome.err().expect("a guest that was lost is no snapshot"));
    // Not before it is thawed, since nobody can reach its agent.
    guest.inside().run_well("date > /root/written && sync").unwrap();

    scissors.cut.store(false, Ordering::SeqCst);
    assert_eq!(protected.back_up(), ["incremental", "incremental"]);
}
