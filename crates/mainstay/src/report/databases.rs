//! The lines that tell of databases.

use jiff::tz::TimeZone;
use schemars::JsonSchema;
use serde::Serialize;

use super::human::bytes;
use super::lines::Line;
use super::text::{clean, shown_time};

/// How a cluster was captured; a line of the type `backed_up` follows.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ClusterCaptured {
    pub point: String,
    pub workload: String,
    /// Of the server.
    pub version: String,
    pub timeline: u32,
    /// The log between these places belongs to the point.
    pub start: String,
    pub end: String,
    /// For so long the server was stopped.
    pub away_seconds: Option<f64>,
    pub notes: Vec<String>,
}

/// A span within which any moment of a cluster can be recovered.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Recoverable {
    pub workload: String,
    /// The line of the log: the cluster's own number and its timeline.
    pub log: String,
    pub start: String,
    pub end: String,
    /// The times of both, as far as they are known.
    pub from: Option<String>,
    pub until: Option<String>,
    pub log_bytes: u64,
}

/// A part of a log that is missing: nothing in it can be recovered.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Hole {
    pub workload: String,
    pub log: String,
    pub start: String,
    pub end: String,
    pub after: Option<String>,
    pub before: Option<String>,
    pub why: String,
}

/// The log of a cluster before a place was given up, because no point that is kept needs it; or would be.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Trimmed {
    pub workload: String,
    pub log: String,
    pub before: String,
    pub log_bytes: u64,
    pub dry_run: bool,
}

/// A replication slot of a server.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Slot {
    pub slot: String,
    /// Somebody follows it now.
    pub active: bool,
    /// reserved, extended, unreserved, lost: PostgreSQL's `wal_status`
    pub state: String,
    /// What it keeps at the server.
    pub kept_bytes: Option<u64>,
    /// What may still be written before the server gives it up, where that is limited.
    pub left_bytes: Option<u64>,
}

/// A log is followed from here on.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Following {
    pub workload: String,
    pub server: String,
}

/// A cluster was written out, ready to be started.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ClusterRestored {
    pub point: String,
    pub workload: String,
    pub version: String,
    pub directory: String,
    /// Where what was in its place is now.
    pub aside: Option<String>,
    /// Whom it follows, if it is a standby.
    pub standby_of: Option<String>,
    pub items: u64,
    pub bytes: u64,
    pub skipped: u64,
    pub seconds: f64,
}

/// A throwaway server shows a cluster at a moment.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ClusterOpened {
    pub point: String,
    pub workload: String,
    pub version: String,
    /// How programs of this machine get at it.
    pub address: String,
    /// Up to here the log was replayed.
    pub lsn: String,
    /// When the last transaction that it shows was committed, as the server writes it.
    pub last_commit: Option<String>,
    /// The log ended there.
    pub end_of_log: bool,
    /// Its files are read from the repository as it needs them.
    pub lazy: bool,
    /// Until it answered.
    pub seconds: f64,
    /// Fetched from the repository so far, as stored; read of files and log; and the bytes of the whole point.
    pub bytes_fetched: u64,
    pub bytes_read: u64,
    pub bytes_whole: u64,
}

/// A throwaway server has ended.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ClusterClosed {
    pub workload: String,
    pub seconds: f64,
    pub bytes_fetched: u64,
    pub bytes_read: u64,
    pub bytes_whole: u64,
}

/// A cluster was recovered into a private directory and checked.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Drilled {
    pub point: String,
    pub workload: String,
    pub version: String,
    pub lsn: String,
    pub last_commit: Option<String>,
    pub end_of_log: bool,
    pub lazy: bool,
    /// Until it answered at that moment: the measured recovery time.
    pub recovery_seconds: f64,
    /// Until the last check had passed.
    pub seconds: f64,
    /// What was checked, and what was not.
    pub checked: Vec<String>,
    pub left_out: Vec<String>,
    pub bytes_fetched: u64,
    pub bytes_read: u64,
    pub bytes_whole: u64,
}

