//! Everything this program says. Data goes to stdout, as text or as lines of JSON; talk goes to stderr.

pub mod databases;
pub(crate) mod human;
pub mod lines;
pub mod machines;
mod progress;
pub mod records;
pub mod recovery;
pub mod sprawl;
mod text;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::tz::TimeZone;
use mainstay_core::{Code, Error, Result, Skip};

use crate::args::Global;
use crate::doors::{Cancel, Doors};
use lines::Line;
pub(crate) use progress::RunProgress;

/// So many skipped items are named one by one; the point lists them all.
const SKIPS_SHOWN: u64 = 20;

/// Where the words go. Shared by all threads of a run.
pub struct Report {
    streams: Mutex<Streams>,
    json: bool,
    quiet: bool,
    verbose: bool,
    color: bool,
    /// A bar may be drawn.
    pub(crate) bar: bool,
    zone: TimeZone,
    cancel: Cancel,
}

struct Streams {
    out: Box<dyn Write + Send>,
    err: Box<dyn Write + Send>,
    /// Whoever read stdout has gone; nothing more is written to it.
    closed: bool,
    /// The first other reason why stdout could not be written.
    failed: Option<Error>,
    bar: Option<indicatif::ProgressBar>,
    skips: BTreeMap<&'static str, u64>,
}

impl Report {
    /// Takes over the streams.
    pub(crate) fn new(global: &Global, zone: TimeZone, doors: &mut Doors) -> Self {
        let color = doors.terminal.errors && !doors.environment.no_color;
        let streams = Streams {
            out: std::mem::replace(&mut doors.out, Box::new(std::io::sink())),
            err: std::mem::replace(&mut doors.err, Box::new(std::io::sink())),
            closed: false,
            failed: None,
            bar: None,
            skips: BTreeMap::new(),
        };
        Self {
            streams: Mutex::new(streams),
            json: global.json,
            quiet: global.quiet,
            verbose: global.verbose,
            color,
            bar: doors.terminal.errors && !global.json && !global.quiet && !global.no_progress,
            zone,
            cancel: doors.cancel.clone(),
        }
    }

    fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn json(&self) -> bool {
        self.json
    }

    /// Whether nobody reads stdout any more: what only produces output may stop.
    pub fn closed(&self) -> bool {
        self.streams().closed
    }

    /// One line of data.
    pub fn line(&self, line: &Line) {
        if self.json {
            self.write_json(line);
        } else if let Some(text) = text::line(line, &self.zone) {
            self.streams().write_out(text.as_bytes());
        }
    }

    /// Lines of one kind, as a table for people.
    pub fn table(&self, lines: &[Line]) {
        if self.json {
            lines.iter().for_each(|line| self.write_json(line));
        } else if let Some(text) = text::table(lines, &self.zone) {
            self.streams().write_out(text.as_bytes());
        }
    }

    /// A line of data that people read beside what they asked for.
    pub fn aside(&self, line: &Line) {
        if self.json {
            self.write_json(line);
        } else if let Some(text) = text::line(line, &self.zone) {
            self.say(text.trim_end());
        }
    }

    /// Bytes as they are.
    pub fn raw(&self, bytes: &[u8]) {
        self.streams().write_out(bytes);
    }

    fn write_json(&self, line: &Line) {
        match serde_json::to_string(line) {
            Ok(mut text) => {
                text.push('\n');
                self.streams().write_out(text.as_bytes());
            }
            Err(error) => self.streams().fail(Error::bug("cannot write a line as JSON").because(error)),
        }
    }

    /// A sentence for the person, unless they asked for quiet.
    pub fn say(&self, text: &str) {
        if !self.quiet {
            self.streams().write_err(&format!("{text}\n"));
        }
    }

    /// A sentence that must not be missed, and for programs a line.
    pub fn note(&self, text: &str) {
        if self.json {
            self.line(&Line::Note(lines::Note { message: text.to_owned() }));
        }
        let mark = self.paint("note:", "1;33");
        self.streams().write_err(&format!("{mark} {text}\n"));
    }

