//! The lines of `lines.rs` as people read them.

use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use mainstay_engine::vm::machine_tag;

use super::databases;
use super::human::{Align, bytes, count, counted, duration, table as columns};
use super::lines::{
    BackedUp, Changes, Collected, Damage, Expired, Found, Hold, Item, Line, Mounted, Point, Repository,
    RestorePlan, Restored, Skipped, Totals, Verified, WouldBackUp,
};
use super::machines::{
    CapturedDisk, Composed, FilesApplied, Machine, MachineCaptured, MachineHome, MachinePutBack,
    MachineReceived, MachineRecovered, MachineRestored, MachineRunning, Proven, Unproven,
};
use super::{records, recovery, sprawl};

/// Digits of an id that people see; enough to name it again.
const ID_SHOWN: usize = 8;

/// A line by itself. `None` for what only programs need.
pub(super) fn line(line: &Line, zone: &TimeZone) -> Option<String> {
    Some(match line {
        Line::Initialized(made) => format!("repository {} at {}\n", made.repository, clean(&made.location)),
        Line::Kit(kit) => kit.text.clone(),
        Line::BackedUp(done) => backed_up(done),
        Line::WouldBackUp(found) => would_back_up(found),
        Line::WouldDo(act) => format!("would be done: {}; nothing was changed\n", clean(&act.what)),
        Line::Point(point) => details(point, zone),
        Line::Difference(change) => format!("{} {}\n", mark(&change.change), change.path.path),
        Line::Found(found) => self::found(found, zone),
        Line::RestoreStep(step) => format!("{} {}\n", mark(&step.action), step.path.path),
        Line::RestorePlan(plan) => restore_plan(plan),
        Line::Restored(done) => restored(done),
        Line::Mounted(done) => mounted(done),
        Line::Verified(done) => verified(done),
        Line::Damage(found) => damage(found),
        Line::Expired(done) => expired(done),
        Line::Collected(done) => collected(done),
        Line::Repository(found) => repository(found),
        Line::Skipped(skipped) => format!("{}\n", skip(skipped)),
        Line::Decision(decision) => sprawl::decision(decision, zone),
        Line::Composed(shown) => composed(shown, zone),
        Line::MachineCaptured(captured) => machine_captured(captured),
        Line::MachineReceived(received) => machine_received(received),
        Line::MachineRestored(restored) => machine_restored(restored),
        Line::FilesApplied(done) => files_applied(done),
        Line::MachinePutBack(put) => machine_put_back(put),
        Line::MachineRecovered(recovered) => machine_recovered(recovered),
        Line::MachineRunning(running) => machine_running(running),
        Line::MachineHome(home) => machine_home(home),
        Line::ClusterCaptured(_)
        | Line::ClusterRestored(_)
        | Line::DatabaseProven(_)
        | Line::DatabaseRestored(_)
        | Line::ServerCaptured(_)
        | Line::ServerRestored(_)
        | Line::Following(_)
        | Line::Recoverable(_)
        | Line::Hole(_)
        | Line::ClusterOpened(_)
        | Line::ClusterClosed(_)
        | Line::Drilled(_)
        | Line::Slot(_)
        | Line::Trimmed(_) => return databases::line(line, zone),
        Line::RecordEvent(_)
        | Line::RecordHistory(_)
        | Line::RecordPlan(_)
        | Line::RecordRestored(_)
        | Line::RecordText(_)
        | Line::ErasedRow(_) => return records::line(line, zone),
        Line::Proven(proof) => proven(proof),
        Line::Unproven(proof) => unproven(proof),
        Line::Note(_) | Line::Failed(_) | Line::Content(_) => return None,
        Line::Item(_)
        | Line::Verdict(_)
        | Line::Workload(_)
        | Line::Machine(_)
        | Line::Finding(_)
        | Line::RecoveryPlanned(_)
        | Line::RecoveryState(_)
        | Line::ExitCode(_)
        | Line::Key(_)
        | Line::Writer(_) => {
            return table(std::slice::from_ref(line), zone);
        }
    })
}

fn repository(repository: &Repository) -> String {
    format!(
        "repository {} at {}: {}, {} stored\n",
        short(&repository.repository),
        clean(&repository.location),
        counted(repository.points, "point", "points"),
        bytes(repository.stored_bytes)
    )
}

fn damage(damage: &Damage) -> String {
    let place = [&damage.path, &damage.point].into_iter().flatten();
    let place: String = place.map(|place| format!(" · {}", clean(place))).collect();
    format!("damage: {}{place}\n", clean(&damage.what))
}

