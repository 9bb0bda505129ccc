//! SQLite databases: points, the journals of their logs, and recovery to any commit that both reach.

mod backup;
mod drill;
mod follow;
mod link;
mod restore;

pub use backup::{DatabasesBackup, backup_databases, workload};
pub use drill::drill_databases;
pub use follow::{FollowDatabases, Told, follow_databases};
pub use restore::{
    DatabasePlan, DatabasesPlan, DatabasesRestored, Span, Until, plan_databases, restore_databases, spans,
};

pub use mainstay_workloads::sqlite::KIND;

use mainstay_core::{StreamRef, WorkloadRef};

/// The journal of one database.
fn stream(workload: &WorkloadRef, database: &str) -> StreamRef {
    StreamRef { workload: workload.clone(), name: format!("log of {database}"), parent: None }
}
