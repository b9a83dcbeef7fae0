//! The client's driver against our own server, and against servers that a test plays by hand.

mod common;

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use common::{Probe, Served, Verdict, acting, serve, until, within};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use nbd::client::{Client, ClientError, ConnectOptions, Greeted, describe, list, negotiate};
use nbd::export::{Export, STATE_HOLE, STATE_ZERO, ZeroMode};
use nbd::limits::MAX_PAYLOAD;
use nbd::server::{Ended, ServeOptions};
use nbd::uri::NbdUri;
use nbd::wire::{
    ChunkFlags, ChunkHeader, ChunkType, Command, Errno, Framing, Info, Request, SimpleReply, TransmissionFlags,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const SIZE: usize = 1 << 20;
const NO_HOLE: ZeroMode = ZeroMode { no_hole: true, fast: false };

const FRAMINGS: [Framing; 3] = [Framing::Extended, Framing::Structured, Framing::Simple];

fn options(framing: Framing) -> ConnectOptions {
    ConnectOptions { framing, contexts: vec!["base:allocation".to_owned()], ..ConnectOptions::default() }
}

async fn connect(export: Arc<dyn Export>, framing: Framing, buffer: usize) -> (Client, Served) {
    let mut served = serve(export, ServeOptions::default(), buffer);
    let stream = std::mem::replace(&mut served.stream, duplex(1).0);
    let client = within(Client::handshake(stream, "disk", &options(framing))).await.unwrap();
    (client, served)
}

fn plain(size: usize) -> Arc<Probe> {
    Arc::new(Probe::new(size, |_| Verdict::Go))
}

#[tokio::test]
async fn every_command_does_what_it_says() {
    for framing in FRAMINGS {
        let export = plain(SIZE);
        let (client, served) = connect(export.clone(), framing, 65536).await;
        assert_eq!((client.info().size, client.info().framing), (SIZE as u64, framing));
        assert!(client.info().can_multi_conn() && !client.info().read_only());
        client.write(4096, Bytes::from(vec![7; 8192]), true).await.unwrap();
        client.write_zeroes(4096, 4096, NO_HOLE, true).await.unwrap();
        client.trim(0, SIZE as u64, false).await.unwrap();
        client.cache(0, 4096).await.unwrap();
        client.flush().await.unwrap();
        let data = client.read(8000, 1000).await.unwrap();
        assert_eq!(data, [vec![0; 192], vec![7; 808]].concat());
        assert_eq!(client.read(5, 0).await.unwrap(), Bytes::new());
        client.write(5, Bytes::new(), false).await.unwrap();
        let status = client.block_status("base:allocation", 0, SIZE as u64).await;
        if framing.has_chunks() {
            let extents: Vec<_> = status.unwrap().iter().map(|extent| (extent.length, extent.flags)).collect();
            let hole = STATE_HOLE | STATE_ZERO;
            assert_eq!(extents, [(8192, hole), (4096, 0), (SIZE as u64 - 12288, hole)]);
        } else {
            assert!(matches!(status, Err(ClientError::NoContext(_))));
        }
        let fua: Vec<_> = export.calls().iter().take(3).map(|call| call.3).collect();
        assert_eq!(fua, [true, true, false]);
        client.close().await;
        assert_eq!(within(served.ended).await.unwrap().unwrap(), Ended::Disconnected);
        assert!(client.is_closed() && client.read(0, 1).await.unwrap_err().is_closed());
    }
}

#[tokio::test]
async fn what_cannot_be_right_is_not_sent() {
    let export = plain(SIZE);
    let (client, _served) = connect(export.clone(), Framing::Extended, 65536).await;
    let end = SIZE as u64;
    let impossible = |result: Result<(), ClientError>| {
        let error = result.unwrap_err();
        assert!(matches!(error, ClientError::Impossible { .. }), "{error}");
    };
    impossible(client.read(end, 1).await.map(drop));
    impossible(client.read(u64::MAX, 2).await.map(drop));
    impossible(client.write(end - 1, Bytes::from_static(b"ab"), false).await);
    impossible(client.trim(1, end, false).await);
    impossible(client.write_zeroes(1, end, ZeroMode::default(), false).await);
    impossible(client.cache(1, end).await);
    impossible(client.block_status("base:allocation", 0, 0).await.map(drop));
    assert!(export.calls().is_empty());
}

#[tokio::test]
async fn refusals_name_the_request_and_leave_the_connection() {
    let export = Arc::new(Probe::new(SIZE, |call| match call.0 {
        Command::WRITE => Verdict::Fail(Errno::ENOSPC),
        _ => Verdict::Go,
    }));
    let (client, _served) = connect(export, Framing::Extended, 65536).await;
    let error = client.write(512, Bytes::from_static(b"abc"), false).await.unwrap_err();
    assert_eq!(error.to_string(), "the server refused WRITE of 3 bytes at 512: ENOSPC");
    client.read(0, 512).await.unwrap();
}

#[tokio::test]
async fn long_requests_are_split() {
    let size = 100 << 20;
    let export = plain(size);
    let (client, _served) = connect(export.clone(), Framing::Extended, 1 << 20).await;
    let mut data = vec![0; 70 << 20];
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = (index / 4096 % 251) as u8;
    }
    let data = Bytes::from(data);
    // With FUA the server gives each to the export as it is.
    client.write(1, data.clone(), true).await.unwrap();
    assert!(client.read(1, data.len()).await.unwrap() == data);
    client.write_zeroes(0, size as u64, ZeroMode::default(), false).await.unwrap();
    let calls = export.calls();
    assert_eq!(calls.len(), 3 + 3 + 1, "WRITE_ZEROES has no payload to limit it");
    assert!(calls[..6].iter().all(|call| call.2 <= MAX_PAYLOAD.into()));
    assert_eq!(calls[..6].iter().map(|call| call.2).sum::<u64>(), 2 * data.len() as u64);
}

