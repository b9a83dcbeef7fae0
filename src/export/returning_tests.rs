//! A store that was the disk before: what was not written elsewhere is taken as it is, while clients read and write.

use bytes::Bytes;
use nbd::export::{Export, Extent};

use super::testing::{Lab, Source, done, eventually, read};
use crate::store::Store;

const BLOCKS: usize = 64;
const SIZE: usize = BLOCKS * 4096;
/// Blocks of the second half were written at the source since the disk left here.
const HALF: u64 = SIZE as u64 / 2;

/// The flags of `lazy-migrate:present`: present, and present and dirty.
fn source() -> std::sync::Arc<Source> {
    let extents = [Extent { length: HALF, flags: 1 }, Extent { length: HALF, flags: 3 }];
    Source::with_contexts(Source::pattern(SIZE), &[("lazy-migrate:present", extents.to_vec())])
}

/// What is in the store before: the first half as at the source, the second older.
async fn returning(source: std::sync::Arc<Source>) -> Lab {
    let lab = Lab::new(source, |config| (config.returns, config.background) = (true, false)).await;
    lab.store.write_at(0, &lab.source.bytes[..HALF as usize]).unwrap();
    lab.store.write_at(HALF, &vec![0xee; HALF as usize]).unwrap();
    lab
}

#[tokio::test]
async fn only_what_was_written_is_fetched() {
    let lab = returning(source()).await;
    assert_eq!(lab.export.status().present_bytes, 0, "nothing counts before the source has told");
    lab.export.set_background(true);
    eventually("all of it", || lab.export.status().missing_bytes == 0).await;
    assert!(lab.source.reads().iter().all(|(offset, _)| *offset >= HALF), "{:?}", lab.source.reads());
    assert!(read(&lab.export, 0, SIZE).await.unwrap() == lab.source.bytes);
    let status = lab.export.status();
    assert_eq!((status.pulled_bytes, status.skipped_bytes, status.dirty_bytes), (HALF, HALF, 0));
}

#[tokio::test]
async fn a_fetch_that_is_under_way_serves_its_reader_and_overwrites_nothing() {
    let lab = returning(source()).await;
    lab.source.close_valve();
    let export = lab.export.clone();
    let reader = tokio::spawn(async move { read(&export, 4096, 4096).await });
    eventually("the fetch", || lab.source.reads() == [(4096, 4096)]).await;
    lab.export.set_background(true);
    // It is answered from the store, although the source has not answered.
    assert!(reader.await.unwrap().unwrap() == lab.source.bytes[4096..8192]);
    done(lab.export.write(4096, Bytes::from(vec![7; 4096]), false)).await.unwrap();
    // Now the late answer comes, and everything else.
    lab.source.let_through(1000);
    eventually("all of it", || lab.export.status().missing_bytes == 0).await;
    assert_eq!(read(&lab.export, 4096, 4096).await.unwrap(), [7; 4096]);
    assert_eq!(lab.export.status().dirty_bytes, 4096);
}

#[tokio::test]
async fn what_was_written_here_before_the_source_told_stays() {
    let lab = returning(source()).await;
    done(lab.export.write(0, Bytes::from(vec![5; 4096]), false)).await.unwrap();
    done(lab.export.write(HALF, Bytes::from(vec![6; 4096]), false)).await.unwrap();
    lab.export.set_background(true);
    eventually("all of it", || lab.export.status().missing_bytes == 0).await;
    assert_eq!(read(&lab.export, 0, 4096).await.unwrap(), [5; 4096]);
    assert_eq!(read(&lab.export, HALF, 4096).await.unwrap(), [6; 4096]);
    assert_eq!(lab.export.status().dirty_bytes, 8192);
}

#[tokio::test]
async fn a_source_that_does_not_tell_sends_all() {
    let lab = returning(Source::new(Source::pattern(SIZE))).await;
    lab.export.set_background(true);
    eventually("all of it", || lab.export.status().missing_bytes == 0).await;
    assert_eq!(lab.export.status().pulled_bytes, SIZE as u64);
    assert!(read(&lab.export, 0, SIZE).await.unwrap() == lab.source.bytes);
}
