//! One realistic schema, and what people do to it.

use mainstay_core::Code;
use mainstay_engine::record::postgres::Postgres as Database;
use mainstay_engine::record::{Fate, Triggers, apply, suggest};
use mainstay_testkit::lab::Postgres;

use super::{Request, assert_same, copy_database, image, open, open_as, run_all, server};

const SCHEMA: &str = r#"
CREATE TABLE country (code char(2) PRIMARY KEY, name text NOT NULL)
--
CREATE TABLE product (id serial PRIMARY KEY, sku text UNIQUE NOT NULL, stock int NOT NULL)
--
CREATE TABLE coupon (id int PRIMARY KEY, code text)
--
CREATE TABLE customer (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, email text NOT NULL, first text NOT NULL,
  shout text GENERATED ALWAYS AS (upper(first)) STORED, country char(2) NOT NULL REFERENCES country,
  referred_by bigint REFERENCES customer ON DELETE SET NULL, address bigint, deleted bool NOT NULL DEFAULT false)
--
CREATE UNIQUE INDEX customer_email_live ON customer (lower(email)) WHERE NOT deleted
--
CREATE TABLE address (id bigserial PRIMARY KEY, customer bigint NOT NULL REFERENCES customer ON DELETE CASCADE, city text)
--
ALTER TABLE customer ADD FOREIGN KEY (address) REFERENCES address ON DELETE SET NULL
--
CREATE TABLE orders (id bigserial PRIMARY KEY, customer bigint NOT NULL REFERENCES customer ON DELETE CASCADE,
  coupon int REFERENCES coupon, placed timestamptz NOT NULL DEFAULT now())
--
CREATE TABLE item (orders bigint REFERENCES orders ON DELETE CASCADE, line int, product int NOT NULL REFERENCES product,
  qty int NOT NULL, PRIMARY KEY (orders, line))
--
CREATE TABLE review (id serial PRIMARY KEY, customer bigint REFERENCES customer ON DELETE SET NULL, stars int)
--
CREATE TABLE ticket (id serial PRIMARY KEY, customer_ref text NOT NULL, body json)
--
CREATE TABLE audit_log (id bigserial PRIMARY KEY, what text)
--
CREATE FUNCTION stocking() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO audit_log (what) VALUES (tg_op);
  IF tg_op = 'INSERT' THEN UPDATE product SET stock = stock - NEW.qty WHERE id = NEW.product; RETURN NEW;
  ELSE UPDATE product SET stock = stock + OLD.qty WHERE id = OLD.product; RETURN OLD; END IF; END $$
--
CREATE TRIGGER stocking AFTER INSERT OR DELETE ON item FOR EACH ROW EXECUTE FUNCTION stocking()
--
INSERT INTO country VALUES ('DE', 'Germany'), ('FR', 'France')
--
INSERT INTO product SELECT n, 'sku' || n, 100 FROM generate_series(1, 5) n
--
INSERT INTO coupon SELECT n, 'c' || n FROM generate_series(1, 3) n
--
INSERT INTO customer (id, email, first, country, referred_by) OVERRIDING SYSTEM VALUE
  SELECT n, 'Jo' || n || '@x.org', 'it''s "' || n || '"', 'DE', nullif(n - 1, 0) FROM generate_series(1, 10) n
--
INSERT INTO address SELECT n, n, 'city ' || n FROM generate_series(1, 10) n
--
UPDATE customer SET address = id
--
INSERT INTO orders SELECT n, 1 + n % 10, 1 + n % 3, '2026-01-01' FROM generate_series(1, 30) n
--
INSERT INTO item SELECT n, l, 1 + n % 5, l FROM generate_series(1, 30) n, generate_series(1, 2) l
--
INSERT INTO review SELECT n, 1 + n % 10, 5 FROM generate_series(1, 20) n
--
INSERT INTO ticket SELECT n, 'CUST-' || 1 + n % 10, '{"a":  "b"}' FROM generate_series(1, 10) n
--
SELECT setval(pg_get_serial_sequence('customer', 'id'), 10)
"#;

