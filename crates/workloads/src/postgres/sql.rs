//! SQL over an ordinary connection: the extended query protocol with parameters and results as text, so that the server's
//! own types read and write every value.

use bytes::{Buf as _, BytesMut};
use mainstay_core::{Code, Error, Result};
use postgres_protocol::IsNull;
use postgres_protocol::message::frontend::{self, BindError};

use super::wire::{Connection, Message, Refusal};

/// What one answer may hold.
const ROWS_MAX: usize = 4 << 20;
const ANSWER_BYTES_MAX: usize = 2 << 30;

/// Columns of a row, as the types of the server write them.
pub type SqlRow = Vec<Option<String>>;

/// An ordinary connection on which SQL is spoken.
pub struct Sql {
    connection: Connection,
}

impl Sql {
    /// `connection` must not speak the replication protocol.
    pub fn new(connection: Connection) -> Self {
        Self { connection }
    }

    /// For people: whom this speaks to.
    pub fn peer(&self) -> &str {
        self.connection.peer()
    }

    /// Such as `15.4 (Debian 15.4-1)`.
    pub fn version(&self) -> &str {
        self.connection.version()
    }

    /// Runs a statement without parameters.
    pub fn run(&mut self, text: &str) -> Result<()> {
        self.ask(text, &[]).map(|_answer| ())
    }

    /// The rows that a statement answers with. Parameters are `$1`, `$2`, …; what type they have, the statement says:
    /// `$1::text::int8`.
    ///
    /// Errors: [`Code::Conflict`] when others are in the way (a lock, a serialization failure, a key that is taken),
    /// [`Code::Refused`] for everything else that the server refuses, with its [`Refusal`] among the causes.
    pub fn query(&mut self, text: &str, parameters: &[Option<&str>]) -> Result<Vec<SqlRow>> {
        Ok(self.ask(text, parameters)?.0)
    }

    /// How many rows a statement changed.
    pub fn execute(&mut self, text: &str, parameters: &[Option<&str>]) -> Result<u64> {
        Ok(self.ask(text, parameters)?.1)
    }

    /// The one value of the one row that a statement answers with.
    pub fn value(&mut self, text: &str, parameters: &[Option<&str>]) -> Result<String> {
        let row = self.query(text, parameters)?.into_iter().next();
        let value = row.and_then(|row| row.into_iter().next()).flatten();
        value.ok_or_else(|| self.connection.broken("it answered no value"))
    }

    fn ask(&mut self, text: &str, parameters: &[Option<&str>]) -> Result<(Vec<SqlRow>, u64)> {
        let message = request(text, parameters).map_err(|error| self.connection.broken(error))?;
        self.connection.send(&message)?;
        let (mut rows, mut changed, mut bytes) = (Vec::new(), 0, 0);
        let mut failed: Option<Error> = None;
        loop {
            let Message { tag, body } = self.connection.message()?;
            match tag {
                b'D' if failed.is_none() => {
                    bytes += body.len();
                    if rows.len() >= ROWS_MAX || bytes > ANSWER_BYTES_MAX {
                        // The connection is of no use any more: what is still to come is not read.
                        return Err(Error::new(Code::Refused, "the server answered with too many rows"));
                    }
                    match row(&body) {
                        Some(row) => rows.push(row),
                        None => failed = Some(no_text()),
                    }
                }
                b'C' => changed = count(&body),
                b'E' => failed = failed.or_else(|| Some(self.refused(&body))),
                b'Z' => return failed.map_or(Ok((rows, changed)), Err),
                _ => {}
            }
        }
    }

