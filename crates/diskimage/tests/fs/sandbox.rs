//! Parsing in a process of its own: the same answers, and nothing worse than an error when the parser breaks.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Blocks, Code, ItemPath, Kind};
use mainstay_diskimage::fs::{FileSystem, Listing, Opened, Other};
use mainstay_diskimage::map::CutMap;
use mainstay_diskimage::sandbox::{Sandbox, serve};
use mainstay_diskimage::volume::volumes;
use mainstay_testkit::Rng;
use mainstay_testkit::tree::hostile_tree;

use crate::lab::Image;
use crate::{oracle, trees};

const ROLE: &str = "MAINSTAY_TEST_PARSER";

/// Not a test by itself: the process that the tests below talk to.
#[test]
#[expect(clippy::disallowed_methods, reason = "the tests start themselves again")]
fn the_parser_itself() {
    match std::env::var(ROLE).as_deref() {
        Ok("parser") => serve().unwrap(),
        Ok("silent") => std::thread::sleep(Duration::from_secs(60)),
        Ok(seed) => babble(seed.parse().unwrap()),
        Err(_) => {}
    }
}

/// A parser that was taken over: it says anything.
fn babble(seed: u64) {
    let mut socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    let mut rng = Rng::new(seed);
    let mut heard = [0; 4096];
    while socket.read(&mut heard).unwrap() > 0 {
        let length = *rng.pick(&[1usize, 2, 9, 17, 18, 30, 60, 100, 3000]);
        let mut body = rng.bytes(length);
        body[0] = *rng.pick(&[1, 1, 1, 2, 3, 4, 4, 5]);
        for byte in &mut body[1..] {
            // Small numbers make more sense, and so come further.
            *byte = if rng.chance(70) { rng.range(0..3) as u8 } else { *byte };
        }
        let told = if rng.chance(97) { length as u32 } else { rng.next_u64() as u32 };
        socket.write_all(&told.to_le_bytes()).unwrap();
        socket.write_all(&body).unwrap();
    }
}

fn sandbox(role: &str) -> Sandbox {
    Sandbox::new(["--exact", "sandbox::the_parser_itself", "--nocapture"]).variable(ROLE, role)
}

fn open(image: &Image) -> Arc<dyn FileSystem> {
    match sandbox("parser").open(image.blocks()).unwrap() {
        Opened::FileSystem(file_system) => file_system,
        Opened::Other(other) => panic!("this is {}", other.name()),
    }
}

#[test]
fn a_sandboxed_parser_gives_the_answers_of_one_that_is_not() {
    for (program, arguments, mebibytes) in [
        ("mke2fs", &["-q", "-F", "-t", "ext4", "-b", "4096"][..], 96),
        ("mkfs.xfs", &["-q", "-f"], 320),
        ("mkfs.btrfs", &["-q", "-f"], 160),
    ] {
        println!("{program}");
        let image = Image::make(program, arguments, mebibytes);
        let files = trees::small();
        {
            let mounted = image.mount("noatime");
            trees::write(&mounted.0, &files);
            trees::oddities(&mounted.0);
            trees::long_attributes(&mounted.0);
            let _what_could_not_be_made = hostile_tree(&mounted.0.join("hostile"));
        }
        let (apart, here) = (open(&image), image.open());
        assert_eq!(apart.about(), here.about());
        oracle::holds(&*apart, &files);
        let items = {
            let mounted = image.mount_read_only();
            oracle::agrees_with_kernel(&*apart, &mounted.0)
        };
        oracle::walk_agrees(&*apart, &items);
        listings_agree(&*apart, &*here, &items);
        let free = |file_system: &dyn FileSystem| {
            let mut ranges = Vec::new();
            let push = &mut |range| {
                ranges.push(range);
                Ok(())
            };
            file_system.free(push).unwrap();
            ranges
        };
        assert_eq!(free(&*apart), free(&*here));
        let missing = apart.lookup(&ItemPath::new("not/there").unwrap()).unwrap_err();
        assert_eq!(missing.code(), Code::NotFound);
    }
}

