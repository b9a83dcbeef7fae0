//! Which missing blocks come next in the background. Pure.
//!
//! First the neighbourhood of the latest demand fetches (hints), then the regions that the source's container wrote, the
//! hottest first, then everything else in order. Whole blocks within the upstream's zero extents are never fetched.

use std::collections::VecDeque;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::block_map::BlockMap;
use crate::limits::{HINT_SPAN, MAX_HINTS, MAX_ZERO_EXTENTS, MAX_ZERO_STEP, REGION};
use crate::units::{BlockIndex, BlockRange, BlockSize, ByteRange};

/// What the order follows besides hints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// What was written lately and often on the source comes first.
    #[default]
    Dirty,
    /// From the first block to the last.
    Sequential,
}

/// Neither `dirty` nor `sequential`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not an order; use dirty or sequential")]
pub struct UnknownOrder(String);

impl FromStr for Order {
    type Err = UnknownOrder;

    fn from_str(text: &str) -> Result<Self, UnknownOrder> {
        match text {
            "dirty" => Ok(Order::Dirty),
            "sequential" => Ok(Order::Sequential),
            other => Err(UnknownOrder(other.to_owned())),
        }
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// These blocks are missing: fetch them.
    Fetch(BlockRange),
    /// These blocks are missing and zero at the source: nothing needs to be sent.
    Zero(BlockRange),
}

impl Step {
    /// The blocks of it.
    pub fn range(self) -> BlockRange {
        match self {
            Step::Fetch(range) | Step::Zero(range) => range,
        }
    }

    /// A fetch up to the next multiple of `unit` blocks at most: where the pass meets what is in flight already, which a
    /// region is, no splinter of a request is left over.
    fn on_grid(self, unit: u64) -> Step {
        match self {
            Step::Fetch(range) => {
                let unit = unit.max(1);
                let line = (range.start.0 / unit).saturating_add(1).saturating_mul(unit);
                Step::Fetch(BlockRange::new(range.start, BlockIndex(range.end.0.min(line))))
            }
            zero => zero,
        }
    }
}

/// See the module's documentation. It goes over the disk once; what failed meanwhile comes after [`PullOrder::rewind`].
pub struct PullOrder {
    policy: Order,
    block_size: BlockSize,
    size: u64,
    hints: VecDeque<BlockRange>,
    /// Ranges of blocks by falling heat.
    hot: Arc<[BlockRange]>,
    hot_at: usize,
    /// How far the current range of each source is done.
    hot_done: u64,
    next: u64,
    /// Zero extents as whole blocks, sorted, apart from each other.
    zero: Vec<BlockRange>,
    /// The end of the last zero extent, which may go on with the next ones.
    zero_open: Option<ByteRange>,
    /// The zero extents before this block are known.
    zero_known: u64,
}

impl PullOrder {
    /// An order over a disk of `size` bytes, of which nothing is known yet.
    pub fn new(policy: Order, block_size: BlockSize, size: u64) -> Self {
        let (hints, hot, zero) = (VecDeque::new(), Arc::default(), Vec::new());
        let (zero_open, zero_known) = (None, u64::MAX);
        Self { policy, block_size, size, hints, hot, hot_at: 0, hot_done: 0, next: 0, zero, zero_open, zero_known }
    }

    /// The source's heat: ranges of bytes with their scores; 0 is never written. Ignored by [`Order::Sequential`].
    pub fn set_heat(&mut self, heat: &[(ByteRange, u32)]) {
        if self.policy == Order::Sequential {
            return;
        }
        let mut hot: Vec<(u32, BlockRange)> = heat
            .iter()
            .filter(|(range, score)| *score > 0 && !range.is_empty())
            .map(|(range, score)| (*score, self.block_size.cover(*range)))
            .collect();
        // A stable sort: ranges of equal heat stay in the order of the disk.
        hot.sort_by_key(|(score, _)| std::cmp::Reverse(*score));
        self.hot = hot.into_iter().map(|(_, range)| range).collect();
        (self.hot_at, self.hot_done) = (0, 0);
    }

    /// What was written at the source, by falling heat, whether it is here already or not.
    pub fn hot(&self) -> Arc<[BlockRange]> {
        self.hot.clone()
    }

    /// The source's zero extents in order, all of them. Of each only the whole blocks count.
    pub fn set_zero(&mut self, extents: impl IntoIterator<Item = ByteRange>) {
        self.expect_zero();
        self.add_zero(extents, u64::MAX);
    }

    /// The zero extents are to come: what is not hinted at or hot waits for them.
    pub fn expect_zero(&mut self) {
        self.zero.clear();
        (self.zero_open, self.zero_known) = (None, 0);
    }

    /// The next zero extents, behind those that are known: now all of them below the byte `known` are. `false` when there
    /// is no room for more.
    pub fn add_zero(&mut self, extents: impl IntoIterator<Item = ByteRange>, known: u64) -> bool {
        for extent in extents {
            match &mut self.zero_open {
                Some(last) if last.end == extent.start => last.end = extent.end,
                _ => {
                    self.keep_zero();
                    self.zero_open = Some(extent);
                }
            }
        }
        self.keep_zero();
        self.zero_known = if known >= self.size { u64::MAX } else { known / self.block_size.bytes() };
        self.zero.len() < MAX_ZERO_EXTENTS
    }

