//! The verbs of the command line. Each resolves its arguments, calls the engine and reports; none decides anything
//! that another surface would have to decide again.

mod backup;
mod browse;
mod db;
mod expire;
mod gc;
mod init;
mod key;
mod mount;
mod pages;
mod points;
mod restore;
mod status;
mod verify;
mod vm;

use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::time::Duration;

use mainstay_core::{Code, Error, ItemPath, Result};

use crate::args::Verb;
use crate::report::lines::{Line, WouldDo};
use crate::session::Session;

/// The status of a run that did what it was asked for: `None` is 0, otherwise a code that says what to look at.
pub(crate) type Done = Result<Option<Code>>;

pub(crate) fn run(verb: Verb, session: &mut Session) -> Done {
    match verb {
        Verb::Init(arguments) => init::run(&arguments, session),
        Verb::Backup(arguments) => backup::run(arguments, session),
        Verb::Points(arguments) => points::run(arguments, session),
        Verb::Find(arguments) => browse::find(&arguments, session),
        Verb::Restore(arguments) => restore::restore(&arguments, session),
        Verb::Undo(arguments) => restore::undo(&arguments, session),
        Verb::Ls(arguments) => browse::ls(&arguments, session),
        Verb::Cat(arguments) => browse::cat(&arguments, session),
        Verb::Mount(arguments) => mount::run(&arguments, session),
        Verb::Verify(arguments) => verify::run(&arguments, session),
        Verb::Expire(arguments) => expire::run(&arguments, session),
        Verb::Gc(arguments) => gc::run(&arguments, session),
        Verb::Status(arguments) => status::run(&arguments, session),
        Verb::Vm(verb) => vm::run(verb, session),
        Verb::Db(verb) => db::run(verb, session),
        Verb::Open(arguments) => db::open::run(&arguments, session),
        Verb::Drill(arguments) => db::drill::run(&arguments, session),
        Verb::Record(verb) => db::record::run(verb, session),
        Verb::Key(verb) => key::run(verb, session),
        Verb::Completions { shell } => pages::completions(shell, session),
        Verb::Man { directory } => pages::man(&directory, session),
        Verb::ExitCodes => pages::exit_codes(session),
        Verb::Schema => pages::schema(session),
    }
}

/// A path of a point, as a person types it: from the top, whatever the current directory is.
fn item_path(path: &Path) -> Result<ItemPath> {
    let components = path.as_os_str().as_bytes().split(|byte| *byte == b'/');
    let kept: Vec<&[u8]> = components.filter(|part| !matches!(*part, b"" | b".")).collect();
    ItemPath::new(kept.join(&b'/')).map_err(|error| {
        Error::new(Code::Usage, format!("{} cannot be a path in a point", path.display()))
            .because(error)
            .hint("paths in a point begin at the top: /etc/nginx")
    })
}

/// Refuses tags that could not be shown, or told from none.
fn check_tag(tag: &str) -> Result<()> {
    if !tag.is_empty() && !tag.contains(char::is_control) {
        return Ok(());
    }
    Err(Error::new(Code::Usage, format!("a point cannot be tagged {tag:?}"))
        .hint("choose a tag without control characters"))
}

/// The end of a dry run that checked all that the real one would.
fn would(session: &Session, what: &str) -> Done {
    session.report.line(&Line::WouldDo(WouldDo { what: what.to_owned() }));
    Ok(None)
}

/// A length of time as people write it: `90s`, `36h`, `2d`, `1w`, `2d 12h`.
fn duration(text: &str) -> Result<Duration> {
    let usage = || {
        Error::new(Code::Usage, format!("{text:?} is not a length of time"))
            .hint("write it as in 36h, 2d or 1w")
    };
    let span: jiff::Span = text.parse().map_err(|error: jiff::Error| usage().because(error))?;
    // A day is 24 hours here: a limit must not move when clocks are changed.
    let seconds = span.total((jiff::Unit::Second, jiff::SpanRelativeTo::days_are_24_hours()));
    let seconds = seconds.map_err(|error| usage().because(error))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| usage().because(error))
}

/// Bytes as people write them: `500M`, `10G`, `10GiB`; by 1024.
fn size(text: &str) -> Result<u64> {
    let digits = text.trim_end_matches(|letter: char| !letter.is_ascii_digit());
    let shift = match text.get(digits.len()..).unwrap_or_default().trim().to_ascii_uppercase().as_str() {
        "" | "B" => Some(0),
        "K" | "KB" | "KIB" => Some(10),
        "M" | "MB" | "MIB" => Some(20),
        "G" | "GB" | "GIB" => Some(30),
        "T" | "TB" | "TIB" => Some(40),
        _ => None,
    };
    let bytes = shift.and_then(|shift| digits.parse::<u64>().ok()?.checked_mul(1 << shift));
    bytes.ok_or_else(|| {
        Error::new(Code::Usage, format!("{text:?} is not a size")).hint("write it as in 500M or 10G")
    })
}

/// A count as the JSON lines have it.
fn number(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::{duration, item_path, size};

    #[test]
    fn paths_are_taken_from_the_top() {
        for (typed, path) in [("/etc/nginx/", "etc/nginx"), ("./etc//x", "etc/x"), ("/", "/"), ("etc", "etc")]
        {
            assert_eq!(item_path(Path::new(typed)).unwrap().to_string(), path);
        }
        assert!(item_path(Path::new("/etc/../x")).is_err());
    }

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [("7", 7), ("500M", 500 << 20), ("10 GiB", 10 << 30), ("1tb", 1 << 40)] {
            assert_eq!(size(text).unwrap(), bytes, "{text}");
        }
        for bad in ["", "G", "1X", "-1", "1.5G", "99999999999999T"] {
            size(bad).unwrap_err();
        }
    }

    #[test]
    fn lengths_of_time_are_read_as_people_write_them() {
        for (text, hours) in [("36h", 36), ("2d", 48), ("1w", 168), ("1d 12h", 36), ("90m", 1)] {
            assert_eq!(duration(text).unwrap().as_secs() / 3600, hours, "{text}");
        }
        for text in ["", "soon", "-1h", "3"] {
            assert!(duration(text).is_err(), "{text}");
        }
        assert_eq!(duration("90s").unwrap(), Duration::from_secs(90));
    }
}
