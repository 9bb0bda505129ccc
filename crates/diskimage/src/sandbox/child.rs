//! The parser's side: answers one request after the other, and asks the parent for bytes meanwhile.

use std::collections::HashMap;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mainstay_core::{Blocks, Code, Error, Extent, ExtentKind, Piece, Result};

use super::confine::confine;
use super::wire::{BATCH_BYTES, Fields, Link, PIECE_MAX, Parsed, nonsense, reply, request};
use crate::compose::{check_range, extent};
use crate::fs::{self, Content, FileSystem, Opened};

/// Files that may be open at a time.
const OPEN_MAX: usize = 256;

/// Extents in one frame.
const BATCH: usize = 4096;

/// Gives up every power this process has, and parses a file system for the parent at the other end of standard input
/// until that end is closed. Call it in a process that was started for nothing else.
pub fn serve() -> Result<()> {
    let failed = |error| Error::io("this is only started by Mainstay itself", error);
    let socket = std::io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
    let link = Arc::new(Mutex::new(Link::new(UnixStream::from(socket))));
    if let Err(error) = confine() {
        let mut link = lock(&link);
        link.receive()?;
        link.send(reply::FAILED, &Fields::default().error(&error).0)?;
        return Err(error);
    }
    let mut parser = Parser { link, file_system: None, files: HashMap::new(), next: 0 };
    loop {
        // The parent has gone: that is how it ends.
        let Ok((kind, body)) = parser.link().receive() else { return Ok(()) };
        let answer = parser.answer(kind, &mut Parsed(&body));
        let sent = match answer {
            Ok(fields) => parser.link().send(reply::DONE, &fields.0),
            Err(error) => parser.link().send(reply::FAILED, &Fields::default().error(&error).0),
        };
        if let Err(error) = sent {
            parser.link().send(reply::FAILED, &Fields::default().error(&error).0)?;
        }
    }
}

struct Parser {
    link: Arc<Mutex<Link>>,
    file_system: Option<Arc<dyn FileSystem>>,
    files: HashMap<u64, Arc<dyn Content>>,
    next: u64,
}

fn lock(link: &Mutex<Link>) -> MutexGuard<'_, Link> {
    link.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Shows the parent something and waits until it has looked at it.
fn show(link: &Mutex<Link>, fields: Fields) -> Result<()> {
    let mut link = lock(link);
    link.send(reply::FOUND, &fields.0)?;
    match link.receive()? {
        (reply::DONE, _) => Ok(()),
        _ => Err(Error::new(Code::Cancelled, "the parent has seen enough")),
    }
}

/// Shows many small things, as many in a frame as fit.
struct Showing<'a> {
    link: &'a Mutex<Link>,
    fields: Fields,
}

impl<'a> Showing<'a> {
    fn new(link: &'a Mutex<Link>) -> Self {
        Self { link, fields: Fields::default() }
    }

    fn add(&mut self, put: impl FnOnce(Fields) -> Fields) -> Result<()> {
        self.fields = put(std::mem::take(&mut self.fields));
        if self.fields.0.len() < BATCH_BYTES { Ok(()) } else { self.end() }
    }

    /// Shows what is left.
    fn end(&mut self) -> Result<()> {
        let fields = std::mem::take(&mut self.fields);
        if fields.0.is_empty() { Ok(()) } else { show(self.link, fields) }
    }
}

