//! Configuration files outside the data directory, which no base backup holds: read through SQL, where the role may.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use mainstay_core::{Error, ItemPath, Result, Skip, SkipReason};

use super::watch::hex;
use super::wire::Connection;

/// Below this a point has them, by their full names.
pub const CONFIGURATION: &str = "configuration";

/// Since this version `pg_hba.conf` may include other files.
const INCLUDES_IN_HBA: u32 = 160_000;
/// No file that people write is longer.
const FILE_BYTES_MAX: usize = 16 << 20;

/// What was found.
#[derive(Default)]
pub(super) struct Configuration {
    /// By their names in the point.
    pub(super) files: Vec<(ItemPath, Vec<u8>)>,
    pub(super) directories: BTreeSet<ItemPath>,
    pub(super) skips: Vec<Skip>,
}

/// Reads what the server says that it has read.
///
/// Errors: those of the connection. What the role may not read is a skip.
pub(super) fn read(sql: &mut Connection, version: u32) -> Result<Configuration> {
    let names = "SELECT name, setting FROM pg_catalog.pg_settings WHERE name IN \
                 ('data_directory', 'config_file', 'hba_file', 'ident_file')";
    let (mut data, mut files) = (None, BTreeSet::new());
    for row in sql.query(names)? {
        match row.as_slice() {
            [Some(name), Some(value)] if name == "data_directory" => data = Some(PathBuf::from(value)),
            [_, Some(value)] => {
                files.insert(PathBuf::from(value));
            }
            _ => {}
        }
    }
    // Whoever is not told of it is no pg_monitor: the settings say so too.
    let Some(data) = data else { return Ok(Configuration::default()) };
    let mut questions = vec![
        "SELECT DISTINCT sourcefile FROM pg_catalog.pg_file_settings",
        "SELECT DISTINCT sourcefile FROM pg_catalog.pg_settings WHERE sourcefile IS NOT NULL",
    ];
    if version >= INCLUDES_IN_HBA {
        questions.push("SELECT DISTINCT file_name FROM pg_catalog.pg_hba_file_rules");
        questions.push("SELECT DISTINCT file_name FROM pg_catalog.pg_ident_file_mappings");
    }
    for question in questions {
        // Some of them only a superuser may ask.
        let rows = sql.query(question).unwrap_or_default();
        files.extend(rows.into_iter().filter_map(|row| row.into_iter().next()?).map(PathBuf::from));
    }
    let mut found = Configuration::default();
    for file in files.iter().filter(|file| file.is_absolute() && !file.starts_with(&data)) {
        let path = stored_at(file)?;
        match one(sql, file) {
            Ok(text) => {
                let included = directories(&text, file);
                let outside = included.iter().filter(|directory| !directory.starts_with(&data));
                outside
                    .chain(file.parent().map(Path::to_owned).iter())
                    .try_for_each(|directory| found.add(directory))?;
                found.files.push((path, text));
            }
            Err(detail) => found.skips.push(Skip { path, reason: SkipReason::Unreadable, detail }),
        }
    }
    Ok(found)
}

impl Configuration {
    /// A directory, and all above it.
    fn add(&mut self, directory: &Path) -> Result<()> {
        for above in directory.ancestors() {
            self.directories.insert(stored_at(above)?);
        }
        Ok(())
    }
}

/// As a point has it.
fn stored_at(file: &Path) -> Result<ItemPath> {
    use std::os::unix::ffi::OsStrExt as _;
    let mut path = CONFIGURATION.as_bytes().to_vec();
    for component in file.components() {
        if let Component::Normal(name) = component {
            path.push(b'/');
            path.extend_from_slice(name.as_bytes());
        }
    }
    ItemPath::new(path).map_err(|error| Error::integrity("the server named a file impossibly").because(error))
}

fn one(sql: &mut Connection, file: &Path) -> std::result::Result<Vec<u8>, String> {
    let name = file.display().to_string().replace('\'', "''");
    let question = format!("SELECT pg_catalog.encode(pg_catalog.pg_read_binary_file('{name}'), 'hex')");
    let rows = sql.query(&question).map_err(|error| {
        format!(
            "{}; with GRANT pg_read_server_files and GRANT EXECUTE ON FUNCTION pg_read_binary_file(text) TO the role it \
             can be read",
            error.chain().join(": ")
        )
    })?;
    let text = rows.into_iter().next().and_then(|row| row.into_iter().next()).flatten().unwrap_or_default();
    hex(&text)
        .filter(|text| text.len() <= FILE_BYTES_MAX)
        .ok_or_else(|| "the server does not tell what is in it".to_owned())
}

/// The directories that a file includes: they must be there, even empty.
fn directories(text: &[u8], file: &Path) -> Vec<PathBuf> {
    let text = String::from_utf8_lossy(text);
    let line = |line: &str| {
        let rest = line.trim_start().strip_prefix("include_dir")?;
        let name = rest.trim_start().trim_start_matches('=').trim_start();
        let name = match name.strip_prefix('\'') {
            Some(quoted) => quoted.split('\'').next()?,
            None => name.split([' ', '\t', '#']).next()?,
        };
        (!name.is_empty()).then(|| file.parent().unwrap_or(Path::new("/")).join(name))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::{directories, stored_at};

    #[test]
    fn included_directories_are_found_as_the_server_finds_them() {
        let text = b"#include_dir 'no'\n include_dir = 'conf.d'\t# yes\ninclude_dir /srv/more\ninclude_dir=''\nport = 1\n";
        let found = directories(text, Path::new("/etc/postgresql/15/main/postgresql.conf"));
        assert_eq!(found, ["/etc/postgresql/15/main/conf.d", "/srv/more"].map(PathBuf::from));
        let path = stored_at(Path::new("/etc/../etc/x.conf")).unwrap();
        assert_eq!(path.to_string(), "configuration/etc/etc/x.conf", "nothing leads out");
    }
}
