//! A disk's map as a picture: so many cells, each of them an equal part of the disk. Pure.

use serde::{Deserialize, Serialize};

use crate::block_map::BlockMap;
use crate::units::{BlockIndex, BlockRange};

/// What a picture of the map shows. The lists have one entry a cell, in the order of the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overview {
    /// The disk, in bytes.
    pub size: u64,
    /// The unit of the map, in bytes.
    pub block_size: u64,
    /// How much of the cell is in the local store, in thousandths: 0 and 1000 mean exactly none and all of it.
    pub present: Vec<u16>,
    /// How much of it was written here since the handover, in the same way.
    pub dirty: Vec<u16>,
    /// 1 where the source's container wrote before the handover, or this host's clients on a disk that is their own.
    pub hot: Vec<u8>,
}

/// The picture of a map in at most `cells` cells. `hot` may name its blocks in any order.
pub(super) fn overview(
    map: &BlockMap,
    (size, block_size): (u64, u64),
    hot: impl Iterator<Item = BlockRange>,
    cells: usize,
) -> Overview {
    let blocks = map.blocks();
    let cells = (cells as u64).min(blocks);
    let edge = |cell: u64| (u128::from(cell) * u128::from(blocks) / u128::from(cells.max(1))) as u64;
    let mut picture = Overview {
        size,
        block_size,
        present: Vec::with_capacity(cells as usize),
        dirty: Vec::with_capacity(cells as usize),
        hot: vec![0; cells as usize],
    };
    for cell in 0..cells {
        let range = BlockRange::new(BlockIndex(edge(cell)), BlockIndex(edge(cell + 1)));
        let (present, dirty) = map.count_in(range);
        picture.present.push(thousandths(present, range.len()));
        picture.dirty.push(thousandths(dirty, range.len()));
    }
    for range in hot.filter(|range| range.start < range.end && range.start.0 < blocks) {
        let cell_of = |block: u64| {
            let near = (u128::from(block) * u128::from(cells) / u128::from(blocks)) as u64;
            if near + 1 < cells && edge(near + 1) <= block { near + 1 } else { near }
        };
        let last = cell_of(range.end.0.min(blocks) - 1);
        (cell_of(range.start.0)..=last).for_each(|cell| picture.hot[cell as usize] = 1);
    }
    picture
}

fn thousandths(part: u64, whole: u64) -> u16 {
    match (part, whole) {
        (0, _) => 0,
        (part, whole) if part >= whole => 1000,
        // Between one and 999: the ends are exact.
        (part, whole) => ((u128::from(part) * 1000 / u128::from(whole)) as u16).clamp(1, 999),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, end: u64) -> BlockRange {
        BlockRange::new(BlockIndex(start), BlockIndex(end))
    }

    #[test]
    fn a_cell_is_full_only_when_all_of_it_is_there() {
        let map = BlockMap::empty(100_000);
        map.set_present(range(0, 49_999));
        map.set_present(range(99_999, 100_000));
        map.set_dirty(range(0, 1));
        let picture = overview(&map, (100_000 * 4096, 4096), [range(0, 1), range(60_000, 60_001)].into_iter(), 4);
        assert_eq!((picture.present, picture.dirty), (vec![1000, 999, 0, 1], vec![1, 0, 0, 0]));
        assert_eq!(picture.hot, [1, 0, 1, 0]);
    }

    #[test]
    fn there_are_no_more_cells_than_blocks() {
        let map = BlockMap::full(3);
        let picture = overview(&map, (3 * 4096, 4096), std::iter::empty(), 100);
        assert_eq!((picture.present, picture.hot), (vec![1000; 3], vec![0; 3]));
    }

    proptest! {
        #[test]
        fn hot_blocks_are_in_the_cells_that_hold_them(blocks in 1u64..5000, cells in 1usize..300, at in 0u64..5000, len in 1u64..900) {
            let hot = range(at.min(blocks - 1), (at.min(blocks - 1) + len).min(blocks));
            let map = BlockMap::empty(blocks);
            map.set_present(hot);
            let picture = overview(&map, (blocks * 4096, 4096), std::iter::once(hot), cells);
            let there: Vec<u8> = picture.present.iter().map(|share| u8::from(*share > 0)).collect();
            prop_assert_eq!(picture.hot, there);
        }
    }
}
