//! A disk that is stuck holds up the pull to it and nothing else.

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use super::testing::{Source, eventually};
use super::{ExportConfig, Home, LazyExport, PullState};
use crate::store::{FaultyStore, Store};

const SIZE: usize = 4 << 20;

/// What stands in the way of writes, before it is let go.
#[derive(Default)]
struct Stuck {
    free: Mutex<bool>,
    freed: Condvar,
    /// The threads that write, or have tried to.
    writers: Mutex<Vec<String>>,
}

impl Stuck {
    fn writers(&self) -> Vec<String> {
        self.writers.lock().unwrap().clone()
    }

    fn hold_up(&self) {
        self.writers.lock().unwrap().push(thread::current().name().unwrap_or_default().to_owned());
        let free = self.free.lock().unwrap();
        // On the test's own thread nobody could let it go.
        let (free, _) = self.freed.wait_timeout_while(free, Duration::from_secs(20), |free| !*free).unwrap();
        assert!(*free, "it holds up who would let it go");
    }

    fn let_go(&self) {
        *self.free.lock().unwrap() = true;
        self.freed.notify_all();
    }
}

#[tokio::test]
async fn the_pull_has_a_thread_of_its_own_which_ends_with_it() {
    let (directory, source) = (tempfile::tempdir().unwrap(), Source::new(Source::pattern(SIZE)));
    let (store, stuck) = (Arc::new(FaultyStore::new(SIZE as u64)), Arc::new(Stuck::default()));
    let holds = stuck.clone();
    store.before_writes(move || holds.hold_up());
    let mut config = ExportConfig::new("stuck", directory.path(), "test disk");
    config.home = Some(Home::new("stuck").unwrap());
    let export = LazyExport::lazy_on(config, source.upstream(), store.clone() as Arc<dyn Store>).await.unwrap();
    export.start();
    // This thread goes on while the pull is stuck: it comes to let it go.
    eventually("a write that waits", || !stuck.writers().is_empty()).await;
    stuck.let_go();
    export.complete().wait_for(|state| *state == PullState::Complete).await.unwrap();
    assert!(store.to_bytes() == source.bytes);
    assert!(stuck.writers().iter().all(|name| name == "pull stuck"), "{:?}", stuck.writers());
    eventually("the thread's end", || !threads().iter().any(|name| name == "pull stuck")).await;
    export.shutdown().await.unwrap();
}

/// The names of this process's threads.
fn threads() -> Vec<String> {
    let name = |entry: io::Result<std::fs::DirEntry>| std::fs::read_to_string(entry.ok()?.path().join("comm")).ok();
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks.filter_map(name).map(|name| name.trim_end().to_owned()).collect()
}
