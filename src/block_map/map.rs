//! The present and dirty planes. Reads take no lock; a bit that was set is never taken back.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::{HeapPlanes, Planes, WORDS_PER_PAGE, codec, pages_for, words_for};
use crate::units::{BlockIndex, BlockRange};

/// Which blocks are present and which are dirty.
///
/// Setting a bit publishes what was done before it (release), and seeing a bit shows it (acquire): a reader that sees a
/// block present sees the bytes that were written for it.
pub struct BlockMap {
    planes: Box<dyn Planes>,
    blocks: u64,
    present_count: AtomicU64,
    dirty_count: AtomicU64,
    complete: AtomicBool,
    /// One bit a durable page: its words changed since [`BlockMap::take_changed`].
    changed: Box<[AtomicU64]>,
}

impl BlockMap {
    /// A map over memory that may hold bits already. Bits beyond the last block and dirty bits of missing blocks are
    /// cleared: a write that died before its present bit was never acknowledged.
    ///
    /// Planes that are too short for `blocks` are a bug of the caller and make the surplus blocks missing for ever.
    pub fn new(planes: Box<dyn Planes>, blocks: u64) -> Self {
        let words = words_for(blocks);
        debug_assert!(planes.present().len() >= words && planes.dirty().len() >= words);
        let (mut present_count, mut dirty_count) = (0, 0);
        for word in 0..words {
            let valid = match blocks - word as u64 * 64 {
                left if left < 64 => (1u64 << left) - 1,
                _ => u64::MAX,
            };
            let (found_present, found_dirty) = (&planes.present()[word], &planes.dirty()[word]);
            let (was_present, was_dirty) = (found_present.load(Ordering::Relaxed), found_dirty.load(Ordering::Relaxed));
            let present = was_present & valid;
            let dirty = was_dirty & present;
            // Memory that is right already is not written: it may not have been taken yet.
            if present != was_present {
                found_present.store(present, Ordering::Relaxed);
            }
            if dirty != was_dirty {
                found_dirty.store(dirty, Ordering::Relaxed);
            }
            present_count += u64::from(present.count_ones());
            dirty_count += u64::from(dirty.count_ones());
        }
        let changed = (0..pages_for(blocks).div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self {
            planes,
            blocks,
            present_count: AtomicU64::new(present_count),
            dirty_count: AtomicU64::new(dirty_count),
            complete: AtomicBool::new(present_count == blocks),
            changed,
        }
    }

    /// A map on the heap with nothing present.
    pub fn empty(blocks: u64) -> Self {
        Self::new(Box::new(HeapPlanes::new(blocks)), blocks)
    }

    /// A map on the heap with everything present and clean.
    pub fn full(blocks: u64) -> Self {
        let planes = HeapPlanes::new(blocks);
        planes.present().iter().for_each(|word| word.store(u64::MAX, Ordering::Relaxed));
        Self::new(Box::new(planes), blocks)
    }

    /// How many blocks the disk has.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The whole disk.
    pub fn whole(&self) -> BlockRange {
        BlockRange::new(BlockIndex(0), BlockIndex(self.blocks))
    }

    /// Every block is present: the fast check of the warm path.
    #[inline]
    pub fn all_present(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// How many blocks are present.
    pub fn present_blocks(&self) -> u64 {
        self.present_count.load(Ordering::Acquire)
    }

    /// How many blocks are dirty.
    pub fn dirty_blocks(&self) -> u64 {
        self.dirty_count.load(Ordering::Acquire)
    }

    /// Whether every block of the range is present.
    pub fn is_present(&self, range: BlockRange) -> bool {
        self.all_present() || words(range).all(|(word, mask)| self.present_word(word) & mask == mask)
    }

    /// Whether a block was written locally.
    pub fn is_dirty(&self, block: BlockIndex) -> bool {
        let word = self.planes.dirty().get((block.0 / 64) as usize);
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (block.0 % 64) & 1 == 1)
    }

    /// Marks blocks present: their bytes are in the store. Answers how many were missing.
    pub fn set_present(&self, range: BlockRange) -> u64 {
        let added = self.set(self.planes.present(), range);
        if added > 0 && self.present_count.fetch_add(added, Ordering::AcqRel) + added == self.blocks {
            self.complete.store(true, Ordering::Release);
        }
        added
    }

    /// Marks blocks dirty. For a present block this comes before its bytes change; for a missing one after its bytes
    /// were written and before it becomes present. Answers how many were clean.
    pub fn set_dirty(&self, range: BlockRange) -> u64 {
        let added = self.set(self.planes.dirty(), range);
        self.dirty_count.fetch_add(added, Ordering::AcqRel);
        added
    }

    /// The first missing block at or after `from`.
    pub fn next_missing(&self, from: BlockIndex) -> Option<BlockIndex> {
        self.missing_in(BlockRange::new(from.min(BlockIndex(self.blocks)), BlockIndex(self.blocks)))
            .next()
            .map(|r| r.start)
    }

    /// The maximal runs of missing blocks within a range, in order. What becomes present meanwhile may or may not be
    /// reported.
    pub fn missing_in(&self, range: BlockRange) -> MissingRuns<'_> {
        let end = if self.all_present() { range.start.0 } else { range.end.0.min(self.blocks) };
        MissingRuns { map: self, at: range.start.0, end }
    }

