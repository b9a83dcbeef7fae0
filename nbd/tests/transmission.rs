//! The server in the transmission phase, on its bytes: bounds, order, draining, what extended headers add.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Probe, Raw, Verdict, until, within};
use nbd::export::{Answer, Export, Extent};
use nbd::limits::{MAX_BYTES_IN_FLIGHT, MAX_REQUESTS_IN_FLIGHT};
use nbd::server::{Budget, Draining, Ended, ServeOptions, ServerError};
use nbd::wire::{
    ChunkFlags, ChunkType, Command, CommandFlags, Errno, Framing, SimpleReply, StatusQuery, TransmissionFlags,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

const SIZE: usize = 1 << 20;

fn probe(judge: impl Fn(&common::Call) -> Verdict + Send + Sync + 'static) -> Arc<Probe> {
    Arc::new(Probe::new(SIZE, judge))
}

fn plain() -> Arc<Probe> {
    probe(|_| Verdict::Go)
}

#[tokio::test]
async fn fua_reaches_the_export() {
    let export = plain();
    let mut raw = Raw::enter(export.clone(), Framing::Simple).await;
    for command in [Command::WRITE_ZEROES, Command::TRIM, Command::READ, Command::CACHE] {
        raw.send_with(CommandFlags::FUA, command, 1, 0, 1).await;
        assert_eq!(raw.simple().await, (1, 0), "{command}");
        if command == Command::READ {
            raw.bytes(1).await;
        }
    }
    let fua: Vec<_> = export.calls().into_iter().map(|(command, _, _, fua)| (command, fua)).collect();
    let expected =
        [(Command::WRITE_ZEROES, true), (Command::TRIM, true), (Command::READ, false), (Command::CACHE, false)];
    assert_eq!(fua, expected);
}

#[tokio::test]
async fn long_trims_and_zeroes_are_one_call() {
    let export = Arc::new(Probe::new(64 << 20, |_| Verdict::Go));
    let mut raw = Raw::enter(export.clone(), Framing::Simple).await;
    for command in [Command::TRIM, Command::WRITE_ZEROES] {
        raw.send(command, 1, 0, 64 << 20).await;
        assert_eq!(raw.simple().await, (1, 0));
    }
    assert_eq!(export.calls().len(), 2);
    assert_eq!(export.calls()[1], (Command::WRITE_ZEROES, 0, 64 << 20, false));
}

#[tokio::test]
async fn replies_that_are_not_read_are_bounded() {
    let length = 8 << 20;
    let export = Arc::new(Probe::new(length, |_| Verdict::Go));
    let mut raw = Raw::enter_with(export.clone(), Framing::Simple, ServeOptions::default(), 1 << 20).await;
    let requests = 200;
    for cookie in 0..requests {
        raw.send(Command::READ, cookie, 0, length as u64).await;
    }
    for cookie in 0..requests {
        assert_eq!(raw.simple().await, (cookie, 0));
        raw.bytes(length).await;
        let ahead = export.calls().len() as u64 - cookie;
        assert!(ahead <= 3, "{ahead} replies were made for a client that has read {cookie}");
    }
}

#[tokio::test]
async fn requests_in_flight_are_bounded_in_number_and_bytes() {
    for (length, most) in [(512, MAX_REQUESTS_IN_FLIGHT), (1 << 20, MAX_BYTES_IN_FLIGHT >> 20)] {
        let gate = CancellationToken::new();
        let wait = gate.clone();
        let export = probe(move |_| Verdict::After(wait.clone()));
        let mut raw = Raw::enter(export.clone(), Framing::Simple).await;
        let requests = most as u64 + 50;
        for cookie in 0..requests {
            raw.send(Command::READ, cookie, 0, length).await;
        }
        until("as many requests as may be in flight", || export.calls().len() >= most).await;
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(export.calls().len(), most);
        gate.cancel();
        let mut cookies: Vec<u64> = Vec::new();
        for _ in 0..requests {
            let (cookie, error) = raw.simple().await;
            assert_eq!(error, 0);
            raw.bytes(length as usize).await;
            cookies.push(cookie);
        }
        cookies.sort();
        assert!(cookies.into_iter().eq(0..requests), "each is answered once");
    }
}

#[tokio::test]
async fn a_client_that_leaves_in_order_gets_what_it_asked_for() {
    let gate = CancellationToken::new();
    let wait = gate.clone();
    let export = probe(move |_| Verdict::After(wait.clone()));
    let clients = export.clients.clone();
    let mut raw = Raw::enter(export, Framing::Simple).await;
    assert_eq!(Arc::strong_count(&clients), 3, "the probe, this test, and the client that entered");
    raw.write(1, 0, b"last words").await;
    raw.send(Command::DISC, 2, 0, 0).await;
    gate.cancel();
    assert_eq!(raw.simple().await, (1, 0));
    assert_eq!(within(raw.stream.read(&mut [0; 1])).await.unwrap(), 0, "DISC has no reply");
    assert_eq!(within(raw.ended).await.unwrap().unwrap(), Ended::Disconnected);
    assert_eq!(Arc::strong_count(&clients), 1, "the export was told that the client left, and is gone");
}

#[tokio::test]
async fn a_shutdown_finishes_what_is_in_flight_and_refuses_the_rest() {
    for draining in [Draining::Refuse, Draining::HangUp] {
        let gate = CancellationToken::new();
        let wait = gate.clone();
        let export = probe(move |_| Verdict::After(wait.clone()));
        let options = ServeOptions { draining, ..ServeOptions::default() };
        let mut raw = Raw::enter_with(export.clone(), Framing::Simple, options, 1 << 20).await;
        raw.write(1, 0, b"in flight").await;
        until("the write in flight", || export.calls().len() == 1).await;
        raw.shutdown.cancel();
        // The connection's task must have seen it; with one thread, it has after its turn.
        tokio::task::yield_now().await;
        raw.write(2, 0, b"late").await;
        if draining == Draining::Refuse {
            assert_eq!(raw.simple().await, (2, Errno::ESHUTDOWN.0));
        }
        gate.cancel();
        assert_eq!(raw.simple().await, (1, 0));
        assert_eq!(within(raw.stream.read(&mut [0; 1])).await.unwrap(), 0, "and then the connection ends");
        assert_eq!(within(raw.ended).await.unwrap().unwrap(), Ended::ShutDown);
        assert_eq!(export.calls().len(), 1, "the late write did not reach the export");
    }
}

#[tokio::test]
async fn times_are_limited() {
    let short = Duration::from_millis(50);
    let options = ServeOptions { handshake_time: short, ..ServeOptions::default() };
    let common::Served { stream, ended, .. } = common::serve(plain(), options, 4096);
    let ended = within(ended).await.unwrap();
    assert!(matches!(ended, Err(ServerError::HandshakeTime(time)) if time == short), "a silent client");
    drop(stream);
    let never = CancellationToken::new();
    let export = probe(move |_| Verdict::After(never.clone()));
    let options = ServeOptions { drain_time: short, ..ServeOptions::default() };
    let mut raw = Raw::enter_with(export, Framing::Simple, options, 4096).await;
    raw.send(Command::READ, 1, 0, 512).await;
    raw.shutdown.cancel();
    assert_eq!(within(raw.ended).await.unwrap().unwrap(), Ended::ShutDown, "a request that never ends is given up");
}

#[tokio::test]
async fn a_stream_out_of_step_is_hung_up_on() {
    let mut raw = Raw::enter(plain(), Framing::Simple).await;
    raw.stream.write_all(&[0; 64]).await.unwrap();
    assert!(matches!(within(raw.ended).await.unwrap(), Err(ServerError::Protocol(_))));
    // A client that just closes is no error.
    let raw = Raw::enter(plain(), Framing::Simple).await;
    drop(raw.stream);
    assert_eq!(within(raw.ended).await.unwrap().unwrap(), Ended::Closed);
}

#[tokio::test]
async fn small_replies_of_one_receive_are_sent_at_once() {
    let mut raw = Raw::enter(plain(), Framing::Simple).await;
    let mut requests = Vec::new();
    for cookie in 0..32 {
        let (flags, offset, length) = (CommandFlags::NONE, 0, 4096);
        let request = nbd::wire::Request { flags, command: Command::READ, cookie, offset, length };
        requests.extend(request.encode());
    }
    raw.stream.write_all(&requests).await.unwrap();
    let mut buffer = vec![0; 1 << 20];
    let received = within(raw.stream.read(&mut buffer)).await.unwrap();
    assert_eq!(received, 32 * (SimpleReply::LENGTH + 4096));
}

/// A disk of random bytes with a hole of 8 KiB at 4096.
fn holey() -> Arc<Probe> {
    let export = plain();
    let mut content = vec![7; SIZE];
    content[4096..12288].fill(0);
    let Answer::Now(written) = export.disk.write(0, content.into(), false) else { panic!("not at once") };
    written.unwrap();
    export
}

#[tokio::test]
async fn known_holes_are_not_sent() {
    for framing in [Framing::Structured, Framing::Extended] {
        let mut raw = Raw::enter(holey(), framing).await;
        let expected = [
            (ChunkType::OFFSET_DATA, ChunkFlags::NONE, 100, 8 + 3996),
            (ChunkType::OFFSET_HOLE, ChunkFlags::NONE, 4096, 12),
            (ChunkType::OFFSET_DATA, ChunkFlags::DONE, 12288, 8 + 512),
        ];
        // From a place that is no block, the hole is known only in the blocks counted from there.
        raw.send(Command::READ, 1, 0, 12800).await;
        raw.send(Command::READ, 2, 4096, 4096).await;
        let mut chunks = Vec::new();
        for _ in 0..4 {
            let (kind, flags, payload) = match framing {
                Framing::Extended => {
                    let (chunk, payload) = raw.extended_chunk().await;
                    (chunk.kind, chunk.flags, payload)
                }
                _ => {
                    let (chunk, payload) = raw.chunk().await;
                    (chunk.kind, chunk.flags, payload)
                }
            };
            let offset = u64::from_be_bytes(payload[..8].try_into().unwrap());
            if kind == ChunkType::OFFSET_DATA {
                assert!(payload[8..].iter().all(|byte| *byte == 7));
            }
            chunks.push((kind, flags, offset, payload.len()));
        }
        assert_eq!(chunks[0], (ChunkType::OFFSET_DATA, ChunkFlags::NONE, 0, 8 + 4096));
        assert_eq!(chunks[1..3], expected[1..3]);
        assert_eq!(chunks[3], (ChunkType::OFFSET_HOLE, ChunkFlags::DONE, 4096, 12));
        // With DF in one piece, zeroes included.
        raw.send_with(CommandFlags::DF, Command::READ, 3, 0, 12800).await;
        let payload = match framing {
            Framing::Extended => raw.extended_chunk().await.1,
            _ => raw.chunk().await.1,
        };
        assert_eq!(payload.len(), 8 + 12800);
        assert!(payload[8 + 4096..8 + 12288].iter().all(|byte| *byte == 0));
        raw.assert_in_step().await;
    }
    let mut raw = Raw::enter(holey(), Framing::Simple).await;
    raw.send(Command::READ, 1, 4000, 8400).await;
    assert_eq!(raw.simple().await, (1, 0));
    assert_eq!(raw.bytes(8400).await, [vec![7; 96], vec![0; 8192], vec![7; 112]].concat());
}

#[tokio::test]
async fn fast_zeroes_are_offered_only_by_exports_that_know_them() {
    let slow = probe(|call| if call.0 == Command::WRITE_ZEROES { Verdict::Fail(Errno::ENOTSUP) } else { Verdict::Go });
    let mut raw = Raw::enter(slow, Framing::Extended).await;
    assert!(raw.negotiated.flags.contains(TransmissionFlags::SEND_FAST_ZERO));
    raw.send_with(CommandFlags::FAST_ZERO, Command::WRITE_ZEROES, 1, 0, 512).await;
    assert_eq!(raw.finished().await, (1, Errno::ENOTSUP.0));
    let mut export = Probe::new(SIZE, |_| Verdict::Go);
    (export.info.fast_zero, export.info.rotational) = (false, true);
    let mut raw = Raw::enter(Arc::new(export), Framing::Extended).await;
    assert!(!raw.negotiated.flags.contains(TransmissionFlags::SEND_FAST_ZERO));
    assert!(raw.negotiated.flags.contains(TransmissionFlags::ROTATIONAL));
    raw.send_with(CommandFlags::FAST_ZERO, Command::WRITE_ZEROES, 1, 0, 512).await;
    assert_eq!(raw.finished().await, (1, Errno::EINVAL.0));
}

#[tokio::test]
async fn a_block_status_is_answered_for_the_contexts_that_are_wanted() {
    let mut export = Probe::new(SIZE, |_| Verdict::Go);
    export.info.size = 100 << 32;
    *export.extents.lock().unwrap() = Some(vec![Extent { length: 50 << 32, flags: 3 }]);
    let export = Arc::new(export);
    let mut raw = Raw::enter(export.clone(), Framing::Extended).await;
    assert!(raw.negotiated.flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD));
    let id = raw.negotiated.contexts[0].id;
    for (contexts, right) in [(vec![id], true), (vec![id, id], false), (vec![id + 1], false), (vec![], false)] {
        let payload = StatusQuery { length: 5 << 32, contexts: contexts.clone() }.encode();
        let (flags, length) = (CommandFlags::PAYLOAD_LEN, payload.len() as u64);
        raw.send_with(flags, Command::BLOCK_STATUS, 1, 1 << 32, length).await;
        raw.stream.write_all(&payload).await.unwrap();
        let (chunk, payload) = raw.extended_chunk().await;
        assert_eq!(chunk.kind == ChunkType::BLOCK_STATUS_EXT, right, "{contexts:?}");
        if right {
            let extent = [&id.to_be_bytes()[..], &[0, 0, 0, 1], &(5u64 << 32).to_be_bytes(), &3u64.to_be_bytes()];
            assert_eq!((chunk.offset, payload), (1 << 32, extent.concat()));
        } else {
            assert_eq!(payload, [0, 0, 0, 22, 0, 0]);
        }
    }
    // A payload that is cut within a number, and one that is too long.
    for length in [9, 100_000] {
        raw.send_with(CommandFlags::PAYLOAD_LEN, Command::BLOCK_STATUS, 1, 0, length).await;
        raw.stream.write_all(&vec![0; length as usize]).await.unwrap();
        assert_eq!(raw.error(Command::BLOCK_STATUS).await, Errno::EINVAL.0);
    }
    raw.assert_in_step().await;
}

