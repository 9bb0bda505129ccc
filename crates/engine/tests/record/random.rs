//! Random schemas, random rows, random later changes: after a record was deleted and restored, the database equals its twin
//! in which it was never deleted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use mainstay_testkit::lab::Postgres;
use mainstay_testkit::{Rng, for_each_seed};
use mainstay_workloads::postgres::{Refusal, Sql};

use super::{Request, assert_same, copy_database, open, server};

const RULES: [&str; 5] = ["CASCADE", "NO ACTION", "RESTRICT", "SET NULL", "SET DEFAULT"];

struct Fk {
    parent: usize,
    rule: &'static str,
    deferrable: &'static str,
    not_null: bool,
}

struct T {
    name: String,
    /// 0 identity, 1 serial, 2 composite, 3 text.
    key: usize,
    partitioned: bool,
    fks: Vec<Fk>,
    unique: bool,
    counted: bool,
}

impl T {
    fn key_columns(&self) -> Vec<(&'static str, &'static str)> {
        match self.key {
            0 => vec![("id", "int")],
            1 => vec![("id", "bigint")],
            2 => vec![("\"Part A\"", "int"), ("b", "text")],
            _ => vec![("\"the \"\"key\"", "text")],
        }
    }

    fn key_of(&self, n: u64) -> Vec<String> {
        match self.key {
            0 | 1 => vec![n.to_string()],
            2 => vec![(n % 3).to_string(), format!("k{n}")],
            _ => vec![format!("K'{n}\"\\{{}},")],
        }
    }
}

struct Schema {
    tables: Vec<T>,
    link: bool,
}

/// A row of the schema: for each foreign key of its table what it refers to.
type Rows = BTreeMap<(usize, u64), Vec<Option<u64>>>;

fn schema(rng: &mut Rng) -> Schema {
    let count = 3 + rng.below(5);
    let mut tables = Vec::new();
    for index in 0..count {
        let partitioned = index > 0 && rng.chance(20);
        let key = if partitioned { 2 + rng.below(2) } else { rng.below(4) };
        let name = if rng.chance(20) { format!("\"we\"\"ird.{index} t\"") } else { format!("t{index}") };
        let mut fks = Vec::new();
        for _ in 0..if index == 0 { rng.below(2) } else { 1 + rng.below(3) } {
            // Most point backwards; some close a circle, some are of the table itself.
            let parent = if rng.chance(65) && index > 0 { rng.below(index) } else { rng.below(count) };
            let backwards = parent < index;
            let not_null = backwards && rng.chance(35);
            let rule = match (not_null, backwards) {
                (true, _) => RULES[rng.below(3)],
                (false, true) => RULES[rng.below(5)],
                (false, false) => ["CASCADE", "SET NULL", "NO ACTION"][rng.below(3)],
            };
            let deferrable = ["", "DEFERRABLE", "DEFERRABLE INITIALLY DEFERRED"][rng.below(3)];
            fks.push(Fk { parent, rule, deferrable, not_null });
        }
        tables.push(T { name, key, partitioned, fks, unique: rng.chance(40), counted: rng.chance(40) });
    }
    Schema { tables, link: rng.chance(50) }
}

/// Columns of a foreign key.
fn fk_columns(tables: &[T], number: usize, fk: &Fk) -> Vec<(String, &'static str)> {
    let columns = tables[fk.parent].key_columns();
    columns.iter().enumerate().map(|(part, (_, kind))| (format!("\"fk{number} {part}\""), *kind)).collect()
}

