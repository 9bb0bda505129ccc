//! What a run was asked for and what it left out on purpose, kept with the point: a mirror must not delete what was
//! never captured.
//!
//! The record is a byte of version and then entries, each a letter, text and a NUL byte: `n` a root as it was named,
//! followed by `r` its real path; `l` a link on the way; `p` an exclude pattern; `x` a path that was not gone into;
//! `c` caches were left out; `!` there was more than fits.

use ignore::gitignore::{Gitignore, GitignoreBuilder};
use mainstay_core::ItemPath;

use super::paths::PathSet;
use super::scope::{CACHE_TAG, excludes};
use super::snapshot::SNAPSHOT_PREFIX;

const VERSION: u8 = 1;
/// A record that would grow longer says only that there was more.
const BYTES_MAX: usize = 1 << 20;

/// A root of a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CapturedRoot {
    /// As the person wrote it; the real path when that makes no path of an item.
    pub named: ItemPath,
    /// Without symbolic links on the way.
    pub real: ItemPath,
}

/// What a point of files holds, as far as its items do not show it.
#[derive(Clone, Debug)]
pub struct LeftOut {
    pub roots: Vec<CapturedRoot>,
    /// The symbolic links on the way to the roots.
    pub links: Vec<ItemPath>,
    patterns: Gitignore,
    /// The repository, mount points that were captured as empty directories.
    paths: PathSet,
    caches: bool,
}

/// Collects the record during a run.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    entries: Vec<u8>,
    full: bool,
}

impl Recorder {
    pub(super) fn add(&mut self, letter: u8, text: &[u8]) {
        self.full |= text.contains(&0) || self.entries.len() + text.len() > BYTES_MAX;
        if !self.full {
            self.entries.push(letter);
            self.entries.extend_from_slice(text);
            self.entries.push(0);
        }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let end: &[u8] = if self.full { b"!\0" } else { b"" };
        [&[VERSION], self.entries.as_slice(), end].concat()
    }
}

impl LeftOut {
    /// `None` when the record does not tell everything, or is none.
    pub fn parse(record: &[u8]) -> Option<Self> {
        let (&version, entries) = record.split_first()?;
        let entries = entries.strip_suffix(&[0])?;
        let mut patterns = GitignoreBuilder::new("");
        let mut found = Self {
            roots: Vec::new(),
            links: Vec::new(),
            patterns: Gitignore::empty(),
            paths: PathSet::default(),
            caches: false,
        };
        let mut named = None;
        for entry in entries.split(|byte| *byte == 0) {
            let (letter, text) = entry.split_first()?;
            let path = || ItemPath::new(text).ok();
            match letter {
                b'n' => named = path(),
                b'r' => {
                    let real = path()?;
                    found.roots.push(CapturedRoot { named: named.take().unwrap_or(real.clone()), real });
                }
                b'l' => found.links.push(path()?),
                b'x' => found.paths.insert(path()?),
                b'p' => drop(patterns.add_line(None, std::str::from_utf8(text).ok()?).ok()?),
                b'c' => found.caches = true,
                _ => return None,
            }
        }
        found.patterns = patterns.build().ok()?;
        (version == VERSION && !found.roots.is_empty()).then_some(found)
    }

    /// Whether what stands at `path`, from `/` on, may be there although the point does not hold it.
    pub fn keeps(&self, path: &ItemPath) -> bool {
        let excluded = |root: &ItemPath| {
            let rest = path.as_bytes().get(root.as_bytes().len()..).unwrap_or_default();
            let rest = rest.strip_prefix(b"/").unwrap_or(rest);
            // What stands there now may be of another kind than what was left out.
            !rest.is_empty() && [false, true].iter().any(|is_dir| excludes(&self.patterns, rest, *is_dir))
        };
        path.name().starts_with(SNAPSHOT_PREFIX)
            || self.paths.touches(path)
            || self.roots.iter().any(|root| path.is_within(&root.real) && excluded(&root.real))
    }

    /// Whether directories that say they are caches were left out, each but for its tag.
    pub fn leaves_caches(&self) -> bool {
        self.caches
    }

    /// Whether a directory of which the point holds this was left out as a cache.
    pub(super) fn is_cache(&self, holds: impl FnOnce(&[u8]) -> bool) -> bool {
        self.caches && holds(CACHE_TAG)
    }
}

#[cfg(test)]
mod tests {
    use mainstay_core::ItemPath;

    use super::{LeftOut, Recorder};

    #[test]
    fn the_record_round_trips_and_one_that_does_not_tell_all_is_none() {
        let mut record = Recorder::default();
        for (letter, text) in [
            (b'n', &b"lib/x"[..]),
            (b'r', b"usr/\xff"),
            (b'l', b"lib"),
            (b'p', b"*.log"),
            (b'x', b"usr/\xff/mnt"),
        ] {
            record.add(letter, text);
        }
        let found = LeftOut::parse(&record.bytes()).unwrap();
        let path = |bytes: &[u8]| ItemPath::new(bytes).unwrap();
        assert_eq!((&found.roots[0].named, &found.roots[0].real), (&path(b"lib/x"), &path(b"usr/\xff")));
        assert_eq!(found.links, [path(b"lib")]);
        for kept in [
            &b"usr/\xff/a/b.log"[..],
            b"usr/\xff/mnt",
            b"usr/\xff/mnt/below",
            b"usr/\xff/.mainstay-snapshot-1",
        ] {
            assert!(found.keeps(&path(kept)), "{kept:?}");
        }
        assert!(!found.keeps(&path(b"usr/\xff/a")) && !found.keeps(&path(b"other/b.log")));
        record.add(b'x', &vec![b'a'; super::BYTES_MAX]);
        assert!(LeftOut::parse(&record.bytes()).is_none());
        for bad in [&b""[..], b"\x01", b"\x02r\0", b"\x01x\0", b"\x01r../a\0"] {
            assert!(LeftOut::parse(bad).is_none(), "{bad:?}");
        }
    }
}
