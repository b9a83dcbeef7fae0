//! An in-process upstream for tests: it records what it is asked, and breaks on demand.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use nbd::export::{Answer, Extent};
use nbd::wire::Errno;
use tokio::sync::{Semaphore, watch};

use super::{ExportConfig, LazyExport};
use crate::store::{FaultyStore, MapError, MapFile, Store};
use crate::upstream::{Connect, Connection, Greeted, ReadDone, ReadError, Upstream, UpstreamError};

/// The disk at the source, and its faults.
pub(super) struct Source {
    pub(super) bytes: Vec<u8>,
    /// Every READ in the order of its arrival.
    pub(super) reads: Mutex<Vec<(u64, u32)>>,
    pub(super) contexts: HashMap<String, Vec<Extent>>,
    pub(super) connections: AtomicUsize,
    /// Bytes that each connection, in the order of their beginning, was asked for.
    pub(super) carried: Mutex<HashMap<usize, u64>>,
    /// The handshake of the first connection waits after its greeting until there are so many.
    pub(super) greets_for: AtomicUsize,
    /// How many there were when it was greeted.
    pub(super) at_greeting: AtomicUsize,
    /// Answers wait for permits while it is closed.
    pub(super) valve: Semaphore,
    pub(super) valve_used: AtomicBool,
    /// READs that are answered with an error before they work again.
    pub(super) refuse: AtomicU64,
    pub(super) reachable: AtomicBool,
    /// Further connections are left waiting for ever.
    pub(super) only_one: AtomicBool,
    /// Rises when all connections die.
    pub(super) cut: watch::Sender<u64>,
    pub(super) claimed_size: AtomicU64,
}

impl Source {
    pub(super) fn new(bytes: Vec<u8>) -> Arc<Source> {
        Arc::new(Self::plain(bytes))
    }

    pub(super) fn with_contexts(bytes: Vec<u8>, contexts: &[(&str, Vec<Extent>)]) -> Arc<Source> {
        let contexts = contexts.iter().map(|(name, extents)| ((*name).to_owned(), extents.clone())).collect();
        Arc::new(Source { contexts, ..Self::plain(bytes) })
    }

    fn plain(bytes: Vec<u8>) -> Source {
        let claimed_size = AtomicU64::new(bytes.len() as u64);
        Source {
            bytes,
            reads: Mutex::default(),
            contexts: HashMap::new(),
            connections: AtomicUsize::new(0),
            carried: Mutex::default(),
            greets_for: AtomicUsize::new(0),
            at_greeting: AtomicUsize::new(0),
            valve: Semaphore::new(0),
            valve_used: AtomicBool::new(false),
            refuse: AtomicU64::new(0),
            reachable: AtomicBool::new(true),
            only_one: AtomicBool::new(false),
            cut: watch::Sender::new(0),
            claimed_size,
        }
    }

    /// Bytes that differ from block to block.
    pub(super) fn pattern(size: usize) -> Vec<u8> {
        (0..size).map(|at| (at / 4096 * 7 + at % 4096 + 1) as u8 | 1).collect()
    }

    pub(super) fn upstream(self: &Arc<Self>) -> Upstream {
        Upstream::new(Arc::new(Dial(self.clone())))
    }

    pub(super) fn cut_all(&self) {
        self.cut.send_modify(|cut| *cut += 1);
    }

    pub(super) fn reads(&self) -> Vec<(u64, u32)> {
        self.reads.lock().unwrap().clone()
    }

    /// From now on READs are answered only as [`Source::let_through`] says.
    pub(super) fn close_valve(&self) {
        self.valve_used.store(true, Ordering::SeqCst);
    }

    pub(super) fn let_through(&self, reads: usize) {
        self.valve.add_permits(reads);
    }
}

struct Dial(Arc<Source>);

impl Connect for Dial {
    fn connect<'a>(&'a self, greeted: &'a Greeted) -> BoxFuture<'a, Result<Arc<dyn Connection>, UpstreamError>> {
        Box::pin(async {
            let connection = self.connect_to_read().await?;
            // Who does not wait for the greeting is here by then.
            for _ in 0..1000 {
                tokio::task::yield_now().await;
            }
            let (source, wanted) = (&self.0, self.0.greets_for.load(Ordering::SeqCst));
            source.at_greeting.store(source.connections.load(Ordering::SeqCst), Ordering::SeqCst);
            greeted.send_replace(true);
            eventually("further connections", || source.connections.load(Ordering::SeqCst) >= wanted).await;
            Ok(connection)
        })
    }

    fn connect_to_read(&self) -> BoxFuture<'_, Result<Arc<dyn Connection>, UpstreamError>> {
        Box::pin(async {
            if !self.0.reachable.load(Ordering::SeqCst) {
                let source = std::io::ErrorKind::ConnectionRefused.into();
                return Err(UpstreamError::Dial { target: self.describe(), source });
            }
            let others = self.0.connections.fetch_add(1, Ordering::SeqCst);
            if others > 0 && self.0.only_one.load(Ordering::SeqCst) {
                std::future::pending::<()>().await;
            }
            let wire = Wire { source: self.0.clone(), number: others, cut: self.0.cut.subscribe() };
            Ok(Arc::new(wire) as Arc<dyn Connection>)
        })
    }

    fn is_encrypted(&self) -> bool {
        false
    }

    fn describe(&self) -> String {
        "the source".into()
    }
}

