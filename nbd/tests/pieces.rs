//! Long WRITEs, which the export is given as they come: in memory and as pages, and what happens in their middle.

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use common::plain::{Plain, Served};
use common::{Call, Probe, Raw, Verdict, until, within};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use nbd::address::Address;
use nbd::client::{Client, ConnectOptions};
use nbd::export::{Answer, ExportInfo, ReadAnswer};
use nbd::memory::SingleExport;
use nbd::proto::client::{Goal, Negotiation, Outcome, Plan};
use nbd::server::{Listener, ServeOptions};
use nbd::uri::NbdUri;
use nbd::wire::{Command, CommandFlags, Errno, Framing, Request, SimpleReply};
use nix::fcntl::{SpliceFFlags, splice};
use tokio::io::AsyncWriteExt;
use tokio_util::sync::CancellationToken;

const MIB: usize = 1 << 20;
const SIZE: usize = 8 * MIB;

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at / 4096 * 31 + at % 4096 * 7 + 1) as u8).collect()
}

fn probe(judge: impl Fn(&Call) -> Verdict + Send + Sync + 'static) -> Arc<Probe> {
    Arc::new(Probe::new(SIZE, judge))
}

/// Sends the head of a WRITE and the first part of its payload, and waits until the export has been given some of it.
async fn half(raw: &mut Raw, export: &Probe, offset: u64, data: &[u8]) {
    let part = data.len() / 2;
    raw.send(Command::WRITE, 1, offset, data.len() as u64).await;
    raw.stream.write_all(&data[..part]).await.unwrap();
    until("a piece", || !export.calls().is_empty()).await;
}

#[tokio::test]
async fn the_export_has_pieces_of_whole_blocks_before_the_rest_has_come() {
    for framing in [Framing::Simple, Framing::Structured, Framing::Extended] {
        for offset in [0u64, 4096 * 3, 4095, 1] {
            let export = probe(|_| Verdict::Go);
            let mut raw = Raw::enter(export.clone(), framing).await;
            let data = pattern(2 * MIB + 77);
            half(&mut raw, &export, offset, &data).await;
            raw.stream.write_all(&data[data.len() / 2..]).await.unwrap();
            assert_eq!(raw.finished().await, (1, 0));
            let calls = export.calls();
            let mut at = offset;
            for (index, (command, start, length, fua)) in calls.iter().enumerate() {
                assert_eq!((*command, *start, *fua), (Command::WRITE, at, false));
                at += length;
                assert!(at % 4096 == 0 || index == calls.len() - 1, "{calls:?}");
            }
            assert_eq!(at, offset + data.len() as u64);
            assert!(calls.len() > 4, "{calls:?}");
            assert!(export.disk.content()[offset as usize..at as usize] == data);
            raw.assert_in_step().await;
        }
    }
}

#[tokio::test]
async fn an_error_in_the_middle_is_one_reply_and_no_further_piece() {
    let export = probe(|(command, offset, _, _)| match (*command, *offset) {
        (Command::WRITE, at) if at >= (MIB / 2) as u64 => Verdict::Fail(Errno::EIO),
        _ => Verdict::Go,
    });
    let mut raw = Raw::enter(export.clone(), Framing::Simple).await;
    let data = pattern(4 * MIB + 5);
    raw.write(1, 0, &data).await;
    raw.send(Command::READ, 2, 0, 4096).await;
    assert_eq!(raw.simple().await, (1, Errno::EIO.0));
    assert_eq!(raw.simple().await, (2, 0));
    assert!(raw.bytes(4096).await == data[..4096], "what was before the error was written");
    let failed = export.calls().iter().filter(|call| call.0 == Command::WRITE && call.1 >= (MIB / 2) as u64).count();
    assert_eq!(failed, 1, "{:?}", export.calls());
    // And the connection takes the next one as if nothing had been.
    raw.write(3, 0, &data[..300_000]).await;
    assert_eq!(raw.simple().await, (3, 0));
    raw.assert_in_step().await;
}

#[tokio::test]
async fn a_piece_that_is_answered_later_holds_the_reply_and_not_the_stream() {
    for fails in [false, true] {
        let gate = CancellationToken::new();
        let held = gate.clone();
        let export = probe(move |(command, offset, _, _)| match (*command, *offset, fails) {
            (Command::WRITE, 0, false) => Verdict::After(held.clone()),
            (Command::WRITE, 0, true) => Verdict::FailAfter(held.clone(), Errno::ENOSPC),
            _ => Verdict::Go,
        });
        let mut raw = Raw::enter(export.clone(), Framing::Simple).await;
        let data = pattern(3 * MIB);
        raw.write(1, 0, &data).await;
        raw.assert_in_step().await;
        let writes: Vec<Call> = export.calls().into_iter().filter(|call| call.0 == Command::WRITE).collect();
        assert_eq!(writes.len(), 2, "the rest is one piece: {writes:?}");
        gate.cancel();
        assert_eq!(raw.simple().await, (1, if fails { Errno::ENOSPC.0 } else { 0 }));
        assert!(fails || export.disk.content()[..data.len()] == data);
    }
}