/// A MariaDB server, or SQLite databases, were recovered in full and checked; that is noted in the point.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct DatabaseProven {
    pub point: String,
    pub workload: String,
    pub place: Option<String>,
    /// Until it answered at that moment: the measured recovery time.
    pub recovery_seconds: f64,
    /// Until the last check had passed.
    pub seconds: f64,
    pub checked: Vec<String>,
}

/// How a MariaDB server was captured; a line of the type `backed_up` follows.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ServerCaptured {
    pub point: String,
    pub workload: String,
    /// Of the server.
    pub version: String,
    /// In its binary log, as of which the files are; `None` without a log.
    pub place: Option<String>,
    /// The last transactions that they hold.
    pub gtid: Option<String>,
    pub replica: bool,
}

/// The files of a MariaDB server were written out, ready for one to be started on them.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ServerRestored {
    pub point: String,
    pub workload: String,
    pub version: String,
    pub directory: String,
    /// In the binary log of the server that was captured, as of which they are.
    pub place: Option<String>,
    pub items: u64,
    pub bytes: u64,
    pub seconds: f64,
}

/// A SQLite database was written out and checked.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct DatabaseRestored {
    pub point: String,
    pub workload: String,
    pub database: String,
    pub directory: String,
    /// The commit it is at, as far as its log tells.
    pub place: Option<String>,
    /// What SQLite's own check found.
    pub damage: Vec<String>,
}

/// As people read them; `None` for lines of other things.
pub(super) fn line(line: &Line, zone: &TimeZone) -> Option<String> {
    Some(match line {
        Line::ClusterCaptured(done) => captured(done),
        Line::ClusterRestored(done) => restored(done),
        Line::Following(line) => following(line),
        Line::Recoverable(span) => recoverable(span, zone),
        Line::DatabaseProven(done) => database_proven(done),
        Line::ServerCaptured(done) => server_captured(done),
        Line::ServerRestored(done) => server_restored(done),
        Line::DatabaseRestored(done) => database_restored(done),
        Line::Hole(missing) => hole(missing, zone),
        Line::ClusterOpened(line) => opened(line),
        Line::ClusterClosed(line) => {
            let cost = cost(line.bytes_fetched, line.bytes_read, line.bytes_whole);
            format!("closed after {:.1} s · {cost}\n", line.seconds)
        }
        Line::Drilled(line) => drilled(line),
        Line::Trimmed(line) => trimmed(line),
        Line::Slot(line) => slot(line),
        _ => return None,
    })
}

fn captured(line: &ClusterCaptured) -> String {
    format!(
        "{} · PostgreSQL {} · log {} to {} on timeline {}\n",
        clean(&line.workload),
        clean(&line.version),
        line.start,
        line.end,
        line.timeline
    )
}

fn recoverable(line: &Recoverable, zone: &TimeZone) -> String {
    let time =
        |time: &Option<String>| time.as_ref().map_or_else(|| "?".into(), |time| shown_time(time, zone));
    format!(
        "{}: any moment from {} to {} · log {} to {} · {}\n",
        clean(&line.workload),
        time(&line.from),
        time(&line.until),
        line.start,
        line.end,
        bytes(line.log_bytes)
    )
}

fn hole(line: &Hole, zone: &TimeZone) -> String {
    let time =
        |time: &Option<String>| time.as_ref().map_or_else(|| "?".into(), |time| shown_time(time, zone));
    format!(
        "{}: HOLE from {} to {} · log {} to {} · {}\n",
        clean(&line.workload),
        time(&line.after),
        time(&line.before),
        line.start,
        line.end,
        clean(&line.why)
    )
}

fn slot(line: &Slot) -> String {
    let advice = match (line.state.as_str(), line.active, line.left_bytes) {
        ("lost", ..) => " · its log is gone: mainstay db backup",
        ("unreserved", ..) => " · about to be given up: is the follower running?",
        (_, false, None) => " · nobody follows it, and it may fill the disk: set max_slot_wal_keep_size",
        (_, false, Some(_)) => " · nobody follows it",
        (_, true, _) => "",
    };
    let kept = line.kept_bytes.map_or_else(|| "?".into(), bytes);
    format!("slot {}: {} · keeps {kept}{advice}\n", clean(&line.slot), clean(&line.state))
}

