//! The page that node and guard share: until when the container may run, and what the guard has done.
//!
//! Each word has one writer: the node moves the deadline, the guard reports. The file is meant for one container group
//! and one boot; a new file (never an old one rewritten) makes a guard of the old one end. Best kept where no disk is
//! behind it (`/run`): a store to a mapped file waits for its disk, and a stuck disk would hold the node up in
//! [`GuardLease::set_deadline`] and delay the guard's report. The freezing does not depend on it (see `process`).

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use memmap2::MmapRaw;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::Error;
use crate::store::BootId;
use crate::units::BootTime;

/// The whole file: one page, so that it is mapped as it is.
const FILE_BYTES: usize = 4096;
/// The first word: what this is, with its version.
const MARK: u64 = u64::from_le_bytes(*b"LAZYGRD1");

/// Where the words are. Those of different writers are on cache lines of their own.
const MARK_WORD: usize = 0;
const BOOT_WORDS: [usize; 2] = [1, 2];
const DEADLINE_WORD: usize = 8;
const FIRED_WORD: usize = 16;
const ALIVE_WORD: usize = 24;

/// The deadline word's value for "no lease is needed any more".
const ENDLESS: u64 = u64::MAX;

/// How long a guard tries for its lock: a question whether somebody guards holds it for a moment too.
const LOCK_PATIENCE: Duration = Duration::from_millis(100);
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// A lease file, mapped.
pub struct GuardLease {
    path: PathBuf,
    file: File,
    mapping: MmapRaw,
}

impl GuardLease {
    /// Makes a new file (mode 0600) whose deadline is in the past: everything must stand still until the node says
    /// otherwise. A file that was there is replaced, and its guard ends; so open the one that is there if it can be.
    pub fn create(path: &Path) -> Result<GuardLease, Error> {
        let boot = BootId::current()?;
        let mut page = [0; FILE_BYTES];
        for (word, value) in [(MARK_WORD, MARK), (BOOT_WORDS[0], low(boot)), (BOOT_WORDS[1], high(boot))] {
            page[word * 8..][..8].copy_from_slice(&value.to_ne_bytes());
        }
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(".new");
        let write = || -> io::Result<()> {
            match std::fs::remove_file(&temporary) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            // Not synced: after a power loss it is of another boot anyway.
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?.write_all(&page)?;
            std::fs::rename(&temporary, path)
        };
        write().map_err(Error::io("create", path))?;
        Self::open(path)
    }

    /// Maps the file that is there. One that is damaged, or of another boot of this host, is refused.
    pub fn open(path: &Path) -> Result<GuardLease, Error> {
        let not_a_lease = |why: String| Error::NotALease { path: path.to_owned(), why };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(Error::io("open", path))?;
        let length = file.metadata().map_err(Error::io("read", path))?.len();
        if length != FILE_BYTES as u64 {
            return Err(not_a_lease(format!("it has {length} bytes, not {FILE_BYTES}")));
        }
        let mapping = MmapRaw::map_raw(&file).map_err(Error::io("map", path))?;
        let lease = GuardLease { path: path.to_owned(), file, mapping };
        if lease.load(MARK_WORD) != MARK {
            return Err(not_a_lease("it does not begin with the mark of this version".into()));
        }
        let boot = BootId::current()?;
        if BOOT_WORDS.map(|word| lease.load(word)) != [low(boot), high(boot)] {
            return Err(Error::OtherBoot { path: path.to_owned() });
        }
        Ok(lease)
    }

    /// The node's word: when everything must stand still; `None` when no lease is needed any more, and then the guard
    /// ends. A later deadline than before counts at once, an earlier one within a quarter of a second.
    pub fn set_deadline(&self, deadline: Option<BootTime>) {
        let word = deadline.map_or(ENDLESS, |deadline| nanoseconds(deadline).min(ENDLESS - 1));
        self.word(DEADLINE_WORD).store(word, Ordering::SeqCst);
    }

    /// What [`GuardLease::set_deadline`] said last.
    pub fn deadline(&self) -> Option<BootTime> {
        let word = self.load(DEADLINE_WORD);
        (word != ENDLESS).then(|| boot_time(word))
    }

    /// A count that rises with each freeze: when it begins and when it is done. So a node that reads it after it has
    /// renewed, then thaws if it is another than before, and does so **at every beat**, never leaves a container frozen
    /// for good that the guard froze while the renewal was on its way.
    pub fn fired(&self) -> u64 {
        self.load(FIRED_WORD)
    }

    /// When the guard last looked at the deadline: at most about a quarter of a second ago while it lives. For diagnosis
    /// only; zero when no guard was there yet.
    pub fn alive(&self) -> BootTime {
        boot_time(self.load(ALIVE_WORD))
    }

    /// Whether a guard watches the file that is at the path now: it is ready, and holds its lock.
    pub fn is_guarded(&self) -> bool {
        is_guarded(&self.path)
    }

    /// The guard's report.
    pub(super) fn record(&self, fired: u64, alive: BootTime) {
        self.word(FIRED_WORD).store(fired, Ordering::SeqCst);
        self.word(ALIVE_WORD).store(nanoseconds(alive), Ordering::Relaxed);
    }

    /// Whether the file's last name is gone: nobody can move this deadline any more.
    pub(super) fn is_unlinked(&self) -> bool {
        self.file.metadata().is_ok_and(|metadata| metadata.nlink() == 0)
    }

