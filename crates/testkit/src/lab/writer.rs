//! What the guest's writer promises of a directory at whatever moment its disk is read. The program is
//! `crates/testkit/guest/writer`.

use std::fs;
use std::path::Path;

use mainstay_core::{Error, Result};

use super::io;

const SLOTS: u64 = 16;
const SLOT_BYTES: usize = 65536;

/// Checks a directory, restored or taken out of an image, against the writer's promise; its last round.
///
/// Errors: [`mainstay_core::Code::Integrity`] with the first thing that no moment of the guest can have looked like.
pub fn check_rounds(directory: &Path) -> Result<u64> {
    let log = fs::read_to_string(directory.join("log")).map_err(io("cannot read the writer's log"))?;
    let mut last = 0u64;
    for line in log.lines() {
        last += 1;
        if line.parse() != Ok(last) {
            return Err(Error::integrity(format!(
                "line {last} of the log is {:?}",
                line.escape_debug().to_string()
            )));
        }
    }
    // Two slots are not looked at: without a freeze the log may lag by a round, so two may be on their way.
    for round in (last + 3).saturating_sub(SLOTS).max(1)..=last {
        let name = format!("slot-{}", round % SLOTS);
        let found = fs::read(directory.join(&name)).map_err(io(format!("cannot read {name}")))?;
        if found != content(round) {
            let tail =
                String::from_utf8_lossy(found.get(found.len().saturating_sub(12)..).unwrap_or_default());
            return Err(Error::integrity(format!(
                "{name} ought to hold round {round} of {last}; it has {} bytes, ending in {tail:?}",
                found.len()
            )));
        }
    }
    Ok(last)
}

/// What a slot holds after this round.
fn content(round: u64) -> Vec<u8> {
    let number = round.to_string();
    [vec![b' '; SLOT_BYTES - number.len()], number.into_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::{check_rounds, content};

    #[test]
    fn a_moment_that_never_was_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let slot = |round: u64, value: u64| {
            std::fs::write(directory.path().join(format!("slot-{}", round % 16)), content(value))
        };
        let log: String = (1..=20).map(|round| format!("{round}\n")).collect();
        std::fs::write(directory.path().join("log"), &log).unwrap();
        (7..=20).for_each(|round| slot(round, round).unwrap());
        assert_eq!(check_rounds(directory.path()).unwrap(), 20);
        // The rounds that were under way, and a log that is too short for what the slots hold.
        slot(21, 21).unwrap();
        slot(22, 22).unwrap();
        assert_eq!(check_rounds(directory.path()).unwrap(), 20);
        slot(7, 23).unwrap();
        let error = check_rounds(directory.path()).unwrap_err();
        assert!(error.what().contains("slot-7 ought to hold round 7 of 20"), "{error:?}");
        std::fs::write(directory.path().join("log"), log.replace("7\n", "")).unwrap();
        assert!(check_rounds(directory.path()).unwrap_err().what().contains("line 7"));
    }
}
