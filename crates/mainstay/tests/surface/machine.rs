//! A machine of its own for each test: a home, a clock, a person who answers.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::tz::TimeZone;
use mainstay::doors::{Cancel, Doors, Environment, Person, Terminal};
use mainstay_core::{Code, Error, Result, Time};
use mainstay_testkit::ScriptedClock;
use serde_json::Value;
use zeroize::Zeroizing;

/// Must never be seen in any output.
pub(crate) const PASSPHRASE: &str = "canary-7f3a9c55 horse battery";

pub(crate) struct Machine {
    pub(crate) place: tempfile::TempDir,
    pub(crate) clock: ScriptedClock,
    pub(crate) environment: Environment,
    pub(crate) terminal: Terminal,
    pub(crate) answers: Answers,
    pub(crate) cancel: Cancel,
    pub(crate) host: String,
    pub(crate) guest: Option<String>,
}

/// What the person says, one answer after the other.
#[derive(Clone, Default)]
pub(crate) struct Answers(pub(crate) Arc<Mutex<VecDeque<String>>>);

impl Answers {
    pub(crate) fn will_be(&self, answers: &[&str]) {
        self.0.lock().unwrap().extend(answers.iter().map(|answer| (*answer).to_owned()));
    }

    /// The next question is the program's end.
    pub(crate) fn panic(&self) {
        self.will_be(&["panic"]);
    }

    fn next(&self, question: &str) -> Result<String> {
        let next = self.0.lock().unwrap().pop_front();
        assert_ne!(next.as_deref(), Some("panic"), "as the test wished");
        next.ok_or_else(|| Error::new(Code::Bug, format!("nobody expected the question {question:?}")))
    }
}

impl Person for Answers {
    fn secret(&mut self, question: &str) -> Result<Zeroizing<String>> {
        self.next(question).map(Zeroizing::new)
    }

    fn line(&mut self, question: &str) -> Result<String> {
        self.next(question)
    }
}

/// A stream that is read back afterwards, and that may close early.
#[derive(Clone)]
struct Stream {
    bytes: Arc<Mutex<Vec<u8>>>,
    closes_after: usize,
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut all = self.bytes.lock().unwrap();
        if all.len() >= self.closes_after {
            return Err(std::io::ErrorKind::BrokenPipe.into());
        }
        all.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// How a run ended and what it said.
pub(crate) struct Ran {
    pub(crate) exit: u8,
    pub(crate) bytes: Vec<u8>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl std::fmt::Debug for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "exit {}\n{}{}", self.exit, self.out, self.err)
    }
}

impl Ran {
    /// The lines of JSON.
    pub(crate) fn json(&self) -> Vec<Value> {
        self.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The only line of JSON of this type.
    pub(crate) fn only(&self, kind: &str) -> Value {
        let found: Vec<Value> = self.json().into_iter().filter(|line| line["type"] == kind).collect();
        assert_eq!(found.len(), 1, "{kind}: {self:?}");
        found[0].clone()
    }

    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.exit, 0, "{}{}", self.out, self.err);
        self
    }

    /// Ended so, for that reason, and said what to do.
    #[track_caller]
    pub(crate) fn failed(self, exit: u8, why: &str) -> Self {
        assert_eq!(self.exit, exit, "{}{}", self.out, self.err);
        assert!(self.err.contains("error: ") && self.err.contains(why), "{}", self.err);
        self
    }
}