    /// The first missing block of a range.
    pub fn first_missing(&self, range: BlockRange) -> Option<BlockIndex> {
        let mut runs = self.missing_in(range);
        runs.skip_to(false);
        (runs.at < runs.end).then_some(BlockIndex(runs.at))
    }

    /// The first block from `from`, below `end`, whose (present, dirty) pair differs from that of `from`; and the pair.
    pub fn same_state(&self, from: BlockIndex, end: BlockIndex) -> (BlockIndex, bool, bool) {
        let pair = |word: usize| (self.present_word(word), self.planes.dirty()[word].load(Ordering::Acquire));
        let (present, dirty) = pair((from.0 / 64) as usize);
        let first = (present >> (from.0 % 64) & 1 == 1, dirty >> (from.0 % 64) & 1 == 1);
        let flip = |bit: bool| if bit { u64::MAX } else { 0 };
        let mut at = from.0;
        while at < end.0 {
            let (present, dirty) = pair((at / 64) as usize);
            let differs = ((present ^ flip(first.0)) | (dirty ^ flip(first.1))) >> (at % 64);
            if differs != 0 {
                at += u64::from(differs.trailing_zeros());
                break;
            }
            at = (at / 64 + 1) * 64;
        }
        (BlockIndex(at.min(end.0)), first.0, first.1)
    }

    /// How many blocks of a range are present, and how many are dirty.
    pub fn count_in(&self, range: BlockRange) -> (u64, u64) {
        let range = BlockRange::new(range.start, range.end.min(BlockIndex(self.blocks)));
        words(range).fold((0, 0), |(present, dirty), (word, mask)| {
            let bits = |plane: &[AtomicU64]| u64::from((plane[word].load(Ordering::Relaxed) & mask).count_ones());
            (present + bits(self.planes.present()), dirty + bits(self.planes.dirty()))
        })
    }