/// What became, or would become, of a path.
fn mark(word: &str) -> char {
    match word {
        "added" | "create" => '+',
        "removed" | "delete" => '-',
        "content" | "replace" => '~',
        "blocked" => '!',
        _ => '.',
    }
}

/// Lines of one kind below each other; `None` when there are none.
pub(super) fn table(lines: &[Line], zone: &TimeZone) -> Option<String> {
    let left = |title| (title, Align::Left);
    let right = |title| (title, Align::Right);
    let titles = match lines.first()? {
        Line::Point(_) => {
            vec![
                left("POINT"),
                left("TIME"),
                left("WORKLOAD"),
                left("WHAT"),
                right("ITEMS"),
                right("SIZE"),
                right("WRITTEN"),
                left(""),
            ]
        }
        Line::Item(_) => return Some(lines.iter().filter_map(|line| item_row(line, zone)).collect()),
        Line::Verdict(_) => vec![left(""), left("POINT"), left("TIME"), left("WORKLOAD"), left("WHY")],
        Line::Workload(_) => {
            let titles = ["WORKLOAD", "LAST POINT", "AGE", "VERIFIED", "PROVEN"].map(left);
            titles.into_iter().chain([right("POINTS"), right("SKIPPED"), left("")]).collect()
        }
        Line::Machine(_) => {
            let titles = ["MACHINE", "STATE"].map(left).into_iter().chain([right("DISKS"), right("SIZE")]);
            titles.chain(["WORKLOAD", "LAST POINT", "HOST", "STANDING"].map(left)).collect()
        }
        Line::Finding(_) => sprawl::TITLES.to_vec(),
        Line::RecoveryPlanned(_) => recovery::PLANNED.to_vec(),
        Line::RecoveryState(_) => recovery::STATES.to_vec(),
        Line::Key(_) => ["KEY", "KIND", "MADE", "LABEL"].map(left).to_vec(),
        Line::Writer(_) => vec![left("WRITER"), left("NAME"), left("POWERS")],
        Line::ExitCode(_) => vec![right("EXIT"), left("NAME"), left("MEANING")],
        _ => return Some(lines.iter().filter_map(|one| line(one, zone)).collect()),
    };
    let rows: Vec<Vec<String>> = lines.iter().filter_map(|line| row(line, zone)).collect();
    Some(columns(&titles, &rows))
}

/// A time that was written for programs, for people.
pub(super) fn shown_time(stamp: &str, zone: &TimeZone) -> String {
    stamp.parse::<Timestamp>().map_or_else(
        |_| stamp.to_owned(),
        |stamp| stamp.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M").to_string(),
    )
}

fn composed(shown: &Composed, zone: &TimeZone) -> String {
    let image = &shown.image;
    let mut text = format!(
        "{}: image {} of {}",
        clean(&image.workload),
        short(&image.point),
        local(&image.moment, zone)
    );
    for files in &shown.files {
        let (point, moment) = (short(&files.point), local(&files.moment, zone));
        text.push_str(&format!(", files {point} of {moment} ({}) over it", clean(&files.workload)));
    }
    text + "\nFiles were read one after the other: databases that were open are not consistent. \
            --image-only shows the image alone.\n"
}

/// In the words of a timeline.
fn what_it_holds(point: &Point) -> String {
    match point.kind.as_str() {
        "vm" => "image".to_owned(),
        kind => clean(kind),
    }
}

fn machine_standing(machine: &Machine, zone: &TimeZone) -> String {
    let standing = machine.standing.shown(zone);
    if machine.protection == "overdue" { format!("OVERDUE, {standing}") } else { standing }
}

fn files_applied(done: &FilesApplied) -> String {
    let mut text = format!(
        "newer files put on the disks: {}   {} written · {}\n",
        changes(&done.changes),
        bytes(done.written_bytes),
        seconds(done.seconds)
    );
    if done.skipped > 0 {
        text.push_str(&format!("{} skipped\n", counted(done.skipped, "item was", "items were")));
    }
    text
}

fn machine_received(received: &MachineReceived) -> String {
    let head = format!(
        "{}: {} consistent, held still for {} ms, {} received in {}\n",
        clean(&received.machine),
        received.consistency,
        received.frozen_milliseconds,
        bytes(received.received_bytes),
        seconds(received.seconds)
    );
    head + &captured_disks(&received.disks)
}