fn ddl(schema: &Schema) -> Vec<String> {
    let mut out = vec![
        "CREATE TABLE stats (name text PRIMARY KEY, n int NOT NULL)".to_owned(),
        "CREATE FUNCTION counting() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
           UPDATE stats SET n = n + CASE tg_op WHEN 'INSERT' THEN 1 ELSE -1 END WHERE name = tg_argv[0]; RETURN NULL; END $$"
            .to_owned(),
    ];
    for (index, t) in schema.tables.iter().enumerate() {
        let mut text = format!("CREATE TABLE {} (n int NOT NULL, u text, flag bool DEFAULT false, ", t.name);
        for (name, kind) in t.key_columns() {
            let more = match t.key {
                0 => " GENERATED ALWAYS AS IDENTITY",
                _ => "",
            };
            let kind = if t.key == 1 { "bigserial" } else { kind };
            let _ok = write!(text, "{name} {kind}{more}, ");
        }
        for (number, fk) in t.fks.iter().enumerate() {
            for (part, (name, kind)) in fk_columns(&schema.tables, number, fk).iter().enumerate() {
                let null = if fk.not_null { " NOT NULL" } else { "" };
                // Row 1 of every table is what SET DEFAULT falls back to.
                let value = schema.tables[fk.parent].key_of(1)[part].replace('\'', "''");
                let default =
                    if fk.rule == "SET DEFAULT" { format!(" DEFAULT '{value}'") } else { String::new() };
                let _ok = write!(text, "{name} {kind}{null}{default}, ");
            }
        }
        let generated =
            if index % 2 == 0 { "len int GENERATED ALWAYS AS (n * 2 + length(p)) STORED, " } else { "" };
        let _ok = write!(
            text,
            "p text, num numeric(12,2), js jsonb, raw bytea, f float8, at timestamptz, arr text[], {generated}PRIMARY KEY ({}))",
            t.key_columns().iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
        );
        if t.partitioned {
            let _ok = write!(text, " PARTITION BY HASH ({})", t.key_columns()[0].0);
        }
        out.push(text);
        for part in 0..if t.partitioned { 2 } else { 0 } {
            out.push(format!(
                "CREATE TABLE part_{index}_{part} PARTITION OF {} FOR VALUES WITH (MODULUS 2, REMAINDER {part})",
                t.name
            ));
        }
        if t.unique && !t.partitioned {
            out.push(format!("CREATE UNIQUE INDEX ON {} (lower(u)) WHERE NOT flag", t.name));
        }
        if t.counted {
            out.push(format!("INSERT INTO stats VALUES ('s{index}', 0)"));
            out.push(format!(
                "CREATE TRIGGER count_{index} AFTER INSERT OR DELETE ON {} FOR EACH ROW EXECUTE FUNCTION counting('s{index}')",
                t.name
            ));
        }
    }
    out.extend(foreign_keys(schema));
    if schema.link {
        out.push("CREATE TABLE ticket (n int PRIMARY KEY, ref text NOT NULL, body jsonb)".into());
    }
    out
}

fn foreign_keys(schema: &Schema) -> Vec<String> {
    let mut out = Vec::new();
    for (index, t) in schema.tables.iter().enumerate() {
        for (number, fk) in t.fks.iter().enumerate() {
            let mine: Vec<String> =
                fk_columns(&schema.tables, number, fk).into_iter().map(|(name, _)| name).collect();
            let parent = &schema.tables[fk.parent];
            let theirs: Vec<&str> = parent.key_columns().iter().map(|(name, _)| *name).collect();
            out.push(format!(
                "ALTER TABLE {} ADD CONSTRAINT fk_{index}_{number} FOREIGN KEY ({}) REFERENCES {} ({}) ON DELETE {} {}",
                t.name,
                mine.join(", "),
                parent.name,
                theirs.join(", "),
                fk.rule,
                fk.deferrable
            ));
        }
    }
    out
}

const VALUES: &str = "(ARRAY['plain', 'it''s \"q\" \\ {x},', '', 'ümläut\n☃'])[1 + $1::text::int % 4], ($1::text::numeric * 1.37)::numeric(12,2),
  CASE WHEN $1::text::int % 5 > 0 THEN jsonb_build_object('n', $1::text::int, 'q', '\"') END, decode(md5($1::text), 'hex'),
  $1::text::float8 / 3, timestamptz '2026-01-01 00:00:00.123456+02' + $1::text::int * interval '1 hour', ARRAY['a', NULL, 'b\"' || $1::text]";

