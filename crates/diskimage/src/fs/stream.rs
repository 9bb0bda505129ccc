//! The content of a file from front to back.

use std::sync::Arc;

use mainstay_core::{Error, Piece, Result, StreamEnd, StreamReader};

use super::Content;

/// Reads a [`Content`] from its beginning to its size, and never anything shorter.
pub struct Stream {
    content: Arc<dyn Content>,
    offset: u64,
}

impl Stream {
    pub fn new(content: Arc<dyn Content>) -> Self {
        Self { content, offset: 0 }
    }
}

impl StreamReader for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Piece> {
        let left = self.content.size().saturating_sub(self.offset);
        if left == 0 {
            return Ok(Piece::End);
        }
        let piece = self.content.read(self.offset, buffer)?;
        let length = match piece {
            Piece::Data(length) => length as u64,
            Piece::Hole(length) => length,
            Piece::End => 0,
        };
        if length == 0 || length > left {
            let size = self.content.size();
            let what = format!("the content ends at {} bytes, the file has {size}", self.offset + length);
            return Err(Error::integrity(what));
        }
        self.offset += length;
        Ok(piece)
    }

    fn finish(self: Box<Self>) -> Result<StreamEnd> {
        Ok(StreamEnd::Steady)
    }
}
