//! Which machines to capture now, and when each is due at best: pure functions, for whoever schedules. Hosts and
//! datastores are spared: so many runs at a time on each, none in their peak hours, and the machines of one host are
//! spread over the time between two runs.

use std::collections::BTreeMap;
use std::time::Duration;

use super::hypervisor::MachineId;

/// Minutes of a day.
const DAY: u32 = 24 * 60;

/// A machine that waits for its run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    pub machine: MachineId,
    pub host: String,
    /// Where its disks lie.
    pub datastores: Vec<String>,
    /// How long ago its newest point was taken.
    pub age: Duration,
    /// How old its newest point may become.
    pub objective: Duration,
    /// Bytes that have probably changed since.
    pub expected_bytes: u64,
}

/// A run that has begun and not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    pub host: String,
    pub datastores: Vec<String>,
}

/// How many runs there may be at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    pub in_all: usize,
    pub per_host: usize,
    pub per_datastore: usize,
    /// Other numbers for certain hosts and datastores, by name.
    pub exceptions: BTreeMap<String, usize>,
    /// When no run is begun.
    pub peaks: Vec<Peak>,
    /// A machine whose newest point is older than so many times its objective, in percent, is captured even then.
    pub overrules_peak_at: u64,
}

/// Hours in which a host, or all of them, must be left alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peak {
    /// `None`: every host.
    pub host: Option<String>,
    /// Minutes after midnight; the end is not part of it. An end before the start is on the next day.
    pub from: u32,
    pub until: u32,
}

impl Limits {
    /// So many runs at a time and nothing else.
    pub fn new(in_all: usize, per_host: usize, per_datastore: usize) -> Self {
        Self {
            in_all,
            per_host,
            per_datastore,
            exceptions: BTreeMap::new(),
            peaks: Vec::new(),
            overrules_peak_at: 200,
        }
    }

    fn is_peak(&self, host: &str, minute: u32) -> bool {
        let concerns = |peak: &&Peak| peak.host.as_deref().is_none_or(|named| named == host);
        self.peaks.iter().filter(concerns).any(|peak| peak.contains(minute))
    }
}

impl Peak {
    fn contains(&self, minute: u32) -> bool {
        if self.from <= self.until {
            (self.from..self.until).contains(&minute)
        } else {
            minute >= self.from || minute < self.until
        }
    }
}

impl Waiting {
    /// The age of the newest point in percent of what it may become.
    fn urgency(&self) -> u128 {
        self.age.as_millis().saturating_mul(100) / self.objective.as_millis().max(1)
    }
}

/// The machines to begin with now, by their places in `waiting`, most urgent first; among equals the one with the
/// least to do. `minute` is the minute of the day where the peaks are meant.
pub fn start_now(waiting: &[Waiting], running: &[Running], limits: &Limits, minute: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..waiting.len()).collect();
    order.sort_by_key(|&place| {
        let machine = &waiting[place];
        (std::cmp::Reverse(machine.urgency()), machine.expected_bytes, &machine.machine)
    });
    let mut busy: BTreeMap<(&str, bool), usize> = BTreeMap::new();
    for run in running {
        *busy.entry((&run.host, true)).or_default() += 1;
        run.datastores.iter().for_each(|store| *busy.entry((store, false)).or_default() += 1);
    }
    let mut chosen = Vec::new();
    for place in order {
        let machine = &waiting[place];
        let overrules = machine.urgency() >= u128::from(limits.overrules_peak_at);
        if running.len() + chosen.len() >= limits.in_all {
            break;
        }
        if limits.is_peak(&machine.host, minute) && !overrules {
            continue;
        }
        let mut places: Vec<(&str, bool)> =
            machine.datastores.iter().map(|store| (store.as_str(), false)).collect();
        places.push((&machine.host, true));
        places.sort_unstable();
        places.dedup();
        let room = |&(name, is_host): &(&str, bool)| {
            let usual = if is_host { limits.per_host } else { limits.per_datastore };
            let most = limits.exceptions.get(name).copied().unwrap_or(usual);
            busy.get(&(name, is_host)).copied().unwrap_or(0) < most
        };
        if places.iter().all(room) {
            places.into_iter().for_each(|place| *busy.entry(place).or_default() += 1);
            chosen.push(place);
        }
    }
    chosen
}

/// When in each `period` the run of each machine is best begun: the machines of a host follow each other evenly over
/// what its peaks leave of the period, each host begins elsewhere, and a machine keeps its place as long as those
/// beside it stay. `machines` are (host, machine).
pub fn spread(machines: &[(String, MachineId)], period: Duration, limits: &Limits) -> Vec<Duration> {
    let mut hosts: BTreeMap<&str, Vec<(&MachineId, usize)>> = BTreeMap::new();
    for (place, (host, machine)) in machines.iter().enumerate() {
        hosts.entry(host).or_default().push((machine, place));
    }
    let mut begins = vec![Duration::ZERO; machines.len()];
    let all = u32::try_from(hosts.len()).unwrap_or(u32::MAX);
    for (number, (host, mut of_host)) in (0u32..).zip(hosts) {
        of_host.sort_unstable();
        let count = u32::try_from(of_host.len()).unwrap_or(u32::MAX);
        let free = free_minutes(host, period, limits);
        for (turn, (_, place)) in (0u32..).zip(of_host) {
            // The hosts share out the time between two machines of one host.
            let share = f64::from(turn) + f64::from(number) / f64::from(all);
            let share = share / f64::from(count);
            begins[place] = match &free {
                None => period.mul_f64(share),
                Some(minutes) => at_share(minutes, share),
            };
        }
    }
    begins
}