fn insert(sql: &mut Sql, schema: &Schema, table: usize, n: u64, refs: &[Option<u64>]) -> Result<(), String> {
    let t = &schema.tables[table];
    let mut names = vec!["n".to_owned(), "u".into()];
    let mut values = vec!["$1::text::int".to_owned(), "'U' || $1::text".into()];
    let number = n.to_string();
    let mut parameters: Vec<Option<String>> = vec![Some(number)];
    let mut push = |name: String, kind: &str, value: Option<String>| {
        parameters.push(value);
        names.push(name);
        values.push(format!("${}::text::{kind}", parameters.len()));
    };
    for ((name, kind), value) in t.key_columns().into_iter().zip(t.key_of(n)) {
        push(name.into(), kind, Some(value));
    }
    for (index, fk) in t.fks.iter().enumerate() {
        let key = refs[index].map(|n| schema.tables[fk.parent].key_of(n));
        for (part, (name, kind)) in fk_columns(&schema.tables, index, fk).into_iter().enumerate() {
            push(name, kind, key.as_ref().map(|key| key[part].clone()));
        }
    }
    let text = format!(
        "INSERT INTO {} ({}, p, num, js, raw, f, at, arr) OVERRIDING SYSTEM VALUE SELECT {}, {VALUES}",
        t.name,
        names.join(", "),
        values.join(", ")
    );
    let parameters: Vec<Option<&str>> = parameters.iter().map(Option::as_deref).collect();
    sql.query(&text, &parameters).map(|_rows| ()).map_err(|error| format!("{error:?}"))
}

fn point_at(
    sql: &mut Sql,
    schema: &Schema,
    (table, n): (usize, u64),
    number: usize,
    to: Option<u64>,
) -> bool {
    let t = &schema.tables[table];
    let fk = &t.fks[number];
    let key = to.map(|n| schema.tables[fk.parent].key_of(n));
    let mut parameters = vec![Some(n.to_string())];
    let mut sets = Vec::new();
    for (part, (name, kind)) in fk_columns(&schema.tables, number, fk).into_iter().enumerate() {
        parameters.push(key.as_ref().map(|key| key[part].clone()));
        sets.push(format!("{name} = ${}::text::{kind}", parameters.len()));
    }
    let text = format!("UPDATE {} SET {} WHERE n = $1::text::int", t.name, sets.join(", "));
    let parameters: Vec<Option<&str>> = parameters.iter().map(Option::as_deref).collect();
    sql.query(&text, &parameters).is_ok()
}

fn fill(sql: &mut Sql, schema: &Schema, rng: &mut Rng) -> Rows {
    let mut rows = Rows::new();
    let counts: Vec<u64> = schema.tables.iter().map(|_| rng.range(4..14)).collect();
    let mut later = Vec::new();
    for (table, t) in schema.tables.iter().enumerate() {
        for n in 1..=counts[table] {
            let mut refs = Vec::new();
            for (number, fk) in t.fks.iter().enumerate() {
                let to = rng.range(1..counts[fk.parent] + 1);
                let wanted = fk.not_null || rng.chance(75);
                if fk.parent < table {
                    refs.push(wanted.then_some(to));
                } else {
                    later.extend(wanted.then_some((table, n, number, to)));
                    refs.push(None);
                }
            }
            insert(sql, schema, table, n, &refs).unwrap();
            rows.insert((table, n), refs);
        }
    }
    for (table, n, number, to) in later {
        assert!(point_at(sql, schema, (table, n), number, Some(to)));
        rows.get_mut(&(table, n)).unwrap()[number] = Some(to);
    }
    for n in 1..=counts[0] * u64::from(schema.link) {
        let text = "INSERT INTO ticket SELECT $1::text::int, 'REC-' || ($2::text)::int, '{}'";
        let of = rng.range(1..counts[0] + 1).to_string();
        sql.query(text, &[Some(&n.to_string()), Some(&of)]).unwrap();
    }
    rows
}

