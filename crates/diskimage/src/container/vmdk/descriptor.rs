//! The text that describes a disk.

use mainstay_core::{Code, Error, Result};

/// Parts of one disk.
const PARTS_MAX: usize = 1024;

/// No parent, as VMware writes it.
const NO_PARENT: u32 = u32::MAX;

/// What the text says, as far as reading needs it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    /// Changes with every first write after the disk was opened.
    pub(super) id: u32,
    /// The parent's `id` when this layer was made; `None` without a parent.
    pub(super) parent_id: Option<u32>,
    pub(super) parent_name: Option<String>,
    pub(super) parts: Vec<Part>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) kind: PartKind,
    pub(super) sectors: u64,
    pub(super) name: String,
    /// In sectors of a flat file.
    pub(super) offset: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum PartKind {
    Flat,
    Sparse,
    Zero,
}

impl Descriptor {
    pub(super) fn parse(text: &[u8]) -> Result<Self> {
        // Within a sparse file NULs fill the space up.
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        let text = std::str::from_utf8(text)
            .map_err(|error| Error::integrity("the description is not UTF-8 text").because(error))?;
        let mut found = Self { id: 0, parent_id: None, parent_name: None, parts: Vec::new() };
        for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
            let first = line.split_whitespace().next().unwrap_or_default();
            if ["RW", "RDONLY", "NOACCESS"].contains(&first) {
                found.parts.push(Part::parse(line)?);
            } else if let Some((name, value)) = line.split_once('=') {
                found.set(name.trim(), value.trim())?;
            }
            if found.parts.len() > PARTS_MAX {
                return Err(Error::integrity(format!("a disk of more than {PARTS_MAX} parts")));
            }
        }
        Ok(found)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let number = || {
            u32::from_str_radix(value, 16).map_err(|error| {
                Error::integrity(format!("the description has the {name} {value:?}")).because(error)
            })
        };
        match name {
            "CID" => self.id = number()?,
            "parentCID" => self.parent_id = Some(number()?).filter(|id| *id != NO_PARENT),
            "parentFileNameHint" => self.parent_name = Some(value.trim_matches('"').to_owned()),
            _ => {}
        }
        Ok(())
    }
}

impl Part {
    /// `RW 4192256 SPARSE "disk-s001.vmdk"`, with an offset behind the name of a flat file.
    fn parse(line: &str) -> Result<Self> {
        let damaged = || Error::integrity(format!("the description has a part like {line:?}"));
        let mut quoted = line.splitn(3, '"');
        let mut words = quoted.next().unwrap_or_default().split_whitespace().skip(1);
        let name = quoted.next().unwrap_or_default();
        let sectors = words.next().and_then(|word| word.parse().ok()).ok_or_else(damaged)?;
        let kind = match words.next().ok_or_else(damaged)? {
            "FLAT" | "VMFS" => PartKind::Flat,
            "SPARSE" => PartKind::Sparse,
            "ZERO" => PartKind::Zero,
            other => {
                return Err(Error::new(
                    Code::Unsupported,
                    format!("VMDK parts of kind {other} are not read"),
                )
                .hint("Convert the disk with `qemu-img convert -O qcow2` or VMware's vmkfstools."));
            }
        };
        if name.is_empty() && kind != PartKind::Zero {
            return Err(damaged());
        }
        let offset = match quoted.next().unwrap_or_default().split_whitespace().next() {
            Some(word) => word.parse().map_err(|_not_a_number| damaged())?,
            None => 0,
        };
        Ok(Self { kind, sectors, name: name.to_owned(), offset })
    }
}

#[cfg(test)]
mod tests {
    use super::{Descriptor, Part, PartKind};

    #[test]
    fn a_description_as_vmware_writes_it() {
        let text = b"# Disk DescriptorFile\r\nversion=1\r\nCID=fb183c20\r\nparentCID=ffffffff\r\n\
            createType=\"vmfs\"\r\n# Extent description\r\nRW 16777216 VMFS \"web 1-flat.vmdk\" 64\r\n\
            RW 63 ZERO\r\nddb.adapterType = \"lsilogic\"\r\n";
        let found = Descriptor::parse(text).unwrap();
        let flat =
            Part { kind: PartKind::Flat, sectors: 1 << 24, name: "web 1-flat.vmdk".into(), offset: 64 };
        let zero = Part { kind: PartKind::Zero, sectors: 63, name: String::new(), offset: 0 };
        let expected =
            Descriptor { id: 0xfb18_3c20, parent_id: None, parent_name: None, parts: vec![flat, zero] };
        assert_eq!(found, expected);
        for odd in
            ["RW x FLAT \"a\"", "RW 1", "RW 1 FLAT", "RW 1 FLAT \"a\" x", "RW 1 SESPARSE \"a\"", "CID=z"]
        {
            assert!(Descriptor::parse(odd.as_bytes()).is_err(), "{odd}");
        }
    }
}
