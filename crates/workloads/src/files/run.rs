//! What all threads of one restore share: the rules, the counts, what was lost, and the first fatal error.

use std::collections::HashMap;
use std::ffi::CString;
use std::ops::AddAssign;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use mainstay_core::{
    Code, Counts, Error, Event, HardLink, ItemPath, Kind, Metadata, Progress, Result, Skip, SkipReason,
};

use rustix::fs::{FlockOperation, flock};

use super::decide::{Action, RestoreRules, Wanted};
use super::dirs::{Dir, FileId};
use super::owners::Owners;

/// How many skips are listed one by one; further ones are only counted.
const SKIPS_MAX: usize = 1 << 20;

/// How the names of unfinished files begin: hidden, and unlike what people call their files.
const TEMPORARY: &[u8] = b".mainstay-restore-";

/// Who owns what is restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OwnerRule {
    /// The user and group of that name on this machine; by number where there is none.
    #[default]
    ByName,
    ByNumber,
    /// Whoever restores it. An ordinary user keeps the group where they belong to it. Set-id bits go, unless this
    /// is the recorded owner.
    Leave,
}

/// How many paths met which fate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub created: u64,
    pub replaced: u64,
    pub metadata: u64,
    pub deleted: u64,
    pub same: u64,
    /// Of a plan only: what is done is a skip.
    pub blocked: u64,
}

impl AddAssign for Changes {
    fn add_assign(&mut self, more: Self) {
        let Self { created, replaced, metadata, deleted, same, blocked } = more;
        self.created += created;
        self.replaced += replaced;
        self.metadata += metadata;
        self.deleted += deleted;
        self.same += same;
        self.blocked += blocked;
    }
}

/// The result of a restore.
#[derive(Clone, Debug, Default)]
pub struct Restored {
    pub counts: Counts,
    pub changes: Changes,
    /// What could not be restored in full, and what the source could not yield; 2^20 at most, all are counted.
    pub skips: Vec<Skip>,
    /// Those of the skips whose reason is [`SkipReason::Damaged`].
    pub damaged: u64,
}

pub(super) struct Run {
    pub(super) root: Arc<Dir>,
    pub(super) rules: RestoreRules,
    owners: Owners,
    owner_rule: OwnerRule,
    pub(super) euid: u32,
    /// Hexadecimal digits of this run's temporary names.
    tag: String,
    serial: AtomicU64,
    stopped: AtomicBool,
    /// What is done with so far, in whichever way.
    done: Mutex<Counts>,
    progress: Option<Arc<dyn Progress>>,
    state: Mutex<State>,
    links: Mutex<HashMap<HardLink, Arc<LinkSlot>>>,
}

#[derive(Default)]
struct State {
    restored: Restored,
    fatal: Option<Error>,
}

impl Drop for Run {
    /// Lets the next restore in. Closing alone would not: a process that is just being started has a copy of the
    /// descriptor for a moment.
    fn drop(&mut self) {
        if let Ok(fd) = self.root.fd() {
            let _without_locks_there_is_none = flock(&*fd, FlockOperation::Unlock);
        }
    }
}

impl Run {
    pub(super) fn new(
        root: Arc<Dir>,
        rules: RestoreRules,
        owner_rule: OwnerRule,
        tag: String,
        progress: Option<Arc<dyn Progress>>,
    ) -> Self {
        Self {
            root,
            rules,
            owners: Owners::of_this_machine(),
            owner_rule,
            euid: rustix::process::geteuid().as_raw(),
            tag,
            serial: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            done: Mutex::default(),
            progress,
            state: Mutex::default(),
            links: Mutex::default(),
        }
    }

