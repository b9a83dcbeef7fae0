//! Are the blocks that were not written here since the handover those of the source?
//!
//! Both hosts hash block by block, and only hashes travel: the first 16 bytes of BLAKE3, which nobody can forge and
//! which costs less than the memory it reads on today's processors. `verify` compares when an operator asks; and before
//! the source is released every block has been compared.

use std::sync::atomic::{AtomicU64, Ordering};

use nbd::export::{Answer, Export};

use crate::control::api::VerifyReport;
use crate::error::{Failure, Outcome};
use crate::export::LazyExport;
use crate::limits::PEER_CHECKSUM_BLOCKS;
use crate::peer::client::PeerClient;
use crate::peer::{Reply, Request, Subject};
use crate::units::{BlockIndex, BlockRange};

/// Hexadecimal digits of a block's digest.
const DIGITS: usize = 32;
/// How many differing offsets are named.
const MAX_NAMED: usize = 8;
/// How many blocks are asked at once.
const STEP: u64 = 2048;
/// How long the source may take for one answer: it may have to read from its disk.
const ANSWER_TIME: std::time::Duration = std::time::Duration::from_secs(60);
/// `lazy-migrate:present`: the block is here.
const PRESENT: u64 = 1;
/// `lazy-migrate:present`: the block was written here.
const DIRTY: u64 = 2;

const _: () = assert!(STEP <= PEER_CHECKSUM_BLOCKS);

/// Compares everything.
pub async fn verify(export: &LazyExport, peer: &PeerClient, subject: &Subject) -> Outcome<VerifyReport> {
    let mut report = VerifyReport::new();
    let blocks = export.block_size().count(export.size());
    for first in (0..blocks).step_by(STEP as usize) {
        compare(export, peer, subject, first, STEP.min(blocks - first), &mut report).await?;
    }
    Ok(report)
}

/// Compares everything once, before the release; goes on where the link failed it.
#[derive(Debug, Default)]
pub(super) struct Verifier {
    next: AtomicU64,
}

impl Verifier {
    /// `Err` says what differs, or that the source does not answer.
    pub(super) async fn all(&self, export: &LazyExport, peer: &PeerClient, subject: &Subject) -> Outcome<()> {
        let begun = std::time::Instant::now();
        let mut report = VerifyReport::new();
        let blocks = export.block_size().count(export.size());
        loop {
            let first = self.next.load(Ordering::Relaxed);
            if first >= blocks {
                break;
            }
            let count = STEP.min(blocks - first);
            compare(export, peer, subject, first, count, &mut report).await?;
            if !report.verified {
                let at = report.differing.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
                return Err(Failure::failed(format!(
                    "{} differs from the source's disk at byte {at}, so the source is not released; `lazy-migrate verify \
                     {}` names every place, and docs/failure.md says what to do",
                    subject.disk, subject.disk
                )));
            }
            self.next.store(first + count, Ordering::Relaxed);
        }
        tracing::info!(
            disk = subject.disk,
            compared_bytes = report.compared_bytes,
            elapsed_ms = begun.elapsed().as_millis(),
            "every block is the source's, or was written here"
        );
        Ok(())
    }
}

