//! What a host writes to: a disk, the durable map, a journal. All with a page cache, which outlives a process and not a
//! power loss: then each write that was not synced is there or not, as chance wills, and the last may be there in part.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lazy_migrate::block_map::codec::{self, PAGE_BYTES, PageWords};
use lazy_migrate::block_map::{HeapPlanes, Planes};
use lazy_migrate::migration::record::{self, Record};

use super::dice::Dice;
use super::shape::Value;

/// A disk.
#[derive(Clone, Debug)]
pub struct Store {
    /// What is read.
    pub cache: Vec<Value>,
    /// What is there after a power loss, if nothing of the rest is.
    pub durable: Vec<Value>,
    unsynced: Vec<(u64, usize, Value)>,
    writes: u64,
}

impl Store {
    /// A disk with durable content.
    pub fn new(content: Vec<Value>) -> Self {
        Self { cache: content.clone(), durable: content, unsynced: Vec::new(), writes: 0 }
    }

    /// Writes a cell.
    pub fn write(&mut self, cell: usize, value: Value) {
        self.cache[cell] = value;
        self.writes += 1;
        self.unsynced.push((self.writes, cell, value));
    }

    /// A sync begins; what was written before it is durable when it ends.
    pub fn begin_sync(&self) -> u64 {
        self.writes
    }

    /// The sync that began so has ended.
    pub fn end_sync(&mut self, began: u64) {
        for (_, cell, value) in self.unsynced.iter().filter(|(write, ..)| *write <= began) {
            self.durable[*cell] = *value;
        }
        self.unsynced.retain(|(write, ..)| *write > began);
    }

    /// Every value that a cell may have after a power loss now.
    pub fn possible(&self, cell: usize) -> impl Iterator<Item = Value> + '_ {
        let later = self.unsynced.iter().filter(move |(_, at, _)| *at == cell).map(|(.., value)| *value);
        std::iter::once(self.durable[cell]).chain(later)
    }

    /// Nothing is in the page cache alone.
    pub fn is_synced(&self) -> bool {
        self.unsynced.is_empty()
    }

    /// The power fails.
    pub fn lose_power(&mut self, dice: &mut Dice) {
        let survives = [0, 50, 50, 90][dice.between(0, 4) as usize];
        for (_, cell, value) in std::mem::take(&mut self.unsynced) {
            if dice.percent(survives) {
                self.durable[cell] = value;
            }
        }
        self.cache.clone_from(&self.durable);
    }
}

type Slot = [u8; PAGE_BYTES];

/// The durable map of a disk that fits into one page: its two slots, in the real form.
pub struct MapFile {
    cache: Box<[Slot; 2]>,
    durable: Box<[Slot; 2]>,
    generation: u64,
    /// The page is written over its last good copy: a planted bug.
    pub one_slot: bool,
}

impl MapFile {
    /// Never written.
    pub fn new() -> Self {
        let blank = || Box::new([[0; PAGE_BYTES]; 2]);
        Self { cache: blank(), durable: blank(), generation: 0, one_slot: false }
    }

    /// What it says, after a restart.
    pub fn load(&mut self) -> Result<PageWords, codec::BadPage> {
        self.sync_all();
        let page = codec::check_page(0, [&self.cache[0], &self.cache[1]])?;
        self.generation = page.generation;
        Ok(page.words)
    }

    /// What it would say after a power loss now, if nothing else survives.
    pub fn durable_words(&self) -> Result<PageWords, codec::BadPage> {
        codec::check_page(0, [&self.durable[0], &self.durable[1]]).map(|page| page.words)
    }

    fn next_slot(&self) -> usize {
        let generation = if self.one_slot { 0 } else { self.generation + 1 };
        codec::slot_for(generation) as usize
    }

    /// Writes the page; durable after [`MapFile::commit`].
    pub fn write(&mut self, words: &PageWords) {
        self.cache[self.next_slot()] = codec::encode_page(0, self.generation + 1, words);
    }

    /// The page is durable.
    pub fn commit(&mut self) {
        self.sync_all();
        self.generation += 1;
    }

    fn sync_all(&mut self) {
        self.durable.clone_from(&self.cache);
    }

    /// The power fails: a slot that was not synced is the old one, the new one, or some of both.
    pub fn lose_power(&mut self, dice: &mut Dice) {
        for (durable, new) in self.durable.iter_mut().zip(self.cache.iter()) {
            if durable != new {
                let cut = [0, 1, 1, 8][dice.between(0, 4) as usize] * PAGE_BYTES / 8;
                durable[..cut].copy_from_slice(&new[..cut]);
            }
        }
        self.cache.clone_from(&self.durable);
    }
}

