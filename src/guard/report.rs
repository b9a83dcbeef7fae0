//! What the guard tells: its counters in the lease file, and a line in its log when something happened.
//!
//! The thread that freezes must never wait for a disk, and both a store to a mapped file and a line in a log may do
//! that. So it only sets words in memory here, and a second thread, the scribe, carries them out and looks whether the
//! lease file still has a name.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;

use super::lease_file::GuardLease;
use super::watch::{TURN, Tried};
use crate::container::Cgroup;
use crate::units::BootTime;

/// How long the end of the guard waits for the last words to be written.
const LAST_WORDS: Duration = Duration::from_millis(500);
const LAST_WORDS_PAUSE: Duration = Duration::from_millis(5);

/// What the freezing thread has to say.
#[derive(Debug)]
pub(super) struct Report {
    fired: AtomicU64,
    turned: AtomicU64,
    /// Tries whose outcome was news, and the last one's errno (0: frozen).
    news: AtomicU64,
    errno: AtomicI32,
    told_to_end: AtomicBool,
    unlinked: AtomicBool,
    ended: AtomicBool,
}

impl Report {
    /// Goes on with the count of an earlier guard of the same file.
    pub(super) fn new(fired: u64) -> Arc<Report> {
        Arc::new(Report {
            fired: AtomicU64::new(fired),
            turned: AtomicU64::new(0),
            news: AtomicU64::new(0),
            errno: AtomicI32::new(0),
            told_to_end: AtomicBool::new(false),
            unlinked: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        })
    }

    /// A look at the deadline.
    pub(super) fn turned(&self, now: BootTime) {
        let nanoseconds = u64::try_from(now.since_boot().as_nanos()).unwrap_or(u64::MAX);
        self.turned.store(nanoseconds, Ordering::Relaxed);
    }

    /// A freeze begins, or is done.
    pub(super) fn fired(&self) {
        self.fired.fetch_add(1, Ordering::SeqCst);
    }

    /// The count for the lease file.
    pub(super) fn count(&self) -> u64 {
        self.fired.load(Ordering::SeqCst)
    }

    /// An outcome that is new for its deadline.
    pub(super) fn news(&self, errno: Option<Errno>) {
        self.errno.store(errno.map_or(0, |errno| errno as i32), Ordering::Relaxed);
        self.news.fetch_add(1, Ordering::Release);
    }

    /// The guard was told to end.
    pub(super) fn told_to_end(&self) {
        self.told_to_end.store(true, Ordering::Relaxed);
    }

    /// Whether the scribe found that the lease file has no name any more.
    pub(super) fn unlinked(&self) -> bool {
        self.unlinked.load(Ordering::Relaxed)
    }
}

/// The thread that carries the report out.
pub(super) struct Scribe {
    report: Arc<Report>,
    thread: JoinHandle<()>,
}

impl Scribe {
    /// Starts it.
    pub(super) fn start(report: Arc<Report>, lease: Arc<GuardLease>, cgroup: Cgroup) -> io::Result<Scribe> {
        let told = report.clone();
        // Its memory is locked with the rest, so it gets no more than it needs.
        let builder = std::thread::Builder::new().name("scribe".into()).stack_size(256 * 1024);
        let thread = builder.spawn(move || write_until_the_end(&told, &lease, &cgroup))?;
        Ok(Scribe { report, thread })
    }

    /// Wakes it; never waits.
    pub(super) fn wake(&self) {
        self.thread.thread().unpark();
    }

    /// Lets it write the last words, but not for long: a stuck disk must not keep a guard that has done its work.
    pub(super) fn finish(self) {
        self.report.ended.store(true, Ordering::Release);
        self.wake();
        let mut waited = Duration::ZERO;
        while !self.thread.is_finished() && waited < LAST_WORDS {
            std::thread::sleep(LAST_WORDS_PAUSE);
            waited += LAST_WORDS_PAUSE;
        }
    }
}

fn write_until_the_end(report: &Report, lease: &GuardLease, cgroup: &Cgroup) {
    let (mut news_said, mut end_said) = (0, false);
    loop {
        let ended = report.ended.load(Ordering::Acquire);
        let turned = BootTime::new(Duration::from_nanos(report.turned.load(Ordering::Relaxed)));
        lease.record(report.count(), turned);
        if report.told_to_end.load(Ordering::Relaxed) && !std::mem::replace(&mut end_said, true) {
            say(cgroup, "told to end; the container is frozen first unless no lease is needed any more");
        }
        let news = report.news.load(Ordering::Acquire);
        if std::mem::replace(&mut news_said, news) != news {
            say(cgroup, &words_for(report.errno.load(Ordering::Relaxed)));
        }
        report.unlinked.store(lease.is_unlinked(), Ordering::Relaxed);
        if ended {
            return;
        }
        std::thread::park_timeout(TURN);
    }
}

fn words_for(errno: i32) -> String {
    match (errno, Tried::of(Errno::from_raw(errno))) {
        (0, _) => "frozen; the node thaws it when it holds a lease again".into(),
        (_, Tried::Absent) => "to be frozen, but there is no such group yet; it is frozen once it is there".into(),
        _ => format!("cannot be frozen: {}; trying on", io::Error::from_raw_os_error(errno)),
    }
}

/// One line on stderr, which is the log. A log that cannot be written is no reason to end.
pub(super) fn say(cgroup: &Cgroup, what: &str) {
    let time = humantime::format_rfc3339_millis(SystemTime::now());
    let _ = writeln!(io::stderr(), "{time} guard of {}: {what}", cgroup.path());
}
