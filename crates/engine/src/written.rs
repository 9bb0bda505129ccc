//! Files of databases, written into a new directory.

use std::fs::File;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

use mainstay_core::{Code, Error, Piece, Progress, Result, StreamReader};

/// Makes a directory, or takes one that is empty.
///
/// Errors: [`Code::AlreadyExists`] when there is something in it.
pub(crate) fn empty_directory(to: &Path) -> Result<()> {
    let failed = |error| Error::io(format!("cannot make {}", to.display()), error);
    match std::fs::DirBuilder::new().mode(0o700).create(to) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed(error)),
    }
    if std::fs::read_dir(to).map_err(failed)?.next().is_some() {
        let what = format!("{} is not empty", to.display());
        return Err(Error::new(Code::AlreadyExists, what).hint("restore to a new directory"));
    }
    Ok(())
}

/// Writes a new file, with the directories above it.
pub(crate) fn new_file(
    mut content: Box<dyn StreamReader>,
    path: &Path,
    mode: u32,
    progress: &dyn Progress,
) -> Result<File> {
    let failed = |error| Error::io(format!("cannot write {}", path.display()), error);
    if let Some(above) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(above).map_err(failed)?;
    }
    let file = File::options().read(true).write(true).create_new(true).mode(mode & 0o777).open(path);
    let mut file = file.map_err(failed)?;
    write(content.as_mut(), &mut file, progress)
        .map_err(|error| error.during(format!("cannot write {}", path.display())))?;
    Ok(file)
}

/// Writes content where the file stands.
pub(crate) fn write(content: &mut dyn StreamReader, file: &mut File, progress: &dyn Progress) -> Result<()> {
    let failed = |error| Error::io("the content cannot be written", error);
    let mut buffer = vec![0; 256 << 10];
    loop {
        progress.check()?;
        match content.read(&mut buffer)? {
            Piece::Data(length) => {
                file.write_all(buffer.get(..length).unwrap_or_default()).map_err(failed)?;
            }
            Piece::Hole(length) => {
                let at = file.stream_position().map_err(failed)?.saturating_add(length);
                file.set_len(at).and_then(|()| file.seek(SeekFrom::Start(at))).map_err(failed)?;
            }
            Piece::End => return Ok(()),
        }
    }
}

/// A directory of this run's own, that goes with the value. Others may go through it, for the server's user has to.
pub(crate) fn private_directory(scratch: &Path) -> Result<tempfile::TempDir> {
    use std::os::unix::fs::PermissionsExt as _;
    let failed = |error| Error::io(format!("cannot make a directory in {}", scratch.display()), error);
    let directory = tempfile::Builder::new().prefix("mainstay-drill-").tempdir_in(scratch).map_err(failed)?;
    let mode = std::fs::Permissions::from_mode(0o711);
    std::fs::set_permissions(directory.path(), mode).map_err(failed)?;
    Ok(directory)
}