#[tokio::test]
async fn ranges_beyond_32_bits_are_one_call() {
    let mut export = Probe::new(SIZE, |_| Verdict::Go);
    export.info.size = 100 << 32;
    let export = Arc::new(export);
    let mut raw = Raw::enter(export.clone(), Framing::Extended).await;
    for command in [Command::TRIM, Command::CACHE] {
        raw.send(command, 1, 1 << 32, 50 << 32).await;
        assert_eq!(raw.finished().await, (1, 0));
        assert_eq!(export.calls().last(), Some(&(command, 1 << 32, 50 << 32, false)));
    }
}

#[tokio::test]
async fn connections_share_a_budget_and_each_goes_on() {
    let gate = CancellationToken::new();
    let wait = gate.clone();
    let export = probe(move |_| Verdict::After(wait.clone()));
    let options = ServeOptions { budget: Arc::new(Budget::new(10, 1 << 30)), ..ServeOptions::default() };
    let budget = options.budget.clone();
    let enter = || Raw::enter_with(export.clone(), Framing::Extended, options.clone(), 1 << 20);
    let (mut one, mut two) = (enter().await, enter().await);
    for cookie in 0..20 {
        one.send(Command::READ, cookie, 0, 512).await;
    }
    until("the budget to be used", || budget.in_flight().0 == 10).await;
    for cookie in 0..20 {
        two.send(Command::READ, cookie, 0, 512).await;
    }
    until("one request of the second", || budget.in_flight().0 == 11).await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(export.calls().len(), 11, "no more than one beyond the budget");
    gate.cancel();
    for raw in [&mut one, &mut two] {
        for _ in 0..20 {
            assert_eq!(raw.extended_chunk().await.1.len(), 8 + 512);
        }
    }
    until("everything to be given back", || budget.in_flight() == (0, 0)).await;
}
