//! Haggling with a client until it has chosen an export, or has gone.

use std::io::{Read as _, Write as _};

use mainstay_core::{Error, Result};

use super::ServerOptions;
use super::export::{Export, find};
use crate::stream::Stream;
use crate::wire::{
    self, ALLOCATION, FIXED_NEWSTYLE, Fields, NO_ZEROES, OPTION_MAX, info, option, put_string, reply,
    violation,
};

/// A client that sends more options than this does not want an export.
const OPTIONS_MAX: usize = 1000;
/// A client that asks for more contexts in one option is refused.
const QUERIES_MAX: u32 = 64;
/// What requests are best aligned to, in bytes.
const PREFERRED_BLOCK: u32 = 4096;
/// The number of `base:allocation`, our only context.
pub(super) const ALLOCATION_ID: u32 = 1;

/// What a client has agreed on.
pub(super) struct Chosen {
    /// Which export.
    pub(super) index: usize,
    pub(super) structured: bool,
    pub(super) allocation: bool,
}

pub(super) struct Handshake<'a> {
    stream: &'a mut Stream,
    exports: &'a [Export],
    options: &'a ServerOptions,
    no_zeroes: bool,
    structured: bool,
    /// For which export `base:allocation` was selected last.
    allocation: Option<usize>,
}

enum Next {
    Option,
    Chosen(usize),
    Gone,
}

impl<'a> Handshake<'a> {
    pub(super) fn new(stream: &'a mut Stream, exports: &'a [Export], options: &'a ServerOptions) -> Self {
        Self { stream, exports, options, no_zeroes: false, structured: false, allocation: None }
    }

