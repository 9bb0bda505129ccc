//! The parent's side: a file system whose parser is another process, which is believed nothing.

use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use mainstay_core::{Blocks, Error, Metadata, Piece, Result};

use super::Process;
use super::wire::{Fields, Link, PIECE_MAX, Parsed, nonsense, reply, request};
use crate::fs::{About, Content, FileExtent, FileSystem, Listing, Node, Opened, Page, Visitor, check_name};

/// Extents of one file that are taken: as many as the parsers themselves give.
const EXTENTS_MAX: usize = 1 << 22;

pub(super) fn open(process: Process, socket: UnixStream, volume: Arc<dyn Blocks>) -> Result<Opened> {
    let size = volume.size();
    let talk =
        Talk { state: Mutex::new(State::Talking { link: Link::new(socket), _process: process }), volume };
    let told = talk.ask(request::OPEN, &Fields::default().u64(size))?;
    let mut told = Parsed(&told);
    if !told.flag()? {
        return Ok(Opened::Other(told.other()?));
    }
    let (about, root) = (told.about()?, told.node()?);
    if about.size > size {
        return Err(nonsense());
    }
    Ok(Opened::FileSystem(Arc::new(Remote { talk: Arc::new(talk), about, root })))
}

struct Remote {
    talk: Arc<Talk>,
    about: About,
    root: Node,
}

/// The connection to the parser and what it may read.
struct Talk {
    state: Mutex<State>,
    volume: Arc<dyn Blocks>,
}

enum State {
    Talking {
        link: Link,
        /// Ends with this value.
        _process: Process,
    },
    /// It broke the rules or died; why.
    Over(String),
}

impl Talk {
    fn ask(&self, kind: u8, fields: &Fields) -> Result<Vec<u8>> {
        self.ask_for_each(kind, fields, &mut |_| Err(nonsense()))
    }

    /// Asks, gives the parser the bytes it wants, and passes on what it shows. After an error of the connection, or of
    /// `found`, it is over: nobody knows what the parser would say next.
    fn ask_for_each(
        &self,
        kind: u8,
        fields: &Fields,
        found: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<Vec<u8>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let link = match &mut *state {
            State::Talking { link, .. } => link,
            State::Over(why) => return Err(Error::integrity(why.clone())),
        };
        match self.converse(link, kind, fields, found) {
            Ok(answer) => answer,
            Err(error) => {
                *state = State::Over(error.chain().join(": "));
                Err(error)
            }
        }
    }