impl Parser {
    fn link(&self) -> MutexGuard<'_, Link> {
        lock(&self.link)
    }

    fn answer(&mut self, kind: u8, asked: &mut Parsed<'_>) -> Result<Fields> {
        let fields = Fields::default();
        if kind == request::OPEN {
            return self.open(asked.u64()?);
        }
        let file_system = self.file_system.clone().ok_or_else(nonsense)?;
        Ok(match kind {
            request::CHILD => {
                let (directory, name) = (asked.node()?, asked.bytes()?);
                match file_system.child(directory, &name)? {
                    Some(node) => fields.u8(1).node(node),
                    None => fields.u8(0),
                }
            }
            request::READ_DIR => {
                let (directory, from, limit) = (asked.node()?, asked.u64()?, asked.u32()?);
                fields.page(&file_system.read_dir(directory, from, limit as usize)?)
            }
            request::LIST => {
                let (directory, from, limit) = (asked.node()?, asked.u64()?, asked.u32()?);
                let page = file_system.read_dir(directory, from, limit as usize)?;
                // One that cannot be read says why when it is asked for by itself.
                fields.listing(&page, &|node| file_system.metadata(node).ok())
            }
            request::METADATA => fields.metadata(&file_system.metadata(asked.node()?)?),
            request::CONTENT => {
                if self.files.len() >= OPEN_MAX {
                    return Err(Error::new(
                        Code::Unsupported,
                        "too many files of one image are open at a time",
                    ));
                }
                let content = file_system.content(asked.node()?)?;
                let size = content.size();
                self.next += 1;
                self.files.insert(self.next, content);
                fields.u64(self.next).u64(size)
            }
            request::READ => self.read(asked)?,
            request::CLOSE => {
                self.files.remove(&asked.u64()?);
                fields
            }
            request::EXTENTS => {
                for batch in file_system.extents(asked.node()?)?.chunks(BATCH) {
                    show(&self.link, Fields::default().extents(batch))?;
                }
                fields
            }
            request::FREE => {
                let mut shown = Showing::new(&self.link);
                file_system.free(&mut |range| shown.add(|fields| fields.u64(range.start).u64(range.end)))?;
                shown.end()?;
                fields
            }
            request::FILES => {
                let mut shown = Showing::new(&self.link);
                file_system.files(&mut |node, extents| {
                    let mut batches = extents.chunks(BATCH);
                    batches.try_for_each(|batch| shown.add(|fields| fields.node(node).extents(batch)))
                })?;
                shown.end()?;
                fields
            }
            _ => return Err(nonsense()),
        })
    }

    fn open(&mut self, size: u64) -> Result<Fields> {
        let volume = Arc::new(Asked { link: self.link.clone(), size });
        let fields = Fields::default();
        Ok(match fs::open(volume)? {
            Opened::Other(other) => fields.u8(0).other(other),
            Opened::FileSystem(file_system) => {
                let fields = fields.u8(1).about(file_system.about()).node(file_system.root());
                self.file_system = Some(file_system);
                fields
            }
        })
    }

    fn read(&self, asked: &mut Parsed<'_>) -> Result<Fields> {
        let (file, offset, length) = (asked.u64()?, asked.u64()?, asked.u32()?);
        let content = self.files.get(&file).ok_or_else(nonsense)?;
        let mut buffer = vec![0; (length as usize).min(PIECE_MAX)];
        let fields = Fields::default();
        Ok(match content.read(offset, &mut buffer)? {
            Piece::Data(length) => fields.u8(1).bytes(&buffer[..length]),
            Piece::Hole(length) => fields.u8(2).u64(length),
            Piece::End => fields.u8(0),
        })
    }
}

/// The volume at the parent's side.
struct Asked {
    link: Arc<Mutex<Link>>,
    size: u64,
}

impl Blocks for Asked {
    fn size(&self) -> u64 {
        self.size
    }

    fn extents(&self, range: std::ops::Range<u64>) -> Result<Vec<Extent>> {
        check_range(self, &range)?;
        Ok(vec![extent(range, ExtentKind::Data)])
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut link = lock(&self.link);
        let mut at = offset;
        for part in buffer.chunks_mut(PIECE_MAX) {
            link.send(reply::WANTS, &Fields::default().u64(at).u32(part.len() as u32).0)?;
            match link.receive()? {
                (reply::DONE, bytes) if bytes.len() == part.len() => part.copy_from_slice(&bytes),
                (reply::FAILED, body) => return Err(Parsed(&body).error()?),
                _ => return Err(nonsense()),
            }
            at += part.len() as u64;
        }
        Ok(())
    }
}