#[tokio::test]
async fn replies_come_in_any_order() {
    let gate = CancellationToken::new();
    let wait = gate.clone();
    let export = Arc::new(Probe::new(SIZE, move |call| match call.1 {
        0 => Verdict::After(wait.clone()),
        _ => Verdict::Go,
    }));
    let (client, _served) = connect(export, Framing::Extended, 65536).await;
    let slow = tokio::spawn({
        let client = client.clone();
        async move { client.read(0, 4096).await }
    });
    for offset in 1..100 {
        client.read(offset, 4096).await.unwrap();
    }
    assert!(!slow.is_finished());
    gate.cancel();
    assert_eq!(within(slow).await.unwrap().unwrap().len(), 4096);
}

#[tokio::test]
async fn a_caller_that_goes_away_strands_nothing() {
    let gate = CancellationToken::new();
    let wait = gate.clone();
    let export = Arc::new(Probe::new(SIZE, move |call| match call.1 {
        0 => Verdict::After(wait.clone()),
        _ => Verdict::Go,
    }));
    let (client, _served) = connect(export.clone(), Framing::Extended, 65536).await;
    for round in 1..=50 {
        let lost = tokio::spawn({
            let client = client.clone();
            async move { client.read(0, 4096).await }
        });
        until("the request at the server", || export.calls().len() == round).await;
        lost.abort();
        assert!(lost.await.unwrap_err().is_cancelled());
    }
    gate.cancel();
    assert_eq!(within(client.read(512, 10)).await.unwrap().len(), 10);
}

#[tokio::test]
async fn when_the_connection_dies_everybody_is_told_why() {
    let never = CancellationToken::new();
    let export = Arc::new(Probe::new(SIZE, move |_| Verdict::After(never.clone())));
    let (client, served) = connect(export.clone(), Framing::Extended, 65536).await;
    let pending = tokio::spawn({
        let client = client.clone();
        async move {
            let reads: FuturesUnordered<_> = (0..20).map(|offset| client.read(offset, 512)).collect();
            reads.collect::<Vec<_>>().await
        }
    });
    until("the requests at the server", || export.calls().len() == 20).await;
    served.ended.abort();
    for result in within(pending).await.unwrap() {
        let error = result.unwrap_err();
        assert_eq!(error.to_string(), "the connection to the NBD server is closed: the server closed it");
    }
    assert!(within(client.closed()).await.is_closed());
    assert!(client.flush().await.unwrap_err().is_closed());
}

