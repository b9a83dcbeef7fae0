//! Tests of both forms of the map: power loss, process death, damage.

use std::path::Path;

use super::{BootId, FaultyStore, MapError, MapFile, MapFiles, Store};
use crate::block_map::codec::{self, BadHeader, Header, PAGE_BYTES};
use crate::block_map::{BLOCKS_PER_PAGE, BlockMap};
use crate::units::{BlockIndex, BlockRange, BlockSize};

const BOOT: BootId = BootId(7);
const OTHER_BOOT: BootId = BootId(8);

fn header(blocks: u64) -> Header {
    Header { size: blocks * 4096, block_size: BlockSize::DEFAULT, identity: "disk".into() }
}

fn run(start: u64, end: u64) -> BlockRange {
    BlockRange::new(BlockIndex(start), BlockIndex(end))
}

fn files(directory: &tempfile::TempDir) -> MapFiles {
    MapFiles::in_directory(directory.path())
}

fn open(files: &MapFiles, boot: BootId) -> Result<(BlockMap, MapFile), MapError> {
    let file = MapFile::open(&files.durable)?.expect("the map is there");
    files.open_in_boot(file, boot).map(|opened| (opened.map, opened.file))
}

fn new(blocks: u64) -> (tempfile::TempDir, BlockMap, MapFile) {
    let directory = tempfile::tempdir().unwrap();
    let files = files(&directory);
    let file = MapFile::create(&files.durable, &header(blocks)).unwrap();
    let opened = files.open_in_boot(file, BOOT).unwrap();
    (directory, opened.map, opened.file)
}

/// One right persist.
fn persist(map: &BlockMap, file: &mut MapFile, store: &dyn Store) {
    let snapshot = MapFile::snapshot(map, 0);
    let durable = store.sync().unwrap();
    file.commit(&snapshot, &durable).unwrap();
}

/// A persist, and in the middle of it a block that arrives.
type Persist = fn(&BlockMap, &mut MapFile, &FaultyStore, &dyn Fn());

/// A block arrives in the middle of a persist; then the power fails. Answers whether the map that is left claims a block
/// whose bytes are not there.
fn claims_too_much(persist_around: Persist) -> bool {
    let (directory, map, mut file) = new(8);
    let store = FaultyStore::new(8 * 4096);
    let arrive = |block: u64| {
        store.write_at(block * 4096, &[1; 4096]).unwrap();
        map.set_present(run(block, block + 1));
    };
    arrive(0);
    persist_around(&map, &mut file, &store, &|| arrive(1));
    drop(file);
    let (after, _) = open(&files(&directory), OTHER_BOOT).unwrap();
    let bytes = store.after_power_loss();
    assert!(after.is_present(run(0, 1)), "what was there before the persist is kept");
    (0..8).any(|block| after.is_present(run(block, block + 1)) && bytes[block as usize * 4096] != 1)
}

#[test]
fn no_bit_is_durable_before_its_bytes() {
    let wherever: [Persist; 3] = [
        |map, file, store, arrive| {
            arrive();
            persist(map, file, store);
        },
        |map, file, store, arrive| {
            let snapshot = MapFile::snapshot(map, 0);
            arrive();
            let durable = store.sync().unwrap();
            file.commit(&snapshot, &durable).unwrap();
        },
        |map, file, store, arrive| {
            let snapshot = MapFile::snapshot(map, 0);
            let durable = store.sync().unwrap();
            arrive();
            file.commit(&snapshot, &durable).unwrap();
        },
    ];
    assert!(wherever.into_iter().all(|order| !claims_too_much(order)));
}

#[test]
fn the_power_loss_test_catches_bits_that_are_taken_after_the_sync() {
    assert!(claims_too_much(|map, file, store, arrive| {
        let durable = store.sync().unwrap();
        arrive();
        let snapshot = MapFile::snapshot(map, 0);
        file.commit(&snapshot, &durable).unwrap();
    }));
}

#[test]
fn after_process_death_the_live_map_counts_and_is_persisted_next() {
    let (directory, map, file) = new(2 * BLOCKS_PER_PAGE + 5);
    let last = 2 * BLOCKS_PER_PAGE + 4;
    map.set_dirty(run(last, last + 1));
    map.set_present(run(3, 9));
    map.set_present(run(last, last + 1));
    drop((map, file));
    let (map, mut file) = open(&files(&directory), BOOT).unwrap();
    assert_eq!((map.present_blocks(), map.dirty_blocks()), (7, 1));
    persist(&map, &mut file, &FaultyStore::new(8));
    drop((map, file));
    // After a clean shutdown as well.
    std::fs::remove_file(directory.path().join("map.live")).unwrap();
    let (map, _) = open(&files(&directory), OTHER_BOOT).unwrap();
    assert_eq!((map.present_blocks(), map.dirty_blocks()), (7, 1));
    assert!(map.is_present(run(3, 9)) && map.is_dirty(BlockIndex(last)));
}

#[test]
fn after_a_power_loss_no_block_is_taken_for_clean_and_that_is_persisted() {
    let (directory, map, mut file) = new(BLOCKS_PER_PAGE + 5);
    map.set_present(run(3, 9));
    persist(&map, &mut file, &FaultyStore::new(8));
    // An overwrite that nobody flushed: its bytes may be on the disk.
    map.set_dirty(run(4, 5));
    drop((map, file));
    let (map, mut file) = open(&files(&directory), OTHER_BOOT).unwrap();
    assert_eq!((map.present_blocks(), map.dirty_blocks()), (6, 6));
    assert_eq!(map.take_changed(0, 9), [0]);
    map.mark_changed(0);
    persist(&map, &mut file, &FaultyStore::new(8));
    drop((map, file));
    std::fs::remove_file(directory.path().join("map.live")).unwrap();
    assert_eq!(open(&files(&directory), OTHER_BOOT).unwrap().0.dirty_blocks(), 6);
}