struct Wire {
    source: Arc<Source>,
    number: usize,
    cut: watch::Receiver<u64>,
}

impl Connection for Wire {
    fn size(&self) -> u64 {
        self.source.claimed_size.load(Ordering::SeqCst)
    }

    fn has_context(&self, name: &str) -> bool {
        self.source.contexts.contains_key(name)
    }

    fn gives_pages(&self) -> bool {
        true
    }

    fn read(&self, offset: u64, length: u32, done: ReadDone) {
        let source = self.source.clone();
        let mut cut = self.cut.clone();
        source.reads.lock().unwrap().push((offset, length));
        *source.carried.lock().unwrap().entry(self.number).or_default() += u64::from(length);
        tokio::spawn(async move {
            let answer = async {
                if source.valve_used.load(Ordering::SeqCst) {
                    source.valve.acquire().await.unwrap().forget();
                }
                let refuse = source.refuse.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
                if refuse.is_ok() {
                    return Err(ReadError::Refused("EIO".into()));
                }
                tokio::task::yield_now().await;
                Ok(Bytes::copy_from_slice(&source.bytes[offset as usize..][..length as usize]))
            };
            // A request of a connection that is cut neither passes the valve any more nor uses up a refusal.
            done(tokio::select! {
                biased;
                _ = cut.changed() => Err(ReadError::Lost("cut".into())),
                answer = answer => answer,
            })
        });
    }

    fn block_status(
        &self,
        context: &str,
        offset: u64,
        length: u32,
    ) -> BoxFuture<'static, Result<Vec<Extent>, ReadError>> {
        let (mut at, mut answer) = (0, Vec::new());
        for extent in &self.source.contexts[context] {
            let (start, end) = (at.max(offset), (at + extent.length).min(offset + u64::from(length)));
            if start < end {
                answer.push(Extent { length: end - start, flags: extent.flags });
            }
            at += extent.length;
        }
        Box::pin(async move { Ok(answer) })
    }

    fn closed(&self) -> BoxFuture<'static, String> {
        let mut cut = self.cut.clone();
        Box::pin(async move {
            let _ = cut.changed().await;
            "cut".into()
        })
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// An export over a source, its store, and the directory of its maps.
pub(super) struct Lab {
    pub(super) directory: tempfile::TempDir,
    pub(super) source: Arc<Source>,
    pub(super) store: Arc<FaultyStore>,
    pub(super) export: LazyExport,
}

impl Lab {
    pub(super) async fn new(source: Arc<Source>, change: impl FnOnce(&mut ExportConfig)) -> Lab {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(FaultyStore::new(source.bytes.len() as u64));
        let export = open(&directory, &source, store.clone(), change).await;
        Lab { directory, source, store, export }
    }

    /// The same disk in a new process (of the same boot): the export is dropped, not shut down.
    pub(super) async fn reopen_after_kill(self, change: impl FnOnce(&mut ExportConfig)) -> Lab {
        let Lab { directory, source, store, export } = self;
        end(export).await;
        let export = open(&directory, &source, store.clone(), change).await;
        Lab { directory, source, store, export }
    }

    /// The same disk after a power loss: what was not synced is gone, and so is the live map.
    pub(super) async fn reopen_after_power_loss(self) -> Lab {
        let Lab { directory, source, store, export } = self;
        end(export).await;
        // Gone already where a sync has failed.
        let _ = std::fs::remove_file(directory.path().join("map.live"));
        let store = Arc::new(FaultyStore::from_bytes(store.after_power_loss()));
        let export = open(&directory, &source, store.clone(), quiet).await;
        Lab { directory, source, store, export }
    }
}

/// Only what is asked for is fetched.
pub(super) fn quiet(config: &mut ExportConfig) {
    config.background = false;
}

/// The tasks of a process end with it: none may go on beside the next one.
pub(super) async fn end(export: LazyExport) {
    let tasks = export.inner.tasks.clone();
    drop(export);
    tasks.wait().await;
}

async fn open(
    directory: &tempfile::TempDir,
    source: &Arc<Source>,
    store: Arc<FaultyStore>,
    change: impl FnOnce(&mut ExportConfig),
) -> LazyExport {
    let mut config = ExportConfig::new("disk", directory.path(), "test disk");
    change(&mut config);
    unlocked(directory).await;
    let export = LazyExport::lazy_on(config, source.upstream(), store as Arc<dyn Store>).await.unwrap();
    export.start();
    export
}

/// The thread of the last flush lets the map go a moment after it has answered.
pub(super) async fn unlocked(directory: &tempfile::TempDir) {
    let map = directory.path().join("map");
    eventually("the map's lock", || !matches!(MapFile::open(&map), Err(MapError::InUse(_)))).await;
}

pub(super) async fn done<T>(answer: Answer<T>) -> Result<T, Errno> {
    match answer {
        Answer::Now(result) => result,
        Answer::Later(future) => future.await,
    }
}

pub(super) async fn read(export: &LazyExport, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
    let mut buffer = vec![0; length];
    nbd::export::read(export, offset, &mut buffer).await.map(|()| buffer)
}

/// Waits for a condition that must become true soon.
pub(super) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < Duration::from_secs(20), "{what} does not come true");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
