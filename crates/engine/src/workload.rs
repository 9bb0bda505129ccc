//! Which workload a set of paths is: found again by name among the points, so that no state is kept beside the
//! repository.

use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use mainstay_core::{Id16, WorkloadId, WorkloadKind, WorkloadRef};
use mainstay_repository::PointInfo;

/// A root as points and people have it: with `\xNN` for what is no UTF-8 and two backslashes for one, so that no
/// two roots are written alike.
pub fn root_text(root: &Path) -> String {
    let mut text = String::new();
    for chunk in root.as_os_str().as_bytes().utf8_chunks() {
        text.push_str(&chunk.valid().replace('\\', "\\\\"));
        chunk.invalid().iter().for_each(|byte| text.push_str(&format!("\\x{byte:02x}")));
    }
    text
}

/// The bytes of a root; what is no writing of [`root_text`] stands for itself.
pub fn root_bytes(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((plain, escaped)) = rest.split_once('\\') {
        bytes.extend_from_slice(plain.as_bytes());
        let digits = escaped.strip_prefix('x').and_then(|digits| digits.get(..2));
        let digits = digits.filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        if let Some(byte) = byte {
            bytes.push(byte);
            rest = escaped.get(3..).unwrap_or_default();
        } else {
            bytes.push(b'\\');
            rest = escaped.strip_prefix('\\').unwrap_or(escaped);
        }
    }
    bytes.extend_from_slice(rest.as_bytes());
    bytes
}

/// What a run protects, as far as it tells one workload from another.
#[derive(Clone, Debug)]
pub struct Identity<'a> {
    pub kind: &'a str,
    pub host: &'a str,
    /// Absolute paths.
    pub roots: &'a [String],
    /// The name that the person gave, if any.
    pub name: Option<&'a str>,
    /// Whoever writes cannot read the names of workloads, so that none is known to be free.
    pub blind: bool,
}

/// The workload of these roots: the one that protected the same roots of the same host before, or the one with
/// the given name, or a new one.
///
/// A given name means its workload whatever the roots were. Without one, a new workload is called `HOST:LABEL`,
/// the label being the shortest end of the root's path that no workload with other roots has taken.
pub fn identify(identity: &Identity<'_>, points: &[PointInfo]) -> WorkloadRef {
    let Identity { kind, host, roots, name, blind } = identity;
    let mut mine = points.iter().rev().filter(|point| point.workload.kind.0 == *kind);
    let known = match name {
        Some(name) => mine.find(|point| point.workload.name == *name),
        None => mine.find(|point| point.host == *host && same_roots(&point.roots, roots)),
    };
    if let Some(point) = known {
        return point.workload.clone();
    }
    let taken = |name: &str| points.iter().any(|point| point.workload.name == name);
    let id = derived_id(host, &name.map_or_else(|| sorted(roots).join("\0"), str::to_owned));
    let name = name.map_or_else(|| free_name(host, roots, *blind, &taken), str::to_owned);
    WorkloadRef { id, kind: WorkloadKind((*kind).to_owned()), name }
}

fn sorted(roots: &[String]) -> Vec<String> {
    let mut roots = roots.to_vec();
    roots.sort_unstable();
    roots.dedup();
    roots
}

fn same_roots(one: &[String], other: &[String]) -> bool {
    sorted(one) == sorted(other)
}

fn free_name(host: &str, roots: &[String], blind: bool, taken: &dyn Fn(&str) -> bool) -> String {
    let deepest = roots.iter().map(|root| root.split('/').count()).max().unwrap_or(1);
    let names =
        (if blind { deepest } else { 1 }..=deepest).map(|depth| format!("{host}:{}", label(roots, depth)));
    let numbered = (2..).map(|number: u64| format!("{host}:{}-{number}", label(roots, 1)));
    names.chain(numbered).find(|name| !taken(name)).unwrap_or_default()
}

/// The last `depth` components of each root joined by `-`, the roots by `+`; at most three roots are spelt out.
fn label(roots: &[String], depth: usize) -> String {
    let one = |root: &String| {
        let components: Vec<&str> = root.split('/').filter(|component| !component.is_empty()).collect();
        let from = components.len().saturating_sub(depth);
        match components.get(from..).unwrap_or_default() {
            [] => "system".to_owned(),
            end => end.join("-").replace(['@', '~', ':'], "_"),
        }
    };
    let mut label = roots.iter().take(3).map(one).collect::<Vec<_>>().join("+");
    if roots.len() > 3 {
        label.push_str(&format!("+{}", roots.len() - 3));
    }
    label
}

