//! When a row was changed and by which transaction: out of the log in the journal, beginning at a point.

use std::sync::Arc;

use mainstay_core::{Code, Error, Progress, Result, Time};
use mainstay_repository::{PointInfo, Repository};
use mainstay_workloads::postgres::walread::{Ending, Record, Relation, RowChange, Spot, WalReader};
use mainstay_workloads::postgres::{KIND, Lsn, Sql};

use super::database::Database as _;
use super::postgres::{Postgres, Watch};
use crate::postgres::{ClusterPlan, Instance, Until, plan_cluster};

/// Which row, of which cluster.
pub struct HistoryAsk<'a> {
    pub workload: &'a mainstay_core::WorkloadId,
    pub database: &'a str,
    pub table: &'a str,
    pub wanted: &'a [(String, String)],
    /// Begin at the oldest point, and not at the newest one that tells something.
    pub all: bool,
}

/// What happened to a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Inserted,
    Changed,
    Deleted,
    /// To another partition.
    Moved,
    /// The table was rewritten, emptied or dropped: the row cannot be followed further.
    Rewritten,
}

impl What {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Inserted => "inserted",
            Self::Changed => "changed",
            Self::Deleted => "deleted",
            Self::Moved => "moved",
            Self::Rewritten => "rewritten",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Happened {
    pub what: What,
    /// Where the change is in the log, and where it was committed.
    pub at: Lsn,
    pub committed: Lsn,
    pub transaction: u32,
    /// Of the commit.
    pub time: Time,
}

/// What a log tells of one row.
#[derive(Clone, Debug)]
pub struct History {
    pub shown: String,
    /// The point that it begins at, and whether the row was there then.
    pub point: PointInfo,
    pub was_there: bool,
    /// In the order of the commits.
    pub events: Vec<Happened>,
    /// The log was read from and up to here.
    pub from: Lsn,
    pub to: Lsn,
    pub notes: Vec<String>,
}

impl History {
    /// The last deletion, when nothing came after it.
    pub fn deletion(&self) -> Option<&Happened> {
        self.events.last().filter(|last| last.what == What::Deleted)
    }
}

/// Brings up a private copy of a database.
pub type Bring<'a> = dyn Fn(&ClusterPlan) -> Result<Instance> + 'a;

/// Looks a row up in private copies of the cluster at its points, newest first, until one of them and the log behind it
/// tell of it.
///
/// Errors: [`Code::NotFound`] when nothing does; [`Code::Unsupported`] for a log of a version that is not read here.
pub fn history(
    repository: &Repository,
    bring: &Bring<'_>,
    ask: &HistoryAsk<'_>,
    progress: &Arc<dyn Progress>,
) -> Result<History> {
    let mut points = repository.points()?;
    points.retain(|point| {
        point.workload.id == *ask.workload && point.workload.kind.0 == KIND && point.readable
    });
    if !ask.all {
        points.reverse();
    }
    let mut last = None;
    for point in points {
        progress.check()?;
        let Some(end) = Lsn::from_position(&point.position) else { continue };
        let plan = match plan_cluster(repository, ask.workload, Until::Lsn(end)) {
            Err(error) if error.code() == Code::NotFound => continue,
            plan => plan?,
        };
        let instance = bring(&plan)?;
        let at: Lsn = instance
            .reached()
            .lsn
            .parse()
            .map_err(|()| Error::bug("a server is at a place that is no place"))?;
        let mut database = Postgres::read(Sql::new(instance.connect(ask.database)?))?;
        let catalog = database.catalog()?;
        let watch = match database.watch(&catalog, ask.table, ask.wanted, at) {
            Err(error) if error.code() == Code::NotFound => {
                last = Some(error);
                continue;
            }
            watch => watch?,
        };
        instance.check_content()?;
        drop((database, instance));
        let found = follow(&plan, &watch, progress.as_ref())?;
        if found.was_there || !found.events.is_empty() {
            return Ok(found);
        }
    }
    Err(last.unwrap_or_else(|| Error::new(Code::NotFound, "no point and no log tells of that row")).hint(
        "it may have come and gone between two points with wal_level=replica, or before the first point; \
         mainstay db status shows what can be recovered",
    ))
}

/// Reads the log from where a row was looked up to where it ends.
fn follow(plan: &ClusterPlan, watch: &Watch, progress: &dyn Progress) -> Result<History> {
    let start: Lsn = plan
        .cluster
        .start
        .parse()
        .map_err(|()| Error::integrity("the point does not say where it starts"))?;
    // What was under way at the point began before it.
    let from = start.min(watch.at).segment_start(plan.cluster.segment_bytes);
    let mut tracker = Tracker::new(watch);
    let mut reader = WalReader::new(plan.cluster.segment_bytes);
    // A timeline begins with what it has of the one before it, which was read there.
    let (mut leg, mut known, mut to) = (0, Lsn(0), from);
    let read = plan.read_log(from, &mut |number, at, bytes| {
        progress.check()?;
        if number != leg {
            let ended = std::mem::replace(&mut reader, WalReader::new(plan.cluster.segment_bytes));
            ended.finish(&mut |record| tracker.record(record, known))?;
            (leg, known) = (number, to);
        }
        reader.push(at, bytes, &mut |record| tracker.record(record, known))?;
        to = Lsn(at.0 + bytes.len() as u64);
        Ok(())
    });
    let cut = match read {
        Err(error) if error.code() == Code::Integrity => Some(error),
        read => {
            read?;
            reader.finish(&mut |record| tracker.record(record, known))?;
            None
        }
    };
    let mut notes = Vec::new();
    if let Some(error) = cut {
        notes.push(format!("the log is whole only up to {to}: {}", error.chain().join(": ")));
    }
    if watch.relations.values().any(Option::is_none) {
        notes.push(
            "the key is of a type that is not looked for in the log: only a row that was there at the point is followed"
                .into(),
        );
    }
    Ok(History {
        shown: watch.shown.clone(),
        point: plan.point.clone(),
        was_there: watch.spot.is_some(),
        events: tracker.events,
        from,
        to,
        notes,
    })
}

/// A change whose transaction has not ended.
struct Step {
    what: What,
    at: Lsn,
    transaction: u32,
    to: Option<(Relation, Spot)>,
}

/// Where the row is, as far as the log was read.
struct Tracker<'a> {
    watch: &'a Watch,
    /// As committed.
    spot: Option<(Relation, Spot)>,
    under_way: Vec<Step>,
    events: Vec<Happened>,
}

