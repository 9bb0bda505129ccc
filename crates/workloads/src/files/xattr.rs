//! Extended attributes of a name inside an open directory, without opening what it names.

#![expect(
    unsafe_code,
    reason = "listxattrat and getxattrat have no wrapper yet, and cost a third of the way through /proc"
)]

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{lgetxattr, llistxattr};
use rustix::io::Errno;

/// Enough for almost every list of names and every value, in bytes.
const BUFFER: usize = 1 << 10;

/// The kernel's own limits on a list of names and on one value, in bytes.
const BUFFER_MAX: usize = 64 << 10;

/// Since Linux 6.13; the same numbers on every architecture Rust has this libc for, but for two old ones.
const GETXATTRAT: libc::c_long = 464;
const LISTXATTRAT: libc::c_long = 465;

/// Cleared once the kernel has said that it does not know the two calls.
static HAS_XATTRAT: AtomicBool =
    AtomicBool::new(cfg!(not(any(target_arch = "mips64", target_arch = "mips"))));

/// `struct xattr_args` of `linux/xattr.h`.
#[repr(C)]
struct XattrArgs {
    value: u64,
    size: u32,
    flags: u32,
}

/// Full names and values.
type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// Room for one list of names and one value, kept from item to item.
pub(super) struct XattrBuffer {
    names: Vec<u8>,
    value: Vec<u8>,
}

impl Default for XattrBuffer {
    fn default() -> Self {
        Self { names: vec![0; BUFFER], value: vec![0; BUFFER] }
    }
}

impl XattrBuffer {
    /// All attributes of `name` in `dir`, sorted, and the last error met while reading them. `name` itself is
    /// never followed. A file system without attributes has none; one that vanishes meanwhile is left out.
    pub(super) fn read(&mut self, dir: impl AsFd, name: &CStr) -> (Xattrs, Option<Errno>) {
        let len = match grow(&mut self.names, |buffer| list(&dir, name, buffer)) {
            Ok(0) | Err(Errno::OPNOTSUPP) => return (Vec::new(), None),
            Ok(len) => len,
            Err(errno) => return (Vec::new(), Some(errno)),
        };
        let mut found = Vec::new();
        let mut trouble = None;
        for attribute in self.names.get(..len).unwrap_or_default().split_inclusive(|&byte| byte == 0) {
            let Ok(attribute) = CStr::from_bytes_with_nul(attribute) else { continue };
            match grow(&mut self.value, |buffer| get(&dir, name, attribute, buffer)) {
                Ok(len) => {
                    let value = self.value.get(..len).unwrap_or_default();
                    found.push((attribute.to_bytes().to_vec(), value.to_vec()));
                }
                Err(Errno::NODATA) => {}
                Err(errno) => trouble = Some(errno),
            }
        }
        found.sort_unstable();
        (found, trouble)
    }
}

/// Asks again with a buffer of the greatest size when the kernel says that it is too small.
fn grow(
    buffer: &mut Vec<u8>,
    mut ask: impl FnMut(&mut [u8]) -> Result<usize, Errno>,
) -> Result<usize, Errno> {
    match ask(buffer) {
        Err(Errno::RANGE) if buffer.len() < BUFFER_MAX => {
            buffer.resize(BUFFER_MAX, 0);
            ask(buffer)
        }
        other => other,
    }
}

fn list(dir: impl AsFd, name: &CStr, buffer: &mut [u8]) -> Result<usize, Errno> {
    if HAS_XATTRAT.load(Ordering::Relaxed) {
        // SAFETY: the name is NUL-terminated and the kernel writes at most `buffer.len()` bytes into the buffer.
        let result = unsafe {
            let fd = dir.as_fd().as_raw_fd();
            let flags = libc::AT_SYMLINK_NOFOLLOW;
            libc::syscall(LISTXATTRAT, fd, name.as_ptr(), flags, buffer.as_mut_ptr(), buffer.len())
        };
        match outcome(result) {
            Err(Errno::NOSYS | Errno::PERM) => HAS_XATTRAT.store(false, Ordering::Relaxed),
            other => return other,
        }
    }
    llistxattr(&*through_proc(dir, name)?, buffer)
}

fn get(dir: impl AsFd, name: &CStr, attribute: &CStr, buffer: &mut [u8]) -> Result<usize, Errno> {
    if HAS_XATTRAT.load(Ordering::Relaxed) {
        let size = u32::try_from(buffer.len()).unwrap_or(u32::MAX);
        let args = XattrArgs { value: buffer.as_mut_ptr() as u64, size, flags: 0 };
        // SAFETY: both names are NUL-terminated, `args` has the layout and the size that is passed with it, and
        // the kernel writes at most `args.size` bytes to `args.value`, which is the buffer.
        let result = unsafe {
            let fd = dir.as_fd().as_raw_fd();
            let flags = libc::AT_SYMLINK_NOFOLLOW;
            let (pointer, size) = (&raw const args, size_of::<XattrArgs>());
            libc::syscall(GETXATTRAT, fd, name.as_ptr(), flags, attribute.as_ptr(), pointer, size)
        };
        return outcome(result);
    }
    lgetxattr(&*through_proc(dir, name)?, attribute, buffer)
}

fn outcome(result: libc::c_long) -> Result<usize, Errno> {
    usize::try_from(result)
        .map_err(|_negative| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// The old way: the path of the directory's descriptor, with the name behind it.
fn through_proc(dir: impl AsFd, name: &CStr) -> Result<CString, Errno> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_fd().as_raw_fd()).into_bytes();
    path.extend_from_slice(name.to_bytes());
    CString::new(path).or(Err(Errno::INVAL))
}
