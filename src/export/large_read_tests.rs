//! Reads of missing blocks that are large enough to go by the store.

use bytes::Bytes;
use nbd::export::Export;

use super::testing::{Lab, Source, done, eventually, quiet, read};
use crate::limits::DEMAND_PAGES_MIN;

#[tokio::test]
async fn a_large_read_comes_by_the_store_and_needs_no_room_in_it() {
    let lab = Lab::new(Source::new(Source::pattern(3 << 20)), quiet).await;
    let long = |at: u64| (at, 1 << 20);
    for (at, length) in [long(0), (4096 + 5, DEMAND_PAGES_MIN as usize)] {
        assert!(read(&lab.export, at, length).await.unwrap() == lab.source.bytes[at as usize..][..length]);
    }
    assert!(lab.store.to_bytes()[..1 << 20] == lab.source.bytes[..1 << 20]);
    // That the store takes nothing is known only when the first of them has come.
    lab.store.fail_writes(nix::libc::ENOSPC);
    for (at, length) in [long(1 << 20), long(1 << 20)] {
        assert!(read(&lab.export, at, length).await.unwrap() == lab.source.bytes[at as usize..][..length]);
    }
    assert_eq!(lab.export.status().present_bytes, 1 << 20);
    assert_eq!(lab.source.reads().len(), 4, "one in vain");
}

#[tokio::test]
async fn a_write_beats_a_large_read_in_flight() {
    let lab = Lab::new(Source::new(Source::pattern(2 << 20)), quiet).await;
    lab.source.close_valve();
    let export = lab.export.clone();
    let reader = tokio::spawn(async move { read(&export, 0, 1 << 20).await });
    eventually("the request", || lab.source.reads().len() == 1).await;
    done(lab.export.write(8192, Bytes::from(vec![7; 4096]), false)).await.unwrap();
    lab.source.let_through(1);
    let mut expected = lab.source.bytes[..1 << 20].to_vec();
    expected[8192..8192 + 4096].fill(7);
    assert!(reader.await.unwrap().unwrap() == expected);
    assert!(lab.store.to_bytes()[..1 << 20] == expected);
}
