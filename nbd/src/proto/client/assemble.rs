//! Puts the chunks of a structured READ reply together.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};

use crate::limits::MAX_READ_CHUNKS;

/// The bytes of one READ as they arrive: chunks in any order, none twice, none outside, together the whole range.
#[derive(Debug)]
pub struct Assembly {
    offset: u64,
    length: u32,
    chunks: usize,
    /// One chunk was all of it, which is the rule.
    at_once: bool,
    /// What has arrived otherwise: start to end, relative to `offset`, neighbours joined.
    covered: BTreeMap<u32, u32>,
    /// One chunk was the whole range; it is handed out as it came.
    whole: Option<Bytes>,
    parts: Option<BytesMut>,
}

impl Assembly {
    /// Nothing has arrived of `length` bytes from `offset`.
    pub fn new(offset: u64, length: u32) -> Assembly {
        Assembly { offset, length, chunks: 0, at_once: false, covered: BTreeMap::new(), whole: None, parts: None }
    }

    /// A chunk of data, without a copy where it is the whole range.
    ///
    /// # Errors
    /// What is wrong with the chunk.
    pub fn data(&mut self, offset: u64, data: Bytes) -> Result<(), &'static str> {
        let length = u32::try_from(data.len()).map_err(|_| "a data chunk is too long")?;
        let start = self.cover(offset, length)? as usize;
        if length == self.length {
            self.whole = Some(data);
        } else {
            self.parts()[start..start + data.len()].copy_from_slice(&data);
        }
        Ok(())
    }

    /// A chunk that says that `length` bytes are zeroes.
    ///
    /// # Errors
    /// What is wrong with the chunk.
    pub fn hole(&mut self, offset: u64, length: u32) -> Result<(), &'static str> {
        self.cover(offset, length)?;
        self.parts();
        Ok(())
    }

    /// A chunk of data or zeroes whose content goes elsewhere.
    ///
    /// # Errors
    /// What is wrong with the chunk.
    pub fn elsewhere(&mut self, offset: u64, length: u32) -> Result<(), &'static str> {
        self.cover(offset, length).map(drop)
    }

    /// The whole range; nothing where its content went elsewhere.
    ///
    /// # Errors
    /// A part of it never came.
    pub fn finish(self) -> Result<Bytes, &'static str> {
        let complete = match self.covered.first_key_value() {
            Some((0, end)) => *end == self.length,
            _ => self.at_once || self.length == 0,
        };
        if !complete {
            return Err("the reply to a READ does not cover what was asked");
        }
        Ok(self.whole.or(self.parts.map(BytesMut::freeze)).unwrap_or_default())
    }

    fn parts(&mut self) -> &mut BytesMut {
        self.parts.get_or_insert_with(|| BytesMut::zeroed(self.length as usize))
    }

    fn cover(&mut self, offset: u64, length: u32) -> Result<u32, &'static str> {
        self.chunks += 1;
        if self.chunks > MAX_READ_CHUNKS {
            return Err("the reply to a READ has too many chunks");
        }
        if length == 0 {
            return Err("a chunk is empty");
        }
        let start = offset.checked_sub(self.offset).and_then(|start| u32::try_from(start).ok());
        let end = start.and_then(|start| start.checked_add(length)).filter(|end| *end <= self.length);
        let (Some(start), Some(end)) = (start, end) else { return Err("a chunk lies outside what was asked") };
        let before = self.covered.range(..end).next_back().map(|(from, to)| (*from, *to));
        if self.at_once || before.is_some_and(|(_, to)| to > start) {
            return Err("a chunk repeats what has come");
        }
        if length == self.length {
            self.at_once = true;
            return Ok(0);
        }
        let end = self.covered.remove(&end).unwrap_or(end);
        match before {
            Some((from, to)) if to == start => self.covered.insert(from, end),
            _ => self.covered.insert(start, end),
        };
        Ok(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_chunk_is_handed_out_without_a_copy() {
        let data = Bytes::from(vec![1; 100]);
        let mut assembly = Assembly::new(1000, 100);
        assembly.data(1000, data.clone()).unwrap();
        assert_eq!(assembly.finish().unwrap().as_ptr(), data.as_ptr());
    }

    #[test]
    fn chunks_and_holes_come_in_any_order() {
        let mut assembly = Assembly::new(10, 10);
        assembly.data(17, Bytes::from_static(b"hij")).unwrap();
        assembly.hole(13, 4).unwrap();
        assembly.data(10, Bytes::from_static(b"abc")).unwrap();
        assert_eq!(assembly.finish().unwrap(), &b"abc\0\0\0\0hij"[..]);
        let mut hole = Assembly::new(0, 4);
        hole.hole(0, 4).unwrap();
        assert_eq!(hole.finish().unwrap(), &[0; 4][..]);
        assert_eq!(Assembly::new(5, 0).finish(), Ok(Bytes::new()));
    }

    #[test]
    fn overlaps_gaps_and_strays_are_refused() {
        let filled = || {
            let mut assembly = Assembly::new(100, 10);
            assembly.hole(103, 4).unwrap();
            assembly
        };
        for (offset, length) in
            [(103, 4), (102, 2), (106, 1), (104, 1), (100, 10), (99, 1), (110, 1), (107, 4), (101, 0)]
        {
            assert!(filled().hole(offset, length).is_err(), "{offset}+{length}");
        }
        assert!(filled().hole(u64::MAX, 1).is_err());
        let mut whole = Assembly::new(100, 10);
        whole.hole(100, 10).unwrap();
        for (offset, length) in [(100, 10), (100, 1), (109, 1), (110, 1)] {
            assert!(whole.hole(offset, length).is_err(), "{offset}+{length} after all of it");
        }
        assert!(filled().finish().is_err());
        let mut gap = filled();
        gap.hole(100, 3).unwrap();
        assert!(gap.finish().is_err());
    }

    #[test]
    fn the_number_of_chunks_is_bounded() {
        let mut assembly = Assembly::new(0, 1 << 20);
        let refused = (0..1 << 20).find(|i| assembly.hole(*i, 1).is_err());
        assert_eq!(refused, Some(MAX_READ_CHUNKS as u64));
    }
}
