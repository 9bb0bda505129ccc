//! The `mainstay` command line: [`run`] is the whole program, given its doors to the world.

mod args;
pub mod doors;
mod guest;
mod inside;
mod places;
pub mod report;
mod secrets;
mod session;
mod signals;
pub mod system;
mod verbs;

use std::ffi::OsString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use clap::{CommandFactory as _, FromArgMatches as _};
use jiff::tz::TimeZone;
use mainstay_core::{Code, Error, Result};

use args::{Arguments, Global};
use doors::Doors;
use report::Report;
use session::Session;

/// Makes this program a confined parser of file systems when it is its first argument; only it uses that itself.
pub const PARSER: &str = "parse-file-system";

/// Parses a file system for the process at the other end of standard input; the exit status.
pub fn parse() -> u8 {
    mainstay_diskimage::sandbox::serve().map_or_else(|error| error.code().exit(), |()| 0)
}

/// Runs one command line and returns its exit status.
pub fn run(arguments: impl IntoIterator<Item = OsString>, mut doors: Doors) -> u8 {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let matches = Arguments::command().try_get_matches_from(&arguments);
    let parsed = matches.and_then(|matches| Arguments::from_arg_matches(&matches));
    let Arguments { global, verb } = match parsed {
        Ok(parsed) => parsed,
        Err(refused) => return explain(&refused, &arguments, &mut doors),
    };
    let zone = time_zone(&global, &doors);
    let report = Report::new(&global, zone.as_ref().unwrap_or(&TimeZone::UTC).clone(), &mut doors);
    let report = Arc::new(report);
    let done = zone.and_then(|zone| {
        let mut session = Session { global, doors, report: Arc::clone(&report), zone };
        // What a panic leaves behind is only looked at to end the run.
        let ended = catch_unwind(AssertUnwindSafe(|| verbs::run(verb, &mut session)));
        ended.unwrap_or_else(|_payload| Err(report::panicked()))
    });
    let done = done.and_then(|code| report.finish().map(|()| code));
    match done {
        Ok(None) => 0,
        Ok(Some(code)) => code.exit(),
        Err(error) => {
            report.error(&error);
            // A second failure to write cannot be told either.
            let _lost = report.finish();
            error.code().exit()
        }
    }
}

fn time_zone(global: &Global, doors: &Doors) -> Result<TimeZone> {
    let Some(name) = &global.time_zone else { return Ok(doors.zone.clone()) };
    TimeZone::get(name).map_err(|error| {
        Error::new(Code::Usage, format!("there is no time zone {name:?}"))
            .because(error)
            .hint("write it as in Europe/Berlin or UTC")
    })
}

/// Help, the version, and command lines that make no sense.
fn explain(refused: &clap::Error, arguments: &[OsString], doors: &mut Doors) -> u8 {
    let is_answer = !refused.use_stderr();
    let tty = if is_answer { doors.terminal.output } else { doors.terminal.errors };
    let rendered = refused.render();
    let text =
        if tty && !doors.environment.no_color { rendered.ansi().to_string() } else { rendered.to_string() };
    let json = arguments.iter().any(|argument| argument == "--json");
    let global = Global { json, ..Global::default() };
    if is_answer {
        let report = Report::new(&Global::default(), TimeZone::UTC, doors);
        report.raw(text.as_bytes());
        return report.finish().map_or_else(|error| error.code().exit(), |()| 0);
    }
    let _lost = doors.err.write_all(text.as_bytes());
    if json {
        let what = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
        doors.err = Box::new(std::io::sink());
        Report::new(&global, TimeZone::UTC, doors)
            .error(&Error::new(Code::Usage, what).hint("mainstay --help"));
    }
    Code::Usage.exit()
}
