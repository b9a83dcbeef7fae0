//! The guard process itself: `lazy-migrate guard`.
//!
//! One thread sleeps to the deadline and freezes. It touches memory that is locked and the cgroup file system, nothing
//! else: no disk, no log, no allocation, no lock, so that nothing that went wrong on this host can hold it up. All that
//! may wait is the scribe's (see `report`).

use std::ffi::CString;
use std::fmt::Display;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, ClockNanosleepFlags, clock_nanosleep};
use nix::unistd::{setsid, write};

use super::Error;
use super::lease_file::GuardLease;
use super::report::{Report, Scribe, say};
use super::watch::{Sight, Tried, Turn, Watch};
use crate::clock;
use crate::container::Cgroup;
use crate::units::BootTime;

/// Guards the container in `cgroup` for as long as the lease file at `lease` asks for it. Returns when no lease is
/// needed any more, when the file is gone, or after SIGTERM, when it has frozen the container. SIGINT and SIGHUP do
/// nothing. The group need not exist yet. Fails with [`Error::Busy`] when somebody else guards.
///
/// For a process of its own: it changes the process's session, signals, priority and memory.
pub fn run(lease: &Path, cgroup: &Cgroup) -> Result<(), Error> {
    let lease = Arc::new(GuardLease::open(lease)?);
    let freezer = Freezer::of(cgroup)?;
    // A session of its own, if it has none: what ends a terminal or its jobs is not meant for it.
    let _ = setsid();
    std::env::set_current_dir("/").map_err(Error::io("go to", Path::new("/")))?;
    let orders = Orders::listen()?;
    let warnings = stand_above_the_rest();
    // Last, because who holds the lock is ready.
    let _lock = lease.lock()?;
    for warning in warnings {
        say(cgroup, &warning);
    }
    let report = Report::new(lease.fired());
    let scribe = Scribe::start(report.clone(), lease.clone(), cgroup.clone())
        .map_err(Error::io("start a thread for", Path::new(cgroup.path())))?;
    freezer.watch(&lease, &orders, &report, &scribe);
    scribe.finish();
    Ok(())
}

/// Writes to one group's `cgroup.freeze`.
struct Freezer {
    path: CString,
}

impl Freezer {
    fn of(cgroup: &Cgroup) -> Result<Freezer, Error> {
        let path = cgroup.dir()?.join("cgroup.freeze");
        let text = CString::new(path.as_os_str().as_bytes()).map_err(Error::io("name", &path))?;
        Ok(Freezer { path: text })
    }

    fn watch(&self, lease: &GuardLease, orders: &Orders, report: &Report, scribe: &Scribe) {
        let mut watch = Watch::default();
        let mut told_to_end = false;
        loop {
            if !told_to_end && orders.told_to_end() {
                told_to_end = true;
                report.told_to_end();
            }
            let look =
                || Sight { now: clock::now(), deadline: lease.deadline(), unlinked: report.unlinked(), told_to_end };
            let sight = look();
            report.turned(sight.now);
            match watch.turn(sight) {
                Turn::End => return,
                Turn::SleepUntil(until) => sleep_until(until),
                Turn::Freeze => {
                    // A renewal that came in time counts up to the last moment.
                    let outcome = self.freeze(report, || look().must_stand());
                    let tried = match outcome {
                        Ok(false) => continue,
                        Ok(true) => Tried::Frozen,
                        Err(errno) => Tried::of(errno),
                    };
                    if watch.tried(sight, tried) {
                        report.news(outcome.err());
                    }
                    scribe.wake();
                }
            }
        }
    }

    /// Freezes if it is still wanted when all is ready for it; answers whether it was.
    fn freeze(&self, report: &Report, wanted: impl FnOnce() -> bool) -> Result<bool, Errno> {
        // Opened each time: the group may have been removed and made again.
        let file = open(self.path.as_c_str(), OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        report.fired();
        if !wanted() {
            return Ok(false);
        }
        let written = write(&file, b"1");
        // Counted again when it is done: a node that renewed, counted and thawed just before the write must see that
        // there was another.
        report.fired();
        written.map(|_| true)
    }
}

impl Tried {
    /// What a refusal means.
    pub(super) fn of(errno: Errno) -> Tried {
        // ENODEV: the group went away while its file was open.
        if matches!(errno, Errno::ENOENT | Errno::ENODEV) { Tried::Absent } else { Tried::Failed }
    }
}

/// What the process is told by signals.
struct Orders(SignalFd);

impl Orders {
    /// Blocks the signals that would end the process, and listens for the one that counts.
    fn listen() -> Result<Orders, Error> {
        let failed = || Error::io("set the signals of", Path::new("/proc/self"));
        let mut blocked = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            blocked.add(signal);
        }
        blocked.thread_block().map_err(failed())?;
        let mut heard = SigSet::empty();
        heard.add(Signal::SIGTERM);
        let signals = SignalFd::with_flags(&heard, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC);
        signals.map(Orders).map_err(failed())
    }

