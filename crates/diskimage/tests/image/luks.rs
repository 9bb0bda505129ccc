//! Encrypted volumes, made by QEMU (LUKS 1) and cryptsetup (LUKS 2), neither of which needs the kernel for it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use aws_lc_rs::digest;
use mainstay_core::Blocks;
use mainstay_diskimage::FileBlocks;
use mainstay_diskimage::compose::Window;
use mainstay_diskimage::volume::{Encryption, Layout, Secret, VolumeId, volumes};
use mainstay_testkit::Rng;

use crate::tools::{assert_reads, run, shell};

fn layout(image: &Path, key: Option<&[u8]>) -> Layout {
    let disk: Arc<dyn Blocks> = Arc::new(FileBlocks::open(image).unwrap());
    volumes(&[disk], &|_| key.map(|key| Secret::Passphrase(key.to_vec().into()))).unwrap()
}

/// Opens with the key and not with another, and reads what was written.
fn check(image: &Path, expected: &[u8], random: &mut Rng) {
    let locked = layout(image, None);
    assert_eq!((locked.volumes[0].encryption, &locked.notes), (Encryption::Locked, &vec![]));
    let wrong = layout(image, Some(b"hus"));
    assert_eq!(wrong.volumes[0].encryption, Encryption::Locked);
    assert!(wrong.notes[0].contains("does not open"), "{:?}", wrong.notes);
    let opened = layout(image, Some(b"hush"));
    assert_eq!((opened.volumes[0].encryption, &opened.notes), (Encryption::Unlocked, &vec![]));
    let blocks = &opened.volumes[0].blocks;
    // Behind what cryptsetup encrypted may lie what was there before.
    let window = Window::new(Arc::clone(blocks), 0..expected.len() as u64).unwrap();
    assert_reads(&window, expected, random);
    let size = std::fs::metadata(image).unwrap().len();
    assert_eq!(opened.volumes[0].on_disk(0..u64::MAX), [(0, size - blocks.size()..size)]);
}

#[test]
fn luks_1_of_old_and_new_defaults_reads_as_it_was_written() {
    let shapes = [
        "cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64,hash-alg=sha256",
        "cipher-alg=aes-256,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha1",
    ];
    for (seed, shape) in (1..).zip(shapes) {
        println!("{shape}");
        let mut random = Rng::new(seed);
        let folder = tempfile::tempdir().unwrap();
        let (plain, image) = (folder.path().join("plain"), folder.path().join("image"));
        let expected = random.bytes(1 << 20);
        std::fs::write(&plain, &expected).unwrap();
        std::fs::write(folder.path().join("key"), "hush").unwrap();
        let key = format!("secret,id=k,file={}", folder.path().join("key").display());
        let options = format!("key-secret=k,iter-time=10,{shape}");
        let (plain, image_name) = (plain.to_str().unwrap(), image.to_str().unwrap());
        run("qemu-img", ["convert", "--object", &key, "-O", "luks", "-o", &options, plain, image_name]);
        check(&image, &expected, &mut random);
    }
}

/// An encrypted image of `expected`, by cryptsetup without the kernel.
pub(crate) fn encrypted(folder: &Path, options: &str, expected: &[u8]) -> PathBuf {
    let (image, key) = (folder.join("image"), folder.join("key"));
    // Room for the header, which pushes the data up.
    let mut bytes = expected.to_vec();
    bytes.resize(expected.len() + (32 << 20), 0);
    std::fs::write(&image, bytes).unwrap();
    std::fs::write(&key, "hush").unwrap();
    shell(&format!(
        "cryptsetup -q reencrypt --encrypt --type luks2 --reduce-device-size 32M --force-offline-reencrypt \
         --key-file {} {options} {}",
        key.display(),
        image.display()
    ));
    image
}