    /// The outer result is the conversation's, the inner one what the parser answers.
    fn converse(
        &self,
        link: &mut Link,
        kind: u8,
        fields: &Fields,
        found: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<Result<Vec<u8>>> {
        link.send(kind, &fields.0)?;
        loop {
            let (kind, body) = link.receive()?;
            match kind {
                reply::DONE => return Ok(Ok(body)),
                reply::FAILED => return Ok(Err(Parsed(&body).error()?)),
                reply::WANTS => match self.read(&mut Parsed(&body)) {
                    Ok(bytes) => link.send(reply::DONE, &bytes)?,
                    Err(error) => link.send(reply::FAILED, &Fields::default().error(&error).0)?,
                },
                reply::FOUND => {
                    found(&body)?;
                    link.send(reply::DONE, &[])?;
                }
                _ => return Err(nonsense()),
            }
        }
    }

    fn read(&self, wanted: &mut Parsed<'_>) -> Result<Vec<u8>> {
        let (offset, length) = (wanted.u64()?, wanted.u32()? as usize);
        if length > PIECE_MAX || offset.checked_add(length as u64).is_none_or(|end| end > self.volume.size())
        {
            return Err(nonsense());
        }
        let mut bytes = vec![0; length];
        self.volume.read_at(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Refuses extents that do not lie on the volume.
    fn check(&self, extents: &[FileExtent]) -> Result<()> {
        let size = self.volume.size();
        let fits = |extent: &FileExtent| {
            let end = extent.volume_offset.checked_add(extent.length);
            extent.file_offset.checked_add(extent.length).is_some() && end.is_some_and(|end| end <= size)
        };
        if extents.iter().all(fits) { Ok(()) } else { Err(nonsense()) }
    }
}

impl FileSystem for Remote {
    fn about(&self) -> &About {
        &self.about
    }

    fn root(&self) -> Node {
        self.root
    }

    fn child(&self, directory: Node, name: &[u8]) -> Result<Option<Node>> {
        let told = self.talk.ask(request::CHILD, &Fields::default().node(directory).bytes(name))?;
        let mut told = Parsed(&told);
        if told.flag()? { told.node().map(Some) } else { Ok(None) }
    }

    fn read_dir(&self, directory: Node, from: u64, limit: usize) -> Result<Page> {
        let (limit, fields) = asked_page(directory, from, limit);
        let told = self.talk.ask(request::READ_DIR, &fields)?;
        check_page(Parsed(&told).page()?, from, limit)
    }

    fn list(&self, directory: Node, from: u64, limit: usize) -> Result<Listing> {
        let (limit, fields) = asked_page(directory, from, limit);
        let told = self.talk.ask(request::LIST, &fields)?;
        let Listing { page, metadata } = Parsed(&told).listing()?;
        Ok(Listing { page: check_page(page, from, limit)?, metadata })
    }

    fn metadata(&self, node: Node) -> Result<Metadata> {
        let told = self.talk.ask(request::METADATA, &Fields::default().node(node))?;
        Parsed(&told).metadata()
    }

    fn content(&self, file: Node) -> Result<Arc<dyn Content>> {
        let told = self.talk.ask(request::CONTENT, &Fields::default().node(file))?;
        let mut told = Parsed(&told);
        let (file, size) = (told.u64()?, told.u64()?);
        Ok(Arc::new(RemoteContent { talk: self.talk.clone(), file, size }))
    }

    fn extents(&self, file: Node) -> Result<Vec<FileExtent>> {
        let mut extents = Vec::new();
        self.talk.ask_for_each(request::EXTENTS, &Fields::default().node(file), &mut |body| {
            let batch = Parsed(body).extents()?;
            self.talk.check(&batch)?;
            extents.extend(batch);
            if extents.len() > EXTENTS_MAX { Err(nonsense()) } else { Ok(()) }
        })?;
        Ok(extents)
    }

    fn free(&self, visit: &mut dyn FnMut(Range<u64>) -> Result<()>) -> Result<()> {
        let size = self.talk.volume.size();
        self.talk.ask_for_each(request::FREE, &Fields::default(), &mut |body| {
            let mut told = Parsed(body);
            while !told.is_empty() {
                let range = told.u64()?..told.u64()?;
                if range.start >= range.end || range.end > size {
                    return Err(nonsense());
                }
                visit(range)?;
            }
            Ok(())
        })?;
        Ok(())
    }

    fn files(&self, visit: &mut Visitor<'_>) -> Result<()> {
        self.talk.ask_for_each(request::FILES, &Fields::default(), &mut |body| {
            let mut told = Parsed(body);
            while !told.is_empty() {
                let node = told.node()?;
                let extents = told.extents()?;
                self.talk.check(&extents)?;
                visit(node, &extents)?;
            }
            Ok(())
        })?;
        Ok(())
    }
}

/// The limit that is kept, and the question.
fn asked_page(directory: Node, from: u64, limit: usize) -> (usize, Fields) {
    // What fits one frame, however long the names are.
    let limit = limit.clamp(1, 8192);
    (limit, Fields::default().node(directory).u64(from).u32(limit as u32))
}

fn check_page(page: Page, from: u64, limit: usize) -> Result<Page> {
    page.entries.iter().try_for_each(|entry| check_name(&entry.name))?;
    if page.entries.len() > limit || page.next.is_some_and(|next| next <= from) {
        return Err(nonsense());
    }
    Ok(page)
}

/// A file that the parser holds open.
struct RemoteContent {
    talk: Arc<Talk>,
    file: u64,
    size: u64,
}

impl Content for RemoteContent {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Piece> {
        let left = self.size.saturating_sub(offset);
        if left == 0 || buffer.is_empty() {
            return Ok(Piece::End);
        }
        let length = buffer.len().min(PIECE_MAX).min(usize::try_from(left).unwrap_or(usize::MAX));
        let fields = Fields::default().u64(self.file).u64(offset).u32(length as u32);
        let told = self.talk.ask(request::READ, &fields)?;
        let mut told = Parsed(&told);
        match told.u8()? {
            1 => {
                let bytes = told.bytes()?;
                if bytes.is_empty() || bytes.len() > length {
                    return Err(nonsense());
                }
                buffer[..bytes.len()].copy_from_slice(&bytes);
                Ok(Piece::Data(bytes.len()))
            }
            2 => match told.u64()? {
                hole if hole > 0 && hole <= left => Ok(Piece::Hole(hole)),
                _ => Err(nonsense()),
            },
            _ => Err(nonsense()),
        }
    }
}

impl Drop for RemoteContent {
    fn drop(&mut self) {
        // If it is over, nothing is open there any more.
        let _closed = self.talk.ask(request::CLOSE, &Fields::default().u64(self.file));
    }
}
