//! The command line from outside, in one process: every run has scripted doors and its words are read back.
//!
//! Each run is also searched for secrets, and with `--json` each line of it is held against the schema.

#![cfg(test)]

mod backup;
mod browse;
mod bytes;
mod dry_run;
mod failures;
mod guides;
mod keys;
mod machine;
mod mirror;
mod mixed;
mod output;
mod process;
mod restore;
mod retention;
mod sprawl;
