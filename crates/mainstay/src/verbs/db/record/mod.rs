//! `mainstay record`.

mod define;
mod erased;
mod find;
mod restore;

use mainstay_core::{Code, Error, Result};

use super::super::Done;
use crate::args::Record;
use crate::session::Session;

pub(in super::super) fn run(verb: Record, session: &mut Session) -> Done {
    match verb {
        Record::Find(arguments) => find::run(&arguments, session),
        Record::Restore(arguments) => restore::run(&arguments, session),
        Record::Define(arguments) => define::run(&arguments, session),
        Record::Erased(arguments) => erased::run(&arguments, session),
    }
}

/// `column=value`, as a person types it.
fn pairs(words: &[String]) -> Result<Vec<(String, String)>> {
    let pair =
        |word: &String| match word.split_once('=') {
            Some((column, value)) if !column.is_empty() => Ok((column.to_owned(), value.to_owned())),
            _ => Err(Error::new(Code::Usage, format!("{word:?} does not say which row"))
                .hint("write it as in id=42")),
        };
    words.iter().map(pair).collect()
}
