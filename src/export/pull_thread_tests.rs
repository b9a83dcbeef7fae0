//! A disk that is stuck holds up the pull to it and nothing else.

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use super::testing::{Source, eventually};
use super::{ExportConfig, Home, LazyExport, PullState};
use crate::store::{Durable, MemoryStore, Store};
use crate::units::ByteRange;

const SIZE: usize = 4 << 20;

/// Takes no byte before it is let go.
struct Stuck {
    store: MemoryStore,
    free: Mutex<bool>,
    freed: Condvar,
    /// Who writes, or has tried to.
    writers: Mutex<Vec<String>>,
}

impl Stuck {
    fn writers(&self) -> Vec<String> {
        self.writers.lock().unwrap().clone()
    }

    fn let_go(&self) {
        *self.free.lock().unwrap() = true;
        self.freed.notify_all();
    }
}

impl Store for Stuck {
    fn size(&self) -> u64 {
        self.store.size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.store.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.writers.lock().unwrap().push(thread::current().name().unwrap_or_default().to_owned());
        let free = self.free.lock().unwrap();
        // On the test's own thread nobody could let it go.
        let (free, _) = self.freed.wait_timeout_while(free, Duration::from_secs(20), |free| !*free).unwrap();
        assert!(*free, "it holds up who would let it go");
        self.store.write_at(offset, data)
    }

    fn write_zeroes(&self, range: ByteRange, no_hole: bool) -> io::Result<()> {
        self.store.write_zeroes(range, no_hole)
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.store.discard(range)
    }

    fn sync(&self) -> io::Result<Durable> {
        self.store.sync()
    }

    fn data_ranges(&self, from: u64, max: usize) -> io::Result<Option<Vec<ByteRange>>> {
        self.store.data_ranges(from, max)
    }
}

#[tokio::test]
async fn the_pull_has_a_thread_of_its_own_which_ends_with_it() {
    let (directory, source) = (tempfile::tempdir().unwrap(), Source::new(Source::pattern(SIZE)));
    let store = Arc::new(Stuck {
        store: MemoryStore::new(SIZE as u64),
        free: Mutex::new(false),
        freed: Condvar::new(),
        writers: Mutex::default(),
    });
    let mut config = ExportConfig::new("stuck", directory.path(), "test disk");
    config.home = Some(Home::new("stuck").unwrap());
    let export = LazyExport::lazy_on(config, source.upstream(), store.clone()).await.unwrap();
    export.start();
    // This thread goes on while the pull is stuck: it comes to let it go.
    eventually("a write that waits", || !store.writers().is_empty()).await;
    store.let_go();
    export.complete().wait_for(|state| *state == PullState::Complete).await.unwrap();
    assert!(store.store.to_bytes() == source.bytes);
    assert!(store.writers().iter().all(|name| name == "pull stuck"), "{:?}", store.writers());
    eventually("the thread's end", || !threads().iter().any(|name| name == "pull stuck")).await;
    export.shutdown().await.unwrap();
}

/// The names of this process's threads.
fn threads() -> Vec<String> {
    let name = |entry: io::Result<std::fs::DirEntry>| std::fs::read_to_string(entry.ok()?.path().join("comm")).ok();
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks.filter_map(name).map(|name| name.trim_end().to_owned()).collect()
}
