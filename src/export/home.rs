//! A thread of an export's own, where its clients are served and what they wait for is fetched.
//!
//! From a client's request to the upstream and back, everything is done on one thread: nobody has to be woken but by the two
//! sockets. It takes no part in the node's other work, so a slow disk or a busy client holds up its own export and
//! neither another one nor the messages between nodes. The background pull is not here: it has a thread too (`fetch::threads`).
//!
//! Where one request follows the other, what takes the time is that threads fall asleep and are woken on another processor.
//! So before this one sleeps it lets others have its processor once: a client or a source that was only waiting for it
//! runs at once, and mostly there is something to do again when it comes back. Where nobody waits, it costs one system call a
//! sleep. And it asks the kernel for short turns, so that it need not wait for the end of a long one of somebody else's.

use std::future::Future;
use std::io;
use std::mem::MaybeUninit;
use std::sync::{Arc, OnceLock};
use std::thread;

use nix::errno::Errno;
use nix::libc::{SCHED_OTHER, SYS_sched_getattr, SYS_sched_setattr, c_uint, sched_attr, syscall};
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::limits::SHORT_TURN;
use crate::pull::PullState;
use crate::thread::{OwnThread, run_on};

/// Ends with the last reference to it; what still runs there is dropped.
#[derive(Debug)]
pub struct Home {
    thread: OwnThread,
    pull: Arc<OnceLock<watch::Receiver<PullState>>>,
}

impl Home {
    /// Starts the thread.
    ///
    /// # Errors
    /// There are no more threads or descriptors.
    pub fn new(name: &str) -> io::Result<Arc<Home>> {
        let pull = Arc::new(OnceLock::new());
        let give_way = {
            let pull = pull.clone();
            move || {
                if may_give_way(&pull) {
                    thread::yield_now();
                }
            }
        };
        let begin = || {
            if let Err(errno) = take_short_turns() {
                tracing::debug!("the kernel gives no short turns: {errno}");
            }
        };
        let thread = OwnThread::start(format!("disk {name}"), begin, give_way)?;
        Ok(Arc::new(Home { thread, pull }))
    }

    /// The thread does not give way while this pull runs, which wants the processors for long: it would wait behind the pull
    /// for its next turn.
    pub(super) fn goes_before(&self, pull: watch::Receiver<PullState>) {
        // One export has one pull.
        let _ = self.pull.set(pull);
    }

    /// To run tasks there.
    pub fn handle(&self) -> &Handle {
        self.thread.handle()
    }

    /// Has something done there, with the sockets that it opens.
    pub async fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> T {
        // The thread lives as long as this reference to it.
        run_on(self.handle().clone(), work).await
    }
}

/// Has the kernel (from 6.12 on; an older one does not mind) let this thread in before others that are in the middle of a
/// longer turn, for turns that are as short. It gets no more of a processor for it than before.
fn take_short_turns() -> Result<(), Errno> {
    let mut scheduling = scheduling()?;
    if scheduling.sched_policy != SCHED_OTHER as u32 {
        // Somebody has decided otherwise.
        return Ok(());
    }
    scheduling.sched_runtime = SHORT_TURN.as_nanos() as u64;
    set_scheduling(&scheduling)
}

/// Of this thread.
#[allow(unsafe_code)]
fn scheduling() -> Result<sched_attr, Errno> {
    let size = size_of::<sched_attr>() as c_uint;
    let mut found = MaybeUninit::<sched_attr>::zeroed();
    // SAFETY: the kernel writes at most `size` bytes to where so many are; plain numbers, of which all values are valid.
    Errno::result(unsafe { syscall(SYS_sched_getattr, 0, found.as_mut_ptr(), size, 0) })?;
    // SAFETY: zeroes are valid, and so is what the kernel wrote.
    Ok(unsafe { found.assume_init() })
}

