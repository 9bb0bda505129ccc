//! Pages that were not what their checksums say: read again, because they may only have been torn, and told of if they
//! really are bad.

use mainstay_core::{Error, ItemPath, Result, Skip, SkipReason};

use super::base::{DATA, SPACES, TABLESPACES};
use super::checksum::is_sound;
use super::lsn::Lsn;
use super::watch::{Suspect, hex};
use super::wire::Connection;

/// So many pages of a file are named.
const NAMED_MAX: usize = 8;

/// One finding for each file that has bad pages. `start` is where the backup began.
pub(super) fn findings(
    suspects: &[Suspect],
    mut sql: Option<&mut Connection>,
    page_bytes: usize,
    start: Lsn,
) -> Result<Vec<Skip>> {
    let mut findings = Vec::new();
    for of_file in suspects.chunk_by(|one, other| one.path == other.path) {
        let (mut bad, mut unsure) = (Vec::new(), false);
        for suspect in of_file {
            match sql.as_mut().map(|sql| read_again(sql, suspect, page_bytes)) {
                Some(Again::Page(page)) if is_sound(&page, suspect.block, start) => continue,
                Some(Again::Page(_)) => {}
                Some(Again::Gone) => continue,
                Some(Again::NotAllowed) | None => unsure = true,
            }
            bad.push(suspect.page);
        }
        if let Some(first) = of_file.first().filter(|_| !bad.is_empty()) {
            findings.push(Skip {
                path: stored_at(&first.path)?,
                reason: SkipReason::Corrupt,
                detail: detail(&bad, unsure),
            });
        }
    }
    Ok(findings)
}

fn detail(bad: &[u32], unsure: bool) -> String {
    let named: Vec<String> = bad.iter().take(NAMED_MAX).map(u32::to_string).collect();
    let more = match bad.len().saturating_sub(NAMED_MAX) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let pages = if bad.len() == 1 { "page" } else { "pages" };
    let unsure = if unsure {
        "; read once only, so it may have been torn: GRANT pg_read_server_files TO the role lets it be read again"
    } else {
        ""
    };
    format!("{pages} {}{more} not as the checksum says{unsure}", named.join(", "))
}

enum Again {
    Page(Vec<u8>),
    /// The relation has been dropped or cut: the log says so too.
    Gone,
    NotAllowed,
}

fn read_again(sql: &mut Connection, suspect: &Suspect, page_bytes: usize) -> Again {
    let path = String::from_utf8_lossy(&suspect.path).replace('\'', "''");
    let at = u64::from(suspect.page) * page_bytes as u64;
    let query = format!(
        "SELECT pg_catalog.encode(pg_catalog.pg_read_binary_file('{path}', {at}, {page_bytes}, true), 'hex')"
    );
    match sql.query(&query) {
        Ok(rows) => {
            let text = rows.into_iter().next().and_then(|row| row.into_iter().next()).flatten();
            match text.as_deref().and_then(hex) {
                Some(page) if page.len() == page_bytes => Again::Page(page),
                _ => Again::Gone,
            }
        }
        Err(_error) => Again::NotAllowed,
    }
}

/// Where the point has a file that the server names.
fn stored_at(path: &[u8]) -> Result<ItemPath> {
    let in_space = path.strip_prefix(format!("{SPACES}/").as_bytes());
    let (top, rest) = in_space.map_or((DATA, path), |rest| (TABLESPACES, rest));
    ItemPath::new([top.as_bytes(), b"/", rest].concat())
        .map_err(|error| Error::integrity("the server named a file impossibly").because(error))
}

#[cfg(test)]
mod tests {
    use super::{detail, stored_at};

    #[test]
    fn bad_pages_are_named_where_the_point_has_them() {
        assert_eq!(stored_at(b"base/5/1").unwrap().to_string(), "data/base/5/1");
        assert_eq!(stored_at(b"pg_tblspc/9/PG/5/1").unwrap().to_string(), "tablespaces/9/PG/5/1");
        assert_eq!(detail(&[7], false), "page 7 not as the checksum says");
        let many: Vec<u32> = (0..20).collect();
        assert!(detail(&many, true).starts_with("pages 0, 1, 2, 3, 4, 5, 6, 7 and 12 more not"));
    }
}
