use std::sync::LazyLock;

use mainstay_core::{Code, Time};
use proptest::prelude::*;

use super::kit::{Kit, Page};
use super::slot::{About, Cost, Lock};
use super::*;

static OWNER: LazyLock<KeyRing> = LazyLock::new(|| KeyRing::create().unwrap());

const CHEAP: Cost = Cost { memory_kib: 64, passes: 1, lanes: 1 };

fn about(label: &str) -> About {
    About { label: label.to_owned(), created: Time::from_seconds(1_795_000_000) }
}

fn signing_key(byte: u8) -> SigningKey {
    SigningKey::from_seed(Secret::new([byte; 32])).unwrap()
}

fn code<T>(result: Result<T>) -> Code {
    result.err().expect("this must fail").code()
}

fn rings() -> Vec<(KeyRing, &'static str)> {
    vec![
        (OWNER.clone(), "write, read, expire, collect, own"),
        (OWNER.write_only(signing_key(1)), "write"),
        (OWNER.collector(signing_key(2)).unwrap(), "expire, collect"),
        (OWNER.reader().unwrap(), "read"),
    ]
}

#[test]
fn each_ring_has_its_powers_and_no_other() {
    for (ring, powers) in rings() {
        // What holds of a ring holds of its bytes.
        let ring = KeyRing::decode(&ring.encode()).unwrap();
        let can = ring.powers();
        assert_eq!(can.to_string(), powers);
        assert_eq!(ring.family(), OWNER.family());
        assert_eq!(ring.content_public(), OWNER.content_public());
        assert_eq!(ring.structure_public(), OWNER.structure_public());
        assert_eq!(ring.content_secret().is_ok(), can.contains(Powers::READ));
        assert_eq!(ring.root().is_ok(), can.contains(Powers::OWN));
        for power in [Powers::WRITE, Powers::EXPIRE, Powers::COLLECT] {
            assert_eq!(ring.writer(power).is_ok(), can.contains(power), "{powers}: {power}");
        }
        assert_eq!(ring.structure_secret().is_ok(), can.contains(Powers::COLLECT));
        assert_eq!(ring.domains().len(), 1);
    }
    let agent = OWNER.write_only(signing_key(1));
    assert_eq!(code(agent.content_secret()), Code::NoPower);
    assert_eq!(code(agent.reader()), Code::NoPower);
    assert_eq!(code(agent.collector(signing_key(3))), Code::NoPower);
    assert_eq!(agent.writer(Powers::WRITE).unwrap().verifying_key(), signing_key(1).verifying_key());
}

/// The bytes of a lesser ring hold none of the secrets it must not have.
#[test]
fn secrets_do_not_travel_with_lesser_rings() {
    let holds = |ring: &KeyRing, secret: &Secret| ring.encode().windows(32).any(|bytes| bytes == &secret[..]);
    let root = OWNER.root().unwrap().signing_key().seed().clone();
    let content = OWNER.content_secret().unwrap().secret().clone();
    let structure = OWNER.structure_secret().unwrap().secret().clone();
    let writer = OWNER.writer(Powers::WRITE).unwrap().seed().clone();
    for secret in [&root, &content, &structure, &writer] {
        assert!(holds(&OWNER, secret));
    }
    for (ring, powers) in rings().iter().skip(1) {
        assert!(!holds(ring, &root) && !holds(ring, &writer));
        assert_eq!(holds(ring, &content), *powers == "read");
        assert_eq!(holds(ring, &structure), *powers == "expire, collect");
    }
}

#[test]
fn domains_are_added_and_left_out() {
    let mut owner = OWNER.clone();
    let first = owner.domains()[0].domain;
    let new = DomainKeys::generate().unwrap();
    owner.add_domain(new.clone()).unwrap();
    assert_eq!(code(owner.add_domain(new.clone())), Code::AlreadyExists);
    let agent = owner.within(&[new.domain]).unwrap().write_only(signing_key(4));
    let agent = KeyRing::decode(&agent.encode()).unwrap();
    assert_eq!(*agent.domain(new.domain).unwrap().id_key, *new.id_key);
    assert_eq!(*agent.domain(new.domain).unwrap().page_key, *new.page_key);
    assert_eq!(agent.domain(new.domain).unwrap().index_key.as_bytes(), new.index_key.as_bytes());
    assert_eq!(code(agent.domain(first)), Code::NoPower);
    assert_eq!(code(agent.within(&[first])), Code::NoPower);
}

