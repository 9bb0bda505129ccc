//! Passphrases and key files: where they come from, and how they are kept from other eyes. None is ever taken from
//! the command line, shown, or put into an error.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::Duration;

use mainstay_core::{Code, Error, Result};
use mainstay_repository::keys::{KeyRing, credential};
use mainstay_repository::seal::Secret;
use mainstay_workloads::process::Program;
use zeroize::Zeroizing;

use crate::doors::{Doors, Passphrase};

/// Longest passphrase or key file, in bytes.
const SECRET_MAX: u64 = 64 << 10;
/// A password manager may have to ask its person.
const COMMAND_LIMIT: Duration = Duration::from_secs(300);
/// Begins the one line of a key file that is read.
const KEY_LINE: &str = "mainstay-key-1:";

/// What a key file holds.
pub(crate) enum KeyFile {
    /// A random key that opens a slot.
    Key(Secret),
    /// All powers of a write-only client.
    Credential(Box<KeyRing>),
}

/// The passphrase that the environment tells of, without asking anybody.
pub(crate) fn passphrase_of_environment(doors: &Doors) -> Result<Option<Zeroizing<Vec<u8>>>> {
    passphrase_by("MAINSTAY_PASSPHRASE", &doors.environment.passphrase)
}

/// The passphrase of encrypted volumes: what the environment tells of, or what a person says if they are to be asked.
///
/// Errors: [`Code::Usage`] without a terminal, where nobody can be asked.
pub(crate) fn volume_passphrase(doors: &mut Doors, ask: bool) -> Result<Option<Zeroizing<Vec<u8>>>> {
    if !ask {
        return passphrase_by("MAINSTAY_VOLUME_PASSPHRASE", &doors.environment.volume_passphrase);
    }
    if !doors.terminal.input {
        let what = "there is nobody to ask for the passphrase of the encrypted volumes";
        return Err(Error::new(Code::Usage, what).hint(
            "give a key file with --volume-key-file, or the passphrase with MAINSTAY_VOLUME_PASSPHRASE_FILE or \
             MAINSTAY_VOLUME_PASSPHRASE_COMMAND",
        ));
    }
    let text = doors.person.secret("Passphrase of the encrypted volumes: ")?;
    Ok(Some(Zeroizing::new(text.as_bytes().to_vec())))
}

/// The passphrase in a file or from a command that variables beginning with `name` tell of.
fn passphrase_by(name: &str, from: &Passphrase) -> Result<Option<Zeroizing<Vec<u8>>>> {
    if let Some(path) = &from.file {
        let bytes = read_file(path).map_err(|error| error.during(format!("cannot use {name}_FILE")))?;
        return Ok(Some(first_line(&bytes)));
    }
    let Some(command) = &from.command else { return Ok(None) };
    // The command line itself may hold a secret, so it is not shown.
    let output = Program::shell(command, COMMAND_LIMIT).run_well();
    let output = output.map_err(|error| {
        Error::new(error.code(), format!("{name}_COMMAND failed"))
            .hint("run the command by itself and see what it says")
    })?;
    Ok(Some(first_line(&Zeroizing::new(output))))
}

/// Asks for the passphrase of a repository.
///
/// Errors: [`Code::WrongKey`] without a terminal, where nobody can be asked.
pub(crate) fn ask(doors: &mut Doors, location: &str) -> Result<Zeroizing<Vec<u8>>> {
    if !doors.terminal.input {
        return Err(Error::new(Code::WrongKey, format!("there is no key for {location}")).hint(
            "give a key file with --key-file, or the passphrase with MAINSTAY_PASSPHRASE_FILE or \
             MAINSTAY_PASSPHRASE_COMMAND",
        ));
    }
    let question = format!("Passphrase of {location}: ");
    doors.person.secret(&question).map(|text| Zeroizing::new(text.as_bytes().to_vec()))
}

/// A new passphrase: from the environment, or asked for twice.
pub(crate) fn new_passphrase(doors: &mut Doors) -> Result<Zeroizing<Vec<u8>>> {
    if let Some(passphrase) = passphrase_of_environment(doors)? {
        return check(passphrase);
    }
    if !doors.terminal.input {
        return Err(Error::new(Code::Usage, "there is nobody to ask for a passphrase").hint(
            "use --generate-key, or give the passphrase with MAINSTAY_PASSPHRASE_FILE or \
             MAINSTAY_PASSPHRASE_COMMAND",
        ));
    }
    let first = doors.person.secret("New passphrase: ")?;
    let second = doors.person.secret("And again: ")?;
    if first != second {
        return Err(Error::new(Code::Usage, "the two passphrases differ").hint("try again"));
    }
    check(Zeroizing::new(first.as_bytes().to_vec()))
}

fn check(passphrase: Zeroizing<Vec<u8>>) -> Result<Zeroizing<Vec<u8>>> {
    if passphrase.len() < 8 {
        return Err(Error::new(Code::Usage, "the passphrase has fewer than eight bytes")
            .hint("take several words; they are typed rarely"));
    }
    Ok(passphrase)
}

/// The first line of a file that holds a password.
pub(crate) fn first_line_of(path: &Path) -> Result<Zeroizing<Vec<u8>>> {
    Ok(first_line(&read_file(path)?))
}

fn first_line(bytes: &[u8]) -> Zeroizing<Vec<u8>> {
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    Zeroizing::new(line.strip_suffix(b"\r").unwrap_or(line).to_vec())
}

