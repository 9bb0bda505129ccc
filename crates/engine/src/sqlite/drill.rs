//! Proving that databases can be recovered: private copies are made, and SQLite's own check is asked of them.

use std::path::Path;
use std::time::Duration;

use mainstay_core::{Clock, Code, Error, Progress, Result};
use mainstay_repository::{Note, Repository};

use super::restore::{DatabasesPlan, restore_databases};

/// Recovers copies in `scratch`, has them checked, and notes in the point that it is proven. How long that took.
///
/// Errors: [`Code::Refused`] when a check fails: the point is not proven then.
pub fn drill_databases(
    repository: &Repository,
    plan: &DatabasesPlan,
    scratch: &Path,
    clock: &dyn Clock,
    progress: &dyn Progress,
) -> Result<Duration> {
    let began = clock.monotonic();
    let directory = crate::written::private_directory(scratch)?;
    let restored = restore_databases(repository, plan, &directory.path().join("databases"), progress)?;
    if let Some((database, damage)) = restored.damage.first() {
        let what = format!("point {} is not proven: {database}: {}", plan.point.id, damage.escape_debug());
        return Err(Error::new(Code::Refused, what)
            .hint("take a new point, and verify the repository: mainstay verify --read-data"));
    }
    let took = clock.monotonic().saturating_sub(began);
    let how = "recovered with the log behind it, quick_check".to_owned();
    repository.note(&plan.point.id, &Note::Proven { how, seconds: took.as_secs_f64().ceil() as u64 })?;
    Ok(took)
}
