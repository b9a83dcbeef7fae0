//! The export trait's methods: what each NBD command does.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{Bytes, BytesMut};
use nbd::export::{Answer, Export, ExportInfo, Extent, LateRead, Promise, ReadAnswer, ReadReply, Spliced, ZeroMode};
use nbd::wire::Errno;
use tokio::runtime::Handle;

use super::contexts;
use super::gate::{GateMode, Refusal};
use super::lazy::{Inner, LazyExport};
use super::mutation::{self, Mutation};
use super::promised;
use super::status::errno_of;
use crate::fetch::{Class, Fetched, Fetcher};
use crate::pull::PullState;
use crate::units::{BlockRange, ByteRange};

impl Export for LazyExport {
    fn info(&self) -> ExportInfo {
        ExportInfo {
            size: self.inner.disk.size(),
            read_only: self.inner.read_only || self.inner.gate.mode() == GateMode::ReadOnly,
            description: if self.inner.fetcher.is_some() {
                format!("{}, lazily filled", self.inner.name)
            } else {
                self.inner.name.clone()
            },
            preferred_block: self.inner.disk.block_size.bytes() as u32,
            multi_conn: true,
            fast_zero: true,
            rotational: self.inner.disk.is_rotational(),
            contexts: contexts::NAMES.iter().map(|name| (*name).to_owned()).collect(),
            ..ExportInfo::default()
        }
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> ReadAnswer {
        let inner = &self.inner;
        let range = ByteRange::at(offset, buffer.len() as u64);
        let later = || ReadAnswer::Later(Box::pin(once_served(inner.clone())));
        match inner.gate.serve() {
            Ok(()) => {}
            Err(Refusal::Fail(errno)) => return ReadAnswer::Now(Err(errno)),
            Err(Refusal::Wait) => return later(),
        }
        let Some(missing) = inner.readable(range) else { return ReadAnswer::Promised };
        let read = inner.read_here(offset, buffer, &missing);
        // The lease may have ended while the disk was slow, or this process stood still.
        match (inner.gate.serve(), read) {
            (Ok(()), Ok(Some(holes))) if holes.is_empty() => ReadAnswer::Now(Ok(())),
            (Ok(()), Ok(Some(holes))) => ReadAnswer::Sparse(holes),
            (Ok(()), Ok(None)) => ReadAnswer::Later(Box::pin(read_from_disk(inner.clone(), range))),
            (Ok(()), Err(error)) => ReadAnswer::Now(Err(errno_of(&error))),
            (Err(Refusal::Fail(errno)), _) => ReadAnswer::Now(Err(errno)),
            (Err(Refusal::Wait), _) => later(),
        }
    }

    fn promise(&self, offset: u64, length: usize, reply: ReadReply) -> Promise {
        promised::promise(&self.inner, ByteRange::at(offset, length as u64), reply)
    }

    fn forget(&self, promise: Promise) {
        promised::forget(&self.inner, promise);
    }

    fn splice(&self, offset: u64, length: usize, pipe: BorrowedFd<'_>) -> Spliced {
        let inner = &self.inner;
        let range = ByteRange::at(offset, length as u64);
        // Whatever has to wait, to fail or to be told as a hole is for the read.
        if inner.gate.serve().is_err()
            || !inner.disk.map.is_present(inner.disk.block_size.cover(range))
            || inner.has_holes(range)
        {
            return Spliced::No;
        }
        match inner.disk.splice(offset, length, pipe) {
            Ok(false) => Spliced::No,
            // The lease may have ended while the disk was slow.
            Ok(true) if inner.gate.serve().is_ok() => Spliced::Whole,
            Ok(true) | Err(_) => Spliced::Spoilt,
        }
    }

    fn write(&self, offset: u64, data: Bytes, fua: bool) -> Answer<()> {
        mutation::answer(&self.inner, Mutation::Write { offset, data }, fua)
    }

    fn write_pages(&self, offset: u64, length: usize, pipe: BorrowedFd<'_>) -> Option<Answer<()>> {
        mutation::write_pages(&self.inner, ByteRange::at(offset, length as u64), pipe)
    }

    fn flush(&self) -> Answer<()> {
        let inner = &self.inner;
        match (inner.gate.serve(), inner.flusher.flush()) {
            (Err(Refusal::Fail(errno)), _) => Answer::Now(Err(errno)),
            (Ok(()), Answer::Now(done)) => Answer::Now(done),
            (_, flush) => {
                let inner = inner.clone();
                Answer::Later(Box::pin(async move {
                    match flush {
                        Answer::Now(done) => done?,
                        Answer::Later(flush) => flush.await?,
                    }
                    inner.gate.until_served().await
                }))
            }
        }
    }

    fn trim(&self, offset: u64, length: u64, fua: bool) -> Answer<()> {
        mutation::answer(&self.inner, Mutation::Trim { range: ByteRange::at(offset, length) }, fua)
    }

    fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode, fua: bool) -> Answer<()> {
        let range = ByteRange::at(offset, length);
        mutation::answer(&self.inner, Mutation::Zero { range, mode }, fua)
    }

