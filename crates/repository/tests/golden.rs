//! A repository of format version 1 opens, restores and verifies for as long as there is a Mainstay.
//!
//! `golden/store` was written once, by the first release of the format, and is never written again; `golden/README.md`
//! says why. What it must restore to stands in `golden/manifest.txt`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod common;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::sample::{PASSPHRASE, Sample};
use common::{clock, open_store, options, restore, try_backup};
use mainstay_core::{ItemPath, Metadata, Silent};
use mainstay_repository::keys::credential;
use mainstay_repository::keys::kit::Kit;
use mainstay_repository::{Note, Repository, Role, Unlock, VerifyScope};
use mainstay_testkit::{Blobs, MemoryStore, Part, Rng, TestItem};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn read_store(folder: &Path, prefix: &str, blobs: &mut Blobs) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
        if entry.file_type().unwrap().is_dir() {
            read_store(&entry.path(), &format!("{name}/"), blobs);
        } else {
            blobs.insert(name, std::fs::read(entry.path()).unwrap().into());
        }
    }
}

fn golden() -> Arc<MemoryStore> {
    let mut blobs = Blobs::new();
    read_store(&folder().join("store"), "", &mut blobs);
    assert!(!blobs.is_empty());
    Arc::new(MemoryStore::from_blobs(blobs))
}

/// Everything that a restore gives back, as text.
fn manifest(repository: &Repository) -> String {
    let mut text = String::new();
    for point in repository.points().unwrap() {
        let (id, workload) = (point.id, &point.workload);
        writeln!(text, "point {id} of {} {} {}", workload.kind.0, workload.name, workload.id).unwrap();
        writeln!(text, "  host {:?} roots {:?} tags {:?}", point.host, point.roots, point.tags).unwrap();
        writeln!(
            text,
            "  sequence {} parent {:?} {}",
            point.sequence,
            point.parent,
            point.consistency.name()
        )
        .unwrap();
        let times = [point.started, point.finished, point.moment, point.committed].map(|time| time.0);
        writeln!(text, "  times {times:?} verified {:?} proven {:?}", point.verified, point.proven).unwrap();
        writeln!(text, "  {:?}", point.counts).unwrap();
        for hold in &point.holds {
            writeln!(text, "  hold {} {:?} until {:?}", hold.id, hold.reason, hold.until).unwrap();
        }
        let finished = restore(repository, &id);
        writeln!(text, "  position {:?}", finished.captured.unwrap().position).unwrap();
        for skip in repository.read(&id).unwrap().skips().unwrap() {
            writeln!(text, "  skipped {:?} {} {:?}", skip.path, skip.reason.name(), skip.detail).unwrap();
        }
        for item in finished.items {
            let content = &blake3::hash(&item.bytes).to_hex()[..32];
            writeln!(text, "  {:?} {content} {}", item.path, describe(&item.metadata, &item.stamp.0))
                .unwrap();
        }
    }
    for writer in repository.writers() {
        writeln!(text, "writer {} {:?}: {}", writer.id, writer.name, writer.powers).unwrap();
    }
    let stats = repository.stats();
    writeln!(text, "log {} expired {} packs {}", stats.log_next, stats.expired_points, stats.packs).unwrap();
    text
}

/// Field by field, so that a new field changes nothing here.
fn describe(metadata: &Metadata, stamp: &[u8]) -> String {
    let Metadata { kind, size, mode, uid, gid, modified, .. } = metadata;
    let mut text = format!("{kind:?} {size} {mode:o} {uid}:{gid} {}", modified.0);
    let text_of = |bytes: &[u8]| bytes.escape_ascii().to_string();
    for (name, value) in [("user", &metadata.user), ("group", &metadata.group), ("to", &metadata.link_target)]
    {
        if let Some(value) = value {
            write!(text, " {name}={}", text_of(value)).unwrap();
        }
    }
    if let Some(link) = metadata.hard_link {
        write!(text, " link={}/{}", link.device, link.inode).unwrap();
    }
    if let Some((major, minor)) = metadata.device {
        write!(text, " device={major}/{minor}").unwrap();
    }
    for (name, value) in &metadata.xattrs {
        write!(text, " {}={}", text_of(name), text_of(value)).unwrap();
    }
    for (name, value) in &metadata.attributes {
        write!(text, " {name}={}", text_of(value)).unwrap();
    }
    write!(text, " stamp={}", text_of(stamp)).unwrap();
    text
}