const DEFINITION: &str = r#"
version = 1
exclude = ["audit_log"]
[[link]]
child = "ticket"
parent = "customer"
on = "child.customer_ref = 'CUST-' || parent.id"
"#;

const ROOT: [(&str, &str); 1] = [("id", "4")];

fn request() -> Request<'static> {
    Request { table: "customer", key: &ROOT, definition: DEFINITION, ..Request::default() }
}

/// `was`, and `live` and `never` with the record deleted in the former only.
fn worlds(server: &Postgres) {
    copy_database(server, "template1", "was");
    run_all(&mut open(server, "was"), SCHEMA);
    copy_database(server, "was", "live");
    copy_database(server, "was", "never");
    run_all(
        &mut open(server, "live"),
        "DELETE FROM ticket WHERE customer_ref = 'CUST-4'\n--\nDELETE FROM customer WHERE id = 4",
    );
}

fn both(server: &Postgres, script: &str) {
    for database in ["live", "never"] {
        run_all(&mut open(server, database), script);
    }
}

#[test]
fn a_customer_comes_back_with_everything_and_later_changes_stay() {
    let server = server();
    worlds(&server);
    both(&server, "UPDATE review SET stars = 1 WHERE id = 3\n--\nUPDATE product SET stock = stock + 7");
    let before = image(&mut open(&server, "live"));
    let preview = request().preview(&server, "was", "live").unwrap();
    assert_eq!(before, image(&mut open(&server, "live")), "a preview changes nothing");
    let (plan, applied) = request().restore(&server, "was", "live").unwrap();
    assert!(preview.does_as(&plan));
    assert_eq!((applied.inserted, applied.relinked, applied.sequences.len()), (12, 3, 3), "{applied:?}");
    assert_eq!(plan.triggers, ["stocking on public.item"]);
    assert!(plan.steps.iter().any(|step| step.len() == 2), "customer and address refer to each other");
    assert_same(&server, "live", "never", String::new);
    let (_, again) = request().restore(&server, "was", "live").unwrap();
    assert_eq!((again.inserted, again.relinked), (0, 0));
}

#[test]
fn with_triggers_silenced_nothing_beside_the_record_changes_and_references_are_checked_all_the_same() {
    let server = server();
    worlds(&server);
    let stock = |server: &Postgres| server.ask("live", "SELECT sum(stock) FROM product").unwrap();
    let before = stock(&server);
    let off = Request { triggers: Triggers::Off, ..request() };
    let (plan, _) = off.restore(&server, "was", "live").unwrap();
    assert_eq!((stock(&server), plan.triggers.len()), (before, 0));
    // A product that goes between the look and the act: nothing else would notice.
    worlds(&server);
    let mut point = Database::read(open(&server, "was")).unwrap();
    let mut live = Database::write(open(&server, "live"), Triggers::Off).unwrap();
    let mut plan = off.plan(&mut point, &mut live).unwrap();
    let item = plan.both.point.find("item").unwrap();
    let column = plan.both.point.tables[item].column("product").unwrap();
    for member in plan.members.iter_mut().filter(|member| member.table == item) {
        member.row[column] = Some("77".into());
    }
    let error = apply(&mut live, &plan).unwrap_err();
    assert!(error.what().contains("refers to nothing"), "{error:?}");
}

#[test]
fn what_only_triggers_of_the_database_check_is_not_done_while_they_are_silenced() {
    let server = server();
    worlds(&server);
    let deferred = "ALTER TABLE ticket ADD UNIQUE (customer_ref) DEFERRABLE";
    run_all(&mut open(&server, "live"), deferred);
    let off = Request { triggers: Triggers::Off, ..request() };
    let error = off.restore(&server, "was", "live").unwrap_err();
    assert!(error.chain().join(" ").contains("nobody checks ticket_customer_ref_key"), "{error:?}");
    request().restore(&server, "was", "live").unwrap();
    // A newsletter goes along with the address.
    run_all(
        &mut open(&server, "was"),
        "ALTER TABLE customer ADD UNIQUE (email)\n--\n\
         CREATE TABLE letter (id int PRIMARY KEY, email text REFERENCES customer (email) ON UPDATE CASCADE)\n--\n\
         INSERT INTO letter VALUES (1, 'Jo4@x.org')",
    );
    copy_database(&server, "was", "live");
    run_all(&mut open(&server, "live"), "UPDATE customer SET email = 'oops' WHERE id = 4");
    let off = Request { columns: &["email"], ..off };
    let error = off.restore(&server, "was", "live").unwrap_err();
    assert!(error.chain().join(" ").contains("rows of public.letter that refer to it"), "{error:?}");
    Request { triggers: Triggers::On, ..off }.restore(&server, "was", "live").unwrap();
    assert_same(&server, "live", "was", String::new);
}

