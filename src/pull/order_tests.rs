//! Tests of the order: examples, and a property test that every missing block comes, and zeroes are never fetched.

use proptest::prelude::*;

use super::*;

const BLOCK: BlockSize = BlockSize::DEFAULT;
const PER_REGION: u64 = REGION / 4096;

fn run(start: u64, end: u64) -> BlockRange {
    BlockRange::new(BlockIndex(start), BlockIndex(end))
}

fn region(index: u64) -> ByteRange {
    ByteRange::at(index * REGION, REGION)
}

fn blocks_of(region: u64) -> BlockRange {
    run(region * PER_REGION, (region + 1) * PER_REGION)
}

/// All steps of a pass, each made present at once.
fn drain(order: &mut PullOrder, map: &BlockMap) -> Vec<Step> {
    std::iter::from_fn(|| {
        let step = order.next(PER_REGION, map)?;
        assert!(map.set_present(step.range()) == step.range().len(), "a step is of missing blocks only");
        Some(step)
    })
    .collect()
}

#[test]
fn hot_regions_come_first_and_then_the_rest_in_order() {
    let map = BlockMap::empty(6 * PER_REGION);
    let mut order = PullOrder::new(Order::Dirty, BLOCK, 6 * REGION);
    order.set_heat(&[(region(0), 0), (region(1), 5), (region(2), 0), (region(3), 70), (region(4), 5)]);
    let steps = drain(&mut order, &map);
    let wanted: Vec<Step> = [3, 1, 4, 0, 2, 5].map(|r| Step::Fetch(blocks_of(r))).into();
    assert_eq!(steps, wanted);
}

#[test]
fn a_sequential_order_ignores_heat() {
    let map = BlockMap::empty(3 * PER_REGION);
    let mut order = PullOrder::new(Order::Sequential, BLOCK, 3 * REGION);
    order.set_heat(&[(region(2), 9)]);
    assert_eq!(order.next(PER_REGION, &map), Some(Step::Fetch(blocks_of(0))));
}

#[test]
fn the_neighbourhood_of_a_fault_comes_next() {
    let map = BlockMap::empty(40 * PER_REGION);
    let mut order = PullOrder::new(Order::Dirty, BLOCK, 40 * REGION);
    order.set_heat(&[(region(1), 9)]);
    let fault = run(20 * PER_REGION + 10, 20 * PER_REGION + 12);
    map.set_present(fault);
    order.hint(fault);
    let first: Vec<Step> = std::iter::from_fn(|| {
        let step = order.next(PER_REGION, &map)?;
        map.set_present(step.range());
        Some(step)
    })
    .take(12)
    .collect();
    let start = 20 * PER_REGION;
    let mut wanted = vec![Step::Fetch(run(start + 12, start + PER_REGION)), Step::Fetch(run(start, start + 10))];
    wanted.extend((21..29).map(|r| Step::Fetch(blocks_of(r))));
    wanted.extend([Step::Fetch(blocks_of(1)), Step::Fetch(blocks_of(0))]);
    assert_eq!(first, wanted);
}

#[test]
fn nothing_is_fetched_beyond_what_is_known_of_the_zeroes_but_what_is_hot_or_hinted_at() {
    let map = BlockMap::empty(6 * PER_REGION);
    let mut order = PullOrder::new(Order::Dirty, BLOCK, 6 * REGION);
    order.expect_zero();
    assert_eq!(drain(&mut order, &map), []);
    order.set_heat(&[(region(5), 1)]);
    assert_eq!(drain(&mut order, &map), [Step::Fetch(blocks_of(5))]);
    // Told in the middle of a block, which goes on as zeroes.
    order.add_zero([ByteRange::new(REGION, REGION + 5000)], REGION + 5000);
    let zero = Step::Zero(run(PER_REGION, PER_REGION + 1));
    assert_eq!(drain(&mut order, &map), [Step::Fetch(blocks_of(0)), zero]);
    order.add_zero([ByteRange::new(REGION + 5000, 3 * REGION)], 4 * REGION);
    let rest = Step::Zero(run(PER_REGION + 1, 3 * PER_REGION));
    assert_eq!(drain(&mut order, &map), [rest, Step::Fetch(blocks_of(3))]);
    assert!(order.is_zero(run(PER_REGION, 3 * PER_REGION)), "one extent, told in two parts");
    order.add_zero([], u64::MAX);
    assert_eq!(drain(&mut order, &map), [Step::Fetch(blocks_of(4))]);
    assert!(map.all_present());
}