    fn refused(&self, body: &[u8]) -> Error {
        let refusal = Refusal::of(body);
        let (code, hint) = meaning(&refusal.state);
        let hint = hint.map(str::to_owned).or_else(|| refusal.hint.clone());
        let error = Error::new(code, format!("{} refused ({})", self.peer(), refusal.state)).because(refusal);
        match hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}

/// From appendix "PostgreSQL Error Codes".
fn meaning(state: &str) -> (Code, Option<&'static str>) {
    match state {
        "40001" | "40P01" => (Code::Conflict, Some("somebody changed the same rows meanwhile; run it again")),
        "55P03" => {
            (Code::Conflict, Some("somebody holds a lock on it; run it again when they have finished"))
        }
        "57014" => (Code::Conflict, Some("it took too long, or was cancelled; run it again")),
        "23505" | "23P01" => (Code::Conflict, Some("the key was taken meanwhile; look at the plan again")),
        "42501" => (Code::Refused, Some("the role needs the right to do that; see GRANT")),
        "3D000" => (Code::NotFound, Some("name the database in the address: postgres://HOST/DATABASE")),
        _ => (Code::Refused, None),
    }
}

fn no_text() -> Error {
    Error::new(Code::Unsupported, "the database holds bytes that are no text in its encoding")
        .hint("this happens in databases of the encoding SQL_ASCII; their rows cannot be restored one by one")
}

/// Parse, bind, execute and sync in one.
fn request(text: &str, parameters: &[Option<&str>]) -> std::io::Result<BytesMut> {
    let mut message = BytesMut::new();
    frontend::parse("", text, [], &mut message)?;
    let bound = frontend::bind(
        "",
        "",
        [],
        parameters,
        |value, buffer| {
            let Some(text) = value else { return Ok(IsNull::Yes) };
            buffer.extend_from_slice(text.as_bytes());
            Ok(IsNull::No)
        },
        [],
        &mut message,
    );
    bound.map_err(|error| match error {
        BindError::Conversion(error) => std::io::Error::other(error),
        BindError::Serialization(error) => error,
    })?;
    frontend::execute("", 0, &mut message)?;
    frontend::sync(&mut message);
    Ok(message)
}

/// The columns of a `DataRow`; `None` when it is cut short or holds no text.
fn row(mut body: &[u8]) -> Option<SqlRow> {
    let count = body.try_get_u16().ok()?;
    let mut columns = Vec::with_capacity(usize::from(count));
    for _ in 0..count {
        let length = body.try_get_i32().ok()?;
        let Ok(length) = usize::try_from(length) else {
            columns.push(None);
            continue;
        };
        let (value, rest) = body.split_at_checked(length)?;
        columns.push(Some(std::str::from_utf8(value).ok()?.to_owned()));
        body = rest;
    }
    Some(columns)
}

/// The number at the end of a `CommandComplete`: `INSERT 0 5`, `UPDATE 3`.
fn count(body: &[u8]) -> u64 {
    let text = std::str::from_utf8(body).unwrap_or_default().trim_end_matches('\0');
    text.rsplit(' ').next().and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// Texts as a value of the type `text[]`.
pub fn text_array<'a>(values: impl IntoIterator<Item = Option<&'a str>>) -> String {
    let mut array = String::from("{");
    for value in values {
        if array.len() > 1 {
            array.push(',');
        }
        let Some(value) = value else {
            array.push_str("NULL");
            continue;
        };
        array.push('"');
        for letter in value.chars() {
            if matches!(letter, '"' | '\\') {
                array.push('\\');
            }
            array.push(letter);
        }
        array.push('"');
    }
    array.push('}');
    array
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{count, row, text_array};

    #[test]
    fn arrays_are_written_as_the_server_reads_them() {
        assert_eq!(text_array([]), "{}");
        assert_eq!(text_array([Some("a"), None, Some("NULL"), Some("")]), r#"{"a",NULL,"NULL",""}"#);
        assert_eq!(text_array([Some(r#"{"x":\ }"#)]), r#"{"{\"x\":\\ }"}"#);
    }

    #[test]
    fn what_a_statement_changed_is_read_from_its_tag() {
        let read = [("INSERT 0 5\0", 5), ("UPDATE 3\0", 3), ("BEGIN\0", 0), ("", 0)];
        assert!(read.iter().all(|(tag, number)| count(tag.as_bytes()) == *number));
    }

    proptest! {
        #[test]
        fn hostile_answers_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _either = row(&bytes);
            let _number = count(&bytes);
        }
    }
}
