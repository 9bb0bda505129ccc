//! The lines that tell what on the hosts is protected, deliberately left, or nobody's.

use jiff::tz::TimeZone;
use schemars::JsonSchema;
use serde::Serialize;

use super::human::{Align, bytes};
use super::text::{clean, shown_time};

/// What has been decided of something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Standing {
    /// protected, ignored, undecided
    pub standing: String,
    /// Who decided to leave it, why, and until when.
    pub who: Option<String>,
    pub why: Option<String>,
    pub until: Option<String>,
}

/// Something on the hosts that somebody should know of.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Finding {
    /// orphaned-image, broken-chain, stale-snapshot, stale-bitmap, clone, gone
    pub finding: String,
    /// machine, image, snapshot, points
    pub subject: String,
    /// Of the machine, the snapshot or the workload; the path of the image.
    pub name: String,
    pub host: Option<String>,
    /// The machine that a snapshot is on, or that the points are of.
    pub machine: Option<String>,
    /// Whether a stale bitmap is this repository's own.
    pub ours: Option<bool>,
    pub bytes: Option<u64>,
    /// When the snapshot was taken; of points that are left, the newest one's moment.
    pub since: Option<String>,
    /// Machines with the same identity or the same image.
    pub with: Vec<String>,
    #[serde(flatten)]
    pub standing: Standing,
}

/// A decision about something on the hosts.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Decision {
    /// What it is about: a name or a pattern.
    pub name: String,
    pub host: Option<String>,
    pub who: String,
    pub why: String,
    pub until: Option<String>,
    /// It was taken back.
    pub again: bool,
}

pub(super) const TITLES: [(&str, Align); 6] = [
    ("FINDING", Align::Left),
    ("WHAT", Align::Left),
    ("WHERE", Align::Left),
    ("SINCE", Align::Left),
    ("SIZE", Align::Right),
    ("STANDING", Align::Left),
];

impl Standing {
    /// For people.
    pub(super) fn shown(&self, zone: &TimeZone) -> String {
        let Some(who) = &self.who else { return self.standing.clone() };
        let why = self.why.as_deref().map(clean).unwrap_or_default();
        let until = self.until.as_deref().map(|until| format!(", until {}", shown_time(until, zone)));
        format!("{} by {}: {why}{}", self.standing, clean(who), until.unwrap_or_default())
    }
}

impl Finding {
    pub(super) fn row(&self, zone: &TimeZone) -> Vec<String> {
        let finding = match (self.finding.as_str(), self.ours) {
            ("clone", _) => format!("clone of {}", clean(&self.with.join(", "))),
            (finding, Some(true)) => format!("{finding}, ours"),
            (finding, Some(false)) => format!("{finding}, not ours"),
            (finding, None) => finding.to_owned(),
        };
        let place = match (&self.host, &self.machine) {
            (Some(host), Some(machine)) => format!("{} on {}", clean(machine), clean(host)),
            (Some(one), None) | (None, Some(one)) => clean(one),
            (None, None) => String::new(),
        };
        vec![
            finding,
            clean(&self.name),
            place,
            self.since.as_deref().map(|since| shown_time(since, zone)).unwrap_or_default(),
            self.bytes.map(bytes).unwrap_or_default(),
            self.standing.shown(zone),
        ]
    }
}

pub(super) fn decision(decision: &Decision, zone: &TimeZone) -> String {
    let name = clean(&decision.name);
    let place = decision.host.as_deref().map(|host| format!(" on {}", clean(host))).unwrap_or_default();
    if decision.again {
        return format!("{name}{place} is not ignored any more\n");
    }
    let until = decision.until.as_deref().map(|until| format!(" until {}", shown_time(until, zone)));
    let (who, why) = (clean(&decision.who), clean(&decision.why));
    format!("{name}{place} is ignored{}: {why} ({who})\n", until.unwrap_or_default())
}
