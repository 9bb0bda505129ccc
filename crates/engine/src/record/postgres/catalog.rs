//! The catalog of a PostgreSQL database. Names are quoted, and types and expressions written, by the server itself.

use std::collections::HashMap;

use mainstay_core::{Error, Result};
use mainstay_workloads::postgres::Sql;
use serde::Deserialize;

use super::super::model::{Catalog, Column, Key, OnDelete, Reference, Table, TableName, Trigger, Unique};

/// Tables of users, except partitions, which are reached through what they are part of.
const TABLES: &str = r#"
SELECT json_build_object('oid', c.oid::int8, 'schema', n.nspname, 'name', c.relname,
  'sql', format('%I.%I', n.nspname, c.relname), 'kind', c.relkind::text,
  'rules', (SELECT count(*) FROM pg_rewrite r WHERE r.ev_class = c.oid AND r.ev_type IN ('2', '3')),
  'columns', coalesce((SELECT json_agg(json_build_object('number', a.attnum, 'name', a.attname, 'sql', format('%I', a.attname),
      'shown', format_type(a.atttypid, a.atttypmod), 'type', format('%I.%I', tn.nspname, ty.typname), 'not_null', a.attnotnull,
      'generated', a.attgenerated <> '', 'identity', a.attidentity <> '',
      'default', CASE WHEN a.attgenerated = '' THEN pg_get_expr(d.adbin, d.adrelid) END,
      'sequence', CASE WHEN a.attgenerated = '' THEN
          pg_get_serial_sequence(format('%I.%I', n.nspname, c.relname), a.attname) END) ORDER BY a.attnum)
    FROM pg_attribute a JOIN pg_type ty ON ty.oid = a.atttypid JOIN pg_namespace tn ON tn.oid = ty.typnamespace
      LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped), '[]'))
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence <> 't'
  AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_(toast|temp)'
ORDER BY n.nspname, c.relname"#;

/// Keys of tables, the primary one first. Equality is that of the index.
const KEYS: &str = r#"
SELECT json_build_object('table', i.indrelid::int8, 'name', x.relname, 'primary', i.indisprimary,
  'numbers', (SELECT json_agg(k.number ORDER BY k.ord) FROM unnest(i.indkey::int2[]) WITH ORDINALITY k(number, ord)
      WHERE k.ord <= i.indnkeyatts),
  'predicate', pg_get_expr(i.indpred, i.indrelid), 'nulls_equal', i.indnullsnotdistinct, 'immediate', i.indimmediate,
  'expressions', (SELECT json_agg(pg_get_indexdef(i.indexrelid, k, true) ORDER BY k) FROM generate_series(1, i.indnkeyatts) k),
  'equal', (SELECT json_agg(format('OPERATOR(%I.%s)', opn.nspname, op.oprname) ORDER BY k.ord)
      FROM unnest(i.indclass::oid[]) WITH ORDINALITY k(class, ord) JOIN pg_opclass oc ON oc.oid = k.class
      JOIN pg_amop ao ON ao.amopfamily = oc.opcfamily AND ao.amoplefttype = oc.opcintype
        AND ao.amoprighttype = oc.opcintype AND ao.amopstrategy = 3
      JOIN pg_operator op ON op.oid = ao.amopopr JOIN pg_namespace opn ON opn.oid = op.oprnamespace))
FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_class x ON x.oid = i.indexrelid
WHERE i.indisunique AND i.indisvalid AND NOT c.relispartition AND c.relkind IN ('r', 'p')
ORDER BY i.indrelid, i.indisprimary DESC, x.relname"#;

const REFERENCES: &str = r#"
SELECT json_build_object('name', con.conname, 'child', con.conrelid::int8, 'parent', con.confrelid::int8,
  'child_numbers', con.conkey, 'parent_numbers', con.confkey, 'on_delete', con.confdeltype::text, 'set', con.confdelsetcols,
  'shown', format('%I on %s', con.conname, con.conrelid::regclass),
  'equal', (SELECT json_agg(format('OPERATOR(%I.%s)', opn.nspname, op.oprname) ORDER BY k.ord)
      FROM unnest(con.conpfeqop) WITH ORDINALITY k(operator, ord) JOIN pg_operator op ON op.oid = k.operator
      JOIN pg_namespace opn ON opn.oid = op.oprnamespace))
