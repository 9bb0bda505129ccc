//! Whatever happens between quiesce and thaw, thaw happens.

use std::fs;
use std::path::Path;
use std::time::Duration;

use mainstay_core::{Code, Consistency, Next, Receipt, SkipReason, Source as _};
use mainstay_workloads::files::{FilesRequest, FilesSource, Hooks};

use crate::{clock, request};

/// Commands that write down that they ran.
fn hooks(log: &Path, quiesce: &str) -> Hooks {
    let note = format!("echo \"$MAINSTAY_HOOK $MAINSTAY_WORKLOAD\" >> '{}'", log.display());
    Hooks {
        workload: "letters".into(),
        quiesce: Some(format!("{note}; {quiesce}")),
        thaw: Some(note),
        limit: Duration::from_secs(30),
        ..Hooks::default()
    }
}

fn log(directory: &Path) -> String {
    fs::read_to_string(directory.join("log")).unwrap_or_default()
}

const BOTH: &str = "quiesce letters\nthaw letters\n";

#[test]
fn a_run_thaws_when_it_commits_and_when_it_is_dropped() {
    let directory = tempfile::tempdir().unwrap();
    let open = |directory: &Path| {
        let hooks = Some(hooks(&directory.join("log"), "true"));
        FilesSource::new(FilesRequest { hooks, ..request(directory) }, clock()).unwrap()
    };
    let mut source = open(directory.path());
    assert_eq!(log(directory.path()), "quiesce letters\n");
    while !matches!(source.next().unwrap(), Next::End) {}
    assert_eq!(source.seal().unwrap().consistency, Consistency::Application);
    assert_eq!(log(directory.path()), "quiesce letters\n", "thawed before everything was stored");
    Box::new(source).commit(&Receipt { point: None, counts: mainstay_core::Counts::default() }).unwrap();
    assert_eq!(log(directory.path()), BOTH);

    let directory = tempfile::tempdir().unwrap();
    drop(open(directory.path()));
    assert_eq!(log(directory.path()), BOTH);

    let directory = tempfile::tempdir().unwrap();
    let panicked = std::panic::catch_unwind(|| {
        let _source = open(directory.path());
        panic!("on purpose");
    });
    assert!(panicked.is_err());
    assert_eq!(log(directory.path()), BOTH);
}

#[test]
fn a_failed_quiesce_fails_the_run_unless_it_may_go_on_and_thaws_in_any_case() {
    let directory = tempfile::tempdir().unwrap();
    let mut failing = hooks(&directory.path().join("log"), "echo no room >&2; exit 3");
    let open = |hooks: &Hooks| {
        FilesSource::new(FilesRequest { hooks: Some(hooks.clone()), ..request(directory.path()) }, clock())
    };
    let error = open(&failing).err().unwrap();
    assert!(error.chain().join(": ").contains("no room"), "{error:?}");
    assert_eq!(log(directory.path()), BOTH);

    failing.go_on = true;
    let mut source = open(&failing).unwrap();
    let Next::Skipped(skip) = source.next().unwrap() else { panic!("nothing was said") };
    assert!(skip.reason == SkipReason::Changed && skip.detail.contains("no room"), "{skip:?}");
    assert_eq!(source.seal().unwrap().consistency, Consistency::Fuzzy);

    let mut endless = hooks(&directory.path().join("log"), "sleep 100");
    endless.limit = Duration::from_millis(300);
    let error = open(&endless).err().unwrap();
    assert_eq!(error.code(), Code::Io);
    assert!(error.chain().join(": ").contains("was killed"), "{error:?}");
}

/// A root that is not there must not leave the application at rest either.
#[test]
fn an_error_after_the_quiesce_thaws() {
    let directory = tempfile::tempdir().unwrap();
    let hooks = Some(hooks(&directory.path().join("log"), "true"));
    FilesSource::new(FilesRequest { hooks, ..request(&directory.path().join("missing")) }, clock())
        .err()
        .unwrap();
    assert_eq!(log(directory.path()), BOTH);
}
