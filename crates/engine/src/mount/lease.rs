//! A point that is looked into for long does not expire meanwhile.

use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Clock, PointId, Result, Time};
use mainstay_repository::{Note, Repository};

/// How long a lease holds the point when nobody renews it.
const LEASE: Duration = Duration::from_secs(4 * 3600);

/// A hold that is renewed for as long as the point is used, and ends by itself soon after.
pub struct Lease {
    repository: Arc<Repository>,
    clock: Arc<dyn Clock>,
    point: PointId,
    reason: String,
    placed: Duration,
}

impl Lease {
    /// Errors: [`mainstay_core::Code::NoPower`] with a key that only reads; those of the repository.
    pub fn take(
        repository: &Arc<Repository>,
        clock: &Arc<dyn Clock>,
        point: PointId,
        reason: String,
    ) -> Result<Self> {
        let (repository, clock) = (Arc::clone(repository), Arc::clone(clock));
        let mut lease = Self { repository, point, reason, placed: clock.monotonic(), clock };
        lease.place()?;
        Ok(lease)
    }

    fn place(&mut self) -> Result<()> {
        let nanoseconds = i64::try_from(LEASE.as_nanos()).unwrap_or(i64::MAX);
        let until = Time(self.clock.now().0.saturating_add(nanoseconds));
        self.placed = self.clock.monotonic();
        self.repository.note(&self.point, &Note::Hold { reason: self.reason.clone(), until: Some(until) })
    }

    /// Holds it for longer when half of the time is over.
    pub fn renew(&mut self) -> Result<()> {
        let age = self.clock.monotonic().saturating_sub(self.placed);
        if age < LEASE / 2 { Ok(()) } else { self.place() }
    }

    /// Lets the point go at once, if this key may; otherwise it goes when the lease ends.
    ///
    /// Errors: those of the repository, [`mainstay_core::Code::NoPower`] among them.
    pub fn release(self) -> Result<()> {
        self.repository.refresh()?;
        let points = self.repository.points()?;
        let own = points.iter().filter(|point| point.id == self.point).flat_map(|point| &point.holds);
        let own = own.filter(|hold| hold.reason == self.reason);
        own.into_iter().try_for_each(|hold| self.repository.note(&self.point, &Note::Release(hold.id)))
    }
}