fn machine_captured(captured: &MachineCaptured) -> String {
    let head = format!(
        "{}: {} consistent, held still for {} ms\n",
        clean(&captured.workload),
        captured.consistency,
        captured.frozen_milliseconds
    );
    head + &captured_disks(&captured.disks)
}

fn captured_disks(disks: &[CapturedDisk]) -> String {
    let mut text = String::new();
    for disk in disks {
        let why = disk.why.as_ref().map(|why| format!(": {}", clean(why))).unwrap_or_default();
        text.push_str(&format!("  {} · {} · {}{why}\n", clean(&disk.name), bytes(disk.bytes), disk.mode));
    }
    text
}

fn machine_put_back(put: &MachinePutBack) -> String {
    let mut text = String::new();
    for written in &put.written {
        text.push_str(&format!("  {} → {}\n", clean(&written.item), clean(&written.path)));
    }
    let (workload, undo) = (clean(&put.workload), short(&put.undo));
    let started = if put.started { "started · " } else { "" };
    text + &format!(
        "{workload} is as it was at point {}: {} of {} differed · {started}{}\ntake it back: mainstay vm restore \
         {workload}@{undo} --in-place --host …\n",
        short(&put.point),
        bytes(put.written_bytes),
        bytes(put.bytes),
        seconds(put.seconds)
    )
}

fn machine_recovered(recovered: &MachineRecovered) -> String {
    let (name, host) = (clean(&recovered.name), clean(&recovered.host));
    if recovered.was_complete {
        return format!("{name} is there already, on {host}, and was left as it is\n");
    }
    let started = if recovered.started { ", started" } else { "" };
    format!(
        "{name} is on {host}{started}: {} restored, {} of it data · {} · {}\n",
        bytes(recovered.bytes),
        bytes(recovered.written_bytes),
        clean(&recovered.directory),
        seconds(recovered.seconds)
    )
}

fn machine_running(running: &MachineRunning) -> String {
    let (workload, directory) = (clean(&running.workload), clean(&running.directory));
    let read = bytes(running.bytes_fetched);
    match running.seconds {
        Some(taken) => {
            let how = if running.joined { "still runs, answered" } else { "is up" };
            let taken = seconds(taken);
            format!("{workload} {how} after {taken}, {read} read from the repository · {directory}\n")
        }
        None => format!("{workload} runs, but its agent does not answer · {read} read · {directory}\n"),
    }
}

fn proven(proof: &Proven) -> String {
    format!(
        "point {} of {} is proven: up after {}, {} passed after {} s, {} read from the repository\n",
        short(&proof.point),
        clean(&proof.workload),
        seconds(proof.boot_seconds),
        counted(proof.checks, "check", "checks"),
        proof.seconds,
        bytes(proof.bytes_fetched)
    )
}

fn unproven(proof: &Unproven) -> String {
    let (point, workload) = (short(&proof.point), clean(&proof.workload));
    let hint = proof.hint.as_ref().map(|hint| format!("  {}\n", clean(hint))).unwrap_or_default();
    format!("point {point} of {workload} is not proven: {}\n{hint}", clean(&proof.why))
}

fn machine_restored(restored: &MachineRestored) -> String {
    let mut text = String::new();
    for written in &restored.written {
        text.push_str(&format!("  {} → {}\n", clean(&written.item), clean(&written.path)));
    }
    let (all, data) = (bytes(restored.bytes), bytes(restored.written_bytes));
    text + &format!("{all} restored, {data} of it data · {}\n", seconds(restored.seconds))
}

