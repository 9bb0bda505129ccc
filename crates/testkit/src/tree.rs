//! File trees with everything in them that makes a backup stumble, and a comparison of two trees that shares
//! nothing with the code it judges: plain directory streams, `fstatat`, attributes through `/proc`, bytes by `pread`.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, SeekFrom, Timespec, Timestamps, Uid, XattrFlags, chownat,
    fsetxattr, ftruncate, futimens, lgetxattr, linkat, llistxattr, lsetxattr, makedev, mkdirat, mknodat,
    openat, readlinkat, seek, statat, symlinkat, utimensat,
};
use rustix::io::{Errno, pread, pwrite};

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// What one path is, by everything that a restore has to bring back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The whole `st_mode`.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds and nanoseconds of the last modification.
    pub modified: (i64, i64),
    /// Bytes; 0 for what is no regular file.
    pub size: u64,
    /// Of devices.
    pub device: u64,
    pub target: Option<Vec<u8>>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path, in order, that is the same inode; `None` for directories.
    pub same_as: Option<Vec<u8>>,
    /// Allocated bytes. Not compared exactly: file systems round them as they like.
    pub allocated: u64,
}

/// All paths of a tree, relative to it; the tree itself is the empty path.
pub type Manifest = BTreeMap<Vec<u8>, Node>;

/// Reads a tree, except for the content of its files.
pub fn manifest(tree: &Path) -> io::Result<Manifest> {
    let mut manifest = Manifest::new();
    let root = openat(CWD, tree, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    manifest.insert(Vec::new(), node(&root, c".")?.0);
    let mut inodes = BTreeMap::new();
    gather(&root, b"", &mut manifest, &mut inodes)?;
    // Gathered in no order: the first name of an inode is known only now.
    let mut first = BTreeMap::new();
    for (path, inode) in inodes {
        let name = first.entry(inode).or_insert_with(|| path.clone()).clone();
        if let Some(node) = manifest.get_mut(&path) {
            node.same_as = Some(name);
        }
    }
    Ok(manifest)
}

fn gather(
    dir: &OwnedFd,
    path: &[u8],
    manifest: &mut Manifest,
    inodes: &mut BTreeMap<Vec<u8>, (u64, u64)>,
) -> io::Result<()> {
    for name in names(dir)? {
        let mut child = path.to_vec();
        if !child.is_empty() {
            child.push(b'/');
        }
        child.extend_from_slice(name.to_bytes());
        let (node, inode) = node(dir, &name)?;
        let is_directory = node.mode & 0o170_000 == 0o040_000;
        manifest.insert(child.clone(), node);
        if is_directory {
            let open = openat(dir, &name, OFlags::RDONLY | DIRECTORY, Mode::empty())?;
            gather(&open, &child, manifest, inodes)?;
        } else {
            inodes.insert(child, inode);
        }
    }
    Ok(())
}

fn names(dir: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    Ok(names)
}

fn node(dir: &OwnedFd, name: &CStr) -> io::Result<(Node, (u64, u64))> {
    let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    let target = match kind {
        FileType::Symlink => Some(readlinkat(dir, name, Vec::new())?.into_bytes()),
        _ => None,
    };
    let node = Node {
        mode: stat.st_mode,
        uid: stat.st_uid,
        gid: stat.st_gid,
        modified: (stat.st_mtime, i64::try_from(stat.st_mtime_nsec).unwrap_or(-1)),
        size: if kind == FileType::RegularFile { stat.st_size.cast_unsigned() } else { 0 },
        device: if kind.is_char_device() || kind.is_block_device() { stat.st_rdev } else { 0 },
        target,
        xattrs: xattrs(dir, name)?,
        same_as: None,
        allocated: u64::try_from(stat.st_blocks).unwrap_or(0) * 512,
    };
    Ok((node, (stat.st_dev, stat.st_ino)))
}

fn xattrs(dir: &OwnedFd, name: &CStr) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend_from_slice(name.to_bytes());
    let path = CString::new(path)?;
    let mut list = vec![0_u8; 1 << 16];
    let len = llistxattr(&*path, &mut list[..])?;
    let mut xattrs = BTreeMap::new();
    for attribute in list[..len].split(|&byte| byte == 0).filter(|attribute| !attribute.is_empty()) {
        let mut value = vec![0_u8; 1 << 16];
        let len = lgetxattr(&*path, attribute, &mut value[..])?;
        value.truncate(len);
        xattrs.insert(attribute.to_vec(), value);
    }
    Ok(xattrs)
}

