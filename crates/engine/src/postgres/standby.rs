//! A standby out of the repository: the files of a point and the log behind it, and from there on what the primary sends.

use std::path::Path;
use std::sync::Arc;

use mainstay_core::{Code, Error, Progress, Result};
use mainstay_repository::Repository;
use mainstay_workloads::files::Restored;

use super::plan::ClusterPlan;
use super::restore::{MARK, Orders, restore_told};

/// Whom a standby follows.
#[derive(Clone, Debug)]
pub struct StandbyRequest {
    /// How it reaches the primary, as PostgreSQL's own programs take it.
    pub primary: String,
    /// The slot at the primary that keeps the log for it.
    pub slot: Option<String>,
    /// Fetches what the primary no longer has.
    pub restore_command: Option<String>,
}

/// Writes a standby into a new directory, ready for the server to be started on it.
///
/// Errors: those of [`super::restore_cluster`]; [`Code::Usage`] for what cannot be a setting.
pub fn create_standby(
    repository: &Repository,
    plan: &ClusterPlan,
    to: &Path,
    request: &StandbyRequest,
    progress: &Arc<dyn Progress>,
) -> Result<Restored> {
    // Unlike a copy it may become the primary one day: it keeps what the cluster is set to.
    let orders = Orders { settings: settings(request)?, signal: "standby.signal" };
    restore_told(repository, plan, to, &orders, progress)
}

fn settings(request: &StandbyRequest) -> Result<String> {
    let mut text = format!("{MARK} for a standby.\n");
    let empty = String::new();
    for (name, value) in [
        ("primary_conninfo", &request.primary),
        ("primary_slot_name", request.slot.as_ref().unwrap_or(&empty)),
        ("restore_command", request.restore_command.as_ref().unwrap_or(&empty)),
    ] {
        if value.contains(['\n', '\r', '\0']) {
            return Err(Error::new(Code::Usage, format!("{value:?} cannot be the value of {name}")));
        }
        text += &format!("{name} = '{}'\n", value.replace('\\', "\\\\").replace('\'', "''"));
    }
    text += "recovery_target_timeline = 'latest'\n";
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::{StandbyRequest, settings};

    #[test]
    fn what_a_standby_is_told_stays_in_its_quotes() {
        let request = |primary: &str| StandbyRequest {
            primary: primary.into(),
            slot: None,
            restore_command: Some("mainstay db fetch-wal --name 'a b' %f %p".into()),
        };
        let text = settings(&request("host=x password=''")).unwrap();
        assert!(text.contains("primary_conninfo = 'host=x password='''''\n"), "{text}");
        assert!(text.contains("--name ''a b'' %f"), "{text}");
        settings(&request("x\nfsync = off")).unwrap_err();
    }
}
