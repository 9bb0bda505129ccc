//! `cargo xtask bench`: not there yet.

use anyhow::bail;

use crate::Verb;

pub(crate) const VERB: Verb = Verb {
    name: "bench",
    summary: "not there yet",
    details: "This verb is not there yet.",
    switches: &[],
    options: &[],
    run: |_| bail!("not there yet"),
};
