//! `cargo xtask`: what a developer, the continuous integration and a curious newcomer run. One module per verb.

mod arguments;
mod bench;
mod ci;
mod demo;
mod dist;
mod fuzz;
mod say;
mod setup;
mod shell;
mod test;
mod tidy;

use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::arguments::Arguments;

struct Verb {
    name: &'static str,
    /// What it does, in one line for the list of verbs.
    summary: &'static str,
    /// What a person should know before running it.
    details: &'static str,
    switches: &'static [&'static str],
    options: &'static [&'static str],
    run: fn(&Arguments) -> Result<()>,
}

const VERBS: &[Verb] =
    &[setup::VERB, test::VERB, ci::VERB, demo::VERB, bench::VERB, tidy::VERB, fuzz::VERB, dist::VERB];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say::error(&error);
            ExitCode::FAILURE
        }
    }
}

fn dispatch(words: &[String]) -> Result<()> {
    let Some((name, rest)) = words.split_first() else {
        help();
        return Ok(());
    };
    let asks_for_help = |word: &str| matches!(word, "help" | "--help" | "-h");
    if asks_for_help(name) && rest.is_empty() {
        help();
        return Ok(());
    }
    let (name, rest) = if asks_for_help(name) { (&rest[0], &rest[1..]) } else { (name, rest) };
    let Some(verb) = VERBS.iter().find(|verb| verb.name == name.as_str()) else {
        bail!("there is no verb {name}; `cargo xtask help` lists them");
    };
    if asks_for_help(&words[0]) || rest.iter().any(|word| asks_for_help(word)) {
        say::line(&format!("cargo xtask {}: {}\n\n{}", verb.name, verb.summary, verb.details));
        return Ok(());
    }
    (verb.run)(&Arguments::parse(rest, verb.switches, verb.options)?)
}

fn help() {
    say::line("cargo xtask VERB: everything one does to this project, as one command each.\n");
    for verb in VERBS {
        say::line(&format!("  {:6} {}", verb.name, verb.summary));
    }
    say::line("\nNew here? `cargo xtask demo` shows what Mainstay does, on data of this machine.");
    say::line("Changed something? `cargo xtask test` while you work, `cargo xtask ci` before you commit.");
    say::line("`cargo xtask help VERB` tells what a verb does before you run it.");
}

#[cfg(test)]
mod tests {
    use super::{VERBS, dispatch};

    #[test]
    fn every_verb_explains_itself_and_refuses_what_it_does_not_know() {
        for verb in VERBS {
            assert!(verb.details.len() > verb.summary.len(), "{} teaches nothing", verb.name);
            let words = [verb.name.to_owned(), "--no-such-switch".to_owned()];
            let error = dispatch(&words).unwrap_err().to_string();
            assert!(error.contains("--no-such-switch"), "{}: {error}", verb.name);
        }
        assert!(dispatch(&["make-coffee".to_owned()]).is_err());
    }
}
