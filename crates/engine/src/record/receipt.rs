//! What a restore of a record has done, kept in the repository as a point of its own: what it was, what came back, and the
//! script that takes it back.

use std::sync::Arc;

use mainstay_core::{
    Body, Captured, Clock, Consistency, Error, Item, ItemPath, Kind, Metadata, Next, PointId, Position,
    Progress, Result, Source, Stamp, WorkloadKind, WorkloadRef,
};
use mainstay_repository::{Compression, Parent, Repository, WriteRequest};
use serde::Serialize;

use super::apply::Applied;
use super::plan::{Fate, Plan};
use crate::copy::copy;
use crate::undo::Text;
use crate::workload::derived_id;

/// The kind of workload whose points are receipts.
pub const RECORDS: &str = "records";

/// What is kept of a restore.
pub struct Receipt<'a> {
    /// The workload that the record is of, and the point and place of its log that it came out of.
    pub workload: &'a str,
    pub from: &'a str,
    pub server: &'a str,
    pub database: &'a str,
    pub who: &'a str,
    /// The transaction that it was.
    pub transaction: &'a str,
    pub plan: &'a Plan,
    pub applied: &'a Applied,
    pub script: &'a str,
    pub inverse: &'a str,
}

#[derive(Serialize)]
struct Told<'a> {
    workload: &'a str,
    from: &'a str,
    server: &'a str,
    database: &'a str,
    who: &'a str,
    transaction: &'a str,
    inserted: Vec<(String, String)>,
    relinked: Vec<(String, String)>,
    sequences: &'a [String],
    different: &'a [String],
    notes: &'a [String],
    schema: &'a [String],
    triggers: &'a [String],
}

impl Receipt<'_> {
    fn told(&self) -> Result<Vec<u8>> {
        let plan = self.plan;
        let mut inserted = Vec::new();
        for member in plan.members.iter().filter(|member| member.fate == Fate::Insert) {
            inserted.push((plan.table(member)?.to_string(), plan.key(member)));
        }
        let mut relinked = Vec::new();
        for relink in plan.relinks.iter().chain(&plan.columns) {
            let table = plan.both.live.table(relink.table)?;
            relinked.push((table.name.to_string(), table.shown_key(&relink.row)));
        }
        let told = Told {
            workload: self.workload,
            from: self.from,
            server: self.server,
            database: self.database,
            who: self.who,
            transaction: self.transaction,
            inserted,
            relinked,
            sequences: &self.applied.sequences,
            different: &self.applied.different,
            notes: &plan.notes,
            schema: &plan.schema,
            triggers: &plan.triggers,
        };
        serde_json::to_vec_pretty(&told).map_err(|error| Error::bug("cannot write a receipt").because(error))
    }
}

/// Keeps a receipt. To be called before the transaction is committed: a restore without one must not be.
pub fn store(
    repository: &Repository,
    receipt: &Receipt<'_>,
    host: &str,
    clock: &Arc<dyn Clock>,
    progress: &Arc<dyn Progress>,
) -> Result<PointId> {
    let name = format!("{}:{RECORDS}", receipt.workload);
    let workload =
        WorkloadRef { id: derived_id(RECORDS, &name), kind: WorkloadKind(RECORDS.to_owned()), name };
    let writer = repository.write(WriteRequest {
        workload,
        host: host.to_owned(),
        roots: vec![format!("{}/{}", receipt.server, receipt.database)],
        tags: Vec::new(),
        reread_one_in: 0,
        any_order: false,
        parent: Parent::None,
        progress: Arc::clone(progress),
        jobs: 1,
        compression: Compression::default(),
    })?;
    let items = vec![
        item("applied.sql", receipt.script.as_bytes().to_vec())?,
        item("receipt.json", receipt.told()?)?,
        item("take-back.sql", receipt.inverse.as_bytes().to_vec())?,
    ];
    let source = Papers { items: items.into_iter(), moment: clock.now() };
    copy(Box::new(source), Box::new(writer), progress.as_ref())
}

fn item(name: &str, text: Vec<u8>) -> Result<Box<Item>> {
    let path = ItemPath::new(name).map_err(|error| Error::bug("a name of ours is no path").because(error))?;
    let size = u64::try_from(text.len()).unwrap_or(u64::MAX);
    let metadata = Metadata { mode: 0o600, size, ..Metadata::new(Kind::File) };
    Ok(Box::new(Item {
        path,
        metadata,
        stamp: Stamp::default(),
        body: Body::Stream(Box::new(Text(Arc::new(text)))),
    }))
}

struct Papers {
    items: std::vec::IntoIter<Box<Item>>,
    moment: mainstay_core::Time,
}

impl Source for Papers {
    fn next(&mut self) -> Result<Next> {
        Ok(self.items.next().map_or(Next::End, Next::Item))
    }

    fn seal(&mut self) -> Result<Captured> {
        Ok(Captured {
            position: Position::default(),
            consistency: Consistency::Application,
            moment: self.moment,
        })
    }

    fn commit(self: Box<Self>, _receipt: &mainstay_core::Receipt) -> Result<()> {
        Ok(())
    }
}
