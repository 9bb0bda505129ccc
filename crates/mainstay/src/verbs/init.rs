//! Making a repository, asked for or on first use.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{Code, Error, Result};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::keys::kit::{Kit, Page};
use mainstay_repository::keys::slot::{self, About, Cost};
use mainstay_repository::seal::Secret;
use mainstay_repository::{FamilyId, Repository, store};

use super::{Done, would};
use crate::args::Init;
use crate::places::Places;
use crate::report::lines::{self, Line};
use crate::secrets;
use crate::session::Session;

pub(super) const KIT_LABEL: &str = "recovery kit";

pub(super) fn run(arguments: &Init, session: &mut Session) -> Done {
    let places = session.places()?;
    let kit_file = arguments.kit.as_ref().map(|path| session.doors.directory.join(path));
    kit_file.as_deref().map_or(Ok(()), |path| refuse_existing_file(path, "the recovery kit"))?;
    refuse_existing(&places)?;
    if arguments.dry_run {
        return would_make(arguments, session, &places);
    }
    let ring = KeyRing::create()?;
    let family = ring.family();
    let kit = Kit::generate(&family)?;
    let created = session.now();
    let about = |label: &str| About { label: label.to_owned(), created };
    let mut slots = vec![kit.seal_slot(&ring, &about(KIT_LABEL))?];
    let key_file = if arguments.generate_key || session.key_file().is_some() {
        let (path, slot) = generated_key(session, &places, &ring)?;
        slots.push(slot);
        Some(path)
    } else {
        let passphrase = secrets::new_passphrase(&mut session.doors)?;
        slots.push(slot::seal_with_passphrase(&ring, &about("passphrase"), &passphrase, Cost::default())?);
        None
    };
    let repository = create(session, &places, ring, &slots, key_file.as_deref(), !arguments.no_parity)?;
    session.report.line(&initialized(&repository, key_file.as_deref(), kit_file.as_deref()));
    let page = Page { location: &repository.location(), made: created, label: KIT_LABEL };
    hand_over_kit(session, &kit.print(&page), kit_file.as_deref())?;
    if let Some(path) = &key_file {
        session.report.say(&format!("The key is in {}.", path.display()));
    }
    session.report.say("Next: mainstay backup PATH");
    Ok(None)
}

/// Says what [`run`] would make, having looked at the same things.
fn would_make(arguments: &Init, session: &Session, places: &Places) -> Done {
    let key = match session.key_file() {
        Some(path) => {
            refuse_inside(places, &path)?;
            refuse_existing_file(&path, "the key")?;
            format!("the new key file {}", path.display())
        }
        None if arguments.generate_key => format!("a new key file in {}", places.keys()?.display()),
        None => "a passphrase".to_owned(),
    };
    would(session, &format!("make a repository at {} that {key} opens", places.repository))
}

/// Errors: [`Code::AlreadyExists`].
pub(super) fn refuse_existing_file(path: &Path, what_for: &str) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    Err(Error::new(Code::AlreadyExists, format!("{} is there already", path.display()))
        .hint(format!("choose another file for {what_for}")))
}

/// Shows the kit, or writes it to a private file.
pub(super) fn hand_over_kit(session: &Session, text: &str, file: Option<&Path>) -> Result<()> {
    let Some(path) = file else {
        session.report.line(&Line::Kit(lines::Kit { text: text.to_owned() }));
        return Ok(());
    };
    secrets::write_private(path, text)?;
    session.report.say(&format!(
        "The recovery kit is in {}: print it, keep it elsewhere, and delete the file.",
        path.display()
    ));
    Ok(())
}

/// Makes the default repository with a generated key, and says so in plain words.
pub(super) fn on_first_use(session: &Session, places: &Places) -> Result<Repository> {
    let ring = KeyRing::create()?;
    let (path, slot) = generated_key(session, places, &ring)?;
    let repository = create(session, places, ring, &[slot], Some(&path), true)?;
    session.report.line(&initialized(&repository, Some(&path), None));
    session.report.note(&format!(
        "this repository is new, and its only key is in {}: without that file everything in it is lost. \
         Print the recovery kit and keep it elsewhere: mainstay key kit",
        path.display()
    ));
    Ok(repository)
}

fn initialized(repository: &Repository, key_file: Option<&Path>, kit_file: Option<&Path>) -> Line {
    let (key_file, key_file_base64) = lines::exact_file(key_file);
    let (kit_file, kit_file_base64) = lines::exact_file(kit_file);
    Line::Initialized(lines::Initialized {
        repository: repository.family().to_string(),
        location: repository.location(),
        key_file,
        key_file_base64,
        kit_file,
        kit_file_base64,
    })
}

fn refuse_existing(places: &Places) -> Result<()> {
    let known = store::open(&places.repository).and_then(|store| Repository::identify(store.as_ref()));
    let Ok(family) = known else { return Ok(()) };
    let what = format!("there is a repository already at {}: {family}", places.repository);
    Err(Error::new(Code::AlreadyExists, what)
        .hint("use it as it is, or name another place with --repository"))
}

/// A random key in a new private file, and the slot that it opens. The file is there before the repository is.
fn generated_key(session: &Session, places: &Places, ring: &KeyRing) -> Result<(PathBuf, Vec<u8>)> {
    let family = ring.family();
    let path = session.key_file().map_or_else(|| places.key_file(&family), Ok)?;
    refuse_inside(places, &path)?;
    let slot = new_key_file(session, ring, &family, &path, "key file")?;
    Ok((path, slot))
}

fn refuse_inside(places: &Places, path: &Path) -> Result<()> {
    match places.local_repository().filter(|repository| path.starts_with(repository)) {
        None => Ok(()),
        Some(repository) => {
            let what = format!("{} lies inside the repository {}", path.display(), repository.display());
            Err(Error::new(Code::Usage, what).hint("keep the key where the repository is not"))
        }
    }
}

/// Writes a new key file and returns the slot that it opens.
pub(super) fn new_key_file(
    session: &Session,
    ring: &KeyRing,
    family: &FamilyId,
    path: &Path,
    label: &str,
) -> Result<Vec<u8>> {
    let key = Secret::random()?;
    secrets::write_private(path, &secrets::key_file_text(&key, &family.to_string()))?;
    slot::seal_with_key(ring, &About { label: label.to_owned(), created: session.now() }, &key)
}

/// Whether the repository came about although making it failed: then its key must stay.
fn is_there(places: &Places, family: &FamilyId) -> bool {
    let known = store::open(&places.repository).and_then(|store| Repository::identify(store.as_ref()));
    known.is_ok_and(|known| known == *family)
}

fn create(
    session: &Session,
    places: &Places,
    ring: KeyRing,
    slots: &[Vec<u8>],
    key_file: Option<&Path>,
    parity: bool,
) -> Result<Repository> {
    let mut options = session.options(places);
    options.tuning.parity = parity;
    let family = ring.family();
    let made = places
        .make_ready()
        .and_then(|()| store::create(&places.repository))
        .and_then(|store| Repository::create(Arc::clone(&store), ring, slots, &options));
    if made.is_err()
        && let Some(path) = key_file
        && !is_there(places, &family)
    {
        // It opens nothing.
        let _left = std::fs::remove_file(path);
    }
    made
}
