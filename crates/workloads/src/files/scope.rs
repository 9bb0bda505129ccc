//! What of the file system belongs to a run and what does not.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use ignore::gitignore::{Gitignore, GitignoreBuilder};
use mainstay_core::{Code, Error, Result};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, fstatfs, openat, statx};

use super::dirs::FileId;

/// How a directory that holds only a cache marks itself: <https://bford.info/cachedir/>.
pub const CACHE_TAG: &[u8] = b"CACHEDIR.TAG";
const CACHE_SIGNATURE: &[u8] = b"Signature: 8a477f597d28d172789f06886806bc55";

/// `f_type` of file systems that hold no data of their own, from `linux/magic.h`.
const PSEUDO: [u32; 19] = [
    0x0000_9fa0, // proc
    0x6265_6572, // sysfs
    0x0027_e0eb, // cgroup
    0x6367_7270, // cgroup2
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x7363_6673, // securityfs
    0x6165_676c, // pstore
    0xcafe_4a11, // bpf
    0x6265_6570, // configfs
    0x0000_1cd1, // devpts
    0x1980_0202, // mqueue
    0x9584_58f6, // hugetlbfs
    0x6573_5543, // fusectl
    0xde5e_81e4, // efivarfs
    0x4249_4e4d, // binfmt_misc
    0x0000_0187, // autofs
    0xf97c_ff8c, // selinuxfs
    0x6e73_6673, // nsfs
];

/// The rules of one run.
pub(super) struct Scope {
    patterns: Gitignore,
    /// Never captured, wherever the walk meets it: by inode, and by path for what does not exist yet.
    never: Vec<(Option<FileId>, Vec<u8>)>,
    pub(super) cache_tags: bool,
    pub(super) one_file_system: bool,
    /// The patterns as text, for [`super::LeftOut`].
    pub(super) lines: Vec<String>,
}

impl Scope {
    /// Errors: [`Code::Usage`] for a pattern that makes no sense or a file of patterns that cannot be read.
    pub(super) fn new(
        patterns: &[String],
        pattern_files: &[PathBuf],
        never: &[PathBuf],
        cache_tags: bool,
        one_file_system: bool,
    ) -> Result<Self> {
        let refuse = |what: String, error: ignore::Error| {
            Error::new(Code::Usage, what)
                .because(error)
                .hint("exclude patterns are written as in a .gitignore file")
        };
        let mut builder = GitignoreBuilder::new("");
        let mut lines = patterns.to_vec();
        for pattern in patterns {
            let what = || format!("cannot understand the exclude pattern {pattern:?}");
            builder.add_line(None, pattern).map_err(|error| refuse(what(), error))?;
        }
        for file in pattern_files {
            if let Some(error) = builder.add(file) {
                return Err(refuse(format!("cannot use the exclude file {}", file.display()), error));
            }
            let text = std::fs::read_to_string(file)
                .map_err(|error| Error::io(format!("cannot read {}", file.display()), error))?;
            lines.extend(text.trim_start_matches('\u{feff}').lines().map(str::to_owned));
        }
        let patterns =
            builder.build().map_err(|error| refuse("cannot combine the exclude patterns".into(), error))?;
        let never = never.iter().map(|path| forbidden(path)).collect();
        Ok(Self { patterns, never, cache_tags, one_file_system, lines })
    }

    /// Whether the patterns leave out `path`, which is relative to its root.
    pub(super) fn excludes(&self, path: &[u8], is_directory: bool) -> bool {
        excludes(&self.patterns, path, is_directory)
    }

    /// Whether this must not be captured whatever the patterns say; `path` is relative to `/`.
    pub(super) fn forbids(&self, id: FileId, path: &[u8]) -> bool {
        self.never.iter().any(|(never, name)| *never == Some(id) || name == path)
    }
}

/// Whether the patterns leave out `path`, which is relative to its root.
pub(super) fn excludes(patterns: &Gitignore, path: &[u8], is_directory: bool) -> bool {
    !patterns.is_empty() && patterns.matched(Path::new(OsStr::from_bytes(path)), is_directory).is_ignore()
}

fn forbidden(path: &Path) -> (Option<FileId>, Vec<u8>) {
    let id = statx(CWD, path, AtFlags::empty(), StatxFlags::INO).ok().map(|stat| FileId::of(&stat));
    let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    (id, real.as_os_str().as_bytes().strip_prefix(b"/").unwrap_or_default().to_vec())
}

/// Whether the open directory lies on a file system of the kernel's own making.
pub(super) fn is_pseudo(fd: impl AsFd) -> bool {
    // The kernel's word is 32 bits long, whatever the type here is.
    #[expect(
        clippy::as_conversions,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "see above"
    )]
    let kind = fstatfs(fd).map_or(0, |stat| stat.f_type as u32);
    PSEUDO.contains(&kind)
}

/// Whether the open directory holds a valid cache tag.
pub(super) fn is_cache(dir: impl AsFd) -> bool {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let mut start = [0; CACHE_SIGNATURE.len()];
    let read =
        openat(dir, CACHE_TAG, flags, Mode::empty()).and_then(|file| rustix::io::pread(file, &mut start, 0));
    read == Ok(start.len()) && start == CACHE_SIGNATURE
}
