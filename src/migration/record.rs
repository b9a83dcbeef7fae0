//! What the journal says of a disk, and how a record stands in it. Pure: bytes in, records out.
//!
//! A journal is a text file that only grows: one record a line, `CRC JSON`, where CRC is the CRC-32 of the JSON in
//! eight hex digits. The last whole line counts. A last line without its newline is a record whose effect never
//! happened, because a record is synced before its effect. Everything else that does not fit is damage, and refused.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::lease::Timings;
use super::phase::{DestinationPhase, SourcePhase};
use crate::units::{BlockSize, Epoch, ImageMark};

/// The version of the record's shape; a newer one is refused.
pub const VERSION: u32 = 1;

/// The longest line that is read: a record is far shorter.
pub const MAX_LINE_BYTES: usize = 64 << 10;

/// One attempt to move one disk; chosen at random by the source.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MigrationId(pub String);

/// What the source does by itself when the destination falls silent after the handover.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OnLinkFailure {
    /// Nothing: an operator decides.
    #[default]
    Wait,
    /// Take the disk back, as soon as that is safe.
    Rollback,
}

/// The operator's instructions for the time after the handover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkPolicy {
    /// What to do.
    pub on_link_failure: OnLinkFailure,
    /// After how long without a word from the destination.
    pub link_timeout: Duration,
}

impl Default for LinkPolicy {
    fn default() -> Self {
        Self { on_link_failure: OnLinkFailure::default(), link_timeout: Duration::from_secs(30) }
    }
}

/// What a rollback restores. (Carrying the destination's writes back would be another one.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RollbackMode {
    /// The disk and the container as they were frozen at the source; what the destination wrote since is given up.
    #[default]
    FreezePoint,
}

/// The container that is frozen here with its disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceContainer {
    /// The runtime's name for it.
    pub id: String,
    /// Which runtime it runs in.
    pub runtime: String,
    /// Where the disk's file system is mounted.
    pub mount: PathBuf,
    /// Its own network namespace, if it has one: packets are dropped there from the freeze to the end.
    pub netns: Option<PathBuf>,
    /// Move TCP connections with it.
    pub tcp_established: bool,
    /// Its bundle: what it is restored with if this host is restarted before the release.
    pub bundle: PathBuf,
}

/// A source's part of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// Which attempt.
    pub migration: MigrationId,
    /// The epoch that is offered or handed over; after a rollback the one after it.
    pub epoch: Epoch,
    /// How far it is.
    pub phase: SourcePhase,
    /// The destination's peer address.
    pub peer: String,
    /// The name that the destination's certificate has; `None` where the link is not encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_name: Option<String>,
    /// The lease's timings.
    pub timings: Timings,
    /// The container, when one moves along.
    pub container: Option<SourceContainer>,
    /// What to do when the destination falls silent.
    pub policy: LinkPolicy,
    /// The image at the freeze point; `None` where nothing tells (a block device).
    pub seal: Option<ImageMark>,
    /// The migration that brought the disk to this host, if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<MigrationId>,
}

impl SourceRecord {
    /// The container that was frozen and does not go on (yet), although the disk is this host's, and read-write.
    pub fn held(&self) -> Option<&SourceContainer> {
        self.container.as_ref().filter(|_| self.phase == SourcePhase::Serving)
    }
}

/// The container that was, or is to be, restored here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DestinationContainer {
    /// The runtime's name for it: the same as at the source.
    pub id: String,
    /// Which runtime.
    pub runtime: String,
    /// Move TCP connections with it.
    pub tcp_established: bool,
}

/// A destination's part of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DestinationRecord {
    /// Which attempt.
    pub migration: MigrationId,
    /// The epoch that the handover will have, or had.
    pub epoch: Epoch,
    /// How far it is.
    pub phase: DestinationPhase,
    /// Whether this host has ever owned the disk: then its store may hold what is nowhere else.
    pub owned: bool,
    /// Where the source's node answers: peer messages and blocks.
    pub source: String,
    /// The name that the source's certificate has; `None` where the link is not encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_name: Option<String>,
    /// The disk's size in bytes.
    pub size: u64,
    /// The unit of the block map.
    pub block_size: BlockSize,
    /// The lease's timings.
    pub timings: Timings,
    /// The container, when one moves along.
    pub container: Option<DestinationContainer>,
}

/// Either side's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "kebab-case")]
pub enum Record {
    /// This host gives the disk away.
    Source(SourceRecord),
    /// This host receives it.
    Destination(DestinationRecord),
}

impl Record {
    /// The highest epoch that this host has seen of the disk.
    pub fn epoch(&self) -> Epoch {
        match self {
            Record::Source(record) => record.epoch,
            Record::Destination(record) => record.epoch,
        }
    }
}

