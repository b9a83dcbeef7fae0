//! Writes, trims and zeroings, and how they meet missing blocks.
//!
//! Blocks that a change covers whole need no fetch: they are claimed, changed, and then they are present and dirty. A
//! block that it covers in part is fetched first, if it is missing; of a trim such edges are left alone, it is only
//! advice. A present block is dirty **before** its bytes change, a missing one is marked after.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use nbd::export::Answer;
use nbd::wire::Errno;

use super::gate::Refusal;
use super::lazy::Inner;
use super::status::errno_of;
use crate::fetch::{Class, Waiting};
use crate::limits::INLINE_ZERO_MAX;
use crate::units::{BlockRange, ByteRange};

/// A change that a client asks for.
#[derive(Clone, Debug)]
pub(super) enum Mutation {
    Write { offset: u64, data: Bytes },
    Zero { range: ByteRange, no_hole: bool },
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
        Tried::Done if !fua && inner.gate.serve().is_ok() => Answer::Now(Ok(())),
        tried => Answer::Later(Box::pin(finish(inner.clone(), mutation, fua, Some(tried)))),
    }
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
    if fua {
        inner.flusher.persist().await?;
    }
    inner.gate.until_served().await
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
        tokio::select! {
            _ = fetcher.fetch(blocks, Class::Demand) => {}
            errno = self.gate.until_closed() => return Err(errno),
        }
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
        if let Err(error) = result {
            return Tried::Failed(errno_of(&error));
        }
        self.tracker.record(self.started.elapsed(), range);
        self.flusher.changed();
        Tried::Done
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
            Mutation::Zero { no_hole, .. } => self.disk.write_zeroes(range, *no_hole),
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