/// What goes with the root, by the rules that the user and the database follow.
fn closure(schema: &Schema, rows: &Rows, root: u64) -> BTreeSet<(usize, u64)> {
    let mut closure = BTreeSet::from([(0, root)]);
    loop {
        let more: Vec<(usize, u64)> = rows
            .iter()
            .filter(|(at, refs)| {
                !closure.contains(*at)
                    && schema.tables[at.0].fks.iter().zip(*refs).any(|(fk, to)| {
                        !fk.rule.starts_with("SET") && to.is_some_and(|to| closure.contains(&(fk.parent, to)))
                    })
            })
            .map(|(at, _)| *at)
            .collect();
        if more.is_empty() {
            return closure;
        }
        closure.extend(more);
    }
}

fn delete(sql: &mut Sql, schema: &Schema, (table, n): (usize, u64)) -> mainstay_core::Result<()> {
    let text = format!("DELETE FROM {} WHERE n = $1::text::int", schema.tables[table].name);
    sql.query(&text, &[Some(&n.to_string())]).map(|_rows| ())
}

/// Deletes a record as its user would: what refuses goes first, in whichever order works.
fn delete_record(sql: &mut Sql, schema: &Schema, closure: &BTreeSet<(usize, u64)>, root: u64) -> bool {
    sql.run("BEGIN").unwrap();
    if schema.link {
        sql.query("DELETE FROM ticket WHERE ref = 'REC-' || $1::text", &[Some(&root.to_string())]).unwrap();
    }
    for _ in 0..closure.len() {
        for at in closure.iter().rev() {
            sql.run("SAVEPOINT s").unwrap();
            if delete(sql, schema, *at).is_err() {
                sql.run("ROLLBACK TO s").unwrap();
            }
        }
    }
    let left = |at: &(usize, u64), sql: &mut Sql| exists(sql, schema, *at);
    let all_gone = !closure.iter().any(|at| left(at, sql));
    let done = all_gone && sql.run("COMMIT").is_ok();
    if !done {
        sql.run("ROLLBACK").unwrap();
    }
    done
}

fn exists(sql: &mut Sql, schema: &Schema, (table, n): (usize, u64)) -> bool {
    let text = format!("SELECT 1 FROM {} WHERE n = $1::text::int", schema.tables[table].name);
    !sql.query(&text, &[Some(&n.to_string())]).unwrap().is_empty()
}

fn whole(sql: &mut Sql, schema: &Schema, (table, n): (usize, u64)) -> Option<String> {
    let text = format!("SELECT t::text FROM {} t WHERE n = $1::text::int", schema.tables[table].name);
    sql.query(&text, &[Some(&n.to_string())]).unwrap().pop().and_then(|row| row.into_iter().next().flatten())
}

/// Whether anything refers to a row.
fn referred(sql: &mut Sql, schema: &Schema, (table, n): (usize, u64)) -> bool {
    schema.tables.iter().any(|t| {
        t.fks.iter().enumerate().filter(|(_, fk)| fk.parent == table).any(|(number, fk)| {
            let parent = &schema.tables[table];
            let columns = fk_columns(&schema.tables, number, fk);
            let joined: Vec<String> = columns
                .iter()
                .zip(parent.key_columns())
                .map(|((mine, _), (theirs, _))| format!("c.{mine} = p.{theirs}"))
                .collect();
            let text = format!(
                "SELECT 1 FROM {} c JOIN {} p ON {} WHERE p.n = $1::text::int AND NOT (c.n = p.n AND c.tableoid = p.tableoid)",
                t.name,
                parent.name,
                joined.join(" AND ")
            );
            !sql.query(&text, &[Some(&n.to_string())]).unwrap().is_empty()
        })
    })
}

