//! What has to be known of a row to find it in the write-ahead log.

use std::collections::HashMap;

use mainstay_core::{Code, Error, Result};
use mainstay_workloads::postgres::Lsn;
use mainstay_workloads::postgres::walread::{Attribute, KeyShape, Relation, Spot};
use serde::Deserialize;

use super::super::database::Database as _;
use super::super::model::{Catalog, values};
use super::{Postgres, column};

/// Where the rows of a table lie, and how the row is told from the others.
#[derive(Clone, Debug)]
pub struct Watch {
    /// For people: `public.customers id=42`.
    pub shown: String,
    /// The values of the key, as the server writes them.
    pub key: Vec<String>,
    /// The files of the table, or of its partitions, and how the key is found in their rows, if its types are known.
    pub relations: HashMap<Relation, Option<KeyShape>>,
    /// Where the row lay when this was looked up; `None` when it was not there.
    pub spot: Option<(Relation, Spot)>,
    /// When that was.
    pub at: Lsn,
}

#[derive(Deserialize)]
struct RawRelation {
    oid: i64,
    space: u32,
    database: u32,
    number: Option<u32>,
    attributes: Vec<RawAttribute>,
}

#[derive(Deserialize)]
struct RawAttribute {
    name: String,
    length: i16,
    align: String,
    kind: Option<String>,
}

const RELATIONS: &str = "
SELECT json_build_object('oid', c.oid::int8, 'space', coalesce(nullif(c.reltablespace, 0), d.dattablespace)::int8,
  'database', d.oid::int8, 'number', pg_relation_filenode(c.oid)::int8,
  'attributes', (SELECT json_agg(json_build_object('name', a.attname, 'length', a.attlen, 'align', a.attalign::text,
     'kind', CASE WHEN ty.typnamespace = 'pg_catalog'::regnamespace THEN ty.typname END) ORDER BY a.attnum)
     FROM pg_attribute a LEFT JOIN pg_type ty ON ty.oid = a.atttypid WHERE a.attrelid = c.oid AND a.attnum > 0))
FROM (SELECT relid FROM pg_partition_tree($1::text::regclass) UNION SELECT $1::text::regclass) p
JOIN pg_class c ON c.oid = p.relid JOIN pg_database d ON d.datname = current_database() WHERE c.relkind = 'r'";

impl Postgres {
    /// Looks a row up. `wanted` must be the key of its table, or find a row that is there; `at` is where the database stands.
    ///
    /// Errors: [`Code::NotFound`] when other columns than the key are wanted and no row has them.
    pub fn watch(
        &mut self,
        catalog: &Catalog,
        table: &str,
        wanted: &[(String, String)],
        at: Lsn,
    ) -> Result<Watch> {
        let table = catalog.table(catalog.find(table)?)?;
        let key = &table.key()?.columns;
        let mut by = Vec::new();
        for (name, value) in wanted {
            let index = table
                .column(name)
                .ok_or_else(|| Error::new(Code::Usage, format!("{} has no column {name:?}", table.name)))?;
            by.push((index, value.as_str()));
        }
        let rows = self.matching(table, &by, 2)?;
        let values = match rows.as_slice() {
            [row] => values(row, key).unwrap_or_default(),
            [] if by.len() == key.len() && by.iter().all(|(index, _)| key.contains(index)) => {
                let mut values = Vec::new();
                for index in key {
                    let value = by.iter().find(|(known, _)| known == index).map(|(_, value)| *value);
                    let text = format!("SELECT $1::text::{}", column(table, *index)?.sql_type);
                    values.push(self.sql.value(&text, &[value])?);
                }
                values
            }
            [] => {
                let what = format!("no row of {} has these values at {at}", table.name);
                return Err(Error::new(Code::NotFound, what).hint("name the row by its primary key"));
            }
            _ => {
                let what = format!("several rows of {} have these values", table.name);
                return Err(Error::new(Code::Usage, what).hint("name the row by its primary key"));
            }
        };
        let raw = self.relations(&table.sql)?;
        let spot = if rows.is_empty() { None } else { self.spot(table, &values, &raw)? };
        let names: Vec<&str> = key
            .iter()
            .map(|index| column(table, *index).map(|column| column.name.as_str()))
            .collect::<Result<_>>()?;
        let relations = raw.iter().filter_map(|raw| Some((relation(raw)?, shape(raw, &names)))).collect();
        let shown = names.iter().zip(&values).map(|(name, value)| format!("{name}={value}"));
        let shown = format!("{} {}", table.name, shown.collect::<Vec<_>>().join(" "));
        Ok(Watch { shown, key: values, relations, spot, at })
    }

    fn relations(&mut self, table: &str) -> Result<Vec<RawRelation>> {
        let rows = self.sql.query(RELATIONS, &[Some(table)])?;
        let texts = rows.into_iter().filter_map(|row| row.into_iter().next().flatten());
        let parse = |text: String| {
            serde_json::from_str(&text).map_err(|error| {
                Error::integrity("the catalog of the database is not as expected").because(error)
            })
        };
        texts.map(parse).collect()
    }

    fn spot(
        &mut self,
        table: &super::super::model::Table,
        key: &[String],
        relations: &[RawRelation],
    ) -> Result<Option<(Relation, Spot)>> {
        let by = super::key_conditions(table)?;
        let text = format!(
            "SELECT t.tableoid::int8, t.ctid FROM {} JOIN {}{} AS t ON {}",
            super::unnested("k", 0, by.len()),
            table.only,
            table.sql,
            super::conditions(table, "t", &by)?
        );
        let arrays: Vec<String> =
            (0..by.len()).map(|column| super::array_of(&[key.to_vec()], column)).collect();
        let parameters: Vec<Option<&str>> = arrays.iter().map(|array| Some(array.as_str())).collect();
        let rows = self.sql.query(&text, &parameters)?;
        let Some([Some(oid), Some(place)]) = rows.first().map(Vec::as_slice) else { return Ok(None) };
        let found = relations.iter().find(|raw| raw.oid.to_string() == *oid).and_then(relation);
        let place = place.trim_matches(['(', ')']).split_once(',');
        let place = place.and_then(|(page, line)| Some((page.parse().ok()?, line.parse().ok()?)));
        Ok(found.zip(place))
    }
}

fn relation(raw: &RawRelation) -> Option<Relation> {
    Some(Relation { space: raw.space, database: raw.database, number: raw.number? })
}

fn shape(raw: &RawRelation, key: &[&str]) -> Option<KeyShape> {
    let attributes: Option<Vec<Attribute>> = raw
        .attributes
        .iter()
        .map(|known| Attribute::new(known.length, &known.align, known.kind.as_deref().unwrap_or_default()))
        .collect();
    let key: Option<Vec<usize>> =
        key.iter().map(|name| raw.attributes.iter().position(|known| known.name == *name)).collect();
    KeyShape::new(attributes?, key?)
}
