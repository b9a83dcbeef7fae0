//! Arithmetic on lists of block ranges. Pure.

use smallvec::{SmallVec, smallvec};

use crate::units::BlockRange;

/// A list that is nearly always short.
pub(crate) type Ranges = SmallVec<[BlockRange; 2]>;

/// Whether two ranges have a block in common.
pub(crate) fn intersects(a: BlockRange, b: BlockRange) -> bool {
    a.intersect(b).is_some()
}

/// What is left of a range without the blocks of `holes` (in any order, they may overlap).
pub(crate) fn subtract(range: BlockRange, holes: &[BlockRange]) -> Ranges {
    // What it nearly always is.
    match holes {
        _ if range.is_empty() => return Ranges::new(),
        [] => return smallvec![range],
        [hole] if hole.start <= range.start && range.end <= hole.end => return Ranges::new(),
        _ => {}
    }
    let mut holes: Ranges = holes.iter().filter_map(|hole| hole.intersect(range)).collect();
    holes.sort_by_key(|hole| hole.start);
    let (mut left, mut at) = (Ranges::new(), range.start);
    for hole in holes {
        if at < hole.start {
            left.push(BlockRange::new(at, hole.start));
        }
        at = at.max(hole.end);
    }
    if at < range.end {
        left.push(BlockRange::new(at, range.end));
    }
    left
}

/// The same with holes that are mostly none.
pub(crate) fn subtract_each(range: BlockRange, holes: impl Iterator<Item = BlockRange>) -> Ranges {
    let mut holes = holes.peekable();
    match holes.peek() {
        None => subtract(range, &[]),
        Some(_) => subtract(range, &holes.collect::<Ranges>()),
    }
}

/// What is left of several ranges.
pub(crate) fn without(ranges: &[BlockRange], holes: &[BlockRange]) -> Ranges {
    ranges.iter().flat_map(|range| subtract(*range, holes)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::units::BlockIndex;

    fn range() -> impl Strategy<Value = BlockRange> {
        (0u64..60, 0u64..20).prop_map(|(at, len)| BlockRange::new(BlockIndex(at), BlockIndex(at + len)))
    }

    proptest! {
        #[test]
        fn subtracting_leaves_exactly_the_other_blocks(whole in range(), holes in prop::collection::vec(range(), 0..6)) {
            let left: Vec<BlockIndex> = subtract(whole, &holes).into_iter().flat_map(|r| r.iter()).collect();
            let wanted: Vec<BlockIndex> = whole.iter().filter(|b| !holes.iter().any(|h| h.contains(*b))).collect();
            prop_assert_eq!(left, wanted);
        }
    }
}
