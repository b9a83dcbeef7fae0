//! What the pull has landed goes to the disk while it goes on, not all at the end: the sync that makes a pull complete has
//! little left to do, and the pull never fills memory with dirty pages, behind which the writes of everybody wait.
//!
//! It does not stay in memory either: who has use for a block has fetched it, and a pull of a large disk would push out
//! what the host's programs use. (Pages that are used again and again also are the fast ones, on a virtual machine.)
//!
//! This is about time alone. Nothing counts as durable before a sync of the store has said so.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::fetcher::Fetcher;
use crate::limits::{WRITE_OUT_BATCH, WRITE_OUT_BEHIND};
use crate::units::ByteRange;

/// What has landed and is not known to be on the disk. Pure.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    /// Not begun.
    ranges: Vec<ByteRange>,
    waiting: u64,
    begun: u64,
}

impl Backlog {
    /// A range has landed; whether there is enough for a batch.
    pub(super) fn landed(&mut self, range: ByteRange) -> bool {
        self.waiting += range.len();
        match self.ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.ranges.push(range),
        }
        self.waiting >= WRITE_OUT_BATCH || self.is_full()
    }

    /// The disk does not keep up: nothing more may land in the background.
    pub(super) fn is_full(&self) -> bool {
        self.waiting + self.begun >= WRITE_OUT_BEHIND
    }

    fn begin(&mut self) -> Vec<ByteRange> {
        self.begun += std::mem::take(&mut self.waiting);
        std::mem::take(&mut self.ranges)
    }

    fn done(&mut self, bytes: u64) {
        self.begun -= bytes;
    }
}

/// Runs until it is cancelled. A batch is begun before the one before it is waited for, so that the disk always has one.
pub(crate) async fn run(fetcher: Arc<Fetcher>, cancel: CancellationToken) {
    let mut before: Vec<ByteRange> = Vec::new();
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            () = fetcher.write_out_due.notified() => {}
        }
        let batch = fetcher.with_backlog(Backlog::begin);
        let (disk, next) = (fetcher.disk().clone(), batch.clone());
        let previous = std::mem::replace(&mut before, batch);
        let bytes = previous.iter().map(|range| range.len()).sum();
        let written = tokio::task::spawn_blocking(move || {
            next.iter().try_for_each(|range| disk.write_out(*range, false))?;
            previous.iter().try_for_each(|range| disk.write_out(*range, true))
        });
        if let Ok(Err(error)) = written.await {
            // The next sync fails for it.
            tracing::warn!("the store takes bytes and cannot write them out: {error}; look at the disk");
        }
        let full = fetcher.with_backlog(|backlog| {
            backlog.done(bytes);
            backlog.is_full()
        });
        if full {
            // By what was begun just now: nothing more lands, and nobody would say so.
            fetcher.write_out_due.notify_one();
        }
        fetcher.wake_background();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_does_not_keep_up_holds_the_pull_back_until_it_does() {
        let mut backlog = Backlog::default();
        let mut at = 0;
        while !backlog.is_full() {
            let enough = backlog.landed(ByteRange::at(at, 1 << 20));
            at += 1 << 20;
            assert_eq!(enough, at >= WRITE_OUT_BATCH);
        }
        assert_eq!(at, WRITE_OUT_BEHIND);
        assert_eq!(backlog.begin(), [ByteRange::new(0, at)], "neighbours are one range");
        assert!(backlog.is_full() && backlog.begin().is_empty());
        backlog.landed(ByteRange::at(at + 4096, 4096));
        backlog.done(at);
        assert!(!backlog.is_full());
        assert_eq!(backlog.begin(), [ByteRange::at(at + 4096, 4096)]);
    }
}
