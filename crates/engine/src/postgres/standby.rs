//! A standby out of the repository: the files of a point and the log behind it, and from there on what the primary sends.

use std::fs::File;
use std::io::{Error as IoError, ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use mainstay_core::{Code, Error, Progress, Result};
use mainstay_repository::Repository;
use mainstay_workloads::files::Restored;

use super::plan::ClusterPlan;
use super::restore::{hand_over, restore_cluster};

/// How the lines begin that a restore adds to the settings.
const MARK: &str = "# Written by Mainstay for the recovery";

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
/// Errors: those of [`restore_cluster`]; [`Code::Usage`] for what cannot be a setting.
pub fn create_standby(
    repository: &Repository,
    plan: &ClusterPlan,
    to: &Path,
    request: &StandbyRequest,
    progress: &Arc<dyn Progress>,
) -> Result<Restored> {
    let settings = settings(request)?;
    let restored = restore_cluster(repository, plan, to, progress)?;
    let failed =
        |what: &str, error: IoError| Error::io(format!("cannot write {what} in {}", to.display()), error);
    // Unlike a copy it may become the primary one day: it keeps what the cluster is set to.
    let auto = to.join("postgresql.auto.conf");
    let text = std::fs::read_to_string(&auto).map_err(|error| failed("postgresql.auto.conf", error))?;
    let own = text.find(MARK).map_or(text.as_str(), |at| text.get(..at).unwrap_or_default());
    let written = File::options().write(true).truncate(true).open(&auto).and_then(|mut file| {
        file.write_all(own.as_bytes())?;
        file.write_all(settings.as_bytes())?;
        file.sync_all()
    });
    written.map_err(|error| failed("postgresql.auto.conf", error))?;
    match std::fs::remove_file(to.join("recovery.signal")) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed("recovery.signal", error)),
        _ => {}
    }
    let signal = to.join("standby.signal");
    let signal = File::options().write(true).create(true).truncate(true).mode(0o600).open(signal);
    signal.and_then(|signal| hand_over(&signal, to)).map_err(|error| failed("standby.signal", error))?;
    Ok(restored)
}

fn settings(request: &StandbyRequest) -> Result<String> {
    let mut text = "# Written by Mainstay for a standby.\n".to_owned();
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
