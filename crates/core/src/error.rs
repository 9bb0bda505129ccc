//! One error type for the whole product: what happened, why, and what to do next, under a stable code.
//!
//! Below the surface an error says *what* in one lower-case clause and carries its cause; the command line prints
//! the chain and the hint. Nothing logs an error and returns it as well.

use std::fmt;

pub type Result<T> = std::result::Result<T, Error>;

/// A decision that a caller can take. Each has one stable name and exit status; `docs/exit-codes.md` is printed
/// from this table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Code {
    /// The operating system, a disk or a network said no.
    Io,
    /// A thing asked for by name does not exist (a point, a path in a point, a blob).
    NotFound,
    /// The name is taken, by other bytes.
    AlreadyExists,
    /// The command or an argument makes no sense.
    Usage,
    /// Done, but items were skipped.
    Partial,
    /// There is no repository here.
    NoRepository,
    /// No key of this repository opens with what was given.
    WrongKey,
    /// A key that opens, but has no power for this (a write-only client that is asked to read).
    NoPower,
    /// Stored bytes are not what was written.
    Integrity,
    /// Written by a newer Mainstay, with a part this one does not understand.
    TooNew,
    /// The medium is full.
    Full,
    /// Another writer or the collector got there first; running again is the answer.
    Conflict,
    /// Policy, hold or immutability forbids it.
    Refused,
    /// A promise is overdue (`status`).
    Overdue,
    /// This machine lacks something it needs (a program, a privilege, a kernel feature).
    Unsupported,
    /// The person or a signal stopped it.
    Cancelled,
    /// A mistake in Mainstay.
    Bug,
}

impl Code {
    pub const ALL: &'static [Self] = &[
        Self::Io,
        Self::NotFound,
        Self::AlreadyExists,
        Self::Usage,
        Self::Partial,
        Self::NoRepository,
        Self::WrongKey,
        Self::NoPower,
        Self::Integrity,
        Self::TooNew,
        Self::Full,
        Self::Conflict,
        Self::Refused,
        Self::Overdue,
        Self::Unsupported,
        Self::Cancelled,
        Self::Bug,
    ];

    /// The name in `--json` output. Never changes meaning.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Io => "io",
            Self::NotFound => "not-found",
            Self::AlreadyExists => "already-exists",
            Self::Usage => "usage",
            Self::Partial => "partial",
            Self::NoRepository => "no-repository",
            Self::WrongKey => "wrong-key",
            Self::NoPower => "no-power",
            Self::Integrity => "integrity",
            Self::TooNew => "too-new",
            Self::Full => "full",
            Self::Conflict => "conflict",
            Self::Refused => "refused",
            Self::Overdue => "overdue",
            Self::Unsupported => "unsupported",
            Self::Cancelled => "cancelled",
            Self::Bug => "bug",
        }
    }

    /// The exit status of the process.
    pub const fn exit(self) -> u8 {
        match self {
            Self::Io
            | Self::NotFound
            | Self::AlreadyExists
            | Self::Full
            | Self::Conflict
            | Self::Refused
            | Self::TooNew
            | Self::Unsupported => 1,
            Self::Usage => 2,
            Self::Partial => 3,
            Self::NoRepository => 10,
            Self::WrongKey | Self::NoPower => 12,
            Self::Integrity => 20,
            Self::Overdue => 21,
            Self::Bug => 70,
            Self::Cancelled => 130,
        }
    }

    /// One line for the table of exit codes.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Io => "the operating system, a disk or a network refused",
            Self::NotFound => "the named thing does not exist",
            Self::AlreadyExists => "the name is taken",
            Self::Usage => "the command line makes no sense",
            Self::Partial => "done, but items were skipped; they are listed and counted in the point",
            Self::NoRepository => "there is no repository here",
            Self::WrongKey => "no key of this repository opens with what was given",
            Self::NoPower => "the key opens, but has no power for this",
            Self::Integrity => "stored bytes are not what was written",
            Self::TooNew => "written by a newer Mainstay",
            Self::Full => "the medium is full",
            Self::Conflict => "another process got there first; run again",
            Self::Refused => "a policy, a hold or immutability forbids it",
            Self::Overdue => "a promise is overdue (`mainstay status`)",
            Self::Unsupported => "this machine lacks something that is needed",
            Self::Cancelled => "stopped by the person or by a signal",
            Self::Bug => "a mistake in Mainstay; please report it",
        }
    }
}

/// What happened (`what`), why (`source`), what to do next (`hint`).
pub struct Error(Box<Inner>);

struct Inner {
    code: Code,
    what: String,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// `what` is a lower-case clause without a full stop: "cannot open /etc/shadow".
    pub fn new(code: Code, what: impl Into<String>) -> Self {
        Self(Box::new(Inner { code, what: what.into(), hint: None, source: None }))
    }

    /// Stored bytes that do not parse or do not authenticate.
    pub fn integrity(what: impl Into<String>) -> Self {
        Self::new(Code::Integrity, what)
    }

    pub fn bug(what: impl Into<String>) -> Self {
        Self::new(Code::Bug, what)
    }

    /// An error of the operating system, with the code that fits its kind.
    pub fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        let code = match source.kind() {
            std::io::ErrorKind::NotFound => Code::NotFound,
            std::io::ErrorKind::AlreadyExists => Code::AlreadyExists,
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Code::Full,
            std::io::ErrorKind::Unsupported => Code::Unsupported,
            _ => Code::Io,
        };
        Self::new(code, what).because(source)
    }

    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// What the person can do about it: a sentence, with the command if there is one.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Wraps the error in what was being attempted; code and hint stay.
    #[must_use]
    pub fn during(mut self, what: impl Into<String>) -> Self {
        let code = self.0.code;
        let hint = self.0.hint.take();
        Self(Box::new(Inner { code, what: what.into(), hint, source: Some(Box::new(self)) }))
    }

    pub fn code(&self) -> Code {
        self.0.code
    }

    pub fn what(&self) -> &str {
        &self.0.what
    }

    pub fn next_step(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The clauses from the outermost to the root cause.
    pub fn chain(&self) -> Vec<String> {
        let mut clauses = vec![self.0.what.clone()];
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            clauses.push(error.to_string());
            cause = error.source();
        }
        clauses
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.what)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.code.name(), self.chain().join(": "))
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::{Code, Error};

    #[test]
    fn names_are_unique_and_the_published_exit_statuses_hold() {
        let mut names: Vec<_> = Code::ALL.iter().map(|code| code.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Code::ALL.len());
        let exits: Vec<_> =
            [Code::Partial, Code::NoRepository, Code::WrongKey, Code::Integrity, Code::Overdue]
                .iter()
                .map(|code| code.exit())
                .collect();
        assert_eq!(exits, [3, 10, 12, 20, 21]);
    }

    #[test]
    fn wrapping_keeps_code_hint_and_cause() {
        let error = Error::io("cannot read blob", std::io::ErrorKind::NotFound.into())
            .hint("run verify")
            .during("cannot open pack 7");
        assert_eq!(error.code(), Code::NotFound);
        assert_eq!(error.next_step(), Some("run verify"));
        assert_eq!(error.chain()[..2], ["cannot open pack 7", "cannot read blob"]);
    }
}