impl Machine {
    pub(crate) fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let home = place.path().join("home");
        std::fs::create_dir(&home).unwrap();
        let environment = Environment { home: Some(home), ..Environment::default() };
        // Long after every file of the test was made, so that stamps are trusted.
        let clock = ScriptedClock::at(Time::from_seconds(4_000_000_000));
        let (terminal, answers) = (Terminal::default(), Answers::default());
        Self {
            place,
            clock,
            environment,
            terminal,
            answers,
            cancel: Cancel::default(),
            host: "web".into(),
            guest: None,
        }
    }

    /// One with a repository that a generated key opens.
    pub(crate) fn with_repository() -> Self {
        let machine = Self::new();
        machine.run(&["init", "--generate-key", "--kit", "kit.txt"]).ok();
        machine
    }

    /// The place of the test; relative paths are meant from here.
    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.place.path().join(path)
    }

    /// As an argument.
    pub(crate) fn arg(&self, path: &str) -> String {
        self.at(path).to_str().unwrap().to_owned()
    }

    pub(crate) fn write(&self, path: &str, content: &str) -> PathBuf {
        let path = self.at(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    pub(crate) fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.at(path)).unwrap()
    }

    pub(crate) fn repository(&self) -> PathBuf {
        self.at("home/.local/share/mainstay/repository")
    }

    pub(crate) fn later(&self, seconds: u64) {
        self.clock.advance(Duration::from_secs(seconds));
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ran {
        self.run_until(usize::MAX, arguments)
    }

    /// Whoever reads stdout goes away after so many bytes.
    pub(crate) fn run_until(&self, closes_after: usize, arguments: &[&str]) -> Ran {
        let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
        self.run_bytes(closes_after, &arguments)
    }

    /// Arguments need not be UTF-8.
    pub(crate) fn run_bytes(&self, closes_after: usize, arguments: &[&OsStr]) -> Ran {
        let stream = |closes_after| Stream { bytes: Arc::default(), closes_after };
        let (out, err) = (stream(closes_after), stream(usize::MAX));
        let doors = Doors {
            clock: Arc::new(self.clock.clone()),
            zone: TimeZone::UTC,
            environment: self.environment.clone(),
            host: self.host.clone(),
            guest: self.guest.clone(),
            superuser: false,
            directory: self.place.path().to_owned(),
            out: Box::new(out.clone()),
            err: Box::new(err.clone()),
            terminal: self.terminal,
            person: Box::new(self.answers.clone()),
            cancel: self.cancel.clone(),
        };
        let line =
            std::iter::once(OsStr::new("mainstay")).chain(arguments.iter().copied()).map(OsString::from);
        let exit = mainstay::run(line, doors);
        let bytes = out.bytes.lock().unwrap().clone();
        let err = String::from_utf8(err.bytes.lock().unwrap().clone()).unwrap();
        let ran = Ran { exit, out: String::from_utf8_lossy(&bytes).into_owned(), bytes, err };
        self.search_for_secrets(&ran);
        if arguments.contains(&OsStr::new("--json")) && closes_after == usize::MAX {
            ran.json().iter().for_each(check_against_schema);
        }
        ran
    }

    /// No passphrase and no key may be seen in any word of any run.
    fn search_for_secrets(&self, ran: &Ran) {
        let mut secrets = vec![PASSPHRASE.to_owned()];
        for file in files_below(self.place.path()) {
            if file.extension().is_some_and(|extension| extension == "key") {
                let text = std::fs::read_to_string(&file).unwrap_or_default();
                secrets.extend(
                    text.lines().filter_map(|line| line.strip_prefix("mainstay-key-1: ")).map(String::from),
                );
            }
        }
        for secret in secrets {
            assert!(
                !ran.out.contains(&secret) && !ran.err.contains(&secret),
                "a secret was printed: {ran:?}"
            );
        }
    }
}

pub(crate) fn files_below(directory: &Path) -> Vec<PathBuf> {
    below(directory).into_iter().filter(|path| path.is_file() && !path.is_symlink()).collect()
}

/// The directory itself included.
pub(crate) fn directories_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = vec![directory.to_owned()];
    found.extend(below(directory).into_iter().filter(|path| path.is_dir() && !path.is_symlink()));
    found
}

fn below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![directory.to_owned()];
    while let Some(directory) = waiting.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                waiting.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found
}

/// The type is known, everything required is there, and nothing else is.
fn check_against_schema(line: &Value) {
    let schema: Value =
        serde_json::from_str(include_str!("../../../../docs/json/mainstay.schema.json")).unwrap();
    let kind = line["type"].as_str().unwrap();
    let variants = schema["oneOf"].as_array().unwrap();
    let variant = variants.iter().find(|variant| variant["properties"]["type"]["const"] == kind);
    let variant = variant.unwrap_or_else(|| panic!("the schema knows no {kind}"));
    let name = variant["$ref"].as_str().and_then(|reference| reference.rsplit('/').next());
    let of = |key: &str| -> Vec<String> {
        let definition = name.map_or(&Value::Null, |name| &schema["$defs"][name]);
        let mut names = Vec::new();
        for part in [variant, definition] {
            match &part[key] {
                Value::Array(list) => names.extend(list.iter().filter_map(Value::as_str).map(str::to_owned)),
                Value::Object(map) => names.extend(map.keys().cloned()),
                _ => {}
            }
        }
        names
    };
    let fields = line.as_object().unwrap();
    for required in of("required") {
        assert!(fields.contains_key(&required), "{kind} lacks {required}: {line}");
    }
    let known = of("properties");
    for field in fields.keys() {
        assert!(known.contains(field), "the schema knows no {field} of {kind}");
    }
}
