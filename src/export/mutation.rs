//! Writes, trims and zeroings, and how they meet missing blocks.
//!
//! Blocks that a change covers whole need no fetch: they are claimed, changed, and then they are present and dirty. A
//! block that it covers in part is fetched first, if it is missing; of a trim such edges are left alone, it is only
//! advice. A present block is dirty **before** its bytes change, a missing one is marked after.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use bytes::Bytes;
use nbd::export::{Answer, ZeroMode};
use nbd::wire::Errno;

use super::gate::Refusal;
use super::lazy::Inner;
use super::status::errno_of;
use crate::fetch::{Class, Waiting};
use crate::limits::INLINE_ZERO_MAX;
use crate::units::{BlockRange, ByteRange};

/// What a hole counts for in [`Mutation::unwritten`], in bytes.
const UNWRITTEN_HOLE: u64 = 4096;

/// A change that a client asks for.
#[derive(Clone, Debug)]
pub(super) enum Mutation {
    Write { offset: u64, data: Bytes },
    Zero { range: ByteRange, mode: ZeroMode },
    Trim { range: ByteRange },
}

/// What a try came to.
enum Tried {
    Done,
    Failed(Errno),
    /// The gate holds it.
    Held,
    /// These blocks must be fetched first.
    Needs(Vec<BlockRange>),
    /// A fetch is landing on it right now.
    Landing(Waiting),
}

impl Mutation {
    fn range(&self) -> ByteRange {
        match self {
            Mutation::Write { offset, data } => ByteRange::at(*offset, data.len() as u64),
            Mutation::Zero { range, .. } | Mutation::Trim { range } => *range,
        }
    }

    /// To be refused where writing the zeroes would be as fast.
    fn is_fast(&self) -> bool {
        matches!(self, Mutation::Zero { mode: ZeroMode { fast: true, .. }, .. })
    }

    /// How many bytes it leaves to be written out, roughly: of what becomes a hole only that it is one.
    fn unwritten(&self) -> u64 {
        match self {
            Mutation::Write { data, .. } => data.len() as u64,
            Mutation::Zero { .. } | Mutation::Trim { .. } => UNWRITTEN_HOLE,
        }
    }

    /// It may take long: not for the connection's own task.
    fn is_long(&self) -> bool {
        !matches!(self, Mutation::Write { .. }) && self.range().len() > INLINE_ZERO_MAX
    }
}

/// Answers a change: at once wherever nothing must be waited for.
pub(super) fn answer(inner: &Arc<Inner>, mutation: Mutation, fua: bool) -> Answer<()> {
    if mutation.range().is_empty() {
        return Answer::Now(Ok(()));
    }
    if mutation.is_long() {
        return Answer::Later(Box::pin(finish(inner.clone(), mutation, fua, None)));
    }
    match inner.attempt(&mutation) {
        Tried::Failed(errno) => Answer::Now(Err(errno)),
        Tried::Done if !fua && !inner.pace.holds() && inner.gate.serve().is_ok() => Answer::Now(Ok(())),
        tried => Answer::Later(Box::pin(finish(inner.clone(), mutation, fua, Some(tried)))),
    }
}

/// Writes what is in a pipe, where nothing must be waited for before; otherwise `None`, and the bytes are still there.
pub(super) fn write_pages(inner: &Arc<Inner>, range: ByteRange, pipe: BorrowedFd<'_>) -> Option<Answer<()>> {
    let cover = inner.disk.block_size.cover(range);
    if !inner.disk.takes_pages() || !inner.disk.map.is_present(cover) {
        return None;
    }
    {
        let _pass = inner.gate.enter().ok()?;
        inner.disk.map.set_dirty(cover);
        if let Err(error) = inner.disk.write_pages(range, pipe) {
            return Some(Answer::Now(Err(errno_of(&error))));
        }
        inner.changed(range, range.len());
    }
    if !inner.pace.holds() && inner.gate.serve().is_ok() {
        return Some(Answer::Now(Ok(())));
    }
    let inner = inner.clone();
    Some(Answer::Later(Box::pin(async move { acknowledge(&inner, false).await })))
}

/// Waits until a change that was made may be answered.
async fn acknowledge(inner: &Inner, fua: bool) -> Result<(), Errno> {
    if fua {
        inner.flusher.persist().await?;
    } else {
        inner.pace.held().await;
    }
    inner.gate.until_served().await
}

/// Does what must be waited for, then tries again. Nothing is half done when it is dropped: an attempt is whole.
async fn finish(inner: Arc<Inner>, mutation: Mutation, fua: bool, first: Option<Tried>) -> Result<(), Errno> {
    let mut tried = match first {
        Some(tried) => tried,
        None => attempt_anywhere(&inner, &mutation).await?,
    };
    let mut waited = None;
    loop {
        match tried {
            Tried::Done => break,
            Tried::Failed(errno) => return Err(errno),
            Tried::Held => inner.gate.until_served().await?,
            Tried::Landing(mut landing) => {
                landing.done().await;
            }
            Tried::Needs(blocks) => {
                if waited.is_none() {
                    waited = inner.fetcher.as_ref().map(|fetcher| fetcher.faults.begin());
                }
                for blocks in blocks {
                    inner.bring(blocks).await?;
                }
            }
        }
        tried = attempt_anywhere(&inner, &mutation).await?;
    }
    if let Some(fault) = waited {
        fault.served();
    }
    acknowledge(&inner, fua).await
}

