//! How people name a recovery point: `latest`, `WORKLOAD`, `WORKLOAD@latest`, `WORKLOAD@POINT`, `WORKLOAD@TIME`,
//! `POINT`, each with `~N` for the Nth point before it.
//!
//! A workload may be named by what follows the `:` of its name while only one ends so. A time means the newest
//! point at or before it, a date the newest point of that day or before. POINT is at least the first four digits.

use jiff::civil::{Date, DateTime};
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use mainstay_core::{Code, Error, Result, Time};
use mainstay_repository::PointInfo;

use crate::undo::UNDO;
use crate::vm::takes_back;

/// Fewer digits of a point's id are not taken for one.
const PREFIX_MIN: usize = 4;

/// Up to this moment counts what is newer than the latest point of a workload.
pub const LATEST: Time = Time(i64::MAX);

/// The point that `text` names, out of `points` in the order of the log. `zone` is for times that name none.
///
/// Undo points are only found by their id or the name of their workload.
///
/// Errors: [`Code::NotFound`] naming what comes nearest, [`Code::Usage`] for a text that can mean several points
/// or none.
pub fn find_point<'a>(text: &str, points: &'a [PointInfo], zone: &TimeZone) -> Result<&'a PointInfo> {
    find_as_of(text, points, zone).map(|(point, _until)| point)
}

/// As [`find_point`], with the moment up to which what is newer belongs to the answer: [`LATEST`] for the latest, the
/// time that was named, `None` when one point was named and nothing else is meant.
pub fn find_as_of<'a>(
    text: &str,
    points: &'a [PointInfo],
    zone: &TimeZone,
) -> Result<(&'a PointInfo, Option<Time>)> {
    let (text, back) = split_back(text)?;
    let refuse = |error: Error| error.during(format!("cannot find the point {text:?}"));
    let (scope, at, until) = match text.rsplit_once('@') {
        Some((workload, which)) => {
            let scope = of_workload(workload, points).map_err(refuse)?;
            let by_id = by_id(which, &scope).map_err(refuse)?.is_some();
            let scope = if by_id { scope } else { captured(scope) };
            let (at, until) = within(which, &scope, zone).map_err(refuse)?;
            (scope, at, until)
        }
        None => bare(text, points).map_err(refuse)?,
    };
    let found = at.checked_sub(back).and_then(|index| scope.get(index).copied()).ok_or_else(|| {
        let what = format!("there is no point {back} before {text:?}");
        Error::new(Code::NotFound, what).hint(format!("the oldest is {text}~{at}"))
    })?;
    Ok((found, until.filter(|_| back == 0)))
}

/// The points of the workload that `name` names, in order.
///
/// Errors: [`Code::NotFound`] when there is none, [`Code::Usage`] when there are several.
pub fn of_workload<'a>(name: &str, points: &'a [PointInfo]) -> Result<Vec<&'a PointInfo>> {
    let mut names: Vec<&str> = points.iter().map(|point| point.workload.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let full = if names.contains(&name) {
        name
    } else {
        let mut labelled = names.iter().filter(|full| label(full) == name);
        match (labelled.next(), labelled.next()) {
            (Some(full), None) => full,
            (Some(one), Some(other)) => {
                return Err(Error::new(Code::Usage, format!("{name:?} can mean {one} and {other}"))
                    .hint(format!("name the workload in full: {one}")));
            }
            (None, _) => return Err(no_workload(name, &names)),
        }
    };
    Ok(points.iter().filter(|point| point.workload.name == full).collect())
}

/// Without the points that take back a restore of a machine, unless there are no others: `latest` of a machine is what was
/// captured last, whatever was put back since.
fn captured(scope: Vec<&PointInfo>) -> Vec<&PointInfo> {
    if scope.iter().all(|point| takes_back(point)) {
        return scope;
    }
    scope.into_iter().filter(|point| !takes_back(point)).collect()
}

/// What follows the host in a workload's name.
fn label(name: &str) -> &str {
    name.split_once(':').map_or(name, |(_host, label)| label)
}

fn split_back(text: &str) -> Result<(&str, usize)> {
    let Some((front, digits)) = text.rsplit_once('~') else { return Ok((text, 0)) };
    let usage = |error: std::num::ParseIntError| {
        Error::new(Code::Usage, format!("{digits:?} after `~` is not a number"))
            .because(error)
            .hint("write latest~2 for the second point before the latest")
    };
    Ok((front, digits.parse().map_err(usage)?))
}

