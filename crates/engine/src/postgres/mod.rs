//! Database clusters: points, the journal of their log, and recovery to any moment that both reach.

mod backup;
mod drill;
mod follow;
mod history;
mod instance;
mod lazy;
mod log;
mod restore;

pub use backup::{ClusterBackup, ClusterPoint, Dial, backup_cluster, workload};
pub use drill::{DrillRequest, Drilled, drill};
pub use follow::{FollowCluster, follow_cluster};
pub use instance::{Fill, Instance, InstanceCost, InstanceRequest, Reached};
pub use restore::{ClusterPlan, Until, intervals, plan_cluster, restore_cluster};

pub use mainstay_workloads::postgres::KIND;

use mainstay_core::{StreamRef, WorkloadRef};

/// The journal of one timeline of a cluster.
fn stream(workload: &WorkloadRef, system: &str, timeline: u32) -> StreamRef {
    StreamRef { workload: workload.clone(), name: format!("wal {system} timeline {timeline}"), parent: None }
}
