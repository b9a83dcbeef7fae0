//! What a disk must contain: the source's bytes, and over them every write by what is known of it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub const SECTOR: u64 = 512;
pub const BLOCK: u64 = 4096;

/// What is known of the writes to one sector.
#[derive(Clone, Default)]
struct Sector {
    /// The last acknowledged write.
    acknowledged: Option<u64>,
    /// Later writes of which nobody knows whether they were done: any of them may be there.
    perhaps: Vec<u64>,
    /// The last write that was acknowledged before a flush that was.
    flushed: Option<u64>,
}

/// What must be in a sector for it to be right.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Least {
    /// Everything acknowledged.
    Acknowledged,
    /// Everything acknowledged and then flushed, and of later writes any.
    Flushed,
}

/// See the module's text. A sector is written by one client at a time.
pub struct Model {
    original: Arc<Vec<u8>>,
    sectors: Mutex<HashMap<u64, Sector>>,
    next: AtomicU64,
}

impl Model {
    pub fn new(original: Arc<Vec<u8>>) -> Arc<Model> {
        Arc::new(Model { original, sectors: Mutex::default(), next: AtomicU64::new(1) })
    }

    pub fn size(&self) -> u64 {
        self.original.len() as u64
    }

    /// Of the disk, the last block: a [`super::service::Prober`] has it for itself, and the model says nothing of it.
    pub fn probed(&self) -> u64 {
        self.size() - BLOCK
    }

    /// The bytes of a write that is about to be sent; from now on they may be there.
    pub fn begin(&self, offset: u64, length: u64) -> Vec<u8> {
        let number = self.next.fetch_add(1, Ordering::SeqCst);
        let mut bytes = Vec::with_capacity(length as usize);
        let mut sectors = self.lock();
        for sector in offset / SECTOR..(offset + length) / SECTOR {
            bytes.extend(value(sector, number).to_le_bytes().repeat(SECTOR as usize / 8));
            sectors.entry(sector).or_default().perhaps.push(number);
        }
        bytes
    }

    /// The last write of this range was acknowledged.
    pub fn acknowledged(&self, offset: u64, length: u64) {
        let mut sectors = self.lock();
        for sector in offset / SECTOR..(offset + length) / SECTOR {
            let sector = sectors.get_mut(&sector).unwrap();
            sector.acknowledged = sector.perhaps.pop();
            sector.perhaps.clear();
        }
    }

    /// What is acknowledged now; for [`Model::flushed`], when a flush that begins now was acknowledged.
    pub fn before_flush(&self) -> Vec<(u64, u64)> {
        let sectors = self.lock();
        sectors.iter().filter_map(|(&at, sector)| sector.acknowledged.map(|number| (at, number))).collect()
    }

    /// All these writes were flushed.
    pub fn flushed(&self, written: Vec<(u64, u64)>) {
        let mut sectors = self.lock();
        for (at, number) in written {
            sectors.get_mut(&at).unwrap().flushed = Some(number);
        }
    }

    /// Of each sector of a range, what was acknowledged: what a read that begins now must see at least.
    pub fn before_read(&self, offset: u64, length: u64) -> Vec<Option<u64>> {
        let sectors = self.lock();
        let range = offset / SECTOR..(offset + length) / SECTOR;
        range.map(|at| sectors.get(&at).and_then(|sector| sector.acknowledged)).collect()
    }

    /// Whether bytes that were read while writes went on are right.
    pub fn check_read(&self, offset: u64, bytes: &[u8], before: &[Option<u64>]) -> Result<(), String> {
        let issued = self.next.load(Ordering::SeqCst);
        for (index, found) in bytes.chunks(SECTOR as usize).enumerate() {
            let at = offset / SECTOR + index as u64;
            let right = match number_of(at, found) {
                Some(number) => before[index].is_none_or(|least| number >= least) && number < issued,
                None => before[index].is_none() && found == self.original_of(at),
            };
            if !right {
                return Err(format!("sector {at}: {}, after write {:?}", self.describe(at, found), before[index]));
            }
        }
        Ok(())
    }