/// The points of a workload, the one meant, and up to when what is newer counts.
type Found<'a> = (Vec<&'a PointInfo>, usize, Option<Time>);

/// A text without `@`.
fn bare<'a>(text: &str, points: &'a [PointInfo]) -> Result<Found<'a>> {
    if text == "latest" {
        let scope = points.iter().filter(|point| point.workload.kind.0 != UNDO).collect();
        let scope = captured(scope);
        let last = last(&scope)?;
        return Ok((scope, last, Some(LATEST)));
    }
    match of_workload(text, points) {
        Ok(scope) => {
            let scope = captured(scope);
            let last = last(&scope)?;
            Ok((scope, last, Some(LATEST)))
        }
        Err(error) if error.code() == Code::Usage => Err(error),
        Err(no_workload) => {
            let all: Vec<_> = points.iter().collect();
            let index = by_id(text, &all)?.ok_or(no_workload)?;
            let same = all.get(index).map(|point| point.workload.id);
            let scope: Vec<_> = all.iter().filter(|point| Some(point.workload.id) == same).copied().collect();
            let found = all.get(index).map(|point| point.id);
            let at = scope.iter().position(|point| Some(point.id) == found).unwrap_or_default();
            Ok((scope, at, None))
        }
    }
}

/// The index in `scope` of what stands after the `@`, and up to when what is newer counts.
fn within(which: &str, scope: &[&PointInfo], zone: &TimeZone) -> Result<(usize, Option<Time>)> {
    if which == "latest" {
        return Ok((last(scope)?, Some(LATEST)));
    }
    if let Some(index) = by_id(which, scope)? {
        return Ok((index, None));
    }
    let Some(moment) = parse_time(which, zone) else {
        let what = format!("{which:?} is neither a time nor the start of a point's id");
        let hint = "times look like 2026-11-22, 2026-11-22T10:41 or 2026-11-22T09:41:07Z; \
                    `mainstay points` lists the points";
        return Err(Error::new(Code::NotFound, what).hint(hint));
    };
    let newest = scope.iter().rposition(|point| point.moment <= moment);
    newest.map(|index| (index, Some(moment))).ok_or_else(|| {
        let oldest = scope.iter().map(|point| point.moment).min().unwrap_or_default();
        let what = format!("no point is as old as {}", show_time(moment, zone));
        Error::new(Code::NotFound, what).hint(format!("the oldest is of {}", show_time(oldest, zone)))
    })
}

fn last(scope: &[&PointInfo]) -> Result<usize> {
    scope.len().checked_sub(1).ok_or_else(|| {
        Error::new(Code::NotFound, "there are no points yet").hint("make one: mainstay backup PATH")
    })
}

/// `None` when `text` does not look like the start of an id, or no id starts so.
fn by_id(text: &str, scope: &[&PointInfo]) -> Result<Option<usize>> {
    let digits = (PREFIX_MIN..=32).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !digits {
        return Ok(None);
    }
    let text = text.to_ascii_lowercase();
    let mut found = scope.iter().enumerate().filter(|(_, point)| point.id.to_string().starts_with(&text));
    match (found.next(), found.next()) {
        (Some((_, one)), Some((_, other))) => {
            Err(Error::new(Code::Usage, format!("{text} can mean {} and {}", one.id, other.id))
                .hint("write more of the id"))
        }
        (first, _) => Ok(first.map(|(index, _)| index)),
    }
}

/// Reads a time as people write it: with an offset or a zone, or without one and then in `zone`. A date means its
/// last moment, and so do a minute and a second that are not given more exactly: whoever copies a time from a list
/// means the point that stands there.
pub fn parse_time(text: &str, zone: &TimeZone) -> Option<Time> {
    let time = parse_exactly(text, zone)?;
    let clock = text.get(11..).unwrap_or_default();
    let clock = clock.split(['+', '-', 'Z', 'z', '[']).next().unwrap_or_default();
    let rest = match (clock.contains('.'), clock.matches(':').count()) {
        (false, 1) => 59_999_999_999,
        (false, 2) => 999_999_999,
        _ => 0,
    };
    Some(Time(time.0.saturating_add(rest)))
}

