//! Mistakes that tests plant, to see that the harnesses catch them. Without the feature `planted-bugs` nothing is
//! ever planted.

/// What can be planted, for the whole process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planted {
    /// The log names a point whose packs are not durable yet.
    CommitBeforeFlush,
    /// A writer says that a point exists though its record could not be written.
    AcknowledgeUnwritten,
    /// A writer commits without looking whether what it relies on was condemned.
    CommitUnchecked,
    /// The collector condemns by a plan made at an older head of the log.
    CondemnAtAnyHead,
    /// The collector registers copies although another one condemned them meanwhile.
    CondemnIntoCondemned,
    /// The collector deletes what is condemned without looking who reaches it.
    DeleteUnmarked,
    /// The collector removes bytes as soon as it thinks them dead.
    DeleteBeforeCondemning,
    /// The collector removes the bytes of condemned packs and tells nobody.
    DeleteWithoutRecord,
}

#[cfg(feature = "planted-bugs")]
static PLANTED: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);

/// Plants these, and takes out what was planted before.
#[cfg(feature = "planted-bugs")]
pub fn plant(all: &[Planted]) {
    let bits = all.iter().fold(0, |bits, one| bits | 1 << *one as u32);
    PLANTED.store(bits, std::sync::atomic::Ordering::SeqCst);
}

#[cfg(feature = "planted-bugs")]
pub(crate) fn planted(what: Planted) -> bool {
    PLANTED.load(std::sync::atomic::Ordering::SeqCst) & 1 << what as u32 != 0
}

#[cfg(not(feature = "planted-bugs"))]
pub(crate) const fn planted(_what: Planted) -> bool {
    false
}
