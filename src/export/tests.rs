//! Tests of the export over an in-process upstream.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use nbd::export::{Export, Extent, STATE_HOLE, STATE_ZERO, ZeroMode};
use nbd::wire::Errno;
use proptest::prelude::*;

use super::testing::{Lab, Source, done, eventually, quiet, read, unlocked};
use super::{ExportConfig, ExportError, GateMode, LazyExport, PullState};
use crate::limits::REGION;
use crate::store::{MapError, MemoryStore};
use crate::upstream::LinkState;

const SIZE: usize = 10 * 4096 + 1234;

async fn complete(export: &LazyExport) {
    let mut state = export.complete();
    let reached = state.wait_for(|state| *state == PullState::Complete);
    tokio::time::timeout(Duration::from_secs(20), reached).await.expect("the pull must end").unwrap();
}

#[tokio::test]
async fn without_background_exactly_the_asked_blocks_are_fetched() {
    let lab = Lab::new(Source::new(Source::pattern(SIZE)), quiet).await;
    assert_eq!(read(&lab.export, 5000, 10).await.unwrap(), lab.source.bytes[5000..5010]);
    assert_eq!(read(&lab.export, 4096 * 3 - 1, 2).await.unwrap(), lab.source.bytes[4096 * 3 - 1..][..2]);
    assert_eq!(read(&lab.export, SIZE as u64 - 1, 1).await.unwrap(), lab.source.bytes[SIZE - 1..]);
    assert_eq!(read(&lab.export, 5001, 10).await.unwrap(), lab.source.bytes[5001..5011], "from the store");
    assert_eq!(lab.source.reads(), vec![(4096, 4096), (8192, 8192), (40960, 1234)]);
    let status = lab.export.status();
    assert_eq!((status.pulled_bytes, status.demand_fetches, status.faults.count), (4096 * 3 + 1234, 3, 3));
    assert_eq!((status.pull, status.dirty_bytes), (PullState::Off, 0));
}