/// The minutes of the period in which the host may be worked on; `None` when all are, or none is.
fn free_minutes(host: &str, period: Duration, limits: &Limits) -> Option<Vec<u32>> {
    let length = u32::try_from(period.as_secs() / 60).unwrap_or(u32::MAX).min(7 * DAY);
    let free: Vec<u32> = (0..length).filter(|minute| !limits.is_peak(host, minute % DAY)).collect();
    let some = !free.is_empty() && free.len() < length as usize;
    some.then_some(free)
}

fn at_share(minutes: &[u32], share: f64) -> Duration {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of a few thousand minutes"
    )]
    let place = (share * minutes.len() as f64) as usize;
    let minute = minutes.get(place).or(minutes.last()).copied().unwrap_or(0);
    Duration::from_secs(u64::from(minute) * 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn waiting(name: &str, host: &str, stores: &[&str], age: u32, bytes: u64) -> Waiting {
        Waiting {
            machine: MachineId(name.into()),
            host: host.into(),
            datastores: stores.iter().map(|store| (*store).to_owned()).collect(),
            age: HOUR * age,
            objective: HOUR * 24,
            expected_bytes: bytes,
        }
    }

    fn names(waiting: &[Waiting], chosen: &[usize]) -> String {
        chosen.iter().map(|place| waiting[*place].machine.0.as_str()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_most_urgent_begin_and_no_host_or_datastore_gets_too_many() {
        let all = [
            waiting("late", "h1", &["s1"], 30, 9),
            waiting("small", "h1", &["s1"], 24, 1),
            waiting("big", "h2", &["s1"], 24, 8),
            waiting("other", "h2", &["s2"], 10, 8),
            waiting("third", "h1", &["s3"], 5, 8),
        ];
        let limits = Limits::new(10, 2, 2);
        assert_eq!(names(&all, &start_now(&all, &[], &limits, 0)), "late small other");
        let running = [Running { host: "h1".into(), datastores: vec!["s9".into()] }];
        assert_eq!(names(&all, &start_now(&all, &running, &limits, 0)), "late big other");
        assert_eq!(
            names(&all, &start_now(&all, &running, &Limits { in_all: 2, ..limits.clone() }, 0)),
            "late"
        );
        let exceptions = BTreeMap::from([("s1".to_owned(), 1), ("h1".to_owned(), 3)]);
        assert_eq!(
            names(&all, &start_now(&all, &[], &Limits { exceptions, ..limits }, 0)),
            "late other third"
        );
    }

    #[test]
    fn peak_hours_are_kept_unless_a_promise_is_broken_badly() {
        let peak =
            |host: Option<&str>, from: u32, until: u32| Peak { host: host.map(str::to_owned), from, until };
        let peaks = vec![peak(Some("h1"), 8 * 60, 18 * 60), peak(None, 23 * 60, 60)];
        let limits = Limits { peaks, ..Limits::new(10, 10, 10) };
        let all =
            [waiting("a", "h1", &[], 20, 1), waiting("b", "h2", &[], 20, 2), waiting("c", "h1", &[], 48, 3)];
        let at = |hour: u32| names(&all, &start_now(&all, &[], &limits, hour * 60));
        assert_eq!(
            (at(7), at(8), at(17), at(18)),
            ("c a b".into(), "c b".into(), "c b".into(), "c a b".into())
        );
        assert_eq!((at(23), at(0), at(1)), ("c".into(), "c".into(), "c a b".into()));
    }

    #[test]
    fn the_machines_of_a_host_are_spread_and_keep_clear_of_its_peaks() {
        let machines: Vec<_> =
            (0..12).map(|number| (format!("h{}", number % 2), MachineId(format!("m{number:02}")))).collect();
        let limits = Limits::new(1, 1, 1);
        let begins = spread(&machines, 24 * HOUR, &limits);
        let mut of_one: Vec<_> = begins.iter().step_by(2).copied().collect();
        of_one.sort_unstable();
        assert!(of_one.windows(2).all(|pair| pair[1] - pair[0] == 4 * HOUR), "{of_one:?}");
        assert_ne!(begins[0], begins[1]);
        let peaks = vec![Peak { host: Some("h0".into()), from: 6 * 60, until: 22 * 60 }];
        let begins = spread(&machines, 24 * HOUR, &Limits { peaks, ..limits });
        for (begin, (host, machine)) in begins.iter().zip(&machines) {
            let hour = begin.as_secs() / 3600;
            assert!(host != "h0" || !(6..22).contains(&hour), "{machine:?} at {hour}");
        }
        // A machine more changes the host it is on, and no other.
        let mut more = machines.clone();
        more.push(("h0".into(), MachineId("new".into())));
        let again = spread(&more, 24 * HOUR, &Limits::new(1, 1, 1));
        let before = spread(&machines, 24 * HOUR, &Limits::new(1, 1, 1));
        assert!((0..12).filter(|place| place % 2 == 1).all(|place| again[place] == before[place]));
    }
}
