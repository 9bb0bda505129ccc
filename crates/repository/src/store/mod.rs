//! Where the bytes of a repository lie, by location: a directory today, object storage later.

pub mod local;

use std::path::PathBuf;
use std::sync::Arc;

use mainstay_core::{BlobStore, Code, Error, Result};

pub use local::LocalStore;

/// A location, as people write it.
#[derive(Debug, PartialEq, Eq)]
enum Location {
    Directory(PathBuf),
}

/// Opens the store at `location`: a path or `file:///path`.
///
/// Errors: [`Code::NoRepository`] when nothing is there, [`Code::Usage`] for a location that makes no sense.
pub fn open(location: &str) -> Result<Arc<dyn BlobStore>> {
    let Location::Directory(path) = parse(location)?;
    Ok(Arc::new(LocalStore::open(&path)?))
}

/// Makes the store at `location`, or opens the one that is there.
///
/// Errors: [`Code::Refused`] when something else is there already.
pub fn create(location: &str) -> Result<Arc<dyn BlobStore>> {
    let Location::Directory(path) = parse(location)?;
    Ok(Arc::new(LocalStore::create(&path)?))
}

/// The directory that a location names, when it is one of this machine.
pub fn local_directory(location: &str) -> Option<PathBuf> {
    let Location::Directory(path) = parse(location).ok()?;
    Some(path)
}

fn parse(location: &str) -> Result<Location> {
    let usage = |what: String| {
        Error::new(Code::Usage, what).hint("A location is a directory, written as a path or as file:///path.")
    };
    if location.is_empty() {
        return Err(usage("the location of the repository is empty".into()));
    }
    let Some((scheme, rest)) = location.split_once("://") else {
        return Ok(Location::Directory(location.into()));
    };
    match scheme {
        "file" if rest.starts_with('/') => match unescape(rest) {
            Some(path) => Ok(Location::Directory(path)),
            None => Err(usage(format!("{location} has a `%` that no two hexadecimal digits follow"))),
        },
        "file" => Err(usage(format!("{location} names another machine or a relative path"))),
        "s3" => Err(Error::new(
            Code::Unsupported,
            format!("cannot open {location}: object storage is not built in yet"),
        )
        .hint("S3 comes with a later version; use a directory on a disk or a mounted share until then.")),
        _ => Err(usage(format!("{location} begins with {scheme}://, which is no kind of store"))),
    }
}

/// Undoes the `%20` of a URL.
fn unescape(path: &str) -> Option<PathBuf> {
    let mut pieces = path.split('%');
    let mut bytes = pieces.next()?.as_bytes().to_vec();
    for piece in pieces {
        let digits = piece.get(..2)?;
        let byte = u8::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+'))?;
        bytes.push(byte);
        bytes.extend_from_slice(piece.get(2..)?.as_bytes());
    }
    let text: std::ffi::OsString = std::os::unix::ffi::OsStringExt::from_vec(bytes);
    Some(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_paths_or_file_urls() {
        for (location, path) in [
            ("/backup", "/backup"),
            ("relative/dir", "relative/dir"),
            ("C:/odd", "C:/odd"),
            ("file:///mnt/usb%20disk", "/mnt/usb disk"),
        ] {
            assert_eq!(parse(location).unwrap(), Location::Directory(path.into()));
        }
        for bad in ["", "file://host/path", "file://relative", "file:///100%", "file:///%+1", "ftp://host/x"]
        {
            assert_eq!(parse(bad).unwrap_err().code(), Code::Usage, "{bad}");
        }
        let later = parse("s3://bucket/prefix").unwrap_err();
        assert_eq!(later.code(), Code::Unsupported);
        assert!(later.next_step().unwrap().contains("later version"));
    }
}