    pub(super) fn wanted<'a>(&self, metadata: &'a Metadata) -> Wanted<'a> {
        Wanted { metadata, owner: self.owner_rule.owner(&self.owners, metadata) }
    }

    /// Who owned it where it was captured, in numbers of this machine.
    pub(super) fn recorded_owner(&self, metadata: &Metadata) -> (u32, u32) {
        let rule = if self.owner_rule == OwnerRule::Leave { OwnerRule::ByName } else { self.owner_rule };
        rule.owner(&self.owners, metadata).unwrap_or((metadata.uid, metadata.gid))
    }

    /// A name that no other file has: unfinished until it is renamed.
    pub(super) fn temporary_name(&self) -> CString {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let mut name = TEMPORARY.to_vec();
        name.extend_from_slice(format!("{}-{serial:x}", self.tag).as_bytes());
        CString::new(name).unwrap_or_default()
    }

    pub(super) fn skip(&self, path: ItemPath, reason: SkipReason, detail: String) {
        self.record(Skip { path, reason, detail });
    }

    pub(super) fn record(&self, skip: Skip) {
        let restored = &mut self.state().restored;
        let count =
            if skip.reason.is_loss() { &mut restored.counts.skipped } else { &mut restored.counts.noticed };
        *count += 1;
        restored.damaged += u64::from(skip.reason == SkipReason::Damaged);
        if restored.skips.len() < SKIPS_MAX {
            restored.skips.push(skip);
        }
    }

    /// An item that was dealt with; `bytes` are those written.
    pub(super) fn count(&self, action: Action, metadata: &Metadata, bytes: u64) {
        let Restored { counts, changes, .. } = &mut self.state().restored;
        counts.items += 1;
        counts.bytes += metadata.size;
        counts.written_bytes += bytes;
        let fate = match action {
            Action::Create => &mut changes.created,
            Action::Replace => &mut changes.replaced,
            Action::Metadata => &mut changes.metadata,
            Action::Delete => &mut changes.deleted,
            Action::Same => &mut changes.same,
            Action::Blocked => &mut changes.blocked,
        };
        *fate += 1;
        if action == Action::Same {
            counts.unchanged += 1;
        }
    }

    /// One more item is done with, and so many bytes of its content that were not told of yet.
    pub(super) fn dealt_with(&self, bytes: u64) {
        self.tell(1, bytes);
    }

    /// So many more bytes of an item at work are written.
    pub(super) fn advance(&self, bytes: u64) {
        self.tell(0, bytes);
    }

    fn tell(&self, items: u64, bytes: u64) {
        let Some(progress) = &self.progress else { return };
        let mut done = lock(&self.done);
        done.items += items;
        done.bytes = done.bytes.saturating_add(bytes);
        // Under the lock, so that no figure ever falls.
        progress.event(&Event::Done(*done));
    }

    pub(super) fn count_deleted(&self) {
        self.state().restored.changes.deleted += 1;
    }

    /// Takes note of an error with one item. Those that would meet every further item end the run.
    pub(super) fn fail(&self, path: &ItemPath, reason: SkipReason, error: Error) {
        let reason = match error.code() {
            Code::Io | Code::NotFound | Code::AlreadyExists | Code::Unsupported | Code::Refused => reason,
            Code::Integrity => SkipReason::Damaged,
            _ => return self.stop(error),
        };
        self.skip(path.clone(), reason, error.chain().join(": "));
    }

    pub(super) fn stop(&self, error: Error) {
        self.state().fatal.get_or_insert(error);
        self.stopped.store(true, Ordering::Release);
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// The fatal error, once; afterwards a plain refusal to go on.
    pub(super) fn check(&self) -> Result<()> {
        if !self.is_stopped() {
            return Ok(());
        }
        let fatal = self.state().fatal.take();
        Err(fatal.unwrap_or_else(|| Error::new(Code::Cancelled, "the restore has failed already")))
    }

    pub(super) fn take(&self) -> Restored {
        std::mem::take(&mut self.state().restored)
    }

    /// The part that this item has in its set of hard links: the first one is written, the others wait for it.
    pub(super) fn link(&self, link: HardLink) -> LinkPart {
        let mut links = lock(&self.links);
        match links.get(&link) {
            Some(slot) => LinkPart::Other(Arc::clone(slot)),
            None => {
                let slot = Arc::new(LinkSlot::default());
                links.insert(link, Arc::clone(&slot));
                LinkPart::First(FirstLink(slot))
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl OwnerRule {
    pub(super) fn owner(self, owners: &Owners, metadata: &Metadata) -> Option<(u32, u32)> {
        let by_name =
            |number, named: Option<u32>| if self == Self::ByName { named.unwrap_or(number) } else { number };
        let user = metadata.user.as_deref().and_then(|user| owners.uid(user));
        let group = metadata.group.as_deref().and_then(|group| owners.gid(group));
        (self != Self::Leave).then(|| (by_name(metadata.uid, user), by_name(metadata.gid, group)))
    }
}

/// Whether a name is that of a file which a killed restore left behind.
pub(super) fn is_temporary(name: &[u8]) -> bool {
    name.strip_prefix(TEMPORARY).is_some_and(|rest| {
        let mut parts = rest.split(|&byte| byte == b'-');
        let hexadecimal = |part: Option<&[u8]>, len: std::ops::RangeInclusive<usize>| {
            part.is_some_and(|part| len.contains(&part.len()) && part.iter().all(u8::is_ascii_hexdigit))
        };
        hexadecimal(parts.next(), 16..=16) && hexadecimal(parts.next(), 1..=16) && parts.next().is_none()
    })
}

/// The part of one item in a set of hard links.
pub(super) enum LinkPart {
    First(FirstLink),
    Other(Arc<LinkSlot>),
}

/// Where the first of a set of hard links has come to be.
#[derive(Clone)]
pub(super) struct Made {
    pub(super) path: ItemPath,
    pub(super) kind: Kind,
    pub(super) id: FileId,
}

#[derive(Default)]
pub(super) struct LinkSlot {
    state: Mutex<LinkState>,
    settled: Condvar,
}

#[derive(Clone, Default)]
enum LinkState {
    #[default]
    Pending,
    Made(Made),
    Lost,
}

/// The duty to say what became of the first link; dropped, it says that nothing did.
pub(super) struct FirstLink(Arc<LinkSlot>);

impl FirstLink {
    pub(super) fn made(self, made: Made) {
        *lock(&self.0.state) = LinkState::Made(made);
    }
}

impl Drop for FirstLink {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        if matches!(*state, LinkState::Pending) {
            *state = LinkState::Lost;
        }
        self.0.settled.notify_all();
    }
}

impl LinkSlot {
    /// Waits until it is known. The first link is always ahead in the queue, so it never waits for this one.
    pub(super) fn wait(&self) -> Option<Made> {
        let pending = |state: &mut LinkState| matches!(state, LinkState::Pending);
        let state = self.settled.wait_while(lock(&self.state), pending);
        match &*state.unwrap_or_else(PoisonError::into_inner) {
            LinkState::Made(made) => Some(made.clone()),
            LinkState::Pending | LinkState::Lost => None,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::is_temporary;

    #[test]
    fn only_our_own_leftovers_are_taken_for_such() {
        assert!(is_temporary(b".mainstay-restore-0123456789abcdef-1f"));
        for other in [
            b".mainstay-restore-".as_slice(),
            b".mainstay-restore-notes.txt",
            b".mainstay-restore-0123456789abcdef",
            b".mainstay-restore-0123456789abcdef-",
            b".mainstay-restore-0123456789abcdef-1-2",
            b"mainstay-restore-0123456789abcdef-1",
        ] {
            assert!(!is_temporary(other), "{}", String::from_utf8_lossy(other));
        }
    }
}
