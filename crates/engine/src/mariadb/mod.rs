//! MariaDB servers: points, the journal of their binary log, and recovery to any moment that both reach.

mod backup;
mod drill;
mod follow;
mod restore;

pub use backup::{ServerBackup, ServerPoint, backup_server, workload};
pub use drill::{DrillServer, ServerProof, drill_server};
pub use follow::{FollowServer, follow_server};
pub use restore::{
    Prepared, ServerPlan, ServerRestored, Span, Until, plan_server, prepare_server, restore_server, spans,
    write_logs,
};

pub use mainstay_workloads::mariadb::KIND;

use mainstay_core::{Code, Error, Result, StreamRef, WorkloadRef};
use mainstay_workloads::mariadb::{Connection, LogFile, Place};

/// The journal of a server's binary log, by what all its files are called.
fn stream(workload: &WorkloadRef, log: &str) -> StreamRef {
    StreamRef { workload: workload.clone(), name: format!("binary log {log}"), parent: None }
}

/// The files of a log that a server has.
struct Files {
    base: String,
    first: u32,
    last: u32,
    /// How long the last one is, in bytes.
    length: u64,
}

impl Files {
    /// Errors: [`Code::Unsupported`] for a server without a binary log.
    fn of(connection: &mut Connection) -> Result<Self> {
        if connection.value("SELECT @@log_bin")? != "1" {
            return Err(Error::new(Code::Unsupported, "the server writes no binary log").hint(
                "set log_bin and a server_id in its configuration and restart it; backups alone need none",
            ));
        }
        let rows = connection.query("SHOW BINARY LOGS")?;
        let names = rows.iter().filter_map(|row| row.first()?.as_ref()?.parse::<LogFile>().ok());
        let names: Vec<LogFile> = names.collect();
        let length = rows.last().and_then(|row| row.get(1)?.as_ref()?.parse().ok()).unwrap_or(u64::MAX);
        match (names.first(), names.last()) {
            (Some(first), Some(last)) => {
                Ok(Self { base: last.base.clone(), first: first.number, last: last.number, length })
            }
            _ => Err(Error::new(Code::Io, "the server names no file of its binary log")),
        }
    }

    /// Which epoch they are of, when a journal ends there: another one when they end before that.
    fn epoch(&self, end: Option<Place>) -> u32 {
        end.map_or(0, |end| end.epoch + u32::from((self.last, self.length) < (end.file, end.offset)))
    }
}
