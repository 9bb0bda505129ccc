//! The protocol of the log, small enough to try every order of every step: writers that reuse what a collector is
//! about to condemn, an expirer, and collectors that wait for nobody. The code that does this for real is
//! `src/log/`, `src/write/commit.rs` and `src/collect.rs`; `tests/concurrency.rs` tries that in thousands of orders.
//!
//! Content is a set of chunks, one bit each. `SHARED` is what everybody wants; the first pack holds it beside
//! `OLD`, which only the first point reaches, so that the pack is sparse once that point has expired.
//! Any actor may stop for good after any step: what holds in every state holds for every one that died there.

use std::collections::HashSet;

type Chunks = u8;
const SHARED: Chunks = 1;
const OLD: Chunks = 2;

/// The first pack and, for each actor, one of its own and one for what it copies.
const PACKS: usize = 7;
const ACTORS: usize = 4;
/// Two that are there from the start, and one of each writer.
const POINTS: usize = 4;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Status {
    Unknown,
    Live,
    Condemned,
    Deleted,
}

/// What the log says, and how many records it has.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Log {
    head: u8,
    packs: [(Status, Chunks); PACKS],
    /// What each point reaches; 0 when there is none.
    points: [Chunks; POINTS],
}

const NOTHING_SEEN: Log = Log { head: 0, packs: [(Status::Unknown, 0); PACKS], points: [0; POINTS] };

impl Log {
    fn live(&self) -> Chunks {
        self.packs.iter().filter(|(status, _)| *status == Status::Live).fold(0, |all, (_, has)| all | has)
    }

    fn reached(&self) -> Chunks {
        self.points.iter().fold(0, |all, reach| all | reach)
    }