fn parse_exactly(text: &str, zone: &TimeZone) -> Option<Time> {
    let nanoseconds = |stamp: Timestamp| i64::try_from(stamp.as_nanosecond()).ok().map(Time);
    if let Ok(stamp) = text.parse::<Timestamp>() {
        return nanoseconds(stamp);
    }
    if let Ok(zoned) = text.parse::<Zoned>() {
        return nanoseconds(zoned.timestamp());
    }
    let is_date = !text.contains([':', 'T', 't', ' ']);
    if let (true, Ok(date)) = (is_date, text.parse::<Date>()) {
        let next = date.tomorrow().ok()?.to_zoned(zone.clone()).ok()?;
        return nanoseconds(next.timestamp()).map(|next| Time(next.0.saturating_sub(1)));
    }
    let civil = text.parse::<DateTime>().ok()?;
    nanoseconds(civil.to_zoned(zone.clone()).ok()?.timestamp())
}

/// A time for people, in `zone`, to the second: `2026-11-22 10:41:07`.
pub fn show_time(time: Time, zone: &TimeZone) -> String {
    let stamp = Timestamp::from_nanosecond(i128::from(time.0)).unwrap_or_default();
    stamp.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

fn no_workload(name: &str, names: &[&str]) -> Error {
    let error = Error::new(Code::NotFound, format!("there is no workload {name:?}"));
    if names.is_empty() {
        return error.hint("there are no points yet; make one: mainstay backup PATH");
    }
    let distance = |full: &&str| edits(full, name).min(edits(label(full), name));
    let mut near: Vec<(usize, &str)> = names.iter().map(|full| (distance(full), *full)).collect();
    near.sort_unstable();
    let close = near.iter().filter(|(distance, _)| *distance <= 1 + name.len() / 3).count();
    let listed: Vec<&str> = near.iter().take(close.clamp(1, 3)).map(|(_, full)| *full).collect();
    let word = if close > 0 { "did you mean" } else { "there is" };
    error.hint(format!("{word} {}; `mainstay points` lists them all", listed.join(" or ")))
}

/// How many single letters must change, come or go to make `a` of `b`.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, letter) in a.chars().enumerate() {
        let mut above_left = i;
        let mut left = i + 1;
        for (cell, other) in row.iter_mut().skip(1).zip(&b) {
            let change = above_left + usize::from(letter != *other);
            above_left = *cell;
            left = change.min(left + 1).min(*cell + 1);
            *cell = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use jiff::tz::TimeZone;
    use mainstay_core::Code;
    use mainstay_repository::PointInfo;

    use super::{LATEST, edits, find_as_of, find_point, parse_time, show_time};
    use crate::testing::point;

    fn berlin() -> TimeZone {
        TimeZone::get("Europe/Berlin").unwrap()
    }

    /// Ids are the number as eight digits, repeated.
    fn points() -> Vec<PointInfo> {
        let mut undo = point(0xdddd_0001, "web:undo", "2026-11-05T12:00:00Z");
        undo.workload.kind.0 = "undo".into();
        vec![
            point(0xaaaa_0001, "web:etc", "2026-11-01T10:00:00Z"),
            point(0xbbbb_0001, "db:data", "2026-11-01T22:59:59.999Z"),
            point(0xaaaa_0002, "web:etc", "2026-11-01T23:00:00Z"),
            point(0xaaaa_0003, "web:etc", "2026-11-03T10:00:00Z"),
            point(0xcccc_0001, "web:data", "2026-11-04T10:00:00Z"),
            undo,
        ]
    }

    #[test]
    fn every_form_finds_its_point() {
        let points = points();
        for (text, expected) in [
            ("latest", 0xcccc_0001_u32),
            ("latest~1", 0xaaaa_0003),
            ("latest~3", 0xbbbb_0001),
            ("web:etc", 0xaaaa_0003),
            ("etc", 0xaaaa_0003),
            ("etc~2", 0xaaaa_0001),
            ("etc@latest", 0xaaaa_0003),
            ("etc@latest~1", 0xaaaa_0002),
            ("db:data@latest", 0xbbbb_0001),
            ("etc@aaaa0001", 0xaaaa_0001),
            ("etc@AAAA0001", 0xaaaa_0001),
            ("bbbb", 0xbbbb_0001),
            ("aaaa0003~1", 0xaaaa_0002),
            ("undo", 0xdddd_0001),
            ("dddd0001", 0xdddd_0001),
            // Midnight of 2 November in Berlin is 23:00 UTC of the first.
            ("etc@2026-11-01", 0xaaaa_0001),
            ("etc@2026-11-02", 0xaaaa_0002),
            ("etc@2026-11-02T00:00", 0xaaaa_0002),
            ("etc@2026-11-01 23:59:59", 0xaaaa_0001),
            ("etc@2026-11-01T23:00:00Z", 0xaaaa_0002),
            ("etc@2026-11-01T17:59:59-05:00", 0xaaaa_0001),
            ("etc@2026-11-02T08:00[Asia/Tokyo]", 0xaaaa_0002),
            ("etc@2030-01-01", 0xaaaa_0003),
            ("etc@2030-01-01~2", 0xaaaa_0001),
        ] {
            let found =
                find_point(text, &points, &berlin()).unwrap_or_else(|error| panic!("{text}: {error:?}"));
            assert_eq!(found.id, point(expected, "", "2026-01-01T00:00:00Z").id, "{text}");
        }
    }

    #[test]
    fn what_is_newer_counts_up_to_the_time_that_is_named_and_not_for_a_point_that_is() {
        let points = points();
        let noon = parse_time("2026-11-02T12:00", &berlin());
        for (text, until) in [
            ("etc", Some(LATEST)),
            ("etc@latest", Some(LATEST)),
            ("latest", Some(LATEST)),
            ("etc@2026-11-02T12:00", noon),
            ("etc@2026-11-02T12:00~1", None),
            ("etc@latest~1", None),
            ("etc@aaaa0001", None),
            ("bbbb", None),
        ] {
            assert_eq!(find_as_of(text, &points, &berlin()).unwrap().1, until, "{text}");
        }
    }

    #[test]
    fn what_takes_back_a_restore_of_a_machine_is_found_by_its_id_only() {
        let mut points = vec![
            point(0xaaaa_0001, "web", "2026-11-01T10:00:00Z"),
            point(0xaaaa_0002, "web", "2026-11-02T10:00:00Z"),
        ];
        points.iter_mut().for_each(|point| point.workload.kind.0 = "vm".into());
        points[1].tags.push("undo".into());
        for (text, expected) in
            [("web", 1_u32), ("web@latest", 1), ("web@2026-11-05", 1), ("latest", 1), ("web@aaaa0002", 2)]
        {
            let found = find_point(text, &points, &berlin()).unwrap();
            assert_eq!(found.id, point(0xaaaa_0000 + expected, "", "2026-01-01").id, "{text}");
        }
        let only = find_point("web@latest", &points[1..], &berlin()).unwrap();
        assert_eq!(only.id, points[1].id);
    }

    #[test]
    fn what_cannot_be_found_is_said_with_what_comes_nearest() {
        let points = points();
        for (text, code, why, hint) in [
            ("ect", Code::NotFound, "there is no workload \"ect\"", "did you mean web:etc"),
            ("wiki", Code::NotFound, "there is no workload \"wiki\"", "there is "),
            ("data", Code::Usage, "\"data\" can mean db:data and web:data", "in full: db:data"),
            ("aaaa", Code::Usage, "aaaa can mean aaaa0001", "more of the id"),
            ("eeee", Code::NotFound, "there is no workload \"eeee\"", ""),
            ("etc@bbbb", Code::NotFound, "neither a time nor", "2026-11-22T10:41"),
            (
                "etc@2026-10-31",
                Code::NotFound,
                "no point is as old as 2026-10-31 23:59:59",
                "2026-11-01 11:00:00",
            ),
            ("etc~9", Code::NotFound, "there is no point 9 before \"etc\"", "the oldest is etc~2"),
            ("etc~x", Code::Usage, "\"x\" after `~`", "latest~2"),
        ] {
            let error = find_point(text, &points, &berlin()).unwrap_err();
            let said = error.chain().join(": ");
            assert!(error.code() == code && said.contains(why), "{text}: {error:?}");
            assert!(error.next_step().unwrap_or_default().contains(hint), "{text}: {:?}", error.next_step());
        }
        let error = find_point("latest", &[], &berlin()).unwrap_err();
        assert!(error.next_step().unwrap().contains("mainstay backup"));
    }

    #[test]
    fn times_are_read_and_shown_in_the_given_zone() {
        let time = parse_time("2026-11-22T10:41:07", &berlin()).unwrap();
        assert_eq!(Some(time), parse_time("2026-11-22T09:41:07Z", &TimeZone::UTC));
        assert_eq!(show_time(time, &berlin()), "2026-11-22 10:41:07");
        assert_eq!(parse_time("soon", &berlin()), None);
    }

    #[test]
    fn edits_count_letters() {
        assert_eq!([edits("etc", "ect"), edits("", "abc"), edits("same", "same")], [2, 3, 0]);
    }
}
