//! A node's events: the last ones in memory for whoever asks, all of them in the directories of their disks.
//!
//! ```text
//! state-dir/disks/NAME/events.jsonl      one event a line
//! state-dir/disks/NAME/events.1.jsonl    what was in it before it became long
//! state-dir/disks/NAME/history.json      how it filled
//! ```
//!
//! Nothing depends on these files: they are not synced, and a line that was cut off is passed over.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use super::event::{Event, EventKind};
use crate::control::status::DiskStatus;
use crate::limits::{EVENTS_FILE_BYTES, EVENTS_KEPT};

const FILE: &str = "events.jsonl";
const OLD: &str = "events.1.jsonl";

/// See the module's text.
pub struct EventLog {
    kept: Mutex<VecDeque<Event>>,
    /// One writer at a time, off the runtime's threads.
    writing: Arc<Mutex<()>>,
    last: watch::Sender<u64>,
}

impl EventLog {
    /// Begins with what is in the disks' directories.
    pub fn open<'a>(directories: impl Iterator<Item = &'a Path>) -> Self {
        let mut events: Vec<Event> = directories.flat_map(read).collect();
        events.sort_by_key(|event| event.seq);
        let last = events.last().map_or(0, |event| event.seq);
        events.drain(..events.len().saturating_sub(EVENTS_KEPT));
        Self { kept: Mutex::new(events.into()), writing: Arc::default(), last: watch::Sender::new(last) }
    }

    /// Something happened to a disk, whose status is this and whose files are in `directory`. Known when this returns; in its
    /// file when the future ends.
    pub fn tell(
        &self,
        status: &DiskStatus,
        directory: &Path,
        kind: EventKind,
    ) -> impl Future<Output = ()> + Send + use<> {
        let event = self.number(status, kind);
        let (writing, directory) = (self.writing.clone(), directory.to_owned());
        async move {
            let written = tokio::task::spawn_blocking(move || {
                let _one = writing.lock().unwrap_or_else(PoisonError::into_inner);
                append(&directory, &event).map_err(|error| (event.disk, error))
            });
            if let Ok(Err((disk, error))) = written.await {
                tracing::debug!(disk, %error, "an event is not in the disk's directory");
            }
        }
    }

    fn number(&self, status: &DiskStatus, kind: EventKind) -> Event {
        let mut kept = self.kept();
        let event = Event {
            seq: *self.last.borrow() + 1,
            at_ms: now_ms(),
            disk: status.name.clone(),
            role: status.role.clone(),
            phase: status.phase.clone(),
            epoch: status.epoch,
            kind,
        };
        if kept.len() == EVENTS_KEPT {
            kept.pop_front();
        }
        kept.push_back(event.clone());
        self.last.send_replace(event.seq);
        event
    }

    /// Those after number `seq`, the oldest first; without the ones that were too many to keep.
    pub fn after(&self, seq: u64) -> Vec<Event> {
        let kept = self.kept();
        let from = kept.partition_point(|event| event.seq <= seq);
        kept.range(from..).cloned().collect()
    }

    /// The number of the last one; changes with each.
    pub fn last(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<Event>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All events in a disk's directory, the oldest first.
pub(crate) fn read(directory: &Path) -> Vec<Event> {
    let lines = [OLD, FILE].into_iter().flat_map(|name| {
        let file = File::open(directory.join(name)).ok().map(BufReader::new);
        // A file that cannot be read on is at its end.
        file.into_iter().flat_map(|file| file.split(b'\n').map_while(Result::ok))
    });
    let mut events: Vec<Event> = lines.filter_map(|line| serde_json::from_slice(&line).ok()).collect();
    // Two that were told at the same time may be written in either order.
    events.sort_by_key(|event| event.seq);
    events
}

fn append(directory: &Path, event: &Event) -> io::Result<()> {
    let path = directory.join(FILE);
    let open = || File::options().read(true).append(true).create(true).mode(0o600).open(&path);
    let mut file = open()?;
    if file.metadata()?.len() >= EVENTS_FILE_BYTES {
        std::fs::rename(&path, directory.join(OLD))?;
        file = open()?;
    }
    let mut line = Vec::new();
    let (length, mut last) = (file.metadata()?.len(), [b'\n']);
    if length > 0 {
        file.read_exact_at(&mut last, length - 1)?;
    }
    if last != [b'\n'] {
        // One that was cut off ends here.
        line.push(b'\n');
    }
    serde_json::to_writer(&mut line, event)?;
    line.push(b'\n');
    file.write_all(&line)
}

/// Milliseconds since 1970, for people: nothing is decided by it.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::event::tests::status;
    use super::*;

    #[tokio::test]
    async fn numbers_go_on_after_a_restart_and_a_torn_line_is_passed_over() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let log = EventLog::open(std::iter::empty());
        log.tell(&status(), one.path(), EventKind::LinkUp).await;
        log.tell(&DiskStatus { name: "db".into(), ..status() }, two.path(), EventKind::LinkDown).await;
        log.tell(&status(), one.path(), EventKind::PullResumed).await;
        let before = log.after(0);
        assert_eq!(before.iter().map(|event| event.seq).collect::<Vec<_>>(), [1, 2, 3]);
        File::options().append(true).open(one.path().join(FILE)).unwrap().write_all(b"{\"seq\":4,\"at").unwrap();
        let again = EventLog::open([one.path(), two.path()].into_iter());
        assert_eq!(again.after(0), before);
        assert_eq!(again.after(2), before[2..]);
        // The torn line must not swallow the next one.
        again.tell(&status(), one.path(), EventKind::LinkDown).await;
        let third = EventLog::open([one.path(), two.path()].into_iter());
        assert_eq!(third.after(3).iter().map(|event| event.seq).collect::<Vec<_>>(), [4]);
    }

    #[tokio::test]
    async fn memory_and_files_are_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let log = EventLog::open(std::iter::empty());
        let kind = EventKind::Error { message: "x".repeat(4000) };
        let count = EVENTS_KEPT + 10;
        for _ in 0..count {
            log.tell(&status(), directory.path(), kind.clone()).await;
        }
        let kept = log.after(0);
        assert_eq!((kept.len(), kept[0].seq, kept[kept.len() - 1].seq), (EVENTS_KEPT, 11, count as u64));
        let bytes: u64 =
            [OLD, FILE].iter().map(|name| directory.path().join(name).metadata().map_or(0, |file| file.len())).sum();
        assert!(bytes < 2 * EVENTS_FILE_BYTES + 10_000, "{bytes}");
    }
}
