//! The export trait's methods: what each NBD command does.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{Bytes, BytesMut};
use nbd::export::{Answer, Export, ExportInfo, Extent, ReadAnswer, Spliced, ZeroMode};
use nbd::wire::Errno;

use super::contexts;
use super::gate::{GateMode, Refusal};
use super::lazy::{Inner, LazyExport};
use super::mutation::{self, Mutation};
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
        let later = || ReadAnswer::Later(Box::pin(read_later(inner.clone(), range)));
        match inner.gate.serve() {
            Ok(()) => {}
            Err(Refusal::Fail(errno)) => return ReadAnswer::Now(Err(errno)),
            Err(Refusal::Wait) => return later(),
        }
        let Some(missing) = inner.readable(range) else { return later() };
        let read = inner.read_here(offset, buffer, &missing);
        // The lease may have ended while the disk was slow, or this process stood still.
        match (inner.gate.serve(), read) {
            (Ok(()), Ok(holes)) if holes.is_empty() => ReadAnswer::Now(Ok(())),
            (Ok(()), Ok(holes)) => ReadAnswer::Sparse(holes),
            (Ok(()), Err(error)) => ReadAnswer::Now(Err(errno_of(&error))),
            (Err(Refusal::Fail(errno)), _) => ReadAnswer::Now(Err(errno)),
            (Err(Refusal::Wait), _) => later(),
        }
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
            brought = fetcher.fetch(blocks, class) => Ok(brought),
            errno = self.gate.until_closed() => Err(errno),
        }
    }
}

/// A read that must wait: for the gate, or for missing blocks.
async fn read_later(inner: Arc<Inner>, range: ByteRange) -> Result<Bytes, Errno> {
    inner.gate.until_served().await?;
    let blocks = inner.disk.block_size.cover(range);
    let missing = !inner.disk.map.is_present(blocks);
    let bytes = match &inner.fetcher {
        Some(fetcher) if missing => {
            let fault = fetcher.faults.begin();
            let brought = inner.fetch_or_closed(fetcher, blocks, Class::Demand).await?;
            fault.served();
            brought.assemble(&inner.disk, range)
        }
        _ => {
            let mut buffer = BytesMut::zeroed(range.len() as usize);
            inner.disk.read(range.start, &mut buffer).map(|()| buffer.freeze())
        }
    };
    // It may have been fenced meanwhile.
    inner.gate.until_served().await?;
    bytes.map_err(|error| errno_of(&error))
}
