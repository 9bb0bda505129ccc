//! Every slot opens the repository by what it was made for, in whatever order the slots lie.

mod common;

use std::sync::Arc;

use common::{clock, options};
use mainstay_core::{Code, Time};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::keys::kit::Kit;
use mainstay_repository::keys::slot::{About, Cost, seal_with_key, seal_with_passphrase};
use mainstay_repository::seal::Secret;
use mainstay_repository::{Repository, Unlock};
use mainstay_testkit::MemoryStore;

const CHEAP: Cost = Cost { memory_kib: 64, passes: 1, lanes: 1 };

#[test]
fn each_of_several_slots_opens_and_nothing_else_does() {
    let clock = clock();
    // Slot names are random, and so is their order.
    for _ in 0..12 {
        let store = Arc::new(MemoryStore::new());
        let ring = KeyRing::create().unwrap();
        let kit = Kit::generate(&ring.family()).unwrap();
        let key = Secret::random().unwrap();
        let about = About { label: "test".into(), created: Time(0) };
        let slots = [
            seal_with_passphrase(&ring, &about, b"correct horse", CHEAP).unwrap(),
            kit.seal_slot(&ring, &about).unwrap(),
            seal_with_key(&ring, &about, &key).unwrap(),
        ];
        Repository::create(store.clone(), ring.clone(), &slots, &options(&clock)).unwrap();
        for unlock in [Unlock::Passphrase(b"correct horse"), Unlock::Kit(&kit), Unlock::KeyFile(&key)] {
            Repository::open(store.clone(), &unlock, &options(&clock)).unwrap();
        }
        let (other_kit, other_key) =
            (Kit::generate(&KeyRing::create().unwrap().family()).unwrap(), Secret::random().unwrap());
        let other_ring = Box::new(KeyRing::create().unwrap());
        let wrong = [
            Unlock::Passphrase(b"wrong"),
            Unlock::Kit(&other_kit),
            Unlock::KeyFile(&other_key),
            Unlock::Ring(other_ring),
        ];
        for unlock in wrong {
            let error = Repository::open(store.clone(), &unlock, &options(&clock)).err().unwrap();
            assert_eq!(error.code(), Code::WrongKey, "{error:?}");
        }
    }
}
