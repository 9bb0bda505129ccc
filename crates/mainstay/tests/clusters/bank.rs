//! A bank that never stops: money moves between accounts and never comes or goes, and every transfer that was acknowledged
//! is written down beside.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mainstay_core::Clock as _;
use mainstay_testkit::lab::Postgres;
use mainstay_testkit::{RealClock, Rng};
use mainstay_workloads::postgres::{Address, Connection, Lsn};

const ACCOUNTS: usize = 40;
const BALANCE: usize = 1000;

/// A transfer that the server acknowledged.
#[derive(Clone, Debug)]
pub(crate) struct Transfer {
    pub(crate) id: u64,
    /// It was committed after this place and before that.
    pub(crate) after: Lsn,
    pub(crate) before: Lsn,
    /// When it had been, as the server writes it.
    pub(crate) time: String,
}

pub(crate) fn found(server: &Postgres) {
    for statement in [
        "CREATE TABLE account (id int PRIMARY KEY, balance int NOT NULL)",
        &format!("INSERT INTO account SELECT n, {BALANCE} FROM generate_series(0, {}) n", ACCOUNTS - 1),
        "CREATE TABLE transfer (id bigint PRIMARY KEY, payer int, payee int, amount int)",
    ] {
        server.ask("postgres", statement).unwrap();
    }
}

/// Moves money while `act` runs, and again whenever the server is back; what was acknowledged.
pub(crate) fn open<T>(
    address: &str,
    seed: u64,
    act: impl FnOnce(&Mutex<Vec<Transfer>>) -> T,
) -> (Vec<Transfer>, T) {
    let address: Address = address.parse().unwrap();
    let (closing, acknowledged) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    let outcome = std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut rng, mut next) = (Rng::new(seed), 0);
            while !closing.load(Ordering::Relaxed) {
                if let Ok(connection) = Connection::open(&address, "postgres", None, false) {
                    work(connection, &mut rng, &mut next, &closing, &acknowledged);
                }
                RealClock.sleep(Duration::from_millis(20));
            }
        });
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| act(&acknowledged)));
        closing.store(true, Ordering::Relaxed);
        outcome
    });
    let outcome = outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    (acknowledged.into_inner().unwrap(), outcome)
}

/// Until the connection breaks.
fn work(
    mut connection: Connection,
    rng: &mut Rng,
    next: &mut u64,
    closing: &AtomicBool,
    acknowledged: &Mutex<Vec<Transfer>>,
) {
    while !closing.load(Ordering::Relaxed) {
        let (payer, payee, amount) = (rng.below(ACCOUNTS), rng.below(ACCOUNTS), rng.below(30));
        // What is not acknowledged may have happened: its number is not used again.
        let id = *next;
        *next += 1;
        let transfer = format!(
            "BEGIN; UPDATE account SET balance = balance - {amount} WHERE id = {payer}; \
             UPDATE account SET balance = balance + {amount} WHERE id = {payee}; \
             INSERT INTO transfer VALUES ({id}, {payer}, {payee}, {amount}); COMMIT"
        );
        let Ok(after) = place(&mut connection) else { return };
        if connection.query(&transfer).is_err() {
            return;
        }
        let Ok(before) = place(&mut connection) else { return };
        let (after, (before, time)) = (after.0, before);
        acknowledged.lock().unwrap().push(Transfer { id, after, before, time });
    }
}

fn place(connection: &mut Connection) -> mainstay_core::Result<(Lsn, String)> {
    let query = "SELECT pg_current_wal_insert_lsn(), to_char(clock_timestamp() AT TIME ZONE 'UTC', \
                 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";
    let row = connection.query(query)?.remove(0);
    Ok((row[0].as_deref().unwrap().parse().unwrap(), row[1].clone().unwrap()))
}

/// Not a coin has come or gone, and each balance is what the transfers make of it; the numbers of all transfers.
#[track_caller]
pub(crate) fn audit(copy: &Postgres) -> Vec<u64> {
    let wrong = copy.ask(
        "postgres",
        &format!(
            "SELECT count(*) FROM account a WHERE balance <> {BALANCE} \
             + coalesce((SELECT sum(amount) FROM transfer WHERE payee = a.id), 0) \
             - coalesce((SELECT sum(amount) FROM transfer WHERE payer = a.id), 0)"
        ),
    );
    assert_eq!(wrong.unwrap(), "0", "balances");
    let sum = copy.ask("postgres", "SELECT sum(balance) FROM account").unwrap();
    assert_eq!(sum, (ACCOUNTS * BALANCE).to_string());
    let ids = copy.ask("postgres", "SELECT id FROM transfer ORDER BY id").unwrap();
    ids.lines().map(|id| id.parse().unwrap()).collect()
}