FROM pg_constraint con WHERE con.contype = 'f' AND con.conparentid = 0 ORDER BY con.conrelid, con.conname"#;

const TRIGGERS: &str = r#"
SELECT json_build_object('table', tgrelid::int8, 'name', tgname, 'enabled', tgenabled::text)
FROM pg_trigger WHERE NOT tgisinternal AND tgenabled <> 'D' AND (tgtype & 20) <> 0 ORDER BY tgrelid, tgname"#;

/// What is unique, or excludes others, and may be checked late.
const DEFERRABLE: &str = r#"
SELECT DISTINCT json_build_object('table', coalesce(pg_partition_root(conrelid)::oid, conrelid)::int8, 'name', conname)::text
FROM pg_constraint WHERE contype IN ('p', 'u', 'x') AND condeferrable AND conrelid <> 0 ORDER BY 1"#;

#[derive(Deserialize)]
struct RawDeferrable {
    table: i64,
    name: String,
}

#[derive(Deserialize)]
struct RawTable {
    oid: i64,
    schema: String,
    name: String,
    sql: String,
    kind: String,
    rules: u64,
    columns: Vec<RawColumn>,
}

#[derive(Deserialize)]
struct RawColumn {
    number: i64,
    name: String,
    sql: String,
    shown: String,
    #[serde(rename = "type")]
    sql_type: String,
    not_null: bool,
    generated: bool,
    identity: bool,
    default: Option<String>,
    sequence: Option<String>,
}

#[derive(Deserialize)]
struct RawKey {
    table: i64,
    name: String,
    primary: bool,
    numbers: Vec<i64>,
    predicate: Option<String>,
    nulls_equal: bool,
    immediate: bool,
    expressions: Vec<String>,
    equal: Vec<String>,
}

#[derive(Deserialize)]
struct RawReference {
    name: String,
    child: i64,
    parent: i64,
    child_numbers: Vec<i64>,
    parent_numbers: Vec<i64>,
    on_delete: String,
    set: Option<Vec<i64>>,
    shown: String,
    equal: Vec<String>,
}

#[derive(Deserialize)]
struct RawTrigger {
    table: i64,
    name: String,
    enabled: String,
}

fn read<T: for<'a> Deserialize<'a>>(sql: &mut Sql, query: &str) -> Result<Vec<T>> {
    let rows = sql.query(query, &[])?;
    let texts = rows.into_iter().filter_map(|row| row.into_iter().next().flatten());
    let parse = |text: String| {
        serde_json::from_str(&text).map_err(|error| {
            Error::integrity("the catalog of the database is not as expected").because(error)
        })
    };
    texts.map(parse).collect()
}

/// Numbers of columns, as positions in the row.
struct Numbers(HashMap<i64, (usize, HashMap<i64, usize>)>);

impl Numbers {
    fn table(&self, oid: i64) -> Option<usize> {
        self.0.get(&oid).map(|(index, _)| *index)
    }

    fn columns(&self, oid: i64, numbers: &[i64]) -> Option<Vec<usize>> {
        let (_, columns) = self.0.get(&oid)?;
        numbers.iter().map(|number| columns.get(number).copied()).collect()
    }
}