#[test]
fn luks_2_of_every_shape_reads_as_it_was_written() {
    let shapes = [
        "--pbkdf argon2id --pbkdf-memory 1024 --pbkdf-force-iterations 4 --pbkdf-parallel 2",
        "--pbkdf argon2i --pbkdf-memory 512 --pbkdf-force-iterations 5 --pbkdf-parallel 1 --sector-size 4096",
        "--pbkdf pbkdf2 --pbkdf-force-iterations 1000 --hash sha512 --cipher aes-xts-plain64 --key-size 256",
        "--pbkdf pbkdf2 --pbkdf-force-iterations 1000 --cipher aes-cbc-essiv:sha256 --key-size 256 --label secrets",
    ];
    for (seed, shape) in (1..).zip(shapes) {
        println!("{shape}");
        let mut random = Rng::new(seed);
        let folder = tempfile::tempdir().unwrap();
        let expected = random.bytes(2 << 20);
        let image = encrypted(folder.path(), shape, &expected);
        check(&image, &expected, &mut random);
        let label = layout(&image, None).volumes[0].label.clone();
        assert_eq!(label.as_deref(), shape.contains("--label").then_some("secrets"));

        let key = folder.path().join("volume-key");
        let passphrase = folder.path().join("key");
        shell(&format!(
            "cryptsetup -q luksDump --dump-volume-key --volume-key-file {} --key-file {} {}",
            key.display(),
            passphrase.display(),
            image.display()
        ));
        let key = std::fs::read(key).unwrap();
        let disk: Arc<dyn Blocks> = Arc::new(FileBlocks::open(&image).unwrap());
        let by_key = volumes(&[disk], &|_| Some(Secret::VolumeKey(key.clone().into()))).unwrap();
        assert_eq!(by_key.volumes[0].encryption, Encryption::Unlocked);

        // The second copy of the header serves when the first is damaged.
        let mut bytes = std::fs::read(&image).unwrap();
        bytes[4096 + 10] ^= 1;
        std::fs::write(&image, &bytes).unwrap();
        check(&image, &expected, &mut random);
        bytes[0x4000 + 4096 + 10] ^= 1;
        std::fs::write(&image, &bytes).unwrap();
        let lost = layout(&image, Some(b"hush"));
        assert_eq!(lost.volumes[0].encryption, Encryption::Locked);
        assert!(lost.notes[0].contains("checksum"), "{:?}", lost.notes);
    }
}

#[test]
fn the_key_is_asked_for_by_name_and_identity() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(20 << 20).unwrap();
    std::fs::write(folder.path().join("key"), "hush").unwrap();
    let uuid = "0c1f3a52-1b8e-4dc1-9d0f-5a7e0f3b8c11";
    shell(&format!(
        "cryptsetup -q luksFormat --type luks1 --pbkdf-force-iterations 1000 --uuid {uuid} --key-file {} {}",
        folder.path().join("key").display(),
        image.display()
    ));
    let disk: Arc<dyn Blocks> = Arc::new(FileBlocks::open(&image).unwrap());
    let wanted = VolumeId { name: "vda".into(), uuid: Some(uuid.into()) };
    let ask = |id: &VolumeId| (*id == wanted).then(|| Secret::Passphrase(b"hush".to_vec().into()));
    assert_eq!(volumes(&[disk], &ask).unwrap().volumes[0].encryption, Encryption::Unlocked);
}

/// Formats, changes the bytes, and returns why the key does not open it.
fn refusal(options: &str, change: impl Fn(&mut [u8])) -> String {
    let folder = tempfile::tempdir().unwrap();
    let (image, key) = (folder.path().join("image"), folder.path().join("key"));
    std::fs::write(&key, "hush").unwrap();
    std::fs::File::create(&image).unwrap().set_len(20 << 20).unwrap();
    shell(&format!("cryptsetup -q luksFormat --key-file {} {options} {}", key.display(), image.display()));
    let mut bytes = std::fs::read(&image).unwrap();
    change(&mut bytes);
    std::fs::write(&image, bytes).unwrap();
    let mut layout = layout(&image, Some(b"hush"));
    assert_eq!(layout.volumes[0].encryption, Encryption::Locked);
    layout.notes.remove(0)
}

#[test]
fn what_is_not_read_is_refused_in_words() {
    let changes: [(usize, &[u8], &str); 3] =
        [(8, b"serpent\0", "serpent"), (72, b"whirlpool\0", "whirlpool"), (212, &[0xFF; 4], "more work")];
    for (at, patch, word) in changes {
        let change = |bytes: &mut [u8]| bytes[at..at + patch.len()].copy_from_slice(patch);
        let note = refusal("--type luks1 --pbkdf-force-iterations 1000", change);
        assert!(note.contains(word), "{note}");
    }
    let options = "--type luks2 --pbkdf argon2id --pbkdf-memory 1024 --pbkdf-force-iterations 4";
    let note =
        refusal(options, |bytes| [0, 0x4000].into_iter().for_each(|at| demand(&mut bytes[at..at + 0x4000])));
    assert!(note.contains("more work"), "{note}");
}

/// Lets a copy of a LUKS 2 header demand four thousand million passes.
fn demand(header: &mut [u8]) {
    let text = String::from_utf8(header[4096..].to_vec()).unwrap();
    let text = text.replacen("\"time\":4,", "\"time\":4294967295,", 1);
    header[4096..].copy_from_slice(&text.as_bytes()[..0x4000 - 4096]);
    header[448..512].fill(0);
    let sum = digest::digest(&digest::SHA256, header);
    header[448..480].copy_from_slice(sum.as_ref());
}