#[test]
fn a_runtime_that_ends_ends_its_connections() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (client, _served) = runtime.block_on(connect(plain(SIZE), Framing::Extended, 65536));
    drop(runtime);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let error = runtime.block_on(within(client.closed()));
    assert_eq!(error.to_string(), "the connection to the NBD server is closed: its task was dropped");
    assert!(runtime.block_on(client.read(0, 1)).unwrap_err().is_closed());
}

#[tokio::test]
async fn the_last_handle_says_goodbye() {
    let (client, served) = connect(plain(SIZE), Framing::Extended, 65536).await;
    let other = client.clone();
    drop(client);
    other.flush().await.unwrap();
    drop(other);
    assert_eq!(within(served.ended).await.unwrap().unwrap(), Ended::Disconnected);
}

/// Random operations, many at a time, over streams that hold few bytes: each task has its own part of the disk, so that
/// it knows what to read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_callers_share_a_connection() {
    let buffers = [100, 5000, 1 << 20, 100];
    for (framing, buffer) in FRAMINGS.into_iter().cycle().zip(buffers) {
        let part = 100_000;
        let export = plain(8 * part);
        let (client, _served) = connect(export.clone(), framing, buffer).await;
        let mut tasks = Vec::new();
        for task in 0..8u64 {
            let client = client.clone();
            tasks.push(tokio::spawn(async move {
                let mut random = StdRng::seed_from_u64(task);
                let mut model = vec![0u8; part];
                let start = task * part as u64;
                for round in 0..60 {
                    let from = random.random_range(0..part);
                    let length = random.random_range(0..=(part - from).min(30_000));
                    let at = start + from as u64;
                    match random.random_range(0..4) {
                        0 => {
                            let data = vec![round + 1; length];
                            model[from..from + length].copy_from_slice(&data);
                            client.write(at, data.into(), false).await.unwrap();
                        }
                        1 => {
                            model[from..from + length].fill(0);
                            client.write_zeroes(at, length as u64, ZeroMode::default(), false).await.unwrap();
                        }
                        _ => assert!(client.read(at, length).await.unwrap() == model[from..from + length]),
                    }
                }
                model
            }));
        }
        let mut content = Vec::new();
        for task in tasks {
            content.extend(within(task).await.unwrap());
        }
        assert!(export.disk.content() == content);
    }
}

#[tokio::test]
async fn exports_are_listed_and_described() {
    let served = serve(plain(SIZE), ServeOptions::default(), 65536);
    let entries = list(served.stream, &options(Framing::Extended)).await.unwrap();
    assert_eq!((entries.len(), entries[0].name.as_str()), (1, "disk"));
    assert_eq!(within(served.ended).await.unwrap().unwrap(), Ended::DuringHandshake);
    let served = serve(plain(SIZE), ServeOptions::default(), 65536);
    let info = describe(served.stream, "disk", &options(Framing::Extended)).await.unwrap();
    assert_eq!((info.size, info.contexts.len()), (SIZE as u64, 1));
    let served = serve(plain(SIZE), ServeOptions::default(), 65536);
    let error = describe(served.stream, "nope", &options(Framing::Extended)).await.unwrap_err();
    assert!(matches!(error, ClientError::Negotiation(_)), "{error}");
}

#[tokio::test]
async fn a_negotiated_stream_is_handed_out_in_step() {
    let served = serve(plain(SIZE), ServeOptions::default(), 65536);
    let (mut stream, info) = negotiate(served.stream, "disk", &options(Framing::Extended)).await.unwrap();
    assert!(info.framing == Framing::Simple && info.size == SIZE as u64);
    let request = Request { flags: Default::default(), command: Command::READ, cookie: 5, offset: 0, length: 8 };
    stream.write_all(&request.encode()).await.unwrap();
    let mut reply = [0; 24];
    within(stream.read_exact(&mut reply)).await.unwrap();
    assert_eq!(SimpleReply::decode(&reply), Ok(SimpleReply { error: 0, cookie: 5 }));
}

