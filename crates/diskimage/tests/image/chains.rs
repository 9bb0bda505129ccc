//! Images that consist of several files: layers, separate data files, and who may name what.

use std::path::Path;
use std::sync::Arc;

use mainstay_core::{Blocks, Code, Error};
use mainstay_diskimage::FileBlocks;
use mainstay_diskimage::container::{Alone, Directories, Format, open, open_blocks};
use mainstay_testkit::{Rng, for_each_seed};

use crate::tools::{check, scribble, shell};

#[test]
fn layers_of_any_length_show_what_qemu_shows() {
    for_each_seed(6, |seed| {
        let mut random = Rng::new(seed);
        let folder = tempfile::tempdir().unwrap();
        let at = |layer: u64| folder.path().join(format!("layer-{layer}"));
        let size = |random: &mut Rng| random.range(5000..12_000) * 512;
        let length = size(&mut random);
        let raw = random.chance(50);
        if raw {
            shell(&format!("qemu-img create -q -f raw {} {length}", at(0).display()));
            crate::tools::run(
                "qemu-io",
                ["-f", "raw", "-c", "write -P 9 64k 1M", "-c", "write -P 7 2M 17k", at(0).to_str().unwrap()],
            );
        } else {
            shell(&format!("qemu-img create -q -f qcow2 {} {length}", at(0).display()));
            scribble(&at(0), "qcow2", length, true, &mut random);
        }
        for layer in 1..4 {
            // Layers may be longer or shorter than what they lie on, in other clusters, and name it by a relative name.
            let length = size(&mut random);
            let shape =
                *random.pick(&["cluster_size=4k", "cluster_size=64k", "extended_l2=on", "compat=0.10"]);
            let format = if layer == 1 && raw { "raw" } else { "qcow2" };
            let base = if random.chance(50) {
                format!("layer-{}", layer - 1)
            } else {
                at(layer - 1).display().to_string()
            };
            shell(&format!(
                "qemu-img create -q -f qcow2 -o {shape} -F {format} -b {base} {} {length}",
                at(layer).display()
            ));
            scribble(&at(layer), "qcow2", length, false, &mut random);
        }
        let opened = check(&at(3), Format::Qcow2, &mut random);
        let real = folder.path().canonicalize().unwrap();
        assert_eq!(opened.files[1..], [2, 1, 0].map(|layer| real.join(format!("layer-{layer}"))));
    });
}

#[test]
fn data_in_a_file_of_its_own_is_found() {
    for (seed, shape) in [(1, "data_file_raw=on"), (2, "data_file_raw=off"), (3, "extended_l2=on")] {
        let mut random = Rng::new(seed);
        let folder = tempfile::tempdir().unwrap();
        let (image, data) = (folder.path().join("disk.qcow2"), folder.path().join("disk.data"));
        let size = 9_000_448;
        shell(&format!(
            "qemu-img create -q -f qcow2 -o data_file={},{shape} {} {size}",
            data.display(),
            image.display()
        ));
        scribble(&image, "qcow2", size, false, &mut random);
        let opened = check(&image, Format::Qcow2, &mut random);
        assert_eq!(opened.files.len(), 2);
    }
}

fn layer_on(folder: &Path, base: &str, format: &str) -> std::path::PathBuf {
    let image = folder.join("disk.qcow2");
    shell(&format!("qemu-img create -q -u -f qcow2 -F {format} -b {base} {} 1M", image.display()));
    image
}

fn refused(image: &Path) -> Error {
    open(image, None, &Directories::of(image).unwrap()).err().unwrap()
}

#[test]
fn an_image_cannot_name_what_lies_elsewhere() {
    let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let secret = elsewhere.path().join("secret");
    std::fs::write(&secret, [7; 4096]).unwrap();
    let up = format!("../{}/secret", elsewhere.path().file_name().unwrap().to_str().unwrap());
    std::os::unix::fs::symlink(&secret, folder.path().join("link")).unwrap();
    for name in ["/etc/shadow", secret.to_str().unwrap(), &up, "link", "file:/etc/passwd"] {
        let image = layer_on(folder.path(), name, "raw");
        assert_eq!(refused(&image).code(), Code::Refused, "{name}");
    }
    for name in ["nbd://localhost/disk", "json:{}", "fat:/etc", "http://localhost/x", "host_device:/dev/sda"]
    {
        let image = layer_on(folder.path(), name, "raw");
        assert_eq!(refused(&image).code(), Code::Refused, "{name}");
    }
    // The same file by an administrator's leave.
    let image = layer_on(folder.path(), &up, "raw");
    let allowed = Directories::new(&[folder.path().to_owned(), elsewhere.path().to_owned()]).unwrap();
    let opened = open(&image, None, &allowed).unwrap();
    let mut read = [0; 4096];
    opened.blocks.read_at(0, &mut read).unwrap();
    assert_eq!(read, [7; 4096]);
}