#[test]
fn a_distrusted_live_map_does_not_count() {
    let (directory, map, mut file) = new(64);
    map.set_present(run(0, 2));
    persist(&map, &mut file, &FaultyStore::new(8));
    map.set_present(run(2, 64));
    files(&directory).distrust_live().unwrap();
    map.set_dirty(run(5, 6));
    drop((map, file));
    let (map, _) = open(&files(&directory), BOOT).unwrap();
    assert_eq!((map.present_blocks(), map.dirty_blocks()), (2, 2));
}

#[test]
fn the_live_map_of_another_boot_does_not_count() {
    let (directory, map, file) = new(64);
    map.set_present(run(0, 64));
    drop((map, file));
    let (map, _) = open(&files(&directory), OTHER_BOOT).unwrap();
    assert_eq!(map.present_blocks(), 0);
}

#[test]
fn a_live_map_that_was_not_finished_or_is_of_another_size_does_not_count() {
    let (directory, map, file) = new(64);
    map.set_present(run(0, 64));
    drop((map, file));
    let live = directory.path().join("map.live");
    let mut bytes = std::fs::read(&live).unwrap();
    bytes[..8].fill(0);
    std::fs::write(&live, &bytes).unwrap();
    assert_eq!(open(&files(&directory), BOOT).unwrap().0.present_blocks(), 0);
    std::fs::write(&live, &bytes[..4100]).unwrap();
    assert_eq!(open(&files(&directory), BOOT).unwrap().0.present_blocks(), 0);
}

#[test]
fn a_persist_without_a_change_writes_nothing_and_pages_alternate_between_slots() {
    let (directory, map, mut file) = new(64);
    let store = FaultyStore::new(64 * 4096);
    let content = || std::fs::read(directory.path().join("map")).unwrap();
    map.set_present(run(0, 1));
    persist(&map, &mut file, &store);
    let first = content();
    persist(&map, &mut file, &store);
    assert!(content() == first, "nothing changed");
    map.set_present(run(1, 2));
    persist(&map, &mut file, &store);
    let second = content();
    let slot = |content: &[u8], slot: u64| {
        let at = codec::slot_offset(0, slot) as usize;
        content[at..at + PAGE_BYTES].to_vec()
    };
    assert_eq!(slot(&first, 1), slot(&second, 1), "the last good page is not touched");
    assert_ne!(slot(&first, 0), slot(&second, 0));
}

fn spoil(path: &Path, at: u64) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at as usize] ^= 0xff;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_page_that_is_damaged_twice_is_refused_but_harmless_while_the_live_map_is_valid() {
    let (directory, map, mut file) = new(3 * BLOCKS_PER_PAGE);
    let store = FaultyStore::new(8);
    for block in [0, 1, 2] {
        map.set_present(run(BLOCKS_PER_PAGE + block, BLOCKS_PER_PAGE + block + 1));
        map.set_present(run(2 * BLOCKS_PER_PAGE + block, 2 * BLOCKS_PER_PAGE + block + 1));
        persist(&map, &mut file, &store);
    }
    drop((map, file));
    let files = files(&directory);
    spoil(&files.durable, codec::slot_offset(1, 0) + 100);
    spoil(&files.durable, codec::slot_offset(1, 1) + 100);
    let error =
        MapFile::open(&files.durable).unwrap().unwrap().load(&crate::block_map::HeapPlanes::new(3 * BLOCKS_PER_PAGE));
    assert!(matches!(error, Err(MapError::Corrupt { .. })), "{error:?}");
    let (map, mut file) = open(&files, BOOT).unwrap();
    assert_eq!(map.present_blocks(), 6);
    persist(&map, &mut file, &store);
    drop((map, file));
    let (map, file) = open(&files, OTHER_BOOT).unwrap();
    assert_eq!(map.present_blocks(), 6, "repaired from the live map");
    drop((map, file));
    spoil(&files.durable, codec::slot_offset(2, 0) + 100);
    spoil(&files.durable, codec::slot_offset(2, 1) + 100);
    let before = [&files.durable, &files.live].map(|path| std::fs::read(path).unwrap());
    let error = open(&files, BootId(9)).map(drop).unwrap_err();
    assert!(matches!(error, MapError::Corrupt { .. }), "{error}");
    let after = [&files.durable, &files.live].map(|path| std::fs::read(path).unwrap());
    assert!(after == before, "nothing is overwritten");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2, "and nothing is left");
}

#[test]
fn what_is_no_map_of_ours_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("map");
    assert!(MapFile::open(&path).unwrap().is_none());
    for (bytes, wanted) in [(vec![1; 8192], BadHeader::Magic), (vec![1; 10], BadHeader::Damaged)] {
        std::fs::write(&path, &bytes).unwrap();
        let error = MapFile::open(&path).map(drop).unwrap_err();
        assert!(matches!(&error, MapError::Header { source, .. } if *source == wanted), "{error}");
    }
    let header = header(1 << 20).encode();
    std::fs::write(&path, header).unwrap();
    assert!(MapFile::open(&path).is_err(), "a map that is cut off");
    std::fs::remove_file(&path).unwrap();
    let files = files(&directory);
    MapFile::create(&files.durable, &self::header(4)).unwrap();
    assert!(MapFile::create(&files.durable, &self::header(4)).is_err(), "an existing map is never replaced");
    let first = MapFile::open(&files.durable).unwrap();
    assert!(matches!(MapFile::open(&files.durable).map(drop), Err(MapError::InUse(_))));
    drop(first);
    assert!(MapFile::open(&files.durable).is_ok());
}