#[tokio::test]
async fn connecting_says_what_is_wrong() {
    let refused = |uri: &str| {
        let uri: NbdUri = uri.parse().unwrap();
        async move { Client::connect(&uri, &ConnectOptions::default()).await.map(drop).unwrap_err() }
    };
    assert!(refused("nbds://localhost/x").await.to_string().contains("tls-certificates="));
    let error = refused("nbd+unix:///x?socket=/nonexistent/socket").await;
    assert_eq!(error.to_string(), "cannot connect to unix:/nonexistent/socket: is the server running there?");
    // A server that says nothing.
    let (stream, _kept) = duplex(100);
    let options = ConnectOptions { time: std::time::Duration::from_millis(20), ..options(Framing::Extended) };
    let error = Client::handshake(stream, "x", &options).await.map(drop).unwrap_err();
    assert!(matches!(error, ClientError::HandshakeTime(_)), "{error}");
}

async fn request(stream: &mut DuplexStream) -> Request {
    let mut head = [0; Request::LENGTH];
    stream.read_exact(&mut head).await.unwrap();
    Request::decode(&head).unwrap()
}

/// A server by hand that speaks in structured replies.
fn act<F: Future<Output = ()> + Send + 'static>(
    info: Vec<Info>,
    play: impl FnOnce(DuplexStream) -> F + Send + 'static,
) -> (DuplexStream, JoinHandle<()>) {
    acting::act(Framing::Structured, info, play)
}

fn export_info(flags: TransmissionFlags) -> Info {
    Info::Export { size: SIZE as u64, flags }
}

#[tokio::test]
async fn the_servers_block_sizes_are_kept() {
    let info = vec![
        export_info(TransmissionFlags::HAS_FLAGS),
        Info::BlockSize { minimum: 512, preferred: 4096, maximum: 8192 },
    ];
    let (stream, acting) = act(info, |mut stream| async move {
        let mut lengths = Vec::new();
        for _ in 0..3 {
            let request = request(&mut stream).await;
            lengths.push((request.offset, request.length));
            let chunk = ChunkHeader {
                flags: ChunkFlags::DONE,
                kind: ChunkType::OFFSET_HOLE,
                cookie: request.cookie,
                length: 12,
            };
            stream.write_all(&chunk.encode()).await.unwrap();
            stream.write_u64(request.offset).await.unwrap();
            stream.write_u32(request.length as u32).await.unwrap();
        }
        assert_eq!(lengths, [(512, 8192), (8704, 8192), (16896, 512)]);
    });
    let client = Client::handshake(stream, "", &ConnectOptions::default()).await.unwrap();
    assert_eq!(within(client.read(512, 16896)).await.unwrap(), vec![0; 16896]);
    let error = client.read(1, 512).await.unwrap_err();
    assert!(error.to_string().ends_with("it is not aligned to the server's minimum block size"), "{error}");
    assert!(client.read(512, 511).await.is_err());
    within(acting).await.unwrap();
}

#[tokio::test]
async fn a_server_without_fua_is_flushed_and_without_a_command_not_asked() {
    let flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH;
    let (stream, acting) = act(vec![export_info(flags)], |mut stream| async move {
        let write = request(&mut stream).await;
        assert_eq!((write.command, write.flags.0), (Command::WRITE, 0));
        stream.read_exact(&mut [0; 3]).await.unwrap();
        stream.write_all(&SimpleReply { error: 0, cookie: write.cookie }.encode()).await.unwrap();
        let flush = request(&mut stream).await;
        assert_eq!((flush.command, flush.offset, flush.length), (Command::FLUSH, 0, 0));
        stream.write_all(&SimpleReply { error: 0, cookie: flush.cookie }.encode()).await.unwrap();
    });
    let client = Client::handshake(stream, "", &ConnectOptions::default()).await.unwrap();
    within(client.write(0, Bytes::from_static(b"abc"), true)).await.unwrap();
    let error = client.trim(0, 512, false).await.unwrap_err();
    assert_eq!(error.to_string(), "TRIM of 512 bytes at 0 is not possible: the server does not offer it");
    within(acting).await.unwrap();
}

