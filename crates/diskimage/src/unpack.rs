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

#[cfg(test)]
mod tests {
    use super::{deflate, zlib, zstd};

    const CONTENT: [u8; 1000] = [7; 1000];

    fn check(unpack: impl Fn(&[u8], &mut [u8]) -> bool, packed: &[u8]) {
        let [mut short, mut exact, mut long] = [999, 1000, 1001].map(|length| vec![0; length]);
        assert!(!unpack(packed, &mut short) && !unpack(packed, &mut long));
        assert!(unpack(&[packed, b"what was there before"].concat(), &mut exact));
        assert_eq!(exact, CONTENT);
        assert!(!unpack(&packed[..packed.len() - 1], &mut exact));
    }

    #[test]
    fn what_unpacks_to_less_or_more_than_it_should_is_damage() {
        let frame = ::zstd::bulk::compress(&CONTENT, 3).unwrap();
        check(|stored, whole| zstd(stored, whole).is_ok(), &frame);
        let raw = miniz_oxide::deflate::compress_to_vec(&CONTENT, 6);
        check(|stored, whole| deflate(stored, whole).is_ok(), &raw);
        let wrapped = miniz_oxide::deflate::compress_to_vec_zlib(&CONTENT, 6);
        check(|stored, whole| zlib(stored, whole, whole.len()).is_ok(), &wrapped);
    }
}
