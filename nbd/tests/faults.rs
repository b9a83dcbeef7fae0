//! What many NBD implementations get wrong, one test each, on the bytes of our server.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Probe, Raw, Verdict, until, within};
use nbd::export::Extent;
use nbd::limits::{MAX_BYTES_IN_FLIGHT, MAX_PAYLOAD, MAX_REQUESTS_IN_FLIGHT};
use nbd::server::{Draining, Ended, ServeOptions, ServerError};
use nbd::wire::{ChunkFlags, ChunkType, Command, CommandFlags, Errno, SimpleReply, TransmissionFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

const SIZE: usize = 1 << 20;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

fn probe(judge: impl Fn(&common::Call) -> Verdict + Send + Sync + 'static) -> Arc<Probe> {
    Arc::new(Probe::new(SIZE, judge))
}

fn fails(command: Command, error: Errno) -> Arc<Probe> {
    probe(move |call| if call.0 == command { Verdict::Fail(error) } else { Verdict::Go })
}

fn plain() -> Arc<Probe> {
    probe(|_| Verdict::Go)
}

#[tokio::test]
async fn flush_is_offered_and_its_errors_are_told() {
    for multi_conn in [false, true] {
        let mut export = Probe::new(SIZE, |call| match call.0 {
            Command::FLUSH => Verdict::Fail(Errno::EIO),
            _ => Verdict::Go,
        });
        export.info.multi_conn = multi_conn;
        let mut raw = Raw::enter(Arc::new(export), false).await;
        let flags = raw.negotiated.flags;
        assert!(flags.contains(TransmissionFlags::SEND_FLUSH | TransmissionFlags::SEND_FUA));
        assert_eq!(flags.contains(TransmissionFlags::CAN_MULTI_CONN), multi_conn, "only what the export can keep");
        raw.send(Command::FLUSH, 1, 0, 0).await;
        assert_eq!(raw.simple().await, (1, EIO));
    }
}

#[tokio::test]
async fn a_flush_covers_writes_answered_on_other_connections() {
    let export = plain();
    let (mut one, mut two) = (Raw::enter(export.clone(), false).await, Raw::enter(export.clone(), true).await);
    one.write(1, 512, b"one").await;
    assert_eq!(one.simple().await, (1, 0));
    two.send(Command::FLUSH, 2, 0, 0).await;
    assert_eq!(two.simple().await, (2, 0));
    assert_eq!(export.calls(), [(Command::WRITE, 512, 3, false), (Command::FLUSH, 0, 0, false)]);
}

#[tokio::test]
async fn a_flush_is_answered_only_when_it_is_done() {
    let gate = CancellationToken::new();
    let wait = gate.clone();
    let export = probe(move |call| match call.0 {
        Command::FLUSH => Verdict::After(wait.clone()),
        _ => Verdict::Go,
    });
    let mut raw = Raw::enter(export, false).await;
    raw.send(Command::FLUSH, 1, 0, 0).await;
    raw.write(2, 0, b"x").await;
    assert_eq!(raw.simple().await, (2, 0), "the write overtakes the flush");
    gate.cancel();
    assert_eq!(raw.simple().await, (1, 0));
}

#[tokio::test]
async fn fua_reaches_the_export() {
    let export = plain();
    let mut raw = Raw::enter(export.clone(), false).await;
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
async fn reads_are_answered_in_the_form_that_was_negotiated() {
    for export in [fails(Command::READ, Errno::EIO), plain()] {
        let mut structured = Raw::enter(export.clone(), true).await;
        // The second is refused by the check, not by the export.
        for (cookie, offset, length) in [(1, 0, 512), (2, SIZE as u64, 512), (3, 0, 0)] {
            structured.send(Command::READ, cookie, offset, length).await;
            let (chunk, payload) = structured.chunk().await;
            assert_eq!((chunk.cookie, chunk.flags), (cookie, ChunkFlags::DONE));
            match chunk.kind {
                ChunkType::OFFSET_DATA => assert_eq!(payload.len(), 8 + 512),
                ChunkType::ERROR => assert_eq!(payload.len(), 6),
                ChunkType::NONE => assert_eq!(length, 0),
                other => panic!("{other}"),
            }
        }
        let mut simple = Raw::enter(export, false).await;
        simple.send(Command::READ, 1, SIZE as u64, 512).await;
        assert_eq!(simple.simple().await, (1, EINVAL));
    }
}

#[tokio::test]
async fn nothing_is_sent_before_a_read_has_succeeded() {
    let gate = CancellationToken::new();
    let wait = gate.clone();
    let export = probe(move |call| match (call.0, call.1) {
        (Command::READ, 0) => Verdict::FailAfter(wait.clone(), Errno::ENOMEM),
        (Command::READ, _) => Verdict::Fail(Errno::EIO),
        _ => Verdict::Go,
    });
    let mut raw = Raw::enter(export, false).await;
    raw.send(Command::READ, 1, 0, 4096).await;
    raw.send(Command::READ, 2, 4096, 4096).await;
    // The first bytes on the wire belong to the second request.
    assert_eq!(raw.simple().await, (2, EIO));
    gate.cancel();
    assert_eq!(raw.simple().await, (1, Errno::ENOMEM.0));
    raw.assert_in_step().await;
}

#[tokio::test]
async fn only_a_payload_that_exists_is_drained() {
    let mut raw = Raw::enter(fails(Command::WRITE, Errno::ENOSPC), false).await;
    raw.send(Command::TRIM, 1, 0, SIZE as u32).await;
    assert_eq!(raw.simple().await, (1, 0));
    raw.write(2, 0, &[1; 5000]).await;
    assert_eq!(raw.simple().await, (2, ENOSPC));
    raw.write(3, SIZE as u64 - 1, &[1; 5000]).await;
    assert_eq!(raw.simple().await, (3, ENOSPC));
    // A payload beyond the limit is skipped.
    raw.send(Command::WRITE, 4, 0, MAX_PAYLOAD + 1).await;
    let piece = vec![7; 1 << 20];
    for _ in 0..MAX_PAYLOAD as usize / piece.len() {
        raw.stream.write_all(&piece).await.unwrap();
    }
    raw.stream.write_all(&[7]).await.unwrap();
    assert_eq!(raw.simple().await, (4, EINVAL));
    raw.assert_in_step().await;
}

#[tokio::test]
async fn the_payload_of_a_write_to_a_read_only_export_is_drained() {
    let mut export = Probe::new(SIZE, |_| Verdict::Go);
    export.info.read_only = true;
    let export = Arc::new(export);
    let mut raw = Raw::enter(export.clone(), false).await;
    assert!(raw.negotiated.flags.contains(TransmissionFlags::READ_ONLY));
    raw.write(1, 0, &[1; 5000]).await;
    assert_eq!(raw.simple().await, (1, 1));
    raw.assert_in_step().await;
    assert_eq!(export.calls().len(), 1, "only the flush reaches the export");
}

#[tokio::test]
async fn no_request_that_fails_ends_the_connection() {
    let mut raw = Raw::enter(fails(Command::CACHE, Errno::EIO), false).await;
    for (command, offset, length, error) in [
        (Command::CACHE, 0, 4096, EIO),
        (Command::WRITE, 0, 0, 0),
        (Command::TRIM, SIZE as u64, 0, 0),
        (Command::READ, u64::MAX - 5, 512, EINVAL),
        (Command::WRITE_ZEROES, u64::MAX - 5, u32::MAX, ENOSPC),
        (Command::BLOCK_STATUS, 0, 512, EINVAL),
        (Command(99), 0, 512, EINVAL),
    ] {
        raw.send(command, 9, offset, length).await;
        assert_eq!(raw.simple().await, (9, error), "{command}");
    }
    raw.assert_in_step().await;
}

#[tokio::test]
async fn a_trimmed_range_is_not_taken_for_zeroes() {
    let export = plain();
    let mut raw = Raw::enter(export.clone(), false).await;
    raw.write(1, 0, &[7; 512]).await;
    assert_eq!(raw.simple().await, (1, 0));
    raw.send(Command::TRIM, 2, 0, 512).await;
    assert_eq!(raw.simple().await, (2, 0));
    raw.send(Command::READ, 3, 0, 512).await;
    assert_eq!(raw.simple().await, (3, 0));
    assert_eq!(raw.bytes(512).await, [7; 512], "this export keeps what is trimmed, and the server shows it");
    assert_eq!(export.calls()[1].0, Command::TRIM);
}

#[tokio::test]
async fn long_trims_and_zeroes_are_one_call() {
    let export = Arc::new(Probe::new(64 << 20, |_| Verdict::Go));
    let mut raw = Raw::enter(export.clone(), false).await;
    for command in [Command::TRIM, Command::WRITE_ZEROES] {
        raw.send(command, 1, 0, 64 << 20).await;
        assert_eq!(raw.simple().await, (1, 0));
    }
    assert_eq!(export.calls().len(), 2);
    assert_eq!(export.calls()[1], (Command::WRITE_ZEROES, 0, 64 << 20, false));
}

#[tokio::test]
async fn no_raw_errno_is_sent() {
    // 122 is EDQUOT on Linux, and nothing in the document.
    let mut raw = Raw::enter(fails(Command::WRITE, Errno(122)), false).await;
    raw.write(1, 0, b"x").await;
    assert_eq!(raw.simple().await, (1, EIO));
}

#[tokio::test]
async fn extents_are_told_right_whatever_the_export_says() {
    let export = plain();
    let planted = [(0, 3), (4096, 1), (0, 2), (1 << 40, 0)].map(|(length, flags)| Extent { length, flags });
    *export.extents.lock().unwrap() = Some(planted.to_vec());
    let mut raw = Raw::enter(export.clone(), true).await;
    raw.send(Command::BLOCK_STATUS, 1, 0, 10_000).await;
    let (chunk, payload) = raw.chunk().await;
    assert_eq!((chunk.kind, chunk.flags), (ChunkType::BLOCK_STATUS, ChunkFlags::DONE));
    let words: Vec<u32> = payload[4..].chunks(4).map(|word| u32::from_be_bytes(word.try_into().unwrap())).collect();
    assert_eq!(words, [4096, 1, 10_000 - 4096, 0]);
    raw.send_with(CommandFlags::REQ_ONE, Command::BLOCK_STATUS, 2, 0, 10_000).await;
    assert_eq!(raw.chunk().await.1.len(), 12, "one extent");
    *export.extents.lock().unwrap() = Some(Vec::new());
    raw.send(Command::BLOCK_STATUS, 3, 0, 10_000).await;
    assert_eq!(raw.chunk().await.0.kind, ChunkType::ERROR);
    raw.assert_in_step().await;
}

#[tokio::test]
async fn a_client_that_writes_without_reading_is_served() {
    // 64 MiB of writes and their replies, while the stream holds 4 KiB each way.
    let mut raw = Raw::enter_with(plain(), false, ServeOptions::default(), 4096).await;
    let data = vec![9; 65536];
    for cookie in 0..1000 {
        within(raw.write(cookie, 0, &data)).await;
    }
    for cookie in 0..1000 {
        assert_eq!(raw.simple().await, (cookie, 0));
    }
}

#[tokio::test]
async fn replies_that_are_not_read_are_bounded() {
    let length = 8 << 20;
    let export = Arc::new(Probe::new(length, |_| Verdict::Go));
    let mut raw = Raw::enter_with(export.clone(), false, ServeOptions::default(), 1 << 20).await;
    let requests = 200;
    for cookie in 0..requests {
        raw.send(Command::READ, cookie, 0, length as u32).await;
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
        let mut raw = Raw::enter(export.clone(), false).await;
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
    let mut raw = Raw::enter(export, false).await;
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
        let mut raw = Raw::enter_with(export.clone(), false, options, 1 << 20).await;
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
    let mut raw = Raw::enter_with(export, false, options, 4096).await;
    raw.send(Command::READ, 1, 0, 512).await;
    raw.shutdown.cancel();
    assert_eq!(within(raw.ended).await.unwrap().unwrap(), Ended::ShutDown, "a request that never ends is given up");
}

#[tokio::test]
async fn a_stream_out_of_step_is_hung_up_on() {
    let mut raw = Raw::enter(plain(), false).await;
    raw.stream.write_all(&[0; 64]).await.unwrap();
    assert!(matches!(within(raw.ended).await.unwrap(), Err(ServerError::Protocol(_))));
    // A client that just closes is no error.
    let raw = Raw::enter(plain(), false).await;
    drop(raw.stream);
    assert_eq!(within(raw.ended).await.unwrap().unwrap(), Ended::Closed);
}

#[tokio::test]
async fn small_replies_of_one_receive_are_sent_at_once() {
    let mut raw = Raw::enter(plain(), false).await;
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
