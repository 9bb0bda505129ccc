//! Which volume a machine mounts where: its own `/etc/fstab` (fstab(5)).

use mainstay_core::ItemPath;

/// A line of the table that names a place in the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) device: Device,
    pub(super) at: ItemPath,
    /// The directory of the file system that is mounted; the root but for subvolumes of btrfs.
    pub(super) base: ItemPath,
    /// Who owns the files of a file system that knows no owners: `umask=0077`, `uid=1000`.
    pub(super) owners: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Device {
    /// Lower case.
    Uuid(String),
    Label(String),
    /// Of the partition; lower case.
    PartUuid(String),
    PartLabel(String),
    /// What stands after `/dev/`.
    Path(String),
    /// No disk of the machine: `server:/export`.
    Elsewhere,
}

/// The table, outer directories first. It comes from a guest: what makes no sense is passed over.
pub(super) fn parse(text: &[u8]) -> Vec<Line> {
    let mut lines: Vec<Line> = text.split(|byte| *byte == b'\n').filter_map(line).collect();
    lines.sort_by_key(|line| line.at.components().count());
    lines
}

fn line(line: &[u8]) -> Option<Line> {
    let text = std::str::from_utf8(line).ok()?.trim();
    if text.starts_with('#') {
        return None;
    }
    let mut fields = text.split_ascii_whitespace();
    let (device, at, kind) = (fields.next()?, fields.next()?, fields.next()?);
    let options = fields.next().unwrap_or_default();
    if matches!(kind, "swap" | "tmpfs" | "proc" | "sysfs") {
        return None;
    }
    let at = path(&unescape(at))?;
    let subvolume = options.split(',').find_map(|option| option.strip_prefix("subvol="));
    let base = subvolume.map_or(Some(ItemPath::root()), |subvolume| path(&unescape(subvolume)))?;
    let owners = options.split(',').filter(|option| is_of_owners(option)).map(str::to_owned).collect();
    Some(Line { device: spec(&unescape(device)).unwrap_or(Device::Elsewhere), at, base, owners })
}

/// Whether an option of mount(8) says who owns files, in nothing but digits.
fn is_of_owners(option: &str) -> bool {
    let known = option
        .split_once('=')
        .filter(|(name, _)| matches!(*name, "umask" | "fmask" | "dmask" | "uid" | "gid"));
    known.is_some_and(|(_, value)| !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()))
}

fn spec(text: &str) -> Option<Device> {
    let text = text.trim_matches('"');
    if let Some(path) = text.strip_prefix("/dev/") {
        let by = |directory: &str| path.strip_prefix(directory);
        return Some(match (by("disk/by-uuid/"), by("disk/by-label/"), by("disk/by-partuuid/")) {
            (Some(uuid), ..) => Device::Uuid(uuid.to_ascii_lowercase()),
            (_, Some(label), _) => Device::Label(label.to_owned()),
            (.., Some(uuid)) => Device::PartUuid(uuid.to_ascii_lowercase()),
            _ => Device::Path(path.to_owned()),
        });
    }
    let (tag, value) = text.split_once('=')?;
    let value = value.trim_matches('"');
    Some(match tag {
        "UUID" => Device::Uuid(value.to_ascii_lowercase()),
        "LABEL" => Device::Label(value.to_owned()),
        "PARTUUID" => Device::PartUuid(value.to_ascii_lowercase()),
        "PARTLABEL" => Device::PartLabel(value.to_owned()),
        _ => return None,
    })
}

fn path(text: &str) -> Option<ItemPath> {
    ItemPath::new(text.trim_matches('/')).ok()
}

/// Blanks in a field are written as three octal digits.
fn unescape(field: &str) -> String {
    let mut out = String::with_capacity(field.len());
    let mut rest = field;
    while let Some(at) = rest.find('\\') {
        out.push_str(rest.get(..at).unwrap_or_default());
        let code = rest.get(at + 1..at + 4).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code.filter(u8::is_ascii) {
            Some(code) => {
                out.push(char::from(code));
                rest = rest.get(at + 4..).unwrap_or_default();
            }
            None => {
                out.push('\\');
                rest = rest.get(at + 1..).unwrap_or_default();
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use mainstay_core::ItemPath;

    use super::{Device, Line, parse};

    fn path(text: &str) -> ItemPath {
        ItemPath::new(text).unwrap()
    }

    #[test]
    fn tables_as_installers_write_them() {
        let table = b"# <file system> <mount point> <type> <options>\n\
            UUID=AbC-1 / ext4 errors=remount-ro 0 1\n\
            \n\
            /dev/mapper/vg-srv\t/srv/my\\040data xfs defaults 0 2\n\
            LABEL=\"boot\" /boot ext2 defaults\n\
            PARTUUID=12ab-03 /boot/efi vfat umask=0077,uid=`id`,exec 0 1\n\
            /dev/disk/by-uuid/FFFF /home btrfs subvol=/@home,compress=zstd 0 0\n\
            UUID=1 none swap sw 0 0\n\
            tmpfs /tmp tmpfs size=1g 0 0\n\
            server:/x /mnt nfs defaults 0 0\n\
            /dev/sr0 /media/../../etc iso9660 ro 0 0\n\
            nonsense\n\
            \xff\xfe / ext4\n";
        let line = |device, at: &str, base: &str| {
            let owners = if at == "boot/efi" { vec!["umask=0077".to_owned()] } else { Vec::new() };
            Line { device, at: path(at), base: path(base), owners }
        };
        assert_eq!(
            parse(table),
            [
                line(Device::Uuid("abc-1".into()), "", ""),
                line(Device::Label("boot".into()), "boot", ""),
                line(Device::Uuid("ffff".into()), "home", "@home"),
                line(Device::Elsewhere, "mnt", ""),
                line(Device::Path("mapper/vg-srv".into()), "srv/my data", ""),
                line(Device::PartUuid("12ab-03".into()), "boot/efi", ""),
            ]
        );
    }
}
