//! BLOCK_STATUS: what the export tells of its blocks (protocol document, "Metadata querying").
//!
//! - `base:allocation`: holes of the store. A missing block is neither a hole nor zero: its bytes are at the source.
//! - `lazy-migrate:present`: bit 0 present, bit 1 dirty.
//! - `lazy-migrate:heat`: how often and how lately a region was written; 0 is never.

use std::sync::Arc;

use nbd::export::{Answer, Extent, STATE_HOLE, STATE_ZERO};
use nbd::wire::Errno;

use super::lazy::Inner;
use super::status::errno_of;
use crate::store::Disk;
use crate::units::{BlockIndex, ByteRange};

const ALLOCATION: &str = "base:allocation";
const PRESENT: &str = "lazy-migrate:present";
const HEAT: &str = "lazy-migrate:heat";

/// All contexts.
pub(super) const NAMES: [&str; 3] = [ALLOCATION, PRESENT, HEAT];

/// `lazy-migrate:present`: the block is in the local store.
const FLAG_PRESENT: u64 = 1;
/// `lazy-migrate:present`: the block was written locally.
const FLAG_DIRTY: u64 = 2;

/// At most this many extents, whatever was asked: more than a reply needs.
const MAX_EXTENTS: usize = 64 * 1024;

/// Answers one BLOCK_STATUS.
pub(super) fn answer(inner: &Arc<Inner>, context: &str, range: ByteRange, max: usize) -> Answer<Vec<Extent>> {
    let max = max.clamp(1, MAX_EXTENTS);
    match context {
        HEAT => {
            let heat = inner.tracker.heat_in(inner.started.elapsed(), range, max);
            let extent = |(range, score): (ByteRange, u32)| Extent { length: range.len(), flags: u64::from(score) };
            Answer::Now(Ok(heat.into_iter().map(extent).collect()))
        }
        PRESENT => Answer::Now(Ok(collect(range, max, |at| present_run(&inner.disk, at, range.end)))),
        ALLOCATION if inner.disk.holes_known() => Answer::Now(Ok(allocation(&inner.disk, range, max))),
        ALLOCATION => {
            let disk = inner.disk.clone();
            Answer::Later(Box::pin(async move {
                let scan = tokio::task::spawn_blocking(move || {
                    disk.scan_holes()?;
                    Ok(allocation(&disk, range, max))
                });
                scan.await.map_err(|_| Errno::EIO)?.map_err(|error: std::io::Error| errno_of(&error))
            }))
        }
        _ => Answer::Now(Err(Errno::EINVAL)),
    }
}

fn allocation(disk: &Disk, range: ByteRange, max: usize) -> Vec<Extent> {
    collect(range, max, |at| {
        // Presence first: what is seen present was marked as written before, so no stale hole is seen of it.
        let (present_end, flags) = present_run(disk, at, range.end);
        let (hole_end, hole) = disk.hole_run(at, range.end);
        match (flags & FLAG_PRESENT != 0, hole) {
            (false, _) => (present_end, 0),
            (true, true) => (present_end.min(hole_end), STATE_HOLE | STATE_ZERO),
            (true, false) => (present_end.min(hole_end), 0),
        }
    })
}

/// Up to where the state of the block at `at` reaches, and its flags.
fn present_run(disk: &Disk, at: u64, end: u64) -> (u64, u64) {
    let block = disk.block_size.index(at);
    let last = BlockIndex(end.div_ceil(disk.block_size.bytes()));
    let (until, present, dirty) = disk.map.same_state(block, last);
    let flags = if present { FLAG_PRESENT } else { 0 } | if dirty { FLAG_DIRTY } else { 0 };
    // A bit may be set between two looks: then the run is one block.
    let until = until.0.max(block.0 + 1);
    ((until * disk.block_size.bytes()).min(end), flags)
}

/// Joins runs of equal flags into at most `max` extents from the start of a range.
fn collect(range: ByteRange, max: usize, run: impl Fn(u64) -> (u64, u64)) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let full = extents.len() == max;
        let (end, flags) = run(at);
        let length = end.max(at + 1) - at;
        match extents.last_mut() {
            Some(last) if last.flags == flags => last.length += length,
            _ if full => break,
            _ => extents.push(Extent { length, flags }),
        }
        at += length;
    }
    extents
}
