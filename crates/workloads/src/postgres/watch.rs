//! What is seen of every file of a base backup while it passes by: a digest, for the server's own list of the files
//! (chapter "Backup Manifest Format" of PostgreSQL's documentation), and the checksums of pages.

use std::collections::BTreeMap;

use aws_lc_rs::digest::{Context, SHA256, SHA256_OUTPUT_LEN, digest};
use mainstay_core::{Error, Result};
use serde::Deserialize;

use super::checksum::is_sound;
use super::lsn::Lsn;

/// More bad pages than this are counted, not named.
const SUSPECTS_MAX: usize = 1000;

type Digest = [u8; SHA256_OUTPUT_LEN];

/// How pages are checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct PageRule {
    pub(super) page_bytes: usize,
    /// Of a file of a relation; a longer one goes on in the next file.
    pub(super) file_bytes: u64,
    /// What was written later the log of the backup mends.
    pub(super) start: Lsn,
}

/// A page that is not what its checksum says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Suspect {
    /// Below the data directory, as the server names it.
    pub(super) path: Vec<u8>,
    /// In this file, and in its relation.
    pub(super) page: u32,
    pub(super) block: u32,
}

pub(super) struct Watch {
    pages: Option<PageRule>,
    came: BTreeMap<Vec<u8>, (u64, Digest)>,
    at: Option<File>,
    pub(super) suspects: Vec<Suspect>,
}

struct File {
    path: Vec<u8>,
    size: u64,
    digest: Context,
    pages: Option<Pages>,
}

impl Watch {
    /// With `pages`, the cluster has checksums.
    pub(super) fn new(pages: Option<PageRule>) -> Self {
        Self { pages, came: BTreeMap::new(), at: None, suspects: Vec::new() }
    }

    /// A file begins.
    pub(super) fn begin(&mut self, path: Vec<u8>, is_relation: bool) {
        self.end();
        let pages = self.pages.filter(|_| is_relation).map(|rule| Pages::new(&path, rule));
        self.at = Some(File { path, size: 0, digest: Context::new(&SHA256), pages });
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        let Some(file) = &mut self.at else { return };
        file.size += bytes.len() as u64;
        file.digest.update(bytes);
        if let Some(pages) = &mut file.pages {
            pages.bytes(bytes);
        }
    }

    /// The file has ended.
    pub(super) fn end(&mut self) {
        let Some(File { path, size, digest, pages }) = self.at.take() else { return };
        let mut sum = Digest::default();
        sum.copy_from_slice(digest.finish().as_ref());
        let room = SUSPECTS_MAX.saturating_sub(self.suspects.len());
        for page in pages.iter().flat_map(|pages| &pages.bad).take(room) {
            let block = pages.as_ref().map_or(0, |pages| pages.first + page);
            self.suspects.push(Suspect { path: path.clone(), page: *page, block });
        }
        self.came.insert(path, (size, sum));
    }

    /// Compares with what the server says that it sent.
    ///
    /// Errors: [`mainstay_core::Code::Integrity`] for the first difference.
    pub(super) fn check(&mut self, manifest: &[u8]) -> Result<()> {
        self.end();
        let wrong =
            |what: String| Error::integrity(format!("the backup is not what the server's list says: {what}"));
        check_own_sum(manifest)?;
        let manifest: Manifest = serde_json::from_slice(manifest)
            .map_err(|error| Error::integrity("the server's list of files is malformed").because(error))?;
        let mut came = std::mem::take(&mut self.came);
        for listed in manifest.files {
            let path = listed.path()?;
            let name = || String::from_utf8_lossy(&path).escape_debug().to_string();
            let (size, sum) = came.remove(&path).ok_or_else(|| wrong(format!("{} did not come", name())))?;
            if listed.size != size || hex(&listed.checksum).as_deref() != Some(&sum) {
                return Err(wrong(format!("{} came otherwise", name())));
            }
        }
        match came.pop_first() {
            Some((path, _)) => {
                Err(wrong(format!("{} is not in it", String::from_utf8_lossy(&path).escape_debug())))
            }
            None => Ok(()),
        }
    }
}

#[derive(Deserialize)]
struct Manifest {
    #[serde(rename = "Files")]
    files: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    #[serde(rename = "Path")]
    path: Option<String>,
    /// Hexadecimal, for what is no UTF-8.
    #[serde(rename = "Encoded-Path")]
    encoded: Option<String>,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(rename = "Checksum")]
    checksum: String,
}

impl Listed {
    fn path(&self) -> Result<Vec<u8>> {
        let encoded = || self.encoded.as_deref().and_then(hex);
        let path = self.path.clone().map(String::into_bytes).or_else(encoded);
        path.ok_or_else(|| Error::integrity("the server's list of files has one without a name"))
    }
}