#[test]
fn only_whole_blocks_of_a_zero_extent_are_skipped() {
    let map = BlockMap::empty(8);
    let mut order = PullOrder::new(Order::Dirty, BLOCK, 7 * 4096 + 100);
    order.set_zero([
        ByteRange::new(100, 4096),
        ByteRange::new(4096, 3 * 4096 + 5),
        ByteRange::new(6 * 4096, 7 * 4096 + 100),
    ]);
    let wanted = vec![Step::Fetch(run(0, 1)), Step::Zero(run(1, 3)), Step::Fetch(run(3, 6)), Step::Zero(run(6, 8))];
    assert_eq!(drain(&mut order, &map), wanted, "the last block is partial and zero to its end");
}

#[test]
fn what_failed_comes_again_after_a_rewind() {
    let map = BlockMap::empty(2 * PER_REGION);
    let mut order = PullOrder::new(Order::Dirty, BLOCK, 2 * REGION);
    order.set_heat(&[(region(1), 1)]);
    let pass = |order: &mut PullOrder| std::iter::from_fn(|| order.next(PER_REGION, &map)).collect::<Vec<Step>>();
    let first = pass(&mut order);
    assert_eq!(order.next(PER_REGION, &map), None);
    order.rewind();
    assert_eq!(pass(&mut order), first);
}

proptest! {
    /// Whatever is known and hinted: every missing block comes, requests are contiguous, short enough and of missing
    /// blocks, and a block is skipped if and only if it lies whole in a zero extent.
    #[test]
    fn every_missing_block_comes_and_zeroes_are_skipped(
        present in prop::collection::vec((0u64..1000, 1u64..80), 0..8),
        heat in prop::collection::vec((0u64..4, 0u32..50), 0..6),
        zero in prop::collection::vec((0u64..1000, 1u64..90_000u64), 0..8),
        hints in prop::collection::vec((0u64..1000, 1u64..9, 0usize..20), 0..5),
        max in 1u64..300,
    ) {
        let (blocks, size) = (1000, 1000 * 4096 - 77);
        let map = BlockMap::empty(blocks);
        for (at, len) in present {
            map.set_present(run(at, (at + len).min(blocks)));
        }
        let mut order = PullOrder::new(Order::Dirty, BLOCK, size);
        let heat: Vec<_> = heat.into_iter().map(|(r, score)| (ByteRange::new(r * REGION, ((r + 1) * REGION).min(size)), score)).collect();
        order.set_heat(&heat);
        let mut starts: Vec<(u64, u64)> = zero.into_iter().map(|(at, len)| (at * 3999, len)).collect();
        starts.sort_unstable();
        let mut extents: Vec<ByteRange> = Vec::new();
        for (at, len) in starts {
            let start = at.max(extents.last().map_or(0, |last| last.end)).min(size);
            extents.push(ByteRange::new(start, (start + len).min(size)));
        }
        order.set_zero(extents.iter().copied());
        let is_zero = |block: u64| {
            let (start, end) = (block * 4096, ((block + 1) * 4096).min(size));
            (start..end).step_by(77).chain([end - 1]).all(|byte| extents.iter().any(|e| e.start <= byte && byte < e.end))
        };
        let mut count = 0;
        while let Some(step) = order.next(max, &map) {
            for (at, len, when) in &hints {
                if *when == count {
                    order.hint(run(*at, (at + len).min(blocks)));
                }
            }
            prop_assert!(!step.range().is_empty());
            for block in step.range().iter() {
                prop_assert!(!map.is_present(run(block.0, block.0 + 1)));
                if matches!(step, Step::Zero(_)) {
                    prop_assert!(is_zero(block.0), "block {} is not zero", block.0);
                }
            }
            if let Step::Fetch(range) = step {
                prop_assert!(range.len() <= max);
            }
            map.set_present(step.range());
            count += 1;
        }
        prop_assert!(map.all_present());
    }
}