#[test]
fn what_was_deleted_or_taken_later_decides_as_the_foreign_keys_would_have() {
    let server = server();
    worlds(&server);
    // Nobody refers to it since the record has gone: only the record would have prevented that.
    run_all(
        &mut open(&server, "live"),
        "DELETE FROM item WHERE orders IN (SELECT id FROM orders WHERE coupon = 1)\n--\nDELETE FROM orders WHERE coupon = 1\n--\nDELETE FROM coupon WHERE id = 1",
    );
    both(&server, "DELETE FROM customer WHERE id = 3");
    let plan = request().preview(&server, "was", "live").unwrap();
    assert!(
        plan.notes.iter().any(|note| note.contains("coupon id=1 was deleted later and comes back")),
        "{:?}",
        plan.notes
    );
    let root = plan.root().unwrap();
    assert_eq!(root.emptied, ["customer_referred_by_fkey"]);
    request().restore(&server, "was", "live").unwrap();
    let read = |query: &str| server.ask("live", query).unwrap();
    assert_eq!(read("SELECT referred_by IS NULL, address FROM customer WHERE id = 4"), "t|4");
    assert_eq!(read("SELECT count(*) FROM coupon WHERE id = 1"), "1");
    // Somebody else has the address now, in other letters.
    worlds(&server);
    run_all(
        &mut open(&server, "live"),
        "INSERT INTO customer (email, first, country) VALUES ('JO4@X.ORG', 'new', 'FR')",
    );
    let before = image(&mut open(&server, "live"));
    let error = request().restore(&server, "was", "live").unwrap_err();
    assert_eq!(error.code(), Code::Refused);
    assert!(
        error.chain().join(" ").contains("customer_email_live is taken since, by the row 11"),
        "{error:?}"
    );
    assert_eq!(before, image(&mut open(&server, "live")));
}

#[test]
fn nothing_is_tied_to_another_row_that_has_the_key_of_its_own_since() {
    let server = server();
    let tables = "CREATE TABLE shelf (id int PRIMARY KEY, code text UNIQUE)\n--\n\
        CREATE TABLE book (id int PRIMARY KEY, shelf text REFERENCES shelf (code) ON UPDATE CASCADE ON DELETE SET NULL)\n--\n\
        INSERT INTO shelf VALUES (1, 'a')\n--\nINSERT INTO book VALUES (1, 'a')";
    let book = Request { table: "book", key: &[("id", "1")], ..Request::default() };
    let since = |script: &str| {
        copy_database(&server, "template1", "was");
        run_all(&mut open(&server, "was"), tables);
        for database in ["live", "never"] {
            copy_database(&server, "was", database);
        }
        run_all(&mut open(&server, "live"), "DELETE FROM book");
        both(&server, script);
    };
    for (script, told) in [
        ("UPDATE shelf SET code = 'b'", "shelf id=1, which is there with other values"),
        (
            "UPDATE shelf SET code = 'b'\n--\nINSERT INTO shelf VALUES (2, 'a')",
            "is of public.shelf id=2 since",
        ),
        ("DELETE FROM shelf\n--\nINSERT INTO shelf VALUES (2, 'a')", "is of public.shelf id=2 since"),
    ] {
        since(script);
        let before = image(&mut open(&server, "live"));
        let error = book.restore(&server, "was", "live").unwrap_err();
        assert!(error.chain().join(" ").contains(told), "{error:?}");
        assert_eq!(before, image(&mut open(&server, "live")));
    }
    for script in ["DELETE FROM shelf", "INSERT INTO shelf VALUES (2, 'b')"] {
        since(script);
        book.restore(&server, "was", "live").unwrap();
        assert_same(&server, "live", "never", String::new);
    }
}