    /// Takes the guard's lock, for as long as the answer lives.
    pub(super) fn lock(&self) -> Result<Flock<File>, Error> {
        // Of the mapped file itself, not of what is at its path by now.
        let mut file = self.file.try_clone().map_err(Error::io("lock", &self.path))?;
        let mut waited = Duration::ZERO;
        loop {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(locked) => return Ok(locked),
                Err((_, Errno::EWOULDBLOCK)) if waited >= LOCK_PATIENCE => {
                    return Err(Error::Busy { path: self.path.clone() });
                }
                Err((file, Errno::EWOULDBLOCK)) => file,
                Err((_, errno)) => return Err(Error::io("lock", &self.path)(errno)),
            };
            std::thread::sleep(LOCK_PAUSE);
            waited += LOCK_PAUSE;
        }
    }

    fn load(&self, word: usize) -> u64 {
        self.word(word).load(Ordering::SeqCst)
    }

    #[allow(unsafe_code)]
    fn word(&self, word: usize) -> &AtomicU64 {
        assert!((word + 1) * 8 <= self.mapping.len(), "a word beyond the page");
        // SAFETY: the word lies within the mapping (checked above), which lives as long as `self`; mappings begin at a
        // page, so the word is aligned; it is only ever used as an atomic, also by the other process that has the file
        // mapped; and every bit pattern is a valid u64.
        unsafe { &*self.mapping.as_mut_ptr().cast::<AtomicU64>().add(word) }
    }
}

/// Whether a guard watches the file at `path`. Costs an open and a lock that is given back at once.
pub(super) fn is_guarded(path: &Path) -> bool {
    // A shared lock, so that two who ask at once do not take each other for a guard.
    let asked = File::open(path).map(|file| Flock::lock(file, FlockArg::LockSharedNonblock));
    matches!(asked, Ok(Err((_, Errno::EWOULDBLOCK))))
}

fn nanoseconds(time: BootTime) -> u64 {
    u64::try_from(time.since_boot().as_nanos()).unwrap_or(u64::MAX)
}

fn boot_time(nanoseconds: u64) -> BootTime {
    BootTime::new(Duration::from_nanos(nanoseconds))
}

fn low(boot: BootId) -> u64 {
    boot.0 as u64
}

fn high(boot: BootId) -> u64 {
    (boot.0 >> 64) as u64
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn at(seconds: u64) -> BootTime {
        BootTime::new(Duration::from_secs(seconds))
    }

    fn place() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("guard.lease");
        (directory, path)
    }

    #[test]
    fn a_new_file_says_that_all_stands_still_and_is_private() {
        let (_directory, path) = place();
        let lease = GuardLease::create(&path).unwrap();
        assert_eq!((lease.deadline(), lease.fired(), lease.alive()), (Some(at(0)), 0, at(0)));
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(!lease.is_guarded());
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "a temporary file is left");
    }

    #[test]
    fn both_sides_see_each_others_words_through_the_file() {
        let (_directory, path) = place();
        let node = GuardLease::create(&path).unwrap();
        let guard = GuardLease::open(&path).unwrap();
        node.set_deadline(Some(at(70)));
        guard.record(3, at(60));
        assert_eq!((guard.deadline(), node.fired(), node.alive()), (Some(at(70)), 3, at(60)));
        node.set_deadline(None);
        assert_eq!(guard.deadline(), None);
        node.set_deadline(Some(BootTime::new(Duration::MAX)));
        assert!(guard.deadline().is_some(), "the last point in time is taken for no deadline");
        drop(node);
        assert_eq!(GuardLease::open(&path).unwrap().fired(), 3);
    }

    #[test]
    fn a_file_that_is_replaced_is_unlinked_for_who_has_the_old_one() {
        let (_directory, path) = place();
        let old = GuardLease::create(&path).unwrap();
        assert!(!old.is_unlinked());
        let new = GuardLease::create(&path).unwrap();
        assert!(old.is_unlinked() && !new.is_unlinked());
    }

    #[test]
    fn one_guard_at_a_time_and_a_question_is_no_guard() {
        let (_directory, path) = place();
        let node = GuardLease::create(&path).unwrap();
        let guard = GuardLease::open(&path).unwrap();
        let lock = guard.lock().unwrap();
        assert!(node.is_guarded());
        assert!(matches!(GuardLease::open(&path).unwrap().lock(), Err(Error::Busy { .. })));
        drop(lock);
        assert!(!node.is_guarded());
        // Somebody who asks meanwhile neither looks like a guard nor keeps one out for long.
        let asks = Flock::lock(File::open(&path).unwrap(), FlockArg::LockSharedNonblock).unwrap();
        assert!(!node.is_guarded());
        let waits = std::thread::spawn(move || guard.lock().is_ok());
        drop(asks);
        assert!(waits.join().unwrap());
    }

    #[test]
    fn damaged_files_and_those_of_another_boot_are_refused_with_the_reason() {
        let (_directory, path) = place();
        let refused = |damage: &dyn Fn(&File)| {
            drop(GuardLease::create(&path).unwrap());
            damage(&OpenOptions::new().write(true).open(&path).unwrap());
            GuardLease::open(&path).map(drop).unwrap_err().to_string()
        };
        let truncated = refused(&|file| file.set_len(100).unwrap());
        assert!(truncated.contains("it has 100 bytes"), "{truncated}");
        let mark = refused(&|file| file.write_all_at(b"LAZYGRD9", 0).unwrap());
        assert!(mark.contains("mark of this version"), "{mark}");
        for word in BOOT_WORDS {
            let boot = refused(&|file| file.write_all_at(&[0; 8], word as u64 * 8).unwrap());
            assert!(boot.contains("another boot"), "{boot}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(GuardLease::open(&path), Err(Error::Io { what: "open", .. })));
    }
}
