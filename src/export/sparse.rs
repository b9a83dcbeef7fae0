//! Reads that need no upstream, and the holes in what they find.
//!
//! A hole is told where it is known already and costs nothing to tell: of present blocks it is one of the store (known
//! after the first BLOCK_STATUS, or after the first long read has had them looked for), of missing ones an extent of
//! zeroes in the upstream's map, which is then not fetched either. Short reads are not looked at.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::lazy::Inner;
use crate::limits::{SPARSE_HOLE_MIN, SPARSE_READ_MIN};
use crate::units::{BlockRange, ByteRange};

impl Inner {
    /// The missing blocks of a range if nothing of it must be fetched: none, or only such as are zero at the source.
    #[inline]
    pub(super) fn readable(&self, range: ByteRange) -> Option<Vec<BlockRange>> {
        let blocks = self.disk.block_size.cover(range);
        if self.disk.map.is_present(blocks) {
            return Some(Vec::new());
        }
        self.fetcher.as_ref()?.missing_zeroes(blocks)
    }

    /// Fills the buffer from `offset`, zeroes where blocks are `missing`. Says where it knows of long holes, in ranges
    /// of the buffer. `None`: the disk has to be waited for.
    #[inline]
    pub(super) fn read_here(
        self: &Arc<Self>,
        offset: u64,
        buffer: &mut [u8],
        missing: &[BlockRange],
    ) -> io::Result<Option<Vec<Range<usize>>>> {
        let holes = if buffer.len() < SPARSE_READ_MIN {
            Vec::new()
        } else {
            self.look_for_holes();
            self.holes_of(ByteRange::at(offset, buffer.len() as u64), missing)
        };
        if let [all] = &holes[..]
            && all.len() == buffer.len()
        {
            buffer.fill(0);
            return Ok(Some(holes));
        }
        if !missing.is_empty() {
            self.disk.read(offset, buffer)?;
        } else if !self.disk.read_cached(offset, buffer)? {
            return Ok(None);
        }
        for blocks in missing {
            let bytes = self.disk.block_size.bytes_of(*blocks, self.disk.size());
            let within = |at: u64| (at.max(offset) - offset).min(buffer.len() as u64) as usize;
            let zeroes = within(bytes.start)..within(bytes.end);
            buffer[zeroes].fill(0);
        }
        Ok(Some(holes))
    }

    /// Whether a long range of present blocks has holes that are to be told.
    pub(super) fn has_holes(self: &Arc<Self>, range: ByteRange) -> bool {
        self.look_for_holes();
        !self.holes_of(range, &[]).is_empty()
    }

    /// Has the store's holes found in the background, once: the next long reads profit.
    fn look_for_holes(self: &Arc<Self>) {
        if self.disk.holes_known() || self.holes_looked_for.swap(true, Ordering::AcqRel) {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let disk = self.disk.clone();
        runtime.spawn_blocking(move || {
            if let Err(error) = disk.scan_holes() {
                tracing::debug!("cannot find the holes of the store: {error}; reads send them as zeroes");
            }
        });
    }

    fn holes_of(&self, range: ByteRange, missing: &[BlockRange]) -> Vec<Range<usize>> {
        let mut holes: Vec<ByteRange> = Vec::new();
        let mut missing = missing.iter().map(|blocks| self.disk.block_size.bytes_of(*blocks, range.end)).peekable();
        let mut at = range.start;
        while at < range.end {
            let (end, hole) = match missing.peek() {
                Some(zero) if zero.start <= at => (missing.next().map_or(range.end, |zero| zero.end), true),
                next => self.disk.hole_run(at, next.map_or(range.end, |zero| zero.start)),
            };
            match holes.last_mut() {
                Some(last) if hole && last.end == at => last.end = end,
                _ if hole => holes.push(ByteRange::new(at, end)),
                _ => {}
            }
            at = end;
        }
        let long = holes.into_iter().filter(|hole| hole.len() >= SPARSE_HOLE_MIN);
        long.map(|hole| (hole.start - range.start) as usize..(hole.end - range.start) as usize).collect()
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "holes are ranges, often one")]
mod tests {
    use bytes::Bytes;
    use nbd::export::{Export, Extent, ReadAnswer, STATE_HOLE, STATE_ZERO};

    use super::super::LazyExport;
    use super::super::testing::{Lab, Source, done, eventually, read};

    const MIB: usize = 1 << 20;

    /// What a read answers at once: its bytes and its holes.
    fn at_once(export: &LazyExport, offset: u64, length: usize) -> (Vec<u8>, Vec<std::ops::Range<usize>>) {
        let mut buffer = vec![0xee; length];
        match export.read(offset, &mut buffer) {
            ReadAnswer::Now(result) => {
                result.unwrap();
                (buffer, Vec::new())
            }
            ReadAnswer::Sparse(holes) => (buffer, holes),
            ReadAnswer::Later(_) | ReadAnswer::Promised => panic!("it must be answered at once"),
        }
    }

