//! Checking stored bytes, and noting which points were found sound.

use mainstay_core::{PointId, Progress, Result};
use mainstay_repository::keys::Powers;
use mainstay_repository::{Note, Repository, VerifyReport, VerifyScope};

/// Checks `points`, or all when empty. When every byte was read by someone who can tell, each sound point is noted as
/// verified. What is damaged is set aside: what
/// is whole of it, or parity makes so, is stored anew, and the next backup stores the rest.
///
/// Errors only when checking is impossible; damage is in the report, and so is a note that could not be made.
pub fn verify(
    repository: &Repository,
    points: Vec<PointId>,
    read_data: bool,
    progress: &dyn Progress,
) -> Result<VerifyReport> {
    let mut report = repository.verify(&VerifyScope { points, read_data }, progress)?;
    // Without the power to collect, damage stays what later backups may rely on: whoever has it finds it too.
    let collects = repository.ring().powers().contains(Powers::COLLECT);
    if collects {
        match repository.set_aside(&report, progress) {
            Ok(packs) => report.rewritten = packs,
            Err(error) => {
                let what = error.chain().join(": ");
                report.problems.push(format!("what is damaged could not be set aside: {what}"));
            }
        }
    }
    let could_tell = read_data && repository.ring().content_secret().is_ok();
    for point in report.sound.iter().filter(|_| could_tell) {
        if let Err(error) = repository.note(point, &Note::Verified { read_data }) {
            // What was found must reach the person all the same.
            report.degraded.push(format!("the result could not be noted: {}", error.chain().join(": ")));
            break;
        }
    }
    Ok(report)
}