/// Asks for everything in one go. `search_path` must be `pg_catalog`, so that whatever else has a name is written with its
/// schema.
pub(super) fn catalog(sql: &mut Sql) -> Result<Catalog> {
    let mut catalog = Catalog::default();
    let mut numbers = Numbers(HashMap::new());
    for raw in read::<RawTable>(sql, TABLES)? {
        let columns = raw.columns.iter().enumerate().map(|(index, column)| (column.number, index)).collect();
        numbers.0.insert(raw.oid, (catalog.tables.len(), columns));
        if raw.rules > 0 {
            catalog.notes.push(format!("{}.{} has rules that rewrite changes", raw.schema, raw.name));
        }
        catalog.tables.push(table(raw));
    }
    for raw in read::<RawKey>(sql, KEYS)? {
        add_key(&mut catalog, &numbers, raw);
    }
    for raw in read::<RawReference>(sql, REFERENCES)? {
        add_reference(&mut catalog, &numbers, raw);
    }
    for raw in read::<RawTrigger>(sql, TRIGGERS)? {
        if let Some(table) = numbers.table(raw.table).and_then(|index| catalog.tables.get_mut(index)) {
            let always = matches!(raw.enabled.as_str(), "A" | "R");
            table.triggers.push(Trigger { name: raw.name, always });
        }
    }
    for raw in read::<RawDeferrable>(sql, DEFERRABLE)? {
        if let Some(table) = numbers.table(raw.table).and_then(|index| catalog.tables.get_mut(index)) {
            table.deferrable.push(raw.name);
        }
    }
    Ok(catalog)
}

fn table(raw: RawTable) -> Table {
    let column = |raw: RawColumn| Column {
        name: raw.name,
        sql: raw.sql,
        shown_type: raw.shown,
        sql_type: raw.sql_type,
        not_null: raw.not_null,
        generated: raw.generated,
        default: raw.default.or_else(|| raw.identity.then(String::new)),
        sequence: raw.sequence,
    };
    Table {
        name: TableName { schema: raw.schema, name: raw.name },
        sql: raw.sql,
        only: if raw.kind == "r" { "ONLY ".into() } else { String::new() },
        columns: raw.columns.into_iter().map(column).collect(),
        key: None,
        uniques: Vec::new(),
        triggers: Vec::new(),
        deferrable: Vec::new(),
    }
}

/// The primary key; without one, the first whole key that is never empty.
fn add_key(catalog: &mut Catalog, numbers: &Numbers, raw: RawKey) {
    let columns = numbers.columns(raw.table, &raw.numbers);
    let Some(table) = numbers.table(raw.table).and_then(|index| catalog.tables.get_mut(index)) else {
        return;
    };
    let never_empty = |columns: &Vec<usize>| {
        columns.iter().all(|index| table.columns.get(*index).is_some_and(|column| column.not_null))
    };
    if table.key.is_none()
        && raw.predicate.is_none()
        && (raw.primary || raw.immediate)
        && let Some(columns) = columns.filter(never_empty)
    {
        table.key = Some(Key { columns, equal: raw.equal });
        return;
    }
    table.uniques.push(Unique {
        name: raw.name,
        expressions: raw.expressions,
        equal: raw.equal,
        predicate: raw.predicate,
        nulls_equal: raw.nulls_equal,
    });
}

fn add_reference(catalog: &mut Catalog, numbers: &Numbers, raw: RawReference) {
    let tables = numbers.table(raw.child).zip(numbers.table(raw.parent));
    let child_columns = numbers.columns(raw.child, &raw.child_numbers);
    let parent_columns = numbers.columns(raw.parent, &raw.parent_numbers);
    let (Some((child, parent)), Some(child_columns), Some(parent_columns)) =
        (tables, child_columns, parent_columns)
    else {
        catalog
            .notes
            .push(format!("the foreign key {} is of one partition only, and is not followed", raw.shown));
        return;
    };
    let on_delete = match raw.on_delete.as_str() {
        "c" => OnDelete::Cascade,
        "n" => OnDelete::SetNull,
        "d" => OnDelete::SetDefault,
        _ => OnDelete::Refuse,
    };
    let set = raw.set.and_then(|set| numbers.columns(raw.child, &set));
    let set = set.unwrap_or_else(|| child_columns.clone());
    catalog.references.push(Reference {
        name: raw.name,
        child,
        parent,
        child_columns,
        parent_columns,
        equal: raw.equal,
        on_delete,
        set,
    });
}
