//! Where each object lives in the blob store.

use mainstay_core::Id16;

pub(crate) const CONFIG: &str = "config";
pub(crate) const KEYS: &str = "keys";
pub(crate) const LOG: &str = "log";
pub(crate) const POINTS: &str = "points";
pub(crate) const PACKS: &str = "pack";
pub(crate) const RUNS: &str = "index";
pub(crate) const JOURNALS: &str = "journal";

pub(crate) fn key_slot(id: &Id16) -> String {
    format!("{KEYS}/{id}")
}

/// The sequence number in 16 hexadecimal digits, so that names sort as numbers do.
pub(crate) fn log_record(sequence: u64) -> String {
    format!("{LOG}/{sequence:016x}")
}

/// The number in the name of a record or of its copy.
pub(crate) fn log_sequence(name: &str) -> Option<u64> {
    let digits = name.rsplit('/').next()?;
    let sequence = u64::from_str_radix(digits, 16).ok()?;
    let record = log_record(sequence);
    (name == record || name == copy_of(&record)).then_some(sequence)
}

pub(crate) fn point(id: &Id16) -> String {
    format!("{POINTS}/{id}")
}

/// Packs spread over 256 directories by the last byte of their name, which is random.
pub(crate) fn pack(id: &Id16) -> String {
    format!("{PACKS}/{:02x}/{id}", id.0[15])
}

pub(crate) fn index_run(id: &Id16) -> String {
    format!("{RUNS}/{id}")
}

/// Under which all objects of a stream lie.
pub(crate) fn journals(stream: &Id16) -> String {
    format!("{JOURNALS}/{stream}")
}

/// The number in 16 hexadecimal digits, so that names sort as numbers do.
pub(crate) fn journal(stream: &Id16, number: u64) -> String {
    format!("{JOURNALS}/{stream}/{number:016x}")
}

/// Stream and number in the name of a journal object.
pub(crate) fn journal_object(name: &str) -> Option<(Id16, u64)> {
    let (stream, number) = name.strip_prefix(JOURNALS)?.strip_prefix('/')?.split_once('/')?;
    let (stream, number) = (stream.parse().ok()?, u64::from_str_radix(number, 16).ok()?);
    (journal(&stream, number) == name).then_some((stream, number))
}

/// The second copy of a small object.
pub(crate) fn copy_of(name: &str) -> String {
    format!("copy/{name}")
}

/// The identity at the end of a pack's name; `None` for anything else.
pub(crate) fn pack_id(name: &str) -> Option<Id16> {
    let id = name.strip_prefix(PACKS)?.strip_prefix('/')?.get(3..)?.parse().ok()?;
    (pack(&id) == name).then_some(id)
}

/// The identity in the name of an index run.
pub(crate) fn run_id(name: &str) -> Option<Id16> {
    let id = name.rsplit('/').next()?.parse().ok()?;
    (index_run(&id) == name).then_some(id)
}

/// The identity in the name of a point or of its copy.
pub(crate) fn point_id(name: &str) -> Option<Id16> {
    let id = name.rsplit('/').next()?.parse().ok()?;
    (point(&id) == name || copy_of(&point(&id)) == name).then_some(id)
}
