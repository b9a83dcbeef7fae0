//! Units as types: a block is not a byte, an epoch is not a number.
//!
//! Everything here is plain arithmetic; all ranges are half open.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The size of a block of the block map: a power of two, 4 KiB to 1 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct BlockSize(u32);

/// A block size that is not a power of two between 4 KiB and 1 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("block size {0} is not a power of two between 4096 and 1048576")]
pub struct BadBlockSize(pub u32);

impl BlockSize {
    /// 4 KiB: the default.
    pub const DEFAULT: BlockSize = BlockSize(4096);

    /// Checks the bounds.
    pub fn new(bytes: u32) -> Result<Self, BadBlockSize> {
        if bytes.is_power_of_two() && (4096..=1 << 20).contains(&bytes) {
            Ok(Self(bytes))
        } else {
            Err(BadBlockSize(bytes))
        }
    }

    /// In bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// How many blocks a disk of `size` bytes has; the last one may be partial.
    pub fn count(self, size: u64) -> u64 {
        size.div_ceil(self.bytes())
    }

    /// The block that holds a byte.
    pub fn index(self, offset: u64) -> BlockIndex {
        BlockIndex(offset / self.bytes())
    }

    /// The blocks that a byte range touches.
    pub fn cover(self, range: ByteRange) -> BlockRange {
        if range.is_empty() {
            return BlockRange::new(self.index(range.start), self.index(range.start));
        }
        BlockRange::new(self.index(range.start), BlockIndex(range.end.div_ceil(self.bytes())))
    }

    /// The blocks that a byte range covers whole, on a disk of `size` bytes (a partial last block counts as covered when
    /// the range reaches the end of the disk). Empty when there is none.
    pub fn inside(self, range: ByteRange, size: u64) -> BlockRange {
        let start = range.start.div_ceil(self.bytes());
        let end = if range.end >= size { self.count(size) } else { range.end / self.bytes() };
        BlockRange::new(BlockIndex(start), BlockIndex(end.max(start)))
    }

    /// The bytes of a block range on a disk of `size` bytes: the last block is cut at the end of the disk.
    pub fn bytes_of(self, blocks: BlockRange, size: u64) -> ByteRange {
        ByteRange::new((blocks.start.0 * self.bytes()).min(size), (blocks.end.0 * self.bytes()).min(size))
    }
}

impl TryFrom<u32> for BlockSize {
    type Error = BadBlockSize;
    fn try_from(bytes: u32) -> Result<Self, Self::Error> {
        Self::new(bytes)
    }
}

impl From<BlockSize> for u32 {
    fn from(size: BlockSize) -> u32 {
        size.0
    }
}

/// The number of a block, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u64);

/// A half-open range of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockRange {
    /// First block.
    pub start: BlockIndex,
    /// One past the last.
    pub end: BlockIndex,
}

impl BlockRange {
    /// `start` up to, not including, `end`. An end before the start is a bug of the caller.
    pub fn new(start: BlockIndex, end: BlockIndex) -> Self {
        debug_assert!(start <= end, "block range {}..{}", start.0, end.0);
        Self { start, end }
    }

    /// In blocks.
    pub fn len(self) -> u64 {
        self.end.0 - self.start.0
    }

    /// No block at all.
    pub fn is_empty(self) -> bool {
        self.start >= self.end
    }

    /// Whether a block lies in it.
    pub fn contains(self, block: BlockIndex) -> bool {
        self.start <= block && block < self.end
    }

    /// What both have in common, if anything.
    pub fn intersect(self, other: BlockRange) -> Option<BlockRange> {
        let (start, end) = (self.start.max(other.start), self.end.min(other.end));
        (start < end).then(|| BlockRange::new(start, end))
    }

    /// Every block of it, in order.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = BlockIndex> {
        (self.start.0..self.end.0).map(BlockIndex)
    }
}

/// A half-open range of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// One past the last.
    pub end: u64,
}

impl ByteRange {
    /// `start` up to, not including, `end`. An end before the start is a bug of the caller.
    pub fn new(start: u64, end: u64) -> Self {
        debug_assert!(start <= end, "byte range {start}..{end}");
        Self { start, end }
    }

    /// From an offset and a length that are known not to overflow (the NBD server has checked them).
    pub fn at(offset: u64, length: u64) -> Self {
        Self::new(offset, offset + length)
    }

    /// In bytes.
    pub fn len(self) -> u64 {
        self.end - self.start
    }

    /// No byte at all.
    pub fn is_empty(self) -> bool {
        self.start >= self.end
    }
}

/// A number that rises with every change of a disk's ownership: the fencing token. 0 is before the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Epoch(pub u64);

/// A number that no disk can have come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no epoch: a disk's ownership has not changed so often")]
pub struct BadEpoch(u64);

impl Epoch {
    /// The highest that is believed of a peer or a file: beyond it, none would be left to rise to.
    pub const MAX: Epoch = Epoch(1 << 62);

    /// The epoch after this one.
    pub fn next(self) -> Epoch {
        Epoch(self.0 + 1)
    }
}

impl TryFrom<u64> for Epoch {
    type Error = BadEpoch;

    fn try_from(number: u64) -> Result<Epoch, BadEpoch> {
        if number <= Epoch::MAX.0 { Ok(Epoch(number)) } else { Err(BadEpoch(number)) }
    }
}

impl From<Epoch> for u64 {
    fn from(epoch: Epoch) -> u64 {
        epoch.0
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A point on the clock that counts from this host's boot and also runs while it is suspended (CLOCK_BOOTTIME).
/// Never compared between hosts, never stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootTime(Duration);

impl BootTime {
    /// From the time since boot.
    pub const fn new(since_boot: Duration) -> Self {
        Self(since_boot)
    }

    /// The time since boot.
    pub const fn since_boot(self) -> Duration {
        self.0
    }

    /// This point and `span` later.
    pub fn after(self, span: Duration) -> Self {
        Self(self.0.saturating_add(span))
    }

    /// How long it is from `earlier` to here; zero when `earlier` is not earlier.
    pub fn since(self, earlier: BootTime) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// What an image's file says of itself: whoever writes to it behind the node's back changes this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageMark {
    /// When its content was last changed, in nanoseconds of the file system's clock.
    pub modified_ns: i64,
    /// Its size in bytes.
    pub size: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_last_block_is_covered_only_by_a_range_that_reaches_the_end() {
        let block = BlockSize::DEFAULT;
        let size = 4096 * 2 + 100;
        assert_eq!(block.count(size), 3);
        assert_eq!(block.inside(ByteRange::new(4096, size), size), BlockRange::new(BlockIndex(1), BlockIndex(3)));
        assert_eq!(block.inside(ByteRange::new(4096, size - 1), size), BlockRange::new(BlockIndex(1), BlockIndex(2)));
        assert_eq!(block.bytes_of(BlockRange::new(BlockIndex(2), BlockIndex(3)), size), ByteRange::new(8192, size));
    }

    #[test]
    fn a_range_inside_one_block_covers_none() {
        let block = BlockSize::DEFAULT;
        assert!(block.inside(ByteRange::new(10, 4000), 1 << 20).is_empty());
        assert!(block.inside(ByteRange::new(4097, 8191), 1 << 20).is_empty());
        assert_eq!(block.cover(ByteRange::new(4095, 4097)).len(), 2);
    }
}