/// The live map's memory: it outlives the process.
#[derive(Clone)]
pub struct LivePlanes(Arc<HeapPlanes>);

impl LivePlanes {
    /// Made from the durable form.
    pub fn new(blocks: u64, words: &PageWords) -> Self {
        let planes = HeapPlanes::new(blocks);
        for (plane, from) in [(planes.present(), &words.present), (planes.dirty(), &words.dirty)] {
            plane.iter().zip(from).for_each(|(to, from)| to.store(*from, Ordering::Relaxed));
        }
        Self(Arc::new(planes))
    }
}

impl Planes for LivePlanes {
    fn present(&self) -> &[AtomicU64] {
        self.0.present()
    }

    fn dirty(&self) -> &[AtomicU64] {
        self.0.dirty()
    }
}

/// A journal: bytes of the real form.
pub struct JournalFile {
    bytes: Vec<u8>,
    synced: usize,
    count: u64,
    /// Where the record begins that is being written.
    writing: Option<usize>,
    last_line: Vec<u8>,
    /// An append failed: no other may follow in this life of the node.
    pub poisoned: bool,
}

const DISK: &str = "disk";

impl JournalFile {
    /// Nothing was ever recorded.
    pub fn new() -> Self {
        Self { bytes: Vec::new(), synced: 0, count: 0, writing: None, last_line: Vec::new(), poisoned: false }
    }

    /// An append begins, unless none may follow any more.
    pub fn begin(&mut self, record: &Record) {
        if self.poisoned {
            return;
        }
        self.writing = Some(self.bytes.len());
        let line = record::encode(DISK, self.count, record).expect("a record can be encoded");
        self.bytes.extend(&line);
        self.last_line = line;
    }

    /// It has succeeded; without `sync` it is not durable, a planted bug.
    pub fn end(&mut self, sync: bool) {
        self.writing = None;
        self.count += 1;
        if sync {
            self.synced = self.bytes.len();
        }
    }

    /// It has failed: nothing, a part, or (unless `never_whole`) all of it is there, and nothing may follow. Answers
    /// whether all is there.
    pub fn fail(&mut self, dice: &mut Dice, never_whole: bool) -> bool {
        self.poisoned = true;
        let Some(start) = self.writing.take() else { return false };
        !self.tear(start, dice, never_whole)
    }

    /// Cuts what begins at `start` short; answers whether anything is missing.
    fn tear(&mut self, start: usize, dice: &mut Dice, never_whole: bool) -> bool {
        let length = self.bytes.len() - start;
        let kept = match dice.between(0, 3) {
            0 => 0,
            1 => dice.between(0, length as u64 + 1) as usize,
            _ => length,
        };
        let kept = if never_whole { kept.min(length.saturating_sub(1)) } else { kept };
        self.bytes.truncate(start + kept);
        self.synced = self.synced.min(self.bytes.len());
        kept < length
    }

    /// The process dies.
    pub fn lose_process(&mut self, dice: &mut Dice) {
        if let Some(start) = self.writing.take() {
            self.tear(start, dice, false);
        }
        self.poisoned = false;
    }

    /// The power fails.
    pub fn lose_power(&mut self, dice: &mut Dice) {
        self.lose_process(dice);
        if self.synced < self.bytes.len() {
            self.tear(self.synced, dice, false);
        }
    }

    /// Reads it after a restart; what was cut short is cut off.
    pub fn open(&mut self, torn: Torn) -> Result<Option<Record>, record::JournalError> {
        let mut found = record::decode(DISK, &self.bytes)?;
        let (whole, count) = found.as_ref().map_or((0, 0), |found| (found.whole_bytes as usize, found.count));
        let is_torn = whole < self.bytes.len();
        match torn {
            Torn::Cut => self.bytes.truncate(whole),
            Torn::Taken if is_torn => {
                found = record::decode(DISK, &[&self.bytes[..whole], &self.last_line].concat())?;
                self.bytes.truncate(whole);
            }
            Torn::Kept | Torn::Taken => {}
        }
        (self.synced, self.count) = (self.bytes.len(), count);
        Ok(found.map(|found| found.record))
    }
}

/// What is done with a record that was cut short. All but the first are planted bugs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Torn {
    Cut,
    Kept,
    Taken,
}