/// Two first runs at once must agree on the id of a workload, so it follows from its host and its given name, or its
/// roots: the 128-bit FNV-1a hash of both, <http://www.isthe.com/chongo/tech/comp/fnv/>. It need not withstand an attack;
/// whoever may write points may write any id.
pub(crate) fn derived_id(host: &str, name: &str) -> WorkloadId {
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    let bytes = host.bytes().chain([0]).chain(name.bytes());
    let hash = bytes.fold(BASIS, |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME));
    Id16(hash.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;
    use std::path::Path;

    use mainstay_repository::PointInfo;

    use super::{Identity, derived_id, identify};
    use crate::testing::point;

    fn roots(paths: &[&str]) -> Vec<String> {
        paths.iter().map(|path| (*path).to_owned()).collect()
    }

    fn named(paths: &[&str], name: Option<&str>, points: &[PointInfo]) -> mainstay_core::WorkloadRef {
        let blind = points.iter().any(|point| !point.readable);
        identify(&Identity { kind: "files", host: "host", roots: &roots(paths), name, blind }, points)
    }

    fn protecting(paths: &[&str], name: &str) -> PointInfo {
        let mut point = point(1, name, "2026-11-01");
        point.roots = roots(paths);
        point
    }

    #[test]
    fn a_new_workload_is_called_after_host_and_path() {
        for (paths, name) in [
            (&["/home/ann/Documents"][..], "host:Documents"),
            (&["/"], "host:system"),
            (&["/etc", "/srv/www"], "host:etc+www"),
            (&["/a", "/b", "/c", "/d", "/e"], "host:a+b+c+2"),
            (&["/odd/a@b~1"], "host:a_b_1"),
        ] {
            assert_eq!(named(paths, None, &[]).name, name);
        }
    }

    #[test]
    fn the_same_roots_are_the_same_workload_in_any_order_and_under_any_name() {
        let points = [protecting(&["/etc", "/srv"], "config")];
        assert_eq!(named(&["/srv", "/etc"], None, &points), points[0].workload);
        assert_eq!(named(&["/elsewhere"], Some("config"), &points), points[0].workload);
    }

    #[test]
    fn other_roots_never_join_a_workload_by_accident() {
        let points = [protecting(&["/home/ann/data"], "host:data")];
        let other = named(&["/home/bob/data"], None, &points);
        assert_eq!(other.name, "host:bob-data");
        assert_ne!(other.id, points[0].workload.id);
        let points = [protecting(&["/a"], "host:data"), protecting(&["/b"], "host:srv-data")];
        assert_eq!(named(&["/srv/data"], None, &points).name, "host:data-2");
    }

    #[test]
    fn whoever_cannot_read_names_never_joins_two_trees() {
        let unreadable = PointInfo { readable: false, roots: Vec::new(), ..point(1, "", "2026-11-01") };
        let points = [unreadable];
        let (one, other) = (named(&["/x1/data"], None, &points), named(&["/x2/data"], None, &points));
        assert_ne!(one.id, other.id);
        assert_eq!((one.name.as_str(), other.name.as_str()), ("host:x1-data", "host:x2-data"));
        assert_eq!(named(&["/x1/data"], None, &[]).id, one.id, "the owner finds the same workload");
        assert_ne!(named(&["/x/1-data"], None, &points).id, named(&["/x/1/data"], None, &points).id);
    }

    #[test]
    fn roots_of_any_bytes_round_trip_and_are_never_written_alike() {
        let odd: [&[u8]; 6] =
            [b"/plain", b"/\xff", b"/\xfe", b"/\\xff", b"/a\\\\b\\", "/\u{e4}\n".as_bytes()];
        let texts = odd.map(|root| super::root_text(Path::new(OsStr::from_bytes(root))));
        assert_eq!(texts.each_ref().map(|text| super::root_bytes(text)), odd.map(<[u8]>::to_vec));
        assert_eq!(texts.iter().collect::<std::collections::BTreeSet<_>>().len(), odd.len());
        assert_eq!(texts[0], "/plain");
    }

    #[test]
    fn ids_follow_from_host_and_name_alone() {
        assert_eq!(derived_id("a", "b"), derived_id("a", "b"));
        assert_ne!(derived_id("a", "b"), derived_id("ab", ""));
        assert_eq!(named(&["/etc"], None, &[]).id, named(&["/etc"], None, &[]).id);
    }
}