#[test]
fn a_schema_that_changed_is_told_before_anything_is_touched() {
    let server = server();
    worlds(&server);
    run_all(
        &mut open(&server, "live"),
        "ALTER TABLE customer ADD points int NOT NULL DEFAULT 7\n--\nALTER TABLE review RENAME stars TO rating\n--\nALTER TABLE item ALTER qty TYPE smallint",
    );
    let before = image(&mut open(&server, "live"));
    let error = request().restore(&server, "was", "live").unwrap_err();
    let told = error.chain().join(" ");
    assert!(told.contains("the column points of public.customer is new"), "{told}");
    assert!(told.contains("the column qty of public.item was integer and is smallint"), "{told}");
    assert_eq!(before, image(&mut open(&server, "live")));
    let plan = request().preview(&server, "was", "live").unwrap();
    plan.check(true).unwrap();
    run_all(
        &mut open(&server, "live"),
        "ALTER TABLE customer ADD must int\n--\nUPDATE customer SET must = 1\n--\nALTER TABLE customer ALTER must SET NOT NULL",
    );
    let plan = request().preview(&server, "was", "live").unwrap();
    assert!(plan.check(true).unwrap_err().chain().join(" ").contains("needs a value, and has no default"));
}

#[test]
fn what_triggers_and_types_change_is_noticed() {
    let server = server();
    worlds(&server);
    run_all(
        &mut open(&server, "live"),
        "CREATE FUNCTION meddling() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.city = 'elsewhere'; RETURN NEW; END $$\n--\n\
         CREATE TRIGGER meddling BEFORE INSERT ON address FOR EACH ROW EXECUTE FUNCTION meddling()",
    );
    let (_, applied) = request().restore(&server, "was", "live").unwrap();
    assert_eq!(applied.different.len(), 1, "{applied:?}");
    worlds(&server);
    run_all(
        &mut open(&server, "live"),
        "CREATE FUNCTION keeping() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$\n--\n\
         CREATE TRIGGER keeping BEFORE INSERT ON ticket FOR EACH ROW EXECUTE FUNCTION keeping()",
    );
    let before = image(&mut open(&server, "live"));
    let error = request().restore(&server, "was", "live").unwrap_err();
    assert!(error.chain().join(" ").contains("of 1 rows the database took 0"), "{error:?}");
    assert_eq!(before, image(&mut open(&server, "live")));
}

#[test]
fn a_changed_record_gets_back_the_columns_that_are_named_and_no_others() {
    let server = server();
    copy_database(&server, "template1", "was");
    run_all(&mut open(&server, "was"), SCHEMA);
    copy_database(&server, "was", "live");
    run_all(
        &mut open(&server, "live"),
        "UPDATE customer SET email = 'oops', first = 'Joanna', country = 'FR' WHERE id = 4",
    );
    let plan = request().preview(&server, "was", "live").unwrap();
    assert!(plan.is_empty());
    let Fate::Changed(differences) = &plan.root().unwrap().fate else { panic!("{:?}", plan.root()) };
    assert_eq!(differences.len(), 3);
    let (_, applied) =
        Request { columns: &["email", "id"], ..request() }.restore(&server, "was", "live").unwrap();
    assert_eq!(applied.columns, 1);
    let row = server.ask("live", "SELECT email, first, country FROM customer WHERE id = 4").unwrap();
    assert_eq!(row, "Jo4@x.org|Joanna|FR");
}

