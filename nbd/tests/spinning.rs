//! Connections that look for the next request before they sleep: the answers stay the same, others are served, and it
//! ends with the client's activity. The server runs on a single thread, where looking would hurt others the most.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use common::within;
use nbd::address::Address;
use nbd::client::{Client, ConnectOptions};
use nbd::memory::{MemoryDisk, SingleExport};
use nbd::server::{Listener, ServeOptions};
use nbd::uri::NbdUri;
use tokio_util::sync::CancellationToken;

const SIZE: usize = 8 << 20;

struct Server {
    uri: NbdUri,
    /// Where the kernel tells of its thread.
    thread: PathBuf,
    shutdown: CancellationToken,
    running: JoinHandle<()>,
}

/// A server on a thread of its own.
fn serve(address: &Address, spin_time: Duration) -> Server {
    let (address, shutdown) = (address.clone(), CancellationToken::new());
    let (tell, told) = std::sync::mpsc::channel();
    let ended = shutdown.clone();
    let running = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = Listener::bind(&address).await.unwrap();
            let uri = NbdUri::new(listener.address().clone(), "disk");
            let thread = Path::new("/proc").join(std::fs::read_link("/proc/thread-self").unwrap());
            tell.send((uri, thread)).unwrap();
            let exports = Arc::new(SingleExport::new("disk", Arc::new(MemoryDisk::zeroed(SIZE))));
            listener.run(exports, ServeOptions { spin_time, ..ServeOptions::default() }, ended).await;
        });
    });
    let (uri, thread) = told.recv().unwrap();
    Server { uri, thread, shutdown, running }
}

impl Server {
    async fn client(&self) -> Client {
        Client::connect(&self.uri, &ConnectOptions::default()).await.unwrap()
    }

    /// Ticks (of 10 ms) that its thread has run for.
    fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(self.thread.join("stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    async fn end(self) {
        self.shutdown.cancel();
        within(tokio::task::spawn_blocking(|| self.running.join().unwrap())).await.unwrap();
    }
}

#[tokio::test]
async fn answers_are_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let unix = Address::Unix(directory.path().join("s"));
    for address in [unix, "127.0.0.1:0".parse().unwrap()] {
        // As long as it can be: hardly a request is missed.
        let server = serve(&address, Duration::from_secs(1));
        let client = server.client().await;
        let mut expected = vec![0; SIZE];
        for round in 0..3000usize {
            let length = [512, 4096, 100, 70_000, 1 << 20][round % 5];
            let offset = (round * 7919 * 512) % (SIZE - length);
            if round % 3 == 0 {
                let data = vec![round as u8; length];
                expected[offset..offset + length].copy_from_slice(&data);
                client.write(offset as u64, data.into(), false).await.unwrap();
            }
            let read = client.read(offset as u64, length).await.unwrap();
            assert!(read[..] == expected[offset..offset + length], "round {round} at {offset}");
        }
        // Several at once are answered as well, and one after the other again.
        let several: Vec<_> = (0..32u64).map(|at| client.read(at * 4096, 4096)).collect();
        for (at, read) in futures::future::join_all(several).await.into_iter().enumerate() {
            assert!(read.unwrap()[..] == expected[at * 4096..(at + 1) * 4096]);
        }
        client.read(0, 512).await.unwrap();
        server.end().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_else_goes_short() {
    let directory = tempfile::tempdir().unwrap();
    // A connection that did not give way would go on for as long as its client does.
    let server = serve(&Address::Unix(directory.path().join("s")), Duration::from_secs(10));
    let (first, second) = (server.client().await, server.client().await);
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let asking = tokio::spawn(async move {
        let mut answered = 0;
        while !stopped.load(Ordering::Relaxed) {
            first.read(0, 4096).await.unwrap();
            answered += 1;
        }
        answered
    });
    for _ in 0..200 {
        within(second.read(4096, 4096)).await.unwrap();
    }
    // A new client is let in, too.
    within(server.client()).await;
    stop.store(true, Ordering::Relaxed);
    assert!(within(asking).await.unwrap() > 100);
    drop(second);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_ends_with_the_clients_activity() {
    let directory = tempfile::tempdir().unwrap();
    let server = serve(&Address::Unix(directory.path().join("s")), ServeOptions::default().spin_time);
    let client = server.client().await;
    for _ in 0..3 {
        for _ in 0..2000 {
            client.read(0, 4096).await.unwrap();
        }
        let before = server.ticks();
        // Not to wait for something: this is the time in which nothing is to happen.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let spent = server.ticks() - before;
        assert!(spent <= 3, "an idle connection took {spent} ticks of 30");
    }
    // It is woken by a client that comes back, as above, and by one that leaves.
    drop(client);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_ends_with_the_server() {
    let directory = tempfile::tempdir().unwrap();
    let server = serve(&Address::Unix(directory.path().join("s")), Duration::from_secs(10));
    let client = server.client().await;
    let asking = tokio::spawn(async move { while client.read(0, 4096).await.is_ok() {} });
    let second = server.client().await;
    within(second.read(0, 4096)).await.unwrap();
    server.end().await;
    within(asking).await.unwrap();
}