async fn attempt_anywhere(inner: &Arc<Inner>, mutation: &Mutation) -> Result<Tried, Errno> {
    if !mutation.is_long() {
        return Ok(inner.attempt(mutation));
    }
    let (owned, mutation) = (inner.clone(), mutation.clone());
    tokio::task::spawn_blocking(move || owned.attempt(&mutation)).await.map_err(|_| Errno::EIO)
}

impl Inner {
    /// Makes blocks present that a change covers in part.
    async fn bring(&self, blocks: BlockRange) -> Result<(), Errno> {
        let Some(fetcher) = &self.fetcher else { return Ok(()) };
        self.fetch_or_closed(fetcher, blocks, Class::Demand).await?;
        if self.disk.map.is_present(blocks) {
            return Ok(());
        }
        // The bytes came, but the store did not take them: it would not take the write either.
        let errno = fetcher.store_error().map(|(_, errno)| errno_of(&io::Error::from_raw_os_error(errno)));
        Err(errno.unwrap_or(Errno::EIO))
    }

    /// One whole try: either the change is made and marked, or nothing was touched (but for what a failed write leaves
    /// within its own range).
    fn attempt(&self, mutation: &Mutation) -> Tried {
        let _pass = match self.gate.enter() {
            Ok(pass) => pass,
            Err(Refusal::Wait) => return Tried::Held,
            Err(Refusal::Fail(errno)) => return Tried::Failed(errno),
        };
        let range = mutation.range();
        let cover = self.disk.block_size.cover(range);
        let result = if self.disk.map.is_present(cover) {
            self.disk.map.set_dirty(cover);
            self.apply(mutation, range)
        } else {
            match self.attempt_on_missing(mutation, range, cover) {
                Ok(result) => result,
                Err(tried) => return tried,
            }
        };
        match result {
            Ok(()) => {}
            Err(error) if mutation.is_fast() && error.kind() == io::ErrorKind::Unsupported => {
                return Tried::Failed(Errno::ENOTSUP);
            }
            Err(error) => return Tried::Failed(errno_of(&error)),
        }
        self.changed(range, mutation.unwritten());
        Tried::Done
    }

    /// Bytes have changed.
    fn changed(&self, range: ByteRange, unwritten: u64) {
        self.tracker.record(self.started.elapsed(), range);
        self.flusher.changed();
        self.pace.wrote(unwritten);
    }

    fn attempt_on_missing(
        &self,
        mutation: &Mutation,
        range: ByteRange,
        cover: BlockRange,
    ) -> Result<io::Result<()>, Tried> {
        let (map, block_size) = (&self.disk.map, self.disk.block_size);
        let inside = block_size.inside(range, self.disk.size());
        let edges = edges_of(cover, inside);
        let missing_edges: Vec<BlockRange> = edges.iter().copied().filter(|edge| !map.is_present(*edge)).collect();
        let mut part = range;
        if matches!(mutation, Mutation::Trim { .. }) {
            // Both edges stay as they are where one is missing; the inside is whole blocks.
            if !missing_edges.is_empty() {
                part = block_size.bytes_of(inside, self.disk.size());
            }
            if part.is_empty() {
                return Ok(Ok(()));
            }
        } else if mutation.is_fast() && !missing_edges.is_empty() {
            // A round trip to the source is not what was asked for.
            return Err(Tried::Failed(Errno::ENOTSUP));
        } else if !missing_edges.is_empty() {
            return Err(Tried::Needs(missing_edges));
        }
        // Only an export with a fetcher has missing blocks; without one there is nobody to exclude.
        let _claim = match &self.fetcher {
            Some(fetcher) => Some(fetcher.try_claim(inside).map_err(Tried::Landing)?),
            None => None,
        };
        let touched = block_size.cover(part);
        let mut at = touched.start;
        for missing in map.missing_in(touched) {
            map.set_dirty(BlockRange::new(at, missing.start));
            at = missing.end;
        }
        map.set_dirty(BlockRange::new(at, touched.end));
        let result = self.apply(mutation, part);
        if result.is_ok() {
            map.set_dirty(inside);
            map.set_present(inside);
        }
        Ok(result)
    }

