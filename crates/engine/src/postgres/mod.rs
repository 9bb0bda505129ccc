//! Database clusters: points, the journal of their log, and recovery to any moment that both reach.

mod backup;
mod configuration;
mod drill;
mod follow;
mod history;
mod in_place;
mod instance;
mod lazy;
mod lines;
mod log;
mod offline;
mod plan;
mod push;
mod restore;
mod same;
mod segments;
mod standby;
mod stops;
mod trim;

pub use backup::{ClusterBackup, ClusterPoint, Dial, backup_cluster, workload};
pub use drill::{DrillRequest, Drilled, drill};
pub use follow::{FollowCluster, follow_cluster};
pub use in_place::{Control, PutInPlace, check_stopped, restore_cluster_in_place};
pub use instance::{Fill, Instance, InstanceCost, InstanceRequest, Reached};
pub use lines::{Leg, holes};
pub use offline::{OfflineBackup, backup_cluster_offline};
pub use plan::{ClusterPlan, Until, intervals, plan_cluster, plan_cluster_on};
pub use push::{Pushed, aside, fetch_wal, push_wal};
pub use restore::restore_cluster;
pub use standby::{StandbyRequest, create_standby};
pub use trim::{Trim, plan_trims, trim};

pub use mainstay_workloads::postgres::KIND;

use mainstay_core::{StreamRef, WorkloadRef};

/// What the journals of logs are called: this, the cluster's number, and the timeline.
const PREFIX: &str = "wal ";

/// The journal of one timeline of a cluster.
fn stream(workload: &WorkloadRef, system: &str, timeline: u32) -> StreamRef {
    StreamRef {
        workload: workload.clone(),
        name: format!("{PREFIX}{system} timeline {timeline}"),
        parent: None,
    }
}
