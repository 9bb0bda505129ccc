//! Before any block moves: greeting, TLS, and the haggling about options.

use std::io::{Read as _, Write as _};
use std::sync::Arc;

use mainstay_core::{Code, Error, Result};
use rustls::Connection;

use super::session::Session;
use super::{Description, ExportInfo, export_info};
use crate::stream::Stream;
use crate::wire::{
    self, ALLOCATION, FIXED_NEWSTYLE, Fields, NO_ZEROES, OPTION_MAX, flag, info, option, put_string, reply,
    violation,
};

/// No server has more to say to one option than this many replies: so many exports, or contexts.
const REPLIES_MAX: usize = 4096;

/// A connection that haggles.
pub(super) struct Handshake {
    stream: Stream,
}

/// How a server ended its answer to an option.
enum Answer {
    Yes,
    No { kind: u32, message: String },
}

impl Handshake {
    pub(super) fn greet(stream: Stream) -> Result<Self> {
        let mut handshake = Self { stream };
        let mut greeting = [0; 16];
        handshake.read(&mut greeting)?;
        if &greeting[..8] != wire::GREETING {
            return Err(violation("it does not greet as an NBD server"));
        }
        if &greeting[8..] != wire::OPTION_MAGIC {
            return Err(Error::new(Code::Unsupported, "the server speaks only the oldest form of NBD"));
        }
        let mut flags = [0; 2];
        handshake.read(&mut flags)?;
        let flags = u16::from_be_bytes(flags);
        if flags & FIXED_NEWSTYLE == 0 {
            return Err(Error::new(Code::Unsupported, "the server speaks only an old form of NBD"));
        }
        let ours = FIXED_NEWSTYLE | (flags & NO_ZEROES);
        handshake.write(&u32::from(ours).to_be_bytes())?;
        Ok(handshake)
    }

    pub(super) fn start_tls(&mut self, connection: Connection) -> Result<()> {
        self.insist("TLS", option::STARTTLS, &[], |_, _| Ok(()))?;
        self.stream.start_tls(connection).map_err(|error| {
            Error::io("TLS was not agreed on", error)
                .hint("check the certificates, and the authorities that each side believes")
        })
    }

    pub(super) fn list(&mut self) -> Result<Vec<Description>> {
        let mut listed = Vec::new();
        self.insist("the list of exports", option::LIST, &[], |kind, mut fields| {
            if kind == reply::SERVER {
                listed.push(Description { name: fields.string()?, text: fields.rest()? });
            }
            Ok(())
        })?;
        Ok(listed)
    }

    pub(super) fn describe(&mut self, export: &str) -> Result<ExportInfo> {
        let structured = self.structured()?;
        let mut info = self.about(option::INFO, export)?;
        if structured {
            let mut data = Vec::new();
            put_string(&mut data, export);
            data.extend(0_u32.to_be_bytes());
            let contexts = &mut info.contexts;
            // Servers without contexts may say that they do not know the option.
            self.ask(option::LIST_META_CONTEXT, &data, |kind, mut fields| {
                if kind == reply::META_CONTEXT {
                    let _meaningless = fields.u32()?;
                    contexts.push(fields.rest()?);
                }
                Ok(())
            })?;
        }
        Ok(info)
    }

    /// Enters the transmission phase with those of `contexts` that the server has: `base:allocation`, and at most one
    /// other, which says what changed.
    pub(super) fn go(mut self, export: &str, contexts: &[&str]) -> Result<Session> {
        let structured = self.structured()?;
        let selected = if structured { self.select(export, contexts)? } else { Vec::new() };
        let info = self.about(option::GO, export)?;
        let id = |allocation: bool| {
            let (id, _) = selected.iter().find(|(_, name)| (name == ALLOCATION) == allocation)?;
            Some(*id)
        };
        Ok(Session::new(self.stream, Arc::new(info), structured, id(true), id(false)))
    }

    /// Leaves, as well as that can be done without waiting.
    pub(super) fn abort(mut self) {
        let _best_effort = self.send(option::ABORT, &[]);
        self.stream.close();
    }

    fn structured(&mut self) -> Result<bool> {
        self.ask(option::STRUCTURED_REPLY, &[], |_, _| Ok(())).map(|answer| matches!(answer, Answer::Yes))
    }

    fn select(&mut self, export: &str, contexts: &[&str]) -> Result<Vec<(u32, String)>> {
        let mut data = Vec::new();
        put_string(&mut data, export);
        data.extend(u32::try_from(contexts.len()).unwrap_or(0).to_be_bytes());
        contexts.iter().for_each(|context| put_string(&mut data, context));
        let mut selected: Vec<(u32, String)> = Vec::new();
        let answer = self.ask(option::SET_META_CONTEXT, &data, |kind, mut fields| {
            if kind != reply::META_CONTEXT {
                return Ok(());
            }
            let (id, name) = (fields.u32()?, fields.rest()?);
            let twice = selected.iter().any(|(known, other)| *known == id || *other == name);
            if twice || !contexts.contains(&name.as_str()) {
                return Err(violation("it selects a context twice, or one that was not asked for"));
            }
            selected.push((id, name));
            Ok(())
        })?;
        Ok(if matches!(answer, Answer::Yes) { selected } else { Vec::new() })
    }

