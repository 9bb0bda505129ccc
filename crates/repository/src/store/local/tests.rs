use mainstay_testkit::blob_store_suite;
use tempfile::TempDir;

use super::*;

/// A store that publishes in the given way, if this file system can.
fn store_with(publish: Publish) -> (TempDir, LocalStore) {
    let directory = tempfile::tempdir().unwrap();
    let store = LocalStore::create(directory.path()).unwrap();
    let staging = OnceLock::from(Staging::with(&store.root, publish).unwrap());
    let store = LocalStore { staging, ..store };
    (directory, store)
}

blob_store_suite!(conformance, || {
    let directory = tempfile::tempdir().unwrap();
    let store = LocalStore::create(&directory.path().join("repository")).unwrap();
    (directory, store)
});
blob_store_suite!(conformance_of_links, || store_with(Publish::Link));
blob_store_suite!(conformance_of_renames, || store_with(Publish::Rename));