#[test]
fn devices_and_fifos_are_no_images() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    crate::tools::run("mkfifo", [&fifo]);
    assert_eq!(refused(&layer_on(folder.path(), "fifo", "raw")).code(), Code::Refused);
    assert_eq!(open(Path::new("/dev/zero"), None, &Alone).err().unwrap().code(), Code::Refused);
    assert_eq!(open(folder.path(), None, &Alone).err().unwrap().code(), Code::Refused);
}

#[test]
fn circles_and_towers_of_layers_end() {
    let folder = tempfile::tempdir().unwrap();
    let image = layer_on(folder.path(), "disk.qcow2", "qcow2");
    assert!(refused(&image).chain().join(": ").contains("a layer on itself"));
    let other = folder.path().join("other");
    shell(&format!("qemu-img create -q -u -f qcow2 -F qcow2 -b disk.qcow2 {} 1M", other.display()));
    let image = layer_on(folder.path(), "./../../../../../../../../../../../../../../../../other", "qcow2");
    assert_eq!(refused(&image).code(), Code::NotFound);
    let image = layer_on(folder.path(), ".//other", "qcow2");
    assert!(refused(&image).chain().join(": ").contains("a layer on itself"));
    for layer in 0..70 {
        let to = folder.path().join(format!("tower-{layer}"));
        shell(&format!("qemu-img create -q -u -f qcow2 -F qcow2 -b tower-{} {} 1M", layer + 1, to.display()));
    }
    assert_eq!(refused(&folder.path().join("tower-0")).code(), Code::Refused);
}

/// A guest that owns a raw disk can write there whatever it likes, the header of a qcow2 image among it.
#[test]
fn a_base_of_untold_format_may_name_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let trap = folder.path().join("base");
    shell(&format!("qemu-img create -q -u -f qcow2 -F raw -b neighbour {} 1M", trap.display()));
    std::fs::write(folder.path().join("neighbour"), [7; 4096]).unwrap();
    let image = folder.path().join("disk.qcow2");
    shell(&format!("qemu-img create -q -f qcow2 {} 1M", image.display()));
    // A name of a base, and none of its format, which QEMU would refuse to write.
    let mut bytes = std::fs::read(&image).unwrap();
    bytes[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 4]);
    bytes[0x1000..0x1004].copy_from_slice(b"base");
    std::fs::write(&image, bytes).unwrap();
    let error = refused(&image);
    assert_eq!(error.code(), Code::Refused);
    assert!(error.next_step().unwrap().contains("rebase"), "{error:?}");
    // Told that it is raw, it is read as bytes.
    let opened = open(&trap, Some(Format::Raw), &Alone).unwrap();
    assert_eq!((opened.format, opened.blocks.size()), (Format::Raw, std::fs::metadata(&trap).unwrap().len()));
}

#[test]
fn formats_that_are_not_read_are_told_apart_from_raw() {
    let folder = tempfile::tempdir().unwrap();
    for format in ["vdi", "vpc", "qed", "qcow", "parallels"] {
        let image = folder.path().join(format);
        shell(&format!("qemu-img create -q -f {format} {} 4M", image.display()));
        assert_eq!(refused(&image).code(), Code::Unsupported, "{format}");
    }
    let image = folder.path().join("encrypted");
    crate::tools::run(
        "qemu-img",
        ["create", "-q", "--object", "secret,id=k,data=hush", "-f", "qcow2", "-o"].into_iter().chain([
            "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10",
            image.to_str().unwrap(),
            "1M",
        ]),
    );
    let error = refused(&image);
    assert!(error.chain().join(": ").contains("LUKS"), "{error:?}");
}

/// The image as a repository would hand it over: bytes without a file.
#[test]
fn an_image_that_is_no_file_opens_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.qcow2");
    shell(&format!("qemu-img create -q -f qcow2 {} 1M", image.display()));
    let base: Arc<dyn Blocks> = Arc::new(FileBlocks::open(&image).unwrap());
    let opened = open_blocks(base, Path::new("vm/web/vda.qcow2"), None, &Alone).unwrap();
    assert_eq!((opened.blocks.size(), opened.files), (1 << 20, vec!["vm/web/vda.qcow2".into()]));
}