/// The last line has the sum of all before it.
fn check_own_sum(manifest: &[u8]) -> Result<()> {
    let line = manifest.trim_ascii_end().iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let (listed, last) = manifest.split_at(line);
    let said = std::str::from_utf8(last).ok().and_then(|last| last.split('"').nth(3)).and_then(hex);
    if said.as_deref() == Some(digest(&SHA256, listed).as_ref()) {
        return Ok(());
    }
    Err(Error::integrity("the server's list of files did not come as it was sent"))
}

pub(super) fn hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let bytes = pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect();
    if rest.is_empty() { bytes } else { None }
}

/// The pages of one file as they come.
struct Pages {
    rule: PageRule,
    /// The file's first page in its relation.
    first: u32,
    next: u32,
    begun: Vec<u8>,
    bad: Vec<u32>,
}

impl Pages {
    fn new(path: &[u8], rule: PageRule) -> Self {
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let name = String::from_utf8_lossy(name);
        let number: u64 = name.split_once('.').and_then(|(_, number)| number.parse().ok()).unwrap_or(0);
        let per_file = rule.file_bytes.checked_div(rule.page_bytes as u64).unwrap_or(0);
        let first = number.wrapping_mul(per_file) as u32;
        Self { rule, first, next: 0, begun: Vec::new(), bad: Vec::new() }
    }

    fn bytes(&mut self, mut bytes: &[u8]) {
        let size = self.rule.page_bytes;
        if !self.begun.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(size - self.begun.len()));
            self.begun.extend_from_slice(now);
            bytes = later;
            if self.begun.len() < size {
                return;
            }
            let page = std::mem::take(&mut self.begun);
            self.page(&page);
            self.begun = page;
            self.begun.clear();
        }
        let pages = bytes.chunks_exact(size);
        self.begun.extend_from_slice(pages.remainder());
        pages.for_each(|page| self.page(page));
    }

    fn page(&mut self, page: &[u8]) {
        let (number, block) = (self.next, self.first.wrapping_add(self.next));
        self.next = self.next.wrapping_add(1);
        if !is_sound(page, block, self.rule.start) && self.bad.len() < SUSPECTS_MAX {
            self.bad.push(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Lsn, PageRule, SHA256, Watch, digest, hex};

    fn listed(files: &[(&str, &[u8])]) -> Vec<u8> {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let line = |(path, bytes): &(&str, &[u8])| {
            let sum = hex(digest(&SHA256, bytes).as_ref());
            format!("{{ \"{path}\", \"Size\": {}, \"Checksum\": \"{sum}\" }}", bytes.len())
        };
        let lines: Vec<String> = files.iter().map(line).collect();
        let text = format!("{{ \"Files\": [\n{}\n],\n", lines.join(",\n"));
        let sum = hex(digest(&SHA256, text.as_bytes()).as_ref());
        format!("{text}\"Manifest-Checksum\": \"{sum}\"}}\n").into_bytes()
    }

    fn seen(files: &[(&str, &[u8])]) -> Watch {
        let mut watch = Watch::new(None);
        for (path, bytes) in files {
            watch.begin(path.as_bytes().to_vec(), false);
            bytes.chunks(3).for_each(|some| watch.bytes(some));
        }
        watch
    }

    #[test]
    fn what_came_must_be_what_was_sent() {
        let list = listed(&[("Path\": \"a", b"hello"), ("Encoded-Path\": \"62", b"")]);
        seen(&[("a", b"hello"), ("b", b"")]).check(&list).unwrap();
        for other in [
            &[("a", &b"hallo"[..]), ("b", b"")][..],
            &[("a", b"hello")],
            &[("a", b"hello"), ("b", b""), ("c", b"")],
            &[("a", b"hello!"), ("b", b"")],
        ] {
            seen(other).check(&list).unwrap_err();
        }
        let mut torn = list.clone();
        torn[30] ^= 1;
        seen(&[("a", b"hello"), ("b", b"")]).check(&torn).unwrap_err();
        for cut in 0..list.len() - 1 {
            seen(&[("a", b"hello"), ("b", b"")]).check(&list[..cut]).unwrap_err();
        }
    }

    #[test]
    fn a_bad_page_is_found_however_its_bytes_come() {
        let mut pages = vec![0_u8; 3 * 8192];
        pages[8192 + 14] = 1;
        for step in [1, 100, 8191, 8192, 8193, 3 * 8192] {
            let rule = PageRule { page_bytes: 8192, file_bytes: 1 << 30, start: Lsn(1) };
            let mut watch = Watch::new(Some(rule));
            watch.begin(b"base/5/16384.2".to_vec(), true);
            pages.chunks(step).for_each(|some| watch.bytes(some));
            watch.end();
            let found: Vec<_> = watch.suspects.iter().map(|bad| (bad.page, bad.block)).collect();
            assert_eq!(found, [(1, 2 * 131_072 + 1)], "in steps of {step}");
        }
    }

    #[test]
    fn digits_are_pairs() {
        assert_eq!(hex("00fFa0"), Some(vec![0, 255, 160]));
        assert_eq!((hex("0"), hex("0g"), hex("é")), (None, None, None));
    }
}
