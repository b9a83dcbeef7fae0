//! Peers that do what they must not, one test each: what our server and our client make of it.

mod common;

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use common::acting::act;
use common::{Probe, Raw, Served, Verdict, serve, within};
use nbd::client::{Client, ClientError, ConnectOptions};
use nbd::limits::{MAX_OPTION_DATA, MAX_PAYLOAD, OUTPUT_HIGH_WATER};
use nbd::server::{Ended, ServeOptions, ServerError};
use nbd::wire::{
    ChunkFlags, ChunkType, Command, CommandFlags, Errno, ExtendedChunkHeader, Framing, Info, OptionCode, OptionHeader,
    OptionReply, OptionReplyHeader, Request, SimpleReply, TransmissionFlags,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

const SIZE: usize = 1 << 20;
const FRAMINGS: [Framing; 3] = [Framing::Simple, Framing::Structured, Framing::Extended];
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

fn plain() -> Arc<Probe> {
    Arc::new(Probe::new(SIZE, |_| Verdict::Go))
}

/// A client that has greeted and may send options.
async fn greeted() -> Served {
    let mut served = serve(plain(), ServeOptions::default(), 1 << 20);
    served.stream.read_exact(&mut [0; 18]).await.unwrap();
    served.stream.write_all(&[0, 0, 0, 3]).await.unwrap();
    served
}

async fn option(stream: &mut DuplexStream, option: OptionCode, data: &[u8]) -> OptionReply {
    let mut bytes = BytesMut::new();
    OptionHeader::encode(option, data, &mut bytes);
    stream.write_all(&bytes).await.unwrap();
    let mut head = [0; OptionReplyHeader::LENGTH];
    within(stream.read_exact(&mut head)).await.unwrap();
    let header = OptionReplyHeader::decode(&head).unwrap();
    assert_eq!(header.option, option);
    stream.read_exact(&mut vec![0; header.length as usize]).await.unwrap();
    header.reply
}

#[tokio::test]
async fn bad_magic_ends_the_connection() {
    for framing in FRAMINGS {
        let mut raw = Raw::enter(plain(), framing).await;
        raw.stream.write_all(&[0x11; 32]).await.unwrap();
        assert!(matches!(within(raw.ended).await.unwrap(), Err(ServerError::Protocol(_))), "{framing:?}");
    }
    // The right one of the other form is as wrong.
    let mut raw = Raw::enter(plain(), Framing::Extended).await;
    let request = Request { flags: CommandFlags::NONE, command: Command::FLUSH, cookie: 1, offset: 0, length: 0 };
    raw.stream.write_all(&[&request.encode()[..], &[0; 4]].concat()).await.unwrap();
    assert!(matches!(within(raw.ended).await.unwrap(), Err(ServerError::Protocol(_))));
    let mut served = greeted().await;
    served.stream.write_all(&[0x11; 16]).await.unwrap();
    assert!(matches!(within(served.ended).await.unwrap(), Err(ServerError::Handshake(_))));
}

#[tokio::test]
async fn an_unknown_option_is_refused_in_step() {
    let mut served = greeted().await;
    assert_eq!(option(&mut served.stream, OptionCode(4711), &[7; 300]).await, OptionReply::ERR_UNSUP);
    assert_eq!(option(&mut served.stream, OptionCode::ABORT, b"").await, OptionReply::ACK);
    assert_eq!(within(served.ended).await.unwrap().unwrap(), Ended::DuringHandshake);
}

#[tokio::test]
async fn an_oversized_option_is_skipped_and_refused() {
    let mut served = greeted().await;
    let data = vec![7; 3 * MAX_OPTION_DATA as usize];
    assert_eq!(option(&mut served.stream, OptionCode::GO, &data).await, OptionReply::ERR_TOO_BIG);
    assert_eq!(option(&mut served.stream, OptionCode::EXTENDED_HEADERS, b"").await, OptionReply::ACK);
}

#[tokio::test]
async fn a_name_is_a_name_and_leads_nowhere() {
    let mut served = greeted().await;
    let go = |name: &[u8]| [&(name.len() as u32).to_be_bytes(), name, &[0, 0]].concat();
    for name in [&b"a/b"[..], b"..", b"../disk", b"/etc/passwd", b".", &[b'a'; 4096]] {
        assert_eq!(option(&mut served.stream, OptionCode::INFO, &go(name)).await, OptionReply::ERR_UNKNOWN);
    }
    for name in [&b"di\0sk"[..], b"disk\0", &[b'a'; 4097], b"\xff"] {
        assert_eq!(option(&mut served.stream, OptionCode::GO, &go(name)).await, OptionReply::ERR_INVALID);
    }
    assert_eq!(option(&mut served.stream, OptionCode::ABORT, b"").await, OptionReply::ACK);
    // EXPORT_NAME has no way to say so.
    for name in [&b".."[..], b"di\0sk", &[b'a'; 4096], &[b'a'; 4097]] {
        let mut served = greeted().await;
        let mut bytes = BytesMut::new();
        OptionHeader::encode(OptionCode::EXPORT_NAME, name, &mut bytes);
        served.stream.write_all(&bytes).await.unwrap();
        assert!(matches!(within(served.ended).await.unwrap(), Err(ServerError::Handshake(_))));
    }
}

#[tokio::test]
async fn bad_flags_are_refused() {
    for framing in FRAMINGS {
        let mut raw = Raw::enter(plain(), framing).await;
        for (command, flags) in [
            (Command::READ, CommandFlags::NO_HOLE),
            (Command::READ, CommandFlags(1 << 15)),
            (Command::FLUSH, CommandFlags::REQ_ONE),
            (Command::TRIM, CommandFlags::FAST_ZERO),
            (Command::BLOCK_STATUS, CommandFlags::DF),
        ] {
            raw.send_with(flags, command, 1, 0, 512).await;
            assert_eq!(raw.error(command).await, EINVAL, "{command} {flags:?}");
        }
        if framing != Framing::Extended {
            // The payload of a WRITE is there whatever its flags are.
            raw.send_with(CommandFlags::PAYLOAD_LEN, Command::WRITE, 1, 0, 4).await;
            raw.stream.write_all(b"data").await.unwrap();
            assert_eq!(raw.finished().await, (1, EINVAL));
        }
        raw.assert_in_step().await;
    }
}

#[tokio::test]
async fn what_is_unaligned_is_refused() {
    let mut export = Probe::new(SIZE + 100, |_| Verdict::Go);
    export.info.size = SIZE as u64 + 100;
    export.info.minimum_block = 512;
    export.info.preferred_block = 1;
    let export = Arc::new(export);
    for framing in FRAMINGS {
        let mut raw = Raw::enter(export.clone(), framing).await;
        let told = &raw.negotiated;
        assert_eq!((told.size, told.minimum_block, told.preferred_block), (SIZE as u64, 512, 512));
        for (command, offset, length) in
            [(Command::READ, 1, 512), (Command::READ, 512, 1), (Command::TRIM, 0, 513), (Command::CACHE, 100, 412)]
        {
            raw.send(command, 1, offset, length).await;
            assert_eq!(raw.error(command).await, EINVAL, "{command} {offset}+{length}");
        }
        raw.write(2, 511, &[1; 512]).await;
        assert_eq!(raw.finished().await, (2, EINVAL), "its payload is drained");
        raw.assert_in_step().await;
    }
}

#[tokio::test]
async fn overflowing_ranges_are_refused() {
    for framing in FRAMINGS {
        let mut raw = Raw::enter(plain(), framing).await;
        let long = if framing == Framing::Extended { u64::MAX - 511 } else { 0xffff_fe00 };
        for (command, wrong) in [(Command::TRIM, EINVAL), (Command::WRITE_ZEROES, ENOSPC), (Command::CACHE, EINVAL)] {
            for offset in [512, u64::MAX - 511, u64::MAX] {
                raw.send(command, 1, offset, long).await;
                assert_eq!(raw.error(command).await, wrong, "{command} {offset}");
            }
        }
        raw.assert_in_step().await;
    }
}

#[tokio::test]
async fn a_length_of_zero_does_nothing() {
    for framing in FRAMINGS {
        let export = plain();
        let mut raw = Raw::enter(export.clone(), framing).await;
        for command in [Command::TRIM, Command::WRITE_ZEROES, Command::CACHE] {
            raw.send(command, 1, 0, 0).await;
            assert_eq!(raw.finished().await, (1, 0), "{command}");
        }
        raw.write(2, 0, b"").await;
        assert_eq!(raw.finished().await, (2, 0));
        raw.send(Command::BLOCK_STATUS, 3, 0, 0).await;
        assert_eq!(raw.error(Command::BLOCK_STATUS).await, EINVAL, "there is no such answer");
        assert!(export.calls().is_empty());
    }
}

#[tokio::test]
async fn a_write_past_the_end_is_no_space() {
    for framing in FRAMINGS {
        let export = plain();
        let mut raw = Raw::enter(export.clone(), framing).await;
        raw.write(1, SIZE as u64 - 1, b"ab").await;
        assert_eq!(raw.finished().await, (1, ENOSPC));
        raw.write(2, SIZE as u64 - 2, b"ab").await;
        assert_eq!(raw.finished().await, (2, 0));
        assert_eq!(export.calls().len(), 1);
    }
}

#[tokio::test]
async fn a_payload_on_a_command_that_has_none_is_refused_in_step() {
    let export = plain();
    let mut raw = Raw::enter(export.clone(), Framing::Extended).await;
    for command in [Command::READ, Command::FLUSH, Command::TRIM, Command::WRITE_ZEROES, Command::CACHE, Command(99)] {
        raw.send_with(CommandFlags::PAYLOAD_LEN, command, 1, 0, 3000).await;
        raw.stream.write_all(&[0x25; 3000]).await.unwrap();
        assert_eq!(raw.finished().await, (1, EINVAL), "{command}");
    }
    assert!(export.calls().is_empty());
    // A WRITE that does not say that it has one, has one: QEMU's client sends it so.
    raw.send(Command::WRITE, 2, 0, 3000).await;
    raw.stream.write_all(&[0x25; 3000]).await.unwrap();
    assert_eq!(raw.finished().await, (2, 0));
    assert_eq!(export.disk.content()[..3000], [0x25; 3000]);
    raw.assert_in_step().await;
    raw.send_with(CommandFlags::PAYLOAD_LEN, Command::WRITE, 3, 0, u64::from(MAX_PAYLOAD) + 1).await;
    assert!(matches!(within(raw.ended).await.unwrap(), Err(ServerError::Protocol(_))), "too much to drain");
}

/// A server by hand in transmission with extended headers, after one request of 512 bytes at 1024 has come; what the
/// client's read makes of `reply`.
async fn read_answered(reply: impl FnOnce(u64) -> Vec<u8> + Send + 'static) -> Result<Bytes, ClientError> {
    let info = vec![Info::Export { size: SIZE as u64, flags: TransmissionFlags::HAS_FLAGS }];
    let (client, acting) = act(Framing::Extended, info, |mut stream| async move {
        let mut head = [0; Request::EXTENDED_LENGTH];
        stream.read_exact(&mut head).await.unwrap();
        let request = Request::decode_extended(&head).unwrap();
        assert_eq!((request.offset, request.length), (1024, 512));
        stream.write_all(&reply(request.cookie)).await.unwrap();
        // Until the client hangs up.
        let _ = stream.read(&mut [0; 64]).await;
    });
    let client = Client::handshake(client, "", &ConnectOptions::default()).await.unwrap();
    let read = within(client.read(1024, 512)).await;
    drop(client);
    within(acting).await.unwrap();
    read
}

fn chunk(cookie: u64, kind: ChunkType, payload: &[u8]) -> Vec<u8> {
    let (flags, offset, length) = (ChunkFlags::DONE, 1024, payload.len() as u64);
    [&ExtendedChunkHeader { flags, kind, cookie, offset, length }.encode(), payload].concat()
}

fn data_chunk(cookie: u64) -> Vec<u8> {
    chunk(cookie, ChunkType::OFFSET_DATA, &[&1024u64.to_be_bytes()[..], &[7; 512]].concat())
}

#[tokio::test]
async fn a_right_answer_is_taken_from_the_server_by_hand() {
    assert_eq!(read_answered(data_chunk).await.unwrap(), vec![7; 512]);
}

#[tokio::test]
async fn an_unknown_cookie_ends_the_connection() {
    let error = read_answered(|cookie| data_chunk(cookie + 1)).await.unwrap_err().to_string();
    assert!(error.contains("a request that is not in flight"), "{error}");
}

#[tokio::test]
async fn a_reply_of_the_wrong_kind_ends_the_connection() {
    let simple = |cookie| [&SimpleReply { error: 0, cookie }.encode()[..], &[7; 512]].concat();
    assert!(read_answered(simple).await.unwrap_err().is_closed());
    let status = |cookie| chunk(cookie, ChunkType::BLOCK_STATUS, &[0; 12]);
    let error = read_answered(status).await.unwrap_err().to_string();
    assert!(error.contains("extents for a request that is not a BLOCK_STATUS"), "{error}");
}

#[tokio::test]
async fn a_chunk_after_done_ends_the_connection() {
    // The first chunk answers the read; the second has nothing to belong to, so that the connection ends.
    let twice = |cookie| [data_chunk(cookie), data_chunk(cookie)].concat();
    assert_eq!(read_answered(twice).await.unwrap(), vec![7; 512]);
}

#[tokio::test]
async fn an_errors_offset_and_text_are_told() {
    let message = b"bad sector";
    let payload = [&5u32.to_be_bytes()[..], &10u16.to_be_bytes(), message, &1300u64.to_be_bytes()].concat();
    let error = read_answered(move |cookie| chunk(cookie, ChunkType::ERROR_OFFSET, &payload)).await.unwrap_err();
    assert!(matches!(error, ClientError::Refused { error: Errno::EIO, at: Some(1300), .. }), "{error:?}");
    assert_eq!(error.to_string(), "the server refused READ of 512 bytes at 1024: EIO at 1300 (it says: bad sector)");
}

#[tokio::test]
async fn half_a_frame_holds_back_only_its_sender() {
    let export = plain();
    let mut stuck = Raw::enter(export.clone(), Framing::Extended).await;
    stuck.send_with(CommandFlags::PAYLOAD_LEN, Command::WRITE, 1, 0, 4096).await;
    stuck.stream.write_all(&[1; 4095]).await.unwrap();
    let mut other = Raw::enter(export.clone(), Framing::Extended).await;
    other.assert_in_step().await;
    assert_eq!(export.calls().len(), 1, "half a write is none");
    stuck.stream.write_all(&[1]).await.unwrap();
    assert_eq!(stuck.finished().await, (1, 0));
    // Half a frame, and then the end.
    stuck.send_with(CommandFlags::PAYLOAD_LEN, Command::WRITE, 2, 0, 4096).await;
    drop(stuck.stream);
    assert_eq!(within(stuck.ended).await.unwrap().unwrap(), Ended::Closed);
    assert_eq!(export.calls().len(), 2);
}

#[tokio::test]
async fn one_byte_at_a_time_is_as_good_as_all_at_once() {
    for framing in FRAMINGS {
        // The stream holds one byte each way, also through the handshake.
        let mut raw = Raw::enter_with(plain(), framing, ServeOptions::default(), 1).await;
        raw.write(1, 5, b"slow").await;
        assert_eq!(raw.finished().await, (1, 0));
        raw.send(Command::TRIM, 2, 0, 100).await;
        assert_eq!(raw.finished().await, (2, 0));
        raw.assert_in_step().await;
    }
}

#[tokio::test]
async fn a_flood_without_reading_replies_holds_back_only_its_sender() {
    let export = Arc::new(Probe::new(8 << 20, |_| Verdict::Go));
    let mut flood = Raw::enter_with(export.clone(), Framing::Extended, ServeOptions::default(), 65536).await;
    let request =
        |cookie| Request { flags: CommandFlags::DF, command: Command::READ, cookie, offset: 0, length: 1 << 20 };
    // As many requests as the server takes from a client that reads nothing.
    let mut sent = 0;
    while let Ok(written) = tokio::time::timeout(
        std::time::Duration::from_millis(200),
        flood.stream.write_all(&request(sent).encode_extended()),
    )
    .await
    {
        written.unwrap();
        sent += 1;
        assert!(sent < 1 << 20, "the server takes requests without bound");
    }
    let made = export.calls().len() as u64;
    assert!(made <= (OUTPUT_HIGH_WATER >> 20) as u64 + 2, "{made} replies of 1 MiB were made, and none was read");
    let mut other = Raw::enter(export, Framing::Simple).await;
    other.assert_in_step().await;
}
