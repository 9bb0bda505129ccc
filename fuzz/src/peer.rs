//! Peers that say what a fuzzer thinks of, on sockets.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What nobody waits longer for.
pub const LIMIT: Duration = Duration::from_secs(2);

/// A path for a socket of this process.
pub fn place(name: &str) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("mainstay-fuzz-{}-{name}-{number}", std::process::id()))
}

/// Bytes that are taken from the front, by all who share them.
#[derive(Clone)]
pub struct Supply(Arc<Mutex<std::collections::VecDeque<u8>>>);

impl Supply {
    pub fn new(bytes: &[u8]) -> Self {
        Self(Arc::new(Mutex::new(bytes.iter().copied().collect())))
    }

    /// At most so many; fewer at the end.
    pub fn take(&self, length: usize) -> Vec<u8> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let length = length.min(bytes.len());
        bytes.drain(..length).collect()
    }

    pub fn byte(&self) -> Option<u8> {
        self.take(1).first().copied()
    }

    /// Up to a line feed, which is left out.
    pub fn line(&self) -> Option<Vec<u8>> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes.is_empty() {
            return None;
        }
        let end = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
        let line = bytes.drain(..end).collect();
        bytes.pop_front();
        Some(line)
    }
}

/// Listens at a path, and has `speak` answer each who comes until this is dropped.
pub struct Listener {
    path: PathBuf,
    end: Arc<std::sync::atomic::AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Listener {
    pub fn start(path: PathBuf, speak: impl Fn(UnixStream) + Send + 'static) -> Self {
        let listener = UnixListener::bind(&path).expect("a socket");
        let end = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let ends = Arc::clone(&end);
        let thread = std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                if ends.load(Ordering::Relaxed) {
                    return;
                }
                let _set = socket.set_read_timeout(Some(LIMIT));
                let _set = socket.set_write_timeout(Some(LIMIT));
                speak(socket);
            }
        });
        Self { path, end, thread: Some(thread) }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        drop(UnixStream::connect(&self.path));
        self.thread.take().map(std::thread::JoinHandle::join);
        drop(std::fs::remove_file(&self.path));
    }
}

/// Speaks lines of JSON: each line of the supply is the answer to the next command, with the right number, unless it
/// begins with a `!`: then it is sent as it is, and the command waits on. `greeting` comes first; `honest` answers some
/// commands whatever the supply has.
pub fn speak_json(
    mut socket: UnixStream,
    supply: &Supply,
    greeting: &str,
    honest: fn(&str) -> Option<&'static str>,
) {
    if socket.write_all(greeting.as_bytes()).is_err() {
        return;
    }
    let Ok(reading) = socket.try_clone() else { return };
    let mut reading = BufReader::new(reading);
    let mut command = Vec::new();
    while reading.read_until(b'\n', &mut command).is_ok_and(|length| length > 0) {
        let start = command.iter().position(|byte| *byte == b'{').unwrap_or(command.len());
        let asked: serde_json::Value = serde_json::from_slice(&command[start..]).unwrap_or_default();
        command.clear();
        if asked["execute"] == "guest-sync-delimited" {
            let answer = format!("{{\"return\": {}}}\n", asked["arguments"]["id"]);
            if socket.write_all(&[b"\xff", answer.as_bytes()].concat()).is_err() {
                return;
            }
            continue;
        }
        if let Some(answer) = asked["execute"].as_str().and_then(honest) {
            let answer = format!("{{\"return\": {answer}, \"id\": {}}}\n", asked["id"]);
            if socket.write_all(answer.as_bytes()).is_err() {
                return;
            }
            continue;
        }
        loop {
            let Some(line) = supply.line() else { return };
            let (raw, line) = match line.strip_prefix(b"!") {
                Some(raw) => (true, raw.to_vec()),
                None => (false, line),
            };
            let sent = if raw {
                [line.as_slice(), b"\n"].concat()
            } else {
                [b"{\"return\": ", line.as_slice(), format!(", \"id\": {}}}\n", asked["id"]).as_bytes()]
                    .concat()
            };
            if socket.write_all(&sent).is_err() {
                return;
            }
            if !raw {
                break;
            }
        }
    }
}

/// Reads whatever comes, up to a limit.
pub fn drain(socket: &mut UnixStream) {
    let mut buffer = vec![0; 64 << 10];
    let mut left = 256;
    while left > 0 && socket.read(&mut buffer).is_ok_and(|length| length > 0) {
        left -= 1;
    }
}