#[allow(unsafe_code)]
fn set_scheduling(wanted: &sched_attr) -> Result<(), Errno> {
    // SAFETY: the kernel reads what the reference refers to, whose size stands in it.
    Errno::result(unsafe { syscall(SYS_sched_setattr, 0, std::ptr::from_ref(wanted), 0) }).map(drop)
}

fn may_give_way(pull: &OnceLock<watch::Receiver<PullState>>) -> bool {
    pull.get().is_none_or(|pull| *pull.borrow() != PullState::Pulling)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use bytes::Bytes;
    use nbd::address::Address;
    use nbd::client::{Client, ConnectOptions};
    use nbd::memory::SingleExport;
    use nbd::server::{Listener, ServeOptions};
    use nbd::uri::NbdUri;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::export::LazyExport;
    use crate::store::MemoryStore;

    const SIZE: usize = 1 << 20;

    /// One letter: whether the kernel has a thread of this process running (R) or asleep (S).
    fn state(thread: nix::unistd::Pid) -> char {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap();
        stat.rsplit(") ").next().unwrap().chars().next().unwrap()
    }

    /// A client that asks one thing after the other is looked for; the answers are the same, and with its last request
    /// that ends.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_steady_client_is_served_there_and_the_thread_sleeps_when_it_stops() {
        let home = Home::new("web").unwrap();
        let thread = home.run(async { nix::unistd::gettid() }).await;
        let export = LazyExport::local_on("disk", Arc::new(MemoryStore::new(SIZE as u64)), false).unwrap();
        let exports = Arc::new(SingleExport::new("disk", Arc::new(export.with_home(home))));
        let (directory, shutdown) = (tempfile::tempdir().unwrap(), CancellationToken::new());
        let address = Address::Unix(directory.path().join("s"));
        let listener = Listener::bind(&address).await.unwrap();
        let served = tokio::spawn(listener.run(exports, ServeOptions::default(), shutdown.clone()));
        let client = Client::connect(&NbdUri::new(address, "disk"), &ConnectOptions::default()).await.unwrap();
        let mut expected = vec![0; SIZE];
        for round in 0..3000usize {
            let length = [512, 4096, 100, 70_000, 300_000][round % 5];
            let offset = (round * 7919 * 512) % (SIZE - length);
            if round % 3 == 0 {
                expected[offset..offset + length].fill(round as u8);
                let bytes = Bytes::copy_from_slice(&expected[offset..offset + length]);
                client.write(offset as u64, bytes, false).await.unwrap();
            } else {
                let read = client.read(offset as u64, length).await.unwrap();
                assert!(read == expected[offset..offset + length], "round {round}");
            }
        }
        let begun = Instant::now();
        while state(thread) != 'S' {
            assert!(begun.elapsed() < Duration::from_secs(30), "it spins, although nobody asks");
            tokio::task::yield_now().await;
        }
        client.close().await;
        shutdown.cancel();
        served.await.unwrap();
    }

    #[tokio::test]
    async fn its_turns_are_short() {
        let home = Home::new("web").unwrap();
        let (its, ours) = (home.run(async { scheduling() }).await.unwrap(), scheduling().unwrap());
        // A kernel that does not know of turns says nothing of any.
        let expected = if ours.sched_runtime == 0 { 0 } else { SHORT_TURN.as_nanos() as u64 };
        assert_eq!((its.sched_runtime, its.sched_nice), (expected, ours.sched_nice));
    }

    #[tokio::test]
    async fn it_gives_way_but_not_to_the_pull() {
        let home = Home::new("web").unwrap();
        assert!(may_give_way(&home.pull));
        let pull = watch::Sender::new(PullState::Off);
        home.goes_before(pull.subscribe());
        for state in [PullState::Off, PullState::Pulling, PullState::PausedNoSpace, PullState::Complete] {
            pull.send_replace(state);
            assert_eq!(may_give_way(&home.pull), state != PullState::Pulling);
        }
    }
}
