//! The journal file: appends a record and makes it durable before anybody acts on it.
//!
//! The form of the file is in [`super::record`]. A torn last line is cut off when the journal is opened; everything else
//! that does not fit is an error and leaves the file as it is.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::record::{self, JournalError, Record};

/// The largest journal that is read: some ten records a migration, a few hundred bytes each.
const MAX_JOURNAL_BYTES: u64 = 64 << 20;

/// The record of who owns a disk at which epoch. Each host's own journal is one; an arbiter outside of both hosts would
/// be another.
pub trait OwnershipRecord: Send {
    /// Adds a record; when this returns `Ok` it is durable, and what it stands for may be done.
    fn append(&mut self, record: &Record) -> Result<(), Error>;
}

/// A disk's journal, open for appending.
#[derive(Debug)]
pub struct Journal {
    disk: String,
    path: PathBuf,
    file: File,
    count: u64,
    /// An append failed: what stands in the file is not known, so nothing may follow it.
    poisoned: bool,
}

/// A journal that cannot be opened or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system says no.
    #[error("{what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Its content cannot be used.
    #[error("{path}")]
    Content {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: JournalError,
    },
    /// An earlier append failed.
    #[error("{0}: an earlier record could not be written, so no other may follow; restart the node")]
    Poisoned(PathBuf),
}

impl Journal {
    /// Opens or creates the journal of a disk, and reads its last record.
    pub fn open(path: &Path, disk: &str) -> Result<(Journal, Option<Record>), Error> {
        let io = |what| move |source| Error::Io { what, path: path.to_path_buf(), source };
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .map_err(io("cannot open journal"))?;
        // A part of it must not be taken for a torn whole.
        if file.metadata().map_err(io("cannot read journal"))?.len() > MAX_JOURNAL_BYTES {
            return Err(io("too large to be a journal:")(io::ErrorKind::FileTooLarge.into()));
        }
        let mut bytes = Vec::new();
        (&mut file).take(MAX_JOURNAL_BYTES).read_to_end(&mut bytes).map_err(io("cannot read journal"))?;
        let found =
            record::decode(disk, &bytes).map_err(|source| Error::Content { path: path.to_path_buf(), source })?;
        let (whole, count) = found.as_ref().map_or((0, 0), |found| (found.whole_bytes, found.count));
        if whole < bytes.len() as u64 {
            tracing::warn!(disk, path = %path.display(), "the journal's last record was cut short and is dropped");
            file.set_len(whole).and_then(|()| file.sync_all()).map_err(io("cannot cut journal"))?;
        }
        file.seek(SeekFrom::End(0)).map_err(io("cannot seek in journal"))?;
        if let Some(directory) = path.parent() {
            File::open(directory).and_then(|dir| dir.sync_all()).map_err(io("cannot sync the directory of journal"))?;
        }
        let journal = Journal { disk: disk.into(), path: path.into(), file, count, poisoned: false };
        Ok((journal, found.map(|found| found.record)))
    }
}

impl OwnershipRecord for Journal {
    fn append(&mut self, record: &Record) -> Result<(), Error> {
        if self.poisoned {
            return Err(Error::Poisoned(self.path.clone()));
        }
        let io = |what| {
            let path = self.path.clone();
            move |source| Error::Io { what, path, source }
        };
        let line = record::encode(&self.disk, self.count, record)
            .map_err(|source| io("cannot encode a record for journal")(source.into()))?;
        self.poisoned = true;
        let before = self.file.metadata().map_err(io("cannot look at journal"))?.len();
        let written = self.file.write_all(&line).map_err(io("cannot append to journal"));
        if let Err(error) = written.and_then(|()| self.file.sync_data().map_err(io("cannot sync journal"))) {
            // What it says is not going to happen; so it should not be found either, as far as this file can still be
            // written. Nothing follows in any case.
            if let Err(error) = self.file.set_len(before).and_then(|()| self.file.sync_all()) {
                tracing::warn!(path = %self.path.display(), %error, "a record that failed may be in the journal");
            }
            return Err(error);
        }
        self.poisoned = false;
        self.count += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::lease::Timings;
    use crate::migration::phase::SourcePhase;
    use crate::migration::record::{LinkPolicy, MigrationId, SourceRecord};
    use crate::units::Epoch;

    fn record(phase: SourcePhase) -> Record {
        Record::Source(SourceRecord {
            migration: MigrationId("m".into()),
            epoch: Epoch(1),
            phase,
            peer: "127.0.0.1:1".into(),
            peer_name: None,
            timings: Timings::default(),
            container: None,
            policy: LinkPolicy::default(),
            seal: None,
            base: None,
        })
    }

    #[test]
    fn what_was_appended_is_there_after_reopening_and_a_torn_line_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let (mut journal, none) = Journal::open(&path, "web").unwrap();
        assert_eq!(none, None);
        journal.append(&record(SourcePhase::Preparing)).unwrap();
        journal.append(&record(SourcePhase::Frozen)).unwrap();
        drop(journal);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        let (mut journal, found) = Journal::open(&path, "web").unwrap();
        assert_eq!(found, Some(record(SourcePhase::Preparing)));
        journal.append(&record(SourcePhase::Serving)).unwrap();
        let (_, found) = Journal::open(&path, "web").unwrap();
        assert_eq!(found, Some(record(SourcePhase::Serving)));
    }

    #[test]
    fn a_damaged_journal_is_refused_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        std::fs::write(&path, b"00000000 {}\n").unwrap();
        assert!(matches!(Journal::open(&path, "web"), Err(Error::Content { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"00000000 {}\n");
    }
}
