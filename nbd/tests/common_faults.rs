//! What many NBD implementations get wrong, one test each by its number in the list, on the bytes of our server.

mod common;

use std::sync::Arc;

use common::{Probe, Raw, Verdict, within};
use nbd::client::{Client, ConnectOptions};
use nbd::export::Extent;
use nbd::limits::MAX_PAYLOAD;
use nbd::server::ServeOptions;
use nbd::wire::{ChunkFlags, ChunkType, Command, CommandFlags, Errno, Framing, TransmissionFlags};
use tokio::io::AsyncWriteExt;
use tokio_util::sync::CancellationToken;

const SIZE: usize = 1 << 20;
const FRAMINGS: [Framing; 3] = [Framing::Simple, Framing::Structured, Framing::Extended];
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
async fn fault_01_flush_is_offered_and_its_errors_are_told() {
    for (multi_conn, framing) in [(false, Framing::Simple), (true, Framing::Structured), (true, Framing::Extended)] {
        let mut export = Probe::new(SIZE, |call| match call.0 {
            Command::FLUSH => Verdict::Fail(Errno::EIO),
            _ => Verdict::Go,
        });
        export.info.multi_conn = multi_conn;
        let mut raw = Raw::enter(Arc::new(export), framing).await;
        let flags = raw.negotiated.flags;
        assert!(flags.contains(TransmissionFlags::SEND_FLUSH | TransmissionFlags::SEND_FUA));
        assert_eq!(flags.contains(TransmissionFlags::CAN_MULTI_CONN), multi_conn, "only what the export can keep");
        raw.send(Command::FLUSH, 1, 0, 0).await;
        assert_eq!(raw.finished().await, (1, EIO));
    }
}

#[tokio::test]
async fn fault_02_a_flush_covers_writes_answered_on_other_connections() {
    let export = plain();
    let (mut one, mut two) =
        (Raw::enter(export.clone(), Framing::Simple).await, Raw::enter(export.clone(), Framing::Structured).await);
    one.write(1, 512, b"one").await;
    assert_eq!(one.simple().await, (1, 0));
    two.send(Command::FLUSH, 2, 0, 0).await;
    assert_eq!(two.simple().await, (2, 0));
    assert_eq!(export.calls(), [(Command::WRITE, 512, 3, false), (Command::FLUSH, 0, 0, false)]);
}

#[tokio::test]
async fn fault_03_a_flush_is_answered_only_when_it_is_done() {
    for framing in FRAMINGS {
        let gate = CancellationToken::new();
        let wait = gate.clone();
        let export = probe(move |call| match call.0 {
            Command::FLUSH => Verdict::After(wait.clone()),
            _ => Verdict::Go,
        });
        let mut raw = Raw::enter(export, framing).await;
        raw.send(Command::FLUSH, 1, 0, 0).await;
        raw.write(2, 0, b"x").await;
        assert_eq!(raw.finished().await, (2, 0), "the write overtakes the flush");
        gate.cancel();
        assert_eq!(raw.finished().await, (1, 0));
    }
}

#[tokio::test]
async fn fault_04_reads_are_answered_in_the_form_that_was_negotiated() {
    for export in [fails(Command::READ, Errno::EIO), plain()] {
        let mut extended = Raw::enter(export.clone(), Framing::Extended).await;
        for (cookie, offset, length) in [(1, 0, 512), (2, SIZE as u64, 512), (3, 0, 0)] {
            extended.send(Command::READ, cookie, offset, length).await;
            let (chunk, payload) = extended.extended_chunk().await;
            assert_eq!((chunk.cookie, chunk.offset, chunk.flags), (cookie, offset, ChunkFlags::DONE));
            let wrong = chunk.kind == ChunkType::NONE && length > 0;
            assert!(!wrong && payload.len() <= 8 + 512, "{chunk:?}");
        }
        // Not even a flush gets a simple reply.
        extended.assert_in_step().await;
        let mut structured = Raw::enter(export.clone(), Framing::Structured).await;
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
        let mut simple = Raw::enter(export, Framing::Simple).await;
        simple.send(Command::READ, 1, SIZE as u64, 512).await;
        assert_eq!(simple.simple().await, (1, EINVAL));
    }
}

#[tokio::test]
async fn fault_05_nothing_is_sent_before_a_read_has_succeeded() {
    let gate = CancellationToken::new();
    let wait = gate.clone();
    let export = probe(move |call| match (call.0, call.1) {
        (Command::READ, 0) => Verdict::FailAfter(wait.clone(), Errno::ENOMEM),
        (Command::READ, _) => Verdict::Fail(Errno::EIO),
        _ => Verdict::Go,
    });
    let mut raw = Raw::enter(export, Framing::Simple).await;
    raw.send(Command::READ, 1, 0, 4096).await;
    raw.send(Command::READ, 2, 4096, 4096).await;
    // The first bytes on the wire belong to the second request.
    assert_eq!(raw.simple().await, (2, EIO));
    gate.cancel();
    assert_eq!(raw.simple().await, (1, Errno::ENOMEM.0));
    raw.assert_in_step().await;
}