    /// `None` when the client left politely.
    pub(super) fn run(mut self) -> Result<Option<Chosen>> {
        let mut greeting = wire::GREETING.to_vec();
        greeting.extend(wire::OPTION_MAGIC);
        greeting.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        self.write(&greeting)?;
        let flags = Fields(&self.read(4)?).u32()?;
        if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Err(violation("a client has flags that nobody knows"));
        }
        self.no_zeroes = flags & u32::from(NO_ZEROES) != 0;
        for _ in 0..OPTIONS_MAX {
            match self.option()? {
                Next::Option => {}
                Next::Gone => return Ok(None),
                Next::Chosen(index) => {
                    let allocation = self.allocation == Some(index);
                    return Ok(Some(Chosen { index, structured: self.structured, allocation }));
                }
            }
        }
        Err(violation("a client haggles without end"))
    }

    fn option(&mut self) -> Result<Next> {
        let head = self.read(16)?;
        let mut fields = Fields(&head);
        if fields.bytes(8)? != wire::OPTION_MAGIC {
            return Err(violation("an option does not begin as one"));
        }
        let (option, len) = (fields.u32()?, fields.u32()? as usize);
        if len > OPTION_MAX {
            return Err(violation("an option is too long"));
        }
        let data = self.read(len)?;
        let insecure = self.options.tls.is_some() && !self.stream.is_tls();
        match option {
            option::ABORT => {
                // It may have gone without waiting for this.
                let _best_effort = self.reply(option, reply::ACK, &[]);
                return Ok(Next::Gone);
            }
            option::STARTTLS => self.start_tls(&data)?,
            option::EXPORT_NAME if insecure => return Err(violation("a client does without TLS")),
            _ if insecure => self.reply(option, reply::TLS_REQUIRED, b"this server insists on TLS")?,
            option::EXPORT_NAME => return self.export_name(&data),
            option::INFO | option::GO => return self.about(option, &data),
            option::LIST if data.is_empty() => self.list()?,
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                self.reply(option, reply::ACK, &[])?;
            }
            option::LIST | option::STRUCTURED_REPLY => self.reply(option, reply::INVALID, &[])?,
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(option, &data)?,
            _ => self.reply(option, reply::UNSUPPORTED, &[])?,
        }
        Ok(Next::Option)
    }

    fn start_tls(&mut self, data: &[u8]) -> Result<()> {
        let Some(tls) = &self.options.tls else {
            return self.reply(option::STARTTLS, reply::POLICY, b"this server has no certificate");
        };
        if self.stream.is_tls() || !data.is_empty() {
            return self.reply(option::STARTTLS, reply::INVALID, &[]);
        }
        let connection = tls.connection()?;
        self.reply(option::STARTTLS, reply::ACK, &[])?;
        self.stream.start_tls(connection).map_err(|error| Error::io("TLS was not agreed on", error))?;
        // What was agreed on before may have been said by somebody else.
        (self.structured, self.allocation) = (false, None);
        Ok(())
    }

    fn list(&mut self) -> Result<()> {
        for export in self.exports.iter().filter(|export| !export.is_hidden()) {
            let mut data = Vec::new();
            put_string(&mut data, export.name());
            data.extend(export.description().as_bytes());
            self.reply(option::LIST, reply::SERVER, &data)?;
        }
        self.reply(option::LIST, reply::ACK, &[])
    }

    /// The oldest way to choose. It has no way to say no.
    fn export_name(&mut self, data: &[u8]) -> Result<Next> {
        let name = Fields(data).rest()?;
        let (index, export) =
            find(self.exports, &name).ok_or_else(|| violation("a client wants what is not there"))?;
        let mut about = export.blocks().size().to_be_bytes().to_vec();
        about.extend(export.flags(self.structured).to_be_bytes());
        if !self.no_zeroes {
            about.extend([0; 124]);
        }
        self.write(&about)?;
        Ok(Next::Chosen(index))
    }

    fn about(&mut self, option: u32, data: &[u8]) -> Result<Next> {
        let Ok((name, wanted)) = read_about(data) else {
            self.reply(option, reply::INVALID, &[])?;
            return Ok(Next::Option);
        };
        let Some((index, export)) = find(self.exports, &name) else {
            self.reply(option, reply::UNKNOWN, b"there is no such export")?;
            return Ok(Next::Option);
        };
        let mut about = info::EXPORT.to_be_bytes().to_vec();
        about.extend(export.blocks().size().to_be_bytes());
        about.extend(export.flags(self.structured).to_be_bytes());
        self.reply(option, reply::INFO, &about)?;
        if wanted.contains(&info::DESCRIPTION) && !export.description().is_empty() {
            let mut text = info::DESCRIPTION.to_be_bytes().to_vec();
            text.extend(export.description().as_bytes());
            self.reply(option, reply::INFO, &text)?;
        }
        let mut sizes = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [1, PREFERRED_BLOCK, self.options.payload_max.max(PREFERRED_BLOCK)] {
            sizes.extend(size.to_be_bytes());
        }
        self.reply(option, reply::INFO, &sizes)?;
        self.reply(option, reply::ACK, &[])?;
        Ok(if option == option::GO { Next::Chosen(index) } else { Next::Option })
    }

    fn contexts(&mut self, option: u32, data: &[u8]) -> Result<()> {
        let selecting = option == option::SET_META_CONTEXT;
        if selecting {
            self.allocation = None;
        }
        let Some((name, queries)) = read_contexts(data).ok().filter(|_| self.structured) else {
            return self.reply(option, reply::INVALID, &[]);
        };
        let Some((index, _)) = find(self.exports, &name) else {
            return self.reply(option, reply::UNKNOWN, b"there is no such export");
        };
        let Some(queries) = queries else {
            return self.reply(option, reply::TOO_BIG, &[]);
        };
        let all = !selecting && (queries.is_empty() || queries.iter().any(|query| query == "base:"));
        if all || queries.iter().any(|query| query == ALLOCATION) {
            let mut context = if selecting { ALLOCATION_ID } else { 0 }.to_be_bytes().to_vec();
            context.extend(ALLOCATION.as_bytes());
            self.reply(option, reply::META_CONTEXT, &context)?;
            if selecting {
                self.allocation = Some(index);
            }
        }
        self.reply(option, reply::ACK, &[])
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> Result<()> {
        let mut bytes = wire::OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend(data);
        self.write(&bytes)
    }

    /// `len` has been checked.
    fn read(&mut self, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).map_err(|error| Error::io("a client left", error))?;
        Ok(bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).map_err(|error| Error::io("a client left", error))
    }
}

/// The name of an export, and the kinds of information that are wanted.
fn read_about(data: &[u8]) -> Result<(String, Vec<u16>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u16()?;
    let wanted = (0..count).map(|_| fields.u16()).collect::<Result<_>>()?;
    match fields.0 {
        [] => Ok((name, wanted)),
        _ => Err(violation("an option is too long")),
    }
}

/// The name of an export, and the contexts that are asked for unless they are too many.
fn read_contexts(data: &[u8]) -> Result<(String, Option<Vec<String>>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u32()?;
    if count > QUERIES_MAX {
        return Ok((name, None));
    }
    let queries = (0..count).map(|_| fields.string()).collect::<Result<_>>()?;
    match fields.0 {
        [] => Ok((name, Some(queries))),
        _ => Err(violation("an option is too long")),
    }
}