    fn apply(&self, mutation: &Mutation, range: ByteRange) -> io::Result<()> {
        match mutation {
            Mutation::Write { offset, data } => self.disk.write(*offset, data),
            Mutation::Zero { mode: ZeroMode { no_hole, fast: false }, .. } => self.disk.write_zeroes(range, *no_hole),
            Mutation::Zero { mode: ZeroMode { no_hole, fast: true }, .. } => {
                let done = self.disk.zero_fast(range, *no_hole)?;
                if done { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
            }
            Mutation::Trim { .. } => self.disk.discard(range),
        }
    }
}

/// The blocks at the ends of a range that it covers in part: none, one or two.
fn edges_of(cover: BlockRange, inside: BlockRange) -> Vec<BlockRange> {
    if inside.is_empty() {
        return vec![cover];
    }
    let ends = [BlockRange::new(cover.start, inside.start), BlockRange::new(inside.end, cover.end)];
    ends.into_iter().filter(|edge| !edge.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use nbd::export::Export;

    use super::super::LazyExport;
    use super::super::gate::GateMode;
    use super::super::testing::{Lab, Source, done, read};
    use super::*;
    use crate::store::MemoryStore;

    const FAST: ZeroMode = ZeroMode { no_hole: false, fast: true };

    #[tokio::test]
    async fn a_fast_zeroing_is_done_where_the_store_has_a_call_for_it_and_refused_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, vec![7; 65536]).unwrap();
        let file = LazyExport::local("file", &image, false).unwrap();
        assert!(file.info().fast_zero);
        done(file.write_zeroes(100, 50_000, FAST, true)).await.unwrap();
        let bytes = std::fs::read(&image).unwrap();
        assert!(bytes[100..50_100].iter().all(|byte| *byte == 0) && bytes[99] == 7 && bytes[50_100] == 7);

        let memory = LazyExport::local_on("memory", Arc::new(MemoryStore::from_bytes(vec![7; 65536])), false).unwrap();
        assert_eq!(done(memory.write_zeroes(0, 4096, FAST, false)).await, Err(Errno::ENOTSUP));
        assert_eq!(read(&memory, 0, 65536).await.unwrap(), vec![7; 65536], "nothing was changed");
        done(memory.write_zeroes(0, 4096, ZeroMode::default(), false)).await.unwrap();
        assert_eq!(read(&memory, 4095, 2).await.unwrap(), [0, 7]);
    }

    #[tokio::test]
    async fn a_fast_zeroing_waits_for_no_source() {
        let lab = Lab::new(Source::new(Source::pattern(65536)), |config| config.background = false).await;
        lab.source.close_valve();
        let refused = lab.export.write_zeroes(100, 8192, FAST, false);
        assert!(matches!(refused, Answer::Now(Err(Errno::ENOTSUP))), "its edges are missing");
        assert!(lab.source.reads().is_empty());
    }

    /// A pipe with these bytes in it, and both its ends.
    fn pipe_with(bytes: &[u8]) -> (std::io::PipeReader, std::io::PipeWriter) {
        use std::io::Write;
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(bytes).unwrap();
        (reader, writer)
    }

    fn left_in(pipe: (std::io::PipeReader, std::io::PipeWriter)) -> usize {
        use std::io::Read;
        let (mut reader, writer) = pipe;
        drop(writer);
        let mut left = Vec::new();
        reader.read_to_end(&mut left).unwrap()
    }

    #[tokio::test]
    async fn pages_of_present_blocks_are_written_tracked_and_held_by_the_gate_like_any_write() {
        use std::os::fd::AsFd;
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, vec![7; 65536]).unwrap();
        let file = LazyExport::local("file", &image, false).unwrap();
        let pipe = pipe_with(&[1; 9000]);
        done(file.write_pages(4096, 9000, pipe.0.as_fd()).unwrap()).await.unwrap();
        assert_eq!(left_in(pipe), 0);
        let bytes = std::fs::read(&image).unwrap();
        assert!(bytes[..4096] == [7; 4096] && bytes[4096..13_096] == [1; 9000] && bytes[13_096..] == [7; 52_440]);
        assert_eq!(file.status().dirty_bytes, 3 * 4096);

        for mode in [GateMode::ReadOnly, GateMode::Held, GateMode::Closed] {
            file.gate().set(mode).await;
            let pipe = pipe_with(&[2; 4096]);
            assert!(file.write_pages(0, 4096, pipe.0.as_fd()).is_none(), "{mode:?}");
            assert_eq!(left_in(pipe), 4096, "the bytes are there for the write that waits or fails");
        }
        assert!(std::fs::read(&image).unwrap() == bytes);
    }

    #[tokio::test]
    async fn pages_of_missing_blocks_are_left_to_the_write_and_what_the_store_refuses_is_an_error() {
        use std::os::fd::AsFd;
        let lab = Lab::new(Source::new(Source::pattern(65536)), |config| config.background = false).await;
        let pipe = pipe_with(&[1; 8192]);
        assert!(lab.export.write_pages(0, 8192, pipe.0.as_fd()).is_none());
        assert_eq!(left_in(pipe), 8192);

        // A store that takes no writes.
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, vec![7; 65536]).unwrap();
        let read_only = crate::store::FileStore::open(&image, true).unwrap();
        let export = LazyExport::local_on("refuses", Arc::new(read_only), false).unwrap();
        let pipe = pipe_with(&[1; 8192]);
        assert!(done(export.write_pages(0, 8192, pipe.0.as_fd()).unwrap()).await.is_err());
        assert_eq!(left_in(pipe), 0, "they are thrown away, so that the pipe is in step");
    }
}