    /// What [`option::INFO`] or [`option::GO`] tell.
    fn about(&mut self, option: u32, export: &str) -> Result<ExportInfo> {
        let mut data = Vec::new();
        put_string(&mut data, export);
        data.extend(2_u16.to_be_bytes());
        data.extend(info::DESCRIPTION.to_be_bytes());
        data.extend(info::BLOCK_SIZE.to_be_bytes());
        let (mut about, mut text, mut sizes) = (None, String::new(), None);
        self.insist("the export", option, &data, |kind, mut fields| {
            if kind != reply::INFO {
                return Ok(());
            }
            match fields.u16()? {
                info::EXPORT => about = Some(export_info(fields.u64()?, fields.u16()?)),
                info::DESCRIPTION => text = fields.rest()?,
                info::BLOCK_SIZE => {
                    let smallest = fields.u32()?;
                    let _preferred = fields.u32()?;
                    sizes = Some((smallest, fields.u32()?));
                }
                _ => {}
            }
            Ok(())
        })?;
        let mut about = about.ok_or_else(|| violation("it tells nothing about the export"))?;
        about.text = text;
        if let Some((smallest, largest)) = sizes {
            if !smallest.is_power_of_two() || smallest > 1 << 16 || largest < smallest {
                return Err(violation("its block sizes are impossible"));
            }
            about.block_size = smallest;
            // No request of ours is longer than what every server should accept.
            about.payload_max = about.payload_max.min(largest / smallest * smallest);
        }
        if !about.can(flag::HAS_FLAGS) || !about.size.is_multiple_of(about.block_size.into()) {
            return Err(violation("its description of the export is impossible"));
        }
        Ok(about)
    }

    /// Like [`Self::ask`], and no is an error.
    fn insist(
        &mut self,
        what: &str,
        option: u32,
        data: &[u8],
        each: impl FnMut(u32, Fields<'_>) -> Result<()>,
    ) -> Result<()> {
        match self.ask(option, data, each)? {
            Answer::Yes => Ok(()),
            Answer::No { kind, message } => Err(refusal(what, kind, &message)),
        }
    }

    /// Sends an option and hands each reply but the last to `each`.
    fn ask(
        &mut self,
        option: u32,
        data: &[u8],
        mut each: impl FnMut(u32, Fields<'_>) -> Result<()>,
    ) -> Result<Answer> {
        self.send(option, data)?;
        for _ in 0..REPLIES_MAX {
            let mut head = [0; 20];
            self.read(&mut head)?;
            let mut fields = Fields(&head);
            if fields.u64()? != wire::OPTION_REPLY_MAGIC || fields.u32()? != option {
                return Err(violation("an answer does not belong to the question"));
            }
            let (kind, len) = (fields.u32()?, fields.u32()? as usize);
            if len > OPTION_MAX {
                return Err(violation("an answer to an option is too long"));
            }
            let mut data = vec![0; len];
            self.read(&mut data)?;
            match kind {
                reply::ACK => return Ok(Answer::Yes),
                kind if kind & reply::ERROR != 0 => {
                    let message = String::from_utf8_lossy(&data).chars().take(500).collect();
                    return Ok(Answer::No { kind, message });
                }
                kind => each(kind, Fields(&data))?,
            }
        }
        Err(violation("its answer to an option has no end"))
    }

    fn send(&mut self, option: u32, data: &[u8]) -> Result<()> {
        let mut bytes = wire::OPTION_MAGIC.to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend(data);
        self.write(&bytes)
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.stream.read_exact(buffer).map_err(|error| Error::io("the server ended the handshake", error))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).map_err(|error| Error::io("the server ended the handshake", error))
    }
}

fn refusal(what: &str, kind: u32, message: &str) -> Error {
    let (code, why) = match kind {
        reply::UNSUPPORTED => (Code::Unsupported, "does not know how to give"),
        reply::POLICY => (Code::Refused, "is not allowed to give"),
        reply::TLS_REQUIRED => (Code::Refused, "insists on TLS before it gives"),
        reply::UNKNOWN => (Code::NotFound, "does not have"),
        reply::SHUTDOWN => (Code::Io, "is going down and does not give"),
        _ => (Code::Io, "does not give"),
    };
    let error = Error::new(code, format!("the server {why} {what}"));
    let error = match message.trim() {
        "" => error,
        said => error.because(format!("it says: {}", said.escape_debug())),
    };
    match kind {
        reply::TLS_REQUIRED => error.hint("connect with TLS"),
        _ => error,
    }
}