/// Reads a key file or a writer's credential.
///
/// Errors: [`Code::Refused`] when others can read it, [`Code::Usage`] when it is neither.
pub(crate) fn read_key_file(path: &Path) -> Result<KeyFile> {
    let bytes = read_private(path)?;
    let neither = || {
        let what = format!("{} is neither a key file nor a writer credential", path.display());
        Error::new(Code::Usage, what).hint("a recovery kit is given with --with-kit")
    };
    let text = std::str::from_utf8(&bytes).map_err(|error| neither().because(error))?;
    match text.lines().find_map(|line| line.trim().strip_prefix(KEY_LINE)) {
        Some(digits) => unhex(digits.trim()).map(KeyFile::Key).ok_or_else(neither),
        None if text.contains("MAINSTAY KEY") => {
            credential::decode(text).map(|ring| KeyFile::Credential(Box::new(ring)))
        }
        None => Err(neither()),
    }
}

/// Reads a file that only its owner may read.
///
/// Errors: [`Code::Refused`] when others can read it.
pub(crate) fn read_private(path: &Path) -> Result<Zeroizing<Vec<u8>>> {
    let fail = |error| Error::io(format!("cannot read {}", path.display()), error);
    let metadata = std::fs::metadata(path).map_err(fail)?;
    let me = rustix::process::geteuid().as_raw();
    let own = metadata.uid() == me || metadata.uid() == 0;
    if metadata.mode() & 0o077 != 0 || !own {
        let what = format!("{} can be read by others than you", path.display());
        return Err(Error::new(Code::Refused, what).hint(format!("chmod 600 {}", path.display())));
    }
    read_file(path)
}

fn read_file(path: &Path) -> Result<Zeroizing<Vec<u8>>> {
    let fail = |error| Error::io(format!("cannot read {}", path.display()), error);
    let file = std::fs::File::open(path).map_err(fail)?;
    // Reserved in full, so that no part is left behind where a growing buffer was.
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(SECRET_MAX).unwrap_or_default() + 1));
    file.take(SECRET_MAX + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() > usize::try_from(SECRET_MAX).unwrap_or_default() {
        return Err(Error::new(Code::Usage, format!("{} is too long for a secret", path.display())));
    }
    Ok(bytes)
}

/// The text of a key file.
pub(crate) fn key_file_text(key: &Secret, about: &str) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(512));
    text.push_str("# The key of the Mainstay repository ");
    text.push_str(about);
    text.push_str(
        ".\n# Whoever has this file can read everything in it. Keep it private, and not beside it.\n",
    );
    text.push_str(KEY_LINE);
    text.push(' ');
    for byte in key.iter() {
        for digit in [byte >> 4, byte & 15] {
            text.push(char::from_digit(digit.into(), 16).unwrap_or('?'));
        }
    }
    text.push('\n');
    text
}

/// Writes a secret into a new file that only this user can read, durably, making its directory if need be.
///
/// Errors: [`Code::AlreadyExists`]; nothing is ever overwritten.
pub(crate) fn write_private(path: &Path, text: &str) -> Result<()> {
    let fail = |error| Error::io(format!("cannot write {}", path.display()), error);
    if let Some(parent) = path.parent() {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent);
        made.map_err(|error| Error::io(format!("cannot make {}", parent.display()), error))?;
    }
    let mut file =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(fail)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(fail)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    std::fs::File::open(parent.unwrap_or_else(|| Path::new("."))).and_then(|dir| dir.sync_all()).map_err(fail)
}

fn unhex(text: &str) -> Option<Secret> {
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = Zeroizing::new([0; 32]);
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().as_chunks::<2>().0) {
        let digit = |digit: u8| char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Secret::from_slice(&bytes[..])
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use mainstay_core::Code;
    use mainstay_repository::seal::Secret;

    use super::{KeyFile, first_line, key_file_text, read_key_file, unhex, write_private};

    #[test]
    fn a_key_file_round_trips_and_is_private() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("keys/one.key");
        let key = Secret::random().unwrap();
        write_private(&path, &key_file_text(&key, "1234")).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(path.parent().unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o700);
        let KeyFile::Key(read) = read_key_file(&path).unwrap() else { panic!("no key") };
        assert_eq!(read[..], key[..]);
        assert_eq!(write_private(&path, "other").unwrap_err().code(), Code::AlreadyExists);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(read_key_file(&path).err().unwrap().code(), Code::Refused);
    }

    #[test]
    fn other_files_are_no_keys_and_are_not_quoted() {
        let place = tempfile::tempdir().unwrap();
        for (name, text) in [("a", "hunter2"), ("b", "mainstay-key-1: 12"), ("c", "mainstay-key-1: zz")] {
            let path = place.path().join(name);
            write_private(&path, text).unwrap();
            let error = read_key_file(&path).err().unwrap();
            assert_eq!(error.code(), Code::Usage);
            assert!(!format!("{error:?}").contains(text), "{error:?}");
        }
        assert!(unhex(&"+1".repeat(32)).is_none());
    }

    #[test]
    fn a_passphrase_ends_with_its_line() {
        for text in ["pass word", "pass word\n", "pass word\r\nmore\n"] {
            assert_eq!(*first_line(text.as_bytes()), b"pass word");
        }
    }
}
