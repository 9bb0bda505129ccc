//! The plan of a recovery, as a person writes it: TOML. What it means is in `docs/guides/recovery-plans.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mainstay_core::{Code, Error, Result};
use mainstay_workloads::vm::{Identity, Shape};
use serde::Deserialize;
use toml::Table;

use super::super::disks::ImageFormat;
use super::super::restore::ImageFolder;
use super::machine::{Recovery, Wait};

/// The longest plan, in bytes.
const PLAN_MAX: usize = 4 << 20;
const VERSION: u32 = 1;

const PLAN_KEYS: [&str; 6] = ["version", "host", "directory", "format", "networks", "machine"];
const MACHINE_KEYS: [&str; 16] = [
    "point",
    "name",
    "after",
    "identity",
    "cpus",
    "memory",
    "cpu",
    "bus",
    "disks",
    "sizes",
    "networks",
    "start",
    "wait",
    "limit",
    "checks",
    "image_only",
];

/// How long an agent, or a check, is waited for when the plan does not say.
const LIMIT: Duration = Duration::from_secs(600);

/// Machines to be brought back, in the order in which they are.
#[derive(Clone, Debug)]
pub struct RecoveryPlan {
    /// As people name hosts of machines.
    pub host: String,
    pub machines: Vec<PlannedMachine>,
}

#[derive(Clone, Debug)]
pub struct PlannedMachine {
    /// As people name points.
    pub point: String,
    /// What the plan calls it, and what it will be called.
    pub name: String,
    /// Those that must be there first.
    pub after: Vec<String>,
    /// Newer files of the machine are not put on its disks.
    pub image_only: bool,
    pub recovery: Recovery,
}

