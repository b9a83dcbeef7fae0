//! Large reads that go from a file's pages to the socket.

mod common;

use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use common::plain::{Plain, Served};
use common::within;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use nbd::address::Address;
use nbd::client::{Client, ConnectOptions};
use nbd::export::{ExportInfo, LateRead, ReadAnswer, Spliced};
use nbd::memory::SingleExport;
use nbd::server::{Listener, ServeOptions};
use nbd::uri::NbdUri;
use nbd::wire::{Errno, Framing};
use nix::fcntl::{SpliceFFlags, splice};
use tokio_util::sync::CancellationToken;

const MIB: usize = 1 << 20;
const SIZE: usize = 24 * MIB;

/// A file that gives its pages, except that every third time it breaks off in the middle. Some of it comes later.
struct Pages {
    file: File,
    /// Where the reads begin that have to wait, each once.
    missing: Arc<Mutex<HashSet<u64>>>,
    asked: AtomicUsize,
    given: AtomicUsize,
}

impl Plain for Pages {
    fn info(&self) -> ExportInfo {
        ExportInfo { size: SIZE as u64, read_only: true, ..ExportInfo::default() }
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> ReadAnswer {
        if self.missing.lock().unwrap().contains(&offset) {
            let missing = self.missing.clone();
            return ReadAnswer::Later(Box::pin(async move {
                tokio::task::yield_now().await;
                missing.lock().unwrap().remove(&offset);
                Ok(LateRead::AtHand)
            }));
        }
        ReadAnswer::Now(self.file.read_exact_at(buffer, offset).map_err(|_| Errno::EIO))
    }

    fn splice(&self, offset: u64, length: usize, pipe: BorrowedFd<'_>) -> Spliced {
        if self.missing.lock().unwrap().contains(&offset) {
            return Spliced::No;
        }
        let spoilt = self.asked.fetch_add(1, Ordering::Relaxed) % 3 == 2;
        let (mut at, mut left) = (offset as i64, if spoilt { length / 2 } else { length });
        while left > 0 {
            match splice(&self.file, Some(&mut at), pipe, None, left, SpliceFFlags::SPLICE_F_NONBLOCK) {
                Ok(count @ 1..) => left -= count,
                other => panic!("the pipe is empty and has room: {other:?}"),
            }
        }
        if spoilt {
            return Spliced::Spoilt;
        }
        self.given.fetch_add(1, Ordering::Relaxed);
        Spliced::Whole
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_are_the_bytes_in_every_framing_and_in_their_order() {
    let dir = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..SIZE).map(|at| (at / 4096 * 31 + at % 4096 * 7) as u8).collect();
    let path = dir.path().join("disk");
    File::create(&path).unwrap().write_all(&bytes).unwrap();
    let file = File::open(&path).unwrap();
    let missing = Arc::new(Mutex::new(HashSet::new()));
    let (asked, given) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let export = Arc::new(Pages { file, missing: missing.clone(), asked, given });
    let stop = CancellationToken::new();
    for address in [Address::Unix(dir.path().join("socket")), Address::Tcp { host: "127.0.0.1".into(), port: 0 }] {
        let listener = Listener::bind(&address).await.unwrap();
        let uri = NbdUri::new(listener.address().clone(), "disk");
        let exports = Arc::new(SingleExport::new("disk", Arc::new(Served(export.clone()))));
        let served = tokio::spawn(listener.run(exports, ServeOptions::default(), stop.child_token()));
        for framing in [Framing::Simple, Framing::Structured, Framing::Extended] {
            let options = ConnectOptions { framing, ..ConnectOptions::default() };
            let client = Client::connect(&uri, &options).await.unwrap();
            // Short ones in between, unaligned ones, one that no pipe holds, and more than the sockets take at once.
            let ranges = (0..60).map(|n| match n % 5 {
                0 => (n * 4096, 4096),
                1 => (n * 70_001, 300_001),
                2 => (n * 65536, MIB),
                3 => (n * 4096, 256 << 10),
                _ => (n * 1000, 5 * MIB),
            });
            missing.lock().unwrap().extend(ranges.clone().map(|(offset, _)| offset as u64).filter(|at| at % 3 > 0));
            let reads = ranges.map(|(offset, length)| {
                let client = &client;
                async move { (offset, length, client.read(offset as u64, length).await.unwrap()) }
            });
            let mut reads: FuturesUnordered<_> = reads.collect();
            while let Some((offset, length, read)) = within(reads.next()).await {
                assert!(read == bytes[offset..offset + length], "{framing:?}: {length} bytes at {offset}");
            }
            drop(reads);
            client.close().await;
            assert!(missing.lock().unwrap().is_empty());
        }
        drop(served);
    }
    assert!(export.given.load(Ordering::Relaxed) > 50, "pages were given");
    stop.cancel();
}