    /// Pages of the durable form that changed since they were last taken: the first `max` of them from page `from` on, in
    /// order. Whoever fails to persist them gives them back with [`BlockMap::mark_changed`].
    pub fn take_changed(&self, from: usize, max: usize) -> Vec<usize> {
        let mut pages = Vec::new();
        for (index, word) in self.changed.iter().enumerate().skip(from / 64) {
            let mut wanted = word.load(Ordering::Relaxed);
            if index == from / 64 {
                wanted &= u64::MAX << (from % 64);
            }
            while wanted.count_ones() as usize > max - pages.len() {
                wanted &= !(1 << wanted.ilog2());
            }
            if wanted == 0 {
                continue;
            }
            let mut bits = word.fetch_and(!wanted, Ordering::AcqRel) & wanted;
            while bits != 0 {
                pages.push(index * 64 + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
            if pages.len() == max {
                break;
            }
        }
        pages
    }

    /// A page of the durable form must be written at the next chance.
    pub fn mark_changed(&self, page: usize) {
        if let Some(word) = self.changed.get(page / 64) {
            word.fetch_or(1 << (page % 64), Ordering::AcqRel);
        }
    }

    /// The words of one page as they are now: present first, so that no dirty bit is missed of a block that is seen.
    pub fn snapshot(&self, page: usize) -> codec::PageWords {
        let mut words = codec::PageWords::default();
        let first = page * WORDS_PER_PAGE;
        for (slot, word) in (first..(first + WORDS_PER_PAGE).min(words_for(self.blocks))).enumerate() {
            words.present[slot] = self.present_word(word);
            words.dirty[slot] = self.planes.dirty()[word].load(Ordering::Acquire) & words.present[slot];
        }
        words
    }

    fn present_word(&self, word: usize) -> u64 {
        self.planes.present().get(word).map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn set(&self, plane: &[AtomicU64], range: BlockRange) -> u64 {
        let range = BlockRange::new(range.start.min(BlockIndex(self.blocks)), range.end.min(BlockIndex(self.blocks)));
        let mut added = 0;
        for (word, mask) in words(range) {
            // The load spares the warm path a locked instruction: nearly always the bits are there already.
            if plane[word].load(Ordering::Acquire) & mask == mask {
                continue;
            }
            let new = mask & !plane[word].fetch_or(mask, Ordering::AcqRel);
            if new != 0 {
                added += u64::from(new.count_ones());
                self.mark_changed(word / WORDS_PER_PAGE);
            }
        }
        added
    }
}

/// The word indexes and masks that a range touches.
fn words(range: BlockRange) -> impl Iterator<Item = (usize, u64)> {
    let (start, end) = (range.start.0, range.end.0);
    let last = if start < end { (end - 1) / 64 + 1 } else { start / 64 };
    (start / 64..last).map(move |word| {
        let low = if word == start / 64 { u64::MAX << (start % 64) } else { u64::MAX };
        let high = if end - word * 64 < 64 { (1u64 << (end - word * 64)) - 1 } else { u64::MAX };
        (word as usize, low & high)
    })
}

/// See [`BlockMap::missing_in`].
pub struct MissingRuns<'a> {
    map: &'a BlockMap,
    at: u64,
    end: u64,
}

impl MissingRuns<'_> {
    /// Moves on to the first block whose presence is `wanted`.
    fn skip_to(&mut self, wanted: bool) {
        while self.at < self.end {
            let present = self.map.present_word((self.at / 64) as usize);
            let bits = (if wanted { present } else { !present }) >> (self.at % 64);
            if bits != 0 {
                self.at = (self.at + u64::from(bits.trailing_zeros())).min(self.end);
                return;
            }
            self.at = ((self.at / 64 + 1) * 64).min(self.end);
        }
    }
}

impl Iterator for MissingRuns<'_> {
    type Item = BlockRange;