    fn cache(&self, offset: u64, length: u64) -> Answer<()> {
        let inner = &self.inner;
        let blocks = inner.disk.block_size.cover(ByteRange::at(offset, length));
        match &inner.fetcher {
            Some(fetcher) if !inner.disk.map.is_present(blocks) => {
                let (inner, fetcher) = (inner.clone(), fetcher.clone());
                Answer::Later(Box::pin(async move {
                    // Before the handover the source still changes: what came now would stay, and be stale.
                    inner.gate.until_served().await?;
                    inner.fetch_or_closed(&fetcher, blocks, Class::ReadAhead).await.map(drop)
                }))
            }
            _ => Answer::Now(Ok(())),
        }
    }

    fn block_status(&self, context: &str, offset: u64, length: u64, max_extents: usize) -> Answer<Vec<Extent>> {
        match self.inner.gate.serve() {
            Err(Refusal::Fail(errno)) => Answer::Now(Err(errno)),
            Ok(()) | Err(Refusal::Wait) => {
                contexts::answer(&self.inner, context, ByteRange::at(offset, length), max_extents)
            }
        }
    }

    fn is_busy(&self) -> bool {
        *self.inner.complete.borrow() == PullState::Pulling
    }

    fn home(&self) -> Option<Handle> {
        self.inner.home.as_ref().map(|home| home.handle().clone())
    }

    fn client_entered(self: Arc<Self>) -> Box<dyn Send + Sync> {
        self.inner.clients.fetch_add(1, Ordering::Relaxed);
        Box::new(Client(self.inner.clone()))
    }
}

/// One connected client.
struct Client(Arc<Inner>);

impl Drop for Client {
    fn drop(&mut self) {
        self.0.clients.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Inner {
    /// Has blocks fetched; ESHUTDOWN if the export is closed before they are here.
    pub(super) async fn fetch_or_closed(
        &self,
        fetcher: &Arc<Fetcher>,
        blocks: BlockRange,
        class: Class,
    ) -> Result<Fetched, Errno> {
        tokio::select! {
            biased;
            brought = fetcher.fetch(blocks, class) => Ok(brought),
            errno = self.gate.until_closed() => Err(errno),
        }
    }
}

/// A read of present blocks that waits for the local disk: on a thread, so that the connection's other requests do not
/// wait behind it, and the disk has many at a time.
async fn read_from_disk(inner: Arc<Inner>, range: ByteRange) -> Result<LateRead, Errno> {
    let Ok(turn) = inner.disk_reads.clone().acquire_owned().await else { return Err(Errno::ESHUTDOWN) };
    let disk = inner.disk.clone();
    let read = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        let mut buffer = BytesMut::zeroed(range.len() as usize);
        disk.read(range.start, &mut buffer).map(|()| buffer.freeze())
    });
    let bytes = read.await.map_err(|_| Errno::EIO)?;
    // The lease may have ended meanwhile.
    inner.gate.until_served().await?;
    bytes.map(LateRead::Bytes).map_err(|error| errno_of(&error))
}

