//! The durable form of the map as bytes: one header and pages in two slots. `docs/on-disk.md` has the picture.
//!
//! Bytes from a file are unchecked until one of the `check` functions has made them a [`Header`] or a [`Page`].

use super::WORDS_PER_PAGE;
use crate::units::BlockSize;

/// The size of the header and of each slot of a page, in bytes.
pub const PAGE_BYTES: usize = 4096;

/// The version of the format that this program writes, and the newest that it reads.
pub const VERSION: u32 = 1;

/// The longest identity, in bytes.
pub const MAX_IDENTITY: usize = 1024;

const MAGIC: [u8; 8] = *b"LAZYMAP\0";
const VERSION_AT: usize = 8;
const BLOCK_SIZE_AT: usize = VERSION_AT + 4;
const SIZE_AT: usize = BLOCK_SIZE_AT + 4;
const IDENTITY_LENGTH_AT: usize = SIZE_AT + 8;
const IDENTITY_AT: usize = IDENTITY_LENGTH_AT + 4;
const HEADER_CRC_AT: usize = PAGE_BYTES - 4;

const PAGE_INDEX_AT: usize = 4;
const GENERATION_AT: usize = PAGE_INDEX_AT + 4;
const WORDS_AT: usize = GENERATION_AT + 8;

/// What a map belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The disk's size in bytes.
    pub size: u64,
    /// The unit of the map.
    pub block_size: BlockSize,
    /// Whose content this is, in words of the owner; compared literally.
    pub identity: String,
}

/// Why bytes are not a header of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    /// Another kind of file.
    #[error("it does not begin with the mark of a block map")]
    Magic,
    /// Written by a later program.
    #[error("it has format version {0}, this program reads up to {VERSION}")]
    Newer(u32),
    /// The checksum or a field is wrong.
    #[error("its header is damaged")]
    Damaged,
}

impl Header {
    /// The header as bytes. An identity beyond [`MAX_IDENTITY`] is cut at a character's end.
    pub fn encode(&self) -> [u8; PAGE_BYTES] {
        let mut bytes = [0; PAGE_BYTES];
        let mut length = self.identity.len().min(MAX_IDENTITY);
        while !self.identity.is_char_boundary(length) {
            length -= 1;
        }
        bytes[..8].copy_from_slice(&MAGIC);
        put(&mut bytes, VERSION_AT, &VERSION.to_le_bytes());
        put(&mut bytes, BLOCK_SIZE_AT, &u32::from(self.block_size).to_le_bytes());
        put(&mut bytes, SIZE_AT, &self.size.to_le_bytes());
        put(&mut bytes, IDENTITY_LENGTH_AT, &(length as u32).to_le_bytes());
        put(&mut bytes, IDENTITY_AT, &self.identity.as_bytes()[..length]);
        let crc = crc32fast::hash(&bytes[..HEADER_CRC_AT]);
        put(&mut bytes, HEADER_CRC_AT, &crc.to_le_bytes());
        bytes
    }

    /// Checks bytes that claim to be a header.
    pub fn check(bytes: &[u8; PAGE_BYTES]) -> Result<Header, BadHeader> {
        if bytes[..8] != MAGIC {
            return Err(BadHeader::Magic);
        }
        // The version stands before the checksum: a later format may compute it in another way.
        match get_u32(bytes, VERSION_AT) {
            VERSION => {}
            newer if newer > VERSION => return Err(BadHeader::Newer(newer)),
            _ => return Err(BadHeader::Damaged),
        }
        if get_u32(bytes, HEADER_CRC_AT) != crc32fast::hash(&bytes[..HEADER_CRC_AT]) {
            return Err(BadHeader::Damaged);
        }
        let block_size = BlockSize::new(get_u32(bytes, BLOCK_SIZE_AT)).map_err(|_| BadHeader::Damaged)?;
        let length = get_u32(bytes, IDENTITY_LENGTH_AT) as usize;
        let identity = bytes.get(IDENTITY_AT..IDENTITY_AT + length.min(MAX_IDENTITY + 1)).unwrap_or_default();
        if length > MAX_IDENTITY {
            return Err(BadHeader::Damaged);
        }
        let identity = std::str::from_utf8(identity).map_err(|_| BadHeader::Damaged)?.to_owned();
        Ok(Header { size: get_u64(bytes, SIZE_AT), block_size, identity })
    }
}

/// The words of one page: `present[i]` and `dirty[i]` describe the same 64 blocks.
#[derive(Clone, PartialEq, Eq)]
pub struct PageWords {
    /// Present plane.
    pub present: [u64; WORDS_PER_PAGE],
    /// Dirty plane.
    pub dirty: [u64; WORDS_PER_PAGE],
}

impl Default for PageWords {
    fn default() -> Self {
        Self { present: [0; WORDS_PER_PAGE], dirty: [0; WORDS_PER_PAGE] }
    }
}

impl std::fmt::Debug for PageWords {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let count = |words: &[u64]| words.iter().map(|word| word.count_ones()).sum::<u32>();
        write!(f, "PageWords({} present, {} dirty)", count(&self.present), count(&self.dirty))
    }
}

/// A checked page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// Rises with every write of this page; 0 is a page that was never written.
    pub generation: u64,
    /// Its bits.
    pub words: PageWords,
}

