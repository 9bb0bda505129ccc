//! A guest agent for tests, that can be told how to behave.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// How the agent answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Manner {
    Willing,
    /// Nothing at all.
    Silent,
    /// It takes its time to freeze, then does.
    SlowToFreeze,
    /// It freezes, and does not say so.
    Speechless,
    /// It has no command for it.
    Unable,
    /// Bytes without end, and no line.
    Endless,
    /// Lines without sense.
    Babbling,
}

#[derive(Default)]
pub(crate) struct Guest {
    pub(crate) frozen: AtomicBool,
    pub(crate) freezes: AtomicUsize,
    pub(crate) trims: AtomicUsize,
    /// A process that is stopped once the guest stands still.
    pub(crate) stops: Mutex<Option<Pid>>,
}

/// Serves one client at a time, as QEMU does, until the test ends.
pub(crate) fn serve(socket: PathBuf, manner: Manner) -> Arc<Guest> {
    let listener = UnixListener::bind(socket).unwrap();
    let guest = Arc::new(Guest::default());
    let serving = Arc::clone(&guest);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _hung_up = talk(stream, manner, &serving);
        }
    });
    guest
}

fn talk(mut stream: UnixStream, manner: Manner, guest: &Arc<Guest>) -> std::io::Result<()> {
    if manner == Manner::Endless {
        loop {
            stream.write_all(&[b'x'; 4096])?;
        }
    }
    let answers = Arc::new(Mutex::new(stream.try_clone()?));
    for line in BufReader::new(stream).split(b'\n') {
        let line = line?;
        let line = line.rsplit(|&byte| byte == 0xff).next().unwrap();
        let Ok(asked) = serde_json::from_slice::<Value>(line) else { continue };
        let answer = match (manner, asked["execute"].as_str().unwrap()) {
            (Manner::Silent, _) => continue,
            (_, "guest-sync-delimited") => {
                answers.lock().unwrap().write_all(&[0xff])?;
                asked["arguments"]["id"].clone()
            }
            (Manner::Babbling, _) => json!("[[[["),
            (_, "guest-info") => {
                let enabled = manner != Manner::Unable;
                let command = |name: &str| json!({ "name": name, "enabled": enabled });
                json!({ "version": "1.0", "supported_commands":
                    [command("guest-fsfreeze-freeze"), command("guest-fsfreeze-thaw")] })
            }
            (_, "guest-fsfreeze-freeze") => {
                if manner == Manner::SlowToFreeze {
                    std::thread::sleep(Duration::from_millis(600));
                }
                guest.freezes.fetch_add(1, Ordering::SeqCst);
                guest.frozen.store(true, Ordering::SeqCst);
                if let Some(pid) = *guest.stops.lock().unwrap() {
                    kill_process(pid, Signal::STOP).unwrap();
                }
                if manner == Manner::Speechless {
                    continue;
                }
                json!(1)
            }
            (_, "guest-fsfreeze-thaw") => json!(u8::from(guest.frozen.swap(false, Ordering::SeqCst))),
            (_, "guest-fstrim") => json!({ "paths": guest.trims.fetch_add(1, Ordering::SeqCst) }),
            (_, other) => panic!("nobody should ask {other}"),
        };
        writeln!(answers.lock().unwrap(), "{}", json!({ "return": answer }))?;
    }
    Ok(())
}
