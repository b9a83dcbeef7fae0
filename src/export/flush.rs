//! FLUSH and FUA: the data and the map are durable before the answer, for all connections at once.
//!
//! One flush runs at a time, off the connections' tasks. Whoever asks while one runs waits for the **next** one, which
//! covers everything that was answered before they asked, and shares it with all others who wait.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nbd::export::Answer;
use nbd::wire::Errno;
use tokio::sync::oneshot;

use super::status::errno_of;
use crate::store::{Disk, MapFile, MapFiles, MapSnapshot};

type Outcome = Result<(), Errno>;

#[derive(Default)]
struct State {
    running: bool,
    waiting: Vec<oneshot::Sender<Outcome>>,
}

/// See the module's documentation.
pub(super) struct Flusher {
    disk: Arc<Disk>,
    /// A local image has no map to persist.
    map_file: Option<Mutex<MapFile>>,
    map_files: Option<MapFiles>,
    state: Mutex<State>,
    /// Something was changed by a client since the last flush began.
    unflushed: AtomicBool,
}

impl Flusher {
    pub(super) fn new(disk: Arc<Disk>, map_file: Option<MapFile>, map_files: Option<MapFiles>) -> Arc<Flusher> {
        Arc::new(Flusher {
            disk,
            map_file: map_file.map(Mutex::new),
            map_files,
            state: Mutex::new(State::default()),
            // What an earlier process acknowledged and did not flush is still to be flushed.
            unflushed: AtomicBool::new(true),
        })
    }

    /// A change was made and will now be acknowledged.
    #[inline]
    pub(super) fn changed(&self) {
        self.unflushed.store(true, Ordering::SeqCst);
    }

    /// The answer to a FLUSH: at once when nothing was changed.
    pub(super) fn flush(self: &Arc<Self>) -> Answer<()> {
        {
            let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if !state.running && !self.unflushed.load(Ordering::SeqCst) {
                return Answer::Now(Ok(()));
            }
        }
        let flusher = self.clone();
        Answer::Later(Box::pin(async move { flusher.persist().await }))
    }

    /// Makes everything durable: what clients changed, what was fetched, and the map.
    pub(super) async fn persist(self: &Arc<Self>) -> Outcome {
        let (sender, receiver) = oneshot::channel();
        let start = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.waiting.push(sender);
            !std::mem::replace(&mut state.running, true)
        };
        if start {
            let flusher = self.clone();
            tokio::task::spawn_blocking(move || flusher.run());
        }
        receiver.await.unwrap_or(Err(Errno::EIO))
    }

    /// Flushes until nobody waits any more.
    fn run(&self) {
        loop {
            let waiting = {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                if state.waiting.is_empty() {
                    state.running = false;
                    return;
                }
                std::mem::take(&mut state.waiting)
            };
            let outcome = self.sync_once();
            for waiter in waiting {
                // A client that has gone does not mind.
                let _ = waiter.send(outcome);
            }
        }
    }

    fn sync_once(&self) -> Outcome {
        let unflushed = self.unflushed.swap(false, Ordering::SeqCst);
        let outcome = match &self.map_file {
            None => self.disk.sync().map(drop).map_err(|error| {
                tracing::error!(
                    "cannot make the disk durable: {error}; FLUSH fails, stop writing and check the storage"
                );
                errno_of(&error)
            }),
            Some(file) => self.sync_with_map(unflushed, &mut file.lock().unwrap_or_else(PoisonError::into_inner)),
        };
        if outcome.is_err() {
            self.unflushed.store(true, Ordering::SeqCst);
        }
        outcome
    }

    /// Bytes that were acknowledged may be lost although this machine goes on: the next process on this store must begin
    /// with what is known to be durable, for the system tells it nothing of the failure.
    fn distrust_live_map(&self) {
        if let Some(Err(error)) = self.map_files.as_ref().map(MapFiles::distrust_live) {
            tracing::error!("{error}; remove it before the node is started again");
        }
    }

    /// Bits are taken first, then the bytes are made durable, then the bits are written; of a large disk part by part.
    fn sync_with_map(&self, unflushed: bool, file: &mut MapFile) -> Outcome {
        let mut from = Some(0);
        while let Some(at) = from {
            let snapshot = MapFile::snapshot(&self.disk.map, at);
            if snapshot.is_empty() && (at > 0 || !unflushed) {
                break;
            }
            self.sync_part(&snapshot, file)?;
            from = snapshot.rest();
        }
        Ok(())
    }

    fn sync_part(&self, snapshot: &MapSnapshot, file: &mut MapFile) -> Outcome {
        let durable = self.disk.sync().map_err(|error| {
            // First of all: this process may end at any time.
            self.distrust_live_map();
            snapshot.give_back(&self.disk.map);
            tracing::error!("cannot make the disk durable: {error}; FLUSH fails, stop writing and check the storage");
            errno_of(&error)
        })?;
        file.commit(snapshot, &durable).map_err(|error| {
            snapshot.give_back(&self.disk.map);
            tracing::error!("{error}; FLUSH fails until it can be written");
            Errno::EIO
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block_map::codec::Header;
    use crate::block_map::{BLOCKS_PER_PAGE, BlockMap, HeapPlanes};
    use crate::store::FileStore;
    use crate::units::BlockSize;

    #[test]
    fn the_map_of_a_large_disk_is_persisted_to_its_last_part() {
        let directory = tempfile::tempdir().unwrap();
        let files = MapFiles::in_directory(directory.path());
        let (block_size, blocks) = (BlockSize::DEFAULT, 2500 * BLOCKS_PER_PAGE);
        let size = blocks * block_size.bytes();
        let file = MapFile::create(&files.durable, &Header { size, block_size, identity: "disk".into() }).unwrap();
        let opened = files.open(file).unwrap();
        let store = FileStore::open_or_create(&directory.path().join("store"), size).unwrap();
        let disk = Arc::new(Disk::new(Arc::new(store), opened.map, block_size));
        disk.map.set_present(disk.map.whole());
        let flusher = Flusher::new(disk, Some(opened.file), None);
        flusher.sync_once().unwrap();
        drop(flusher);
        let planes = HeapPlanes::new(blocks);
        MapFile::open(&files.durable).unwrap().unwrap().load(&planes).unwrap();
        assert!(BlockMap::new(Box::new(planes), blocks).all_present());
    }
}