#[tokio::test]
async fn fua_is_one_call_and_what_is_refused_reaches_nobody() {
    let export = probe(|_| Verdict::Go);
    let mut raw = Raw::enter(export.clone(), Framing::Simple).await;
    let data = pattern(2 * MIB);
    raw.send_with(CommandFlags::FUA, Command::WRITE, 1, 0, data.len() as u64).await;
    raw.stream.write_all(&data).await.unwrap();
    assert_eq!(raw.simple().await, (1, 0));
    assert_eq!(export.calls(), [(Command::WRITE, 0, data.len() as u64, true)]);
    raw.write(2, (SIZE - MIB) as u64, &data).await;
    assert_eq!(raw.simple().await, (2, Errno::ENOSPC.0));
    assert_eq!(export.calls().len(), 1);
    raw.assert_in_step().await;
}

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_is_missed_by_nobody() {
    let export = probe(|_| Verdict::Go);
    let mut raw = Raw::enter(export.clone(), Framing::Simple).await;
    half(&mut raw, &export, 0, &pattern(4 * MIB)).await;
    drop(raw.stream);
    within(raw.ended).await.unwrap().unwrap();
    assert_eq!(Arc::strong_count(&export.clients), 1);
}

/// How a [`Taker`] takes pages.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mood {
    Takes,
    /// Every third time not.
    Sometimes,
    /// Fails from this offset on.
    Fails(u64),
    /// Answers what lies from this offset on later.
    Later(u64),
}

/// A file that takes pages.
struct Taker {
    file: File,
    mood: Mutex<Mood>,
    asked: AtomicUsize,
    taken: AtomicUsize,
    given: AtomicUsize,
}

impl Taker {
    fn new(directory: &std::path::Path) -> Taker {
        let file = File::options().read(true).write(true).create_new(true).open(directory.join("disk")).unwrap();
        file.set_len(SIZE as u64).unwrap();
        let none = || AtomicUsize::new(0);
        Taker { file, mood: Mutex::new(Mood::Takes), asked: none(), taken: none(), given: none() }
    }

    fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
        for counter in [&self.asked, &self.taken, &self.given] {
            counter.store(0, Ordering::Relaxed);
        }
    }
}

