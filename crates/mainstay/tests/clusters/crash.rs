//! Kills at random moments, of everything that can be killed, while the bank works. `MAINSTAY_LONG=1` kills more often.

use std::sync::Mutex;
use std::time::Duration;

use mainstay_core::Clock as _;
use mainstay_testkit::lab::{Postgres, PostgresPlan, patiently};
use mainstay_testkit::{RealClock, Rng, for_each_seed, is_long};
use mainstay_workloads::postgres::Lsn;

use crate::bank::{self, Transfer, audit};
use crate::home::{Home, Running};

const LIMIT: Duration = Duration::from_secs(120);

/// A server, and the program that protects it.
struct Stage {
    home: Home,
    server: Postgres,
    follower: Option<Running>,
    rng: Rng,
}

impl Stage {
    fn new(seed: u64) -> Self {
        println!("seed {seed}");
        let plan = PostgresPlan { segment: 1, checksums: true, ..PostgresPlan::default() };
        let server = Postgres::start(&plan).unwrap();
        bank::found(&server);
        Self { home: Home::new(), server, follower: None, rng: Rng::new(seed) }
    }

    fn protect(&mut self) {
        let address = self.server.address();
        let words = ["db", "follow", &address, "--name", "shop", "--slot", "mainstay", "--every", "50ms"];
        self.follower = Some(self.home.start("follow.log", &words));
    }

    fn back_up(&self) -> Running {
        let address = self.server.address();
        self.home.start("backup.log", &["db", "backup", &address, "--name", "shop"])
    }

    fn pause(&mut self, milliseconds: u64) {
        let pause = self.rng.range(0..milliseconds);
        RealClock.sleep(Duration::from_millis(pause));
    }

    /// Somebody dies, and whatever has ended is started again.
    fn disturb(&mut self) {
        self.pause(600);
        match self.rng.below(4) {
            0 => {
                self.server.kill();
                self.pause(300);
                self.server.resume().unwrap();
            }
            1 => {
                if let Some(follower) = self.follower.take() {
                    follower.kill();
                }
            }
            2 => {
                let backup = self.back_up();
                self.pause(1500);
                backup.kill();
            }
            _ => {
                let mut backup = self.back_up();
                self.pause(1500);
                self.server.kill();
                patiently("a backup whose server is gone", LIMIT, || Ok(backup.has_ended().then_some(())))
                    .unwrap();
                self.server.resume().unwrap();
            }
        }
        if self.follower.as_mut().is_none_or(Running::has_ended) {
            self.protect();
        }
    }

    /// Waits until everything that was acknowledged so far is promised.
    fn promised(&self, acknowledged: &Mutex<Vec<Transfer>>) {
        let wanted = acknowledged.lock().unwrap().last().map(|last| last.before).unwrap_or_default();
        self.promised_up_to(wanted);
    }

    fn promised_up_to(&self, wanted: Lsn) {
        patiently("the journal", LIMIT, || {
            let promised = self.home.promised("shop").and_then(|end| end.parse::<Lsn>().ok());
            Ok((promised >= Some(wanted)).then_some(()))
        })
        .unwrap();
    }

    fn restored(&self, name: &str, until: &[&str]) -> Postgres {
        let to = self.home.at(name);
        let words = ["db", "restore", "shop", "--to", to.to_str().unwrap()];
        self.home.run(&[&words, until].concat());
        Postgres::adopt(&to).unwrap()
    }
}

/// What was committed before a place is there, and what was begun behind it is not.
#[track_caller]
fn check(copy: &Postgres, acknowledged: &[Transfer], at: Lsn) {
    let there = audit(copy);
    for transfer in acknowledged {
        let is_there = there.binary_search(&transfer.id).is_ok();
        assert!(is_there || transfer.before > at, "{transfer:?} is lost at {at}");
        assert!(!is_there || transfer.after < at, "{transfer:?} is there before {at}");
    }
}

#[test]
fn whoever_is_killed_what_was_acknowledged_comes_back_at_any_place() {
    for_each_seed(1, |seed| {
        let mut stage = Stage::new(seed);
        stage.protect();
        stage.home.run(&["db", "backup", &stage.server.address(), "--name", "shop"]);
        let (acknowledged, ()) = bank::open(&stage.server.address(), seed, |acknowledged| {
            for _ in 0..if is_long() { 60 } else { 8 } {
                stage.disturb();
            }
            stage.pause(500);
            stage.promised(acknowledged);
        });
        println!("{} transfers", acknowledged.len());
        assert!(acknowledged.len() > 20, "{} transfers", acknowledged.len());
        assert_eq!(stage.follower.take().unwrap().interrupt(), Some(0));
        stage.server.stop();
        let end: Lsn = stage.home.promised("shop").unwrap().parse().unwrap();
        println!("promised up to {end}");
        check(&stage.restored("end", &[]), &acknowledged, end);
        // Those behind must be in the journal too, or the log ends before the place is reached.
        let known: Vec<&Transfer> = acknowledged.iter().filter(|transfer| transfer.before < end).collect();
        for number in 0..if is_long() { 10 } else { 2 } {
            let transfer = known[stage.rng.below(known.len() - 1)];
            let at = transfer.before.to_string();
            check(
                &stage.restored(&format!("place-{number}"), &["--lsn", &at]),
                &acknowledged,
                transfer.before,
            );
            let place = stage.rng.below(known.len() - 1);
            let there = audit(&stage.restored(&format!("time-{number}"), &["--at", &known[place].time]));
            for transfer in &known[..=place] {
                assert!(there.binary_search(&transfer.id).is_ok(), "{transfer:?} is lost by time");
            }
            let later = known[place + 1..].iter().find(|later| later.time > known[place].time);
            assert!(
                !later.is_some_and(|later| there.contains(&later.id) && later.after > known[place].before)
            );
        }
    });
}

#[test]
fn as_a_synchronous_standby_not_one_acknowledged_commit_is_lost() {
    for_each_seed(if is_long() { 10 } else { 1 }, |seed| {
        let mut stage = Stage::new(seed);
        stage.protect();
        stage.home.run(&["db", "backup", &stage.server.address(), "--name", "shop"]);
        for statement in
            ["ALTER SYSTEM SET synchronous_standby_names = 'mainstay'", "SELECT pg_reload_conf()"]
        {
            stage.server.ask("postgres", statement).unwrap();
        }
        let (acknowledged, ()) = bank::open(&stage.server.address(), seed, |acknowledged| {
            for _ in 0..3 {
                stage.pause(1000);
                if let Some(follower) = stage.follower.take() {
                    follower.kill();
                }
                stage.pause(300);
                stage.protect();
            }
            let some = acknowledged.lock().unwrap().len();
            patiently("more transfers", LIMIT, || {
                Ok((acknowledged.lock().unwrap().len() > some + 5).then_some(()))
            })
            .unwrap();
            // The machine of the server is gone, and ours at the same moment.
            stage.server.kill();
            stage.follower.take().unwrap().kill();
        });
        println!("{} transfers", acknowledged.len());
        let copy = stage.restored("again", &[]);
        let there = audit(&copy);
        for transfer in &acknowledged {
            assert!(there.binary_search(&transfer.id).is_ok(), "{transfer:?} is lost");
        }
    });
}