    fn add(&mut self, pack: usize, has: Chunks) {
        if self.packs[pack].0 == Status::Unknown && has != 0 {
            self.packs[pack] = (Status::Live, has);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Step {
    /// Looks for what can be reused.
    Look,
    Store,
    /// Reads the log to its end and decides.
    Decide,
    /// Creates the record after the last one it saw, if nobody has.
    Append,
    /// Copies what was condemned under it.
    Rescue,
    List,
    Plan,
    Copy,
    Condemn,
    DecideDelete,
    AppendDelete,
    Delete,
    Done,
    Failed,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Role {
    Writer,
    Collector,
    /// A collector that may not copy anything.
    Sweeper,
    Expirer,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Actor {
    role: Role,
    step: Step,
    /// The log as it last saw it.
    seen: Log,
    /// Packs, as bits: those that it listed, is about to condemn, may delete.
    listed: u8,
    condemn: u8,
    delete: u8,
    rounds: u8,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct World {
    log: Log,
    /// What lies on the medium; 0 where there is nothing.
    stored: [Chunks; PACKS],
    actors: [Actor; ACTORS],
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mistake {
    None,
    CommitUnchecked,
    CondemnAtAnyHead,
    CondemnIntoCondemned,
    TrustOwnPacks,
    DeleteBeforeCondemning,
    AppendWithoutCreatingIfAbsent,
}

fn bits(packs: u8) -> impl Iterator<Item = usize> {
    (0..PACKS).filter(move |pack| packs & 1 << pack != 0)
}

fn own_pack(actor: usize) -> usize {
    1 + actor * 2
}

fn copy_pack(actor: usize) -> usize {
    2 + actor * 2
}

/// What a point of this writer reaches.
fn wanted(actor: usize) -> Chunks {
    SHARED | 4 << actor
}

impl World {
    fn new(actors: [(Role, u8); ACTORS]) -> Self {
        let mut log =
            Log { head: 1, packs: [(Status::Unknown, 0); PACKS], points: [SHARED | OLD, SHARED, 0, 0] };
        log.packs[0] = (Status::Live, SHARED | OLD);
        let mut stored = [0; PACKS];
        stored[0] = SHARED | OLD;
        let actors = actors.map(|(role, rounds)| {
            let step = match role {
                Role::Writer => Step::Look,
                Role::Collector | Role::Sweeper => Step::List,
                Role::Expirer => Step::Decide,
            };
            Actor { role, step, seen: NOTHING_SEEN, listed: 0, condemn: 0, delete: 0, rounds }
        });
        Self { log, stored, actors }
    }

    /// Everything that a live point reaches is promised by the log and lies on the medium.
    fn loses(&self) -> bool {
        let packs = self.log.packs.iter().zip(self.stored);
        let there = packs
            .filter(|((status, _), _)| *status == Status::Live)
            .fold(0, |all, ((_, has), stored)| all | (has & stored));
        self.log.reached() & !there != 0
    }

    /// The world after the next step of `actor`; `None` when it has none.
    fn step(&self, actor: usize, mistake: Mistake) -> Option<Self> {
        let mut next = self.clone();
        match next.actors[actor].role {
            Role::Writer => next.write(actor, mistake),
            Role::Collector | Role::Sweeper => next.collect(actor, mistake),
            Role::Expirer => next.expire(actor, mistake),
        }
        next.forget(actor);
        (next != *self).then_some(next)
    }

    /// What an actor will not ask for again is made equal, so that there are fewer worlds to look at.
    fn forget(&mut self, actor: usize) {
        let me = &mut self.actors[actor];
        if matches!(me.step, Step::Done | Step::Failed | Step::List | Step::Delete | Step::DecideDelete) {
            me.seen = NOTHING_SEEN;
        }
        if matches!(me.step, Step::Done | Step::Failed) {
            (me.listed, me.condemn, me.delete) = (0, 0, 0);
        }
    }

    /// Whether the record after the last one that `actor` saw is its own to create.
    fn is_first(&self, actor: usize, mistake: Mistake) -> bool {
        self.log.head == self.actors[actor].seen.head || mistake == Mistake::AppendWithoutCreatingIfAbsent
    }

    fn read(&mut self, actor: usize) -> Log {
        self.actors[actor].seen = self.log;
        self.log
    }

    fn write(&mut self, actor: usize, mistake: Mistake) {
        let (own, copy, wants) = (own_pack(actor), copy_pack(actor), wanted(actor));
        let me = self.actors[actor];
        self.actors[actor].step = match me.step {
            Step::Look => {
                self.read(actor);
                Step::Store
            }
            Step::Store => {
                self.stored[own] = wants & !me.seen.live() | wants & !SHARED;
                Step::Decide
            }
            Step::Decide => {
                let seen = self.read(actor);
                if wants & !self.promised(actor, &seen, mistake) == 0 || mistake == Mistake::CommitUnchecked {
                    Step::Append
                } else {
                    Step::Rescue
                }
            }
            Step::Append if self.is_first(actor, mistake) => {
                for pack in [own, copy] {
                    if mistake == Mistake::TrustOwnPacks && self.stored[pack] != 0 {
                        self.log.packs[pack] = (Status::Live, self.stored[pack]);
                    }
                    self.log.add(pack, self.stored[pack]);
                }
                self.log.points[2 + actor] = wants;
                self.log.head += 1;
                Step::Done
            }
            Step::Append => Step::Decide,
            Step::Rescue => {
                let missing = wants & !self.promised(actor, &me.seen, mistake);
                let found = self.stored.iter().fold(0, |all, has| all | has);
                // What is copied once and condemned again is given up: no order of steps needs more to be tried.
                if self.stored[copy] == 0 && missing & !found == 0 {
                    self.stored[copy] = missing;
                    Step::Decide
                } else {
                    Step::Failed
                }
            }
            other => other,
        };
    }

    /// What a commit at the end of `seen` may rely on.
    fn promised(&self, actor: usize, seen: &Log, mistake: Mistake) -> Chunks {
        let fresh = [own_pack(actor), copy_pack(actor)].into_iter();
        let trusted = mistake == Mistake::TrustOwnPacks;
        let fresh = fresh.filter(|pack| trusted || seen.packs[*pack].0 == Status::Unknown);
        fresh.fold(seen.live(), |all, pack| all | self.stored[pack])
    }

    fn expire(&mut self, actor: usize, mistake: Mistake) {
        self.actors[actor].step = match self.actors[actor].step {
            Step::Decide => {
                self.read(actor);
                Step::Append
            }
            Step::Append if self.is_first(actor, mistake) => {
                let expired = usize::from(self.log.points[0] == 0);
                self.log.points[expired] = 0;
                self.log.head += 1;
                let me = &mut self.actors[actor];
                me.rounds -= 1;
                if me.rounds == 0 { Step::Done } else { Step::Decide }
            }
            Step::Append => Step::Decide,
            other => other,
        };
    }

    fn collect(&mut self, actor: usize, mistake: Mistake) {
        let me = self.actors[actor];
        self.actors[actor].step = match me.step {
            Step::List => {
                self.actors[actor].listed =
                    (0..PACKS).filter(|pack| self.stored[*pack] != 0).fold(0, |all, pack| all | 1 << pack);
                Step::Plan
            }
            Step::Plan => self.plan(actor, mistake),
            Step::Copy => {
                self.stored[copy_pack(actor)] = self.live_part(actor);
                self.actors[actor].condemn |= u8::from(self.stored[copy_pack(actor)] != 0);
                self.after_plan(actor, mistake)
            }
            Step::Condemn if self.is_first(actor, mistake) || mistake == Mistake::CondemnAtAnyHead => {
                for pack in bits(me.condemn) {
                    if matches!(self.log.packs[pack].0, Status::Unknown | Status::Live) {
                        self.log.packs[pack].0 = Status::Condemned;
                    }
                }
                self.log.add(copy_pack(actor), self.stored[copy_pack(actor)]);
                self.log.head += 1;
                Step::DecideDelete
            }
            Step::Condemn => Step::List,
            Step::DecideDelete => {
                let seen = self.read(actor);
                let condemned = |pack: &usize| seen.packs[*pack].0 == Status::Condemned;
                if bits(me.delete).any(|pack| condemned(&pack)) {
                    Step::AppendDelete
                } else {
                    self.may_delete(actor)
                }
            }
            Step::AppendDelete if self.is_first(actor, mistake) => {
                for pack in bits(me.delete) {
                    if self.log.packs[pack].0 == Status::Condemned {
                        self.log.packs[pack].0 = Status::Deleted;
                    }
                }
                self.log.head += 1;
                self.may_delete(actor)
            }
            Step::AppendDelete => Step::DecideDelete,
            Step::Delete => self.delete_next(actor),
            other => other,
        };
    }

    /// The live part of the first pack, when only a part of it is live.
    fn live_part(&self, actor: usize) -> Chunks {
        let seen = &self.actors[actor].seen;
        let (status, has) = seen.packs[0];
        let live = has & seen.reached();
        if status == Status::Live && live != has && self.stored[0] != 0 { live } else { 0 }
    }

    fn plan(&mut self, actor: usize, mistake: Mistake) -> Step {
        let seen = self.read(actor);
        let me = &mut self.actors[actor];
        let (known, copied) = (me.condemn, self.stored[copy_pack(actor)]);
        (me.condemn, me.delete) = (0, 0);
        // Of two packs with the same chunk the first one counts.
        let mut claimed = 0;
        for pack in 0..PACKS {
            let (status, has) = seen.packs[pack];
            let listed = me.listed & 1 << pack != 0;
            match status {
                Status::Live => {
                    let own = has & seen.reached() & !claimed;
                    claimed |= own;
                    if own == 0 {
                        me.condemn |= 1 << pack;
                    }
                }
                // A copy of its own is no orphan.
                Status::Unknown if listed && pack != copy_pack(actor) => me.condemn |= 1 << pack,
                Status::Condemned if listed => me.delete |= 1 << pack,
                _ => {}
            }
        }
        let sparse = self.live_part(actor);
        if copied == 0 && known == 0 {
            // A name is never used twice.
            let fresh = seen.packs[copy_pack(actor)].0 == Status::Unknown;
            return if sparse != 0 && fresh && self.actors[actor].role == Role::Collector {
                Step::Copy
            } else {
                self.after_plan(actor, mistake)
            };
        }
        // Planned again: nothing new is condemned, and a sparse pack only when its copy is still good.
        let good =
            seen.packs[copy_pack(actor)].0 == Status::Unknown || mistake == Mistake::CondemnIntoCondemned;
        let me = &mut self.actors[actor];
        me.condemn &= known;
        if sparse != 0 && known & 1 != 0 && sparse & !copied == 0 && good {
            me.condemn |= 1;
        }
        self.after_plan(actor, mistake)
    }

    fn after_plan(&mut self, actor: usize, mistake: Mistake) -> Step {
        let condemn = self.actors[actor].condemn;
        if mistake == Mistake::DeleteBeforeCondemning {
            bits(condemn).for_each(|pack| self.stored[pack] = 0);
        }
        if condemn == 0 { Step::DecideDelete } else { Step::Condemn }
    }

    /// The bytes of what the log calls deleted now will go, whatever it says later.
    fn may_delete(&mut self, actor: usize) -> Step {
        let gone = |pack: &usize| self.log.packs[*pack].0 == Status::Deleted && self.stored[*pack] != 0;
        let delete = bits(self.actors[actor].listed).filter(gone).fold(0, |all, pack| all | 1 << pack);
        self.actors[actor].delete = delete;
        Step::Delete
    }

    /// Removes the bytes of one pack, or ends the round.
    fn delete_next(&mut self, actor: usize) -> Step {
        if let Some(pack) = bits(self.actors[actor].delete).next() {
            self.stored[pack] = 0;
            self.actors[actor].delete &= !(1 << pack);
            return Step::Delete;
        }
        let me = &mut self.actors[actor];
        (me.condemn, me.delete, me.listed) = (0, 0, 0);
        me.rounds -= 1;
        if me.rounds == 0 { Step::Done } else { Step::List }
    }
}

/// Tries every order. Returns the number of states, or one that lost something.
fn explore(start: World, mistake: Mistake) -> Result<usize, Box<World>> {
    let mut known = HashSet::from([start.clone()]);
    let mut open = vec![start];
    while let Some(world) = open.pop() {
        if world.loses() {
            return Err(Box::new(world));
        }
        let mut stuck = true;
        for actor in 0..ACTORS {
            if let Some(next) = world.step(actor, mistake) {
                stuck = false;
                if known.insert(next.clone()) {
                    open.push(next);
                }
            }
        }
        let ended = |actor: &Actor| matches!(actor.step, Step::Done | Step::Failed);
        assert!(!stuck || world.actors.iter().all(ended), "somebody waits for ever: {world:?}");
    }
    Ok(known.len())
}

/// Two writers and a collector; a writer and two collectors. Who collects twice deletes what it condemned, and one
/// deletes what the other condemned.
fn settings() -> [World; 2] {
    use Role::{Collector, Expirer, Sweeper, Writer};
    [
        World::new([(Writer, 1), (Writer, 1), (Collector, 2), (Expirer, 2)]),
        World::new([(Writer, 1), (Collector, 2), (Sweeper, 1), (Expirer, 1)]),
    ]
}

#[test]
fn no_order_of_steps_loses_anything() {
    for start in settings() {
        let states = explore(start, Mistake::None).unwrap_or_else(|world| panic!("lost: {world:#?}"));
        println!("{states} states");
        assert!(states > 10_000, "{states} states are too few to mean anything");
    }
}

#[test]
fn every_mistake_in_the_protocol_loses_something() {
    for mistake in [
        Mistake::CommitUnchecked,
        Mistake::CondemnAtAnyHead,
        Mistake::CondemnIntoCondemned,
        Mistake::TrustOwnPacks,
        Mistake::DeleteBeforeCondemning,
        Mistake::AppendWithoutCreatingIfAbsent,
    ] {
        let lost = settings().into_iter().any(|start| explore(start, mistake).is_err());
        assert!(lost, "{mistake:?} went unnoticed");
    }
}
