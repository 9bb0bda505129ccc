//! The one module of xtask that prints.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "talking to the developer is its whole work")]

pub(crate) fn line(text: &str) {
    println!("{text}");
}

/// Announces a part of a longer run.
pub(crate) fn step(text: &str) {
    println!("\n== {text}");
}

/// Shows a command before it runs, so that it can be run again by hand.
pub(crate) fn command(text: &str) {
    println!("$ {text}");
}

pub(crate) fn error(error: &anyhow::Error) {
    eprintln!("\nerror: {error:#}");
}
