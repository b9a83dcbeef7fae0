//! Reads whose content goes into a sink: as pages from a socket, as bytes from any other stream.

mod common;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use common::within;
use nbd::Transport;
use nbd::address::Address;
use nbd::client::{Client, ClientError, ConnectOptions, Sink};
use nbd::memory::{MemoryDisk, SingleExport};
use nbd::server::{Listener, ServeOptions, serve_connection};
use nbd::wire::Framing;
use nix::fcntl::{SpliceFFlags, splice};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

const MIB: usize = 1 << 20;
const SIZE: usize = 8 * MIB;

/// What has come of reads, in a file, and how much of it as what.
struct Target {
    file: File,
    pages: bool,
    as_pages: AtomicUsize,
    as_bytes: AtomicUsize,
    as_zeroes: AtomicUsize,
    wrong: Mutex<Vec<String>>,
}

impl Target {
    fn new(pages: bool) -> Arc<Target> {
        let file = tempfile::tempfile().unwrap();
        // Whatever is not written shows.
        file.write_all_at(&vec![0xee; SIZE], 0).unwrap();
        let none = AtomicUsize::default;
        Arc::new(Target { file, pages, as_pages: none(), as_bytes: none(), as_zeroes: none(), wrong: Mutex::default() })
    }

    fn holds(&self, expected: &[u8]) -> bool {
        let mut found = vec![0; expected.len()];
        self.file.read_exact_at(&mut found, 0).unwrap();
        assert_eq!(*self.wrong.lock().unwrap(), Vec::<String>::new());
        found == expected
    }
}

struct Into(Arc<Target>);

impl Sink for Into {
    fn bytes(&mut self, offset: u64, bytes: &[u8]) {
        self.0.file.write_all_at(bytes, offset).unwrap();
        self.0.as_bytes.fetch_add(bytes.len(), Ordering::Relaxed);
    }

    fn zeroes(&mut self, offset: u64, length: u32) {
        self.0.file.write_all_at(&vec![0; length as usize], offset).unwrap();
        self.0.as_zeroes.fetch_add(length as usize, Ordering::Relaxed);
    }

    fn takes_pages(&self) -> bool {
        self.0.pages
    }

    fn pages(&mut self, offset: u64, pipe: BorrowedFd<'_>, length: u32) {
        let (mut at, mut left) = (offset as i64, length as usize);
        while left > 0 {
            match splice(pipe, None, self.0.file.as_fd(), Some(&mut at), left, SpliceFFlags::empty()) {
                Ok(count @ 1..) => left -= count,
                other => return self.0.wrong.lock().unwrap().push(format!("{other:?}, {left} bytes are missing")),
            }
        }
        self.0.as_pages.fetch_add(length as usize, Ordering::Relaxed);
    }
}

/// Reads all in pieces of odd lengths, a few at a time, with other requests in between.
async fn fill(client: &Client, target: &Arc<Target>) {
    let mut reads = Vec::new();
    let mut at = 0;
    for n in 0.. {
        let length = [MIB, 1, 300_001, 4096, 16 << 10, 777_777][n % 6].min(SIZE - at);
        if length == 0 {
            break;
        }
        let (done, ended) = oneshot::channel();
        client.read_to(at as u64, length as u32, Box::new(Into(target.clone())), |result| drop(done.send(result)));
        reads.push(ended);
        if n % 3 == 0 {
            client.read(0, 100).await.unwrap();
            client.flush().await.unwrap();
        }
        at += length;
    }
    for read in reads {
        within(read).await.unwrap().unwrap();
    }
}

fn content() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..SIZE).map(|at| (at / 4096 * 31 + at % 4096 * 7) as u8).collect();
    bytes[3 * MIB..4 * MIB + 5000].fill(0);
    bytes
}

fn options(framing: Framing) -> ConnectOptions {
    ConnectOptions { framing, ..ConnectOptions::default() }
}

