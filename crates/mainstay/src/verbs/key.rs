//! `mainstay key …`.

use std::path::{Path, PathBuf};

use mainstay_core::{Code, Error, Id16, Result};
use mainstay_repository::keys::kit::{Kit, Page};
use mainstay_repository::keys::share::Share;
use mainstay_repository::keys::slot::{self, About, Cost, Header, Lock};
use mainstay_repository::keys::{Powers, credential};
use mainstay_repository::{Role, WriterInfo};

use super::init::{KIT_LABEL, hand_over_kit, new_key_file, refuse_existing_file};
use super::{Done, would};
use crate::args::{Key, Writer};
use crate::doors::Passphrase;
use crate::report::lines::{self, Line};
use crate::secrets;
use crate::session::Session;

pub(super) fn run(verb: Key, session: &mut Session) -> Done {
    match verb {
        Key::List => list(session),
        Key::Add { out, label, dry_run } => add(out.as_deref(), label.as_deref(), dry_run, session),
        Key::Remove { id, yes, dry_run } => remove(&id, yes, dry_run, session),
        Key::Kit { out, pages, needed, dry_run } => {
            let shared = pages.zip(needed).map(|(pages, needed)| Shared { pages, needed });
            kit(out.as_deref(), shared, dry_run, session)
        }
        Key::Test => test(session),
        Key::Writer(Writer::Add { name, out, dry_run }) => add_writer(&name, &out, dry_run, session),
        Key::Writer(Writer::Revoke { writer, yes, dry_run }) => revoke(&writer, yes, dry_run, session),
        Key::Writer(Writer::List) => writers(session),
    }
}

fn key_line(header: &Header) -> Line {
    let kind = match header.lock {
        Lock::Passphrase { .. } => "passphrase",
        Lock::Key if header.about.label == KIT_LABEL => "recovery-kit",
        Lock::Key => "key-file",
    };
    Line::Key(lines::Key {
        key: header.slot.to_string(),
        kind: kind.to_owned(),
        label: header.about.label.clone(),
        created: lines::stamp(header.about.created),
    })
}

fn list(session: &mut Session) -> Done {
    let repository = session.open()?;
    let rows: Vec<Line> = repository.slots()?.iter().map(key_line).collect();
    session.report.table(&rows);
    Ok(None)
}

fn add(out: Option<&Path>, label: Option<&str>, dry_run: bool, session: &mut Session) -> Done {
    let file = out.map(|path| session.doors.directory.join(path));
    file.as_deref().map_or(Ok(()), |path| refuse_existing_file(path, "the key"))?;
    let repository = session.open()?;
    if dry_run {
        let how =
            file.map_or("a passphrase".to_owned(), |path| format!("the new key file {}", path.display()));
        return would(session, &format!("{how} opens the repository {}", repository.location()));
    }
    let slot = match file {
        Some(path) => {
            let label = label.unwrap_or("key file");
            new_key_file(session, repository.ring(), &repository.family(), &path, label)?
        }
        None => {
            // The one in the environment may be how the repository was just opened; the new one is asked for.
            session.doors.environment.passphrase = Passphrase::default();
            let passphrase = secrets::new_passphrase(&mut session.doors)?;
            let about = About { label: label.unwrap_or("passphrase").to_owned(), created: session.now() };
            slot::seal_with_passphrase(repository.ring(), &about, &passphrase, Cost::default())?
        }
    };
    repository.add_slot(&slot)?;
    session.report.table(&[key_line(&slot::read_header(&slot)?)]);
    Ok(None)
}

fn remove(id: &str, yes: bool, dry_run: bool, session: &mut Session) -> Done {
    let repository = session.open()?;
    let slots = repository.slots()?;
    let header = one_of(id, &slots, |header| header.slot)?;
    let question = format!("Remove the key {} {:?}", header.slot, header.about.label);
    if dry_run {
        return would(session, &question);
    }
    session.confirm(yes, &question)?;
    repository.remove_slot(&header.slot)?;
    session.report.say("Removed. Whoever copied the sealed key before can still open it with that secret.");
    Ok(None)
}

/// The only one whose id starts with `start`.
fn one_of<'a, T>(start: &str, all: &'a [T], id: impl Fn(&T) -> Id16) -> Result<&'a T> {
    let start = start.to_ascii_lowercase();
    let mut found = all.iter().filter(|one| id(one).to_string().starts_with(&start));
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        (None, _) => Err(Error::new(Code::NotFound, format!("nothing has an id that starts with {start:?}"))
            .hint("`list` shows what there is")),
        (Some(_), Some(_)) => {
            Err(Error::new(Code::Usage, format!("{start:?} can mean several")).hint("write more of the id"))
        }
    }
}

/// How a kit is given to several people.
#[derive(Clone, Copy)]
struct Shared {
    pages: u8,
    needed: u8,
}