/// The three databases of a case: as it was, where the record was deleted, where it never was.
struct Worlds {
    was: Sql,
    deleted: Sql,
    never: Sql,
    /// Deletions that something of the record has prevented.
    prevented: bool,
    root: (usize, u64),
}

impl Worlds {
    fn later(
        &mut self,
        schema: &Schema,
        rows: &Rows,
        closure: &BTreeSet<(usize, u64)>,
        rng: &mut Rng,
        next: u64,
    ) {
        let table = rng.below(schema.tables.len());
        let t = &schema.tables[table];
        let there = self.deleted.query(&format!("SELECT n::text FROM {} ORDER BY n", t.name), &[]).unwrap();
        let there: Vec<u64> = there.into_iter().map(|row| row[0].clone().unwrap().parse().unwrap()).collect();
        let Some(n) = there.get(rng.below(there.len().max(1))).copied() else { return };
        match rng.below(10) {
            0..=3 => self.delete(schema, closure, (table, n)),
            4..=5 => {
                let text =
                    format!("UPDATE {} SET p = p || '!', num = num + 1 WHERE n = $1::text::int", t.name);
                for sql in [&mut self.deleted, &mut self.never] {
                    sql.query(&text, &[Some(&n.to_string())]).unwrap();
                }
            }
            6..=7 => {
                let mut refs = Vec::new();
                for fk in &t.fks {
                    let parents = self
                        .deleted
                        .query(
                            &format!("SELECT n::text FROM {} ORDER BY n", schema.tables[fk.parent].name),
                            &[],
                        )
                        .unwrap();
                    let to = (!parents.is_empty()).then(|| rng.below(parents.len()));
                    refs.push(to.map(|at| parents[at][0].clone().unwrap().parse().unwrap()));
                }
                let done = insert(&mut self.deleted, schema, table, next, &refs);
                let twin = insert(&mut self.never, schema, table, next, &refs);
                assert_eq!(done.is_ok(), twin.is_ok(), "{done:?} {twin:?}");
            }
            _ => {
                // Not what pointed into the record: whether somebody emptied it later nobody could tell.
                let Some(number) = t.fks.len().checked_sub(1) else { return };
                let into = rows.get(&(table, n)).is_some_and(|refs| {
                    refs[number].is_some_and(|to| closure.contains(&(t.fks[number].parent, to)))
                });
                let parent = t.fks[number].parent;
                let to = rng.range(1..14);
                if !into && exists(&mut self.deleted, schema, (parent, to)) {
                    let one = point_at(&mut self.deleted, schema, (table, n), number, Some(to));
                    assert_eq!(one, point_at(&mut self.never, schema, (table, n), number, Some(to)));
                }
            }
        }
    }

    /// What the record would have prevented stays undone there, and is done where it was deleted: then the record needs it.
    fn delete(&mut self, schema: &Schema, closure: &BTreeSet<(usize, u64)>, at: (usize, u64)) {
        self.never.run("BEGIN").unwrap();
        let count = |sql: &mut Sql| closure.iter().filter(|at| exists(sql, schema, **at)).count();
        let before = count(&mut self.never);
        self.never.run("SAVEPOINT s").unwrap();
        let mut done = delete(&mut self.never, schema, at);
        if done.is_ok() {
            done = self.never.run("SET CONSTRAINTS ALL IMMEDIATE");
        }
        match done {
            Ok(())
                if self.prevented && count(&mut self.never) != before
                    || !exists(&mut self.never, schema, self.root) =>
            {
                // In which order the two were, nobody could tell; and the record itself is not to go.
                self.never.run("ROLLBACK").unwrap();
            }
            Ok(()) => {
                // What was set to its default there may be in the way.
                let end = if delete(&mut self.deleted, schema, at).is_ok() { "COMMIT" } else { "ROLLBACK" };
                self.never.run(end).unwrap();
            }
            Err(error) => {
                assert_eq!(Refusal::in_error(&error).unwrap().state, "23503", "{error:?}");
                self.never.run("ROLLBACK").unwrap();
                let untouched = whole(&mut self.was, schema, at) == whole(&mut self.never, schema, at);
                if untouched
                    && !referred(&mut self.deleted, schema, at)
                    && delete(&mut self.deleted, schema, at).is_ok()
                {
                    self.prevented = true;
                }
            }
        }
    }
}