    /// Whether the whole of a range is right, when nobody writes any more.
    pub fn check(&self, offset: u64, bytes: &[u8], least: Least) -> Result<(), String> {
        let sectors = self.lock();
        let issued = self.next.load(Ordering::SeqCst);
        for (index, found) in bytes.chunks(SECTOR as usize).enumerate() {
            let at = offset / SECTOR + index as u64;
            if at >= self.probed() / SECTOR {
                continue;
            }
            let known = sectors.get(&at).cloned().unwrap_or_default();
            let number = number_of(at, found);
            let original = number.is_none() && found == self.original_of(at);
            let right = match least {
                Least::Acknowledged => match number {
                    Some(number) => known.acknowledged == Some(number) || known.perhaps.contains(&number),
                    None => known.acknowledged.is_none() && original,
                },
                Least::Flushed => match number {
                    Some(number) => known.flushed.is_none_or(|least| number >= least) && number < issued,
                    None => known.flushed.is_none() && original,
                },
            };
            if !right {
                return Err(format!(
                    "sector {at}: {}; acknowledged {:?}, perhaps {:?}, flushed {:?}",
                    self.describe(at, found),
                    known.acknowledged,
                    known.perhaps,
                    known.flushed
                ));
            }
        }
        Ok(())
    }

    fn describe(&self, at: u64, found: &[u8]) -> String {
        match number_of(at, found) {
            Some(number) => format!("write {number} is there"),
            None if found == self.original_of(at) => "the source's bytes are there".into(),
            None if found.iter().all(|&byte| byte == 0) => "zeroes are there".into(),
            None => format!("something else is there, {:02x?}", &found[..16]),
        }
    }

    fn original_of(&self, sector: u64) -> &[u8] {
        &self.original[(sector * SECTOR) as usize..((sector + 1) * SECTOR) as usize]
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Sector>> {
        self.sectors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a sector is filled with says which write it was, and of which sector.
fn value(sector: u64, number: u64) -> u64 {
    sector << 36 | number
}

fn number_of(sector: u64, bytes: &[u8]) -> Option<u64> {
    let first = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let whole = bytes.chunks(8).all(|chunk| chunk == &bytes[..8]);
    (whole && first >> 36 == sector && first & ((1 << 36) - 1) != 0).then_some(first & ((1 << 36) - 1))
}

#[test]
fn the_model_notices_what_is_wrong() {
    let original: Arc<Vec<u8>> = Arc::new((0..64 * 1024).map(|at| (at % 251) as u8).collect());
    let model = Model::new(original.clone());
    let at = |offset: u64, length: u64| original[offset as usize..(offset + length) as usize].to_vec();
    let mut disk = at(0, 64 * 1024);
    assert!(model.check(0, &disk, Least::Acknowledged).is_ok());
    let first = model.begin(4096, 1024);
    let wrong = |disk: &[u8]| model.check(0, disk, Least::Acknowledged).unwrap_err();
    // Not acknowledged: old or new.
    assert!(model.check(0, &disk, Least::Acknowledged).is_ok());
    disk[4096..5120].copy_from_slice(&first);
    assert!(model.check(0, &disk, Least::Acknowledged).is_ok());
    model.acknowledged(4096, 1024);
    disk[4096..4608].fill(0);
    assert!(wrong(&disk).contains("zeroes"), "{}", wrong(&disk));
    disk[4096..4608].copy_from_slice(&at(4096, 512));
    assert!(wrong(&disk).contains("the source's bytes"), "a lost write");
    disk[4096..4608].copy_from_slice(&first[512..]);
    assert!(wrong(&disk).contains("something else"), "another sector's write");
    // An older write after a newer one was acknowledged; right only where nothing but flushed writes must survive.
    model.flushed(model.before_flush());
    disk[4096..5120].copy_from_slice(&first);
    model.begin(4096, 512);
    model.acknowledged(4096, 512);
    assert!(wrong(&disk).contains("write 1"), "{}", wrong(&disk));
    assert!(model.check(0, &disk, Least::Flushed).is_ok());
    let before = model.before_read(4096, 512);
    assert!(model.check_read(4096, &disk[4096..4608], &before).is_err());
}