#[tokio::test]
async fn fault_06_only_a_payload_that_exists_is_drained() {
    for framing in FRAMINGS {
        let mut raw = Raw::enter(fails(Command::WRITE, Errno::ENOSPC), framing).await;
        raw.send(Command::TRIM, 1, 0, SIZE as u64).await;
        assert_eq!(raw.finished().await, (1, 0));
        raw.write(2, 0, &[1; 5000]).await;
        assert_eq!(raw.finished().await, (2, ENOSPC));
        raw.write(3, SIZE as u64 - 1, &[1; 5000]).await;
        assert_eq!(raw.finished().await, (3, ENOSPC));
        if framing == Framing::Extended {
            // Here only the flag says that there is a payload, and any command may have it.
            for (cookie, command) in [(5, Command::TRIM), (6, Command::READ), (7, Command(99))] {
                raw.send_with(CommandFlags::PAYLOAD_LEN, command, cookie, 0, 5000).await;
                raw.stream.write_all(&[1; 5000]).await.unwrap();
                assert_eq!(raw.finished().await, (cookie, EINVAL), "{command}");
            }
            raw.assert_in_step().await;
            continue;
        }
        // A payload beyond the limit is skipped.
        raw.send(Command::WRITE, 4, 0, u64::from(MAX_PAYLOAD) + 1).await;
        let piece = vec![7; 1 << 20];
        for _ in 0..MAX_PAYLOAD as usize / piece.len() {
            raw.stream.write_all(&piece).await.unwrap();
        }
        raw.stream.write_all(&[7]).await.unwrap();
        assert_eq!(raw.finished().await, (4, EINVAL));
        raw.assert_in_step().await;
    }
}

#[tokio::test]
async fn fault_06_the_payload_of_a_write_to_a_read_only_export_is_drained() {
    let mut export = Probe::new(SIZE, |_| Verdict::Go);
    export.info.read_only = true;
    let export = Arc::new(export);
    let mut raw = Raw::enter(export.clone(), Framing::Simple).await;
    assert!(raw.negotiated.flags.contains(TransmissionFlags::READ_ONLY));
    raw.write(1, 0, &[1; 5000]).await;
    assert_eq!(raw.simple().await, (1, 1));
    raw.assert_in_step().await;
    assert_eq!(export.calls().len(), 1, "only the flush reaches the export");
}

#[tokio::test]
async fn fault_07_no_request_that_fails_ends_the_connection() {
    for framing in FRAMINGS {
        let mut raw = Raw::enter(fails(Command::CACHE, Errno::EIO), framing).await;
        for (command, offset, length, error) in [
            (Command::CACHE, 0, 4096, EIO),
            (Command::TRIM, SIZE as u64, 0, 0),
            (Command::READ, u64::MAX - 5, 512, EINVAL),
            (Command::WRITE_ZEROES, u64::MAX - 5, u32::MAX.into(), ENOSPC),
            (Command::BLOCK_STATUS, 0, 0, EINVAL),
            (Command(99), 0, 512, EINVAL),
        ] {
            raw.send(command, 9, offset, length).await;
            assert_eq!(raw.error(command).await, error, "{command}");
        }
        raw.assert_in_step().await;
    }
}

#[tokio::test]
async fn fault_08_a_trimmed_range_is_not_taken_for_zeroes() {
    let export = plain();
    let mut raw = Raw::enter(export.clone(), Framing::Simple).await;
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
async fn fault_09_no_raw_errno_is_sent() {
    for framing in FRAMINGS {
        // 122 is EDQUOT on Linux, and nothing in the document.
        let mut raw = Raw::enter(fails(Command::WRITE, Errno(122)), framing).await;
        raw.write(1, 0, b"x").await;
        assert_eq!(raw.finished().await, (1, EIO));
    }
}

#[tokio::test]
async fn fault_10_extents_are_told_right_whatever_the_export_says() {
    let export = plain();
    let planted = [(0, 3), (4096, 1), (0, 2), (1 << 40, 0)].map(|(length, flags)| Extent { length, flags });
    *export.extents.lock().unwrap() = Some(planted.to_vec());
    let mut raw = Raw::enter(export.clone(), Framing::Structured).await;
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
async fn fault_11_a_client_that_writes_without_reading_is_served() {
    for framing in FRAMINGS {
        // 64 MiB of writes and their replies, while the stream holds 4 KiB each way.
        let mut raw = Raw::enter_with(plain(), framing, ServeOptions::default(), 4096).await;
        let data = vec![9; 65536];
        for cookie in 0..1000 {
            within(raw.write(cookie, 0, &data)).await;
        }
        for cookie in 0..1000 {
            assert_eq!(raw.finished().await, (cookie, 0));
        }
    }
}

#[tokio::test]
async fn fault_10_a_client_takes_no_more_than_what_was_told() {
    for framing in [Framing::Structured, Framing::Extended] {
        let export = plain();
        *export.extents.lock().unwrap() = Some(vec![Extent { length: 4096, flags: 3 }]);
        let served = common::serve(export, ServeOptions::default(), 65536);
        let options =
            ConnectOptions { framing, contexts: vec!["base:allocation".to_owned()], ..ConnectOptions::default() };
        let client = Client::handshake(served.stream, "disk", &options).await.unwrap();
        let extents = within(client.block_status("base:allocation", 0, SIZE as u64)).await.unwrap();
        assert_eq!(extents, [Extent { length: 4096, flags: 3 }], "the rest is not known");
    }
}
