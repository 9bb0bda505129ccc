//! Values for this crate's tests.

use jiff::tz::TimeZone;
use mainstay_core::{
    Consistency, Counts, Id16, PointId, Position, Time, WorkloadKind, WorkloadRef, WriterId,
};
use mainstay_repository::PointInfo;

use crate::address::parse_time;

pub(crate) fn id(number: u32) -> PointId {
    let bytes = number.to_be_bytes();
    Id16(std::array::from_fn(|index| bytes[index % 4]))
}

pub(crate) fn time(text: &str) -> Time {
    parse_time(text, &TimeZone::UTC).unwrap()
}

/// A point of the workload `name`, its id the eight digits of `number` repeated.
pub(crate) fn point(number: u32, name: &str, moment: &str) -> PointInfo {
    point_at(number, name, time(moment))
}

pub(crate) fn point_at(number: u32, name: &str, moment: Time) -> PointInfo {
    let workload = WorkloadRef {
        id: crate::workload::derived_id("host", name),
        kind: WorkloadKind("files".into()),
        name: name.into(),
    };
    PointInfo {
        id: id(number),
        workload,
        host: "host".into(),
        roots: vec!["/etc".into()],
        sequence: 0,
        parent: None,
        started: moment,
        finished: moment,
        moment,
        consistency: Consistency::Fuzzy,
        counts: Counts::default(),
        position: Position::default(),
        tags: Vec::new(),
        holds: Vec::new(),
        verified: None,
        proven: None,
        writer: WriterId::default(),
        log_sequence: 0,
        committed: moment,
        readable: true,
    }
}