fn row(line: &Line, zone: &TimeZone) -> Option<Vec<String>> {
    Some(match line {
        Line::Machine(machine) => vec![
            clean(&machine.name),
            machine.state.clone(),
            machine.disks.len().to_string(),
            bytes(machine.bytes),
            machine.workload.as_deref().map_or_else(|| "unprotected".to_owned(), clean),
            machine.last_backed_up.as_deref().map(|time| shown_time(time, zone)).unwrap_or_default(),
            clean(&machine.host),
            machine_standing(machine, zone),
        ],
        Line::Finding(finding) => finding.row(zone),
        Line::RecoveryPlanned(planned) => planned.row(zone),
        Line::RecoveryState(state) => state.row(),
        Line::Point(point) => vec![
            short(&point.point),
            local(&point.moment, zone),
            clean(&point.workload),
            what_it_holds(point),
            count(point.counts.items),
            bytes(point.counts.bytes),
            bytes(point.counts.written_bytes),
            marks(point),
        ],
        Line::Verdict(verdict) => vec![
            if verdict.keep { "keep" } else { "expire" }.to_owned(),
            short(&verdict.point),
            local(&verdict.moment, zone),
            clean(&verdict.workload),
            clean(&verdict.why.join(", ")),
        ],
        Line::Workload(workload) => vec![
            clean(&workload.workload),
            local(&workload.last_backed_up, zone),
            duration(Duration::from_secs(workload.age_seconds)),
            workload.last_verified.as_ref().map_or("never".to_owned(), |time| local(time, zone)),
            workload.last_proven.as_ref().map_or("never".to_owned(), |time| local(time, zone)),
            count(workload.points),
            count(workload.skipped),
            if workload.overdue { "OVERDUE" } else { "" }.to_owned(),
        ],
        Line::Key(key) => {
            vec![short(&key.key), key.kind.clone(), local(&key.created, zone), clean(&key.label)]
        }
        Line::Writer(writer) => {
            let powers = if writer.revoked { "revoked" } else { &writer.powers };
            vec![short(&writer.writer), clean(&writer.name), powers.to_owned()]
        }
        Line::ExitCode(code) => vec![code.exit.to_string(), code.name.clone(), code.meaning.clone()],
        _ => return None,
    })
}

fn item_row(line: &Line, zone: &TimeZone) -> Option<String> {
    let Line::Item(item) = line else { return None };
    let size = if item.kind == "file" { bytes(item.size) } else { String::new() };
    let target = item.link_target.as_ref().map(|target| format!(" -> {target}")).unwrap_or_default();
    let changed = if item.changed_while_read { "  (changed while it was read)" } else { "" };
    Some(format!(
        "{}  {:<10} {:>9}  {}  {}{target}{changed}\n",
        mode(item),
        owner(item),
        size,
        local(&item.modified, zone),
        item.path.path
    ))
}

/// As `ls -l` shows it.
fn mode(item: &Item) -> String {
    let kind = match item.kind.as_str() {
        "directory" => 'd',
        "symlink" => 'l',
        "fifo" => 'p',
        "socket" => 's',
        "character-device" => 'c',
        "block-device" => 'b',
        _ => '-',
    };
    let bits = u32::from_str_radix(&item.mode, 8).unwrap_or_default();
    let mut text = String::from(kind);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let three = bits >> shift;
        text.push(if three & 4 != 0 { 'r' } else { '-' });
        text.push(if three & 2 != 0 { 'w' } else { '-' });
        text.push(match (three & 1 != 0, bits & special != 0) {
            (true, false) => 'x',
            (true, true) => letter,
            (false, true) => letter.to_ascii_uppercase(),
            (false, false) => '-',
        });
    }
    text
}

fn owner(item: &Item) -> String {
    item.user.as_ref().map_or_else(|| item.uid.to_string(), |user| clean(user))
}

fn backed_up(done: &BackedUp) -> String {
    let Totals { items, bytes: size, unchanged, new_bytes, written_bytes, skipped, .. } = &done.counts;
    let mut text = format!(
        "point {} of {}: {}, {} ({} unchanged) · new {} · written {} · {}\n",
        short(&done.point),
        clean(&done.workload),
        counted(*items, "item", "items"),
        bytes(*size),
        count(*unchanged),
        bytes(*new_bytes),
        bytes(*written_bytes),
        seconds(done.seconds)
    );
    if *skipped > 0 {
        text.push_str(&format!("{} skipped\n", counted(*skipped, "item was", "items were")));
    }
    text
}

fn would_back_up(found: &WouldBackUp) -> String {
    format!(
        "{}: {}, {}; would read {} of {}; nothing was written\n",
        clean(&found.workload),
        counted(found.items, "item", "items"),
        bytes(found.bytes),
        bytes(found.read_bytes),
        counted(found.read_items, "file", "files")
    )
}