    fn told_to_end(&self) -> bool {
        matches!(self.0.read_signal(), Ok(Some(_)))
    }
}

fn sleep_until(until: BootTime) {
    let until = TimeSpec::from_duration(until.since_boot());
    // A signal or an error ends the sleep early, and then there is only one look more.
    let _ = clock_nanosleep(ClockId::CLOCK_BOOTTIME, ClockNanosleepFlags::TIMER_ABSTIME, &until);
}

/// What keeps a busy, full or starved host from holding the guard up. Where it is not allowed the guard still guards;
/// the answer says what was not.
fn stand_above_the_rest() -> Vec<String> {
    let mut warnings = Vec::new();
    let mut warn = |what: &str, error: &dyn Display| warnings.push(format!("warning: cannot {what}: {error}"));
    if let Err(errno) = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE) {
        warn("lock its memory; a host that is out of memory may delay it", &errno);
    }
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        warn("protect itself from being killed when memory runs out", &error);
    }
    if let Err(real_time) = run_in_real_time()
        && let Err(nice) = run_before_others()
    {
        warn("raise its priority; a busy host may delay it", &format!("{real_time}, and {nice}"));
    }
    warnings
}

#[allow(unsafe_code)]
fn run_in_real_time() -> Result<(), Errno> {
    let lowest = nix::libc::sched_param { sched_priority: 1 };
    // SAFETY: the call reads one `sched_param`, which lives until it returns, and changes only this thread's scheduling.
    Errno::result(unsafe { nix::libc::sched_setscheduler(0, nix::libc::SCHED_RR, &lowest) }).map(drop)
}

#[allow(unsafe_code)]
fn run_before_others() -> Result<(), Errno> {
    // SAFETY: the call takes no pointer and changes only this process's priority.
    Errno::result(unsafe { nix::libc::setpriority(nix::libc::PRIO_PROCESS, 0, -20) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(state: &str) -> (tempfile::TempDir, Freezer) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cgroup.freeze");
        std::fs::write(&path, state).unwrap();
        let path = CString::new(path.as_os_str().as_bytes()).unwrap();
        (directory, Freezer { path })
    }

    fn state(freezer: &Freezer) -> String {
        std::fs::read_to_string(freezer.path.to_str().unwrap()).unwrap()
    }

    #[test]
    fn a_node_that_renews_and_thaws_just_before_the_write_sees_another_count_after_it() {
        let (_directory, freezer) = place("0");
        let report = Report::new(7);
        let mut seen = 0;
        let frozen = freezer.freeze(&report, || {
            // The guard has read the deadline, and before it writes the node has its whole turn.
            seen = report.count();
            true
        });
        assert_eq!((frozen, state(&freezer).as_str()), (Ok(true), "1"));
        assert!(seen > 7, "the beginning is not counted");
        assert!(report.count() > seen, "the node does not learn of the write");
    }

    #[test]
    fn a_renewal_up_to_the_last_moment_leaves_the_group_alone() {
        let (_directory, freezer) = place("0");
        assert_eq!(freezer.freeze(&Report::new(0), || false), Ok(false));
        assert_eq!(state(&freezer), "0");
    }

    #[test]
    fn a_group_that_is_not_there_is_no_freeze_and_counts_as_none() {
        let (directory, freezer) = place("0");
        drop(directory);
        let report = Report::new(0);
        let refused = freezer.freeze(&report, || true).unwrap_err();
        assert_eq!((Tried::of(refused), report.count()), (Tried::Absent, 0));
        assert_eq!(Tried::of(Errno::EACCES), Tried::Failed);
    }
}