/// A read that must wait for the gate.
async fn once_served(inner: Arc<Inner>) -> Result<LateRead, Errno> {
    inner.gate.until_served().await.map(|()| LateRead::AtHand)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::atomic::AtomicUsize;
    use std::sync::{Condvar, Mutex};

    use super::super::testing::{done, eventually};
    use super::*;
    use crate::limits::DISK_READS;
    use crate::store::{Durable, MemoryStore, Store};

    const SIZE: usize = 1 << 20;

    /// A disk of which nothing is in memory, and whose reads wait until they are let through.
    struct Slow {
        store: MemoryStore,
        open: Mutex<bool>,
        opened: Condvar,
        reading: AtomicUsize,
        most: AtomicUsize,
        fails: bool,
    }

    impl Slow {
        fn new(fails: bool) -> Arc<Slow> {
            let bytes = (0..SIZE).map(|at| (at / 512) as u8).collect();
            let (open, opened) = (Mutex::new(false), Condvar::new());
            let (reading, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
            Arc::new(Slow { store: MemoryStore::from_bytes(bytes), open, opened, reading, most, fails })
        }

        fn open(&self) {
            *self.open.lock().unwrap() = true;
            self.opened.notify_all();
        }
    }

    impl Store for Slow {
        fn size(&self) -> u64 {
            SIZE as u64
        }
        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
            self.most.fetch_max(self.reading.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            let mut open = self.open.lock().unwrap();
            while !*open {
                open = self.opened.wait(open).unwrap();
            }
            drop(open);
            self.reading.fetch_sub(1, Ordering::SeqCst);
            if self.fails { Err(io::ErrorKind::Other.into()) } else { self.store.read_at(offset, buffer) }
        }
        fn read_cached(&self, _: u64, buffer: &mut [u8]) -> io::Result<bool> {
            buffer.fill(0xee);
            Ok(false)
        }
        fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
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

    fn reads(export: &LazyExport, count: usize) -> Vec<(u64, tokio::task::JoinHandle<Result<LateRead, Errno>>)> {
        let read = |index: usize| {
            let offset = (index * 5003) as u64;
            let mut buffer = vec![0; 4096];
            match export.read(offset, &mut buffer) {
                ReadAnswer::Later(work) => (offset, tokio::spawn(work)),
                _ => panic!("nothing is in memory"),
            }
        };
        (0..count).map(read).collect()
    }

    #[tokio::test]
    async fn reads_wait_for_the_disk_beside_each_other_up_to_a_limit_and_hold_up_nothing_else() {
        let store = Slow::new(false);
        let export = LazyExport::local_on("slow", store.clone(), false).unwrap();
        let reads = reads(&export, 2 * DISK_READS);
        eventually("as many reads as may", || store.reading.load(Ordering::SeqCst) == DISK_READS).await;
        // This is the thread that the connections are served by.
        done(export.write(SIZE as u64 - 4096, Bytes::from(vec![9; 4096]), false)).await.unwrap();
        store.open();
        let content = store.store.to_bytes();
        for (offset, read) in reads {
            let Ok(LateRead::Bytes(bytes)) = read.await.unwrap() else { panic!("the bytes are to be had") };
            assert!(bytes == content[offset as usize..offset as usize + 4096]);
        }
        assert_eq!(store.most.load(Ordering::SeqCst), DISK_READS);
    }

    #[tokio::test]
    async fn what_the_disk_says_is_answered_and_nothing_after_the_end() {
        let store = Slow::new(true);
        let export = LazyExport::local_on("slow", store.clone(), false).unwrap();
        let failing = reads(&export, 1);
        store.open();
        for (_, read) in failing {
            assert_eq!(read.await.unwrap().err(), Some(Errno::EIO));
        }
        let store = Slow::new(false);
        let export = LazyExport::local_on("slow", store.clone(), false).unwrap();
        let late = reads(&export, 1);
        eventually("the read", || store.reading.load(Ordering::SeqCst) == 1).await;
        export.gate().set(GateMode::Closed).await;
        store.open();
        for (_, read) in late {
            assert_eq!(read.await.unwrap().err(), Some(Errno::ESHUTDOWN));
        }
    }
}
