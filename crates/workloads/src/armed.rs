//! What has to be let go before this process may end: an application at rest, a snapshot. Whoever ends the process
//! from outside the run, on a second signal, asks here first.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// By the order in which they came, with what people call them.
static ARMED: Mutex<BTreeMap<u64, String>> = Mutex::new(BTreeMap::new());

/// Keeps [`unless_armed`] from acting while it lives.
#[derive(Debug)]
pub struct Armed(u64);

impl Armed {
    /// `what` completes the sentence "waiting for …".
    pub fn new(what: impl Into<String>) -> Self {
        let mut armed = lock();
        let number = armed.last_key_value().map_or(0, |(last, _)| last + 1);
        armed.insert(number, what.into());
        Self(number)
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        lock().remove(&self.0);
    }
}

/// Calls `end` if nothing is armed, and nothing is until it returns. Otherwise what is.
pub fn unless_armed(end: impl FnOnce()) -> Option<String> {
    let armed = lock();
    if armed.is_empty() {
        end();
        return None;
    }
    Some(armed.values().map(String::as_str).collect::<Vec<_>>().join(", "))
}

fn lock() -> MutexGuard<'static, BTreeMap<u64, String>> {
    ARMED.lock().unwrap_or_else(PoisonError::into_inner)
}