fn exports(bytes: &[u8]) -> Arc<SingleExport> {
    let export = MemoryDisk::new(bytes.to_vec());
    Arc::new(SingleExport::new("disk", Arc::new(export)))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_byte_comes_once_over_sockets_and_pipes_in_every_framing() {
    let (dir, bytes) = (tempfile::tempdir().unwrap(), content());
    let stop = CancellationToken::new();
    for address in [Address::Unix(dir.path().join("socket")), Address::Tcp { host: "127.0.0.1".into(), port: 0 }] {
        let listener = Listener::bind(&address).await.unwrap();
        let address = listener.address().clone();
        tokio::spawn(listener.run(exports(&bytes), ServeOptions::default(), stop.child_token()));
        for framing in [Framing::Simple, Framing::Structured, Framing::Extended] {
            for pages in [true, false] {
                let stream: Box<dyn Transport> = match &address {
                    Address::Unix(path) => Box::new(UnixStream::connect(path).await.unwrap()),
                    Address::Tcp { port, .. } => Box::new(TcpStream::connect(("127.0.0.1", *port)).await.unwrap()),
                };
                let client = Client::handshake(stream, "disk", &options(framing)).await.unwrap();
                let target = Target::new(pages);
                fill(&client, &target).await;
                assert!(target.holds(&bytes), "{address} {framing:?} {pages}");
                let by = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
                let all = by(&target.as_pages) + by(&target.as_bytes) + by(&target.as_zeroes);
                assert_eq!(all, SIZE, "each byte once");
                assert_eq!(by(&target.as_pages) > SIZE / 2, pages, "pages where they are taken, and mostly");
                client.close().await;
            }
        }
    }
    let (near, far) = tokio::io::duplex(100_000);
    let (served, options) = (exports(&bytes), options(Framing::Extended));
    tokio::spawn(
        async move { serve_connection(far, served, &ServeOptions::default(), CancellationToken::new()).await },
    );
    let client = Client::handshake(near, "disk", &options).await.unwrap();
    let target = Target::new(true);
    fill(&client, &target).await;
    assert!(target.holds(&bytes) && target.as_pages.load(Ordering::Relaxed) == 0, "a pipe in memory has no pages");
    stop.cancel();
}

/// The connection dies when half of a megabyte has come.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_breaks_off_in_the_middle_fails_and_so_do_those_behind_it() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let bytes = content();
    let inner = {
        let (near, far) = tokio::io::duplex(1 << 20);
        let served = exports(&bytes);
        tokio::spawn(
            async move { serve_connection(far, served, &ServeOptions::default(), CancellationToken::new()).await },
        );
        near
    };
    tokio::spawn(async move {
        let (mut client, _) = listener.accept().await.unwrap();
        let (mut from, mut to) = tokio::io::split(inner);
        let (mut client_from, mut client_to) = client.split();
        let forth = tokio::io::copy(&mut client_from, &mut to);
        let back = async {
            let mut left = 2 * MIB + MIB / 2;
            let mut buffer = vec![0; 50_000];
            while left > 0 {
                let count = from.read(&mut buffer).await.unwrap().min(left);
                client_to.write_all(&buffer[..count]).await.unwrap();
                left -= count;
            }
        };
        tokio::select! { _ = forth => {}, () = back => {} }
    });
    let stream = TcpStream::connect(address).await.unwrap();
    let client = Client::handshake(stream, "disk", &options(Framing::Extended)).await.unwrap();
    let target = Target::new(true);
    let mut reads = Vec::new();
    for at in [0, MIB, 2 * MIB, 5 * MIB] {
        let (done, ended) = oneshot::channel();
        client.read_to(at as u64, MIB as u32, Box::new(Into(target.clone())), |result| drop(done.send(result)));
        reads.push(ended);
    }
    let mut results = Vec::new();
    for read in reads {
        results.push(within(read).await.unwrap());
    }
    assert!(results[..2].iter().all(Result::is_ok), "{results:?}");
    assert!(results[2..].iter().all(|result| matches!(result, Err(ClientError::Closed { .. }))), "{results:?}");
    assert_eq!(Arc::strong_count(&target), 1, "no sink is kept");
    let mut found = vec![0; 2 * MIB];
    target.file.read_exact_at(&mut found, 0).unwrap();
    assert!(found == bytes[..2 * MIB]);
}