    fn next(&mut self) -> Option<BlockRange> {
        self.skip_to(false);
        let start = self.at;
        self.skip_to(true);
        (start < self.at).then(|| BlockRange::new(BlockIndex(start), BlockIndex(self.at)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Setter = fn(&BlockMap, BlockRange) -> u64;

    #[derive(Clone, Debug)]
    enum Op {
        Present(u64, u64),
        Dirty(u64, u64),
    }

    fn range(a: u64, b: u64) -> BlockRange {
        BlockRange::new(BlockIndex(a.min(b)), BlockIndex(a.max(b)))
    }

    fn ops(blocks: u64) -> impl Strategy<Value = Vec<Op>> {
        let op = (0..=blocks, 0..=blocks, any::<bool>())
            .prop_map(|(a, b, present)| if present { Op::Present(a, b) } else { Op::Dirty(a, b) });
        prop::collection::vec(op, 0..24)
    }

    proptest! {
        /// The map against two plain vectors of booleans.
        #[test]
        fn the_map_is_two_sets_of_blocks(blocks in 1u64..300, seed in ops(300), look in (0u64..300, 0u64..300)) {
            let map = BlockMap::empty(blocks);
            let (mut present, mut dirty) = (vec![false; blocks as usize], vec![false; blocks as usize]);
            for op in seed {
                let (plane, (a, b), set): (&mut Vec<bool>, _, Setter) = match op {
                    Op::Present(a, b) => (&mut present, (a, b), BlockMap::set_present),
                    Op::Dirty(a, b) => (&mut dirty, (a, b), BlockMap::set_dirty),
                };
                let asked = range(a.min(blocks), b.min(blocks));
                let added = asked.iter().filter(|b| !std::mem::replace(&mut plane[b.0 as usize], true)).count();
                prop_assert_eq!(set(&map, asked), added as u64);
            }
            prop_assert_eq!(map.present_blocks(), present.iter().filter(|p| **p).count() as u64);
            prop_assert_eq!(map.dirty_blocks(), dirty.iter().filter(|d| **d).count() as u64);
            prop_assert_eq!(map.all_present(), present.iter().all(|p| *p));
            let asked = range(look.0.min(blocks), look.1.min(blocks));
            prop_assert_eq!(map.is_present(asked), asked.iter().all(|b| present[b.0 as usize]));
            let runs: Vec<BlockRange> = map.missing_in(asked).collect();
            let listed: Vec<BlockIndex> = runs.iter().flat_map(|run| run.iter()).collect();
            let missing: Vec<BlockIndex> = asked.iter().filter(|b| !present[b.0 as usize]).collect();
            prop_assert_eq!(listed, missing);
            for pair in runs.windows(2) {
                prop_assert!(pair[0].end < pair[1].start, "runs that touch are one run");
            }
            let first = (asked.start.0..blocks).find(|b| !present[*b as usize]).map(BlockIndex);
            prop_assert_eq!(map.next_missing(asked.start), first);
            if asked.start.0 < blocks {
                let of = |b: u64| (present[b as usize], dirty[b as usize]);
                let end = (asked.start.0..blocks).find(|b| of(*b) != of(asked.start.0)).unwrap_or(blocks);
                let (found, p, d) = map.same_state(asked.start, BlockIndex(blocks));
                prop_assert_eq!((found, (p, d)), (BlockIndex(end), of(asked.start.0)));
            }
        }
    }

    #[test]
    fn bits_left_by_a_dead_process_are_made_consistent() {
        let planes = HeapPlanes::new(70);
        planes.present()[0].store(0b0101, Ordering::Relaxed);
        planes.dirty()[0].store(0b0110, Ordering::Relaxed);
        planes.present()[1].store(u64::MAX, Ordering::Relaxed);
        let map = BlockMap::new(Box::new(planes), 70);
        assert_eq!((map.present_blocks(), map.dirty_blocks()), (2 + 6, 1));
        assert!(map.is_dirty(BlockIndex(2)) && !map.is_dirty(BlockIndex(1)));
    }

    #[test]
    fn only_pages_with_new_bits_are_changed() {
        let map = BlockMap::empty(3 * super::super::BLOCKS_PER_PAGE);
        let block = BlockIndex(super::super::BLOCKS_PER_PAGE + 7);
        map.set_present(BlockRange::new(block, BlockIndex(block.0 + 1)));
        assert_eq!(map.take_changed(0, 9), vec![1]);
        map.set_present(BlockRange::new(block, BlockIndex(block.0 + 1)));
        assert_eq!(map.take_changed(0, 9), Vec::<usize>::new());
        map.set_dirty(map.whole());
        assert_eq!(map.take_changed(0, 9), vec![0, 1, 2]);
    }

    #[test]
    fn changed_pages_are_taken_in_parts_and_each_once() {
        let map = BlockMap::empty(200 * super::super::BLOCKS_PER_PAGE);
        let marked = [0, 1, 62, 63, 64, 70, 128, 199];
        marked.iter().for_each(|page| map.mark_changed(*page));
        assert_eq!(map.take_changed(1, 3), [1, 62, 63]);
        assert_eq!(map.take_changed(64, 1), [64]);
        assert_eq!(map.take_changed(0, 0), [0; 0]);
        assert_eq!(map.take_changed(0, 100), [0, 70, 128, 199]);
        assert_eq!(map.take_changed(300, 100), [0; 0]);
    }
}