#[tokio::test]
async fn connections_do_not_spin_while_the_pull_runs() {
    let source = Source::new(Source::pattern(SIZE));
    source.close_valve();
    let lab = Lab::new(source, quiet).await;
    assert!(!lab.export.is_busy());
    lab.export.set_background(true);
    assert!(lab.export.is_busy());
    lab.source.let_through(100);
    complete(&lab.export).await;
    assert!(!lab.export.is_busy());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_clients_reading_one_block_make_one_fetch() {
    let lab = Lab::new(Source::new(Source::pattern(SIZE)), quiet).await;
    lab.source.close_valve();
    let readers: Vec<_> = (0..64)
        .map(|_| {
            let export = lab.export.clone();
            tokio::spawn(async move { read(&export, 8192, 4096).await.unwrap() })
        })
        .collect();
    eventually("the fetch", || !lab.source.reads().is_empty()).await;
    lab.source.let_through(64);
    for reader in readers {
        assert_eq!(reader.await.unwrap(), lab.source.bytes[8192..12288]);
    }
    assert_eq!(lab.source.reads().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_beats_a_fetch_in_flight() {
    let lab = Lab::new(Source::new(Source::pattern(SIZE)), quiet).await;
    lab.source.close_valve();
    let export = lab.export.clone();
    let reader = tokio::spawn(async move { read(&export, 0, 12288).await.unwrap() });
    eventually("the fetch", || !lab.source.reads().is_empty()).await;
    done(lab.export.write(4096, Bytes::from(vec![9; 4096]), false)).await.unwrap();
    lab.source.let_through(8);
    reader.await.unwrap();
    let found = read(&lab.export, 0, 12288).await.unwrap();
    assert!(found[..4096] == lab.source.bytes[..4096] && found[8192..] == lab.source.bytes[8192..12288]);
    assert!(found[4096..8192].iter().all(|byte| *byte == 9), "the write must win");
    assert_eq!(lab.export.status().dirty_bytes, 4096);
}

// One thread: two lanes that take their requests in order could otherwise send them out of order.
#[tokio::test]
async fn the_order_on_the_wire_is_the_order_of_heat_and_zeroes_are_not_sent() {
    let regions = 6;
    let mut bytes = Source::pattern(regions * REGION as usize);
    bytes[REGION as usize + 100..2 * REGION as usize + 5000].fill(0);
    let heat = [0, 3, 0, 90, 7, 0].map(|flags| Extent { length: REGION, flags }).to_vec();
    let zero_length = REGION - 100 + 5000;
    let allocation = vec![
        Extent { length: REGION + 100, flags: 0 },
        Extent { length: zero_length, flags: STATE_HOLE | STATE_ZERO },
        Extent { length: regions as u64 * REGION - REGION - 100 - zero_length, flags: 0 },
    ];
    let source = Source::with_contexts(bytes, &[("lazy-migrate:heat", heat), ("base:allocation", allocation)]);
    let lab = Lab::new(source, |_| ()).await;
    complete(&lab.export).await;
    let mib = REGION as u32;
    let wanted = vec![
        (3 * REGION, mib),
        (4 * REGION, mib),
        (REGION, 4096),
        (0, mib),
        (2 * REGION + 4096, mib - 4096),
        (5 * REGION, mib),
    ];
    assert_eq!(lab.source.reads(), wanted);
    assert_eq!(lab.store.to_bytes(), lab.source.bytes);
    let status = lab.export.status();
    assert_eq!((status.skipped_bytes, status.missing_bytes), (REGION, 0));
    assert_eq!((status.pulled_bytes, status.upstream.state), (5 * REGION, LinkState::None));
    assert_eq!(lab.store.after_power_loss(), lab.source.bytes, "complete means durable");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_complete_export_goes_on_serving_without_its_upstream() {
    let lab = Lab::new(Source::new(Source::pattern(SIZE)), |_| ()).await;
    complete(&lab.export).await;
    lab.source.reachable.store(false, Ordering::SeqCst);
    lab.source.cut_all();
    done(lab.export.write(100, Bytes::from_static(b"new"), true)).await.unwrap();
    assert_eq!(read(&lab.export, 99, 5).await.unwrap()[1..4], *b"new");
    let heat = done(lab.export.block_status("lazy-migrate:heat", 0, SIZE as u64, 10)).await.unwrap();
    assert!(heat.len() == 1 && heat[0].flags > 0, "ready to be a source: {heat:?}");
    lab.export.shutdown().await.unwrap();
    assert!(!lab.directory.path().join("map.live").exists());
    assert_eq!(read(&lab.export, 0, 1).await, Err(Errno::ESHUTDOWN));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_wait_while_the_upstream_is_away_and_nothing_fails() {
    let lab = Lab::new(Source::new(Source::pattern(SIZE)), quiet).await;
    lab.source.close_valve();
    let export = lab.export.clone();
    let reader = tokio::spawn(async move { read(&export, 0, 4096).await });
    eventually("the fetch", || !lab.source.reads().is_empty()).await;
    lab.source.reachable.store(false, Ordering::SeqCst);
    lab.source.cut_all();
    eventually("the loss", || lab.export.status().upstream.state == LinkState::Lost).await;
    lab.source.let_through(10);
    lab.source.refuse.store(2, Ordering::SeqCst);
    assert!(!reader.is_finished());
    lab.source.reachable.store(true, Ordering::SeqCst);
    assert_eq!(reader.await.unwrap().unwrap(), lab.source.bytes[..4096]);
    let upstream = lab.export.status().upstream;
    assert_eq!((upstream.state, upstream.refused), (LinkState::Connected, 2));
    assert_eq!(lab.source.reads().len(), 4, "once lost, twice refused, once answered");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_taken_from_an_upstream_of_another_size() {
    let source = Source::new(Source::pattern(SIZE));
    source.claimed_size.store(SIZE as u64 + 4096, Ordering::SeqCst);
    let lab = Lab::new(source, |_| ()).await;
    let export = lab.export.clone();
    let reader = tokio::spawn(async move { read(&export, 0, 1).await });
    eventually("the refusal", || lab.export.status().upstream.state == LinkState::WrongDisk).await;
    assert!(lab.export.status().upstream.last_error.unwrap().contains("another size"));
    assert!(lab.source.reads().is_empty() && !reader.is_finished());
    lab.source.claimed_size.store(SIZE as u64, Ordering::SeqCst);
    assert_eq!(reader.await.unwrap().unwrap(), lab.source.bytes[..1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_of_one_connection_is_pulled_over_that_one() {
    let source = Source::new(Source::pattern(3 * REGION as usize));
    source.only_one.store(true, Ordering::SeqCst);
    let lab = Lab::new(source, |_| ()).await;
    complete(&lab.export).await;
    assert_eq!(lab.store.to_bytes(), lab.source.bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn further_connections_begin_when_the_first_is_greeted_and_share_the_pull() {
    let size = 96 << 20;
    let source = Source::new(Source::pattern(size));
    source.greets_for.store(3, Ordering::SeqCst);
    let directory = tempfile::tempdir().unwrap();
    // Of unknown size: the first connection is made before the export is.
    let config = ExportConfig::new("disk", directory.path(), "test disk");
    let export = LazyExport::lazy(config, source.upstream()).await.unwrap();
    assert_eq!(export.size(), size as u64);
    assert_eq!(source.at_greeting.load(Ordering::SeqCst), 1, "a server of one client takes the first that comes");
    export.start();
    complete(&export).await;
    assert_eq!(source.connections.load(Ordering::SeqCst), 3, "each is used");
    let carried = source.carried.lock().unwrap().clone();
    for background in [1, 2] {
        let bytes = carried.get(&background).copied().unwrap_or(0);
        assert!(bytes >= size as u64 / 8, "connection {background} hardly carries anything: {carried:?}");
    }
    export.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_pauses_the_pull_and_readers_go_on() {
    let source = Source::new(Source::pattern(3 * REGION as usize));
    let lab = Lab::new(source, quiet).await;
    lab.store.fail_writes(nix::libc::ENOSPC);
    lab.export.set_background(true);
    eventually("the pause", || lab.export.status().pull == PullState::PausedNoSpace).await;
    assert!(lab.export.status().paused_reason.unwrap().contains("No space"));
    assert_eq!(read(&lab.export, 70_000, 10).await.unwrap(), lab.source.bytes[70_000..70_010]);
    assert_eq!(done(lab.export.write(1, Bytes::from_static(b"x"), false)).await, Err(Errno::ENOSPC));
    assert_eq!(lab.export.status().present_bytes, 0);
    lab.store.fail_writes(0);
    complete(&lab.export).await;
    assert_eq!(lab.store.to_bytes(), lab.source.bytes);
    assert_eq!(lab.export.status().paused_reason, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rate_limit_holds_the_pull_but_not_demand() {
    let source = Source::new(Source::pattern(8 * REGION as usize));
    let lab = Lab::new(source, |config| config.rate = Some(REGION)).await;
    eventually("the first request", || !lab.source.reads().is_empty()).await;
    let since = std::time::Instant::now();
    read(&lab.export, 7 * REGION, 4096).await.unwrap();
    assert!(since.elapsed() < Duration::from_millis(900), "demand is not limited");
    assert!(lab.export.status().present_bytes <= 3 * REGION);
    lab.export.set_rate(None);
    complete(&lab.export).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn process_death_loses_no_acknowledged_write_and_fetches_nothing_twice() {
    let mut lab = Lab::new(Source::new(Source::pattern(SIZE)), quiet).await;
    read(&lab.export, 0, 8192).await.unwrap();
    done(lab.export.write(3 * 4096, Bytes::from(vec![5; 4096]), false)).await.unwrap();
    done(lab.export.write(100, Bytes::from_static(b"abc"), false)).await.unwrap();
    let fetched = lab.source.reads().len();
    lab = lab.reopen_after_kill(quiet).await;
    assert_eq!(lab.export.status().present_bytes, 3 * 4096);
    assert_eq!(lab.export.status().dirty_bytes, 2 * 4096);
    assert_eq!(read(&lab.export, 100, 3).await.unwrap(), b"abc");
    assert_eq!(read(&lab.export, 3 * 4096, 4096).await.unwrap(), vec![5; 4096]);
    assert_eq!(lab.source.reads().len(), fetched, "what is there is not fetched again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_power_loss_flushed_writes_are_there_and_others_are_old_or_new() {
    let mut lab = Lab::new(Source::new(Source::pattern(SIZE)), quiet).await;
    done(lab.export.write(0, Bytes::from(vec![5; 4096]), false)).await.unwrap();
    done(lab.export.flush()).await.unwrap();
    done(lab.export.write(4096, Bytes::from(vec![6; 4096]), true)).await.unwrap();
    done(lab.export.write(8192, Bytes::from(vec![7; 4096]), false)).await.unwrap();
    read(&lab.export, 12288, 4096).await.unwrap();
    lab = lab.reopen_after_power_loss().await;
    assert_eq!(read(&lab.export, 0, 4096).await.unwrap(), vec![5; 4096]);
    assert_eq!(read(&lab.export, 4096, 4096).await.unwrap(), vec![6; 4096]);
    assert_eq!(read(&lab.export, 8192, 8192).await.unwrap(), lab.source.bytes[8192..16384], "the source's bytes again");
}

#[tokio::test]
async fn a_failed_sync_is_told_to_the_client_and_persists_no_bit() {
    let mut lab = Lab::new(Source::new(Source::pattern(SIZE)), quiet).await;
    done(lab.export.write(0, Bytes::from(vec![5; 4096]), false)).await.unwrap();
    lab.store.fail_syncs(nix::libc::EIO);
    assert_eq!(done(lab.export.flush()).await, Err(Errno::EIO));
    lab = lab.reopen_after_power_loss().await;
    assert_eq!(read(&lab.export, 0, 4096).await.unwrap(), lab.source.bytes[..4096]);
}

#[tokio::test]
async fn after_a_failed_sync_the_next_process_begins_with_what_is_durable() {
    let mut lab = Lab::new(Source::new(Source::pattern(SIZE)), quiet).await;
    done(lab.export.write(0, Bytes::from(vec![5; 4096]), true)).await.unwrap();
    done(lab.export.write(4096, Bytes::from(vec![6; 4096]), false)).await.unwrap();
    lab.store.fail_syncs(nix::libc::EIO);
    assert_eq!(done(lab.export.flush()).await, Err(Errno::EIO));
    // The store may have lost the second write, and will not say so again.
    lab = lab.reopen_after_kill(quiet).await;
    assert_eq!(lab.export.status().present_bytes, 4096);
    assert_eq!(read(&lab.export, 0, 4096).await.unwrap(), [5; 4096]);
    assert_eq!(read(&lab.export, 4096, 4096).await.unwrap(), lab.source.bytes[4096..8192]);
}

#[tokio::test]
async fn who_waits_for_the_source_is_told_when_the_export_is_closed() {
    let lab = Lab::new(Source::new(Source::pattern(SIZE)), quiet).await;
    lab.source.valve_used.store(true, Ordering::SeqCst);
    let export = lab.export.clone();
    let reading = tokio::spawn(async move { read(&export, 0, 4096).await });
    let write = tokio::spawn(done(lab.export.write(8192, Bytes::from_static(&[5; 512]), false)));
    let cache = tokio::spawn(done(lab.export.cache(16384, 4096)));
    eventually("all are asked for", || lab.source.reads().len() == 3).await;
    lab.export.gate().set(GateMode::Closed).await;
    assert_eq!(reading.await.unwrap(), Err(Errno::ESHUTDOWN));
    assert_eq!(write.await.unwrap(), Err(Errno::ESHUTDOWN));
    assert_eq!(cache.await.unwrap(), Err(Errno::ESHUTDOWN));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_freeze_point_admits_no_change_and_a_fence_holds_everything() {
    let lab = Lab::new(Source::new(Source::pattern(SIZE)), quiet).await;
    lab.export.gate().set(GateMode::ReadOnly).await;
    assert_eq!(done(lab.export.write(0, Bytes::from_static(b"x"), false)).await, Err(Errno::EPERM));
    assert_eq!(done(lab.export.trim(0, 4096, false)).await, Err(Errno::EPERM));
    assert!(read(&lab.export, 0, 1).await.is_ok() && lab.export.info().read_only);
    lab.export.gate().set(GateMode::Held).await;
    let export = lab.export.clone();
    let writer = tokio::spawn(async move { done(export.write(0, Bytes::from_static(b"x"), false)).await });
    let export = lab.export.clone();
    let reader = tokio::spawn(async move { read(&export, 0, 1).await });
    assert!(
        tokio::time::timeout(Duration::from_millis(50), async {
            while !writer.is_finished() && !reader.is_finished() {
                tokio::task::yield_now().await
            }
        })
        .await
        .is_err()
    );
    lab.export.gate().set(GateMode::Open).await;
    assert_eq!(writer.await.unwrap(), Ok(()));
    assert!(reader.await.unwrap().is_ok());
}

#[tokio::test]
async fn nothing_is_cached_before_the_gate_opens() {
    let lab = Lab::new(Source::new(Source::pattern(SIZE)), quiet).await;
    lab.export.gate().set(GateMode::Held).await;
    let export = lab.export.clone();
    let cached = tokio::spawn(async move { done(export.cache(0, 8192)).await });
    let later = read(&lab.export, 0, 1);
    let held = tokio::time::timeout(Duration::from_millis(50), later).await;
    assert!(held.is_err() && lab.source.reads().is_empty(), "the source may still change its blocks");
    lab.export.gate().set(GateMode::Open).await;
    cached.await.unwrap().unwrap();
    assert_eq!(lab.source.reads(), vec![(0, 8192)]);
}

#[tokio::test]
async fn a_read_is_not_answered_after_the_lease_ended_in_the_middle_of_it() {
    // The first look at the clock is within the lease, all others are after it.
    let looks = std::sync::atomic::AtomicI64::new(0);
    let store = Arc::new(MemoryStore::new(4096));
    let export = LazyExport::local_on("disk", store, false).unwrap();
    let export = export.with_clock(Arc::new(move || looks.fetch_add(1, Ordering::SeqCst)));
    export.gate().set_deadline(1);
    let answer = tokio::time::timeout(Duration::from_millis(30), read(&export, 0, 512)).await;
    assert!(answer.is_err(), "it waits for the decision");
    export.gate().set_deadline(i64::MAX);
    assert_eq!(read(&export, 0, 512).await.unwrap(), vec![0; 512]);
}

#[tokio::test]
async fn the_live_map_of_a_map_that_was_taken_away_is_not_believed() {
    let lab = Lab::new(Source::new(Source::pattern(SIZE)), quiet).await;
    read(&lab.export, 0, SIZE).await.unwrap();
    let Lab { directory, source, export, .. } = lab;
    super::testing::end(export).await;
    unlocked(&directory).await;
    std::fs::remove_file(directory.path().join("map")).unwrap();
    let mut config = ExportConfig::new("disk", directory.path(), "test disk");
    quiet(&mut config);
    let store = Arc::new(MemoryStore::new(SIZE as u64));
    let export = LazyExport::lazy_on(config, source.upstream(), store).await.unwrap();
    export.start();
    assert!(read(&export, 0, SIZE).await.unwrap() == source.bytes, "the new store has nothing yet");
}

#[tokio::test]
async fn contexts_tell_what_is_present_dirty_and_a_hole() {
    let lab = Lab::new(Source::new(Source::pattern(SIZE)), quiet).await;
    read(&lab.export, 0, 8192).await.unwrap();
    done(lab.export.write(4096, Bytes::from(vec![1; 4096]), false)).await.unwrap();
    done(lab.export.trim(4096 * 4, 4096 * 2, false)).await.unwrap();
    let present = done(lab.export.block_status("lazy-migrate:present", 10, SIZE as u64 - 10, 100)).await.unwrap();
    let found: Vec<(u64, u64)> = present.iter().map(|e| (e.length, e.flags)).collect();
    assert_eq!(found, vec![(4086, 1), (4096, 3), (8192, 0), (8192, 3), (SIZE as u64 - 6 * 4096, 0)]);
    let one = done(lab.export.block_status("lazy-migrate:present", 0, 8192, 1)).await.unwrap();
    assert_eq!(one, vec![Extent { length: 4096, flags: 1 }]);
    done(lab.export.block_status("base:allocation", 0, 1, 1)).await.unwrap();
    done(lab.export.trim(4096 * 8, 4096, false)).await.unwrap();
    let holes = done(lab.export.block_status("base:allocation", 0, SIZE as u64, 100)).await.unwrap();
    let found: Vec<(u64, u64)> = holes.iter().map(|e| (e.length, e.flags)).collect();
    assert_eq!(found, vec![(8 * 4096, 0), (4096, 3), (SIZE as u64 - 9 * 4096, 0)]);
    assert_eq!(done(lab.export.block_status("nonsense", 0, 1, 1)).await, Err(Errno::EINVAL));
}

#[tokio::test]
async fn another_disk_in_the_directory_is_refused_and_left_alone() {
    let source = Source::new(Source::pattern(SIZE));
    let directory = tempfile::tempdir().unwrap();
    let config = ExportConfig { background: false, ..ExportConfig::new("disk", directory.path(), "one") };
    let first = LazyExport::lazy(config.clone(), source.upstream()).await.unwrap();
    first.start();
    done(first.write(0, Bytes::from(vec![1; 4096]), false)).await.unwrap();
    first.shutdown().await.unwrap();
    drop(first);
    unlocked(&directory).await;
    let before = std::fs::read(directory.path().join("map")).unwrap();
    let other = ExportConfig { identity: "two".into(), ..config.clone() };
    let error = LazyExport::lazy(other, source.upstream()).await.map(drop).unwrap_err();
    assert!(matches!(&error, ExportError::Map(MapError::OtherDisk { found, .. }) if found == "one"), "{error}");
    let longer = ExportConfig { size: Some(SIZE as u64 + 1), ..config.clone() };
    let error = LazyExport::lazy(longer, source.upstream()).await.map(drop).unwrap_err();
    assert!(matches!(error, ExportError::Map(MapError::OtherSize { .. })), "{error}");
    assert_eq!(std::fs::read(directory.path().join("map")).unwrap(), before);
    let again = LazyExport::lazy(config.clone(), source.upstream()).await.unwrap();
    assert_eq!(again.status().present_bytes, 4096);
    drop(again);
    std::fs::remove_file(directory.path().join("disk.img")).unwrap();
    let error = LazyExport::lazy(config, source.upstream()).await.map(drop).unwrap_err();
    assert!(matches!(error, ExportError::StoreGone { .. }), "{error}");
}

#[tokio::test]
async fn a_file_with_data_is_never_taken_for_a_new_store() {
    let source = Source::new(Source::pattern(SIZE));
    let directory = tempfile::tempdir().unwrap();
    let precious = directory.path().join("precious");
    std::fs::write(&precious, b"data").unwrap();
    let config =
        ExportConfig { store: Some(precious.clone()), ..ExportConfig::new("disk", directory.path().join("d"), "x") };
    let error = LazyExport::lazy(config, source.upstream()).await.map(drop).unwrap_err();
    assert!(matches!(error, ExportError::StoreInUse { .. }), "{error}");
    assert_eq!(std::fs::read(&precious).unwrap(), b"data");
}

#[derive(Clone, Debug)]
enum Op {
    Read(u64, u64),
    Write(u64, u64, u8, bool),
    Zero(u64, u64, bool),
    Trim(u64, u64),
    Flush,
    Kill,
    PowerLoss,
}

fn op() -> impl Strategy<Value = Op> {
    let range = || {
        let length = prop_oneof![1..600u64, 3000..9000u64, Just(4096u64), Just(20_000u64)];
        let at = prop_oneof![0..SIZE as u64, (0..11u64).prop_map(|block| block * 4096), Just(SIZE as u64 - 700)];
        (at, length).prop_map(|(at, length)| (at, length.min(SIZE as u64 - at)))
    };
    prop_oneof![
        4 => range().prop_map(|(at, length)| Op::Read(at, length)),
        4 => (range(), any::<u8>(), any::<bool>()).prop_map(|((at, length), value, fua)| Op::Write(at, length, value, fua)),
        2 => (range(), any::<bool>()).prop_map(|((at, length), no_hole)| Op::Zero(at, length, no_hole)),
        2 => range().prop_map(|(at, length)| Op::Trim(at, length)),
        1 => Just(Op::Flush),
        1 => Just(Op::Kill),
        1 => Just(Op::PowerLoss),
    ]
}

/// What each byte may be: one value, or several after a trim or a power loss.
async fn follow(ops: Vec<Op>, background: bool) {
    let config = move |config: &mut ExportConfig| config.background = background;
    let mut lab = Lab::new(Source::new(Source::pattern(SIZE)), config).await;
    let mut may: Vec<Vec<u8>> = lab.source.bytes.iter().map(|byte| vec![*byte]).collect();
    // What a power loss may bring back: every value since the last flush, and those before it.
    let mut history = may.clone();
    for op in ops {
        let change =
            |may: &mut Vec<Vec<u8>>, history: &mut Vec<Vec<u8>>, at: u64, length: u64, value: u8, keep: bool| {
                for at in at as usize..(at + length) as usize {
                    if !keep {
                        may[at].clear();
                    }
                    may[at].push(value);
                    history[at].push(value);
                }
            };
        match op {
            Op::Read(at, length) => {
                let found = read(&lab.export, at, length as usize).await.unwrap();
                for (byte, allowed) in found.iter().zip(&mut may[at as usize..]) {
                    assert!(allowed.contains(byte), "{byte} is none of {allowed:?}");
                    // Once it was read it stays what it is.
                    *allowed = vec![*byte];
                }
            }
            Op::Write(at, length, value, fua) => {
                let data = Bytes::from(vec![value; length as usize]);
                done(lab.export.write(at, data, fua)).await.unwrap();
                change(&mut may, &mut history, at, length, value, false);
                if fua {
                    history.clone_from(&may);
                }
            }
            Op::Zero(at, length, no_hole) => {
                done(lab.export.write_zeroes(at, length, ZeroMode { no_hole, fast: false }, false)).await.unwrap();
                change(&mut may, &mut history, at, length, 0, false);
            }
            Op::Trim(at, length) => {
                done(lab.export.trim(at, length, false)).await.unwrap();
                change(&mut may, &mut history, at, length, 0, true);
            }
            Op::Flush => {
                done(lab.export.flush()).await.unwrap();
                history.clone_from(&may);
            }
            Op::Kill => lab = lab.reopen_after_kill(config).await,
            Op::PowerLoss => {
                lab = lab.reopen_after_power_loss().await;
                may.clone_from(&history);
            }
        }
    }
    let found = read(&lab.export, 0, SIZE).await.unwrap();
    assert!(found.iter().zip(&may).all(|(byte, allowed)| allowed.contains(byte)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Reads, writes, zeroings and trims at odd offsets up to the partial last block, flushes, kills and power losses,
    /// against an array of bytes; without the background pull, and with it racing along.
    #[test]
    fn the_disk_is_an_array_of_bytes(ops in prop::collection::vec(op(), 1..40), background in any::<bool>()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(follow(ops, background));
    }
}

/// Clients that write odd pieces of shared blocks at once, while the pull runs and the connections are cut.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_clients_at_once_lose_nothing() {
    const WRITERS: usize = 8;
    const PIECE: usize = 1500;
    let size = 400 * PIECE + 77;
    for round in 0..12u8 {
        let lab = Lab::new(Source::new(Source::pattern(size)), |_| ()).await;
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let export = lab.export.clone();
                tokio::spawn(async move {
                    let mut mine = Vec::new();
                    for step in 0..400 / WRITERS {
                        // Every writer has every eighth piece: each block is shared by three or four of them.
                        let piece = (step * 13 % (400 / WRITERS)) * WRITERS + writer;
                        let at = (piece * PIECE) as u64;
                        let value = round.wrapping_mul(31).wrapping_add(piece as u8);
                        let kept = match step % 4 {
                            0 => {
                                done(export.write_zeroes(at, PIECE as u64, ZeroMode::default(), false)).await.unwrap();
                                vec![0; PIECE]
                            }
                            1 => read(&export, at, PIECE).await.unwrap(),
                            _ => {
                                done(export.write(at, Bytes::from(vec![value; PIECE]), step % 8 == 2)).await.unwrap();
                                vec![value; PIECE]
                            }
                        };
                        assert!(read(&export, at, PIECE).await.unwrap() == kept, "piece {piece}");
                        mine.push((piece, kept));
                    }
                    mine
                })
            })
            .collect();
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_millis(3)).await;
            lab.source.cut_all();
        }
        let mut expected = lab.source.bytes.clone();
        for writer in writers {
            for (piece, kept) in writer.await.unwrap() {
                expected[piece * PIECE..][..PIECE].copy_from_slice(&kept);
            }
        }
        complete(&lab.export).await;
        assert!(lab.store.to_bytes() == expected, "round {round}");
        done(lab.export.flush()).await.unwrap();
        assert!(lab.store.after_power_loss() == expected, "a flush covers all clients, round {round}");
    }
}

#[tokio::test]
async fn a_local_image_is_all_there_and_tracked() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, Source::pattern(SIZE)).unwrap();
    let export = Arc::new(LazyExport::local("disk", &path, false).unwrap());
    let guard = export.clone().client_entered();
    assert_eq!((export.status().clients, export.status().missing_bytes), (1, 0));
    drop(guard);
    assert_eq!(export.status().clients, 0);
    assert_eq!(*export.complete().borrow(), PullState::Complete);
    done(export.write(SIZE as u64 - 2, Bytes::from_static(b"zz"), true)).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap()[SIZE - 2..], *b"zz");
    assert_eq!(export.status().dirty_bytes, 4096);
    let error = LazyExport::local("disk", &directory.path().join("none"), false).map(drop).unwrap_err();
    assert!(error.to_string().contains("cannot open the image"), "{error}");
    assert_eq!(export.disk().size(), SIZE as u64);
}