#[test]
fn the_first_repository_is_restored_as_it_was() {
    let wanted = std::fs::read_to_string(folder().join("manifest.txt")).unwrap();
    let key = credential::decode(&std::fs::read_to_string(folder().join("TEST-KEY.txt")).unwrap()).unwrap();
    let repository = open_store(golden(), &key, &clock()).unwrap();
    for (line, (wanted, got)) in wanted.lines().zip(manifest(&repository).lines()).enumerate() {
        assert_eq!(got, wanted, "line {}", line + 1);
    }
    assert_eq!(manifest(&repository).len(), wanted.len());
    let scope = VerifyScope { read_data: true, ..VerifyScope::default() };
    let report = repository.verify(&scope, &Silent).unwrap();
    assert_eq!((report.problems, report.degraded), (Vec::new(), Vec::new()));
}

#[test]
fn its_passphrase_and_its_kit_open_it() {
    let kit = Kit::parse(&std::fs::read_to_string(folder().join("TEST-KIT.txt")).unwrap()).unwrap();
    for unlock in [Unlock::Passphrase(PASSPHRASE), Unlock::Kit(&kit)] {
        Repository::open(golden(), &unlock, &options(&clock())).unwrap();
    }
}

/// Work goes on in it: a point is added, and what was there is shared.
#[test]
fn it_is_written_to_and_collected_in() {
    let key = credential::decode(&std::fs::read_to_string(folder().join("TEST-KEY.txt")).unwrap()).unwrap();
    let store = golden();
    let repository = open_store(Arc::clone(&store) as _, &key, &clock()).unwrap();
    let before = store.total_bytes();
    let point = try_backup(&repository, 3, large()).unwrap();
    common::compare(&large(), &restore(&repository, &point));
    let grown = store.total_bytes() - before;
    assert!(grown < 60_000, "{grown} bytes for what is there already: cutting or naming has changed");
    repository.expire(&[point], "test").unwrap();
    let wanted = std::fs::read_to_string(folder().join("manifest.txt")).unwrap();
    assert!(manifest(&repository).starts_with(&wanted[..wanted.find("\nwriter").unwrap()]));
}

/// Several segments, and a tree of several levels.
fn large() -> Vec<TestItem> {
    let mut rng = Rng::new(99);
    let path = |text: String| ItemPath::new(text).unwrap();
    let line = |number: u64| format!("{number}: the quick brown fox jumps over the lazy dog\n");
    let text: String = (0..6000).map(line).collect();
    let mut items = vec![
        TestItem::directory(path("big".into())),
        TestItem::file(path("big/random".into()), vec![Part::Bytes(rng.bytes(90_000))]),
        TestItem::file(path("big/text".into()), vec![Part::Bytes(text.into_bytes())]),
        TestItem::directory(path("many".into())),
    ];
    for number in 0..500 {
        let name = format!("many/{number:04} {}", "and a long name ".repeat(6));
        items.push(TestItem::file(path(name), vec![Part::Bytes(vec![number as u8; 3])]));
    }
    items
}

/// Writes a golden repository of a later format version into a new folder: `MAINSTAY_MAKE_GOLDEN=folder`.
#[test]
fn made_once() {
    let Some(folder) = std::env::var_os("MAINSTAY_MAKE_GOLDEN").map(PathBuf::from) else { return };
    assert!(!folder.join("store").exists(), "a golden repository is never written again");
    let sample = Sample::with_repacked_pack(2026);
    let store = Arc::new(MemoryStore::from_blobs(sample.blobs.clone()));
    let repository = open_store(Arc::clone(&store) as _, &sample.ring, &sample.clock).unwrap();
    repository.add_writer("an agent", Role::WriteOnly).unwrap();
    let point = try_backup(&repository, 3, large()).unwrap();
    repository.note(&point, &Note::Proven { how: "a drill".into(), seconds: 12 }).unwrap();
    repository.note(&point, &Note::Hold { reason: "until spring".into(), until: Some(clock_end()) }).unwrap();
    let gone = repository.add_writer("somebody who left", Role::Collector).unwrap();
    let gone = gone.writer(mainstay_repository::keys::Powers::EXPIRE).unwrap().verifying_key().writer_id();
    repository.revoke_writer(&gone).unwrap();
    for (name, bytes) in store.snapshot() {
        let file = folder.join("store").join(&name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, bytes).unwrap();
    }
    let key = format!("For tests only: this key is public.\n\n{}", *credential::encode(&sample.ring));
    std::fs::write(folder.join("TEST-KEY.txt"), key).unwrap();
    std::fs::write(folder.join("TEST-KIT.txt"), &*sample.kit.lines()).unwrap();
    let other = open_store(store, &sample.ring, &sample.clock).unwrap();
    std::fs::write(folder.join("manifest.txt"), manifest(&other)).unwrap();
}

fn clock_end() -> mainstay_core::Time {
    mainstay_core::Time::from_seconds(1_900_000_000)
}
