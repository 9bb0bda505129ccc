//! Checking stored bytes, and noting which points were found sound.

use mainstay_core::{PointId, Progress, Result};
use mainstay_repository::{Note, Repository, VerifyReport, VerifyScope};

/// Checks `points`, or all when empty, and notes each sound one as verified.
///
/// Errors only when checking is impossible; damage is in the report.
pub fn verify(
    repository: &Repository,
    points: Vec<PointId>,
    read_data: bool,
    progress: &dyn Progress,
) -> Result<VerifyReport> {
    let report = repository.verify(&VerifyScope { points, read_data }, progress)?;
    for point in &report.sound {
        progress.check()?;
        repository.note(point, &Note::Verified { read_data })?;
    }
    Ok(report)
}
