//! Moments. Nothing but a [`Clock`] tells what time it is, so that tests can script it.

use std::time::Duration;

/// Nanoseconds since 1970-01-01T00:00:00Z; negative before it. Covers the years 1677 to 2262.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub i64);

impl Time {
    pub const fn from_seconds(seconds: i64) -> Self {
        Self(seconds.saturating_mul(1_000_000_000))
    }

    /// From the seconds and nanoseconds of a `timespec`; saturates outside the range of [`Time`].
    pub const fn from_parts(seconds: i64, nanoseconds: i64) -> Self {
        Self(seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds))
    }

    /// Whole seconds, rounded down.
    pub const fn seconds(self) -> i64 {
        self.0.div_euclid(1_000_000_000)
    }

    /// Nanoseconds after [`Time::seconds`], 0 to 999 999 999.
    pub const fn subsecond_nanoseconds(self) -> i64 {
        self.0.rem_euclid(1_000_000_000)
    }

    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)))
    }

    /// How long after `earlier` this is; zero when it is not after it.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

/// The one door to the time of day.
pub trait Clock: Send + Sync {
    /// The time of day, as this machine believes it. A claim, never a proof.
    fn now(&self) -> Time;

    /// A reading that never goes backwards, for durations. Its zero is arbitrary.
    fn monotonic(&self) -> Duration;

    /// Waits. A scripted clock moves itself forward instead.
    fn sleep(&self, duration: Duration);
}

#[cfg(test)]
mod tests {
    use super::Time;

    #[test]
    fn times_before_1970_split_into_floor_seconds_and_positive_nanoseconds() {
        let time = Time(-1);
        assert_eq!((time.seconds(), time.subsecond_nanoseconds()), (-1, 999_999_999));
        assert_eq!(Time::from_parts(time.seconds(), time.subsecond_nanoseconds()), time);
    }
}