    /// A local image of 4 MiB with data at 1 MiB and a little at 2 MiB.
    fn local() -> (tempfile::TempDir, LazyExport) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let mut bytes = vec![0; 4 * MIB];
        bytes[MIB..2 * MIB].fill(7);
        bytes[2 * MIB + 8192..2 * MIB + 8200].fill(8);
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(4 << 20).unwrap();
        use std::os::unix::fs::FileExt;
        file.write_all_at(&bytes[MIB..2 * MIB], 1 << 20).unwrap();
        file.write_all_at(&[8; 8], (2 << 20) + 8192).unwrap();
        (dir, LazyExport::local("disk", &path, false).unwrap())
    }

    #[tokio::test]
    async fn a_long_read_tells_long_holes_of_the_store_once_they_are_known() {
        let (_dir, export) = local();
        // The first long read has them looked for, and is answered meanwhile.
        assert!(at_once(&export, 0, 4 * MIB).0[MIB..2 * MIB] == vec![7; MIB]);
        eventually("the search for holes", || export.disk().holes_known()).await;
        let (bytes, holes) = at_once(&export, 100, 3 * MIB);
        // The hole of 8 KiB at 2 MiB is too short to be told.
        assert_eq!(holes, [0..MIB - 100, 2 * MIB + 12288 - 100..3 * MIB]);
        assert!(bytes[MIB - 100..2 * MIB - 100].iter().all(|byte| *byte == 7) && bytes[2 * MIB - 100 + 8192] == 8);
        assert!(bytes[..MIB - 100].iter().all(|byte| *byte == 0));
        assert_eq!(at_once(&export, 5, 65536), (vec![0; 65536], vec![0..65536]), "nothing but a hole");
        assert!(at_once(&export, 0, 4096).1.is_empty(), "too short to be looked at");
    }

    #[tokio::test]
    async fn what_is_written_ends_a_hole_and_what_is_trimmed_begins_one() {
        let (_dir, export) = local();
        done(export.block_status("base:allocation", 0, 1, 1)).await.unwrap();
        done(export.write(300_000, Bytes::from_static(b"new"), false)).await.unwrap();
        done(export.trim(1 << 20, 1 << 20, false)).await.unwrap();
        let (bytes, holes) = at_once(&export, 0, 2 * MIB);
        assert_eq!(holes, [0..299_008, 299_008 + 4096..2 * MIB]);
        assert!(&bytes[300_000..300_003] == b"new" && bytes[MIB..].iter().all(|byte| *byte == 0));
    }

    /// A source whose second half is zeroes, and says so.
    fn half_zero() -> std::sync::Arc<Source> {
        let mut bytes = Source::pattern(2 * MIB);
        bytes[MIB..].fill(0);
        let extents = [(MIB as u64, 0), (MIB as u64, STATE_HOLE | STATE_ZERO)];
        let extents = extents.map(|(length, flags)| Extent { length, flags }).to_vec();
        Source::with_contexts(bytes, &[("base:allocation", extents)])
    }

    #[tokio::test]
    async fn what_the_source_says_is_zero_is_answered_at_once_and_not_fetched() {
        // So slow that only the first half is pulled; the map is read all the same.
        let lab = Lab::new(half_zero(), |config| config.rate = Some(1)).await;
        let fetched = || lab.source.reads().iter().any(|(offset, _)| *offset >= MIB as u64);
        let fetcher = lab.export.inner.fetcher.as_ref().unwrap();
        let zero = crate::units::BlockRange::new(crate::units::BlockIndex(300), crate::units::BlockIndex(500));
        eventually("the map of the source", || fetcher.missing_zeroes(zero).is_some()).await;
        assert_eq!(at_once(&lab.export, MIB as u64 + 5, 10).0, [0; 10]);
        assert_eq!(at_once(&lab.export, MIB as u64 + 4096, 512 * 1024).1, [0..512 * 1024]);
        // Beside a block that was written.
        done(lab.export.write(3 << 19, Bytes::from(vec![9; 4096]), false)).await.unwrap();
        let (bytes, holes) = at_once(&lab.export, (3 << 19) - 65536, 2 * 65536);
        assert_eq!(holes, [0..65536, 65536 + 4096..2 * 65536]);
        assert!(bytes[65536..65536 + 4096].iter().all(|byte| *byte == 9) && bytes[..65536] == [0; 65536]);
        assert!(bytes[65536 + 4096..].iter().all(|byte| *byte == 0));
        assert!(read(&lab.export, MIB as u64 - 5, 10).await.unwrap() == lab.source.bytes[MIB - 5..MIB + 5]);
        assert!(!lab.export.disk().map.is_present(zero) && !fetched());
    }
}
