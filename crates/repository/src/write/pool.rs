//! Workers that compress and seal segments, and the one that stores packs.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use mainstay_core::{BlobStore, Error, Put, Result};

use crate::format::pack::BuiltPack;
use crate::format::segment::{Binding, Compression, GroupId, Sealer};
use crate::log::record::PackEntry;
use crate::names;
use crate::seal::SealKey;

/// A full segment on its way to be sealed.
pub(crate) struct Job {
    pub(crate) key: Arc<SealKey>,
    pub(crate) binding: Binding,
    pub(crate) ordinal: u32,
    pub(crate) raw: Vec<u8>,
}

pub(crate) struct SealedSegment {
    pub(crate) group: GroupId,
    pub(crate) ordinal: u32,
    pub(crate) raw_bytes: usize,
    pub(crate) stored: Vec<u8>,
}

/// A bounded pool. Whoever submits also collects, so at most `in_flight_max` segments are held. Without workers,
/// whoever submits seals.
pub(crate) struct SealPool {
    jobs: Option<Sender<Job>>,
    here: Option<(Work, Sender<Result<SealedSegment>>)>,
    done: Receiver<Result<SealedSegment>>,
    workers: Vec<JoinHandle<()>>,
    in_flight: usize,
    in_flight_max: usize,
}

/// What a worker does with each job.
type Work = Box<dyn FnMut(&Job) -> Result<SealedSegment> + Send>;

impl SealPool {
    pub(crate) fn start(workers: usize, compression: Compression) -> Result<Self> {
        Self::start_with(workers, &|| {
            let mut sealer = Sealer::new(compression)?;
            Ok(Box::new(move |job| seal(&mut sealer, job)))
        })
    }

    fn start_with(workers: usize, make: &dyn Fn() -> Result<Work>) -> Result<Self> {
        let (jobs, inbox) = bounded::<Job>(workers);
        let (outbox, done) = unbounded();
        let mut handles = Vec::new();
        for number in 0..workers {
            let (inbox, outbox) = (inbox.clone(), outbox.clone());
            let mut work = make()?;
            let work = move || {
                for job in inbox {
                    if outbox.send(unless_panicked(|| work(&job))).is_err() {
                        return;
                    }
                }
            };
            handles.push(spawn(format!("seal-{number}"), work)?);
        }
        let here = if workers == 0 { Some((make()?, outbox)) } else { None };
        let in_flight_max = (workers * 2).max(1);
        Ok(Self { jobs: Some(jobs), here, done, workers: handles, in_flight: 0, in_flight_max })
    }

    /// Whether another job may be submitted before a result is collected.
    pub(crate) fn has_room(&self) -> bool {
        self.in_flight < self.in_flight_max
    }

    pub(crate) fn submit(&mut self, job: Job) -> Result<()> {
        let sent = match (&mut self.here, &self.jobs) {
            (Some((work, outbox)), _) => outbox.send(work(&job)).is_ok(),
            (None, Some(jobs)) => jobs.send(job).is_ok(),
            (None, None) => false,
        };
        if !sent {
            return Err(Error::bug("the sealing workers are gone"));
        }
        self.in_flight += 1;
        Ok(())
    }

    /// A result, waiting for it if need be; `None` when nothing is in flight.
    pub(crate) fn collect(&mut self) -> Result<Option<SealedSegment>> {
        if self.in_flight == 0 {
            return Ok(None);
        }
        let sealed = self.done.recv().map_err(|_gone| Error::bug("the sealing workers are gone"))?;
        self.in_flight -= 1;
        sealed.map(Some)
    }

    /// A result that is ready now.
    pub(crate) fn try_collect(&mut self) -> Result<Option<SealedSegment>> {
        match self.done.try_recv() {
            Ok(sealed) => {
                self.in_flight -= 1;
                sealed.map(Some)
            }
            Err(_nothing_ready) => Ok(None),
        }
    }
}

impl Drop for SealPool {
    fn drop(&mut self) {
        self.jobs = None;
        for worker in self.workers.drain(..) {
            let _ended = worker.join();
        }
    }
}

fn seal(sealer: &mut Sealer, job: &Job) -> Result<SealedSegment> {
    let stored = sealer.seal(&job.key, &job.binding, job.ordinal, &job.raw)?;
    Ok(SealedSegment { group: job.binding.group, ordinal: job.ordinal, raw_bytes: job.raw.len(), stored })
}

/// A worker that only died would leave everyone waiting for its result.
fn unless_panicked<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_panic| Err(Error::bug("a worker panicked")))
}

fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name)
        .spawn(work)
        .map_err(|error| Error::io("cannot start a thread", error))
}

/// Where it is told what became of each pack.
type Stored = Sender<Result<PackEntry>>;

/// Stores packs one after another on a thread of its own, so that the reading goes on meanwhile; on the caller's
/// thread when there are to be no others.
pub(crate) struct Uploader {
    packs: Option<Sender<(BuiltPack, PackEntry)>>,
    here: Option<(Arc<dyn BlobStore>, Stored)>,
    done: Receiver<Result<PackEntry>>,
    worker: Option<JoinHandle<()>>,
    in_flight: usize,
}

impl Uploader {
    pub(crate) fn start(store: Arc<dyn BlobStore>, jobs: usize) -> Result<Self> {
        // No queue: one pack is being stored while the next one is filled.
        let (packs, inbox) = bounded::<(BuiltPack, PackEntry)>(0);
        let (outbox, done) = unbounded();
        if jobs == 0 {
            return Ok(Self { packs: None, here: Some((store, outbox)), done, worker: None, in_flight: 0 });
        }
        let work = move || {
            for (pack, entry) in inbox {
                let stored = unless_panicked(|| store_pack(store.as_ref(), &pack));
                if outbox.send(stored.map(|()| entry)).is_err() {
                    return;
                }
            }
        };
        let worker = Some(spawn("store".into(), work)?);
        Ok(Self { packs: Some(packs), here: None, done, worker, in_flight: 0 })
    }

    pub(crate) fn submit(&mut self, pack: BuiltPack, entry: PackEntry) -> Result<()> {
        let sent = match (&self.here, &self.packs) {
            (Some((store, outbox)), _) => {
                outbox.send(store_pack(store.as_ref(), &pack).map(|()| entry)).is_ok()
            }
            (None, Some(packs)) => packs.send((pack, entry)).is_ok(),
            (None, None) => false,
        };
        if !sent {
            return Err(Error::bug("the storing thread is gone"));
        }
        self.in_flight += 1;
        Ok(())
    }

    /// Packs stored since the last call; with `all`, waits for those under way.
    pub(crate) fn collect(&mut self, all: bool) -> Result<Vec<PackEntry>> {
        let mut stored = Vec::new();
        while self.in_flight > 0 {
            let result = if all {
                self.done.recv().map_err(|_gone| Error::bug("the storing thread is gone"))?
            } else {
                match self.done.try_recv() {
                    Ok(result) => result,
                    Err(_nothing_ready) => break,
                }
            };
            self.in_flight -= 1;
            stored.push(result?);
        }
        Ok(stored)
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        self.packs = None;
        if let Some(worker) = self.worker.take() {
            let _ended = worker.join();
        }
    }
}

pub(crate) fn store_pack(store: &dyn BlobStore, pack: &BuiltPack) -> Result<()> {
    let parts: Vec<&[u8]> = pack.parts.iter().map(Vec::as_slice).collect();
    match store.put_new(&names::pack(&pack.id), &parts)? {
        Put::Created => Ok(()),
        Put::Exists => Err(Error::bug(format!("the random name {} of a pack is taken", pack.id))),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mainstay_core::{Code, Id16};

    use super::{Job, SealPool, SealedSegment};
    use crate::format::segment::{Binding, Class};
    use crate::keys::FamilyId;
    use crate::seal::SealKey;

    #[test]
    fn a_worker_that_panics_ends_the_run() {
        let family = FamilyId([0; 32]);
        let binding = Binding { family, domain: Id16([0; 16]), group: Id16([0; 16]), class: Class::Data };
        let mut pool = SealPool::start_with(2, &|| {
            Ok(Box::new(|job: &Job| {
                assert_ne!(job.ordinal, 1, "as planned");
                let (group, ordinal) = (job.binding.group, job.ordinal);
                Ok(SealedSegment { group, ordinal, raw_bytes: 0, stored: Vec::new() })
            }))
        })
        .unwrap();
        let key = Arc::new(SealKey::random().unwrap());
        for ordinal in 0..3 {
            pool.submit(Job { key: Arc::clone(&key), binding, ordinal, raw: Vec::new() }).unwrap();
        }
        let outcomes: Vec<_> = (0..3).map(|_| pool.collect()).collect();
        let failed: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
        assert_eq!(failed.len(), 1);
        assert_eq!(failed[0].code(), Code::Bug);
        assert!(pool.collect().unwrap().is_none());
    }
}