    /// An item with something missing, or worth a word.
    pub fn skipped(&self, skip: &Skip) {
        let line = lines::Skipped::from(skip);
        if self.json {
            return self.line(&Line::Skipped(line));
        }
        let kind = if line.missing { "skipped" } else { "noticed" };
        let mut streams = self.streams();
        let count = streams.skips.entry(kind).or_default();
        *count += 1;
        let shown = self.verbose || (*count <= SKIPS_SHOWN && (line.missing || !self.quiet));
        if shown {
            let what = text::skip(&line);
            streams.write_err(&format!("{kind}: {what}\n"));
        }
    }

    /// Says how many skipped items were not named, and where they are.
    pub fn more_skips(&self, where_to_look: &str) {
        let mut streams = self.streams();
        let counts = std::mem::take(&mut streams.skips);
        for (kind, count) in counts.into_iter().filter(|_| !self.verbose && !self.json) {
            if let Some(more) = count.checked_sub(SKIPS_SHOWN).filter(|more| *more > 0) {
                streams.write_err(&format!(
                    "{kind}: and {}; {where_to_look}\n",
                    human::counted(more, "more", "more")
                ));
            }
        }
    }

    /// What went wrong, why, and what to do next.
    pub fn error(&self, error: &Error) {
        if self.json {
            self.line(&Line::Failed(lines::Failed::from(error)));
        }
        let mark = self.paint("error:", "1;31");
        let mut text = format!("{mark} {}\n", text::clean(&error.chain().join(": ")));
        if let Some(hint) = error.next_step() {
            text.push_str(&format!("{} {}\n", self.paint("hint:", "1;36"), text::clean(hint)));
        }
        self.streams().write_err(&text);
    }

    fn paint(&self, word: &str, code: &str) -> String {
        if self.color { format!("\x1b[{code}m{word}\x1b[0m") } else { word.to_owned() }
    }

    /// Progress of one run: a bar on a terminal, and whoever is told of skips and notes.
    pub(crate) fn progress(self: &Arc<Self>) -> Arc<RunProgress> {
        Arc::new(RunProgress::new(Arc::clone(self), self.cancel.clone()))
    }

    pub(crate) fn set_bar(&self, bar: Option<indicatif::ProgressBar>) {
        self.streams().bar = bar;
    }

    /// Hands everything over that is still held. Errors: stdout could not be written.
    pub fn finish(&self) -> Result<()> {
        let mut streams = self.streams();
        if let Some(bar) = streams.bar.take() {
            bar.finish_and_clear();
        }
        if !streams.closed {
            let flushed = streams.out.flush();
            streams.ended(flushed);
        }
        streams.failed.take().map_or(Ok(()), Err)
    }
}

impl Streams {
    fn write_out(&mut self, bytes: &[u8]) {
        if self.closed || self.failed.is_some() {
            return;
        }
        let bar = self.bar.clone();
        let mut written = Ok(());
        let mut write = || written = self.out.write_all(bytes);
        match bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
        self.ended(written);
    }

    fn ended(&mut self, written: std::io::Result<()>) {
        match written {
            Ok(()) => {}
            // Whoever reads has seen enough; that is no failure of ours.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => self.closed = true,
            Err(error) => self.fail(Error::io("cannot write to stdout", error)),
        }
    }

    fn fail(&mut self, error: Error) {
        self.failed.get_or_insert(error);
    }

    fn write_err(&mut self, text: &str) {
        let bar = self.bar.clone();
        // Nobody can be told that nobody can be told.
        let mut write = || {
            let _lost = self.err.write_all(text.as_bytes());
        };
        match bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }
}

/// A panic is a mistake of ours: says so in one plain line.
pub fn explain_panics() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let what = info.payload_as_str().unwrap_or("no words");
        let text = format!(
            "error: a mistake in Mainstay at {place}: {what}\n\
             hint: nothing that was acknowledged is lost; please report this line\n"
        );
        let _lost = std::io::stderr().write_all(text.as_bytes());
    }));
}

/// For the time before there are doors; the exit status.
pub fn without_doors(error: &Error) -> u8 {
    let text = format!("error: {}\n", error.chain().join(": "));
    let _lost = std::io::stderr().write_all(text.as_bytes());
    error.code().exit()
}

/// The error that a panic of a run becomes.
pub fn panicked() -> Error {
    Error::new(Code::Bug, "the run ended by a mistake in Mainstay")
        .hint("the line above says where; please report it")
}