fn details(point: &Point, zone: &TimeZone) -> String {
    let counts = &point.counts;
    let time = |time: &Option<String>| time.as_ref().map_or("never".to_owned(), |time| local(time, zone));
    let mut rows = vec![
        ("point", point.point.clone()),
        ("workload", format!("{} ({})", clean(&point.workload), point.kind)),
        ("host", clean(&point.host)),
        ("paths", point.roots.roots.join(" ")),
        ("moment", format!("{}, {}", local(&point.moment, zone), point.consistency)),
        ("taken", format!("{} to {}", local(&point.started, zone), local(&point.finished, zone))),
        ("parent", point.parent.clone().unwrap_or_else(|| "none".to_owned())),
        ("content", format!("{}, {}", counted(counts.items, "item", "items"), bytes(counts.bytes))),
        ("read", format!("{}, {} items unchanged", bytes(counts.read_bytes), count(counts.unchanged))),
        ("added", format!("{} new, {} written", bytes(counts.new_bytes), bytes(counts.written_bytes))),
        ("skipped", format!("{}, noticed {}", count(counts.skipped), count(counts.noticed))),
        ("verified", time(&point.verified)),
        ("proven", time(&point.proven)),
        ("machine", point.machine.as_deref().map(clean).unwrap_or_default()),
        ("tags", clean(&tags(point).join(" "))),
    ];
    rows.extend(point.holds.iter().map(|hold| ("hold", self::hold(hold, zone))));
    rows.retain(|(_, value)| !value.is_empty());
    rows.iter().map(|(name, value)| format!("{name:<9} {value}\n")).collect()
}

fn hold(hold: &Hold, zone: &TimeZone) -> String {
    let until = hold.until.as_ref().map_or("released".to_owned(), |until| local(until, zone));
    format!("{} {} (until {until})", short(&hold.hold), clean(&hold.reason))
}

/// Without the one that names the machine.
fn tags(point: &Point) -> Vec<&str> {
    let machine = point.machine.as_deref().map(machine_tag);
    point.tags.iter().map(String::as_str).filter(|tag| Some(*tag) != machine.as_deref()).collect()
}

fn marks(point: &Point) -> String {
    let mut marks: Vec<String> = tags(point).iter().map(|tag| clean(tag)).collect();
    if point.counts.skipped > 0 {
        marks.push(format!("{} skipped", count(point.counts.skipped)));
    }
    if point.verified.is_some() {
        marks.push("verified".to_owned());
    }
    if !point.holds.is_empty() {
        marks.push("held".to_owned());
    }
    marks.join(", ")
}

fn found(found: &Found, zone: &TimeZone) -> String {
    let item = &found.item;
    let size = if item.kind == "file" { bytes(item.size) } else { item.kind.clone() };
    let span = if found.points == 1 {
        format!("{} ({})", short(&found.newest), local(&found.newest_moment, zone))
    } else {
        format!(
            "{} back to {} ({} to {}, {} points)",
            short(&found.newest),
            short(&found.oldest),
            local(&found.oldest_moment, zone),
            local(&found.newest_moment, zone),
            count(found.points)
        )
    };
    format!(
        "{}  {size}, changed {}  in {} {span}\n",
        item.path.path,
        local(&item.modified, zone),
        clean(&found.workload)
    )
}

fn changes(changes: &Changes) -> String {
    let Changes { created, replaced, metadata, deleted, same, blocked } = changes;
    let parts = [
        (*created, "+", "new"),
        (*replaced, "~", "changed"),
        (*metadata, ".", "with other owner, mode or times"),
        (*deleted, "-", "removed"),
        (*same, "=", "same"),
        (*blocked, "!", "blocked by directories that hold something"),
    ];
    let parts = parts.into_iter().filter(|(number, ..)| *number > 0);
    let parts: Vec<String> =
        parts.map(|(number, mark, word)| format!("{mark} {} {word}", count(number))).collect();
    if parts.is_empty() { "nothing".to_owned() } else { parts.join("   ") }
}

fn restore_plan(plan: &RestorePlan) -> String {
    let undo = if plan.undo { "; an undo point will be taken first" } else { "" };
    format!(
        "point {} to {}: {}   ({} to write{undo})\n",
        short(&plan.point),
        plan.target.target,
        changes(&plan.changes),
        bytes(plan.bytes)
    )
}

fn restored(done: &Restored) -> String {
    let mut text = format!(
        "restored point {} to {}: {}   {} written · {}\n",
        short(&done.point),
        done.target.target,
        changes(&done.changes),
        bytes(done.written_bytes),
        seconds(done.seconds)
    );
    if done.damaged > 0 {
        text.push_str(&format!(
            "{} in the repository\n",
            counted(done.damaged, "item is damaged", "items are damaged")
        ));
    }
    if done.skipped > 0 {
        text.push_str(&format!("{} skipped\n", counted(done.skipped, "item was", "items were")));
    }
    if let Some(point) = &done.undo_point {
        text.push_str(&format!("undo: mainstay undo {}\n", short(point)));
    }
    text
}