/// Offset of the value of the first part with this tag, and its length.
fn part(bytes: &[u8], tag: u16) -> (usize, usize) {
    let mut at = 14;
    loop {
        let found = u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let len = u32::from_le_bytes(bytes[at + 2..at + 6].try_into().unwrap()) as usize;
        if found == tag {
            return (at + 6, len);
        }
        at += 6 + len;
    }
}

#[test]
fn damaged_and_newer_rings_are_refused_with_their_reason() {
    let whole = OWNER.encode();
    for len in 0..whole.len() {
        assert_eq!(code(KeyRing::decode(&whole[..len])), Code::Integrity, "{len} bytes");
    }
    let resized = |mut bytes: Vec<u8>| {
        let len = (bytes.len() - 14) as u32;
        bytes[10..14].copy_from_slice(&len.to_le_bytes());
        KeyRing::decode(&bytes)
    };
    let with = |extra: &[u8]| resized([&whole[..], extra].concat());
    assert_eq!(code(with(&[0])), Code::Integrity);
    assert_eq!(code(with(&[99, 0, 1, 0, 0, 0, 7])), Code::TooNew);
    assert_eq!(with(&[99, 0x80, 1, 0, 0, 0, 7]).unwrap().powers(), OWNER.powers());
    assert_eq!(code(with(&[99, 0x80, 2, 0, 0, 0, 7])), Code::Integrity);
    let (writer, len) = part(&whole, 8);
    assert_eq!(code(with(&whole[writer - 6..writer + len])), Code::Integrity, "a writer twice");
    let (domain, len) = part(&whole, 7);
    let again = [&whole[..writer - 6], &whole[domain - 6..domain + len]].concat();
    assert_eq!(code(resized(again)), Code::Integrity, "a domain twice");
    assert_eq!(code(resized(whole[..domain].to_vec())), Code::Integrity, "a part without its value");

    let mut boastful = OWNER.write_only(signing_key(1)).encode().to_vec();
    let (writer, len) = part(&boastful, 8);
    boastful[writer + 32..writer + len].fill(0xFF);
    assert_eq!(KeyRing::decode(&boastful).unwrap().powers().to_string(), "write, expire, collect");

    let mut newer = whole.to_vec();
    newer[8] = 2;
    assert_eq!(code(KeyRing::decode(&newer)), Code::TooNew);
    let mut swapped = whole.to_vec();
    let other = signing_key(9).verifying_key();
    let (root, _len) = part(&whole, 1);
    swapped[root..root + 32].copy_from_slice(&other.0);
    assert_eq!(code(KeyRing::decode(&swapped)), Code::Integrity, "root keys that are no pair");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn hostile_bytes_never_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6), cut: prop::sample::Index, noise: Vec<u8>) {
        let ring = OWNER.write_only(signing_key(1));
        let slot = slot::seal_with_key(&ring, &about("x"), &Secret::new([1; 32])).unwrap();
        let text = credential::encode(&ring);
        for whole in [&ring.encode()[..], &slot, text.as_bytes(), &noise] {
            let mut bytes = whole.to_vec();
            for (at, byte) in flips.iter().filter(|_| !whole.is_empty()) {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            bytes.truncate(cut.index(bytes.len() + 1));
            let _any = KeyRing::decode(&bytes);
            let _any = slot::read_header(&bytes);
            let _any = slot::open_with_key(&bytes, &Secret::new([1; 32]));
            let text = String::from_utf8_lossy(&bytes);
            let _any = credential::decode(&text);
            let _any = Kit::parse(&text);
        }
    }

    #[test]
    fn kits_survive_how_people_type(family: [u8; 32], key: [u8; 32], upper: bool, dashes: bool) {
        let family = FamilyId(family);
        let kit = Kit::with_key(&family, Secret::new(key));
        let typed = kit.lines().replace('0', "o").replace('1', "l").replace("l:", "1:");
        let typed = if upper { typed.to_uppercase() } else { typed.to_lowercase() };
        let typed = if dashes { typed } else { typed.replace('-', "  ") };
        let read = Kit::parse(&typed).unwrap();
        prop_assert_eq!(&read.key()[..], &key[..]);
        prop_assert!(read.belongs_to(&family));
        // Without numbers and without line ends as well.
        let bare: String = kit.lines().lines().map(|line| line.split_once(':').unwrap().1.trim().to_owned()).collect();
        let read = Kit::parse(&bare).unwrap();
        prop_assert_eq!(&read.key()[..], &key[..]);
    }
}