#[derive(Default, Debug)]
struct Tally {
    cases: usize,
    inserted: u64,
    relinked: u64,
    circles: usize,
    notes: usize,
    emptied: usize,
    gone: usize,
}

fn case(server: &Postgres, seed: u64, tally: &mut Tally) {
    let mut rng = Rng::new(seed);
    let schema = schema(&mut rng);
    copy_database(server, "template1", "was");
    let mut was = open(server, "was");
    for statement in ddl(&schema) {
        if let Err(error) = was.run(&statement) {
            panic!("seed {seed}: {statement}\n{error:?}");
        }
    }
    let rows = fill(&mut was, &schema, &mut rng);
    drop(was);
    copy_database(server, "was", "deleted");
    copy_database(server, "was", "never");
    let (mut deleted, never) = (open(server, "deleted"), open(server, "never"));
    let roots = rows.keys().filter(|(table, _)| *table == 0).count() as u64;
    let root = rng.range(2..roots + 1);
    let closure = closure(&schema, &rows, root);
    // Row 1 is what references fall back to.
    let falls_back = schema
        .tables
        .iter()
        .flat_map(|t| &t.fks)
        .any(|fk| fk.rule == "SET DEFAULT" && closure.contains(&(fk.parent, 1)));
    if falls_back || !delete_record(&mut deleted, &schema, &closure, root) {
        return;
    }
    let mut worlds = Worlds { was: open(server, "was"), deleted, never, prevented: false, root: (0, root) };
    for number in 0..20 {
        worlds.later(&schema, &rows, &closure, &mut rng, 1000 + number);
    }
    drop(worlds);
    let name = &schema.tables[0].name;
    let definition = if schema.link {
        format!(
            "version = 1\n[[link]]\nchild = 'ticket'\nparent = '''{name}'''\non = \"child.ref = 'REC-' || parent.n\"\n"
        )
    } else {
        "version = 1".into()
    };
    let request = Request {
        table: name,
        key: &[("n", &root.to_string())],
        definition: &definition,
        ..Request::default()
    };
    let told = || format!("MAINSTAY_SEED={seed}, root {root} of {name}\n{}", ddl(&schema).join(";\n"));
    let (plan, applied) = match request.restore(server, "was", "deleted") {
        Ok(done) => done,
        Err(error) => {
            let plan = request.preview(server, "was", "deleted").map(|plan| plan.blocked);
            panic!("{error:?}\n{plan:?}\n{}", told())
        }
    };
    assert_same(server, "deleted", "never", || format!("{}\n{:#?}", told(), plan.notes));
    let again = request.preview(server, "was", "deleted").unwrap();
    assert!(again.is_empty(), "a second run would change something: {}", told());
    tally.cases += 1;
    tally.inserted += applied.inserted;
    tally.relinked += applied.relinked;
    tally.circles += plan.steps.iter().filter(|step| step.len() > 1).count();
    tally.notes += plan.notes.len();
    tally.emptied += plan.members.iter().filter(|member| !member.emptied.is_empty()).count();
    tally.gone += plan
        .members
        .iter()
        .filter(|member| matches!(member.fate, mainstay_engine::record::Fate::Gone(_)))
        .count();
}

#[test]
fn a_restored_record_leaves_the_database_as_if_it_had_never_been_deleted() {
    let server = server();
    let mut tally = Tally::default();
    for_each_seed(8, |seed| case(&server, seed, &mut tally));
    println!("{tally:?}");
}