impl Plain for Taker {
    fn info(&self) -> ExportInfo {
        ExportInfo { size: SIZE as u64, ..ExportInfo::default() }
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> ReadAnswer {
        ReadAnswer::Now(self.file.read_exact_at(buffer, offset).map_err(|_| Errno::EIO))
    }

    fn write(&self, offset: u64, data: Bytes) -> Answer<()> {
        self.given.fetch_add(1, Ordering::Relaxed);
        Answer::Now(self.file.write_all_at(&data, offset).map_err(|_| Errno::EIO))
    }

    fn write_pages(&self, offset: u64, length: usize, pipe: BorrowedFd<'_>) -> Option<Answer<()>> {
        let mood = *self.mood.lock().unwrap();
        if mood == Mood::Sometimes && self.asked.fetch_add(1, Ordering::Relaxed) % 3 == 2 {
            return None;
        }
        self.taken.fetch_add(1, Ordering::Relaxed);
        let (mut at, mut left) = (offset as i64, length);
        while left > 0 {
            match splice(pipe, None, &self.file, Some(&mut at), left, SpliceFFlags::empty()) {
                Ok(count @ 1..) => left -= count,
                other => panic!("the pipe holds {left} bytes: {other:?}"),
            }
        }
        Some(match mood {
            Mood::Fails(from) if offset >= from => Answer::Now(Err(Errno::EIO)),
            Mood::Later(from) if offset >= from => Answer::Later(Box::pin(async {
                tokio::task::yield_now().await;
                Ok(())
            })),
            _ => Answer::Now(Ok(())),
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_are_the_bytes_in_every_framing_and_mood() {
    let dir = tempfile::tempdir().unwrap();
    let export = Arc::new(Taker::new(dir.path()));
    let stop = CancellationToken::new();
    for address in [Address::Unix(dir.path().join("socket")), Address::Tcp { host: "127.0.0.1".into(), port: 0 }] {
        let listener = Listener::bind(&address).await.unwrap();
        let uri = NbdUri::new(listener.address().clone(), "disk");
        let exports = Arc::new(SingleExport::new("disk", Arc::new(Served(export.clone()))));
        tokio::spawn(listener.run(exports, ServeOptions::default(), stop.child_token()));
        let framings = [Framing::Simple, Framing::Structured, Framing::Extended];
        for (framing, mood) in framings.into_iter().zip([Mood::Takes, Mood::Sometimes, Mood::Later(3 * MIB as u64)]) {
            export.set(mood);
            let client = Client::connect(&uri, &ConnectOptions { framing, ..ConnectOptions::default() }).await.unwrap();
            let mut model = vec![0; SIZE];
            client.write(0, Bytes::from(model.clone()), false).await.unwrap();
            // Next to each other, unaligned, short ones in between, and the reader's own.
            let mut at = 0;
            let mut works = FuturesUnordered::new();
            for (round, length) in [MIB, 4096, MIB + 3, 300_001, 5, 2 * MIB, 65536, MIB - 11].into_iter().enumerate() {
                let data: Vec<u8> = pattern(length).iter().map(|byte| byte.wrapping_add(round as u8)).collect();
                model[at..at + length].copy_from_slice(&data);
                let (client, offset) = (&client, at as u64);
                works.push(async move {
                    client.write(offset, Bytes::from(data), false).await.unwrap();
                    client.read(offset, length).await.unwrap().len()
                });
                at += length;
            }
            while within(works.next()).await.is_some() {}
            drop(works);
            let read = within(client.read(0, SIZE)).await.unwrap();
            assert!(read == model, "{framing:?} {mood:?}");
            // How many pieces there are is up to the scheduler.
            assert!(export.taken.load(Ordering::Relaxed) >= 2, "{mood:?}: pages were taken");
            client.close().await;
        }
    }
    stop.cancel();
}

/// A client that can send in parts, in the transmission phase.
fn by_hand(path: &std::path::Path) -> UnixStream {
    let mut stream = UnixStream::connect(path).unwrap();
    let plan = Plan {
        goal: Goal::Transmission,
        export: "disk".into(),
        framing: Framing::Simple,
        contexts: Vec::new(),
        tls: false,
    };
    let mut negotiation = Negotiation::new(plan);
    let (mut input, mut out) = (BytesMut::new(), BytesMut::new());
    loop {
        let outcome = negotiation.advance(&mut input, &mut out).expect("our server keeps to the protocol");
        stream.write_all(&out.split()).unwrap();
        if let Some(Outcome::Export(_)) = outcome {
            return stream;
        }
        let mut part = [0; 4096];
        let count = stream.read(&mut part).unwrap();
        assert!(count > 0, "hung up in the handshake");
        input.extend_from_slice(&part[..count]);
    }
}

fn send_write(stream: &mut UnixStream, cookie: u64, offset: u64, data: &[u8], part: usize) {
    let request =
        Request { flags: CommandFlags::NONE, command: Command::WRITE, cookie, offset, length: data.len() as u64 };
    stream.write_all(&request.encode()).unwrap();
    data.chunks(part).for_each(|part| stream.write_all(part).unwrap());
}

fn reply(stream: &mut UnixStream) -> (u64, u32) {
    let mut bytes = [0; SimpleReply::LENGTH];
    stream.read_exact(&mut bytes).unwrap();
    let reply = SimpleReply::decode(&bytes).unwrap();
    (reply.cookie, reply.error)
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_a_client_that_sends_crumbs_and_an_error_among_them() {
    let dir = tempfile::tempdir().unwrap();
    let export = Arc::new(Taker::new(dir.path()));
    let path = dir.path().join("socket");
    let listener = Listener::bind(&Address::Unix(path.clone())).await.unwrap();
    let stop = CancellationToken::new();
    let exports = Arc::new(SingleExport::new("disk", Arc::new(Served(export.clone()))));
    tokio::spawn(listener.run(exports, ServeOptions::default(), stop.child_token()));
    let theirs = export.clone();
    let client = tokio::task::spawn_blocking(move || {
        let mut stream = by_hand(&path);
        stream.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
        let mut model = vec![0; SIZE];
        // Crumbs fill a pipe before there is a block.
        for (round, part) in [1, 3, 100, 4096, 5000, usize::MAX].into_iter().enumerate() {
            let data = pattern(300_000 + round);
            let offset = round * 301_111;
            send_write(&mut stream, round as u64, offset as u64, &data, part);
            assert_eq!(reply(&mut stream), (round as u64, 0), "in parts of {part}");
            model[offset..offset + data.len()].copy_from_slice(&data);
        }
        let mut content = vec![0; SIZE];
        theirs.file.read_exact_at(&mut content, 0).unwrap();
        assert!(content == model);
        assert!(theirs.taken.load(Ordering::Relaxed) >= 2, "pages were taken");
        theirs.set(Mood::Fails(2 * MIB as u64));
        for part in [1000, usize::MAX] {
            let taken = theirs.taken.load(Ordering::Relaxed);
            send_write(&mut stream, 70, 2 * MIB as u64 - 9000, &pattern(3 * MIB), part);
            send_write(&mut stream, 71, 100, &pattern(400_000), part);
            assert_eq!((reply(&mut stream), reply(&mut stream)), ((70, Errno::EIO.0), (71, 0)));
            theirs.file.read_exact_at(&mut content, 0).unwrap();
            assert!(content[100..400_100] == pattern(400_000));
            assert!(theirs.taken.load(Ordering::Relaxed) > taken);
        }
    });
    within(client).await.unwrap();
    stop.cancel();
}