async fn compare(
    export: &LazyExport,
    peer: &PeerClient,
    subject: &Subject,
    first: u64,
    count: u64,
    report: &mut VerifyReport,
) -> Outcome<()> {
    let before = flags(export, first, count).await?;
    if before.iter().any(|&flags| flags & (PRESENT | DIRTY) == PRESENT) {
        let request = Request::Checksums { subject: subject.clone(), first, count };
        // Both hosts hash at the same time.
        let (theirs, ours) = tokio::join!(peer.call(&request, ANSWER_TIME), checksums(export, first, count));
        let theirs = match theirs {
            Ok(Reply::Checksums { digests }) if digests.len() == DIGITS * count as usize && digests.is_ascii() => {
                digests
            }
            Ok(_) => return Err(Failure::failed("the source answered something else than checksums")),
            Err(error) => return Err(error.into_failure().context("cannot compare with the source")),
        };
        let ours = ours?;
        // What was written meanwhile is not compared.
        let after = flags(export, first, count).await?;
        for block in 0..count as usize {
            if before[block] & PRESENT == 0 || after[block] & DIRTY != 0 {
                continue;
            }
            let digits = block * DIGITS..(block + 1) * DIGITS;
            let index = BlockIndex(first + block as u64);
            report.compared_bytes += bytes(export, index);
            if ours[digits.clone()] != theirs[digits] {
                report.verified = false;
                if report.differing.len() < MAX_NAMED {
                    report.differing.push(index.0 * export.block_size().bytes());
                }
            }
        }
        count_flags(export, first, &after, report);
    } else {
        count_flags(export, first, &before, report);
    }
    Ok(())
}

fn count_flags(export: &LazyExport, first: u64, flags: &[u64], report: &mut VerifyReport) {
    for (block, flags) in flags.iter().enumerate() {
        let bytes = bytes(export, BlockIndex(first + block as u64));
        if flags & DIRTY != 0 {
            report.dirty_bytes += bytes;
        } else if flags & PRESENT == 0 {
            report.missing_bytes += bytes;
        }
    }
}

fn bytes(export: &LazyExport, block: BlockIndex) -> u64 {
    export.block_size().bytes_of(BlockRange::new(block, BlockIndex(block.0 + 1)), export.size()).len()
}

/// The map's flags of each block.
async fn flags(export: &LazyExport, first: u64, count: u64) -> Outcome<Vec<u64>> {
    let unit = export.block_size().bytes();
    let range =
        export.block_size().bytes_of(BlockRange::new(BlockIndex(first), BlockIndex(first + count)), export.size());
    let mut flags = Vec::with_capacity(count as usize);
    let mut at = range.start;
    while at < range.end {
        let answer = export.block_status("lazy-migrate:present", at, range.end - at, count as usize);
        let extents = match answer {
            Answer::Now(extents) => extents,
            Answer::Later(extents) => extents.await,
        };
        let extents =
            extents.map_err(|errno| Failure::failed(format!("cannot read the map of {}: {errno}", export.name())))?;
        if extents.is_empty() {
            return Err(Failure::failed(format!("the map of {} has a gap at {at}", export.name())));
        }
        for extent in extents {
            let blocks = extent.length.div_ceil(unit);
            flags.extend(std::iter::repeat_n(extent.flags, blocks as usize));
            at += extent.length;
        }
    }
    Ok(flags)
}

/// The digests of blocks, in hexadecimal, one after the other. Missing blocks are fetched first.
pub(crate) async fn checksums(export: &LazyExport, first: u64, count: u64) -> Outcome<String> {
    let block_size = export.block_size();
    let blocks = block_size.count(export.size());
    if count > PEER_CHECKSUM_BLOCKS || first.checked_add(count).is_none_or(|end| end > blocks) {
        return Err(Failure::refused(format!(
            "{} has {blocks} blocks; {count} from {first} on were asked",
            export.name()
        )));
    }
    let mut digests = String::with_capacity(DIGITS * count as usize);
    let mut buffer = vec![0; block_size.bytes() as usize];
    for block in first..first + count {
        let range = block_size.bytes_of(BlockRange::new(BlockIndex(block), BlockIndex(block + 1)), export.size());
        let buffer = &mut buffer[..range.len() as usize];
        nbd::export::read(export, range.start, buffer)
            .await
            .map_err(|errno| Failure::failed(format!("cannot read {} at {}: {errno}", export.name(), range.start)))?;
        digests.push_str(&blake3::hash(buffer).to_hex().as_str()[..DIGITS]);
        if block % 64 == 0 {
            tokio::task::yield_now().await;
        }
    }
    Ok(digests)
}
