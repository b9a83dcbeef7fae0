//! `verify`: are the blocks that were not written here since the handover those of the source?
//!
//! Both hosts hash block by block, and only hashes travel: the first 16 bytes of BLAKE3, which nobody can forge and
//! which costs less than the memory it reads on today's processors.

use nbd::export::{Answer, Export, ReadAnswer};

use super::disk::Role;
use super::{Disk, DiskName, Node};
use crate::control::api::VerifyReport;
use crate::error::{Failure, Outcome};
use crate::migration::phase::DestinationPhase;
use crate::peer::client::PeerClient;
use crate::peer::{MAX_CHECKSUM_BLOCKS, Reply, Request, Subject};
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

const _: () = assert!(STEP <= MAX_CHECKSUM_BLOCKS);

impl Node {
    /// Compares; on the destination.
    pub async fn verify(&self, name: &DiskName) -> Outcome<VerifyReport> {
        let disk = self.disk(name)?;
        let Role::Destination(destination) = disk.role() else {
            return Err(Failure::refused(format!(
                "{name} did not come from another node; verify is done on a migration's destination"
            )));
        };
        let record = destination.view().record;
        if !matches!(record.phase, DestinationPhase::Active | DestinationPhase::Complete) {
            return Err(Failure::refused(format!("{name} is {} here; there is nothing to compare", record.phase)));
        }
        let subject = Subject { disk: name.to_string(), migration: record.migration, epoch: record.epoch };
        let mut report =
            VerifyReport { verified: true, compared_bytes: 0, dirty_bytes: 0, missing_bytes: 0, differing: Vec::new() };
        let blocks = disk.spec.block_size.count(disk.spec.size);
        let mut first = 0;
        while first < blocks {
            let count = STEP.min(blocks - first);
            compare(&disk, destination.peer(), &subject, first, count, &mut report).await?;
            first += count;
        }
        Ok(report)
    }
}

async fn compare(
    disk: &Disk,
    peer: &PeerClient,
    subject: &Subject,
    first: u64,
    count: u64,
    report: &mut VerifyReport,
) -> Outcome<()> {
    let before = flags(disk, first, count).await?;
    if before.iter().any(|&flags| flags & (PRESENT | DIRTY) == PRESENT) {
        let request = Request::Checksums { subject: subject.clone(), first, count };
        let theirs = match peer.call(&request, ANSWER_TIME).await {
            Ok(Reply::Checksums { digests }) if digests.len() == DIGITS * count as usize && digests.is_ascii() => {
                digests
            }
            Ok(_) => return Err(Failure::failed("the source answered something else than checksums")),
            Err(error) => return Err(error.into_failure().context("cannot compare with the source")),
        };
        let ours = checksums(disk, first, count).await?;
        // What was written meanwhile is not compared.
        let after = flags(disk, first, count).await?;
        for block in 0..count as usize {
            if before[block] & PRESENT == 0 || after[block] & DIRTY != 0 {
                continue;
            }
            let digits = block * DIGITS..(block + 1) * DIGITS;
            let index = BlockIndex(first + block as u64);
            report.compared_bytes += bytes(disk, index);
            if ours[digits.clone()] != theirs[digits] {
                report.verified = false;
                if report.differing.len() < MAX_NAMED {
                    report.differing.push(index.0 * disk.spec.block_size.bytes());
                }
            }
        }
        count_flags(disk, first, &after, report);
    } else {
        count_flags(disk, first, &before, report);
    }
    Ok(())
}

fn count_flags(disk: &Disk, first: u64, flags: &[u64], report: &mut VerifyReport) {
    for (block, flags) in flags.iter().enumerate() {
        let bytes = bytes(disk, BlockIndex(first + block as u64));
        if flags & DIRTY != 0 {
            report.dirty_bytes += bytes;
        } else if flags & PRESENT == 0 {
            report.missing_bytes += bytes;
        }
    }
}

fn bytes(disk: &Disk, block: BlockIndex) -> u64 {
    disk.spec.block_size.bytes_of(BlockRange::new(block, BlockIndex(block.0 + 1)), disk.spec.size).len()
}

/// The map's flags of each block.
async fn flags(disk: &Disk, first: u64, count: u64) -> Outcome<Vec<u64>> {
    let unit = disk.spec.block_size.bytes();
    let range =
        disk.spec.block_size.bytes_of(BlockRange::new(BlockIndex(first), BlockIndex(first + count)), disk.spec.size);
    let mut flags = Vec::with_capacity(count as usize);
    let mut at = range.start;
    while at < range.end {
        let answer = disk.export.block_status("lazy-migrate:present", at, range.end - at, count as usize);
        let extents = match answer {
            Answer::Now(extents) => extents,
            Answer::Later(extents) => extents.await,
        };
        let extents =
            extents.map_err(|errno| Failure::failed(format!("cannot read the map of {}: {errno}", disk.name())))?;
        if extents.is_empty() {
            return Err(Failure::failed(format!("the map of {} has a gap at {at}", disk.name())));
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
pub(super) async fn checksums(disk: &Disk, first: u64, count: u64) -> Outcome<String> {
    let block_size = disk.spec.block_size;
    let blocks = block_size.count(disk.spec.size);
    if count > MAX_CHECKSUM_BLOCKS || first.checked_add(count).is_none_or(|end| end > blocks) {
        return Err(Failure::refused(format!(
            "{} has {blocks} blocks; {count} from {first} on were asked",
            disk.name()
        )));
    }
    let mut digests = String::with_capacity(DIGITS * count as usize);
    let mut buffer = vec![0; block_size.bytes() as usize];
    for block in first..first + count {
        let range = block_size.bytes_of(BlockRange::new(BlockIndex(block), BlockIndex(block + 1)), disk.spec.size);
        let buffer = &mut buffer[..range.len() as usize];
        let read = match disk.export.read(range.start, buffer) {
            ReadAnswer::Now(read) => read.map(|()| blake3::hash(buffer)),
            ReadAnswer::Later(bytes) => bytes.await.map(|bytes| blake3::hash(&bytes)),
        };
        let hash =
            read.map_err(|errno| Failure::failed(format!("cannot read {} at {}: {errno}", disk.name(), range.start)))?;
        digests.push_str(&hash.to_hex().as_str()[..DIGITS]);
        if block % 64 == 0 {
            tokio::task::yield_now().await;
        }
    }
    Ok(digests)
}