    /// The whole blocks of the last extent count; the rest of it may go on.
    fn keep_zero(&mut self) {
        let Some(extent) = self.zero_open else { return };
        let whole = self.block_size.inside(extent, self.size);
        if whole.is_empty() {
            return;
        }
        let rest = (whole.end.0 * self.block_size.bytes()).min(extent.end);
        self.zero_open = Some(ByteRange::new(rest, extent.end));
        let room = self.zero.len() < MAX_ZERO_EXTENTS;
        match self.zero.last_mut() {
            Some(last) if last.end == whole.start => last.end = whole.end,
            Some(last) if last.end > whole.start => {}
            _ if room => self.zero.push(whole),
            _ => {}
        }
    }

    /// Whether all blocks of a range lie in one zero extent of the source.
    pub fn is_zero(&self, blocks: BlockRange) -> bool {
        let extent = self.zero.get(self.zero.partition_point(|zero| zero.end <= blocks.start));
        extent.is_some_and(|zero| zero.start <= blocks.start && blocks.end <= zero.end)
    }

    /// A client needed these blocks: the rest of their region comes next, then the regions behind it.
    pub fn hint(&mut self, asked: BlockRange) {
        if asked.is_empty() {
            return;
        }
        let region = REGION.max(self.block_size.bytes()) / self.block_size.bytes();
        let blocks = self.block_size.count(self.size);
        let start = asked.start.0 / region * region;
        let end = (asked.end.0.div_ceil(region) * region + HINT_SPAN / self.block_size.bytes()).min(blocks);
        let ahead = BlockRange::new(asked.end.min(BlockIndex(end)), BlockIndex(end));
        let behind = BlockRange::new(BlockIndex(start), asked.start);
        // What an older hint says of the same blocks is said anew: a sequential reader leaves one hint, not many.
        self.hints.retain(|hint| hint.intersect(ahead).is_none() && hint.intersect(behind).is_none());
        let rest_of_region = ahead.end.0.min(asked.end.0.div_ceil(region) * region);
        let (near, far) = (BlockIndex(rest_of_region.max(ahead.start.0)), ahead.end);
        for part in [BlockRange::new(near, far), behind, BlockRange::new(ahead.start, near)] {
            if !part.is_empty() {
                self.hints.push_front(part);
            }
        }
        self.hints.truncate(MAX_HINTS);
    }

    /// The next step: missing blocks, contiguous, at most `max` of them where they must be fetched. `None` at the end
    /// of the pass, or of what is known of it. A block may come twice (in a hint and in its place) until it is present.
    pub fn next(&mut self, max: u64, map: &BlockMap) -> Option<Step> {
        while let Some(hint) = self.hints.pop_front() {
            if let Some(step) = self.first_step(hint, max, map) {
                if step.range().end < hint.end {
                    self.hints.push_front(BlockRange::new(step.range().end, hint.end));
                }
                return Some(step);
            }
        }
        while let Some(range) = self.hot.get(self.hot_at).copied() {
            let from = range.start.0.max(self.hot_done).min(range.end.0);
            if let Some(step) = self.first_step(BlockRange::new(BlockIndex(from), range.end), max, map) {
                self.hot_done = step.range().end.0;
                return Some(step);
            }
            (self.hot_at, self.hot_done) = (self.hot_at + 1, 0);
        }
        let end = map.blocks().min(self.zero_known);
        let rest = BlockRange::new(BlockIndex(self.next.min(end)), BlockIndex(end));
        let step = self.first_step(rest, max, map).map(|step| step.on_grid(max));
        self.next = step.map_or(end, |step| step.range().end.0);
        step
    }

    /// Begins the pass anew: what is still missing comes again.
    pub fn rewind(&mut self) {
        (self.hot_at, self.hot_done, self.next) = (0, 0, 0);
    }

    fn first_step(&self, range: BlockRange, max: u64, map: &BlockMap) -> Option<Step> {
        let start = map.first_missing(range)?;
        // Only so far is the map looked at: the run may go on for the rest of the disk.
        let run = |end: BlockIndex, longest: u64| {
            let end = end.0.min(start.0.saturating_add(longest.max(1))).min(range.end.0);
            map.missing_in(BlockRange::new(start, BlockIndex(end))).next()
        };
        let zero = self.zero.get(self.zero.partition_point(|zero| zero.end <= start));
        match zero {
            Some(zero) if zero.start <= start => run(zero.end, MAX_ZERO_STEP / self.block_size.bytes()).map(Step::Zero),
            Some(zero) => run(zero.start, max).map(Step::Fetch),
            None => run(range.end, max).map(Step::Fetch),
        }
    }
}

#[cfg(test)]
#[path = "order_tests.rs"]
mod tests;
