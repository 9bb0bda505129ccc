//! How far a run is: a bar on a terminal. Skips and notes are told wherever the words go.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mainstay_core::{Counts, Event, Phase, Progress};

use super::{Report, human};
use crate::doors::Cancel;

/// What an item costs beside its bytes, counted in bytes, so that many small files do not look like nothing.
const ITEM_WEIGHT: u64 = 16 << 10;
/// How often the bar is drawn anew.
const TICK: Duration = Duration::from_millis(200);

/// An estimate is worth nothing before so much time, and so many hundredths of the work, have passed.
const ESTIMATE_AFTER: Duration = Duration::from_secs(1);
const ESTIMATE_FROM: u64 = 3;

/// Hears what a run tells.
pub(crate) struct RunProgress {
    report: Arc<Report>,
    cancel: Cancel,
    bar: Option<ProgressBar>,
    /// How much there is to do has been counted.
    counted: AtomicBool,
    /// What is done is measured by the bytes that were read, not by those that were seen.
    by_reading: AtomicBool,
}

impl RunProgress {
    pub(super) fn new(report: Arc<Report>, cancel: Cancel) -> Self {
        let bar = report.bar.then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
            let style = ProgressStyle::with_template("{spinner} {prefix} {msg} · {elapsed}");
            let bar = bar.with_style(style.unwrap_or_else(|_typo| ProgressStyle::default_spinner()));
            bar.enable_steady_tick(TICK);
            bar
        });
        report.set_bar(bar.clone());
        let (counted, by_reading) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { report, cancel, bar, counted, by_reading }
    }

    fn with_bar(&self, change: impl FnOnce(&ProgressBar)) {
        if let Some(bar) = &self.bar {
            change(bar);
        }
    }

    fn phase(&self, phase: Phase) {
        self.by_reading.store(phase == Phase::Verifying, Ordering::Relaxed);
        self.with_bar(|bar| bar.set_prefix(phase_name(phase)));
    }

    fn expect(&self, items: u64, bytes: u64, complete: bool) {
        self.counted.store(complete, Ordering::Relaxed);
        self.with_bar(|bar| bar.set_length(weight(items, bytes)));
    }

    fn done(&self, counts: &Counts) {
        let counted = self.counted.load(Ordering::Relaxed);
        let bytes = if self.by_reading.load(Ordering::Relaxed) { counts.read_bytes } else { counts.bytes };
        self.with_bar(|bar| {
            let done = weight(counts.items, bytes);
            bar.set_position(done);
            let all = bar.length().unwrap_or_default().max(1);
            let percent = done.saturating_mul(100) / all;
            let mut text = figures(counts, bytes);
            if counted && percent <= 100 {
                text.push_str(&format!(" · {percent}%"));
            }
            let steady = bar.elapsed() >= ESTIMATE_AFTER && percent >= ESTIMATE_FROM;
            if counted && steady && percent < 100 {
                text.push_str(&format!(", {} left", human::duration(bar.eta())));
            }
            bar.set_message(text);
        });
    }
}

impl Drop for RunProgress {
    fn drop(&mut self) {
        self.with_bar(ProgressBar::finish_and_clear);
        self.report.set_bar(None);
    }
}

impl Progress for RunProgress {
    fn event(&self, event: &Event<'_>) {
        match event {
            Event::Phase(phase) => self.phase(*phase),
            Event::Expect { items, bytes, complete } => self.expect(*items, *bytes, *complete),
            Event::Done(counts) => self.done(counts),
            Event::Item(_) => {}
            Event::Skipped(skip) => self.report.skipped(skip),
            Event::Note(note) => self.report.note(note),
        }
    }

    fn cancelled(&self) -> bool {
        self.cancel.asked()
    }
}

fn weight(items: u64, bytes: u64) -> u64 {
    bytes.saturating_add(items.saturating_mul(ITEM_WEIGHT))
}

/// Scanned, new and written apart.
fn figures(counts: &Counts, bytes: u64) -> String {
    let mut text = human::counted(counts.items, "item", "items");
    if bytes > 0 {
        text.push_str(&format!(", {}", human::bytes(bytes)));
    }
    if counts.new_bytes > 0 || counts.written_bytes > 0 {
        let (new, written) = (human::bytes(counts.new_bytes), human::bytes(counts.written_bytes));
        text.push_str(&format!(" · new {new} · written {written}"));
    }
    text
}

const fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Opening => "opening",
        Phase::Scanning => "scanning",
        Phase::Copying => "copying",
        Phase::Finishing => "finishing",
        Phase::Verifying => "verifying",
        Phase::Collecting => "collecting",
    }
}

#[cfg(test)]
mod tests {
    use mainstay_core::Counts;

    use super::figures;

    #[test]
    fn scanned_new_and_written_are_told_apart() {
        let mut counts = Counts { items: 1_234, bytes: 5 << 20, ..Counts::default() };
        assert_eq!(figures(&counts, counts.bytes), "1,234 items, 5.0 MiB");
        (counts.new_bytes, counts.written_bytes) = (3 << 20, 1 << 20);
        assert_eq!(figures(&counts, counts.bytes), "1,234 items, 5.0 MiB · new 3.0 MiB · written 1.0 MiB");
    }
}
