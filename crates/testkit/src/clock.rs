//! A clock that stands still until a test moves it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mainstay_core::{Clock, Time};

/// Clones share one time. The time of day can be set anywhere, backwards too, as real clocks do; the monotonic
/// reading moves only through [`ScriptedClock::advance`] and [`Clock::sleep`].
#[derive(Clone, Debug)]
pub struct ScriptedClock(Arc<Mutex<(Time, Duration)>>);

impl ScriptedClock {
    pub fn at(now: Time) -> Self {
        Self(Arc::new(Mutex::new((now, Duration::ZERO))))
    }

    /// Changes the time of day alone.
    pub fn set(&self, now: Time) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0 = now;
    }

    /// Lets time pass.
    pub fn advance(&self, duration: Duration) {
        let mut both = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *both = (both.0.plus(duration), both.1.saturating_add(duration));
    }
}

impl Default for ScriptedClock {
    /// 2026-01-01T00:00:00Z.
    fn default() -> Self {
        Self::at(Time::from_seconds(1_767_225_600))
    }
}

impl Clock for ScriptedClock {
    fn now(&self) -> Time {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    fn monotonic(&self) -> Duration {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    fn sleep(&self, duration: Duration) {
        self.advance(duration);
    }
}

/// The real time: for programs and guests, which know no other.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealClock;

#[expect(clippy::disallowed_methods, reason = "a clock is the door to the time")]
impl Clock for RealClock {
    fn now(&self) -> Time {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Time::default().plus(since)
    }

    fn monotonic(&self) -> Duration {
        static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
        START.get_or_init(std::time::Instant::now).elapsed()
    }

    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_share_the_time_and_only_sleeping_moves_the_monotonic_reading() {
        let clock = ScriptedClock::default();
        let other = clock.clone();
        other.sleep(Duration::from_secs(3));
        assert_eq!((clock.now().seconds(), clock.monotonic()), (1_767_225_603, Duration::from_secs(3)));
        clock.set(Time::from_seconds(5));
        assert_eq!((other.now().seconds(), other.monotonic()), (5, Duration::from_secs(3)));
    }
}