/// Both slots of a page are damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("both copies of page {0} are damaged")]
pub struct BadPage(pub usize);

/// A page as bytes, for the slot that [`slot_for`] names.
pub fn encode_page(index: usize, generation: u64, words: &PageWords) -> [u8; PAGE_BYTES] {
    let mut bytes = [0; PAGE_BYTES];
    put(&mut bytes, PAGE_INDEX_AT, &(index as u32).to_le_bytes());
    put(&mut bytes, GENERATION_AT, &generation.to_le_bytes());
    for (slot, word) in words.present.iter().chain(&words.dirty).enumerate() {
        put(&mut bytes, WORDS_AT + slot * 8, &word.to_le_bytes());
    }
    let crc = crc32fast::hash(&bytes[4..]);
    put(&mut bytes, 0, &crc.to_le_bytes());
    bytes
}

/// The slot, 0 or 1, that a generation is written to: always the one that does not hold the generation before.
pub fn slot_for(generation: u64) -> u64 {
    generation % 2
}

/// Where a slot of a page stands in the file, in bytes.
pub fn slot_offset(index: usize, slot: u64) -> u64 {
    PAGE_BYTES as u64 * (1 + 2 * index as u64 + slot)
}

/// The length of the file for so many pages, in bytes.
pub fn file_length(pages: usize) -> u64 {
    slot_offset(pages, 0)
}

/// Checks both slots of a page and takes the newer valid one. A slot of nothing but zeroes was never written and counts
/// as generation 0 with nothing present.
pub fn check_page(index: usize, slots: [&[u8; PAGE_BYTES]; 2]) -> Result<Page, BadPage> {
    let [a, b] = slots.map(|bytes| check_slot(index, bytes));
    match (a, b) {
        (Some(a), Some(b)) => Ok(if a.generation > b.generation { a } else { b }),
        (Some(page), None) | (None, Some(page)) => Ok(page),
        (None, None) => Err(BadPage(index)),
    }
}

fn check_slot(index: usize, bytes: &[u8; PAGE_BYTES]) -> Option<Page> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Some(Page { generation: 0, words: PageWords::default() });
    }
    let right = get_u32(bytes, 0) == crc32fast::hash(&bytes[4..]) && get_u32(bytes, PAGE_INDEX_AT) as usize == index;
    right.then(|| {
        let mut words = PageWords::default();
        for slot in 0..WORDS_PER_PAGE {
            words.present[slot] = get_u64(bytes, WORDS_AT + slot * 8);
            words.dirty[slot] = get_u64(bytes, WORDS_AT + (WORDS_PER_PAGE + slot) * 8);
        }
        Page { generation: get_u64(bytes, GENERATION_AT), words }
    })
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn get_u32(bytes: &[u8; PAGE_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn get_u64(bytes: &[u8; PAGE_BYTES], at: usize) -> u64 {
    u64::from(get_u32(bytes, at)) | u64::from(get_u32(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(seed: u64) -> PageWords {
        let mut words = PageWords::default();
        for (slot, word) in words.present.iter_mut().enumerate() {
            *word = seed.wrapping_mul(slot as u64 + 1);
        }
        words.dirty[WORDS_PER_PAGE - 1] = 1 << 63;
        words
    }

    #[test]
    fn a_header_comes_back_and_any_flipped_byte_is_noticed() {
        let header = Header { size: 12_345, block_size: BlockSize::DEFAULT, identity: "disk ä".into() };
        let bytes = header.encode();
        assert_eq!(Header::check(&bytes), Ok(header));
        for at in [0, 9, 13, 20, 25, 30, 3000, PAGE_BYTES - 1] {
            let mut bad = bytes;
            bad[at] ^= 0x40;
            assert!(Header::check(&bad).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_newer_version_is_told_from_damage() {
        let mut bytes = Header { size: 1, block_size: BlockSize::DEFAULT, identity: String::new() }.encode();
        bytes[VERSION_AT] = 2;
        assert_eq!(Header::check(&bytes), Err(BadHeader::Newer(2)));
    }

    #[test]
    fn the_newer_valid_slot_wins_and_a_torn_write_falls_back() {
        let (old, new) = (encode_page(3, 6, &words(5)), encode_page(3, 7, &words(9)));
        assert_eq!(check_page(3, [&old, &new]).map(|page| page.generation), Ok(7));
        assert_eq!(check_page(3, [&new, &old]).map(|page| page.words), Ok(words(9)));
        let mut torn = new;
        torn[2048..].copy_from_slice(&old[2048..]);
        assert_eq!(check_page(3, [&old, &torn]).map(|page| page.words), Ok(words(5)));
        assert_eq!(check_page(3, [&torn, &torn]), Err(BadPage(3)));
        assert_eq!(check_page(4, [&old, &new]), Err(BadPage(4)), "a page in the wrong place");
    }

    #[test]
    fn a_page_that_was_never_written_is_missing_not_damaged() {
        let (zero, mut torn) = ([0; PAGE_BYTES], encode_page(0, 1, &words(1)));
        assert_eq!(check_page(0, [&zero, &zero]), Ok(Page { generation: 0, words: PageWords::default() }));
        torn[4000] ^= 1;
        assert_eq!(check_page(0, [&zero, &torn]).map(|page| page.generation), Ok(0));
    }
}
