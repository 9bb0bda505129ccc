//! The programs that make images, and the judges of what was read.

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use mainstay_core::{Blocks, Extent, ExtentKind};
use mainstay_diskimage::container::{Directories, Format, OpenedImage, open};
use mainstay_testkit::Rng;
use serde_json::Value;

/// Administrators' programs are not on everybody's path.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs a program to its end and returns what it printed.
#[expect(clippy::disallowed_methods, reason = "the tests' door to the programs that make images")]
pub(crate) fn run<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>) -> String {
    let mut command = Command::new(program);
    command.args(arguments).env("PATH", PATH);
    let output =
        command.output().unwrap_or_else(|error| panic!("{program}: {error}; see `cargo xtask setup`"));
    let said = [output.stdout, if output.status.success() { Vec::new() } else { output.stderr }].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "{program} failed: {said}");
    said
}

/// As [`run`], with this on its standard input.
#[expect(clippy::disallowed_methods, reason = "the tests' door to the programs that make images")]
pub(crate) fn feed<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>, input: &[u8]) {
    let mut command = Command::new(program);
    command.args(arguments).env("PATH", PATH).stdin(Stdio::piped());
    let mut child =
        command.spawn().unwrap_or_else(|error| panic!("{program}: {error}; see `cargo xtask setup`"));
    child.stdin.take().unwrap().write_all(input).unwrap();
    assert!(child.wait().unwrap().success(), "{command:?} failed");
}

/// `qemu-img` or another program with its words in one string; no word holds a space.
pub(crate) fn shell(line: &str) -> String {
    let mut words = line.split_whitespace();
    run(words.next().unwrap(), words)
}

/// What the disk reads as, told by qemu-img.
pub(crate) fn raw(image: &Path, format: &str) -> Vec<u8> {
    let raw = image.with_extension("judge");
    shell(&format!("qemu-img convert -f {format} -O raw {} {}", image.display(), raw.display()));
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(&raw).unwrap();
    bytes
}

/// Reads the disk whole, in odd pieces, and piece by piece at random; all must be what it should be.
pub(crate) fn assert_reads(blocks: &dyn Blocks, expected: &[u8], random: &mut Rng) {
    assert_eq!(blocks.size(), expected.len() as u64);
    let mut whole = vec![0xA5; expected.len()];
    blocks.read_at(0, &mut whole).unwrap();
    assert_same(&whole, expected, 0);
    for _ in 0..200 {
        let length = 1 + random.below(100_000.min(expected.len()));
        let offset = random.below(expected.len() - length + 1);
        let mut part = vec![0xA5; length];
        blocks.read_at(offset as u64, &mut part).unwrap();
        assert_same(&part, &expected[offset..offset + length], offset);
    }
    assert!(blocks.read_at(blocks.size(), &mut [0]).is_err());
    assert!(blocks.read_at(u64::MAX, &mut [0]).is_err());
}

fn assert_same(read: &[u8], expected: &[u8], offset: usize) {
    if read == expected {
        return;
    }
    if let Some(at) = read.iter().zip(expected).position(|(a, b)| a != b) {
        panic!("byte {} is {:#x} instead of {:#x}", offset + at, read[at], expected[at]);
    }
}

/// The extents must cover every range without gaps, promise zeros only where there are zeros, and agree with what
/// `qemu-img map` says about zeros and about what is not there at all.
pub(crate) fn assert_extents(blocks: &dyn Blocks, image: &Path, format: &str, expected: &[u8]) {
    let extents = blocks.extents(0..blocks.size()).unwrap();
    let mut at = 0;
    for extent in &extents {
        assert!(extent.range.start == at && extent.range.end > at, "a gap or nothing at {at}: {extent:?}");
        at = extent.range.end;
        let range = usize::try_from(extent.range.start).unwrap()..usize::try_from(at).unwrap();
        assert!(
            extent.kind == ExtentKind::Data || expected[range].iter().all(|byte| *byte == 0),
            "{extent:?}"
        );
    }
    assert_eq!(at, blocks.size());
    let map = shell(&format!("qemu-img map -f {format} --output=json {}", image.display()));
    for told in serde_json::from_str::<Value>(&map).unwrap().as_array().unwrap() {
        let start = told["start"].as_u64().unwrap();
        let range = start..(start + told["length"].as_u64().unwrap()).min(blocks.size());
        let within = |extent: &&Extent| extent.range.start < range.end && range.start < extent.range.end;
        for extent in extents.iter().filter(within) {
            if told["zero"] == true {
                assert_ne!(extent.kind, ExtentKind::Data, "{extent:?} in {told}");
            }
            if told["present"] == false {
                assert_eq!(extent.kind, ExtentKind::Hole, "{extent:?} in {told}");
            }
        }
    }
}

/// Opens the image by its content and compares everything with what QEMU reads.
pub(crate) fn check(image: &Path, format: Format, random: &mut Rng) -> OpenedImage {
    let opened = open(image, None, &Directories::of(image).unwrap()).unwrap();
    assert_eq!(opened.format, format);
    let name = format.to_string().to_lowercase();
    let expected = raw(image, &name);
    assert_reads(&*opened.blocks, &expected, random);
    assert_extents(&*opened.blocks, image, &name, &expected);
    opened
}

/// Random writes, zeros and discards, as one run of qemu-io makes them. In a `fresh` image some clusters are written
/// compressed before; 2 MiB is a multiple of every cluster.
pub(crate) fn scribble(image: &Path, format: &str, size: u64, fresh: bool, random: &mut Rng) {
    let mut commands = Vec::new();
    if fresh {
        let mut places: Vec<u64> = (0..size >> 21).collect();
        random.shuffle(&mut places);
        for place in places.iter().take(3) {
            commands.push(format!("write -c -P {} {}M 2M", random.range(1..256), place * 2));
        }
    }
    for _ in 0..40 {
        let offset = random.range(0..size / 512) * 512;
        let length = (random.range(1..300) * 512).min(size - offset);
        commands.push(match random.range(0..10) {
            0 => format!("write -z {offset} {length}"),
            1 => format!("write -z -u {offset} {length}"),
            2 => format!("discard {offset} {length}"),
            _ => format!("write -P {} {offset} {length}", random.range(1..256)),
        });
    }
    let commands = commands.into_iter().flat_map(|command| ["-c".to_owned(), command]);
    let arguments = ["-f", format].map(str::to_owned).into_iter().chain(commands);
    run("qemu-io", arguments.chain([image.display().to_string()]));
}
