//! Recovery points as the repository knows them: stored header and body, and what the log says since.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mainstay_core::{
    BlobStore, Code, Consistency, Counts, Error, Id16, PointId, Position, Result, Time, WorkloadKind,
    WorkloadRef, WriterId,
};

use crate::format::point::{Body, Header, POINT_BYTES_MAX, StoredPoint};
use crate::log::record::StoredNote;
use crate::log::state::PointState;
use crate::names;
use crate::shared::Shared;

/// A point as people see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PointInfo {
    pub id: PointId,
    /// Its name is the id in hexadecimal when this holder cannot read.
    pub workload: WorkloadRef,
    pub host: String,
    pub roots: Vec<String>,
    /// Of its writer for this workload, from 1.
    pub sequence: u64,
    pub parent: Option<PointId>,
    pub started: Time,
    pub finished: Time,
    /// The moment that the point stands for.
    pub moment: Time,
    pub consistency: Consistency,
    pub counts: Counts,
    pub position: Position,
    pub tags: Vec<String>,
    pub holds: Vec<Hold>,
    /// When its stored bytes were last verified, and when a restore last proved it.
    pub verified: Option<Time>,
    pub proven: Option<Time>,
    pub writer: WriterId,
    /// Its place in the log, and the time that its commit claims.
    pub log_sequence: u64,
    pub committed: Time,
    /// Whether this holder can read the content.
    pub readable: bool,
}

/// A reason why a point cannot expire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    pub id: Id16,
    pub reason: String,
    pub until: Option<Time>,
    pub placed: Time,
}

/// A later fact about a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    Tag(String),
    Untag(String),
    Hold {
        reason: String,
        until: Option<Time>,
    },
    /// Takes a hold away. Needs the power to expire.
    Release(Id16),
    Verified {
        read_data: bool,
    },
    Proven {
        how: String,
        seconds: u64,
    },
    /// What a boot from the point read, in the words of whoever recorded it; takes the place of an earlier one.
    Boot(String),
}

/// A stored point, checked, with its body where the holder can open it.
pub(crate) struct Loaded {
    pub(crate) header: Header,
    pub(crate) body: Option<Body>,
    pub(crate) hash: [u8; 32],
}

/// Loads points once.
pub(crate) struct Points {
    shared: Arc<Shared>,
    loaded: Mutex<HashMap<PointId, Arc<Loaded>>>,
}

impl Points {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, loaded: Mutex::default() }
    }

    /// Errors: [`Code::NotFound`] when the log knows no such point, [`Code::Integrity`] when it is damaged.
    pub(crate) fn load(&self, id: &PointId) -> Result<Arc<Loaded>> {
        if let Some(point) = self.lock().get(id) {
            return Ok(Arc::clone(point));
        }
        let expected = self.shared.state().point(id).map(|point| point.entry.hash);
        let Some(expected) = expected else {
            return Err(Error::new(Code::NotFound, format!("there is no point {id}")));
        };
        let point = Arc::new(self.read(id, &expected)?);
        self.lock().insert(*id, Arc::clone(&point));
        Ok(point)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PointId, Arc<Loaded>>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the first copy that is whole.
    fn read(&self, id: &PointId, expected: &[u8; 32]) -> Result<Loaded> {
        let name = names::point(id);
        self.read_copy(&name, id, expected).or_else(|first| match first.code() {
            // A damaged version number looks like a newer version.
            Code::Integrity | Code::NotFound | Code::TooNew => {
                let lost = |_second| match first.code() {
                    Code::TooNew => first,
                    _ => Error::integrity(format!("both copies of point {id} are damaged")).because(first),
                };
                self.read_copy(&names::copy_of(&name), id, expected).map_err(lost)
            }
            _ => Err(first),
        })
    }

    /// Reads one copy, under its own name.
    pub(crate) fn read_copy(&self, name: &str, id: &PointId, expected: &[u8; 32]) -> Result<Loaded> {
        let bytes = self.shared.store.get_whole(name, POINT_BYTES_MAX)?;
        let family = self.shared.family();
        let stored = StoredPoint::decode(family, &bytes, |writer| {
            self.shared.state().writer(writer).map(|entry| entry.key)
        })?;
        if stored.hash != *expected || stored.header.id != *id {
            return Err(Error::integrity(format!("point {id} is not the one that was committed")));
        }
        let body = match self.shared.ring.content_secret() {
            Ok(secret) => Some(stored.open_body(family, secret)?),
            Err(_no_power) => None,
        };
        Ok(Loaded { header: stored.header, body, hash: stored.hash })
    }

    pub(crate) fn info(&self, state: &PointState) -> Result<PointInfo> {
        let loaded = self.load(&state.entry.id)?;
        let Header {
            id,
            workload,
            writer,
            sequence,
            parent,
            started,
            finished,
            moment,
            consistency,
            counts,
            ..
        } = loaded.header.clone();
        let unreadable =
            || WorkloadRef { id: workload, kind: WorkloadKind(String::new()), name: workload.to_string() };
        let body = loaded.body.as_ref();
        let newest = |wanted: &dyn Fn(&StoredNote) -> bool| {
            state.notes.iter().filter(|(_, note)| wanted(note)).map(|(time, _)| *time).max()
        };
        let mut tags = body.map(|body| body.tags.clone()).unwrap_or_default();
        let ring = &self.shared.ring;
        state.apply_tags(ring, &mut tags);
        Ok(PointInfo {
            id,
            workload: body.map_or_else(unreadable, |body| body.workload.clone()),
            host: body.map(|body| body.host.clone()).unwrap_or_default(),
            roots: body.map(|body| body.roots.clone()).unwrap_or_default(),
            sequence,
            parent,
            started,
            finished,
            moment,
            consistency,
            counts,
            position: body.map(|body| body.position.clone()).unwrap_or_default(),
            tags,
            holds: state.holds().iter().map(|hold| hold.open(ring)).collect(),
            verified: newest(&|note| matches!(note, StoredNote::Verified { read_data: true })),
            proven: newest(&|note| matches!(note, StoredNote::Proven { .. })),
            writer,
            log_sequence: state.sequence,
            committed: state.committed,
            readable: body.is_some(),
        })
    }
}

/// Stores a small object twice; the first name decides.
pub(crate) fn put_twice(store: &dyn BlobStore, name: &str, bytes: &[u8]) -> Result<mainstay_core::Put> {
    let put = store.put_new(name, &[bytes])?;
    store.put_new(&names::copy_of(name), &[bytes])?;
    Ok(put)
}