#[test]
fn what_was_deleted_by_itself_below_a_row_that_is_there_stays_deleted_unless_it_is_asked_for() {
    let server = server();
    worlds(&server);
    for database in ["never", "live"] {
        copy_database(&server, "was", database);
    }
    both(&server, "DELETE FROM orders WHERE id = 3");
    run_all(&mut open(&server, "live"), "UPDATE customer SET email = 'oops' WHERE id = 4");
    Request { columns: &["email"], ..request() }.restore(&server, "was", "live").unwrap();
    assert_same(&server, "live", "never", String::new);
    for change in ["SELECT 1", "UPDATE customer SET email = 'somebody else' WHERE id = 4"] {
        both(&server, change);
        let error = request().restore(&server, "was", "live").unwrap_err();
        assert!(error.chain().join(" ").contains("customer id=4 is there, and 3 rows"), "{error:?}");
        assert_same(&server, "live", "never", String::new);
    }
    let (_, applied) = Request { below: true, ..request() }.restore(&server, "was", "live").unwrap();
    assert_eq!(applied.inserted, 3);
}

#[test]
fn what_was_erased_by_law_stays_gone_and_what_needs_it_too() {
    let server = server();
    worlds(&server);
    let erased = Request { erased: &[("public.customer", "id=4")], ..request() };
    assert_eq!(erased.preview(&server, "was", "live").unwrap_err().code(), Code::Refused);
    let renamed = format!("{DEFINITION}\n[keys]\ncustomer = [\"email\"]");
    let renamed = Request { definition: &renamed, ..erased };
    let error = renamed.preview(&server, "was", "live").unwrap_err();
    assert!(error.what().contains("gives public.customer a key, and it has one"), "{error:?}");
    let part = Request { erased: &[("public.orders", "id=3")], ..request() };
    let (plan, applied) = part.restore(&server, "was", "live").unwrap();
    assert_eq!(applied.inserted, 9, "without the order and its two items");
    assert_eq!(plan.members.iter().filter(|member| member.fate == Fate::Erased).count(), 1);
    // Made nameless in its place, and a review that lost its writer by law.
    run_all(&mut open(&server, "live"), "UPDATE customer SET email = 'nobody' WHERE id = 4");
    for columns in [&[][..], &["email"]] {
        let error = Request { erased: &[("public.customer", "id=4")], columns, ..request() }
            .preview(&server, "was", "live");
        assert_eq!(error.unwrap_err().code(), Code::Refused);
    }
    worlds(&server);
    let part = Request { erased: &[("public.review", "id=3")], ..request() };
    let (plan, applied) = part.restore(&server, "was", "live").unwrap();
    assert_eq!(applied.relinked, 2, "{:?}", plan.notes);
}

#[test]
fn scripts_do_what_the_act_does_and_take_it_back() {
    let server = server();
    worlds(&server);
    let before = image(&mut open(&server, "live"));
    let mut point = Database::read(open(&server, "was")).unwrap();
    let mut live = Database::write(open(&server, "live"), Triggers::On).unwrap();
    let plan = request().plan(&mut point, &mut live).unwrap();
    let forward = live.script(&plan, "customer\n; DROP TABLE customer").unwrap();
    apply(&mut live, &plan).unwrap();
    let inverse = live.inverse(&plan, "back").unwrap();
    live.commit().unwrap();
    let after = image(&mut open(&server, "live"));
    server.ask("live", &inverse).unwrap_or_else(|error| panic!("{error:?}\n{inverse}"));
    assert_eq!(before, image(&mut open(&server, "live")), "{inverse}");
    server.ask("live", &forward).unwrap_or_else(|error| panic!("{error:?}\n{forward}"));
    assert_eq!(after, image(&mut open(&server, "live")), "{forward}");
    // What changed between the plan and the script is not overwritten.
    server.ask("live", &inverse).unwrap();
    run_all(&mut open(&server, "live"), "UPDATE review SET customer = 7 WHERE id = 13");
    let before = image(&mut open(&server, "live"));
    let error = server.ask("live", &forward).unwrap_err();
    assert!(format!("{error:?}").contains("public.review id=13 was changed since the plan"), "{error:?}");
    assert_eq!(before, image(&mut open(&server, "live")));
    run_all(&mut open(&server, "live"), "UPDATE review SET customer = NULL WHERE id = 13");
    server.ask("live", &forward).unwrap();
    // What came to hang on it since, and what changed since, stays.
    run_all(
        &mut open(&server, "live"),
        "INSERT INTO item VALUES (3, 9, 1, 1)\n--\nUPDATE ticket SET body = '1' WHERE customer_ref = 'CUST-4'",
    );
    server.ask("live", &inverse).unwrap();
    let read = |query: &str| server.ask("live", query).unwrap();
    assert_eq!(read("SELECT count(*) FROM item WHERE orders = 3"), "1");
    assert_eq!(read("SELECT count(*) FROM ticket WHERE customer_ref = 'CUST-4'"), "1");
}

