//! What is mounted where, from `/proc/self/mountinfo` (proc_pid_mountinfo(5)).

use mainstay_core::ItemPath;

/// One line. Paths are without the leading `/` unless they name devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    /// The directory of the file system that is shown; `/` for all of it.
    pub(super) root: Vec<u8>,
    pub(super) point: Vec<u8>,
    pub(super) kind: Vec<u8>,
    pub(super) source: Vec<u8>,
}

/// All mounts that this process sees, later ones above earlier ones.
pub(super) fn mounts() -> Vec<Mount> {
    parse(&std::fs::read("/proc/self/mountinfo").unwrap_or_default())
}

/// The mount that `path` (without the leading `/`) lies on.
pub(super) fn mount_of<'a>(mounts: &'a [Mount], path: &[u8]) -> Option<&'a Mount> {
    let holds = |mount: &&Mount| match path.strip_prefix(mount.point.as_slice()) {
        Some(rest) => mount.point.is_empty() || rest.is_empty() || rest.starts_with(b"/"),
        None => false,
    };
    // Of several with one length the last one is on top.
    mounts.iter().filter(holds).max_by_key(|mount| mount.point.len())
}

/// The directories that something is mounted on, without those whose names make no path of an item.
pub fn mount_points() -> Vec<ItemPath> {
    mounts().into_iter().filter_map(|mount| ItemPath::new(mount.point).ok()).collect()
}

fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|&byte| byte == b'\n').filter_map(line).collect()
}

/// `36 35 98:0 /root /mnt/point rw,noatime master:1 - ext4 /dev/source rw`, with any number of fields before `-`.
fn line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&byte| byte == b' ');
    let root = unescape(fields.nth(3)?);
    let point = unescape(fields.next()?).strip_prefix(b"/")?.to_vec();
    let mut after = fields.skip_while(|field| *field != b"-").skip(1);
    Some(Mount { root, point, kind: unescape(after.next()?), source: unescape(after.next()?) })
}

/// Undoes `\040` and its like, which stand for blanks and backslashes.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(value) if byte == b'\\' => {
                bytes.push(value);
                rest = tail.get(3..).unwrap_or_default();
            }
            _ => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::{mount_of, parse};

    #[test]
    fn mounts_are_read_with_their_blanks_and_the_nearest_one_holds_a_path() {
        let mounts = parse(
            b"22 1 0:21 / / rw shared:1 - ext4 /dev/vda rw\nbroken\n\
              36 22 8:1 / /mnt/with\\040a\\134blank rw - xfs /dev/b rw\n37 22 8:1 /x /mnt rw - ext4 /dev/c rw",
        );
        let source = |path: &[u8]| mount_of(&mounts, path).map(|mount| mount.source.clone());
        assert_eq!(mounts.len(), 3);
        assert_eq!(source(b"mnt/with a\\blank/file"), Some(b"/dev/b".to_vec()));
        assert_eq!(source(b"mnt/with"), Some(b"/dev/c".to_vec()));
        assert_eq!(source(b"mntx"), Some(b"/dev/vda".to_vec()));
        assert_eq!(mounts[2].root, b"/x");
    }
}