/// Every difference between two trees, in words; none when `actual` is as `expected` in names, kinds, content,
/// modes, owners, times, attributes, hard links and holes.
pub fn compare(expected: &Path, actual: &Path) -> io::Result<Vec<String>> {
    let (left, right) = (manifest(expected)?, manifest(actual)?);
    let mut differences = Vec::new();
    for path in right.keys().filter(|path| !left.contains_key(*path)) {
        differences.push(format!("{}: was not there", shown(path)));
    }
    for (path, node) in &left {
        match right.get(path) {
            None => differences.push(format!("{}: is missing", shown(path))),
            Some(other) => differences.extend(node_differences(path, node, other)),
        }
    }
    let roots = (open_tree(expected)?, open_tree(actual)?);
    let files = left.iter().filter(|(_, node)| node.mode & 0o170_000 == 0o100_000);
    for (path, _) in files.filter(|(path, _)| right.contains_key(*path)) {
        let (left, right) = (open_file(&roots.0, path)?, open_file(&roots.1, path)?);
        if let Some(offset) = first_difference(&left, &right)? {
            differences.push(format!("{}: differs at byte {offset}", shown(path)));
        }
    }
    Ok(differences)
}

fn node_differences(path: &[u8], left: &Node, right: &Node) -> Vec<String> {
    let mut differences = Vec::new();
    let mut check = |what: &str, left: &dyn std::fmt::Debug, right: &dyn std::fmt::Debug| {
        let (left, right) = (format!("{left:?}"), format!("{right:?}"));
        if left != right {
            differences.push(format!("{}: {what} is {right}, not {left}", shown(path)));
        }
    };
    check("mode", &format!("{:o}", left.mode), &format!("{:o}", right.mode));
    check("owner", &(left.uid, left.gid), &(right.uid, right.gid));
    check("time", &left.modified, &right.modified);
    check("size", &left.size, &right.size);
    check("device", &left.device, &right.device);
    check("target", &left.target, &right.target);
    check("attributes", &left.xattrs, &right.xattrs);
    check("first name", &left.same_as, &right.same_as);
    // A hole that was filled shows as megabytes; how a file system rounds does not.
    if right.allocated > left.allocated + (1 << 17) {
        check("allocation", &left.allocated, &right.allocated);
    }
    differences
}

fn shown(path: &[u8]) -> String {
    let mut text = path.escape_ascii().to_string();
    if text.len() > 200 {
        let _infallible = write!(text, " ({} bytes)", path.len());
    }
    text
}