/// A journal that cannot be used. Nothing is overwritten.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A line is damaged.
    #[error("journal line {line} is damaged ({what}); nothing was changed, restore the journal or remove the disk")]
    Damaged {
        /// From 1.
        line: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Written by a newer version of this program.
    #[error("journal line {line} has version {version}, newer than {VERSION}; use the newer lazy-migrate")]
    Newer {
        /// From 1.
        line: usize,
        /// What it says.
        version: u32,
    },
    /// It speaks of another disk.
    #[error("the journal belongs to disk '{found}', not to '{expected}'; nothing was changed")]
    OtherDisk {
        /// What was expected.
        expected: String,
        /// What it says.
        found: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Line {
    version: u32,
    disk: String,
    sequence: u64,
    record: Record,
}

/// What a journal file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Journaled {
    /// The last whole record.
    pub record: Record,
    /// How many records there are.
    pub count: u64,
    /// How many bytes at the start are whole records; the rest is a record that was cut short.
    pub whole_bytes: u64,
}

/// The line that appends a record as number `sequence` (from 0).
pub fn encode(disk: &str, sequence: u64, record: &Record) -> Result<Vec<u8>, serde_json::Error> {
    let json = serde_json::to_string(&Line { version: VERSION, disk: disk.into(), sequence, record: record.clone() })?;
    Ok(format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes())).into_bytes())
}

/// Reads a journal's bytes; `None` when no record was ever completed.
pub fn decode(disk: &str, bytes: &[u8]) -> Result<Option<Journaled>, JournalError> {
    let mut last = None;
    let mut whole_bytes = 0;
    for (number, line) in bytes.split_inclusive(|&byte| byte == b'\n').enumerate() {
        let Some(text) = line.strip_suffix(b"\n") else { break };
        let damaged = |what| JournalError::Damaged { line: number + 1, what };
        if text.len() > MAX_LINE_BYTES {
            return Err(damaged("it is too long"));
        }
        let text = std::str::from_utf8(text).map_err(|_| damaged("it is not text"))?;
        let (crc, json) = text.split_once(' ').ok_or_else(|| damaged("it has no checksum"))?;
        if u32::from_str_radix(crc, 16) != Ok(crc32fast::hash(json.as_bytes())) {
            return Err(damaged("its checksum does not fit"));
        }
        // The version first: a newer record may have another shape.
        let version = serde_json::from_str::<serde_json::Value>(json).ok();
        let version = version.and_then(|value| value.get("version")?.as_u64()).ok_or_else(|| damaged("no version"))?;
        if version > u64::from(VERSION) {
            return Err(JournalError::Newer { line: number + 1, version: u32::try_from(version).unwrap_or(u32::MAX) });
        }
        let parsed: Line = serde_json::from_str(json).map_err(|_| damaged("its fields are not those of a record"))?;
        if parsed.disk != disk {
            return Err(JournalError::OtherDisk { expected: disk.into(), found: parsed.disk });
        }
        if parsed.sequence != number as u64 {
            return Err(damaged("a record before it is missing"));
        }
        whole_bytes += line.len() as u64;
        last = Some(Journaled { record: parsed.record, count: number as u64 + 1, whole_bytes });
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(epoch: u64, phase: SourcePhase) -> Record {
        Record::Source(SourceRecord {
            migration: MigrationId("m1".into()),
            epoch: Epoch(epoch),
            phase,
            peer: "10.0.0.2:10810".into(),
            peer_name: None,
            timings: Timings::default(),
            container: None,
            policy: LinkPolicy::default(),
            seal: None,
            base: None,
        })
    }

    fn two() -> Vec<u8> {
        let mut bytes = encode("web", 0, &record(1, SourcePhase::Preparing)).unwrap();
        bytes.extend(encode("web", 1, &record(1, SourcePhase::HandedOver)).unwrap());
        bytes
    }

    #[test]
    fn the_last_whole_record_counts() {
        let bytes = two();
        let found = decode("web", &bytes).unwrap().unwrap();
        assert_eq!((found.record, found.count), (record(1, SourcePhase::HandedOver), 2));
        assert_eq!(decode("web", b"").unwrap(), None);
    }

    #[test]
    fn a_record_cut_short_anywhere_never_happened() {
        let bytes = two();
        let first = encode("web", 0, &record(1, SourcePhase::Preparing)).unwrap().len();
        for cut in first..bytes.len() {
            let found = decode("web", &bytes[..cut]).unwrap().unwrap();
            assert_eq!(found.record, record(1, SourcePhase::Preparing), "cut at {cut}");
            assert_eq!(found.whole_bytes, first as u64);
        }
    }

    #[test]
    fn one_changed_byte_anywhere_is_seen() {
        let bytes = two();
        for at in 0..bytes.len() - 1 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            let seen = decode("web", &damaged);
            assert!(seen.is_err() || seen.as_ref().unwrap().as_ref().map(|found| found.count) != Some(2), "byte {at}");
        }
    }

    #[test]
    fn another_disk_a_newer_version_and_a_missing_record_are_refused() {
        assert!(matches!(decode("db", &two()), Err(JournalError::OtherDisk { .. })));
        let json = r#"{"version":2,"disk":"web","sequence":0,"something":"new"}"#;
        let line = format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes()));
        assert!(matches!(decode("web", line.as_bytes()), Err(JournalError::Newer { version: 2, .. })));
        let second = encode("web", 1, &record(1, SourcePhase::HandedOver)).unwrap();
        assert!(matches!(decode("web", &second), Err(JournalError::Damaged { line: 1, .. })));
    }
}