impl<'a> Tracker<'a> {
    fn new(watch: &'a Watch) -> Self {
        Self { watch, spot: watch.spot, under_way: Vec::new(), events: Vec::new() }
    }

    fn record(&mut self, record: &Record<'_>, from: Lsn) -> Result<()> {
        if record.start < from {
            return Ok(());
        }
        if let Some((relation, changes)) = record.rows()
            && self.watch.relations.contains_key(&relation)
        {
            for change in changes {
                if let Some((what, to)) = self.hit(relation, &change) {
                    let transaction = record.transaction;
                    self.under_way.push(Step { what, at: record.start, transaction, to });
                }
            }
        }
        if let Some(ending) = record.ending() {
            self.end(record.start, &ending);
        }
        Ok(())
    }

    /// What a change does to the row, and where it is then.
    fn hit(&self, relation: Relation, change: &RowChange<'_>) -> Option<(What, Option<(Relation, Spot)>)> {
        let here = |spot: &Spot| {
            let spot = Some((relation, *spot));
            spot == self.spot || self.under_way.iter().any(|step| step.to == spot)
        };
        let shape = self.watch.relations.get(&relation).and_then(Option::as_ref);
        let is_key = |image: &Option<mainstay_workloads::postgres::walread::Image<'_>>| {
            let key = shape.zip(image.as_ref()).and_then(|(shape, image)| shape.of(image));
            key.is_some_and(|key| key == self.watch.key)
        };
        match change {
            RowChange::Insert { at, image } => {
                is_key(image).then_some((What::Inserted, Some((relation, *at))))
            }
            RowChange::Delete { at, key, moved } => {
                let what = if *moved { What::Moved } else { What::Deleted };
                (here(at) || is_key(key)).then_some((what, None))
            }
            RowChange::Update { from, to, key } => {
                (here(from) || is_key(key)).then_some((What::Changed, Some((relation, *to))))
            }
        }
    }

    fn end(&mut self, at: Lsn, ending: &Ending) {
        let transactions = &ending.transactions;
        let (ended, left): (Vec<Step>, Vec<Step>) = std::mem::take(&mut self.under_way)
            .into_iter()
            .partition(|step| transactions.contains(&step.transaction));
        self.under_way = left;
        // What had ended by the time the row was looked up is in what was seen.
        if !ending.committed || at < self.watch.at {
            return;
        }
        for step in ended {
            self.spot = step.to;
            self.events.push(Happened {
                what: step.what,
                at: step.at,
                committed: at,
                transaction: step.transaction,
                time: ending.time,
            });
        }
        let rewritten = ending.dropped.iter().any(|relation| self.watch.relations.contains_key(relation));
        if rewritten && self.events.last().is_none_or(|last| last.what != What::Rewritten) {
            self.spot = None;
            self.events.push(Happened {
                what: What::Rewritten,
                at,
                committed: at,
                transaction: ending.transactions.last().copied().unwrap_or_default(),
                time: ending.time,
            });
        }
    }
}