#[test]
fn a_slot_opens_with_its_passphrase_and_says_whose_it_is_otherwise() {
    let slot = slot::seal_with_passphrase(&OWNER, &about("laptop\u{1b}"), b"correct horse", CHEAP).unwrap();
    let ring = slot::open_with_passphrase(&slot, b"correct horse").unwrap();
    assert_eq!(*ring.encode(), *OWNER.encode());

    let header = slot::read_header(&slot).unwrap();
    assert_eq!((header.family, &header.about), (OWNER.family().prefix(), &about("laptop\u{1b}")));
    assert_eq!(header.powers, OWNER.powers());
    assert!(matches!(header.lock, Lock::Passphrase { cost: CHEAP, .. }));

    let error = slot::open_with_passphrase(&slot, b"wrong").err().unwrap();
    assert_eq!(error.code(), Code::WrongKey);
    for part in ["laptop\\u{1b}", &OWNER.family().short(), &header.slot.to_string()] {
        assert!(error.what().contains(part), "{error} lacks {part}");
    }
    assert_eq!(code(slot::open_with_key(&slot, &Secret::new([0; 32]))), Code::Usage);
    assert_eq!(code(slot::seal_with_passphrase(&OWNER, &about("x"), b"", CHEAP)), Code::Usage);
    let long = about(&"x".repeat(slot::LABEL_LEN_MAX + 1));
    assert_eq!(code(slot::seal_with_passphrase(&OWNER, &long, b"p", CHEAP)), Code::Usage);
    assert!(slot.len() < slot::SLOT_LEN_MAX);
}

/// Recomputes the digest at the end, as an attacker would.
fn with_digest(mut slot: Vec<u8>) -> Vec<u8> {
    let body = slot.len() - 16;
    let digest = blake3::hash(&slot[..body]);
    slot[body..].copy_from_slice(&digest.as_bytes()[..16]);
    slot
}

#[test]
fn damage_is_told_from_a_wrong_key_and_no_byte_can_be_changed() {
    let key = Secret::new([5; 32]);
    let slot = slot::seal_with_key(&OWNER.write_only(signing_key(1)), &about("agent"), &key).unwrap();
    assert_eq!(code(slot::open_with_key(&slot, &Secret::new([6; 32]))), Code::WrongKey);
    for at in 0..slot.len() {
        let mut bad = slot.clone();
        bad[at] ^= 1;
        let failure = code(slot::open_with_key(&bad, &key));
        assert!(matches!(failure, Code::Integrity | Code::TooNew), "byte {at}: {failure:?}");
        let failure = slot::open_with_key(&with_digest(bad), &key);
        assert!(at >= slot.len() - 16 || failure.is_err(), "byte {at} is not authenticated");
    }
    for len in 0..slot.len() {
        assert_eq!(code(slot::open_with_key(&slot[..len], &key)), Code::Integrity);
    }
}

