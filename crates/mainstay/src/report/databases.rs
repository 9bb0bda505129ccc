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
    pub items: u64,
    pub bytes: u64,
    pub skipped: u64,
    pub seconds: f64,
}

/// As people read them; `None` for lines of other things.
pub(super) fn line(line: &Line, zone: &TimeZone) -> Option<String> {
    Some(match line {
        Line::ClusterCaptured(done) => captured(done),
        Line::ClusterRestored(done) => restored(done),
        Line::Following(line) => following(line),
        Line::Recoverable(span) => recoverable(span, zone),
        Line::Hole(missing) => hole(missing, zone),
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

fn following(line: &Following) -> String {
    format!("following the log of {} at {}; Ctrl-C ends it\n", clean(&line.workload), clean(&line.server))
}

fn restored(line: &ClusterRestored) -> String {
    format!(
        "{} items, {} in {} · start PostgreSQL {} on it: it recovers and opens for writing\n",
        line.items,
        bytes(line.bytes),
        clean(&line.directory),
        clean(line.version.split(' ').next().unwrap_or_default())
    )
}