#[tokio::test]
async fn a_server_that_breaks_the_protocol_is_left() {
    let (stream, acting) = act(vec![export_info(TransmissionFlags::HAS_FLAGS)], |mut stream| async move {
        let read = request(&mut stream).await;
        stream.write_all(&SimpleReply { error: 0, cookie: read.cookie }.encode()).await.unwrap();
        // The client hangs up.
        assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
    });
    let client = Client::handshake(stream, "", &ConnectOptions::default()).await.unwrap();
    let error = within(client.read(0, 512)).await.unwrap_err().to_string();
    assert!(error.contains("a simple reply where a structured one is due"), "{error}");
    within(acting).await.unwrap();
}

#[tokio::test]
async fn who_waits_for_the_greeting_is_told_before_the_handshake_ends() {
    let (ours, mut theirs) = duplex(1 << 10);
    let greeted = Greeted::default();
    let options = ConnectOptions { greeted: Some(greeted.clone()), ..ConnectOptions::default() };
    let connecting = tokio::spawn(async move { Client::handshake(ours, "", &options).await.map(drop) });
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert!(!*greeted.borrow());
    theirs.write_all(b"NBDMAGICIHAVEOPT\0\x03").await.unwrap();
    greeted.subscribe().wait_for(|greeted| *greeted).await.unwrap();
    assert!(!connecting.is_finished());
    drop(theirs);
    connecting.await.unwrap().unwrap_err();
}

#[tokio::test]
async fn a_server_that_never_answers_does_not_keep_a_connection_that_is_closed() {
    let export = Arc::new(Probe::new(SIZE, |_| Verdict::After(CancellationToken::new())));
    let (client, _served) = connect(export.clone(), Framing::Extended, 65536).await;
    let reader = tokio::spawn({
        let client = client.clone();
        async move { client.read(0, 4096).await }
    });
    until("the request at the server", || export.calls().len() == 1).await;
    within(client.close()).await;
    let error = within(reader).await.unwrap().unwrap_err();
    assert!(error.is_closed() && error.to_string().contains("did not answer any more"), "{error}");
}

#[tokio::test]
async fn a_read_in_one_chunk_is_not_copied_and_queued_requests_leave_together() {
    let (stream, acting) = act(vec![export_info(TransmissionFlags::HAS_FLAGS)], |mut stream| async move {
        let mut buffer = vec![0; 65536];
        // Requests queued before the task runs come in one receive.
        assert_eq!(stream.read(&mut buffer).await.unwrap(), 20 * Request::LENGTH);
        for head in buffer[..20 * Request::LENGTH].chunks(Request::LENGTH) {
            let request = Request::decode(head).unwrap();
            let (flags, kind, cookie) = (ChunkFlags::DONE, ChunkType::OFFSET_DATA, request.cookie);
            let chunk = ChunkHeader { flags, kind, cookie, length: request.length as u32 + 8 };
            stream.write_all(&chunk.encode()).await.unwrap();
            stream.write_u64(request.offset).await.unwrap();
            stream.write_all(&vec![request.offset as u8; request.length as usize]).await.unwrap();
        }
    });
    let client = Client::handshake(stream, "", &ConnectOptions::default()).await.unwrap();
    let reads = (0..20).map(|offset| client.read(offset, 100));
    let replies = within(futures::future::try_join_all(reads)).await.unwrap();
    for (offset, data) in replies.iter().enumerate() {
        assert_eq!(*data, vec![offset as u8; 100]);
    }
    // Neighbours in one receive buffer: 28 bytes of head between them.
    let distance = replies[11].as_ptr() as usize - replies[10].as_ptr() as usize;
    assert_eq!(distance, 128);
    within(acting).await.unwrap();
}