#[test]
fn silly_costs_are_refused_before_they_are_paid() {
    let slot = slot::seal_with_passphrase(&OWNER, &about(""), b"p", CHEAP).unwrap();
    let silly = [
        (u32::MAX, 1, 1),
        ((1 << 20) + 1, 1, 1),
        (1 << 20, 17, 1),
        (64, u32::MAX, 1),
        (7, 1, 1),
        (64, 0, 1),
        (64, 1, 0),
        (64, 1, 17),
        (0, 0, 0),
    ];
    for (memory, passes, lanes) in silly {
        let mut hostile = slot.clone();
        for (at, value) in [(56, memory), (60, passes), (64, lanes)] {
            hostile[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
        }
        let result = slot::open_with_passphrase(&with_digest(hostile), b"p");
        assert_eq!(code(result), Code::Integrity, "{memory} KiB, {passes} passes, {lanes} lanes");
    }
    // The default is within the bounds, and the parameters are what RFC 9106 recommends.
    let slot = slot::seal_with_passphrase(&OWNER, &about(""), b"p", Cost::default()).unwrap();
    slot::open_with_passphrase(&slot, b"p").unwrap();
}

#[test]
fn a_kit_opens_its_slot_and_names_the_repository_of_another() {
    let kit = Kit::generate(&OWNER.family()).unwrap();
    let slot = kit.seal_slot(&OWNER, &about("recovery kit")).unwrap();
    let page = Page { location: "/srv/backup", made: about("").created, label: "recovery kit" };
    let printed = kit.print(&page);
    for part in ["/srv/backup", "2026-11-", &OWNER.family().short(), "recovery kit"] {
        assert!(printed.contains(part), "{} lacks {part}", *printed);
    }
    let read = Kit::parse(&printed).unwrap();
    assert_eq!(read.open_slot(&slot).unwrap().powers(), OWNER.powers());

    let stranger = Kit::generate(&FamilyId([0xEE; 32])).unwrap();
    let error = stranger.open_slot(&slot).err().unwrap();
    assert_eq!(error.code(), Code::WrongKey);
    assert!(error.what().contains("eeee-eeee") && error.what().contains(&OWNER.family().short()), "{error}");
    assert_eq!(code(Kit::generate(&OWNER.family()).unwrap().open_slot(&slot)), Code::WrongKey);
}

#[test]
fn a_mistyped_line_of_a_kit_is_named() {
    let kit = Kit::with_key(&FamilyId([7; 32]), Secret::new(std::array::from_fn(|i| i as u8 * 7)));
    let text = kit.lines();
    let lines: Vec<&str> = text.lines().collect();
    let named = |text: &str, number: usize, how: &str| {
        let error = Kit::parse(text).expect_err(text);
        assert_eq!(error.code(), Code::Usage);
        assert!(
            error.what().starts_with(&format!("line {number} ")) && error.what().contains(how),
            "{error}"
        );
    };
    let with_line = |number: usize, line: &str| {
        let mut lines: Vec<_> = lines.iter().map(|line| (*line).to_owned()).collect();
        lines[number - 1] = line.to_owned();
        lines.join("\n")
    };
    for (number, line) in (1..).zip(&lines) {
        let symbols: Vec<usize> =
            (2..line.len()).filter(|at| line.as_bytes()[*at].is_ascii_alphanumeric()).collect();
        assert_eq!(symbols.len(), 18);
        for (at, next) in symbols.iter().zip(symbols.iter().skip(1).chain([&symbols[0]])) {
            for wrong in
                "0123456789ABCDEFGHJKMNPQRSTVWXYZ".chars().filter(|c| *c != char::from(line.as_bytes()[*at]))
            {
                let mut typed = line.as_bytes().to_vec();
                typed[*at] = wrong as u8;
                named(&with_line(number, std::str::from_utf8(&typed).unwrap()), number, "mistyped");
            }
            let mut typed = line.as_bytes().to_vec();
            typed.swap(*at, *next);
            if typed != line.as_bytes() {
                named(&with_line(number, std::str::from_utf8(&typed).unwrap()), number, "mistyped");
            }
            let mut typed = (*line).to_owned();
            typed.remove(*at);
            named(&with_line(number, &typed), number, "17 characters");
        }
        named(&with_line(number, ""), number, "missing");
        named(
            &with_line(number, &line.replacen(char::from(line.as_bytes()[symbols[0]]), "U", 1)),
            number,
            "“U”",
        );
        named(&format!("{}\n{line}", *text), number, "twice");
    }
    let swapped = text.replace("1:", "9:").replace("2:", "1:").replace("9:", "2:");
    named(&swapped, 1, "mistyped");
    // Lines of two kits, each line by itself well formed.
    let other = Kit::with_key(&FamilyId([7; 32]), Secret::new([1; 32]));
    let mixed = with_line(5, other.lines().lines().nth(4).unwrap());
    assert!(Kit::parse(&mixed).err().unwrap().what().contains("do not belong together"));
    assert_eq!(code(Kit::parse("")), Code::Usage);
}

#[test]
fn golden_kit() {
    let kit = Kit::with_key(&FamilyId([0xB7; 32]), Secret::new(std::array::from_fn(|i| i as u8 * 7)));
    assert_eq!(kit.lines().lines().next(), Some("1: 06VV-FDXQ-PYVV-FDXQ-GZ"));
    assert_eq!(kit.lines().lines().last(), Some("5: QQ2C-QMPS-KA3P-TXRQ-RV"));
}

#[test]
fn a_credential_file_is_read_back_and_damage_is_seen() {
    let agent = OWNER.write_only(signing_key(1));
    let text = credential::encode(&agent);
    assert!(text.lines().all(|line| line.len() <= 64));
    assert!(text.contains("\nPowers: write\n"));
    let read = credential::decode(&format!("sent by mail\r\n{}\nbye", text.replace('\n', "\r\n"))).unwrap();
    assert_eq!(*read.encode(), *agent.encode());

    let body = text.find("\n\n").unwrap() + 2..text.rfind("\n-").unwrap();
    for at in body.clone().step_by(11).chain([body.end - 1]) {
        let mut bad = text.as_bytes().to_vec();
        bad[at] = if bad[at] == b'A' { b'B' } else { b'A' };
        assert_eq!(code(credential::decode(std::str::from_utf8(&bad).unwrap())), Code::Integrity, "{at}");
    }
    for bad in
        ["", "-----BEGIN MAINSTAY KEY-----", &text[..text.len() - 40], &text.replace("Powers", "\nPowers")]
    {
        assert_eq!(code(credential::decode(bad)), Code::Integrity);
    }
}

/// Rings of every size, so that base64 ends in each of its three ways.
#[test]
fn credentials_of_every_length_are_read_back() {
    let mut ring = OWNER.within(&[]).unwrap();
    for _ in 0..3 {
        ring.add_domain(DomainKeys::generate().unwrap()).unwrap();
        for ring in [&ring, &ring.write_only(signing_key(1)), &ring.reader().unwrap()] {
            assert_eq!(*credential::decode(&credential::encode(ring)).unwrap().encode(), *ring.encode());
        }
    }
}

#[test]
fn debug_output_shows_no_key_bytes() {
    let key = Secret::new([0xA7; 32]);
    let ring = OWNER.within(&[]).unwrap().write_only(SigningKey::from_seed(key.clone()).unwrap());
    let domain = DomainKeys {
        domain: Id16([1; 16]),
        id_key: key.clone(),
        index_key: SealKey::from_secret(key.clone()),
        cut_key: key.clone(),
        page_key: key.clone(),
    };
    let root = RootKey::from_signing_key(SigningKey::from_seed(key.clone()).unwrap());
    let kit = Kit::with_key(&OWNER.family(), key.clone());
    let shown = format!("{ring:?} {domain:?} {root:?} {kit:?} {key:?} {:?} {:#?}", *OWNER, *OWNER);
    for secret in ["a7a7", "A7A7", "167, 167", "0xa7"] {
        assert!(!shown.contains(secret), "{shown}");
    }
    let root = OWNER.root().unwrap().signing_key().seed().clone();
    assert!(!shown.contains(&format!("{}, {}, {}", root[0], root[1], root[2])), "{shown}");
}

#[test]
fn hostile_slots_and_rings_are_errors() {
    let ring = KeyRing::create().unwrap();
    let about = About { label: "laptop".into(), created: Time::default() };
    let key = Secret::random().unwrap();
    let slot = slot::seal_with_key(&ring, &about, &key).unwrap();
    crate::hostile::feed(&slot, 1 << 20, |bytes| {
        assert!(slot::open_with_key(bytes, &key).is_err() || bytes == slot);
    });
    crate::hostile::feed(&ring.encode(), 1 << 20, |bytes| drop(KeyRing::decode(bytes)));
}