#[test]
fn who_may_not_see_or_change_everything_is_told_so_and_changes_nothing() {
    let server = server();
    worlds(&server);
    run_all(
        &mut open(&server, "live"),
        "DROP ROLE IF EXISTS clerk\n--\nCREATE ROLE clerk LOGIN\n--\nGRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO clerk",
    );
    let error = request().restore_as(&server, "was", "live", "clerk").unwrap_err();
    assert!(error.chain().join(" ").contains("permission denied for sequence audit_log_id_seq"), "{error:?}");
    run_all(
        &mut open(&server, "live"),
        "ALTER TABLE item ENABLE ROW LEVEL SECURITY\n--\nGRANT USAGE, UPDATE ON ALL SEQUENCES IN SCHEMA public TO clerk",
    );
    let error = request().restore_as(&server, "was", "live", "clerk").unwrap_err();
    assert!(error.chain().join(" ").contains("row-level security"), "{error:?}");
    run_all(&mut open(&server, "live"), "ALTER TABLE item DISABLE ROW LEVEL SECURITY");
    let error = Database::write(open_as(&server, "live", "clerk"), Triggers::Off).map(drop).unwrap_err();
    assert!(error.next_step().unwrap().contains("GRANT SET"), "{error:?}");
    request().restore_as(&server, "was", "live", "clerk").unwrap();
    assert_same(&server, "live", "never", String::new);
}

#[test]
fn hostile_settings_of_a_role_change_nothing_of_what_is_meant() {
    let server = server();
    worlds(&server);
    run_all(
        &mut open(&server, "live"),
        "CREATE SCHEMA evil\n--\nCREATE TABLE evil.customer (id int PRIMARY KEY)\n--\n\
         CREATE FUNCTION evil.unnest(text[]) RETURNS SETOF text LANGUAGE sql AS $$ SELECT 'gotcha'::text $$\n--\n\
         CREATE DOMAIN evil.int8 AS text\n--\n\
         ALTER ROLE postgres SET search_path = evil, public, pg_catalog\n--\n\
         ALTER ROLE postgres SET datestyle = 'German'\n--\nALTER ROLE postgres SET timezone = 'Asia/Kathmandu'\n--\n\
         ALTER ROLE postgres SET intervalstyle = 'sql_standard'\n--\nALTER ROLE postgres SET extra_float_digits = 0",
    );
    let done = Request {
        table: "public.customer",
        definition: &DEFINITION.replace("\"customer\"", "\"public.customer\""),
        ..request()
    }
    .restore(&server, "was", "live");
    run_all(&mut open(&server, "template1"), "ALTER ROLE postgres RESET ALL");
    done.unwrap();
    run_all(&mut open(&server, "live"), "DROP SCHEMA evil CASCADE");
    assert_same(&server, "live", "never", String::new);
}

#[test]
fn a_definition_is_suggested_from_keys_and_names_and_is_read_again() {
    let server = server();
    worlds(&server);
    let catalog =
        mainstay_engine::record::Database::catalog(&mut Database::read(open(&server, "live")).unwrap())
            .unwrap();
    let text = suggest(&catalog, catalog.find("customer").unwrap()).unwrap();
    assert!(text.contains("\"public.review.review_customer_fkey\" = \"relink\""), "{text}");
    assert!(text.contains("# child = \"public.ticket\""), "{text}");
    let request = Request { definition: &text, ..request() };
    assert_eq!(request.preview(&server, "was", "live").unwrap().inserts(), 11, "all but the ticket");
}
