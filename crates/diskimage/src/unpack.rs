//! Compressed parts of images. The unpacked length is always known before, so that nothing can swell.

use mainstay_core::{Error, Result};
use miniz_oxide::inflate::decompress_slice_iter_to_slice;

/// Fills `whole` from a raw deflate stream; what follows the stream is not looked at.
pub(crate) fn deflate(stored: &[u8], whole: &mut [u8]) -> Result<()> {
    let length = inflate(stored, whole, false)?;
    full(length, whole.len())
}

/// Fills at least `least` bytes of `whole` from a zlib stream.
pub(crate) fn zlib(stored: &[u8], whole: &mut [u8], least: usize) -> Result<()> {
    let length = inflate(stored, whole, true)?;
    if length >= least { Ok(()) } else { full(length, least) }
}

fn inflate(stored: &[u8], whole: &mut [u8], zlib: bool) -> Result<usize> {
    decompress_slice_iter_to_slice(whole, std::iter::once(stored), zlib, false)
        .map_err(|status| Error::integrity(format!("compressed data does not unpack ({status:?})")))
}

/// Fills `whole` from zstd frames; what follows them is not looked at.
pub(crate) fn zstd(stored: &[u8], whole: &mut [u8]) -> Result<()> {
    let failed = |code| {
        Error::integrity(format!(
            "compressed data does not unpack ({})",
            zstd::zstd_safe::get_error_name(code)
        ))
    };
    let (mut stored, mut filled) = (stored, 0);
    while filled < whole.len() && !stored.is_empty() {
        let frame = zstd::zstd_safe::find_frame_compressed_size(stored).map_err(failed)?;
        let (frame, rest) =
            stored.split_at_checked(frame).ok_or_else(|| Error::integrity("a zstd frame is cut short"))?;
        // In one piece into a buffer of known length, zstd needs no window of the frame's choice.
        filled += zstd::zstd_safe::decompress(&mut whole[filled..], frame).map_err(failed)?;
        stored = rest;
    }
    full(filled, whole.len())
}

fn full(length: usize, wanted: usize) -> Result<()> {
    if length == wanted {
        return Ok(());
    }
    Err(Error::integrity(format!("compressed data unpacks to {length} bytes instead of {wanted}")))
}