/// A directory comes with the metadata of what it holds, as much as fits into an answer.
fn listings_agree(apart: &dyn FileSystem, here: &dyn FileSystem, items: &oracle::Items) {
    let (mut came_along, mut to_be_asked_for) = (0, 0);
    for (node, metadata) in items.values() {
        if metadata.kind != Kind::Directory {
            continue;
        }
        let (mut from, mut known) = (Some(0), Vec::new());
        while let Some(start) = from {
            let Listing { page, metadata } = apart.list(*node, start, 97).unwrap();
            assert_eq!(page.entries.len(), metadata.len());
            known.extend(page.entries.into_iter().zip(metadata));
            from = page.next;
        }
        let plain = here.read_dir(*node, 0, usize::MAX).unwrap();
        assert_eq!(plain.entries, known.iter().map(|(entry, _)| entry.clone()).collect::<Vec<_>>());
        for (entry, known) in known {
            match known {
                Some(known) => assert_eq!(known, here.metadata(entry.node).unwrap()),
                None => to_be_asked_for += 1,
            }
            came_along += 1;
        }
    }
    assert!(came_along > 500 && to_be_asked_for * 10 < came_along, "{came_along} {to_be_asked_for}");
}

#[test]
fn a_map_is_made_in_a_sandbox_too() {
    let image = Image::make("mke2fs", &["-q", "-F", "-t", "ext4", "-b", "4096"], 64);
    {
        let mounted = image.mount("noatime");
        trees::write(&mounted.0, &trees::small());
    }
    let blocks: Arc<dyn Blocks> = image.blocks();
    let layout = volumes(&[blocks], &|_| None).unwrap();
    let apart = sandbox("parser");
    let (apart, here) = (
        CutMap::of(&layout.volumes, 1, &|volume| apart.open(volume)),
        CutMap::of(&layout.volumes, 1, &mainstay_diskimage::fs::open),
    );
    assert_eq!(apart.notes, [""; 0]);
    let (apart, here) = (apart.disk(0).unwrap(), here.disk(0).unwrap());
    assert!(here.len() > 500);
    assert_eq!(apart.cuts(0..64 << 20).unwrap(), here.cuts(0..64 << 20).unwrap());
    assert_eq!(apart.free(), here.free());
}

#[test]
fn what_is_no_file_system_is_named() {
    let swap = Image::make("mkswap", &[], 8);
    assert!(matches!(sandbox("parser").open(swap.blocks()).unwrap(), Opened::Other(Other::Swap)));
    fs::write(&swap.path, vec![0; 1 << 20]).unwrap();
    assert!(matches!(sandbox("parser").open(swap.blocks()).unwrap(), Opened::Other(Other::Empty)));
}

#[test]
fn a_parser_that_falls_silent_is_given_up() {
    let swap = Image::make("mkswap", &[], 8);
    let told = sandbox("silent").silence(Duration::from_millis(50)).open(swap.blocks()).err().unwrap();
    assert_eq!(told.code(), Code::Integrity);
    assert!(told.to_string().contains("fell silent"), "{told}");
}

#[test]
fn a_parser_that_was_taken_over_is_believed_nothing() {
    let swap = Image::make("mkswap", &[], 8);
    mainstay_testkit::for_each_seed(60, |seed| {
        let Ok(Opened::FileSystem(file_system)) = sandbox(&seed.to_string()).open(swap.blocks()) else {
            return;
        };
        let size = swap.blocks().size();
        for _ in 0..20 {
            let _child = file_system.child(file_system.root(), b"name");
            let page = file_system.read_dir(file_system.root(), 5, 10).unwrap_or_default();
            assert!(page.entries.len() <= 10 && page.next.is_none_or(|next| next > 5));
            let listing = file_system.list(file_system.root(), 5, 10).unwrap_or_default();
            assert!(listing.page.entries.len() <= 10 && listing.page.next.is_none_or(|next| next > 5));
            assert_eq!(listing.metadata.len(), listing.page.entries.len());
            let _metadata = file_system.metadata(file_system.root());
            for extent in file_system.extents(file_system.root()).unwrap_or_default() {
                assert!(extent.volume_offset + extent.length <= size);
            }
            let _told = file_system.free(&mut |range| {
                assert!(range.start < range.end && range.end <= size);
                Ok(())
            });
            if let Ok(content) = file_system.content(file_system.root()) {
                let _piece = content.read(0, &mut [0; 100]);
            }
        }
    });
}