fn trimmed(line: &Trimmed) -> String {
    let goes = if line.dry_run { "would go" } else { "is given up" };
    format!(
        "{}: the log before {} {goes}: no point that is kept needs it\n",
        clean(&line.workload),
        line.before
    )
}

fn following(line: &Following) -> String {
    format!("following the log of {} at {}; Ctrl-C ends it\n", clean(&line.workload), clean(&line.server))
}

fn restored(line: &ClusterRestored) -> String {
    let then = match &line.standby_of {
        Some(primary) => format!("replays its log and follows {}", clean(primary)),
        None => "recovers and opens for writing".into(),
    };
    format!(
        "{} items, {} in {} · start PostgreSQL {} on it: it {then}\n",
        line.items,
        bytes(line.bytes),
        clean(&line.directory),
        clean(line.version.split(' ').next().unwrap_or_default())
    )
}

fn cost(fetched: u64, read: u64, whole: u64) -> String {
    format!("{} read of {}, {} fetched", bytes(read), bytes(whole), bytes(fetched))
}

fn at(lsn: &str, last_commit: Option<&String>, end_of_log: bool) -> String {
    let commit = last_commit.map_or_else(String::new, |time| format!(", last commit {}", clean(time)));
    let end = if end_of_log { ", the end of the log" } else { "" };
    format!("{lsn}{commit}{end}")
}

fn opened(line: &ClusterOpened) -> String {
    format!(
        "{}\n{} at {} · {:.1} s · {}\n",
        line.address,
        clean(&line.workload),
        at(&line.lsn, line.last_commit.as_ref(), line.end_of_log),
        line.seconds,
        cost(line.bytes_fetched, line.bytes_read, line.bytes_whole)
    )
}

fn drilled(line: &Drilled) -> String {
    let left_out: String =
        line.left_out.iter().map(|what| format!("not checked: {}\n", clean(what))).collect();
    format!(
        "{} is proven: at {} within {:.1} s · {} · {:.1} s in all · {}\n{left_out}",
        clean(&line.workload),
        at(&line.lsn, line.last_commit.as_ref(), line.end_of_log),
        line.recovery_seconds,
        line.checked.iter().map(|what| clean(what)).collect::<Vec<_>>().join(", "),
        line.seconds,
        cost(line.bytes_fetched, line.bytes_read, line.bytes_whole)
    )
}

fn database_restored(line: &DatabaseRestored) -> String {
    let place = line.place.as_ref().map(|place| format!(" · as of {place}")).unwrap_or_default();
    let sound = if line.damage.is_empty() { " · sound" } else { " · DAMAGED" };
    let damage: String = line.damage.iter().map(|what| format!("  {}\n", clean(what))).collect();
    format!("{} in {}{place}{sound}\n{damage}", clean(&line.database), clean(&line.directory))
}

fn server_captured(line: &ServerCaptured) -> String {
    let part = |word: &str, text: &Option<String>| {
        text.as_ref().map(|text| format!(" · {word}{}", clean(text))).unwrap_or_default()
    };
    let place = part("log ", &line.place);
    let gtid = part("", &line.gtid);
    format!("{} · MariaDB {}{place}{gtid}\n", clean(&line.workload), clean(&line.version))
}

fn server_restored(line: &ServerRestored) -> String {
    let place = line.place.as_ref().map(|place| format!(" · as of {}", clean(place))).unwrap_or_default();
    format!(
        "{} items, {} in {}{place} · start MariaDB {} on it\n",
        line.items,
        bytes(line.bytes),
        clean(&line.directory),
        clean(line.version.split('-').next().unwrap_or_default())
    )
}

fn database_proven(line: &DatabaseProven) -> String {
    let place = line.place.as_ref().map(|place| format!(" at {}", clean(place))).unwrap_or_default();
    format!(
        "{} is proven{place}: within {:.1} s · {} · {:.1} s in all\n",
        clean(&line.workload),
        line.recovery_seconds,
        line.checked.iter().map(|what| clean(what)).collect::<Vec<_>>().join(", "),
        line.seconds
    )
}