fn open_tree(tree: &Path) -> io::Result<OwnedFd> {
    Ok(openat(CWD, tree, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// One component at a time: the path may be longer than the kernel takes at once.
fn open_file(root: &OwnedFd, path: &[u8]) -> io::Result<OwnedFd> {
    let mut names: Vec<&[u8]> = path.split(|&byte| byte == b'/').collect();
    let last = names.pop().unwrap_or_default();
    let mut dir = root.try_clone()?;
    for name in names {
        dir = openat(&dir, name, OFlags::RDONLY | DIRECTORY, Mode::empty())?;
    }
    Ok(openat(&dir, last, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?)
}

fn first_difference(left: &OwnedFd, right: &OwnedFd) -> io::Result<Option<u64>> {
    let (mut a, mut b) = (vec![0_u8; 1 << 16], vec![0_u8; 1 << 16]);
    let mut offset = 0;
    loop {
        // Only where one of the two has data; holes on both sides are equal and may be huge.
        let data = |fd: &OwnedFd| match seek(fd, SeekFrom::Data(offset)) {
            Err(Errno::NXIO) => Ok(u64::MAX),
            other => other,
        };
        let start = data(left)?.min(data(right)?);
        if start == u64::MAX {
            return Ok(None);
        }
        offset = start;
        let (m, n) = (pread(left, &mut a[..], offset)?, pread(right, &mut b[..], offset)?);
        let equal = a[..m].iter().zip(&b[..n]).take_while(|(a, b)| a == b).count();
        if equal < m.max(n) {
            // A short read is a difference only at the end of a file; look again from there.
            if equal == 0 || m == n {
                return Ok(Some(offset + equal as u64));
            }
        }
        if m == 0 && n == 0 {
            return Ok(None);
        }
        offset += equal as u64;
    }
}

/// Makes a tree at `tree`, which must not exist, with everything this process has the power to make. Returns what
/// it could not make, for the test to print.
pub fn hostile_tree(tree: &Path) -> io::Result<Vec<String>> {
    std::fs::create_dir(tree)?;
    let root = open_tree(tree)?;
    let mut absent = Vec::new();
    names_and_modes(&root)?;
    times(&root)?;
    links(&root)?;
    sparse(&root)?;
    attributes(&root, &mut absent)?;
    special(&root, &mut absent)?;
    owners(&root, &mut absent)?;
    deep(&root)?;
    // Closed directories last, since nothing more can be put into them.
    let closed = directory(&root, c"closed")?;
    file(&closed, c"inside", b"inside", 0o444)?;
    rustix::fs::fchmod(&closed, Mode::from_raw_mode(0o555))?;
    moment(&closed, 1_000_000_000, 7)?;
    moment(&root, 1_111_111_111, 111_111_111)?;
    Ok(absent)
}

fn directory(parent: &OwnedFd, name: &CStr) -> io::Result<OwnedFd> {
    mkdirat(parent, name, Mode::from_raw_mode(0o755))?;
    Ok(openat(parent, name, OFlags::RDONLY | DIRECTORY, Mode::empty())?)
}

fn file(parent: &OwnedFd, name: impl rustix::path::Arg, content: &[u8], mode: u32) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = openat(parent, name, flags, Mode::from_raw_mode(0o600))?;
    let mut done = 0;
    while done < content.len() {
        done += pwrite(&file, &content[done..], done as u64)?;
    }
    rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?;
    Ok(file)
}

fn moment(fd: impl AsFd, seconds: i64, nanoseconds: i64) -> io::Result<()> {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    Ok(futimens(fd, &Timestamps { last_access: time, last_modification: time })?)
}

fn names_and_modes(root: &OwnedFd) -> io::Result<()> {
    let dir = directory(root, c"names")?;
    let long = [b'x'; 255];
    let names: [&[u8]; 14] = [
        b"plain",
        b" leading and trailing ",
        b"new\nline",
        b"tab\tand \x1b[31mcolour",
        b"-rf",
        b"back\\slash",
        b"*?[a-z]",
        b"\xff\xfe\x80",
        "\u{1f4be} emoji".as_bytes(),
        b"a",
        b"a.b",
        b"a b",
        b"...",
        &long,
    ];
    for (index, name) in names.into_iter().enumerate() {
        file(&dir, name, &name.repeat(index), 0o644)?;
    }
    // Sorts between `a` and `a.b` as a directory.
    mkdirat(&dir, c"a-directory", Mode::from_raw_mode(0o700))?;
    let modes = directory(root, c"modes")?;
    for mode in [0o000, 0o444, 0o777, 0o4755, 0o2755, 0o6711, 0o1600] {
        if mode & 0o400 != 0 || rustix::process::geteuid().is_root() {
            file(&modes, format!("{mode:04o}"), b"mode", mode)?;
        }
        let name = CString::new(format!("directory-{mode:04o}"))?;
        let made = directory(&modes, &name)?;
        let readable = if rustix::process::geteuid().is_root() { mode } else { mode | 0o500 };
        rustix::fs::fchmod(&made, Mode::from_raw_mode(readable))?;
    }
    let content: Vec<u8> =
        (0..(1_u32 << 20) + 1).map(|index| (index.wrapping_mul(index) >> 7) as u8).collect();
    file(&dir, c"a megabyte and one", &content, 0o640)?;
    file(&dir, c"empty", b"", 0o600)?;
    Ok(())
}

fn times(root: &OwnedFd) -> io::Result<()> {
    let dir = directory(root, c"times")?;
    for (name, seconds, nanoseconds) in [
        ("nanoseconds", 1_700_000_000, 123_456_789),
        ("before 1970", -2, 500_000_001),
        ("1970", 0, 0),
        ("1901", -2_147_483_648, 999_999_999),
        ("2200", 7_258_118_400, 1),
    ] {
        moment(file(&dir, name, name.as_bytes(), 0o644)?, seconds, nanoseconds)?;
        let name = CString::new(format!("{name} directory"))?;
        moment(directory(&dir, &name)?, seconds, nanoseconds)?;
    }
    symlinkat(c"2200", &dir, c"an old link")?;
    let time = Timespec { tv_sec: 1_234_567_890, tv_nsec: 987_654_321 };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(utimensat(&dir, c"an old link", &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

fn links(root: &OwnedFd) -> io::Result<()> {
    let dir = directory(root, c"links")?;
    let other = directory(&dir, c"other")?;
    let long = b"../".repeat(1300);
    let targets: [(&CStr, &[u8]); 7] = [
        (c"relative", b"hard 1"),
        (c"absolute", b"/etc/passwd"),
        (c"dangling", b"nowhere/at all"),
        (c"up", b"../.."),
        (c"itself", b"itself"),
        (c"bytes", b"\xff\n\x01"),
        (c"long", &long),
    ];
    for (name, target) in targets {
        symlinkat(target, &dir, name)?;
    }
    file(&dir, c"hard 1", b"three names", 0o640)?;
    linkat(&dir, c"hard 1", &dir, c"hard 2", AtFlags::empty())?;
    linkat(&dir, c"hard 1", &other, c"hard 3", AtFlags::empty())?;
    linkat(&dir, c"dangling", &other, c"dangling too", AtFlags::empty())?;
    // A second set, which must not be mixed up with the first.
    file(&other, c"pair 1", b"two names", 0o600)?;
    Ok(linkat(&other, c"pair 1", root, c"pair 2", AtFlags::empty())?)
}

fn sparse(root: &OwnedFd) -> io::Result<()> {
    let dir = directory(root, c"sparse")?;
    let middle = file(&dir, c"data in the middle", b"", 0o600)?;
    pwrite(&middle, &[7; 70_000], 64 << 20)?;
    ftruncate(&middle, (128 << 20) + 3)?;
    ftruncate(file(&dir, c"nothing but a hole", b"", 0o600)?, (1 << 30) + 1)?;
    let end = file(&dir, c"data at both ends", b"start", 0o600)?;
    pwrite(&end, b"end", 40 << 20)?;
    // Zeros that were written are data.
    file(&dir, c"written zeros", &[0; 300_000], 0o600)?;
    Ok(())
}

/// A POSIX ACL as the kernel stores it: `linux/posix_acl_xattr.h`.
fn acl(owner: u16, named_user: u32) -> Vec<u8> {
    const NOBODY_IN_PARTICULAR: u32 = u32::MAX;
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    let entries: [(u16, u16, u32); 5] = [
        (0x01, owner, NOBODY_IN_PARTICULAR),
        (0x02, 4, named_user),
        (0x04, 4, NOBODY_IN_PARTICULAR),
        (0x10, 4, NOBODY_IN_PARTICULAR),
        (0x20, 0, NOBODY_IN_PARTICULAR),
    ];
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

fn attributes(root: &OwnedFd, absent: &mut Vec<String>) -> io::Result<()> {
    let dir = directory(root, c"attributes")?;
    let with_acl = directory(&dir, c"with a default acl")?;
    // Made before the default ACL, so that it has none of it.
    file(&with_acl, c"without", b"without", 0o644)?;
    let file = file(&dir, c"file", b"attributes", 0o640)?;
    let big = [0xa5; 3000];
    let mut set = |fd: &OwnedFd, name: &str, value: &[u8]| {
        if let Err(errno) = fsetxattr(fd, name, value, XattrFlags::empty()) {
            absent.push(format!("the attribute {name}: {errno}"));
        }
    };
    set(&file, "user.text", b"value");
    set(&file, "user.empty", b"");
    set(&file, "user.bytes \u{e9}", b"\0\xff\n");
    set(&file, "user.big", &big);
    set(&dir, "user.of a directory", b"yes");
    set(&file, "system.posix_acl_access", &acl(6, 12_345));
    set(&with_acl, "system.posix_acl_access", &acl(7, 12_345));
    set(&with_acl, "system.posix_acl_default", &acl(7, 54_321));
    set(&file, "trusted.mainstay", b"only root sees this");
    // cap_net_bind_service in version 2 of `linux/capability.h`: effective, permitted, nothing inheritable.
    let capability: Vec<u8> =
        [0x0200_0001_u32, 1 << 10, 0, 0, 0].into_iter().flat_map(u32::to_le_bytes).collect();
    set(&file, "security.capability", &capability);
    symlinkat(c"file", &dir, c"link")?;
    let link = format!("/proc/self/fd/{}/link", dir.as_raw_fd());
    if let Err(errno) = lsetxattr(link, "trusted.on a link", b"yes", XattrFlags::empty()) {
        absent.push(format!("an attribute of a symbolic link: {errno}"));
    }
    Ok(())
}

fn special(root: &OwnedFd, absent: &mut Vec<String>) -> io::Result<()> {
    let dir = directory(root, c"special")?;
    let mode = Mode::from_raw_mode(0o640);
    mknodat(&dir, c"fifo", FileType::Fifo, mode, 0)?;
    linkat(&dir, c"fifo", &dir, c"fifo again", AtFlags::empty())?;
    mknodat(&dir, c"socket", FileType::Socket, mode, 0)?;
    let devices = [
        (c"null", FileType::CharacterDevice, makedev(1, 3)),
        (c"loop", FileType::BlockDevice, makedev(7, 200)),
        (c"big numbers", FileType::CharacterDevice, makedev(300, 70_000)),
    ];
    for (name, kind, device) in devices {
        if let Err(errno) = mknodat(&dir, name, kind, mode, device) {
            absent.push(format!("the device {}: {errno}", name.to_string_lossy()));
        }
    }
    Ok(())
}

fn owners(root: &OwnedFd, absent: &mut Vec<String>) -> io::Result<()> {
    let dir = directory(root, c"owners")?;
    for (name, uid, gid, mode) in [
        (c"known", 1, 2, 0o644),
        (c"unknown", 12_345, 54_321, 0o644),
        (c"set-id of another", 12_345, 8, 0o6755),
    ] {
        let made = file(&dir, name, b"owned", 0o600)?;
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        if let Err(errno) = rustix::fs::fchown(&made, uid, gid) {
            absent.push(format!("the owner of {}: {errno}", name.to_string_lossy()));
        }
        rustix::fs::fchmod(&made, Mode::from_raw_mode(mode))?;
    }
    symlinkat(c"known", &dir, c"link of another")?;
    let (uid, gid) = (Some(Uid::from_raw(12_345)), Some(Gid::from_raw(54_321)));
    if let Err(errno) = chownat(&dir, c"link of another", uid, gid, AtFlags::SYMLINK_NOFOLLOW) {
        absent.push(format!("the owner of a symbolic link: {errno}"));
    }
    Ok(())
}

/// One path far longer than `PATH_MAX`, and one with more levels than descriptors that a careful program holds.
fn deep(root: &OwnedFd) -> io::Result<()> {
    for (name, component, levels) in [("long", "d".repeat(250), 40), ("many", "m".to_owned(), 300)] {
        let mut dir = directory(root, &CString::new(name)?)?;
        let component = CString::new(component)?;
        for level in 0..levels {
            dir = directory(&dir, &component)?;
            if level % 100 == 99 || level + 1 == levels {
                file(&dir, c"file", format!("level {level}").as_bytes(), 0o644)?;
            }
        }
    }
    Ok(())
}

/// The path of a tree as a point holds it: without the leading slash.
pub fn path_in_point(tree: &Path) -> &[u8] {
    let bytes = tree.as_os_str().as_bytes();
    bytes.strip_prefix(b"/").unwrap_or(bytes)
}
