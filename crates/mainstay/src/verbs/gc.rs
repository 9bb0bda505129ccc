//! `mainstay gc`.

use mainstay_repository::GcOptions;

use super::{Done, number};
use crate::args::Gc;
use crate::report::lines::{Collected, Line};
use crate::session::Session;

pub(super) fn run(arguments: &Gc, session: &mut Session) -> Done {
    let repository = session.open()?;
    let progress = session.progress();
    let plan = repository.plan_gc(&GcOptions::default(), progress.as_ref())?;
    let collected = if arguments.dry_run {
        Collected {
            dry_run: true,
            freed_bytes: plan.frees_bytes,
            deleted_packs: number(plan.delete.len()),
            condemned_packs: number(plan.dead.len() + plan.orphans.len() + plan.repacked()),
            condemned_bytes: plan.condemns_bytes,
            copied_bytes: plan.copies_bytes,
        }
    } else {
        let done = repository.gc(&plan, progress.as_ref())?;
        Collected {
            dry_run: false,
            freed_bytes: done.freed_bytes,
            deleted_packs: done.deleted,
            condemned_packs: done.condemned,
            condemned_bytes: plan.condemns_bytes,
            copied_bytes: done.copied_bytes,
        }
    };
    drop(progress);
    session.report.line(&Line::Collected(collected));
    Ok(None)
}