fn kit(out: Option<&Path>, shared: Option<Shared>, dry_run: bool, session: &mut Session) -> Done {
    let file = out.map(|path| session.doors.directory.join(path));
    let numbers = shared.map_or(0..=0, |shared| 1..=shared.pages);
    let files: Option<Vec<PathBuf>> =
        file.map(|file| numbers.map(|number| page_file(&file, number)).collect());
    for path in files.iter().flatten() {
        refuse_existing_file(path, "the recovery kit")?;
    }
    let repository = session.open()?;
    if dry_run {
        return would(
            session,
            &format!("one more recovery kit opens the repository {}", repository.location()),
        );
    }
    let created = session.now();
    let kit = Kit::generate(&repository.family())?;
    let page = Page { location: &repository.location(), made: created, label: KIT_LABEL };
    let pages = match shared {
        None => vec![kit.print(&page)],
        Some(Shared { pages, needed }) => {
            let shares = Share::split(&kit, pages, needed)?;
            shares.iter().map(|share| share.print(&page)).collect()
        }
    };
    let slot = kit.seal_slot(repository.ring(), &About { label: KIT_LABEL.to_owned(), created })?;
    repository.add_slot(&slot)?;
    for (number, text) in pages.iter().enumerate() {
        let file = files.as_ref().and_then(|files| files.get(number));
        hand_over_kit(session, text, file.map(PathBuf::as_path))?;
    }
    session.report.say("Earlier kits stay valid until removed: mainstay key list, mainstay key remove ID");
    Ok(None)
}

/// The file of a page: `kit-2.txt` for the second one of `kit.txt`; 0 is the whole kit.
fn page_file(file: &Path, number: u8) -> PathBuf {
    let Some(stem) = file.file_stem().filter(|_| number > 0) else { return file.to_owned() };
    let mut name = stem.to_owned();
    name.push(format!("-{number}"));
    if let Some(ending) = file.extension() {
        name.push(".");
        name.push(ending);
    }
    file.with_file_name(name)
}

fn test(session: &mut Session) -> Done {
    let repository = session.open()?;
    let stats = repository.stats();
    session.report.line(&Line::Repository(lines::Repository {
        repository: repository.family().to_string(),
        location: repository.location(),
        points: stats.points,
        stored_bytes: stats.pack_bytes,
    }));
    let powers = repository.ring().powers();
    session.report.say(&format!("This key opens the repository. Its powers: {powers}."));
    Ok(None)
}

fn writer_line(writer: &WriterInfo, file: Option<&Path>) -> Line {
    let (file, file_base64) = lines::exact_file(file);
    Line::Writer(lines::Writer {
        writer: writer.id.to_string(),
        name: writer.name.clone(),
        powers: writer.powers.to_string(),
        revoked: writer.powers == Powers::default(),
        file,
        file_base64,
    })
}

fn add_writer(name: &str, out: &Path, dry_run: bool, session: &mut Session) -> Done {
    let repository = session.open()?;
    if repository.writers().iter().any(|writer| writer.name == name) {
        return Err(Error::new(Code::AlreadyExists, format!("there is a writer {name:?} already"))
            .hint("choose another name"));
    }
    let path = session.doors.directory.join(out);
    refuse_existing_file(&path, "the credential")?;
    if dry_run {
        return would(session, &format!("the new writer {name:?} gets its credential in {}", path.display()));
    }
    let ring = repository.add_writer(name, Role::WriteOnly)?;
    secrets::write_private(&path, &credential::encode(&ring))?;
    let writers = repository.writers();
    let writer = writers.iter().find(|writer| writer.name == name);
    let writer = writer.ok_or_else(|| Error::bug("a writer that was just added is not there"))?;
    session.report.table(&[writer_line(writer, Some(&path))]);
    session.report.say(&format!(
        "Move {} to the client. There: mainstay -r {} --key-file FILE backup PATH",
        path.display(),
        repository.location()
    ));
    Ok(None)
}

fn revoke(writer: &str, yes: bool, dry_run: bool, session: &mut Session) -> Done {
    let repository = session.open()?;
    let writers = repository.writers();
    let chosen = match writers.iter().find(|known| known.name == writer) {
        Some(known) => known,
        None => one_of(writer, &writers, |known| known.id)?,
    };
    let question = format!("Revoke the writer {:?}", chosen.name);
    if dry_run {
        return would(session, &question);
    }
    session.confirm(yes, &question)?;
    repository.revoke_writer(&chosen.id)?;
    let now = repository.writers();
    let rows: Vec<Line> =
        now.iter().filter(|known| known.id == chosen.id).map(|known| writer_line(known, None)).collect();
    session.report.table(&rows);
    Ok(None)
}

fn writers(session: &mut Session) -> Done {
    let repository = session.open()?;
    let rows: Vec<Line> = repository.writers().iter().map(|writer| writer_line(writer, None)).collect();
    session.report.table(&rows);
    Ok(None)
}