fn mounted(done: &Mounted) -> String {
    let what = done.point.as_ref().map_or("everything".to_owned(), |point| format!("point {}", short(point)));
    format!("{what} at {}\n", clean(&done.directory))
}

fn verified(done: &Verified) -> String {
    let what = if done.read_data {
        "every stored byte read"
    } else {
        "structure only; --read-data reads every byte"
    };
    let result = match done.damage {
        0 => "sound".to_owned(),
        damage => counted(damage, "problem", "problems"),
    };
    let rewritten = match done.rewritten {
        0 => String::new(),
        packs => {
            format!("; stored anew what is whole in {}", counted(packs, "damaged pack", "damaged packs"))
        }
    };
    format!(
        "verified {}, {}: {result}{rewritten} ({what}; {} · {})\n",
        counted(done.points, "point", "points"),
        counted(done.packs, "pack", "packs"),
        bytes(done.bytes),
        seconds(done.seconds)
    )
}

fn expired(done: &Expired) -> String {
    let number = u64::try_from(done.points.len()).unwrap_or(u64::MAX);
    let points = counted(number, "point", "points");
    let verb = if done.dry_run { "would expire" } else { "expired" };
    format!("{verb} {points}, kept {}\n", count(done.kept))
}

fn collected(done: &Collected) -> String {
    if done.freed_bytes + done.condemned_packs + done.deleted_packs == 0 {
        return "nothing to free; what was written within a day is left alone\n".to_owned();
    }
    if done.dry_run {
        return format!(
            "could free {} now and {} later; {} would be copied\n",
            bytes(done.freed_bytes),
            bytes(done.condemned_bytes),
            bytes(done.copied_bytes)
        );
    }
    format!(
        "freed {} ({}); condemned {}, which are freed after a day; copied {}\n",
        bytes(done.freed_bytes),
        counted(done.deleted_packs, "pack", "packs"),
        counted(done.condemned_packs, "pack", "packs"),
        bytes(done.copied_bytes)
    )
}

pub(super) fn skip(skipped: &Skipped) -> String {
    let reason = if skipped.detail.is_empty() { &skipped.reason } else { &skipped.detail };
    let word = match skipped.reason.as_str() {
        "changed" if skipped.detail.is_empty() => "changed while it was read",
        "silent-change" => "its content had changed behind an unchanged time",
        "metadata" => {
            return format!("{}: stored without some metadata: {}", skipped.path.path, clean(reason));
        }
        _ => reason,
    };
    format!("{}: {}", skipped.path.path, clean(word))
}

pub(super) fn seconds(seconds: f64) -> String {
    duration(Duration::try_from_secs_f64(seconds).unwrap_or_default())
}

fn machine_home(home: &MachineHome) -> String {
    format!("the disks are in {} · {}\n", clean(&home.directory), seconds(home.seconds))
}

fn short(id: &str) -> String {
    id.chars().take(ID_SHOWN).collect()
}

/// A time of a line, in the person's zone.
fn local(stamp: &str, zone: &TimeZone) -> String {
    match stamp.parse::<Timestamp>() {
        Ok(time) => time.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S").to_string(),
        Err(_not_a_time) => stamp.to_owned(),
    }
}

/// Text from elsewhere, which must not drive a terminal.
pub(super) fn clean(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            clean.extend(character.escape_default());
        } else {
            clean.push(character);
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use jiff::tz::TimeZone;

    use super::super::lines::{Item, Line, Path};

    #[test]
    fn items_look_as_in_ls() {
        let item = Item {
            path: Path { path: "/usr/bin/su".into(), path_base64: None },
            kind: "file".into(),
            size: 2048,
            mode: "4755".into(),
            uid: 0,
            gid: 0,
            user: Some("root".into()),
            group: None,
            modified: "2026-11-22T09:41:07Z".into(),
            link_target: None,
            link_target_base64: None,
            changed_while_read: false,
        };
        let zone = TimeZone::get("Europe/Berlin").unwrap();
        let text = super::line(&Line::Item(item), &zone).unwrap();
        assert_eq!(text, "-rwsr-xr-x  root         2.0 KiB  2026-11-22 10:41:07  /usr/bin/su\n");
    }

    #[test]
    fn text_from_elsewhere_cannot_drive_a_terminal() {
        assert_eq!(super::clean("a\x1b[2Jb\nc"), "a\\u{1b}[2Jb\\nc");
    }
}
