//! How far a run is: a bar on a terminal. Skips and notes are told wherever the words go.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mainstay_core::{Counts, Event, Phase, Progress};

use super::{Report, human};
use crate::doors::Cancel;

/// What an item costs beside its bytes, counted in bytes, so that many small files do not look like nothing.
const ITEM_WEIGHT: u64 = 16 << 10;
/// How often the bar is drawn anew.
const TICK: Duration = Duration::from_millis(200);

/// Hears what a run tells.
pub(crate) struct RunProgress {
    report: Arc<Report>,
    cancel: Cancel,
    bar: Mutex<Option<ProgressBar>>,
    counted: AtomicBool,
}

impl RunProgress {
    pub(super) fn new(report: Arc<Report>, cancel: Cancel) -> Self {
        let bar = report.bar.then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
            bar.enable_steady_tick(TICK);
            bar.set_style(plain());
            bar
        });
        report.set_bar(bar.clone());
        Self { report, cancel, bar: Mutex::new(bar), counted: AtomicBool::new(false) }
    }

    fn with_bar(&self, change: impl FnOnce(&ProgressBar)) {
        let bar = self.bar.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(bar) = bar {
            change(&bar);
        }
    }

    fn expect(&self, items: u64, bytes: u64, complete: bool) {
        self.with_bar(|bar| {
            bar.set_length(weight(items, bytes));
            if complete && !self.counted.swap(true, Ordering::Relaxed) {
                bar.set_style(with_eta());
            }
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
            Event::Phase(phase) => self.with_bar(|bar| bar.set_prefix(phase_name(*phase))),
            Event::Expect { items, bytes, complete } => self.expect(*items, *bytes, *complete),
            Event::Done(counts) => self.with_bar(|bar| {
                bar.set_position(weight(counts.items, counts.bytes));
                bar.set_message(figures(counts));
            }),
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
fn figures(counts: &Counts) -> String {
    let mut text =
        format!("{}, {}", human::counted(counts.items, "item", "items"), human::bytes(counts.bytes));
    if counts.new_bytes > 0 || counts.written_bytes > 0 {
        text.push_str(&format!(
            " · new {} · written {}",
            human::bytes(counts.new_bytes),
            human::bytes(counts.written_bytes)
        ));
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

/// While nobody knows how much there is: no promise.
fn plain() -> ProgressStyle {
    style("{spinner} {prefix} {msg} · {elapsed}")
}

fn with_eta() -> ProgressStyle {
    style("{spinner} {prefix} {msg} · {percent}% · {elapsed}, {eta} left")
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_typo| ProgressStyle::default_spinner())
}

#[cfg(test)]
mod tests {
    use mainstay_core::Counts;

    use super::figures;

    #[test]
    fn scanned_new_and_written_are_told_apart() {
        let mut counts = Counts { items: 1_234, bytes: 5 << 20, ..Counts::default() };
        assert_eq!(figures(&counts), "1,234 items, 5.0 MiB");
        (counts.new_bytes, counts.written_bytes) = (3 << 20, 1 << 20);
        assert_eq!(figures(&counts), "1,234 items, 5.0 MiB · new 3.0 MiB · written 1.0 MiB");
        for template in [super::plain(), super::with_eta()] {
            drop(template);
        }
    }
}