#[derive(Deserialize)]
struct PlanText {
    version: Option<u32>,
    host: String,
    directory: PathBuf,
    #[serde(default)]
    format: FormatText,
    #[serde(default)]
    networks: BTreeMap<String, String>,
    #[serde(default)]
    machine: Vec<MachineText>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum FormatText {
    Raw,
    #[default]
    Qcow2,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum IdentityText {
    #[default]
    New,
    Same,
}

#[derive(Deserialize)]
struct MachineText {
    point: String,
    name: Option<String>,
    #[serde(default)]
    after: Vec<String>,
    #[serde(default)]
    identity: IdentityText,
    cpus: Option<u32>,
    memory: Option<String>,
    cpu: Option<String>,
    bus: Option<String>,
    disks: Option<Vec<String>>,
    #[serde(default)]
    sizes: BTreeMap<String, String>,
    #[serde(default)]
    networks: BTreeMap<String, String>,
    #[serde(default)]
    start: bool,
    wait: Option<String>,
    limit: Option<String>,
    #[serde(default)]
    checks: Vec<String>,
    #[serde(default)]
    image_only: bool,
}

impl RecoveryPlan {
    /// Reads a plan. `base` is what a directory in it is relative to.
    ///
    /// Errors: [`Code::Usage`] with the line, the machine or the key that is wrong and, for a key that is unknown, the
    /// nearest that is known.
    pub fn parse(text: &str, base: &Path) -> Result<Self> {
        if text.len() > PLAN_MAX {
            return Err(Error::new(Code::Usage, "the recovery plan is too long"));
        }
        let table: Table = toml::from_str(text).map_err(|error| wrong(text, &error))?;
        check_keys(&table, &PLAN_KEYS, "the plan")?;
        let machines = table.get("machine").and_then(toml::Value::as_array).into_iter().flatten();
        for (number, machine) in (1..).zip(machines.filter_map(toml::Value::as_table)) {
            let name = ["name", "point"].iter().find_map(|key| machine.get(*key)?.as_str());
            check_keys(machine, &MACHINE_KEYS, &format!("machine {number} ({})", name.unwrap_or("?")))?;
        }
        let plan: PlanText = toml::from_str(text).map_err(|error| wrong(text, &error))?;
        if plan.version.is_some_and(|version| version > VERSION) {
            return Err(Error::new(Code::TooNew, "the recovery plan is written for a newer Mainstay"));
        }
        let machines = plan.machine.iter().map(|machine| planned(machine, &plan, base));
        let machines = ordered(machines.collect::<Result<_>>()?)?;
        Ok(Self { host: plan.host, machines })
    }

    /// Leaves the other machines out; those that are named then count on the others being there.
    ///
    /// Errors: [`Code::Usage`] for a name that is not in the plan.
    pub fn only(&mut self, names: &[String]) -> Result<()> {
        let known: Vec<&str> = self.machines.iter().map(|machine| machine.name.as_str()).collect();
        if let Some(missing) = names.iter().find(|name| !known.contains(&name.as_str())) {
            return Err(unknown("the plan has no machine", missing, &known));
        }
        if !names.is_empty() {
            self.machines.retain(|machine| names.contains(&machine.name));
        }
        Ok(())
    }
}

fn planned(text: &MachineText, plan: &PlanText, base: &Path) -> Result<PlannedMachine> {
    let workload = text.point.split(['@', '~']).next().unwrap_or_default();
    let name = text.name.clone().unwrap_or_else(|| workload.to_owned());
    let during = |error: Error| error.during(format!("machine {name} of the plan"));
    // Its name is the name of its directory.
    Shape::check_name(&name).map_err(during)?;
    let wait = match text.wait.as_deref() {
        None if text.start => Wait::Agent,
        None | Some("nothing") => Wait::Nothing,
        Some("agent") => Wait::Agent,
        Some(time) => Wait::Time(length(time).map_err(during)?),
    };
    if !text.start && (!text.checks.is_empty() || text.wait.is_some()) {
        let what = "a machine that is not started has nothing to wait for or to check";
        return Err(during(Error::new(Code::Usage, what).hint("start = true")));
    }
    let sizes = text.sizes.iter().map(|(disk, size)| Ok((disk.clone(), bytes(size)?)));
    // The machine's own count first, and what fits everything comes after what does not.
    let mut networks = Vec::new();
    for table in [&text.networks, &plan.networks] {
        let (all, some): (Vec<_>, Vec<_>) = table.iter().partition(|(from, _)| *from == "*");
        for (from, to) in some.into_iter().chain(all) {
            network(to).map_err(during)?;
            networks.push((from.clone(), to.clone()));
        }
    }
    let shape = Shape {
        name: Some(name.clone()),
        identity: match text.identity {
            IdentityText::New => Identity::New,
            IdentityText::Same => Identity::Same,
        },
        cpus: text.cpus,
        memory: text.memory.as_deref().map(bytes).transpose().map_err(during)?,
        cpu_model: text.cpu.clone(),
        bus: text.bus.clone(),
        disks: text.disks.clone(),
        networks,
    };
    let folder = ImageFolder {
        format: match plan.format {
            FormatText::Raw => ImageFormat::Raw,
            FormatText::Qcow2 => ImageFormat::Qcow2,
        },
        sizes: sizes.collect::<Result<_>>().map_err(during)?,
        ..ImageFolder::new(base.join(&plan.directory).join(&name))
    };
    let limit = text.limit.as_deref().map(length).transpose().map_err(during)?.unwrap_or(LIMIT);
    let (asked, checks) = (text.point.clone(), text.checks.clone());
    let recovery = Recovery { asked, shape, folder, start: text.start, wait, limit, checks };
    let (point, after, image_only) = (text.point.clone(), text.after.clone(), text.image_only);
    Ok(PlannedMachine { point, name, after, image_only, recovery })
}

/// Each machine after those that it waits for; otherwise as they were written.
fn ordered(machines: Vec<PlannedMachine>) -> Result<Vec<PlannedMachine>> {
    let names: Vec<String> = machines.iter().map(|machine| machine.name.clone()).collect();
    if machines.is_empty() {
        return Err(Error::new(Code::Usage, "the plan has no machines").hint("each begins with [[machine]]"));
    }
    let known: BTreeSet<&String> = names.iter().collect();
    if known.len() < names.len() {
        return Err(Error::new(Code::Usage, "two machines of the plan have one name").hint("name = \"…\""));
    }
    for machine in &machines {
        if let Some(missing) = machine.after.iter().find(|name| !known.contains(name)) {
            let known: Vec<&str> = names.iter().map(String::as_str).collect();
            let what = format!("{} comes after a machine that is not in the plan:", machine.name);
            return Err(unknown(&what, missing, &known));
        }
    }
    let (mut waiting, mut ordered): (Vec<PlannedMachine>, Vec<PlannedMachine>) = (machines, Vec::new());
    while !waiting.is_empty() {
        let is_there = |name: &String| ordered.iter().any(|machine| machine.name == *name);
        let Some(next) = waiting.iter().position(|machine| machine.after.iter().all(is_there)) else {
            let names: Vec<&str> = waiting.iter().map(|machine| machine.name.as_str()).collect();
            let what = format!("{} wait for each other", names.join(", "));
            return Err(Error::new(Code::Usage, what).hint("one of their after = [...] must go"));
        };
        ordered.push(waiting.remove(next));
    }
    Ok(ordered)
}

fn check_keys(table: &Table, known: &[&str], place: &str) -> Result<()> {
    match table.keys().find(|key| !known.contains(&key.as_str())) {
        Some(strange) => Err(unknown(&format!("{place} has a key that means nothing:"), strange, known)),
        None => Ok(()),
    }
}

fn unknown(what: &str, name: &str, known: &[&str]) -> Error {
    let error = Error::new(Code::Usage, format!("{what} {name:?}"));
    match known.iter().map(|known| (distance(name, known), *known)).min() {
        Some((distance, nearest)) if distance <= 3 => error.hint(format!("do you mean {nearest:?}?")),
        _ => error.hint(format!("there is {}", known.join(", "))),
    }
}

/// How many letters have to be put in, taken out or exchanged.
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (number, letter) in one.chars().enumerate() {
        let mut corner = number;
        let mut left = number + 1;
        for (cell, wanted) in row.iter_mut().skip(1).zip(&other) {
            let exchanged = corner + usize::from(letter != *wanted);
            corner = *cell;
            left = exchanged.min(left + 1).min(*cell + 1);
            *cell = left;
        }
        if let Some(first) = row.first_mut() {
            *first = number + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

fn wrong(text: &str, error: &toml::de::Error) -> Error {
    let before = error.span().and_then(|span| text.get(..span.start));
    let line = before.map(|before| format!(", line {}", before.matches('\n').count() + 1));
    let what = format!("the recovery plan makes no sense{}", line.unwrap_or_default());
    Error::new(Code::Usage, what)
        .because(error.message().to_owned())
        .hint("mainstay vm recover --example shows one")
}

/// What an interface can be plugged into.
fn network(text: &str) -> Result<()> {
    let (kind, name) = text.split_once(':').unwrap_or((text, ""));
    if matches!((kind, name.is_empty()), ("none" | "user", true) | ("network" | "bridge" | "direct", false)) {
        return Ok(());
    }
    Err(Error::new(Code::Usage, format!("nothing can be plugged into {text:?}"))
        .hint("write network:NAME, bridge:NAME, direct:DEVICE, user or none"))
}

/// `512 MiB`, `4GiB`, `2T`.
fn bytes(text: &str) -> Result<u64> {
    let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(digits).unwrap_or((text, ""));
    let shift = match unit.trim() {
        "M" | "MiB" => Some(20),
        "G" | "GiB" => Some(30),
        "T" | "TiB" => Some(40),
        _ => None,
    };
    let number: Option<u64> = number.parse().ok().filter(|number| *number > 0);
    let size = number.zip(shift).and_then(|(number, shift)| number.checked_mul(1 << shift));
    size.ok_or_else(|| {
        Error::new(Code::Usage, format!("{text:?} is not a size"))
            .hint("write it as in 512 MiB, 4 GiB or 2 TiB")
    })
}

/// `90s`, `10m`.
fn length(text: &str) -> Result<Duration> {
    let usage = || {
        Error::new(Code::Usage, format!("{text:?} is not a length of time")).hint("write it as in 30s or 10m")
    };
    let length: jiff::SignedDuration = text.parse().map_err(|error: jiff::Error| usage().because(error))?;
    Duration::try_from(length).map_err(|error| usage().because(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<RecoveryPlan> {
        RecoveryPlan::parse(text, Path::new("/base"))
    }

    const HEAD: &str = "host = 'qemu:///system'\ndirectory = 'images'\n";

    #[test]
    fn a_plan_is_read_and_ordered() {
        let text = format!(
            "{HEAD}format = 'raw'\n[networks]\n'*' = 'none'\n'network:default' = 'bridge:lab'\n\
             [[machine]]\npoint = 'web@latest~1'\nafter = ['db']\nmemory = '4 GiB'\nsizes = {{ vda = '40G' }}\n\
             networks = {{ 'bridge:br0' = 'user' }}\nstart = true\nwait = '30s'\n\
             [[machine]]\npoint = 'base@latest'\nname = 'db'\nidentity = 'same'\nstart = true\nchecks = ['true']\n"
        );
        let plan = parse(&text).unwrap();
        let names: Vec<_> = plan.machines.iter().map(|machine| machine.name.as_str()).collect();
        assert_eq!(names, ["db", "web"]);
        let (db, web) = (&plan.machines[0].recovery, &plan.machines[1].recovery);
        assert_eq!((db.wait, db.shape.identity), (Wait::Agent, Identity::Same));
        assert_eq!(web.wait, Wait::Time(Duration::from_secs(30)));
        assert_eq!((web.shape.memory, web.folder.sizes["vda"]), (Some(4 << 30), 40 << 30));
        assert_eq!(web.folder.directory, Path::new("/base/images/web"));
        let networks: Vec<_> = web.shape.networks.iter().map(|(from, to)| format!("{from} {to}")).collect();
        assert_eq!(networks, ["bridge:br0 user", "network:default bridge:lab", "* none"]);
        let mut one = plan.clone();
        one.only(&["web".into()]).unwrap();
        assert_eq!(one.machines.len(), 1);
        let error = one.only(&["wbe".into()]).unwrap_err();
        assert_eq!(error.next_step(), Some("do you mean \"web\"?"));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place_and_the_nearest_name() {
        let machine = "[[machine]]\npoint = 'web'\n";
        for (text, what) in [
            (format!("{HEAD}formt = 'raw'\n{machine}"), "format"),
            (format!("{HEAD}{machine}memry = '1 GiB'\n"), "memory"),
            (format!("{HEAD}{machine}memory = '1 potato'\n"), "potato"),
            (format!("{HEAD}{machine}memory = 5\n"), "line 5"),
            (format!("{HEAD}{machine}networks = {{ x = 'wire' }}\n"), "wire"),
            (format!("{HEAD}{machine}after = ['wbe']\n"), "web"),
            (format!("{HEAD}{machine}after = ['web']\n"), "wait for each other"),
            (format!("{HEAD}{machine}checks = ['true']\n"), "start = true"),
            (format!("{HEAD}{machine}{machine}"), "one name"),
            (format!("{HEAD}{machine}name = '../x'\n"), "../x"),
            (format!("{HEAD}{machine}identity = 'old'\n"), "line 5"),
            (HEAD.to_owned(), "no machines"),
            (machine.to_owned(), "host"),
            ("host = ".to_owned(), "line 1"),
            (format!("version = 9\n{HEAD}{machine}"), "newer"),
        ] {
            let error = parse(&text).unwrap_err();
            let said = format!("{} {}", error.chain().join(": "), error.next_step().unwrap_or_default());
            assert!(said.contains(what), "{what}: {said}");
            assert!(matches!(error.code(), Code::Usage | Code::TooNew), "{said}");
        }
    }

    #[test]
    fn names_are_near_that_differ_in_few_letters() {
        for (one, other, apart) in [("", "", 0), ("memory", "memry", 1), ("disks", "sizes", 3), ("a", "", 1)]
        {
            assert_eq!((distance(one, other), distance(other, one)), (apart, apart), "{one} {other}");
        }
    }
}
